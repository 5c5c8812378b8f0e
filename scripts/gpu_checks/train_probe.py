"""One process of the checks that train: `train_probe.py RECIPE FACTS KILL_AFTER [key=value …]`.

It runs `train/stages/sft.py` to the end, saved files included, and notes how long the base took to load, what each step
held at most and how long it took.
"""

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from memory_tracker import Tracker
from transformers import TrainerCallback

from mixfuse.contracts.strict_yaml import load
from mixfuse.train.processes import worker
from mixfuse.train.recipe import RECIPES
from mixfuse.train.stages import sft


class Watch(TrainerCallback):
    """Notes each step's time and peak, and ends the process after a step if it is told to."""

    def __init__(self, facts: dict[str, Any], tracker: Tracker | None, kill_after: int, path: Path) -> None:
        self.facts, self.tracker, self.kill_after, self.path = facts, tracker, kill_after, path
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The step's peak begins."""
        if self.tracker is None:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            self.tracker.reset_peaks()
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """So it ends."""
        if self.tracker is None:
            torch.cuda.synchronize()
        self.facts["step_s"].append(time.perf_counter() - self.began)
        peak = torch.cuda.max_memory_allocated() if self.tracker is None else self.tracker.peak
        self.facts["peaks"].append(peak)
        self.path.write_text(json.dumps(self.facts))

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A killed process leaves what is on the disk; the row of its last step is."""
        if self.kill_after and state.global_step > self.kill_after:
            os._exit(9)


def main() -> None:
    """Trains and writes the facts."""
    recipe_path, facts_path, kill_after, *overrides = sys.argv[1:]
    recipe = load(Path(recipe_path), RECIPES["sft"], overrides)
    worker.prepare(recipe.threads, wandb=recipe.wandb, timeout_minutes=recipe.timeout_minutes)
    facts: dict[str, Any] = {"peaks": [], "step_s": []}
    tracker = None if torch.cuda.is_available() else Tracker()
    load_base, train_and_save = sft.load_base, sft.train_and_save

    def timed_load(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        model = load_base(*args, **kwargs)
        facts["load_s"] = time.perf_counter() - began
        facts["attention"] = model.config._attn_implementation
        return model

    def watched(trainer: Any, *args: Any, **kwargs: Any) -> None:
        trainer.add_callback(Watch(facts, tracker, int(kill_after), Path(facts_path)))

        def before_forward(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            facts["batch"] = list(kwargs["input_ids"].shape)

        trainer.model.get_base_model().model.register_forward_pre_hook(before_forward, with_kwargs=True)
        train_and_save(trainer, *args, **kwargs)

    sft.load_base, sft.train_and_save = timed_load, watched
    with tracker or nullcontext():
        sft.train(recipe)
    Path(facts_path).write_text(json.dumps(facts))


main()
