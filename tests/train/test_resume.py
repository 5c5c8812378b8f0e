"""A training run that is cut off: nothing goes on behind the user's back, and the same command continues it."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import train_harness as harness
from train_harness import SFT_STEPS, Run

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import write_json
from mixfuse.contracts.strict_yaml import load
from mixfuse.train.processes import whole_state
from mixfuse.train.processes.checkpoint import WHOLE, check_resume, last_checkpoint, mark
from mixfuse.train.recipe import SftRecipe

STEPS, SAVE_EVERY = 16, 3  # an epoch has 4 steps: checkpoints lie within epochs and on their borders


@dataclass(frozen=True)
class CutOff:
    """How a run ended that was sent a signal."""

    signal: signal.Signals
    after: int  # the step that had been logged last when it was sent
    exit_code: int
    survivors: list[psutil.Process]
    checkpoint: Path | None
    ended_at: float
    log: str


@dataclass(frozen=True)
class Interrupted:
    """A run on two processes that was stopped by SIGTERM, continued, killed by SIGKILL, and continued to the end."""

    cuts: list[CutOff]
    run: Run


@pytest.fixture(scope="session")
def dropout_recipe(tiny_base: Path, runs: Path) -> Path:
    """Trains under dropout, in the base and in the adapter, so that the loss curve hangs on the state of the RNGs."""
    base = runs / "dropout_base"
    shutil.copytree(tiny_base, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    folder = runs / "dropout"
    folder.mkdir()
    return harness.sft_recipe(folder, base, lora={"r": 4, "alpha": 16, "dropout": 0.1, "experts": {0: [0, 1], 1: [3]}})


def _options(out: Path) -> list[str]:
    return [f"out={out}", "processes=2", f"optimizer.steps={STEPS}", f"save_every={SAVE_EVERY}"]


def cut_off(
    recipe: Path, out: Path, number: signal.Signals, *, after: int, options: Sequence[str] | None = None
) -> CutOff:
    """Starts a run and sends it a signal once a step is logged: SIGKILL to all its processes, others to the first."""
    command = [sys.executable, "-m", "mixfuse", "train", "sft", str(recipe), *(options or _options(out))]
    log = out.with_suffix(f".{number.name}.log")
    with log.open("w") as stream:
        parent = subprocess.Popen(command, env=harness.ENVIRONMENT, stdout=stream, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 200
    while (seen := _last_step(out)) < after and parent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert parent.poll() is None and seen >= after, log.read_text(errors="replace")[-4000:]
    processes = [psutil.Process(parent.pid), *psutil.Process(parent.pid).children(recursive=True)]
    assert len(processes) > (1 if "processes=1" in (options or ()) else 2)
    for process in processes if number is signal.SIGKILL else processes[:1]:
        process.send_signal(number)
    code = parent.wait(timeout=100)
    _, survivors = psutil.wait_procs(processes, timeout=60)
    return CutOff(number, seen, code, survivors, last_checkpoint(out), time.time(), log.read_text(errors="replace"))


def _last_step(out: Path) -> int:
    try:
        return int(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (FileNotFoundError, IndexError, json.JSONDecodeError):
        return 0


@pytest.fixture(scope="session")
def uninterrupted(dropout_recipe: Path, runs: Path) -> Run:
    return harness.train("sft", dropout_recipe, *_options(runs / "uninterrupted"))


@pytest.fixture(scope="session")
def interrupted(dropout_recipe: Path, runs: Path) -> Interrupted:
    out = runs / "interrupted"
    first = random.randint(1, 7)
    second = random.randint(first + 3, 12)
    print(f"SIGTERM after step {first}, SIGKILL after step {second}")
    cuts = [
        cut_off(dropout_recipe, out, signal.SIGTERM, after=first),
        cut_off(dropout_recipe, out, signal.SIGKILL, after=second),
    ]
    return Interrupted(cuts, harness.train("sft", dropout_recipe, *_options(out)))


@pytest.mark.zero3
def test_sigterm_saves_the_step_and_ends_every_process(interrupted: Interrupted) -> None:
    stopped, _ = interrupted.cuts
    assert stopped.exit_code == 75
    assert not stopped.survivors
    assert stopped.checkpoint is not None
    step = int(stopped.checkpoint.name.removeprefix("checkpoint-"))
    assert stopped.after <= step <= stopped.after + 2, "it did not stop at the end of a step"
    assert f"stopped by SIGTERM after step {step} of {STEPS}, which is saved" in stopped.log
    _, killed = interrupted.cuts
    assert f"resuming from {stopped.checkpoint}: step {step + 1} of {STEPS} is next" in killed.log
    assert "resuming" not in stopped.log
    assert "Traceback" not in stopped.log


@pytest.mark.zero3
def test_the_same_command_continues_from_the_checkpoint(interrupted: Interrupted) -> None:
    stopped, killed = interrupted.cuts
    assert killed.exit_code == -signal.SIGKILL
    steps = interrupted.run.steps
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1)), "a step is missing or twice"
    for cut in (stopped, killed):
        assert cut.checkpoint is not None
        kept = [row["step"] for row in steps if row["time"] < cut.ended_at]
        assert kept[-1] == int(cut.checkpoint.name.removeprefix("checkpoint-")), "it did not go on from its checkpoint"


@pytest.mark.zero3
def test_a_resumed_run_has_the_loss_curve_of_an_uninterrupted_one(interrupted: Interrupted, uninterrupted: Run) -> None:
    assert interrupted.run.series("loss") == pytest.approx(uninterrupted.series("loss"), rel=1e-6)
    assert interrupted.run.series("grad_norm") == pytest.approx(uninterrupted.series("grad_norm"), rel=1e-6)
    weights = interrupted.run.weights()
    for name, weight in uninterrupted.weights().items():
        assert (weights[name] - weight).abs().max() <= 1e-6 * weight.abs().max(), name


def test_a_finished_run_is_not_trained_over(sft_by_two: Run, sft_recipe: Path) -> None:
    again = harness.mixfuse("train", "sft", sft_recipe, f"out={sft_by_two.out}", "processes=2")
    assert again.returncode == 2
    assert "holds a finished run" in again.stderr


def _begun(recipe: SftRecipe, checkpoint: str = "checkpoint-2") -> Path:
    """As far as `check_resume` sees, a run that was cut off after a checkpoint."""
    write_json(recipe.out / "recipe.json", recipe.model_dump(mode="json"))
    folder = recipe.out / "checkpoints" / checkpoint
    write_json(folder / "trainer_state.json", {"global_step": int(checkpoint.removeprefix("checkpoint-"))})
    mark(folder, processes=recipe.processes)
    return folder


def _check(recipe: SftRecipe) -> None:
    check_resume(recipe.out, recipe.model_dump(mode="json"), resume=recipe.resume)


def test_a_run_is_not_resumed_with_another_recipe(sft_recipe: Path, tmp_path: Path) -> None:
    out = f"out={tmp_path / 'run'}"
    _begun(load(sft_recipe, SftRecipe, [out]))
    _check(load(sft_recipe, SftRecipe, [out, "log_every=5", "wandb=offline", "threads=2"]))
    for change in ("lora.r=8", "seed=1"):
        with pytest.raises(MixfuseError, match=f"whose '{change.partition('.')[0].partition('=')[0]}' is"):
            _check(load(sft_recipe, SftRecipe, [out, change]))


def test_another_world_size_is_refused_where_the_checkpoint_has_parts_alone(sft_recipe: Path, tmp_path: Path) -> None:
    out = f"out={tmp_path / 'run'}"
    checkpoint = _begun(load(sft_recipe, SftRecipe, [out]))
    with pytest.raises(MixfuseError, match=r"one ZeRO-3 part for each process.*start 1, or choose another"):
        _check(load(sft_recipe, SftRecipe, [out, "processes=2"]))
    (checkpoint / whole_state.FILE).write_bytes(b"x")
    mark(checkpoint, processes=1)
    _check(load(sft_recipe, SftRecipe, [out, "processes=2", "optimizer.micro_batch=1"]))
    with pytest.raises(MixfuseError, match="whose 'optimizer' is"):
        _check(load(sft_recipe, SftRecipe, [out, "processes=2", "optimizer.learning_rate=1"]))


@pytest.mark.zero3
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_one_process_goes_on_where_others_were_stopped(
    sft_recipe: Path, runs: Path, sft_by_one: Run, processes: int
) -> None:
    """From DeepSpeed's checkpoint where it was alone, too, and from the whole state where there were two."""
    out = runs / f"stopped_{processes}"
    cut = cut_off(sft_recipe, out, signal.SIGTERM, after=2, options=[f"out={out}", f"processes={processes}"])
    assert cut.checkpoint is not None
    begun = int(cut.checkpoint.name.removeprefix("checkpoint-"))
    run = harness.train("sft", sft_recipe, f"out={out}", "processes=1")
    assert [row["step"] for row in run.steps] == list(range(1, SFT_STEPS + 1))
    assert [row["step"] for row in run.steps if row["time"] < cut.ended_at][-1] == begun < SFT_STEPS
    # Equal weights, moments, rates and examples: any of them missing shows in the losses of the steps after.
    assert run.series("loss") == pytest.approx(sft_by_one.series("loss"), rel=1e-4)
    assert run.series("learning_rate") == sft_by_one.series("learning_rate")
    weights = run.weights()
    for name, weight in sft_by_one.weights().items():
        assert (weights[name] - weight).abs().max() <= 1e-3 * weight.abs().max(), name


def test_a_run_is_not_resumed_where_that_is_forbidden(sft_recipe: Path, tmp_path: Path) -> None:
    recipe = load(sft_recipe, SftRecipe, [f"out={tmp_path / 'run'}", "resume=never"])
    _check(recipe)
    _begun(recipe)
    with pytest.raises(MixfuseError, match=r"holds an unfinished run \(step 2\) and resume is never"):
        _check(recipe)


def test_a_half_written_checkpoint_is_passed_over(sft_recipe: Path, tmp_path: Path) -> None:
    recipe = load(sft_recipe, SftRecipe, [f"out={tmp_path / 'run'}"])
    assert last_checkpoint(recipe.out) is None
    older, whole, half = (_begun(recipe, f"checkpoint-{step}") for step in (8, 16, 24))
    (half / WHOLE).unlink()  # rank 0 wrote its last file, and others had not
    assert last_checkpoint(recipe.out) == whole
    (whole / "trainer_state.json").write_text("")  # a machine went down before the file was on its disk
    assert last_checkpoint(recipe.out) == older
