"""What both trainers add to TRL's: batches that carry their examples' ids, and an exact evaluation.

TRL does the training; these classes come before it in the method resolution order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import DPOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from mixfuse.contracts import calibration
from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.model.choose_experts import gathered_by_block
from mixfuse.train.model.sequence_parallel import WholeBalance
from mixfuse.train.stages.one_pass_dpo import Logprobs, OnePass, Reference, VerdictRow, logprobs, position_bias


class NamedExamples:
    """Remembers the ids of the current optimiser step's examples.

    The collators put `ids`, a list of the examples' ids, into each batch. The step's batches pass through
    `get_batch_samples` before the first of them is computed, where the ids are taken out.

    Attributes:
        step_ids: A list of ids for each micro batch of the step, on this process. `processes/guard.py` names these
            examples when a loss is not finite.
    """

    step_ids: list[list[str]]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The step's micro batches, without their ids."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        self.step_ids = [batch.pop("ids", []) for batch in batches]
        return batches, count

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss, of the batch without its ids, which no model takes."""
        inputs.pop("ids", None)
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]


class SftTrainer(NamedExamples, SFTTrainer):
    """TRL's SFT; the held-out loss is the mean over all labelled tokens, the same for any batch size and world size.

    Attributes:
        sequences: Processes that divide each row, and count as one that reads data.
    """

    control: Any
    sequences: int = 1
    _group: Any = None

    def divide_rows(self, group: Any) -> None:
        """Makes the processes of a group read the same rows, of which the collator gives each a part.

        Call it once, before training.
        """
        self._group, self.sequences = group, torch.distributed.get_world_size(group)
        # Each process has tokens of its own in a short last batch, too, which accelerate would take for repeated rows.
        self.accelerator.gather_for_metrics = self.accelerator.gather

    def get_train_dataloader(self) -> Any:
        """The loader; a group's processes get the batches of one."""
        loader = super().get_train_dataloader()
        if self.sequences > 1:
            shard = loader.batch_sampler  # accelerate's: of each `num_processes` batches, it takes one
            shard.num_processes //= self.sequences
            shard.process_index //= self.sequences
            shard.even_batches = shard.num_processes > 1  # one process alone has a shorter last batch
        return loader

    def get_total_train_batch_size(self, args: Any) -> int:
        """Examples a step."""
        return int(super().get_total_train_batch_size(args)) // self.sequences

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; of divided rows, with the router's loss of whole ones."""
        padding = inputs.pop("padding", 0)
        if self.sequences == 1:
            return super().compute_loss(model, inputs, *args, **kwargs)
        # TRL counts a row's tokens by its positions.
        self._total_train_tokens -= int(self.accelerator.gather(torch.tensor(padding, device=self.args.device)).sum())
        if self.aux_loss_enabled:
            base = self.accelerator.unwrap_model(model).get_base_model()
            model = WholeBalance(model, base.base_model, base.config.num_experts_per_tok, self._group, padding)
        return super().compute_loss(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Computes the held-out loss, in nats a token, and the share of tokens that are the most likely ones.

        With several data sets, `eval_loss/SET` is the loss of each: what the training data teaches may be what the
        others forget. A batch holds rows of one set.

        Every process takes every world-size-th batch; processes that divide rows take their parts of one. Under ZeRO-3
        each forward pass is a collective, so a process with no batch left computes one whose labels are all ignored.
        """
        data = eval_dataset or self.eval_dataset
        size, world = self.args.eval_batch_size, self.args.world_size
        readers, reader = world // self.sequences, self.args.process_index // self.sequences
        sets = _sets(data)
        batches = [
            (list(range(begin, min(begin + size, rows.stop))), number)
            for number, rows in enumerate(sets.values())
            for begin in range(rows.start, rows.stop, size)
        ]
        rounds = math.ceil(len(batches) / readers)
        mine = [(*batches[number], True) if number < len(batches) else (*batches[0], False)
                for number in range(reader, rounds * readers, readers)]  # fmt: skip
        loader = DataLoader(data, batch_sampler=[rows for rows, *_ in mine], collate_fn=self.data_collator)
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        # For each set: loss, tokens right, tokens.
        sums = torch.zeros(len(sets), 3, dtype=torch.float64, device=self.args.device)
        for batch, (_, number, counts) in zip(loader, mine, strict=True):
            del batch["ids"]
            batch.pop("padding", None)
            inputs = self._prepare_inputs(batch)
            if not counts:
                for labels in inputs.keys() & {"labels", "shift_labels"}:
                    inputs[labels] = torch.full_like(inputs[labels], -100)
            out = model(**inputs, use_cache=False, fused_lm_head=True)
            sums[number] += torch.stack(
                [-out.log_probs.double().sum(), out.is_top1.double().sum(), out.label_mask.sum()]
            )
        if world > 1:
            torch.distributed.all_reduce(sums)
        loss, right, tokens = sums.sum(0).tolist()
        metrics = {"loss": loss / tokens, "token_accuracy": right / tokens, "tokens": tokens}
        if len(sets) > 1:
            by_set = zip(sets, sums.tolist(), strict=True)
            metrics |= {f"loss/{name}": loss / tokens for name, (loss, _, tokens) in by_set if tokens}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        model.train(was_training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _sets(data: Any) -> dict[str, range]:
    """The rows of each data set, by its name; the rows of a set are neighbours (`data/chat_data.py`)."""
    names = data["set"][:] if "set" in data.column_names else [""] * len(data)
    rows: dict[str, range] = {}
    for number, name in enumerate(names):
        rows[name] = range(rows[name].start if name in rows else number, number + 1)
    return rows


class JudgeTrainer(NamedExamples, DPOTrainer):
    """TRL's DPO. After `read_verdicts`, each pair is one pass over the prompt, and evaluation measures a judge.

    Attributes:
        examples: Number of training comparisons; `train_dataset` holds each as often as the steps take it.
    """

    control: Any
    examples: int
    loss_types: list[str]
    loss_weights: list[float]
    _verdicts: "Verdicts | None" = None

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """The data set as it is: `data/pair_data.py` has tokenised it.

        TRL would tokenise on process 0 while the others wait in a collective, until its time-out.
        """
        return dataset

    def read_verdicts(self, verdicts: "Verdicts") -> None:
        """Switches to verdict pairs: one pass for chosen and rejected, stored reference log-probabilities.

        Call it once, before training. Missing reference log-probabilities are computed here, with the adapter disabled;
        the model is not wrapped yet.
        """
        self._verdicts = verdicts
        self.precompute_ref_logps = True
        self._trained_loss = self.loss_types, self.loss_weights
        if not verdicts.warm_start:
            adapter = self.accelerator.unwrap_model(self.model)
            with adapter.disable_adapter(), gathered_by_block(adapter):
                self.reference_logprobs(verdicts.rows, adapter)
        self.add_callback(_WarmStart(self, verdicts))

    def reference_logprobs(self, rows: Sequence[VerdictRow], model: Any = None) -> list[Logprobs]:
        """The reference's log-probabilities of rows; missing ones are computed with `model`, by default the policy.

        All processes take part.
        """
        assert self._verdicts is not None  # noqa: S101
        reference = self._verdicts.reference
        if missing := reference.missing(rows):
            self.print_once(f"reference: {len(missing)} of {len(rows)} comparisons to compute")
            computed = self._logprobs(model or self.model_wrapped, missing, self._verdicts.reference_batch)
            reference.add(missing, computed, write=self.is_world_process_zero())
        return [reference[row.key] for row in rows]

    def log_odds(self, dataset: Any) -> list[float]:
        """The policy's log-odds of the right verdict over the wrong one, in nats; all processes take part.

        Args:
            dataset: Tokenised comparisons.
        """
        rows = verdict_rows(dataset)
        if self.state.global_step:
            logprob_pairs = self._logprobs(self.model_wrapped, rows, self.args.per_device_eval_batch_size)
        else:  # the adapter does nothing yet
            logprob_pairs = self.reference_logprobs(rows)
        return [chosen - rejected for chosen, rejected in logprob_pairs]

    def record(self, name: str, value: float) -> None:
        """Adds a value to the metrics that the current step will log."""
        self._metrics["train"][name].append(value)

    def print_once(self, text: str) -> None:
        """Prints on process 0."""
        if self.is_world_process_zero():
            print(text, flush=True)

    def _logprobs(self, model: Any, rows: Sequence[VerdictRow], micro_batch: int) -> list[Logprobs]:
        was_training = model.training
        model.eval()
        with self.compute_loss_context_manager():
            result = logprobs(
                model, rows, micro_batch=micro_batch, pad=self.processing_class.pad_token_id, device=self.args.device
            )
        model.train(was_training)
        return result

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        keys, verdicts = inputs.pop("keys", None), self._verdicts
        if verdicts is None:
            return super()._compute_loss(model, inputs, return_outputs)
        warm = self.state.global_step < verdicts.warm_start
        self.loss_types, self.loss_weights = (["sft"], [1.0]) if warm else self._trained_loss
        count = len(inputs["input_ids"]) // 2
        if warm:  # there is no reference yet; the rewards are then the policy's own log-probabilities
            zeros = torch.zeros(count, device=self.args.device)
            inputs |= {"ref_chosen_logps": zeros, "ref_rejected_logps": zeros}
        else:
            inputs |= verdicts.reference.of(keys, verdicts.offsets, self.args.device)
        # TRL counts the mask's tokens, so the mask holds each prompt once and no completion.
        mask = inputs["attention_mask"] * (1 - inputs["completion_mask"])
        mask[count:] = 0
        policy = OnePass(model)
        loss = super()._compute_loss(policy, {**inputs, "attention_mask": mask}, return_outputs)
        if not verdicts.consistency or warm:
            return loss
        bias = position_bias(policy.log_odds)
        self.record("position_bias", bias.abs().mean().item())
        penalty = verdicts.consistency * (self.beta * bias).square().mean()
        return (loss[0] + penalty, *loss[1:]) if return_outputs else loss + penalty

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Judges the held-out pairs in both orders; TRL's own evaluation if the completions are more than a verdict.

        The loss is the negative log-likelihood of the order-averaged probability at the temperature that fits these
        pairs best. It measures the same before and after a warm start, and for every beta. With several data sets,
        `eval_loss/SET` is that of each, at the temperature that fits all.
        """
        if self._verdicts is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        data = eval_dataset or self.eval_dataset
        log_odds = self.log_odds(data)
        pairs = list(zip(log_odds[::2], log_odds[1::2], strict=True))
        fitted = calibration.fit(pairs)
        scores = [calibration.combined(pair, fitted) for pair in pairs]
        metrics = {
            "loss": calibration.nll(pairs, fitted.temperature),
            "both_orders_correct": sum(min(pair) > 0 for pair in pairs) / len(pairs),
            "consistency": sum(min(pair) > 0 or max(pair) < 0 for pair in pairs) / len(pairs),
            "order_averaged": sum(map(calibration.credit, scores)) / len(pairs),
            "temperature": fitted.temperature,
            "tie_margin": fitted.tie_margin,
            "calibration_error_before": calibration.expected_error(pairs),
            "calibration_error": calibration.expected_error(pairs, fitted),
        }
        if len(sets := _sets(data)) > 1:
            for name, rows in sets.items():
                metrics[f"loss/{name}"] = calibration.nll(pairs[rows.start // 2 : rows.stop // 2], fitted.temperature)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@dataclass(frozen=True)
class Verdicts:
    """What training on verdict pairs needs besides the batches.

    Attributes:
        rows: Every comparison that will be trained on.
        reference: The reference's log-probabilities of them.
        warm_start: Number of first steps whose loss is the chosen verdict's negative log-likelihood. The policy after
            them is DPO's reference.
        offsets: By a row's key: added to the reference's log-probability of the chosen verdict.
        consistency: Weight of the penalty on preferring a position.
        reference_batch: Comparisons a pass, on each process, when the reference's log-probabilities are computed.
    """

    rows: Sequence[VerdictRow]
    reference: Reference
    warm_start: int = 0
    offsets: Mapping[str, float] = field(default_factory=dict)
    consistency: float = 0.0
    reference_batch: int = 16


def verdict_rows(dataset: Any) -> list[VerdictRow]:
    """The rows of a tokenised preference data set as comparisons."""
    columns = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    return [VerdictRow(row["prompt_ids"], row["chosen_ids"][0], row["rejected_ids"][0]) for row in columns]


class _WarmStart(TrainerCallback):
    """Makes the policy at the end of a warm start the reference of the steps after it."""

    def __init__(self, trainer: JudgeTrainer, verdicts: Verdicts) -> None:
        self._trainer, self._verdicts = trainer, verdicts

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Reads the reference's file in a run resumed after the warm start; before that, no stored value is valid.

        Raises:
            MixfuseError: The file lacks comparisons.
        """
        verdicts = self._verdicts
        if state.global_step < verdicts.warm_start:
            verdicts.reference.clear()
        elif state.global_step < state.max_steps and (missing := verdicts.reference.missing(verdicts.rows)):
            raise MixfuseError(f"the run's reference lacks {len(missing)} comparisons; remove the run to start over")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Computes the new reference's log-probabilities at the last step of the warm start, on every process."""
        if state.global_step == self._verdicts.warm_start < state.max_steps:
            self._verdicts.reference.clear()  # an evaluation before the first step may have filled it
            self._trainer.reference_logprobs(self._verdicts.rows)


@dataclass
class NamedPairs(DataCollatorForPreference):
    """TRL's collator of preference pairs, with the ids of its rows.

    Attributes:
        verdicts: Cut each completion to its first token, and add `keys`, under which `Reference` stores the rows.
    """

    verdicts: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch, chosen completions above rejected ones, with `ids`."""
        ids = [str(example["id"]) for example in examples]
        if not self.verdicts:
            return {**super().torch_call(examples), "ids": ids}
        cut = [example | {name: example[name][:1] for name in ("chosen_ids", "rejected_ids")} for example in examples]
        rows = [VerdictRow(row["prompt_ids"], row["chosen_ids"][0], row["rejected_ids"][0]) for row in cut]
        return {**super().torch_call(cut), "ids": ids, "keys": [row.key for row in rows]}
