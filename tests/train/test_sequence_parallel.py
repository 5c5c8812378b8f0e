"""Two processes that divide each row train as one process does that holds it whole: `parallel: {sequences: 2}`."""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import train_harness as harness
from train_harness import Run

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import read_json
from mixfuse.train.data.packing import Share, divided, pack_batch
from mixfuse.train.planning.training_plan import Hardware, Plan, advise, plan, speed
from mixfuse.train.processes.checkpoint import last_checkpoint
from mixfuse.train.recipe import load_recipe
from mixfuse.train.run import start

DIVIDED = ["processes=2", "parallel.sequences=2"]
PACKED = ["packing=true", "max_length=40", "router_aux_loss_coef=0.05", "optimizer.steps=4"]
"""Rows of one to five chats, two micro batches a step, and an epoch of three steps whose last row is alone."""
SAVED_AT = 3
LONG = ["max_length=131072", "optimizer.micro_batch=1", "optimizer.batch_size=8"]


@pytest.fixture(scope="module")
def packed(sft_recipe: Path, runs: Path) -> tuple[Run, Run]:
    """Packed rows on one process and on two, where layers are recomputed besides."""
    evaluation = harness.evaluated(sft_recipe, every=2)
    return (
        harness.train("sft", sft_recipe, f"out={runs / 'whole'}", *PACKED, evaluation),
        harness.train(
            "sft", sft_recipe, f"out={runs / 'halves'}", *PACKED, evaluation, *DIVIDED, "gradient_checkpointing=true"
        ),
    )


@pytest.fixture(scope="module")
def continued(sft_recipe: Path, runs: Path) -> tuple[Run, Run]:
    """Padded chats on one process, and on two that go on from the first one's checkpoint within an epoch."""
    out, copy, whole = runs / "padded", runs / "padded_copy", runs / "padded_whole"
    options = [f"out={out}", "optimizer.steps=6", f"save_every={SAVED_AT}", harness.evaluated(sft_recipe, every=6)]
    command = [sys.executable, "-m", "mixfuse", "train", "sft", str(sft_recipe), *options]
    with subprocess.Popen(command, env=harness.ENVIRONMENT, stderr=subprocess.DEVNULL) as running:
        deadline = time.monotonic() + 200
        while last_checkpoint(out) is None:
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        shutil.copytree(out, copy)
    assert running.returncode == 0 and last_checkpoint(copy) is not None
    out.rename(whole)
    copy.rename(out)  # a run is resumed where it was
    return Run(whole), harness.train("sft", sft_recipe, *options, *DIVIDED)


@pytest.mark.zero3
@pytest.mark.parametrize("key", ["loss", "grad_norm", "aux_loss", "num_tokens", "mean_token_accuracy", "epoch"])
@pytest.mark.slow
def test_packed_rows_train_as_on_one_process(key: str, packed: tuple[Run, Run]) -> None:
    whole, halves = packed
    assert len(halves.steps) == 4
    assert halves.series(key) == pytest.approx(whole.series(key), rel=1e-5)


@pytest.mark.zero3
@pytest.mark.parametrize("pair", ["packed", "continued"])
@pytest.mark.slow
def test_the_held_out_loss_is_that_of_one_process(pair: str, request: pytest.FixtureRequest) -> None:
    """Divided chats of a pass are in one row; one process pads them in `continued`, so they do not see one another."""
    whole, halves = request.getfixturevalue(pair)
    for key in ("eval_loss", "eval_tokens", "eval_token_accuracy"):
        expected = [row[key] for row in whole.evaluations]
        assert len(expected) > 1
        assert [row[key] for row in halves.evaluations] == pytest.approx(expected, rel=1e-5)


@pytest.mark.zero3
@pytest.mark.slow
def test_the_adapter_is_that_of_one_process(packed: tuple[Run, Run]) -> None:
    whole, halves = (run.weights() for run in packed)
    assert halves.keys() == whole.keys()
    for name, weight in whole.items():
        assert (halves[name] - weight).abs().max() <= 1e-3 * weight.abs().max(), name


@pytest.mark.zero3
@pytest.mark.slow
def test_two_processes_continue_what_one_began_on_padded_chats(continued: tuple[Run, Run]) -> None:
    whole, halves = continued
    steps = [row["step"] for row in halves.steps]
    assert steps == list(range(1, 7))
    for key in ("loss", "grad_norm"):
        assert halves.series(key) == pytest.approx(whole.series(key), rel=1e-5)
    assert halves.record["recipe"]["parallel"] == {"sequences": 2}


@pytest.mark.parametrize("of", [2, 4])
def test_the_parts_of_a_row_make_the_row(of: int) -> None:
    import torch

    ids = [torch.arange(10, 15), torch.arange(20, 22)]
    labels = [torch.tensor([-100, 1, 2, 3, 4]), torch.tensor([-100, 5])]
    row = pack_batch(ids, labels)
    parts = [divided(ids, labels, Share(number, of), 9) for number in range(of)]
    joined = {key: torch.cat([part[key] for part in parts], 1) for key in ("input_ids", "position_ids", "shift_labels")}
    assert joined["input_ids"].tolist() == [[*row["input_ids"][0].tolist(), 9]]
    assert joined["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 0]]
    assert joined["shift_labels"].tolist() == [[1, 2, 3, 4, -100, 5, -100, -100]]
    assert [part["padding"] for part in parts] == [0] * (of - 1) + [1]
    assert all(part["cu_seq_lens_q"].tolist() == [0, 5, 7, 8] for part in parts)


def test_padding_may_be_longer_than_a_part() -> None:
    import torch

    parts = [divided([torch.tensor([7])], [torch.tensor([-100])], Share(number, 4), 9) for number in range(4)]
    assert [part["padding"] for part in parts] == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("sft", ["attention=sdpa"], "attention: sdpa does not go with parallel.sequences: DeepSpeed's Ulysses drops"),
        ("sft", ["attention=flex_attention"], "attention: flex_attention does not go with parallel.sequences"),
        ("sft", ["processes=3"], "parallel.sequences: 2 does not divide the run's 3 processes"),
        ("sft", ["processes=6", "optimizer.micro_batch=4"], "micro_batch * processes / parallel.sequences = 12"),
        ("judge", [], "parallel.sequences: is for SFT; the judge's loss is of one position"),
    ],
)
def test_a_recipe_that_cannot_divide_is_refused(
    stage: str, overrides: list[str], message: str, request: pytest.FixtureRequest
) -> None:
    recipe = request.getfixturevalue(f"{stage}_recipe")
    with pytest.raises(MixfuseError) as caught:
        start(stage, recipe, [*({name.partition("=")[0]: name for name in [*DIVIDED, *overrides]}.values())])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_heads_that_do_not_divide_are_refused(sft_recipe: Path) -> None:
    with pytest.raises(MixfuseError, match="3 processes cannot divide the base's 4 query heads and 2 key heads"):
        start("sft", sft_recipe, ["processes=3", "parallel.sequences=3"])


def test_a_base_with_dropout_needs_flash_attention_2() -> None:
    import torch

    from mixfuse.train.model.attention import choose

    config = SimpleNamespace(attention_dropout=0.1)
    assert choose("auto", config, torch.float32, packing=False).name == "sdpa"
    with pytest.raises(MixfuseError, match=r"parallel.sequences: no attention .* varlen has no dropout"):
        choose("auto", config, torch.float32, packing=False, sequences=2)


CONFIGS = harness.PROJECT / "configs" / "mixtral-8x22b"
CARDS = Hardware(nodes=1, gpus=8, gpu_bytes=80 << 30, reserve_bytes=4 << 30)


def _plan(*overrides: str) -> Plan:
    recipe = load_recipe(CONFIGS / "domain_sft.yaml", "sft", [*LONG, *overrides])
    return plan(recipe, read_json(CONFIGS / "model" / "config.json"), read_json(recipe.deepspeed), CARDS)


def test_the_plan_divides_activations_and_counts_the_exchange() -> None:
    whole, divided_by_8 = _plan(), _plan("parallel.sequences=8")
    assert whole.exchanged_bytes == 0
    # Mixtral 8x22B: 56 layers, 48 query and 8 key heads of 128, 2 bytes; 7 of 8 parts leave the GPU.
    assert divided_by_8.exchanged_bytes == 56 * 2 * (131072 // 8) * 128 * 2 * (48 + 8) * 7 // 8
    checkpoints = 56 * (131072 // 8) * 6144 * 2
    assert checkpoints < divided_by_8.peak.activations < whole.peak.activations / 8
    assert divided_by_8.fits and not whole.fits
    assert speed(divided_by_8, tflops=989, utilisation=0.3, bandwidth=450e9).exchange == pytest.approx(
        131072 * 450e9 / (3 * divided_by_8.exchanged_bytes)
    )


def test_the_plan_names_groups_that_do_not_divide() -> None:
    assert "parallel.sequences: 5 does not divide the run's 8 processes" in _plan("parallel.sequences=5").problems


def test_the_plan_proposes_groups_that_make_long_chats_fit() -> None:
    config = read_json(CONFIGS / "model" / "config.json") | {"num_hidden_layers": 2}
    recipe, by_4 = (load_recipe(CONFIGS / "domain_sft.yaml", "sft", [*LONG, f"parallel.sequences={n}"]) for n in (1, 4))
    zero3 = read_json(recipe.deepspeed)
    needed = plan(by_4, config, zero3, CARDS).gpu_total
    tried = {change.change: change for change in advise(recipe, config, zero3, Hardware(1, 8, needed))}
    assert tried["parallel.sequences=4"].fits
    assert tried["parallel.sequences=4"].gpu_bytes == needed
