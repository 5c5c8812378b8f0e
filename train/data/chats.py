"""The data of a run: rows read one at a time, chats checked, tokenised to disk, mixed by weight, packed, collated.

Nothing here holds a data set in memory: rows are read as a stream, `datasets` writes their tokens to Arrow files in
the run's folder and maps those, so that any row can be had by its number. A run that is resumed reads the same rows in
the same order from the same files: their order is a function of the recipe's seed alone.
"""

import hashlib
import json
import os
import shutil
import time
from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import atomic_directory, iter_jsonl, read_json, sha256_file, sha256_json, write_json
from mixfuse.train.recipe import DataSource, SftRecipe

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
PACKING_WINDOW = 4096  # chats that are packed together; each window leaves about one row half empty
_FACTS = "facts.json"


class Chat(NamedTuple):
    """A checked chat.

    Attributes:
        id: The row's `id`, or where it stands.
        messages: `{role, content}` each; the last is the assistant's.
        where: File and line, or name and row, for messages.
    """

    id: str
    messages: list[dict[str, str]]
    where: str


def rows(source: DataSource, *, required: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads a data set row by row.

    Yields:
        Where the row stands, for messages, and the row.

    Raises:
        MixfuseError: The data set is missing, cannot be read or is empty, or a row is malformed.
    """
    found = False
    for where, row in _rows(source, required):
        found = True
        missing = next((key for key in required if key not in row), None)
        if missing is not None:
            raise MixfuseError(f"{where}: missing key {missing!r}")
        yield where, row
    if not found:
        raise MixfuseError(f"{source.name}: the data set is empty")


def described(source: DataSource) -> dict[str, Any]:
    """A data set as `run.json` and a manifest name it: name, sha256 of its file, rows, licence."""
    return {
        "name": source.path.name if source.path else source.name,
        "sha256": sha256_file(source.path) if source.path else None,
        "rows": sum(1 for _ in rows(source)),
        "licence": source.licence,
    }


def _rows(source: DataSource, required: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    if source.path is None:
        for number, row in enumerate(_hub(source)):
            yield f"{source.name}: row {number}", row
    elif source.path.suffix == ".parquet":
        number = 0
        for batch in _parquet(source.path):
            for row in batch:
                yield f"{source.path}: row {number}", row
                number += 1
    else:
        for number, row in iter_jsonl(source.path, required=required):
            yield f"{source.path}:{number}", row


def _parquet(path: Path) -> Iterator[list[dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield batch.to_pylist()
    except FileNotFoundError:
        raise MixfuseError(f"{path}: no such file") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise MixfuseError(f"{path}: not a readable Parquet file: {error}") from None


def _hub(source: DataSource) -> Any:
    import datasets

    try:
        return datasets.load_dataset(str(source.hub), source.subset, split=source.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise MixfuseError(
            f"{source.name}: cannot be loaded from the Hugging Face Hub nor its cache here: {error}; on a machine "
            "without the Hub, name a local .jsonl or .parquet file as 'path'"
        ) from None


def chats(source: DataSource) -> Iterator[Chat]:
    """Reads and checks the chats of a data set.

    Raises:
        MixfuseError: As `rows`, or a row is no chat that ends with the assistant's message.
    """
    for where, row in rows(source):
        yield Chat(str(row.get("id", where)), _messages(row, source.format, where), where)


def check_chats(sources: Sequence[DataSource]) -> None:
    """Reads every chat once, keeping none.

    Raises:
        MixfuseError: As `chats`.
    """
    for source in sources:
        for _ in chats(source):
            pass


def _messages(row: dict[str, Any], form: str, where: str) -> list[dict[str, str]]:
    """The messages of a row of any format, checked."""
    if form == "auto":
        if "messages" not in row and "conversations" in row:
            form = "sharegpt"
        elif "messages" not in row and "prompt" in row and "completion" in row:
            form = "prompt_completion"
        else:
            form = "messages"
    keys = {"messages": ("messages",), "sharegpt": ("conversations",), "prompt_completion": ("prompt", "completion")}
    missing = next((key for key in keys[form] if key not in row), None)
    if missing is not None:
        raise MixfuseError(f"{where}: missing key {missing!r}")
    if form == "prompt_completion":
        pair = (("user", row["prompt"]), ("assistant", row["completion"]))
        messages: Any = [{"role": role, "content": content} for role, content in pair]
    elif form == "sharegpt" and isinstance(row["conversations"], list):
        messages = [
            {"role": SHAREGPT_ROLES.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")}
            if isinstance(turn, dict)
            else turn
            for turn in row["conversations"]
        ]
    else:
        messages = row[keys[form][0]]
    if not isinstance(messages, list) or len(messages) < 2:
        raise MixfuseError(f"{where}: {keys[form][0]} must be a list of at least two")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise MixfuseError(f"{where}: a message's role must be one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise MixfuseError(f"{where}: a message's content must be a string")
    if messages[-1]["role"] != "assistant":
        raise MixfuseError(f"{where}: the last message must be the assistant's")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


class ChatData(NamedTuple):
    """What SFT trains on.

    Attributes:
        train: Rows of `{documents: [{id, input_ids, labels}]}`, one document a row or, packed, several.
        evaluation: Rows of `{id, input_ids, labels}` that are held out, or nothing.
        chats: How many chats there are to train on.
        table: The chats as they are drawn, not packed: rows of `{id, input_ids, labels, …}`, memory-mapped.
    """

    train: "Dataset"
    evaluation: "Dataset | None"
    chats: int
    table: "Dataset"


def chat_data(recipe: SftRecipe, tokenizer: Any, *, resuming: bool = False) -> ChatData:
    """Prepares the run's data, or finds it prepared: every process may call this, rank 0 does the work.

    The tokens are kept in `OUT/data`, beside a digest of everything they depend on.

    Args:
        recipe: Says which data, and what becomes of it.
        tokenizer: The base's.
        resuming: There is a checkpoint: data that has changed since is refused.

    Raises:
        MixfuseError: A data set is missing, malformed or has changed, or no chat is left to train on.
    """
    folder, digest = recipe.out / "data", _digest(recipe, tokenizer)
    prepared = _prepared(folder)
    if prepared != digest:
        if prepared is not None and resuming:
            raise MixfuseError(
                f"{recipe.out} holds a run to resume whose data has changed since it began; put the files back, choose "
                "another `out`, or remove the folder to start over"
            )
        if os.environ.get("RANK", "0") == "0":
            with atomic_directory(folder, replace=True) as temporary:
                _prepare(recipe, tokenizer, temporary, digest)
        else:
            while _prepared(folder) != digest:  # however long rank 0 takes: no collective that would time out
                time.sleep(0.2)
    return _load(recipe, folder)


def _digest(recipe: SftRecipe, tokenizer: Any) -> str:
    """Of the bytes of every file, and of what decides how they are tokenised and divided."""
    evaluation = recipe.evaluation
    sources = [*recipe.data, *((evaluation.data if evaluation else None) or ())]
    return sha256_json(
        {
            "files": {source.name: sha256_file(source.path) for source in sources if source.path is not None},
            "sources": [[source.model_dump(mode="json") for source in recipe.data], evaluation and evaluation.share],
            "evaluation": [s.model_dump(mode="json") for s in (evaluation.data if evaluation else None) or ()],
            "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            "template": tokenizer.chat_template,
            "keys": [recipe.loss_on, recipe.truncation, recipe.max_length],
        }
    )


def _prepared(folder: Path) -> str | None:
    path = folder / _FACTS
    return str(read_json(path)["digest"]) if path.is_file() else None


def _prepare(recipe: SftRecipe, tokenizer: Any, folder: Path, digest: str) -> None:
    evaluation = recipe.evaluation
    for number, source in enumerate(recipe.data):
        data = _tokenised(source, recipe, tokenizer, folder / "work")
        if evaluation and evaluation.share is not None:
            held_out = data["held_out"][:]
            for side, wanted in (("train", False), ("evaluation", True)):
                indices = [index for index, held in enumerate(held_out) if held is wanted]
                if indices:
                    data.select(indices).save_to_disk(folder / f"{side}-{number:03d}")
            if all(held_out):
                raise MixfuseError(f"{source.name}: every chat fell to the held-out share; lower evaluation.share")
        else:
            data.save_to_disk(folder / f"train-{number:03d}")
    for number, source in enumerate((evaluation.data if evaluation else None) or ()):
        _tokenised(source, recipe, tokenizer, folder / "work").save_to_disk(folder / f"evaluation-{number:03d}")
    if evaluation and not any(folder.glob("evaluation-*")):
        raise MixfuseError("no chat fell to the held-out share; raise evaluation.share or name evaluation.data")
    shutil.rmtree(folder / "work")
    write_json(folder / _FACTS, {"digest": digest})


def _tokenised(source: DataSource, recipe: SftRecipe, tokenizer: Any, work: Path) -> "Dataset":
    """The chats of one data set as `{id, input_ids, labels, length, held_out}`, after truncation."""
    from datasets import Dataset, Features, List, Value

    from mixfuse.train.data.loss_mask import encode

    share = recipe.evaluation.share if recipe.evaluation else None

    def read() -> Iterator[dict[str, Any]]:
        for chat in chats(source):
            yield chat._asdict()

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {name: [] for name in features}
        for name, messages, where in zip(batch["id"], batch["messages"], batch["where"], strict=True):
            try:
                encoded = encode(messages, tokenizer, recipe.loss_on)
            except MixfuseError as error:
                raise MixfuseError(f"{where}: {error}") from None
            if len(encoded.input_ids) > recipe.max_length:
                if recipe.truncation == "error":
                    raise MixfuseError(
                        f"{where}: the chat has {len(encoded.input_ids)} tokens, more than max_length "
                        f"{recipe.max_length}; raise it, or set truncation to drop, left or right"
                    )
                encoded = truncate(encoded, recipe.max_length, recipe.truncation)
            if encoded.learns:
                held_out = share is not None and is_held_out(json.dumps(messages[:-1]), share)
                values = (name, encoded.input_ids, encoded.labels, len(encoded.input_ids), held_out)
                for key, value in zip(features, values, strict=True):
                    out[key].append(value)
        return out

    message = {"role": Value("string"), "content": Value("large_string")}
    shape = Features({"id": Value("string"), "messages": List(message), "where": Value("string")})
    features = Features(
        {
            "id": Value("string"),
            "input_ids": List(Value("int32")),
            "labels": List(Value("int32")),
            "length": Value("int32"),
            "held_out": Value("bool"),
        }
    )
    data = _generate(Dataset, read, shape, work)
    # One process is none of `datasets`' own: a fork after the model's libraries have started threads is best avoided.
    several = recipe.data_processes if recipe.data_processes > 1 else None
    done = data.map(
        tokenise, batched=True, remove_columns=data.column_names, features=features, num_proc=several, desc="tokenising"
    )
    left_out = len(data) - len(done)
    if left_out:
        print(
            f"{source.name}: left out {left_out} of {len(data)} chats "
            + (
                f"longer than {recipe.max_length} tokens"
                if recipe.truncation == "drop"
                else f"of which nothing to learn was left within {recipe.max_length} tokens"
            )
        )
    if not len(done):
        raise MixfuseError(f"{source.name}: no chat fits max_length {recipe.max_length}; raise it")
    return done


def _generate(
    dataset: "type[Dataset]", read: Callable[[], Iterator[dict[str, Any]]], shape: Any, work: Path
) -> "Dataset":
    """`Dataset.from_generator`, whose own error hides ours."""
    from datasets.exceptions import DatasetGenerationError

    try:
        return dataset.from_generator(read, features=shape, cache_dir=str(work))
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, MixfuseError):
            raise error.__cause__ from None
        raise


def truncate(encoded: Any, length: int, side: str) -> Any:
    """A chat of at most `length` tokens: `left` cuts its beginning, `right` its end, `drop` everything."""
    kept = {"left": slice(-length, None), "right": slice(length), "drop": slice(0)}[side]
    ids, labels = encoded.input_ids[kept], encoded.labels[kept]
    return type(encoded)(ids, [-100, *labels[1:]] if labels else [])


def is_held_out(key: str, share: float) -> bool:
    """Whether what has this key belongs to the held-out share: a hash decides, so equal keys stand on one side."""
    return int(hashlib.sha256(f"evaluation:{key}".encode()).hexdigest()[:8], 16) < share * 16**8


def _load(recipe: SftRecipe, folder: Path) -> ChatData:
    from datasets import Dataset, concatenate_datasets, load_from_disk

    def side(name: str) -> list[Dataset]:
        return [load_from_disk(path) for path in sorted(folder.glob(f"{name}-*"))]

    parts = side("train")
    everything = concatenate_datasets(parts)
    order = mixed([len(part) for part in parts], [source.weight for source in recipe.data], recipe.order_seed)
    if recipe.packing:
        all_lengths = everything.with_format("numpy")["length"][:]
        lengths = [int(all_lengths[number]) for number in order]
        bins = packed(lengths, recipe.max_length, recipe.order_seed)
        train = documents(everything, array("q", (order[i] for i in chain(*bins))), [0, *accumulate(map(len, bins))])
        if os.environ.get("RANK", "0") == "0":
            full = sum(lengths) / (len(bins) * recipe.max_length)
            print(f"packed {len(order)} chats into {len(bins)} rows of {recipe.max_length} tokens, {full:.0%} full")
    else:
        train = documents(everything, order, range(len(order) + 1))
    held_out = side("evaluation")
    evaluation = concatenate_datasets(held_out) if held_out else None
    if evaluation is not None and recipe.evaluation:
        evaluation = evaluation.select(range(min(len(evaluation), recipe.evaluation.limit or len(evaluation))))
    return ChatData(train, evaluation, len(order), everything.select(order))


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
    import random

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
