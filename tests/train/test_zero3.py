"""Training under real DeepSpeed ZeRO-3: any number of processes, one result; and an adapter that is whole."""

import json
import math
from pathlib import Path

import pytest
from train_harness import SFT_STEPS, Run

from mixfuse.contracts import chat_template

pytestmark = pytest.mark.zero3

HIDDEN, INNER, EXPERTS, RANK = 64, 128, 4, 4
QUERIES, KEYS = 128, 64
ATTENTION = {
    "q_proj": (HIDDEN, QUERIES),
    "k_proj": (HIDDEN, KEYS),
    "v_proj": (HIDDEN, KEYS),
    "o_proj": (QUERIES, HIDDEN),
}


@pytest.fixture(params=["sft", "judge"])
def by_one_and_two(request: pytest.FixtureRequest) -> tuple[Run, Run]:
    return request.getfixturevalue(f"{request.param}_by_one"), request.getfixturevalue(f"{request.param}_by_two")


def test_two_processes_have_the_losses_and_gradients_of_one(by_one_and_two: tuple[Run, Run]) -> None:
    one, two = by_one_and_two
    assert one.record["metrics"]["processes"] == 1
    assert two.record["metrics"]["processes"] == 2
    losses = one.series("loss")
    assert max(losses) - min(losses) > 0.05 * losses[0], "the losses hardly move, so their equality says nothing"
    assert two.series("loss") == pytest.approx(losses, rel=1e-3)
    # Adam hides a gradient that is off by a factor; its norm does not.
    assert two.series("grad_norm") == pytest.approx(one.series("grad_norm"), rel=1e-2)


def test_two_processes_leave_the_weights_of_one(by_one_and_two: tuple[Run, Run]) -> None:
    one, two = (run.weights() for run in by_one_and_two)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert (two[name] - weight).abs().max() <= 1e-2 * weight.abs().max() + 1e-5, name


def test_the_adapter_is_whole(by_one_and_two: tuple[Run, Run]) -> None:
    expected = {}
    for layer in (0, 1):
        stem = f"base_model.model.model.layers.{layer}"
        for module, (wide_in, wide_out) in ATTENTION.items():
            expected[f"{stem}.self_attn.{module}.lora_A.weight"] = (RANK, wide_in)
            expected[f"{stem}.self_attn.{module}.lora_B.weight"] = (wide_out, RANK)
        for wrapper, (wide_in, wide_out) in {".base_layer": (HIDDEN, 2 * INNER), "": (INNER, HIDDEN)}.items():
            expected[f"{stem}.mlp.experts{wrapper}.lora_A.weight"] = (EXPERTS * RANK, wide_in)
            expected[f"{stem}.mlp.experts{wrapper}.lora_B.weight"] = (wide_out, EXPERTS * RANK)
    for run in by_one_and_two:
        weights = run.weights()
        assert {name: tuple(weight.shape) for name, weight in weights.items()} == expected
        assert all(weight.isfinite().all() for weight in weights.values())
        assert all(weight.any() for weight in weights.values()), "a factor was not trained"


def test_each_moe_block_is_a_leaf_and_only_lora_trains(judge_by_one: Run) -> None:
    seen = json.loads((judge_by_one.out / "probe.json").read_text())
    assert seen["partitioned"], "the base was loaded whole, not under ZeRO-3"
    assert seen["moe_blocks_as_leaves"] == [True, True]
    assert seen["leaves"] == 2
    assert seen["trainable"]
    assert all("lora_" in name for name in seen["trainable"])
    assert any(name.endswith("mlp.gate.weight") for name in seen["frozen"]), "the router is not among the frozen"
    assert not any("lora_" in name for name in seen["frozen"])


def test_dpo_starts_with_reference_equal_to_policy(judge_by_one: Run, judge_by_two: Run) -> None:
    before = json.loads((judge_by_one.out / "probe.json").read_text())["before"]
    assert before["reference"] == pytest.approx(before["policy"], abs=1e-4)
    for run in (judge_by_one, judge_by_two):
        first = run.steps[0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
        assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)


def test_the_dpo_reference_is_the_policy_without_its_adapter(judge_by_one: Run) -> None:
    seen = json.loads((judge_by_one.out / "probe.json").read_text())
    before, after = seen["before"], seen["after"]
    assert after["reference"] == pytest.approx(before["reference"], abs=1e-4)
    moved = [abs(a - b) for a, b in zip(after["policy"], after["reference"], strict=True)]
    assert max(moved) > 0.05, "training hardly moved the policy, so a reference that follows it would not show"


def test_every_micro_batch_of_the_judge_holds_both_orders(judge_by_one: Run) -> None:
    batches = json.loads((judge_by_one.out / "probe.json").read_text())["chosen_by_batch"]
    assert len(batches) == 8
    assert all(sorted(batch) == ["A", "B"] for batch in batches)


def test_metrics_has_every_step_once(sft_by_two: Run) -> None:
    assert [row["step"] for row in sft_by_two.steps] == list(range(1, SFT_STEPS + 1))
    for row in sft_by_two.steps:
        assert {"loss", "grad_norm", "learning_rate", "aux_loss", "time"} <= row.keys()
        assert math.isfinite(row["loss"])
    assert sft_by_two.rows[-1]["train_runtime"] > 0


def test_the_router_loss_is_in_sft_and_not_in_dpo(sft_by_two: Run, judge_by_two: Run) -> None:
    assert all(row["aux_loss"] > 0 for row in sft_by_two.steps)
    assert not any("aux_loss" in row for row in judge_by_two.steps)


def test_run_json_says_what_was_trained_on_what_by_what(sft_by_two: Run, judge_by_two: Run) -> None:
    record = sft_by_two.record
    assert (record["stage"], record["role"]) == ("sft", "domain")
    assert record["base"] == record["recipe"]["base"]
    assert record["recipe"]["processes"] == 2
    metrics, losses = record["metrics"], sft_by_two.series("loss")
    assert metrics["first_loss"] == losses[0]
    assert metrics["last_loss"] == pytest.approx(sum(losses) / len(losses))  # the last ten, here all
    assert (metrics["steps"], metrics["examples"]) == (SFT_STEPS, 16)
    assert {"torch", "transformers", "peft", "trl", "deepspeed", "mixfuse"} == record["libraries"].keys()
    assert record["judge_protocol"] is None
    # Of a base's own template, training and an engine have the same text.
    served = chat_template.digest_for_engine(Path(record["base"]))
    assert record["chat_template"] == judge_by_two.record["chat_template"] == served

    from mixfuse.contracts import judge_protocol

    assert judge_by_two.record["judge_protocol"] == judge_protocol.describe()


def test_a_finished_run_keeps_no_checkpoints(sft_by_two: Run) -> None:
    names = {path.name for path in sft_by_two.out.iterdir()}
    assert names == {"adapter", "metrics.jsonl", "metrics.png", "recipe.json", "run.json"}
