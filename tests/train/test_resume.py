"""A training run that is cut off: nothing goes on behind the user's back, and the same command continues it."""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import train_harness as harness
from train_harness import SFT_STEPS, Run

from mixfuse.errors import MixfuseError
from mixfuse.files import write_json
from mixfuse.recipe import load
from train.recipe import SftRecipe
from train.run import WHOLE, check_resume, last_checkpoint


@dataclass(frozen=True)
class Interrupted:
    """A run on two processes that got SIGTERM after its first checkpoint, and was started again."""

    exit_code: int
    survivors: list[psutil.Process]
    restarted_at: float
    run: Run


@pytest.fixture(scope="session")
def interrupted(sft_recipe: Path, runs: Path) -> Interrupted:
    out = runs / "sft_resumed"
    overrides = ["processes=2", f"out={out}", "save_every=2"]
    command = [sys.executable, "-P", "-m", "mixfuse", "train", "sft", str(sft_recipe), *overrides]
    with (runs / "interrupted.log").open("w") as log:
        parent = subprocess.Popen(command, env=harness.ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 200
    while last_checkpoint(out) is None and parent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    children = psutil.Process(parent.pid).children(recursive=True) if parent.poll() is None else []
    parent.send_signal(signal.SIGTERM)
    code = parent.wait(timeout=60)
    assert len(children) >= 2, (runs / "interrupted.log").read_text()[-4000:]
    _, survivors = psutil.wait_procs(children, timeout=5)
    restarted_at = time.time()
    return Interrupted(code, survivors, restarted_at, harness.train("sft", sft_recipe, *overrides))


@pytest.mark.zero3
def test_sigterm_ends_every_process_of_the_run(interrupted: Interrupted) -> None:
    assert interrupted.exit_code == 130
    assert not interrupted.survivors


@pytest.mark.zero3
def test_the_same_command_continues_from_the_checkpoint(interrupted: Interrupted) -> None:
    steps = interrupted.run.steps
    assert [row["step"] for row in steps] == list(range(1, SFT_STEPS + 1)), "a step is missing or twice"
    kept = [row["step"] for row in steps if row["time"] < interrupted.restarted_at]
    assert kept, "it began again"
    assert kept[-1] % 2 == 0, "it did not continue from a checkpoint"
    assert kept[-1] < SFT_STEPS


@pytest.mark.zero3
def test_a_resumed_run_ends_as_an_uninterrupted_one(interrupted: Interrupted, sft_by_two: Run) -> None:
    assert interrupted.run.series("loss") == pytest.approx(sft_by_two.series("loss"), rel=1e-3)
    weights = interrupted.run.weights()
    for name, weight in sft_by_two.weights().items():
        assert (weights[name] - weight).abs().max() <= 1e-2 * weight.abs().max() + 1e-5, name


@pytest.mark.zero3
def test_a_finished_run_is_not_trained_over(sft_by_two: Run, sft_recipe: Path) -> None:
    again = harness.mixfuse("train", "sft", sft_recipe, f"out={sft_by_two.out}", "processes=2")
    assert again.returncode == 2
    assert "holds a finished run" in again.stderr


def _begun(recipe: SftRecipe, checkpoint: str = "checkpoint-2") -> None:
    """As far as `check_resume` sees, a run that was cut off after a checkpoint."""
    write_json(recipe.out / "recipe.json", recipe.model_dump(mode="json"))
    write_json(recipe.out / "checkpoints" / checkpoint / WHOLE, {})


def test_a_run_is_not_resumed_with_another_recipe(sft_recipe: Path, tmp_path: Path) -> None:
    out = f"out={tmp_path / 'run'}"
    _begun(load(sft_recipe, SftRecipe, [out]))
    check_resume(load(sft_recipe, SftRecipe, [out, "log_every=5", "wandb=offline", "threads=2"]))
    for change in ("processes=2", "lora.r=8", "seed=1"):
        with pytest.raises(MixfuseError, match=f"whose '{change.partition('.')[0].partition('=')[0]}' is"):
            check_resume(load(sft_recipe, SftRecipe, [out, change]))


def test_a_half_written_checkpoint_is_passed_over(sft_recipe: Path, tmp_path: Path) -> None:
    recipe = load(sft_recipe, SftRecipe, [f"out={tmp_path / 'run'}"])
    assert last_checkpoint(recipe.out) is None
    _begun(recipe, "checkpoint-8")
    _begun(recipe, "checkpoint-16")
    write_json(recipe.out / "checkpoints" / "checkpoint-24" / "trainer_state.json", {})  # rank 0's last file
    assert last_checkpoint(recipe.out) == recipe.out / "checkpoints" / "checkpoint-16"
