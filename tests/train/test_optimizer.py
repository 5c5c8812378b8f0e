"""The optimizer's keys do what their names say, in the libraries that act on them."""

from pathlib import Path
from typing import Any

import pytest

from mixfuse.contracts.strict_yaml import load
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
        given = trainer_arguments(recipe)
        for ours in ("deepspeed", "max_length"):  # DeepSpeed needs processes; the length is TRL's
            del given[ours]
        monkeypatch.delenv("WORLD_SIZE")
        return TrainingArguments(**given)

    return make


def test_adamw_is_given_its_keys(arguments: Any) -> None:
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
    assert peak_at == 0 or rates[0] == 0
