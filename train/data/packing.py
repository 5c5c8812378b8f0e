"""From rows to batches: data sets mixed by weight, documents packed into rows, rows collated."""

import random
from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

DIVIDED = "divided"
"""Marks a batch that is a part of a row, which its attention must exchange (`model/sequence_parallel.py`)."""
PACKING_WINDOW = 4096  # chats packed together; each window leaves about one row half empty


def mixed(lengths: Sequence[int], weights: Sequence[float], seed: int) -> Sequence[int]:
    """The order in which rows of several concatenated data sets are drawn by weight.

    Args:
        lengths: Rows of each data set.
        weights: Rows are drawn in proportion to these, until every data set has been read once.
        seed: Seed of the draw.

    Returns:
        Row numbers. A single data set keeps its order.
    """
    if len(lengths) == 1:
        return range(lengths[0])
    from datasets import Dataset, interleave_datasets

    begins = [sum(lengths[:number]) for number in range(len(lengths))]
    tables = [
        Dataset.from_dict({"row": range(begin, begin + count)}) for begin, count in zip(begins, lengths, strict=True)
    ]
    probabilities = [weight / sum(weights) for weight in weights]
    drawn = interleave_datasets(tables, probabilities, seed=seed, stopping_strategy="all_exhausted")
    return array("q", drawn["row"])


def packed(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Packs whole documents into rows: best fit, the longest first, within windows of a seeded shuffle.

    Args:
        lengths: Tokens of each document, none above `capacity`.
        capacity: Tokens of a row.
        seed: Seed of the shuffle, without which each row would hold neighbours in the file.

    Returns:
        The documents of each row (BFD, as in "Fewer Truncations Improve Language Modeling", arXiv 2404.10830).
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)  # noqa: S311 - a reproducible order, not a secret
    rows_: list[list[int]] = []
    for begin in range(0, len(order), PACKING_WINDOW):
        free: list[tuple[int, int]] = []  # (tokens left, row), sorted
        for document in sorted(order[begin : begin + PACKING_WINDOW], key=lambda d: -lengths[d]):
            place = bisect_left(free, (lengths[document], -1))
            if place == len(free):
                rows_.append([document])
                insort(free, (capacity - lengths[document], len(rows_) - 1))
            else:
                left, row = free.pop(place)
                rows_[row].append(document)
                insort(free, (left - lengths[document], row))
    return rows_


def documents(table: "Dataset", numbers: Sequence[int], begins: Sequence[int]) -> "Dataset":
    """A data set whose rows are one or several documents of a table on disk.

    Args:
        table: `{id, input_ids, labels, …}`, memory-mapped.
        numbers: The documents of all rows, concatenated.
        begins: The start of each row in `numbers`, and the end of the last one.

    Returns:
        Rows `{documents: [{id, input_ids, labels, …}]}`, assembled on access.
    """
    from datasets import Dataset

    def look_up(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows_ = [numbers[begins[row] : begins[row + 1]] for row in batch["row"]]
        return {"documents": [[table[number] for number in row] for row in rows_]}

    return Dataset.from_dict({"row": range(len(begins) - 1)}).with_transform(look_up)


class Share(NamedTuple):
    """The part of each row that a process holds: `number`, from 0, of `of` equal parts."""

    number: int = 0
    of: int = 1


WHOLE = Share()
"""The only part of an undivided row."""


class Collator:
    """Makes a batch of rows. It carries the `ids` of its examples, so that errors can name them (`stages/trainers.py`).

    Not packed: documents are padded on the right, (B, L), with an attention mask. Packed: the documents of all rows are
    concatenated, (1, T), without padding and without an attention mask. transformers finds the documents by their
    `position_ids`, which begin at 0 in each, only if there is no mask (`masking_utils`,
    `find_packed_sequence_indices`); FlashAttention gets their boundaries. Divided: packed likewise, and then cut.

    Args:
        pad_token_id: The padding token.
        packed: Whether to concatenate.
        share: The part of a row that this process holds.
    """

    def __init__(self, pad_token_id: int, *, packed: bool, share: Share = WHOLE) -> None:
        self._pad, self._packed, self._share = pad_token_id, packed, share

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch: `input_ids`, `labels`, `ids`, and an attention mask or positions; see `divided` for a part."""
        import torch

        batch = [document for example in examples for document in example.get("documents", [example])]
        ids = [torch.tensor(document["input_ids"]) for document in batch]
        labels = [torch.tensor(document["labels"]) for document in batch]
        names = [str(document["id"]) for document in batch]
        if self._share.of > 1:
            return {**divided(ids, labels, self._share, self._pad), "ids": names}
        if self._packed:
            return {**pack_batch(ids, labels), "ids": names}
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self._pad),
            "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=-100),
            "ids": names,
        }


def divided(ids: "list[Tensor]", labels: "list[Tensor]", share: Share, pad_token_id: int) -> dict[str, Any]:
    """A part of the row (1, T) that documents make, with positions and boundaries of the whole row.

    T is a multiple of the number of parts: what is missing is padding, a document of its own behind the others.

    Args:
        ids: Each (L_i,).
        labels: Each (L_i,).
        share: The part.
        pad_token_id: The padding token.

    Returns:
        `pack_batch`'s, with (1, T/N) tensors; `shift_labels`, each position's next token, as the part's last one has it
        in the next part; `padding`, the tokens at this part's end that are padding; and `DIVIDED`.
    """
    import torch

    missing = -sum(map(len, ids)) % share.of
    if missing:
        ids, labels = [*ids, ids[0].new_full((missing,), pad_token_id)], [*labels, ids[0].new_full((missing,), -100)]
    row = pack_batch(ids, labels)
    row["shift_labels"] = torch.nn.functional.pad(row["labels"][:, 1:], (0, 1), value=-100)
    size = row["labels"].shape[1] // share.of
    begin, end = size * share.number, size * (share.number + 1)
    for name in ("input_ids", "labels", "shift_labels", "position_ids"):
        row[name] = row[name][:, begin:end].contiguous()
    padding = min(size, max(0, missing - size * (share.of - 1 - share.number)))
    return {**row, "padding": padding, DIVIDED: True}


def pack_batch(ids: "list[Tensor]", labels: "list[Tensor]") -> dict[str, Any]:
    """Concatenates documents, each (L_i,), to one row (1, T), with their positions and boundaries for attention."""
    import torch

    lengths = torch.tensor([len(i) for i in ids])
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    longest = int(lengths.max())
    return {
        "input_ids": torch.cat(ids)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(len(i)) for i in ids])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
