"""Verdict pairs: one pass over the prompt gives TRL's DPO, in value and gradient; what a recipe's stages change."""

import dataclasses
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import train_harness as harness
from train_harness import Run
from transformers import TrainerCallback

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import family_of
from mixfuse.contracts.files import read_json, read_jsonl, sha256_file, write_jsonl
from mixfuse.contracts.judge_protocol import Calibration
from mixfuse.contracts.strict_yaml import load
from mixfuse.train.recipe import JudgeRecipe

zero3 = pytest.mark.zero3


@pytest.fixture(scope="module")
def trainer(judge_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A judge's trainer without DeepSpeed, its adapter away from zero, so that policy and reference differ."""
    import torch

    folder = tmp_path_factory.mktemp("verdicts")
    trainer = make_trainer(load(judge_recipe, JudgeRecipe, [f"out={folder}"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return trainer


def make_trainer(recipe: JudgeRecipe) -> Any:
    import torch
    from trl import DPOConfig

    from mixfuse.train.data.pair_data import pairs_datasets
    from mixfuse.train.model.load import load_base, lora_config
    from mixfuse.train.model.tokenizer import load_tokenizer
    from mixfuse.train.stages.one_pass_dpo import Reference
    from mixfuse.train.stages.trainers import JudgeTrainer, NamedPairs, Verdicts, verdict_rows

    tokenizer = load_tokenizer(recipe.base)
    arguments = DPOConfig(
        str(recipe.out), use_cpu=True, bf16=False, report_to=[], remove_unused_columns=False, router_aux_loss_coef=0.0,
        per_device_train_batch_size=recipe.optimizer.micro_batch, gradient_checkpointing=False,
        gradient_accumulation_steps=recipe.optimizer.batch_size // recipe.optimizer.micro_batch,
        max_steps=recipe.optimizer.steps, learning_rate=recipe.optimizer.learning_rate, save_strategy="no",
        train_sampling_strategy="sequential", disable_tqdm=True,
    )  # fmt: skip
    trainer = JudgeTrainer(
        model=load_base(recipe.base, torch.float32),
        args=arguments,
        train_dataset=pairs_datasets(recipe, tokenizer).train,
        data_collator=NamedPairs(pad_token_id=tokenizer.pad_token_id, verdicts=True),
        processing_class=tokenizer,
        peft_config=lora_config(family_of(recipe.base), recipe.lora),
    )
    reference = Reference(recipe.out / "reference.json", "tiny")
    trainer.read_verdicts(Verdicts(verdict_rows(trainer.train_dataset), reference))
    return trainer


def loss_and_gradients(
    trainer: Any, compute: Any, numbers: tuple[int, ...] = (0, 1, 4, 5)
) -> tuple[float, dict[str, Any]]:
    rows = [trainer.train_dataset[number] for number in numbers]
    batch = trainer.data_collator(rows)
    batch.pop("ids")
    trainer.model.zero_grad()
    loss = compute(batch)
    loss.backward()
    return float(loss.detach()), {
        name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None
    }


def test_no_process_waits_while_another_tokenises(
    judge_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait is a collective, and its time-out ends the run."""
    from accelerate import PartialState

    def waits(_self: Any, _is_main: bool) -> Any:
        raise AssertionError("a process waited for another to tokenise")

    monkeypatch.setattr(PartialState, "_goes_first", waits)
    assert len(make_trainer(load(judge_recipe, JudgeRecipe, [f"out={tmp_path}"])).train_dataset) == 24


@pytest.mark.parametrize(
    ("losses", "weights"),
    [(["sigmoid"], [1.0]), (["ipo"], [1.0]), (["sigmoid", "sft"], [1.0, 0.5]), (["sft"], [1.0])],
)
def test_one_pass_gives_the_loss_and_gradients_of_trls_dpo(trainer: Any, losses: list[str], weights: Any) -> None:
    from trl import DPOTrainer

    trainer._trained_loss = losses, weights
    trainer._metrics["train"].clear()  # what another test left

    def trl(batch: dict[str, Any]) -> Any:
        """TRL's own: four sequences a pair, the reference by disabling the adapter."""
        batch.pop("keys")
        trainer.precompute_ref_logps = False
        trainer.loss_types, trainer.loss_weights = losses, weights
        try:
            return DPOTrainer._compute_loss(trainer, trainer.model, batch, False)
        finally:
            trainer.precompute_ref_logps = True

    expected, gradients = loss_and_gradients(trainer, trl)
    metrics = {name: values.pop() for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
    found, ours = loss_and_gradients(trainer, lambda batch: trainer._compute_loss(trainer.model, batch, False))
    assert found == pytest.approx(expected, rel=1e-5)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        assert (ours[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
    assert abs(metrics["rewards/margins"]) > 1e-3, "policy and reference do not differ, so the loss says nothing"
    for name, value in metrics.items():
        assert trainer._metrics["train"][name].pop() == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_an_offset_is_odpos(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is -log sigmoid(beta (policy - reference) - delta), and the rewards logged fall short by delta."""
    plain, delta = trainer._verdicts, 0.7
    monkeypatch.setattr(trainer, "_trained_loss", (["sigmoid"], [1.0]))
    margins = []
    for offsets in ({}, {row.key: delta / trainer.beta for row in plain.rows}):
        monkeypatch.setattr(trainer, "_verdicts", dataclasses.replace(plain, offsets=offsets))
        batch = trainer.data_collator([trainer.train_dataset[2]])
        batch.pop("ids")
        loss = float(trainer._compute_loss(trainer.model, batch, False).detach())
        margins.append(trainer._metrics["train"]["rewards/margins"].pop())
        assert loss == pytest.approx(math.log1p(math.exp(-margins[-1])), abs=1e-5)
    assert margins[1] == pytest.approx(margins[0] - delta, abs=1e-4)


def test_a_preference_for_a_position_is_punished_by_its_square(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from mixfuse.train.stages.one_pass_dpo import position_bias
    from mixfuse.train.stages.trainers import verdict_rows

    # An answer that gains 3 and a position that gains 2: 5 where it stands first, 1 where it stands second.
    assert position_bias(torch.tensor([5.0, 1.0, -1.0, -1.0])).tolist() == [2.0, 0.0]

    plain, weight = trainer._verdicts, 0.8
    monkeypatch.setattr(trainer, "_trained_loss", (["sigmoid"], [1.0]))
    found = []
    for consistency in (0.0, weight):
        monkeypatch.setattr(trainer, "_verdicts", dataclasses.replace(plain, consistency=consistency))
        found.append(
            loss_and_gradients(trainer, lambda batch: trainer._compute_loss(trainer.model, batch, False), (0, 1))
        )
    rows = verdict_rows(trainer.train_dataset.select([0, 1]))
    log_odds = [chosen - rejected for chosen, rejected in trainer._logprobs(trainer.model, rows, 2)]
    bias = (log_odds[0] - log_odds[1]) / 2
    assert abs(bias) > 1e-3
    assert found[1][0] == pytest.approx(found[0][0] + weight * (trainer.beta * bias) ** 2, rel=1e-5)
    assert any((found[1][1][name] - gradient).abs().max() > 0 for name, gradient in found[0][1].items())


def test_a_round_takes_what_the_judge_gets_wrong_or_flips(judge_recipe: Path, tmp_path: Path) -> None:
    from mixfuse.train.data.schedule import FILE, Rounds

    optimizer = "optimizer={steps: 6, batch_size: 8, micro_batch: 4, learning_rate: 1e-2}"
    recipe = load(judge_recipe, JudgeRecipe, [f"out={tmp_path}", optimizer, "rounds=3"])
    trainer = make_trainer(recipe)
    rows = trainer.train_dataset
    lengths = [len(ids) for ids in rows["prompt_ids"]]
    rounds = Rounds(trainer, recipe, rows, lengths, 6)
    trainer.train_dataset = rounds
    taken, judged = [], {}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            taken.append(trainer.step_ids)
            log_odds = trainer.log_odds(rows)
            pairs = zip(log_odds[::2], log_odds[1::2], strict=True)
            judged[state.global_step] = [number for number, pair in enumerate(pairs) if min(pair) <= 0]

    trainer.add_callback(Watch())
    trainer.add_callback(rounds)
    trainer.train()

    begun = read_json(tmp_path / FILE)
    assert list(begun) == ["2", "4"]
    assert len(taken) == 6
    for step, wrong in begun.items():
        assert wrong == judged[int(step)]
        assert 0 < len(wrong) < len(rows) // 2, "every pair is wrong, or none: the round says nothing"
        ids = {rows[2 * number]["id"] for number in wrong}
        _, *after = [batch for batches in taken[int(step) : int(step) + 2] for batch in batches]  # one is read ahead
        assert after
        assert all(set(batch) <= ids for batch in after)

    resumed = Rounds(trainer, recipe, rows, lengths, 6)
    resumed.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert [resumed[place]["id"] for place in range(48)] == [rounds[place]["id"] for place in range(48)]
    (tmp_path / FILE).unlink()
    with pytest.raises(MixfuseError, match="lacks the round from step 2"):
        resumed.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_a_step_takes_pairs_of_every_length_and_computes_like_with_like(judge_recipe: Path) -> None:
    from mixfuse.train.data.schedule import schedule

    recipe = load(judge_recipe, JudgeRecipe, ["optimizer={steps: 9, batch_size: 8, micro_batch: 2}"])
    rng = random.Random(1)
    lengths = [length for _ in range(20) for length in [rng.randint(10, 90)] * 2]
    taken = schedule(recipe, lengths, 9)
    assert len(taken) == 9 * 8
    first_pass = taken[:40]
    assert sorted(first_pass) == list(range(40)), "a pass over the data takes every row once"
    for start in range(0, len(taken), 8):
        step = taken[start : start + 8]
        assert [lengths[row] for row in step] == sorted((lengths[row] for row in step), reverse=True)
        assert all(one + 1 == other and one % 2 == 0 for one, other in zip(step[::2], step[1::2], strict=True))
        if start < 40:  # in which step a pair is does not hang on its length
            assert sorted(step) == list(range(start, start + 8))
    assert taken[40:] != taken[:32], "the second pass is shuffled anew"
    assert schedule(recipe, lengths, 9) == taken
    one = load(judge_recipe, JudgeRecipe, ["optimizer={steps: 5, batch_size: 4, micro_batch: 2}", "orders=one"])
    assert Counter(schedule(one, lengths[:10], 5)) == Counter([*range(10), *range(10)])


def test_the_heads_rows_are_in_float32(judge_recipe: Path, tmp_path: Path) -> None:
    """In bfloat16, at logits near 20, log-odds are multiples of 0.125 nats, and a near-even pair's often are 0."""
    import torch

    from mixfuse.train.model.load import load_base
    from mixfuse.train.stages.one_pass_dpo import OnePass, VerdictRow, logprobs, next_logits

    recipe = load(judge_recipe, JudgeRecipe, [f"out={tmp_path}"])
    model = load_base(recipe.base, torch.bfloat16).eval()
    ids = torch.tensor([harness.PROBE])
    states: list[Any] = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    weight = model.lm_head.weight.detach()
    with torch.no_grad():
        spread = float((model(ids).logits[0, -1]).abs().max())
    # A head of its own: the tiny base's is its embedding.
    model.lm_head.weight = torch.nn.Parameter(weight * (24 / spread), requires_grad=False)
    precise = model.lm_head.weight.double()
    found = next_logits(model, ids, torch.ones_like(ids), torch.tensor([len(harness.PROBE) - 1]))[0]
    exact = (precise @ states[-1][0, 0].double()).detach()
    assert found.dtype == torch.float32
    assert (found.double() - exact).abs().max() < 1e-4
    far = (exact.abs() > 16).nonzero().flatten().tolist()
    near_even = [(a, b) for a in far for b in far if a < b and 0 < abs(exact[a] - exact[b]) < 0.1][:40]
    assert len(near_even) > 5, "hardly a pair is near even, so the test says nothing"
    rounded = exact.bfloat16()
    assert any(rounded[a] == rounded[b] for a, b in near_even), "bfloat16 would do"

    rows = [VerdictRow(harness.PROBE, a, b) for a, b in near_even]
    computed = logprobs(model, rows, micro_batch=len(rows), pad=0)
    exact = precise @ states[-1][0, 0].detach().double()
    for (a, b), (chosen, rejected) in zip(near_even, computed, strict=True):
        assert chosen - rejected == pytest.approx(float(exact[a] - exact[b]), abs=1e-4)
        assert chosen != rejected

    # In training: the log-odds and their gradient are those of a head that is float32 as a whole.
    chosen, rejected = near_even[0]
    length = len(harness.PROBE)
    labels = torch.tensor([[-100] * length + [chosen], [-100] * length + [rejected]])
    pair = torch.tensor([[*harness.PROBE, chosen], [*harness.PROBE, rejected]])
    out = OnePass(model)(pair, torch.ones_like(pair), labels)
    log_odds = out.log_probs[0].sum() - out.log_probs[1].sum()
    exact = precise @ states[-1][0, 0].detach().double()
    assert float(log_odds.detach()) == pytest.approx(float(exact[chosen] - exact[rejected]), abs=1e-4)
    (ours,) = torch.autograd.grad(log_odds, states[-1])
    whole = (precise[chosen] - precise[rejected]).to(torch.bfloat16)
    assert torch.equal(ours[0, 0], whole)


def test_the_references_passes_are_large_and_without_gradients(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    from mixfuse.train.stages.one_pass_dpo import Reference

    passes = []

    def look(_module: Any, _args: Any, keys: dict[str, Any]) -> None:
        passes.append((len(keys["input_ids"]), len(keys["logits_to_keep"]), torch.is_grad_enabled()))

    hook = trainer.model.get_base_model().register_forward_pre_hook(look, with_kwargs=True)
    monkeypatch.setattr(
        trainer, "_verdicts", dataclasses.replace(trainer._verdicts, reference=Reference(tmp_path / "r.json", "tiny"))
    )
    rows = trainer._verdicts.rows
    trainer.reference_logprobs(rows, trainer.model)
    hook.remove()
    assert [count for count, _, _ in passes] == [16, len(rows) - 16]
    assert trainer.args.per_device_train_batch_size == 2
    assert all(kept < 16 and not grad for _, kept, grad in passes)


def test_what_a_reference_says_is_kept_and_not_taken_for_anothers(tmp_path: Path) -> None:
    from mixfuse.train.stages.one_pass_dpo import Reference, VerdictRow

    rows = [VerdictRow([1, 2, 3], 7, 8), VerdictRow([1, 2, 3], 8, 7), VerdictRow([1, 2, 3], 7, 8)]
    path = tmp_path / "reference.json"
    reference = Reference(path, "a base")
    assert reference.missing(rows) == rows[:2]
    other = Reference(path, "a base")  # another run, at the same time
    reference.add(rows[:1], [(-1.0, -2.0)], write=True)
    other.add(rows[1:2], [(-2.0, -1.0)], write=True)
    assert Reference(path, "a base").missing(rows) == []
    with pytest.raises(MixfuseError, match="another base or dtype"):
        Reference(path, "another base")


@pytest.fixture(scope="module")
def warmed(judge_recipe: Path, runs: Path) -> Run:
    """A round of two steps of SFT, then one of DPO with a margin, on two processes; a step takes all of the data."""
    out = runs / "warmed"
    whole = "optimizer={steps: 4, batch_size: 24, micro_batch: 6, learning_rate: 1e-2, warmup_steps: 0}"
    stages = ("warm_start=2", "margin=0.5", "rounds=2")
    return harness.train("judge", judge_recipe, f"out={out}", *stages, "processes=2", whole)


@zero3
def test_after_a_warm_start_the_policy_it_left_is_the_reference(warmed: Run) -> None:
    first, second, third, fourth = warmed.steps
    assert first["loss"] == pytest.approx(-first["logps/chosen"], rel=1e-4), "the warm start is SFT on the verdict"
    assert second["loss"] < first["loss"]
    # Policy and reference are equal again, so all that is left is the margin: -log sigmoid(-0.5).
    assert third["loss"] == pytest.approx(math.log1p(math.exp(0.5)), rel=1e-3)
    assert third["rewards/margins"] == pytest.approx(-0.5, abs=1e-3)
    assert fourth["loss"] < third["loss"]
    assert "wrong_pairs" not in first
    assert 0 <= second["wrong_pairs"] <= 12, "a round counts the pairs that are left to learn"


@zero3
def test_a_finished_judge_knows_its_calibration_and_its_data(warmed: Run, judge_by_one: Run, runs: Path) -> None:
    for run in (warmed, judge_by_one):
        best = run.record["metrics"]["best_step"]
        (row,) = [row for row in run.evaluations if row["step"] == best]
        assert run.record["calibration"] == {
            "temperature": row["eval_temperature"],
            "tie_margin": row["eval_tie_margin"],
        }
        Calibration(**run.record["calibration"])
        (data,) = run.record["training_data"]
        assert data == {"name": "pairs.jsonl", "sha256": sha256_file(runs / "pairs.jsonl"), "rows": 24, "licence": None}
        assert not (run.out / "data").exists()


@zero3
def test_the_evaluation_before_training_is_the_bases(judge_by_one: Run, judge_by_two: Run) -> None:
    first = judge_by_one.evaluations[0]
    assert 0 <= first["eval_both_orders_correct"] <= first["eval_consistency"] <= 1
    # At its best temperature nothing is much worse than knowing nothing; Platt's targets cost a little of 12 pairs.
    assert first["eval_loss"] <= math.log(2) + 0.01
    assert judge_by_two.evaluations[0]["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-3)


@zero3
@pytest.mark.slow
def test_a_rationale_is_trained_whole_by_trls_own_dpo(judge_recipe: Path, runs: Path) -> None:
    """Completions of several tokens, the token that ends the turn among them: four sequences a pair, and DPO's ln 2."""
    rows = read_jsonl(runs / "pairs.jsonl")
    for row in rows:
        for side, why in (("chosen", "It repeats the word."), ("rejected", "It is longer, and says more.")):
            row[side] = [{"role": "assistant", "content": f"{why} Verdict: {row[side][0]['content']}"}]
    write_jsonl(runs / "rationales.jsonl", rows)
    data = runs / "rationales.jsonl"
    run = harness.train(
        "judge", judge_recipe, f"out={runs / 'rationale'}", f"data={data}", f"evaluation={{data: {data}, every: 4}}",
        "completion=rationale", "sft_weight=0.1",
    )  # fmt: skip
    first, *_, last = run.steps
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert first["loss"] > math.log(2) + 0.1, "the rationale's own likelihood has no part in the loss"
    assert last["rewards/margins"] > 0.1
    assert "eval_rewards/accuracies" in run.evaluations[-1]
    assert run.record["calibration"] is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["warm_start=5"], "warm_start 5 is above the run.s 4 steps"),
        (["completion=rationale", "warm_start=1"], "warm_start goes with completion: verdict"),
        (["completion=rationale", "margin=1"], "margin goes with completion: verdict"),
        (["completion=rationale", "rounds=2"], "rounds goes with completion: verdict"),
        (["orders=one", "rounds=2"], "rounds need orders: both"),
        (["orders=one", "consistency=1"], "set orders: both and an even micro_batch"),
        (["consistency=1", "optimizer={steps: 4, batch_size: 3, micro_batch: 3}"], "an even micro_batch"),
        (["loss=hinge"], "'loss'"),
        (["orders=two"], "'orders'"),
    ],
)
def test_stages_that_do_not_go_together_are_refused(judge_recipe: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(MixfuseError, match=message):
        load(judge_recipe, JudgeRecipe, overrides)


def test_pairs_with_the_same_first_token_are_no_verdicts(trainer: Any) -> None:
    from mixfuse.train.stages.judge_dpo import verdicts_of

    same = trainer.train_dataset.map(lambda row: {"rejected_ids": row["chosen_ids"]})
    with pytest.raises(MixfuseError, match="set completion: rationale"):
        verdicts_of(None, same)
