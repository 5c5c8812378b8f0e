"""A run of so many epochs ends when they do; its profile, TensorBoard and MLflow hold what it logged."""

import gzip
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import train_harness as harness
from train_harness import Run

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import load
from mixfuse.train.recipe import JudgeRecipe, Optimizer, SftRecipe
from mixfuse.train.stages import training_metrics
from mixfuse.train.stages.checks import check_recipe

zero3 = pytest.mark.zero3
EPOCHS = 'optimizer={"epochs": 1.5, "batch_size": 4, "micro_batch": 2, "learning_rate": 0.01, "warmup_ratio": 0.3}'


@pytest.fixture(scope="module")
def recorded(sft_recipe: Path, runs: Path) -> Run:
    """A run over 1.5 epochs of 16 chats, 4 a step, with everything that records it."""
    out = runs / "recorded"
    return harness.train(
        "sft", sft_recipe, f"out={out}", EPOCHS, "trackers=[tensorboard, mlflow]", 'profile={"steps": [2, 3]}'
    )


@zero3
def test_a_run_of_epochs_ends_with_them(recorded: Run) -> None:
    assert len(recorded.steps) == 6
    assert [row["epoch"] for row in recorded.steps] == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    rates = recorded.series("learning_rate")
    assert rates.index(max(rates)) == 2  # two steps of warm-up: 0.3 of six, rounded up
    assert recorded.record["recipe"]["optimizer"]["steps"] is None


@zero3
def test_the_profile_holds_its_steps_alone(recorded: Run) -> None:
    (path,) = (recorded.out / "profile").iterdir()
    assert path.name == "steps-2-3.json.gz"
    with gzip.open(path) as stream:
        events = json.load(stream)["traceEvents"]
    assert sum(event["name"] == "Optimizer.step#AdamW.step" for event in events) == 2
    assert any(event["name"] == "aten::mm" and event["args"]["Input Dims"] for event in events)


@zero3
def test_tensorboard_reads_back_what_the_run_logged(recorded: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(recorded.out / "tensorboard"))
    read.Reload()
    assert [event.value for event in read.Scalars("train/loss")] == pytest.approx(recorded.series("loss"), rel=1e-5)
    assert [event.step for event in read.Scalars("train/tokens_per_second_per_device")] == [1, 2, 3, 4, 5, 6]


@zero3
def test_mlflow_reads_back_what_the_run_logged(recorded: Run) -> None:
    with sqlite3.connect(recorded.out / "mlflow.db") as database:
        losses = database.execute("select value from metrics where key = 'loss' order by step").fetchall()
        [(name, status)] = database.execute("select name, status from runs").fetchall()
    database.close()
    assert [value for (value,) in losses] == pytest.approx(recorded.series("loss"))
    assert (name, status) == ("recorded", "FINISHED")


@zero3
@pytest.mark.slow
def test_a_judge_trains_for_epochs_too(judge_recipe: Path, runs: Path) -> None:
    optimizer = 'optimizer={"epochs": 0.5, "batch_size": 4, "micro_batch": 2, "warmup_steps": 0}'
    run = harness.train("judge", judge_recipe, f"out={runs / 'judge_epochs'}", optimizer, "evaluation=null")
    assert len(run.steps) == 3  # 12 pairs in two orders, 4 comparisons a step


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"steps": 7}, 7),
        ({"epochs": 1}, 5),
        ({"epochs": 0.1}, 1),
        ({"epochs": 3}, 14),
        ({"epochs": 3, "steps": 10}, 10),
        ({"epochs": 2, "steps": 100}, 9),
    ],
)
def test_steps_and_epochs_end_a_run_together(keys: dict[str, Any], steps: int) -> None:
    assert Optimizer(**keys, batch_size=8, micro_batch=8).steps_over(36) == steps


@pytest.mark.parametrize(
    ("keys", "steps", "warmup"),
    [({}, 400, 10), ({}, 20, 4), ({}, 3, 0), ({"warmup_steps": 10}, 4, 10), ({"warmup_ratio": 0.1}, 15, 2)],
)
def test_a_short_run_warms_up_in_a_part_of_it_unless_it_is_told(keys: dict[str, Any], steps: int, warmup: int) -> None:
    assert Optimizer(steps=steps, **keys).warmup(steps) == warmup


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer={batch_size: 8}", "set steps"),
        ("optimizer={epochs: 0}", "greater than 0"),
        ("profile={steps: [3, 2]}", "before the first"),
        ("profile={steps: [0, 2]}", "greater than 0"),
        ("trackers=[comet]", "tensorboard"),
    ],
)
def test_what_cannot_be_is_named(sft_recipe: Path, override: str, says: str) -> None:
    with pytest.raises(MixfuseError, match=says):
        load(sft_recipe, SftRecipe, [override])


def test_a_judges_epochs_must_hold_its_warm_start(judge_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixfuse.train.stages import judge_dpo

    recipe = load(judge_recipe, JudgeRecipe, ["optimizer={epochs: 1, batch_size: 4, micro_batch: 4}", "warm_start=7"])
    with pytest.raises(MixfuseError, match="warm_start 7 is above the run's 6 steps"):
        judge_dpo._steps(recipe, 24)


def test_a_tracker_that_is_not_installed_is_named(sft_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixfuse.train.stages import trackers

    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MixfuseError, match="mlflow is not installed; pip install"):
        check_recipe(load(sft_recipe, SftRecipe, ["trackers=[mlflow]"]))


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_gpus_peak_is_known_by_its_name(device: str, peak: float | None) -> None:
    assert training_metrics.peak_tflops(device) == peak


def test_the_utilisation_is_that_of_the_plans_flops(sft_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from mixfuse.contracts.families import family_of
    from mixfuse.contracts.files import read_json
    from mixfuse.train.planning.training_plan import forward_flops

    recipe = load(sft_recipe, SftRecipe, ["dtype=bfloat16"])
    assert training_metrics._mfu(recipe, 1e6, 100.0) == {}  # no GPU here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    forward = forward_flops(family_of(recipe.base).shape(read_json(recipe.base / "config.json")), 100.0)
    assert training_metrics._mfu(recipe, 989e12 / (2 * forward) * 0.4, 100.0) == {"mfu": 0.4}
    assert training_metrics._mfu(load(sft_recipe, SftRecipe), 1e6, 100.0) == {}  # float32
