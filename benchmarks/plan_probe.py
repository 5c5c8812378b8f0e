"""One process of `benchmarks/plan.py`: trains some steps as `mixfuse train` does, and counts what tensors hold.

Started under torchrun with `STAGE RECIPE FACTS [key=value …]`; rank 0 writes what it saw to FACTS as JSON.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from memory_tracker import Tracker
from transformers import TrainerCallback

from mixfuse.contracts.strict_yaml import load
from mixfuse.train.processes import worker
from mixfuse.train.recipe import RECIPES
from mixfuse.train.stages import core, judge_dpo, sft

STEPS = 3  # DeepSpeed learns the order of modules in the first two; the third is as all that follow


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Storage → its bytes, each once."""
    kept = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in kept}


def held(engine: Any) -> dict[str, int]:
    """What a process holds between steps, by the tensor that holds it."""
    optimizer = engine.optimizer
    parameters = list(engine.module.parameters())
    seen: set[int] = set()
    facts = {}

    def part(name: str, tensors: Iterable[torch.Tensor]) -> None:
        found = storages(tensors)
        facts[name] = sum(size for key, size in found.items() if key not in seen)
        seen.update(found)

    part("parameters", (parameter.ds_tensor for parameter in parameters if not parameter.requires_grad))
    part("lora", (parameter.ds_tensor for parameter in parameters if parameter.requires_grad))
    part("persistent", (parameter.data for parameter in parameters if parameter.data.numel() > 1))
    part("master", optimizer.fp32_partitioned_groups_flat)
    state = [value for entry in optimizer.optimizer.state.values() for value in entry.values()]
    part("optimizer", (value for value in state if isinstance(value, torch.Tensor)))
    part("gradients", [optimizer.grad_partitions_flat_buffer])
    part("buckets", [bucket.buffer for bucket in optimizer.ipg_buckets.values() if bucket.buffer is not None])
    return facts


class Watch(TrainerCallback):
    """Notes what each step takes."""

    def __init__(self, tracker: Tracker, trainer: Any) -> None:
        self.tracker, self.trainer = tracker, trainer
        self.facts: dict[str, Any] = defaultdict(dict)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The step's peaks begin."""
        self.tracker.reset_peaks()
        self.facts["before"] = dict(self.tracker.live)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forward and backward are over."""
        self.facts["step"] = self._peaks()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """So is the update."""
        self.facts["whole"] = self._peaks()
        self.facts["held"] = held(self.trainer.model_wrapped)
        self.facts["after"] = dict(self.tracker.live)

    def _peaks(self) -> dict[str, Any]:
        return {"peaks": dict(self.tracker.peaks), "peak": self.tracker.peak, "at": self.tracker.at_peak}


def measure(tracker: Tracker, trainer: Any, out: Path) -> None:
    core.disable_reentrant_checkpointing(trainer)
    watch = Watch(tracker, trainer)
    trainer.add_callback(watch)
    base = trainer.model.get_base_model()
    body: dict[str, Any] = {}

    def before_forward(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():  # not DPO's reference
            body["shape"] = list(kwargs["input_ids"].shape)
            body["before"] = dict(tracker.live)

    def after_body(module: Any, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            body["after"] = dict(tracker.live)

    base.model.register_forward_pre_hook(before_forward, with_kwargs=True)
    base.model.register_forward_hook(after_body)
    loaded = {"peak": tracker.peak, "at": dict(tracker.at_peak), "live": dict(tracker.live)}
    with tracker.during("train"):
        trainer.train()
    if trainer.is_world_process_zero():
        out.write_text(json.dumps({**watch.facts, "body": body, "loaded": loaded}))


def main() -> None:
    stage, recipe_path, facts, *overrides = sys.argv[1:]
    recipe = load(Path(recipe_path), RECIPES[stage], overrides)
    worker.prepare(recipe.threads, wandb=recipe.wandb, timeout_minutes=recipe.timeout_minutes)
    tracker = Tracker()
    module = {"sft": sft, "judge": judge_dpo}[stage]
    module.train_and_save = lambda trainer, *_, **__: measure(tracker, trainer, Path(facts))
    tracker.wrap(PartitionedParameterCoordinator, "fetch_sub_module", "gather")
    tracker.wrap(partition_parameters.GatheredParameters, "__enter__", "gather")
    with tracker:
        module.train(recipe)


main()
