"""The low-rank products of the CPU plugin: each token of a batch with its own adapter.

Dimensions in comments: T tokens, K experts per token, E experts, H hidden, I intermediate, R rank.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROWS = "_mixfuse_rows_by_slot"
"""Our attribute on vLLM's wrapper of a batch's adapters; holds the result of `rows_by_slot`."""


class ExpertLora(NamedTuple):
    """The expert adapters of one layer, one per slot, zero-padded to the engine's largest rank.

    Attributes:
        slots: (T,) the slot of each token's adapter, -1 for a token without an adapter.
        a13: A of the first projection: two tensors (slots, E, R, H) for gate and up, or one for both.
        b13: B for each of `a13`, (slots, E, width, R).
        a2: A of the second projection, (slots, E, R, I).
        b2: B of the second projection, (slots, E, H, R).
    """

    slots: Tensor
    a13: tuple[Tensor, ...]
    b13: tuple[Tensor, ...]
    a2: Tensor
    b2: Tensor


def routed_experts(  # noqa: PLR0917
    x: Tensor,
    first: Sequence[Callable[[Tensor], Tensor]],
    second: Sequence[Callable[[Tensor], Tensor]],
    experts: Tensor,
    weights: Tensor,
    activate: Callable[[Tensor], Tensor],
    lora: ExpertLora,
) -> Tensor:
    """Computes each token's experts with the token's own adapter, and sums their outputs.

    The (token, expert) pairs are sorted by expert, then by adapter, so that the rows of each are contiguous. There is
    one matrix product for each expert that occurs and one low-rank product for each (expert, adapter) that occurs.

    Args:
        x: Tokens (T, H).
        first: Each expert's first projection, (rows, H) → (rows, 2I), gate beside up.
        second: Each expert's second projection, (rows, I) → (rows, H).
        experts: The experts of each token (T, K).
        weights: The gate weight of each of these experts (T, K).
        activate: (rows, 2I) → (rows, I).
        lora: The adapters.

    Returns:
        (T, H) in float32, because bf16 would round at every addition.
    """
    base = lora.a2.shape[0] + 1  # a pair's key is expert * base + slot + 1
    keys, order = (experts.long() * base + (lora.slots + 1).unsqueeze(1)).flatten().sort(stable=True)
    tokens = order // experts.shape[1]
    rows = x[tokens]
    shares = weights.flatten()[order].float().unsqueeze(1)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)

    distinct_keys, counts = torch.unique_consecutive(keys, return_counts=True)
    keyed_counts = zip(distinct_keys.tolist(), counts.tolist(), strict=True)
    start = 0
    for expert, group in groupby(keyed_counts, key=lambda keyed: int(keyed[0]) // base):
        adapted, length = [], 0
        for key, count in group:
            if key % base:
                adapted.append((key % base - 1, slice(length, length + count)))
            length += count
        of_expert = slice(start, start + length)
        start += length

        inputs = rows[of_expert]
        hidden = first[expert](inputs)
        for slot, part in adapted:
            offset = 0
            for a, b in zip(lora.a13, lora.b13, strict=True):
                width = b.shape[2]
                _add_low_rank(hidden[part, offset : offset + width], inputs[part], a[slot, expert], b[slot, expert])
                offset += width
        hidden = activate(hidden)
        outputs = second[expert](hidden)
        for slot, part in adapted:
            _add_low_rank(outputs[part], hidden[part], lora.a2[slot, expert], lora.b2[slot, expert])
        out.index_add_(0, tokens[of_expert], outputs * shares[of_expert])
    return out


def _add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds x Aᵀ Bᵀ to y (rows, out), in place; x is (rows, in), a (R, in), b (out, R)."""
    y.addmm_(x.mm(a.t()), b.t())


def add_lora_linear(  # noqa: PLR0917 - vLLM's signature
    self: Any,
    y: Tensor,
    x: Tensor,
    lora_a_stacked: tuple[Tensor, ...],
    lora_b_stacked: tuple[Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    **_: Any,
) -> None:
    """Adds the adapters' low-rank products of a linear layer to y, in place, one adapter at a time.

    Tokens without an adapter are not changed. Replaces `PunicaWrapperCPU.add_lora_linear`.
    """
    if self.no_lora:
        return
    x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for slot, rows in rows_by_slot(self):
        inputs = x[rows]
        offset = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            columns = slice(offset, offset + width)
            if isinstance(rows, slice):
                _add_low_rank(y[rows, columns], inputs, a[slot, 0] * scale if scale != 1 else a[slot, 0], b[slot, 0])
            else:
                y[rows, columns] += scale * inputs.mm(a[slot, 0].t()).mm(b[slot, 0].t())
            offset += width


def rows_by_slot(punica_wrapper: Any) -> list[tuple[int, slice | Tensor]]:
    """Returns each slot that occurs in the batch with its rows: a slice where they are contiguous, to avoid a copy.

    Every layer asks for it, so the result is cached on the wrapper until the batch changes.
    """
    cached: list[tuple[int, slice | Tensor]] | None = getattr(punica_wrapper, ROWS, None)
    if cached is not None:
        return cached
    slots = punica_wrapper.token_lora_indices
    result: list[tuple[int, slice | Tensor]] = []
    for slot in slots.unique().tolist():
        if slot >= 0:
            rows = (slots == slot).nonzero().flatten()
            first, last = int(rows[0]), int(rows[-1])
            result.append((slot, slice(first, last + 1) if last - first + 1 == len(rows) else rows))
    setattr(punica_wrapper, ROWS, result)
    return result
