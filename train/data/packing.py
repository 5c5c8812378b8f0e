"""From rows to batches: data sets mixed by weight, documents packed into rows, rows collated."""

import random
from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

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


class Collator:
    """Makes a batch of rows. It carries the `ids` of its examples, so that errors can name them (`stages/trainers.py`).

    Not packed: documents are padded on the right, (B, L), with an attention mask. Packed: the documents of all rows are
    concatenated, (1, T), without padding and without an attention mask. transformers finds the documents by their
    `position_ids`, which begin at 0 in each, only if there is no mask (`masking_utils`,
    `find_packed_sequence_indices`); FlashAttention gets their boundaries.

    Args:
        pad_token_id: The padding token.
        packed: Whether to concatenate.
    """

    def __init__(self, pad_token_id: int, *, packed: bool) -> None:
        self._pad, self._packed = pad_token_id, packed

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch: `input_ids`, `labels`, `ids`, and an attention mask or positions."""
        import torch

        batch = [document for example in examples for document in example.get("documents", [example])]
        ids = [torch.tensor(document["input_ids"]) for document in batch]
        labels = [torch.tensor(document["labels"]) for document in batch]
        names = [str(document["id"]) for document in batch]
        if self._packed:
            return {**pack_batch(ids, labels), "ids": names}
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self._pad),
            "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=-100),
            "ids": names,
        }


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
