"""What follows from the held-out loss: the best adapter is saved, and training stops when the loss stops falling."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mixfuse.contracts.files import atomic_directory, read_json, write_json
from mixfuse.train.adapters.saving import gather_adapter, save_peft
from mixfuse.train.recipe import Evaluation, TrainRecipe
from mixfuse.train.stages.run_probes import run_probes, write_probes

BEST = "best"
FACTS = "best.json"


class KeepBest(TrainerCallback):
    """Saves the adapter of the best evaluation in `OUT/best`, and ends a run whose loss has stopped falling.

    Its state is the evaluations in `metrics.jsonl`, so a resumed run has it too. transformers' own method writes a
    checkpoint for every evaluation and loads the best at the end, which would write optimiser states only to delete
    them.

    Args:
        trainer: The trainer of the adapter.
        recipe: The run's recipe.
        evaluation: The recipe's `evaluation`.
    """

    def __init__(self, trainer: Any, recipe: TrainRecipe, evaluation: Evaluation) -> None:
        self._trainer, self._recipe, self._evaluation, self._out = trainer, recipe, evaluation, recipe.out
        self._best, self._best_step, self._worse = float("inf"), 0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Reads the evaluations before this step."""
        path = self._out / "metrics.jsonl"
        if not path.is_file():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "eval_loss" in row and 0 < row["step"] <= state.global_step:
                self._is_best(row["eval_loss"], row["step"])

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Saves this adapter, or counts one more evaluation without progress. Every process takes part."""
        if not state.global_step:  # the adapter does nothing yet
            return
        # Rank 0 decides: if ranks differed in the last bit, some would wait in a collective for ever.
        loss = torch.tensor(metrics["eval_loss"], dtype=torch.float64, device=args.device)
        torch.distributed.broadcast(loss, 0)
        if self._is_best(float(loss), state.global_step) and self._evaluation.keep_best:
            self._save_best(state)
        if self._evaluation.patience and self._worse >= self._evaluation.patience:
            if state.is_world_process_zero:
                print(
                    f"stopped at step {state.global_step}: no evaluation since step {self._best_step} was better than "
                    f"{self._best:.4f}"
                )
            control.should_training_stop = True

    def _is_best(self, loss: float, step: int) -> bool:
        """Counts an evaluation; whether it is the best so far. A resumed run may repeat its best step."""
        if loss < self._best - self._evaluation.min_delta or step == self._best_step:
            self._best, self._best_step, self._worse = loss, step, 0
            return True
        self._worse += 1
        return False

    def _save_best(self, state: Any) -> None:
        weights = gather_adapter(self._trainer)
        probes = run_probes(self._trainer, self._recipe)
        if state.is_world_process_zero:
            with atomic_directory(self._out / BEST, replace=True) as temporary:
                save_peft(self._trainer.accelerator.unwrap_model(self._trainer.model), weights, temporary)
                write_probes(probes, temporary)
                write_json(temporary / FACTS, {"step": self._best_step, "eval_loss": self._best})


def best_evaluation(out: Path) -> dict[str, Any] | None:
    """`{step, eval_loss}` of the evaluation whose adapter is in `OUT/best`, or None."""
    path = out / BEST / FACTS
    return dict(read_json(path)) if path.is_file() else None
