"""Verdict pairs: chosen and rejected differ in one token, so DPO needs only one pass over the prompt.

TRL runs a pair as two sequences, each twice: under the policy and under the reference. If the completions are one
token, both log-probabilities are at the prompt's last position. `OnePass` reads them there and hands them to TRL in the
shape it expects, so every loss and metric stays TRL's own. `Reference` stores the reference's log-probabilities, which
are computed once. The token that ends the judge's turn is not trained, because a verdict is read from the first token
alone (`contracts/judge_protocol.py`).

Dimensions in names: B comparisons, L tokens of the longest prompt, V vocabulary.
"""

# ruff: noqa: N803, N806 - tensors are named with their dimensions

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import read_json, write_json

Logprobs = tuple[float, float]
"""Log-probabilities of the chosen and the rejected verdict, in nats."""


class OnePass:
    """Replaces the model in TRL's DPO loss: called with B chosen above B rejected sequences, it runs B prompts.

    Args:
        model: The policy, wrapped or not.

    Attributes:
        log_odds: (B,), after a call: the log-odds of the chosen verdict over the rejected one, in nats.
    """

    log_odds: Tensor

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any) -> FusedCausalLMOutput:
        """Returns what TRL's fused head returns, all (2B, L): a value at each verdict, zero elsewhere."""
        count = len(input_ids) // 2
        verdict_at_B = (labels[:count] != -100).int().argmax(1)
        logits_BV = next_logits(self._model, input_ids[:count, :-1], attention_mask[:count, :-1], verdict_at_B - 1)
        logprobs_BV = logits_BV.log_softmax(-1)
        tokens_2B = input_ids.gather(1, verdict_at_B.repeat(2)[:, None])[:, 0]
        verdict_logprobs_2B = logprobs_BV.repeat(2, 1).gather(1, tokens_2B[:, None])[:, 0]
        self.log_odds = verdict_logprobs_2B[:count] - verdict_logprobs_2B[count:]
        entropy_B = -(logprobs_BV.exp() * logprobs_BV).sum(-1).detach()

        def at_verdicts(values_2B: Tensor) -> Tensor:
            empty = values_2B.new_zeros(2 * count, labels.shape[1] - 1)
            return empty.scatter(1, (verdict_at_B.repeat(2) - 1)[:, None], values_2B[:, None])

        return FusedCausalLMOutput(
            log_probs=at_verdicts(verdict_logprobs_2B),
            entropy=at_verdicts(entropy_B.repeat(2)),
            mean_logits=at_verdicts(logits_BV.mean(-1).detach().repeat(2)),
            is_top1=at_verdicts(logits_BV.argmax(-1).repeat(2) == tokens_2B),
        )


def next_logits(model: Any, input_ids: Tensor, attention_mask: Tensor, last_B: Tensor) -> Tensor:
    """The logits (B, V) after each prompt; the output layer runs on those positions alone, in float32.

    In bfloat16 a logit of 16 to 32 is a multiple of 0.125 nats, so the log-odds of many near-even pairs would be 0.

    Args:
        model: A causal language model of transformers', wrapped or not.
        input_ids: (B, L), padded on the right.
        attention_mask: (B, L).
        last_B: (B,) the position of each prompt's last token.
    """
    positions = last_B.unique()
    with float32_head(model.get_output_embeddings()):
        out = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=positions)
    rows = torch.arange(len(input_ids), device=input_ids.device)
    logits: Tensor = out.logits[rows, torch.searchsorted(positions, last_B)]
    return logits


@contextmanager
def float32_head(head: Any) -> Iterator[None]:
    """Lets an output layer compute in float32 from weights of any dtype while the block runs.

    Its own hooks still run, which gather its weight under ZeRO-3.
    """

    def forward(x: Tensor) -> Tensor:
        logits: Tensor = _Float32Linear.apply(x, head.weight)
        return logits

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


HEAD_ROWS = 4096
"""Rows of the head's weight that are in float32 at a time: of 8x22B's, 100 MB."""


class _Float32Linear(torch.autograd.Function):
    """x·Wᵀ in float32 for a frozen W of any dtype, a part of W at a time; the gradient of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        # The parameter itself: a view of it would keep the gathered weight alive under ZeRO-3.
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([x.float() @ part.float().T for part in weight.split(HEAD_ROWS)], dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        with torch.autocast(gradient.device.type, enabled=False):
            parts = zip(gradient.split(HEAD_ROWS, dim=-1), weight.split(HEAD_ROWS), strict=True)
            total = sum(
                ((piece @ part.float()) for piece, part in parts), start=torch.zeros((), device=gradient.device)
            )
        return total.to(ctx.dtype), None


def position_bias(log_odds_B: Tensor) -> Tensor:
    """The part of the log-odds that favours the answer shown first, whatever its content: (B/2,), in nats.

    Args:
        log_odds_B: The log-odds of the right verdict, the two orders of a pair side by side. A preference for an answer
            has the same sign in both orders and cancels here; a preference for a position changes sign and remains.
    """
    return (log_odds_B[::2] - log_odds_B[1::2]) / 2


class VerdictRow(NamedTuple):
    """One comparison in one order, as tokens.

    Attributes:
        prompt: Token ids.
        chosen: The right verdict's token id.
        rejected: The other verdict's token id.
    """

    prompt: Sequence[int]
    chosen: int
    rejected: int

    @property
    def key(self) -> str:
        """A hash of the content, under which `Reference` stores the row."""
        content = json.dumps([list(self.prompt), self.chosen, self.rejected], separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def logprobs(
    forward: Any, rows: Sequence[VerdictRow], *, micro_batch: int, pad: int, device: Any = "cpu"
) -> list[Logprobs]:
    """The log-probabilities of both verdicts of each row, without gradients.

    Each process computes its share, and all return the whole result. All make the same number of passes, because a pass
    over a partitioned model is a collective. The longest rows come first.

    Args:
        forward: The model, ready to run (a DeepSpeed engine, or gathered block by block).
        rows: The comparisons, the same on every process.
        micro_batch: Comparisons a pass.
        pad: Token id of the padding.
        device: Where the model runs.
    """
    parallel = _parallel()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if parallel else (0, 1)
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].prompt))
    mine: dict[int, Logprobs] = {}
    for start in range(0, len(order), world * micro_batch):
        begin = start + rank * micro_batch
        # A process without rows left runs one that it does not count, so that the collective is complete.
        numbers = order[begin : begin + micro_batch]
        batch = [rows[number] for number in numbers or order[:1]]
        length = max(len(row.prompt) for row in batch)
        ids = torch.full((len(batch), length), pad, device=device)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(batch):
            ids[place, : len(row.prompt)] = torch.tensor(list(row.prompt), device=device)
            mask[place, : len(row.prompt)] = 1
        with torch.no_grad():
            logprobs_BV = next_logits(forward, ids, mask, mask.sum(1) - 1).log_softmax(-1)
        for place, number in enumerate(numbers):
            row = rows[number]
            mine[number] = float(logprobs_BV[place, row.chosen]), float(logprobs_BV[place, row.rejected])
    parts: list[Any] = [mine]
    if parallel:
        parts = [None] * world
        torch.distributed.all_gather_object(parts, mine)
    by_number = {number: pair for part in parts for number, pair in part.items()}
    return [by_number[number] for number in range(len(rows))]


def _parallel() -> bool:
    return bool(torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1)


class Reference:
    """The reference's log-probabilities of each row, stored by the rows' content; runs on one base can share it.

    Args:
        path: A JSON file; process 0 writes it.
        identity: A digest that identifies the reference model: its base and dtype.

    Raises:
        MixfuseError: The file holds log-probabilities of another reference.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity
        box = [self._stored()]
        if _parallel():  # every process must know the same rows, because the passes that follow are collective
            torch.distributed.broadcast_object_list(box, src=0)
        self._known: dict[str, Logprobs] = {
            key: (float(chosen), float(rejected)) for key, (chosen, rejected) in box[0].items()
        }

    def _stored(self) -> dict[str, Any]:
        if not self._path.is_file():
            return {}
        stored = read_json(self._path)
        if stored["reference"] != self._identity:
            raise MixfuseError(f"{self._path} belongs to another base or dtype; name another file or remove it")
        return dict(stored["logprobs"])

    def clear(self) -> None:
        """Drops every stored log-probability: the policy that will be the reference is not trained yet."""
        self._known.clear()

    def __getitem__(self, key: str) -> Logprobs:
        return self._known[key]

    def missing(self, rows: Sequence[VerdictRow]) -> list[VerdictRow]:
        """The rows that are not stored yet, each once."""
        return list({key: row for row in rows if (key := row.key) not in self._known}.values())

    def add(self, rows: Sequence[VerdictRow], computed: Sequence[Logprobs], *, write: bool) -> None:
        """Stores computed log-probabilities; `write` them to the file on one process only."""
        self._known.update({row.key: pair for row, pair in zip(rows, computed, strict=True)})
        if write and rows:
            # Another run may have added rows to the file.
            write_json(self._path, {"reference": self._identity, "logprobs": self._stored() | self._known})

    def of(self, keys: Sequence[str], shift: Mapping[str, float], device: Any) -> dict[str, Tensor]:
        """TRL's `ref_chosen_logps` and `ref_rejected_logps`, (B,) each.

        Args:
            keys: The rows' keys.
            shift: By key: added to the chosen verdict's log-probability, an offset that the policy must overcome.
            device: The device of the result.
        """
        chosen = [self._known[key][0] + shift.get(key, 0.0) for key in keys]
        rejected = [self._known[key][1] for key in keys]
        return {
            "ref_chosen_logps": torch.tensor(chosen, device=device),
            "ref_rejected_logps": torch.tensor(rejected, device=device),
        }
