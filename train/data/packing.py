"""From rows to batches: data sets mixed by weight, documents packed into rows, rows collated."""

import random
from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

PACKING_WINDOW = 4096  # chats that are packed together; each window leaves about one row half empty


def mixed(lengths: Sequence[int], weights: Sequence[float], seed: int) -> Sequence[int]:
    """The order in which the rows of several data sets, laid end to end, are drawn by weight.

    Args:
        lengths: Rows of each data set.
        weights: In proportion to these rows are drawn, until every data set has been read once.
        seed: Of the draw.

    Returns:
        Row numbers; one data set keeps its order.
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
        seed: Of the shuffle, without which every row would hold neighbours of the file.

    Returns:
        The documents of each row. (BFD, as in "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.)
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
    """A data set of rows that are one or several documents of a table on disk.

    Args:
        table: `{id, input_ids, labels, …}`, memory-mapped.
        numbers: The documents of all rows, end to end.
        begins: Where each row begins in `numbers`, and where the last one ends.

    Returns:
        Rows `{documents: [{id, input_ids, labels, …}]}`, put together when they are asked for.
    """
    from datasets import Dataset

    def look_up(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows_ = [numbers[begins[row] : begins[row + 1]] for row in batch["row"]]
        return {"documents": [[table[number] for number in row] for row in rows_]}

    return Dataset.from_dict({"row": range(len(begins) - 1)}).with_transform(look_up)


class Collator:
    """Makes a batch of rows; `ids` of its examples travel along, so that a batch can be named (`stages/trainers.py`).

    Not packed: documents are padded on the right, (B, L) with an attention mask. Packed: the documents of all rows
    stand in one row, (1, T) without padding and without an attention mask, for transformers finds the documents by
    their `position_ids`, which begin at 0 in each, only where there is no mask (`masking_utils`,
    `find_packed_sequence_indices`); FlashAttention is given their boundaries.

    Args:
        pad_token_id: Of the padding.
        packed: One row for all.
    """

    def __init__(self, pad_token_id: int, *, packed: bool) -> None:
        self._pad, self._packed = pad_token_id, packed

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch: `input_ids`, `labels`, what places them, and `ids`."""
        import torch

        found = [document for example in examples for document in example.get("documents", [example])]
        ids = [torch.tensor(document["input_ids"]) for document in found]
        labels = [torch.tensor(document["labels"]) for document in found]
        names = [str(document["id"]) for document in found]
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
    """Several documents, each (L_i,), as one row (1, T) with what tells attention where each begins."""
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
