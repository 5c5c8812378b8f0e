"""The optimizer's keys do what their names say, in the libraries that act on them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import train_harness as harness

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import load
from mixfuse.train.optimizers import OPTIMIZERS
from mixfuse.train.planning.training_plan import Hardware, plan
from mixfuse.train.recipe import SftRecipe
from mixfuse.train.stages.core import trainer_arguments


@pytest.fixture
def arguments(sft_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' arguments for a recipe with these keys of `optimizer`."""
    from transformers import TrainingArguments

    monkeypatch.setenv("WORLD_SIZE", "2")

    def make(**optimizer: Any) -> TrainingArguments:
        keys = {"steps": 100, "batch_size": 24, "micro_batch": 4, **optimizer}
        recipe = load(sft_recipe, SftRecipe, [f"optimizer={keys}", f"out={tmp_path}", "seed=3", "data_seed=5"])
        keywords = trainer_arguments(recipe, recipe.optimizer.steps_over(1))
        for key in ("deepspeed", "max_length"):  # DeepSpeed needs processes; max_length is TRL's
            del keywords[key]
        monkeypatch.delenv("WORLD_SIZE")
        return TrainingArguments(**keywords)

    return make


def test_adamw_gets_the_recipes_keys(arguments: Any) -> None:
    import torch
    from transformers import Trainer

    args = arguments(betas=[0.8, 0.95], eps=1e-6, weight_decay=0.1, max_grad_norm=0.3)
    adamw, keys = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = adamw([torch.nn.Parameter(torch.zeros(1))], **keys)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.8, 0.95)
    assert optimizer.defaults["eps"] == 1e-6
    assert (args.weight_decay, args.max_grad_norm, args.seed, args.data_seed) == (0.1, 0.3, 3, 5)
    assert args.gradient_accumulation_steps == 3  # 24 examples on two processes of four a pass


@pytest.mark.parametrize(
    ("keys", "peak_at", "middle", "end"),
    [
        ({"warmup_steps": 20, "schedule": "constant_with_warmup"}, 20, 1.0, 1.0),
        ({"warmup_ratio": 0.2, "schedule": "linear"}, 20, 0.5, 0.0),
        ({"warmup_ratio": 0.2, "schedule": "cosine"}, 20, 0.5, 0.0),
        ({"warmup_ratio": 0.2, "min_learning_rate": 1e-4}, 20, 0.55, 0.1),
        ({"warmup_steps": 0, "schedule": "linear"}, 0, 0.4, 0.0),
    ],
)
def test_the_rate_rises_and_falls_as_the_schedule_says(
    keys: dict[str, Any], peak_at: int, middle: float, end: float, arguments: Any
) -> None:
    """At its peak after the warm-up, in between at step 60, and at the end; in shares of the peak."""
    import torch
    from transformers import get_scheduler

    args = arguments(learning_rate=1e-3, **keys)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    schedule = get_scheduler(
        args.lr_scheduler_type, optimizer, args.get_warmup_steps(100), 100,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )  # fmt: skip
    rates = []
    for _ in range(101):
        rates.append(schedule.get_last_lr()[0] / 1e-3)
        optimizer.step()
        schedule.step()
    assert rates.index(max(rates)) == peak_at
    assert rates[peak_at] == pytest.approx(1)
    assert rates[60] == pytest.approx(middle)
    assert rates[100] == pytest.approx(end, abs=1e-9)
    assert rates[0] == pytest.approx(0 if peak_at else 1)


@pytest.mark.parametrize("key", ["betas=[0.8, 0.9]", "eps=1e-6"])
def test_adams_keys_are_refused_where_they_have_no_effect(key: str, sft_recipe: Path) -> None:
    with pytest.raises(MixfuseError, match=f"{key.partition('=')[0]} has no effect on sgd; leave it out"):
        load(sft_recipe, SftRecipe, ["optimizer.name=sgd", f"optimizer.{key}"])


def test_an_unknown_optimizer_is_refused_by_the_names_of_the_others(sft_recipe: Path) -> None:
    with pytest.raises(MixfuseError, match=r"'optimizer\.name': Input should be 'adamw', 'adafactor' or 'sgd'"):
        load(sft_recipe, SftRecipe, ["optimizer.name=lion"])


@pytest.mark.zero3
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw"])  # every other test trains with AdamW
@pytest.mark.slow
def test_an_optimizer_trains_on_two_processes(name: str, sft_recipe: Path, runs: Path) -> None:
    overrides = (f"optimizer.name={name}", "optimizer.steps=2", "processes=2", f"out={runs / name}")
    run = harness.train("sft", sft_recipe, *overrides)
    assert len(run.steps) == 2
    changed = [key for key, weight in run.weights().items() if ".lora_B." in key and weight.any()]
    assert len(changed) == len([key for key in run.weights() if ".lora_B." in key]), (
        "B starts at zero, and one still is"
    )
    assert run.record["recipe"]["optimizer"]["name"] == name


@pytest.mark.zero3
@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_keeps_as_much_state_as_the_table_says(name: str, sft_recipe: Path, tmp_path: Path) -> None:
    """Measured by the probe that `benchmarks/plan.py` compares the plan with."""
    probe = harness.PROJECT / "benchmarks" / "plan_probe.py"
    overrides = (f"optimizer.name={name}", "optimizer.steps=1", f"out={tmp_path / 'run'}")
    done = subprocess.run(
        [sys.executable, str(probe), "sft", str(sft_recipe), str(tmp_path / "facts.json"), *overrides],
        capture_output=True, text=True, timeout=300, check=False, env={**harness.ENVIRONMENT, **harness.alone()},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-20000:]
    held = json.loads((tmp_path / "facts.json").read_text())["held"]
    parameters = held["master"] / 4
    # Beside it, each partition has a count of its steps.
    assert held["optimizer"] / parameters == pytest.approx(OPTIMIZERS[name].state_bytes, abs=0.01)


def test_a_plan_counts_the_optimizers_state(sft_recipe: Path) -> None:
    zero3 = json.loads(harness.ZERO3.read_text())
    config = json.loads((harness.PROJECT / "configs" / "mixtral-8x22b" / "model" / "config.json").read_text())
    hardware = Hardware(nodes=1, gpus=2, gpu_bytes=80 << 30)
    held = {
        name: plan(load(sft_recipe, SftRecipe, [f"optimizer.name={name}"]), config, zero3, hardware).held
        for name in OPTIMIZERS
    }
    trained = held["adamw"]["master"] / 4
    assert {name: part["optimizer"] for name, part in held.items()} == {
        "adamw": 8 * trained, "adafactor": 4 * trained, "sgd": 4 * trained
    }  # fmt: skip
