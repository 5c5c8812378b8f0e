"""What stops a run at the end of a step, on every rank at once: SIGTERM, or a loss that is not a number.

Ranks must leave a step together, or those that stay wait for the others in the next collective. So each says what it
has seen in one small all-reduce a step.
"""

import math
import signal
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from mixfuse.errors import MixfuseError, Preempted
from train.checkpoint import last_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import TrainerCallback

EXAMPLES = "example_names"  # the key of a batch under which its examples' ids travel
ID_COLUMN = "id"  # the data set's column they come from
_NAME_BYTES = 64  # a fixed width, so that batches can be concatenated


class _Sigterm:
    """Whether SIGTERM has come, and whether there is a step whose end can be waited for."""

    def __init__(self) -> None:
        self.came = False
        self.training = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if not self.training:
            raise Preempted("stopped by SIGTERM before the first step; the same command starts again where it was")


_sigterm = _Sigterm()


def listen() -> None:
    """Takes SIGTERM from here on: it ends the process at once until `guard` has seen training begin, and then at the
    end of the step, after a checkpoint.
    """  # noqa: D205 - one sentence
    signal.signal(signal.SIGTERM, _sigterm)


class _Seen(NamedTuple):
    names: Any  # uint8 [examples, _NAME_BYTES], or None
    tokens: Any  # [examples, length], of the batch's first tensor of integers
    loss: Any  # scalar tensor on the device


def guard(trainer: Any, out: "Path") -> "TrainerCallback":
    """A callback that stops the run, and hooks in the trainer by which it knows each batch's examples and loss.

    The callback must stand before others that save, and after none that reads the batch.

    Args:
        trainer: Its data set may have a column `id` of strings; without one, examples are named by their text.
        out: The run's folder.

    Raises (in training):
        Preempted: After SIGTERM, when a checkpoint of the step is whole.
        MixfuseError: A loss or the gradient's norm is not finite; names the examples. Nothing has been saved since.
    """
    import torch
    from torch import distributed
    from transformers import TrainerCallback

    batches: list[_Seen] = []
    trainer.data_collator = _Naming(trainer.data_collator)
    compute_loss = trainer.compute_loss

    def observed_loss(model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        names = inputs.pop(EXAMPLES, None)
        result = compute_loss(model, inputs, *arguments, **keywords)
        if model.training:
            loss = result[0] if isinstance(result, tuple) else result
            batches.append(_Seen(names, _first_tokens(inputs), loss.detach()))
        return result

    trainer.compute_loss = observed_loss

    def examples(seen: list[_Seen]) -> list[str]:
        return [name for batch in seen for name in _names(batch, trainer.processing_class)]

    class Guard(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _sigterm.training = True

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bad = [batch for batch in batches if not bool(torch.isfinite(batch.loss))]
            norm = trainer.model_wrapped.get_global_grad_norm()
            bad_norm = norm is not None and not math.isfinite(float(norm))
            flags = torch.tensor([_sigterm.came, bool(bad), bad_norm], dtype=torch.int32, device=args.device)
            distributed.all_reduce(flags, op=distributed.ReduceOp.MAX)
            came, bad_somewhere, bad_norm = (bool(flag) for flag in flags.tolist())
            if bad_somewhere or bad_norm:
                culprits: list[list[str]] = [[] for _ in range(args.world_size)]
                distributed.all_gather_object(culprits, examples(bad if bad_somewhere else batches))
                what = "loss" if bad_somewhere else "gradient's norm"
                _stop_for(what, state.global_step, [name for names in culprits for name in names], out)
            batches.clear()
            if came:
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # `checkpoints()` has marked it: callbacks are called in the order in which they were added.
            flag = torch.tensor([_sigterm.came], dtype=torch.int32, device=args.device)
            distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
            if flag.item() and state.global_step < state.max_steps:
                raise Preempted(
                    f"stopped by SIGTERM after step {state.global_step} of {state.max_steps}, which is saved; the same "
                    "command goes on from there"
                )

    return Guard()


def _stop_for(what: str, step: int, names: list[str], out: "Path") -> None:
    last = last_checkpoint(out)
    kept = f"{last} is the last good checkpoint" if last else "there is no checkpoint yet"
    raise MixfuseError(
        f"step {step}: the {what} is not a finite number in a batch of the examples {', '.join(map(repr, names))}; "
        f"nothing was saved since, {kept}; mend or remove these examples, or lower optimizer.learning_rate, and run "
        "again",
        kind="training",
    )


class _Naming:
    """A data collator that sends along the examples' ids, as bytes: only tensors reach the device."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def __call__(self, examples: list[dict[str, Any]], *arguments: Any, **keywords: Any) -> dict[str, Any]:
        import torch

        batch: dict[str, Any] = self._collator(examples, *arguments, **keywords)
        if all(isinstance(example.get(ID_COLUMN), str) for example in examples):
            names = [example[ID_COLUMN].encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0") for example in examples]
            batch[EXAMPLES] = torch.tensor([list(name) for name in names], dtype=torch.uint8)
        return batch


def _first_tokens(inputs: dict[str, Any]) -> Any:
    return next((value for key, value in inputs.items() if key.endswith("input_ids")), None)


def _names(batch: _Seen, tokenizer: Any) -> list[str]:
    if batch.names is not None:
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in batch.names.tolist()]
    if batch.tokens is None:
        return ["(not named)"]
    return [text[:_NAME_BYTES] for text in tokenizer.batch_decode(batch.tokens, skip_special_tokens=True)]
