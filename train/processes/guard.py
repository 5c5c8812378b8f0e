"""What stops a run at the end of a step, on every rank at once: SIGTERM, or a loss that is not finite.

Ranks must stop together, or those that continue wait for the others in the next collective. So ranks share their state
in one small all-reduce a step.
"""

import math
import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

from mixfuse.contracts.errors import MixfuseError, Preempted
from mixfuse.train.processes.checkpoint import last_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import TrainerCallback


class _Sigterm:
    """Whether SIGTERM has arrived, and whether training has begun, so that a step's end can be awaited."""

    def __init__(self) -> None:
        self.received = False
        self.training = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if not self.training:
            raise Preempted("stopped by SIGTERM before the first step; run the same command again")


_sigterm = _Sigterm()


def handle_sigterm() -> None:
    """Handles SIGTERM from here on.

    Until training has begun, it ends the process at once; after that, at the end of the step, once a checkpoint is
    written.
    """
    signal.signal(signal.SIGTERM, _sigterm)


def guard(trainer: Any, out: "Path") -> "TrainerCallback":
    """A callback that stops the run at the end of a step. It must come after the callbacks that save.

    Args:
        trainer: Its `step_ids` name the examples of the step (`stages/trainers.py`); its `compute_loss` is wrapped.
        out: The run's folder.

    Raises (in training):
        Preempted: After SIGTERM, once the step's checkpoint is whole.
        MixfuseError: A loss or the gradient's norm is not finite. The message names the examples.
    """
    import torch
    from torch import distributed
    from transformers import TrainerCallback

    losses: list[torch.Tensor] = []  # of this step's micro batches, on the device until the step ends
    compute_loss = trainer.compute_loss

    def observed_loss(model: Any, *arguments: Any, **keywords: Any) -> Any:
        result = compute_loss(model, *arguments, **keywords)
        if model.training:
            losses.append((result[0] if isinstance(result, tuple) else result).detach())
        return result

    trainer.compute_loss = observed_loss

    class Guard(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _sigterm.training = True

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            finite = [bool(torch.isfinite(loss)) for loss in losses]
            losses.clear()
            bad = [name for fine, ids in zip(finite, trainer.step_ids, strict=True) if not fine for name in ids]
            norm = trainer.model_wrapped.get_global_grad_norm()
            bad_norm = norm is not None and not math.isfinite(float(norm))
            flags = torch.tensor([_sigterm.received, not all(finite), bad_norm], dtype=torch.int32, device=args.device)
            distributed.all_reduce(flags, op=distributed.ReduceOp.MAX)
            stopping, bad_somewhere, bad_norm = (bool(flag) for flag in flags.tolist())
            if bad_somewhere or bad_norm:
                culprits: list[list[str]] = [[] for _ in range(args.world_size)]
                step_ids = [name for ids in trainer.step_ids for name in ids]
                distributed.all_gather_object(culprits, bad if bad_somewhere else step_ids)
                what = "loss" if bad_somewhere else "gradient's norm"
                _raise_not_finite(what, state.global_step, [name for names in culprits for name in names], out)
            if stopping:
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # `checkpoints()` has marked the checkpoint: callbacks run in the order in which they were added.
            flag = torch.tensor([_sigterm.received], dtype=torch.int32, device=args.device)
            distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
            if flag.item() and state.global_step < state.max_steps:
                raise Preempted(
                    f"stopped by SIGTERM after step {state.global_step} of {state.max_steps}, which is saved; the same "
                    "command resumes from there"
                )

    return Guard()


def _raise_not_finite(what: str, step: int, names: list[str], out: "Path") -> None:
    last = last_checkpoint(out)
    checkpoint = f"{last} is the last good checkpoint" if last else "there is no checkpoint yet"
    raise MixfuseError(
        f"step {step}: the {what} is not a finite number in a batch of the examples {', '.join(map(repr, names))}; "
        f"nothing was saved since, {checkpoint}; fix or remove these examples, or lower optimizer.learning_rate, and "
        "run again",
        kind="training",
    )
