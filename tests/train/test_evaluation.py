"""Held-out loss, early stop and the best adapter, under ZeRO-3 with one process and two."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from train_harness import SFT_STEPS, Run, train

from mixfuse.contracts.files import write_jsonl
from mixfuse.train.data.sources import shared_out, short_names
from mixfuse.train.recipe import DataSource, Evaluation
from mixfuse.train.stages.evaluation import KeepBest

zero3 = pytest.mark.zero3


def held_out_loss(chats: Path, base: Path, adapter: Path | None = None) -> tuple[float, int]:
    """The loss of a token, and how many tokens, computed chat by chat by transformers and PEFT alone."""
    import torch
    from peft import PeftModel
    from transformers import MixtralForCausalLM

    from mixfuse.train.data.loss_mask import encode
    from mixfuse.train.model.tokenizer import load_tokenizer

    model = MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    tokenizer = load_tokenizer(base)
    total, tokens = 0.0, 0
    for line in chats.read_text().splitlines():
        ids, labels = (torch.tensor([part]) for part in encode(json.loads(line)["messages"], tokenizer, "all"))
        with torch.no_grad():
            scores = model.eval()(input_ids=ids).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(scores, labels[0, 1:], reduction="sum"))
        tokens += int((labels != -100).sum())
    return total / tokens, tokens


@zero3
def test_one_process_and_two_measure_the_same_held_out_loss(sft_by_one: Run, sft_by_two: Run) -> None:
    """Five chats in batches of four on one process, of two on two: no batch is full everywhere."""
    assert [row["step"] for row in sft_by_one.evaluations] == [0, 3, 6, SFT_STEPS]
    for one, two in zip(sft_by_one.evaluations, sft_by_two.evaluations, strict=True):
        assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-3)
        assert two["eval_tokens"] == one["eval_tokens"]
    assert sft_by_one.evaluations[-1]["eval_loss"] < sft_by_one.evaluations[0]["eval_loss"] - 0.1
    # Other tests compare its weights with those of runs that are not evaluated.
    assert sft_by_two.record["metrics"]["best_step"] == SFT_STEPS


@zero3
def test_the_held_out_loss_is_the_mean_over_tokens(sft_by_two: Run, runs: Path, tiny_base: Path) -> None:
    """At step 0 the adapter does nothing, so it is the base's own loss."""
    loss, tokens = held_out_loss(runs / "held_out.jsonl", tiny_base)
    first = sft_by_two.evaluations[0]
    assert first["eval_tokens"] == tokens
    assert first["eval_loss"] == pytest.approx(loss, rel=1e-5)


@zero3
def test_the_judge_is_evaluated_too(judge_by_one: Run, judge_by_two: Run) -> None:
    assert [row["step"] for row in judge_by_two.evaluations] == [0, 2, 4]
    for one, two in zip(judge_by_one.evaluations, judge_by_two.evaluations, strict=True):
        assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-2)
        assert two["eval_consistency"] == one["eval_consistency"]


@zero3
def test_a_run_that_gets_no_better_stops_and_its_best_adapter_is_saved(stopped_early: Run) -> None:
    losses = {row["step"]: row["eval_loss"] for row in stopped_early.evaluations if row["step"]}
    best = min(losses, key=lambda step: losses[step])
    metrics = stopped_early.record["metrics"]
    assert metrics["steps"] == best + 4 < 40, "two evaluations in a row without progress should have ended it"
    assert metrics["best_step"] == best
    assert metrics["best_eval_loss"] == losses[best]
    assert losses[metrics["steps"]] > losses[best] + 0.1, (
        "the last adapter is no worse, so keeping the best shows nothing"
    )


@zero3
def test_the_saved_adapter_has_the_loss_of_its_evaluation(stopped_early: Run, runs: Path, tiny_base: Path) -> None:
    """Read by plain PEFT: the file holds the best step's weights, not the last one's."""
    loss, _ = held_out_loss(runs / "held_out.jsonl", tiny_base, stopped_early.out / "adapter")
    assert loss == pytest.approx(stopped_early.record["metrics"]["best_eval_loss"], rel=1e-4)


@zero3
@pytest.mark.parametrize("stage", ["sft", "judge"])
@pytest.mark.slow
def test_each_data_sets_loss_is_reported(stage: str, request: Any, runs: Path, tiny_base: Path, tmp_path: Path) -> None:
    """What one set teaches, another may forget; a limit takes from all."""
    recipe = request.getfixturevalue(f"{stage}_recipe")
    rows = (runs / ("held_out.jsonl" if stage == "sft" else "pairs.jsonl")).read_text().splitlines(keepends=True)
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    few.write_text("".join(rows[:2]))
    many.write_text("".join(rows[2:]))
    steps = "optimizer={steps: 1, batch_size: 4, micro_batch: 2, learning_rate: 0.01, warmup_steps: 0}"
    data = f"evaluation={{data: [{few}, {many}], every: 1, limit: {4 if stage == 'sft' else 8}}}"
    run = train(stage, recipe, f"out={tmp_path}/run", "processes=2", steps, data)
    for row in run.evaluations:
        assert {name for name in row if name.startswith("eval_loss/")} == {"eval_loss/few", "eval_loss/many"}
    first = run.evaluations[0]
    if stage == "sft":
        for path, count in ((few, 2), (many, 2)):
            head = tmp_path / f"{path.stem}.head.jsonl"
            head.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
            loss, _ = held_out_loss(head, tiny_base)
            assert first[f"eval_loss/{path.stem}"] == pytest.approx(loss, rel=1e-5)
    else:  # one pair of `few`, three of `many`
        parts = first["eval_loss/few"] + 3 * first["eval_loss/many"]
        assert first["eval_loss"] == pytest.approx(parts / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("limit", "counts", "taken"),
    [(None, [3, 9], [3, 9]), (6, [9, 9], [3, 3]), (8, [2, 9], [2, 6]), (7, [9, 1, 9], [3, 1, 3]), (1, [5, 5], [1, 1]),
     (100, [3, 4], [3, 4])],
)  # fmt: skip
def test_a_limit_takes_from_every_set(limit: int | None, counts: list[int], taken: list[int]) -> None:
    assert shared_out(limit, counts) == taken


def test_sets_of_equal_names_are_told_apart() -> None:
    sources = [
        DataSource(path=Path("a/chats.jsonl")),
        DataSource(hub="owner/chats"),
        DataSource(path=Path("b/x.parquet")),
    ]
    assert short_names(sources) == ["chats", "chats-2", "x"]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process only."""
    import torch

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Lights:
    """What a callback is given: arguments, state and control."""

    def __init__(self, step: int = 0) -> None:
        self.device, self.global_step, self.is_world_process_zero, self.should_training_stop = "cpu", step, True, False


@pytest.mark.usefixtures("alone")
def test_patience_counts_on_over_a_resumed_run(tmp_path: Path) -> None:
    losses = [3.0, 2.0, 2.5, 1.95, 2.1, 2.2]
    evaluation = Evaluation(share=0.1, patience=3, min_delta=0.1, keep_best=False)

    def stop_step(resumed_at: int) -> int:
        rows: list[dict[str, Any]] = [{"step": n + 1, "eval_loss": loss} for n, loss in enumerate(losses)]
        write_jsonl(tmp_path / "metrics.jsonl", rows)  # rows beyond the checkpoint too, as a killed run leaves them
        callback = KeepBest(None, SimpleNamespace(out=tmp_path), evaluation)
        callback.on_train_begin(None, Lights(resumed_at), None)
        for step, loss in enumerate(losses, start=1):
            control = Lights()
            if step > resumed_at:
                callback.on_evaluate(Lights(), Lights(step), control, {"eval_loss": loss})
            if control.should_training_stop:
                return step
        return 0

    # 1.95 is not better than 2.0 by 0.1, so step 2 stays the best and step 5 is the third without progress.
    assert [stop_step(resumed_at) for resumed_at in range(5)] == [5] * 5
