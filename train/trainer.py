"""What both trainers add to TRL's: batches whose examples are named, and an evaluation that is exact.

TRL stays the trainer; these classes stand before it in the order of method resolution.
"""

import math
from typing import Any

import torch
from torch.utils.data import DataLoader
from trl import DPOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference


class NamedExamples:
    """Keeps the ids of the examples of the optimiser step that is under way.

    The collators give each batch `ids`, a list of the examples' ids. The step's batches pass through
    `get_batch_samples` before the first of them is computed; there the ids are taken out and kept.

    Attributes:
        step_ids: A list of ids for each micro batch of the step, on this process. What stops at a loss that is not
            finite names its examples from here.
    """

    step_ids: list[list[str]]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The step's micro batches, without their ids."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        self.step_ids = [batch.pop("ids", []) for batch in batches]
        return batches, count

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss; no model takes ids."""
        inputs.pop("ids", None)
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]


class SftTrainer(NamedExamples, SFTTrainer):
    """TRL's SFT; the held-out loss is the mean over all labelled tokens, the same for any batch size and world size."""

    control: Any

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Computes the held-out loss, in nats a token, and the share of tokens whose most likely one is right.

        Every process takes every world-size-th batch. Under ZeRO-3 each forward pass is a collective, so those with
        nothing left compute a batch whose labels are all ignored.
        """
        data = eval_dataset or self.eval_dataset
        size, world, rank = self.args.eval_batch_size, self.args.world_size, self.args.process_index
        batches = [list(range(begin, min(begin + size, len(data)))) for begin in range(0, len(data), size)]
        rounds = math.ceil(len(batches) / world)
        mine = [(batches[number], True) if number < len(batches) else (batches[0], False)
                for number in range(rank, rounds * world, world)]  # fmt: skip
        loader = DataLoader(data, batch_sampler=[rows for rows, _ in mine], collate_fn=self.data_collator)
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)  # loss, tokens right, tokens
        for batch, (_, counts) in zip(loader, mine, strict=True):
            batch.pop("ids")
            inputs = self._prepare_inputs(batch)
            if not counts:
                inputs["labels"] = torch.full_like(inputs["labels"], -100)
            out = model(**inputs, use_cache=False, fused_lm_head=True)
            sums += torch.stack([-out.log_probs.double().sum(), out.is_top1.double().sum(), out.label_mask.sum()])
        if world > 1:
            torch.distributed.all_reduce(sums)
        loss, right, tokens = sums.tolist()
        metrics = {"loss": loss / tokens, "token_accuracy": right / tokens, "tokens": tokens}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        model.train(was_training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class JudgeTrainer(NamedExamples, DPOTrainer):
    """TRL's DPO, batches named."""


class NamedPairs(DataCollatorForPreference):
    """TRL's collator of preference pairs, and the ids of its rows."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch, its chosen completions above its rejected ones, and `ids`."""
        return {**super().torch_call(examples), "ids": [str(example["id"]) for example in examples]}
