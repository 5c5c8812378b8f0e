"""Trains a judge as `mixfuse train judge` does, and writes down what can be seen only from inside (`probe.json`).

Started with the environment of a launcher. Not a test: the tests read what it found.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import get_z3_leaf_modules, z3_leaf_module
from transformers import TrainerCallback

from mixfuse.contracts.strict_yaml import load
from mixfuse.train.processes import worker
from mixfuse.train.recipe import JudgeRecipe
from mixfuse.train.stages import core, judge_dpo


class Probe(TrainerCallback):
    """Log-probabilities of one batch by policy and reference, before and after training."""

    def __init__(self, trainer: Any, facts: dict[str, Any]) -> None:
        self.trainer, self.facts = trainer, facts
        batch = next(iter(trainer.get_train_dataloader()))
        self.batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.facts["before"] = self.logprobs()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.facts["after"] = self.logprobs()

    def logprobs(self) -> dict[str, list[float]]:
        chosen, rejected = self.trainer.compute_ref_log_probs(self.trainer.model, self.batch)
        ids, mask = self.batch["input_ids"], self.batch["attention_mask"]
        with torch.no_grad():
            scores = self.trainer.model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        by_token = scores.gather(-1, ids[:, 1:, None])[..., 0]
        policy = (by_token * self.batch["completion_mask"][:, 1:]).sum(dim=1)
        return {"reference": [*chosen.tolist(), *rejected.tolist()], "policy": policy.tolist()}


def chosen_verdicts(trainer: Any, batch: dict[str, Any]) -> list[str]:
    """The chosen verdict of each example; TRL stacks a batch's chosen completions above its rejected ones."""
    firsts = batch["completion_mask"].int().argmax(dim=1)
    tokens = batch["input_ids"].gather(1, firsts[:, None])[: len(firsts) // 2, 0]
    return [trainer.processing_class.decode(token) for token in tokens]


def main() -> None:
    recipe = load(Path(sys.argv[1]), JudgeRecipe, sys.argv[2:])
    worker.prepare(recipe.threads, wandb=recipe.wandb, timeout_minutes=recipe.timeout_minutes)
    trainer = judge_dpo.make_trainer(recipe)
    modules = dict(trainer.model.named_modules())
    facts: dict[str, Any] = {
        "leaves": len(get_z3_leaf_modules(trainer.model)),
        "moe_blocks_as_leaves": [
            z3_leaf_module(m) for n, m in modules.items() if type(m).__name__.endswith("MoeBlock")
        ],
        "trainable": [name for name, p in trainer.model.named_parameters() if p.requires_grad],
        "frozen": [name for name, p in trainer.model.named_parameters() if not p.requires_grad],
        "partitioned": all(hasattr(p, "ds_id") for n, p in trainer.model.named_parameters() if "lora_" not in n),
    }
    facts["chosen_by_batch"] = [chosen_verdicts(trainer, batch) for batch in trainer.get_train_dataloader()]
    trainer.add_callback(Probe(trainer, facts))
    core.train_and_save(trainer, recipe, stage="judge")
    (recipe.out / "probe.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
