"""What SFT trains on: chats tokenised to disk, divided, mixed by weight and, if the recipe says so, packed.

No data set is held in memory. Rows are read as a stream; `datasets` writes their tokens to Arrow files in the run's
folder and maps them, so that any row can be read by its number. A resumed run reads the same rows in the same order
from the same files, because their order depends on the recipe's seed alone.
"""

import hashlib
import json
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterator
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import atomic_directory, read_json, sha256_file, sha256_json, write_json
from mixfuse.train.data.chats import chats
from mixfuse.train.data.loss_mask import Encoded, encode
from mixfuse.train.data.packing import documents, mixed, packed
from mixfuse.train.recipe import DataSource, SftRecipe

if TYPE_CHECKING:
    from datasets import Dataset

_FACTS = "facts.json"


class ChatData(NamedTuple):
    """The data of an SFT run.

    Attributes:
        train: Rows of `{documents: [{id, input_ids, labels}]}`, one document a row or, packed, several.
        evaluation: Held-out rows of `{id, input_ids, labels}`, or None.
        chats: Number of training chats.
        table: The training chats in their order, not packed: rows of `{id, input_ids, labels, …}`, memory-mapped.
    """

    train: "Dataset"
    evaluation: "Dataset | None"
    chats: int
    table: "Dataset"


def chat_data(recipe: SftRecipe, tokenizer: Any, *, resuming: bool = False) -> ChatData:
    """Prepares the run's data, or loads it if it is prepared. Every process calls this; rank 0 does the work.

    The tokens are in `OUT/data`, beside a digest of everything they depend on.

    Args:
        recipe: The run's recipe.
        tokenizer: The base's tokenizer.
        resuming: Whether there is a checkpoint; then data that has changed since is refused.

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
            while _prepared(folder) != digest:  # polled, because a collective would time out while rank 0 works
                time.sleep(0.2)
    return _load(recipe, folder)


def _digest(recipe: SftRecipe, tokenizer: Any) -> str:
    """A digest of the bytes of every file, and of every setting that affects how they are tokenised and divided."""
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
            for side, is_evaluation in (("train", False), ("evaluation", True)):
                indices = [index for index, held in enumerate(held_out) if held is is_evaluation]
                if indices:
                    data.select(indices).save_to_disk(folder / f"{side}-{number:03d}")
            if all(held_out):
                raise MixfuseError(f"{source.name}: every chat is in the held-out share; lower evaluation.share")
        else:
            data.save_to_disk(folder / f"train-{number:03d}")
    for number, source in enumerate((evaluation.data if evaluation else None) or ()):
        _tokenised(source, recipe, tokenizer, folder / "work").save_to_disk(folder / f"evaluation-{number:03d}")
    if evaluation and not any(folder.glob("evaluation-*")):
        raise MixfuseError("no chat is in the held-out share; raise evaluation.share or name evaluation.data")
    shutil.rmtree(folder / "work")
    write_json(folder / _FACTS, {"digest": digest})


def _tokenised(source: DataSource, recipe: SftRecipe, tokenizer: Any, work: Path) -> "Dataset":
    """The chats of one data set as `{id, input_ids, labels, length, held_out}`, after truncation."""
    from datasets import Dataset, Features, List, Value

    share = recipe.evaluation.share if recipe.evaluation else None

    def read() -> Iterator[dict[str, Any]]:
        for chat in chats(source):
            yield chat._asdict()

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {name: [] for name in features}
        for name, messages, where in zip(batch["id"], batch["messages"], batch["where"], strict=True):
            encoded = _encode_to_length(messages, tokenizer, recipe, where)
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
    # None avoids a fork, which is unsafe after the model's libraries have started threads.
    processes = recipe.data_processes if recipe.data_processes > 1 else None
    tokenised = data.map(
        tokenise,
        batched=True,
        remove_columns=data.column_names,
        features=features,
        num_proc=processes,
        desc="tokenising",
    )
    left_out = len(data) - len(tokenised)
    if left_out:
        print(
            f"{source.name}: left out {left_out} of {len(data)} chats "
            + (
                f"longer than {recipe.max_length} tokens"
                if recipe.truncation == "drop"
                else f"with no token to learn from within {recipe.max_length} tokens"
            )
        )
    if not len(tokenised):
        raise MixfuseError(f"{source.name}: no chat fits max_length {recipe.max_length}; raise it")
    return tokenised


def _encode_to_length(messages: list[dict[str, Any]], tokenizer: Any, recipe: SftRecipe, where: str) -> Encoded:
    """Encodes a chat and truncates it to `max_length` as the recipe says.

    Raises:
        MixfuseError: The chat cannot be encoded, or it is too long and `truncation` is `error`.
    """
    try:
        encoded = encode(messages, tokenizer, recipe.loss_on)
    except MixfuseError as error:
        raise MixfuseError(f"{where}: {error}") from None
    if len(encoded.input_ids) <= recipe.max_length:
        return encoded
    if recipe.truncation == "error":
        raise MixfuseError(
            f"{where}: the chat has {len(encoded.input_ids)} tokens, more than max_length "
            f"{recipe.max_length}; raise it, or set truncation to drop, left or right"
        )
    return truncate(encoded, recipe.max_length, recipe.truncation)


def _generate(
    dataset: "type[Dataset]", read: Callable[[], Iterator[dict[str, Any]]], shape: Any, work: Path
) -> "Dataset":
    """`Dataset.from_generator`, with our error in place of the one that it raises around ours."""
    from datasets.exceptions import DatasetGenerationError

    try:
        return dataset.from_generator(read, features=shape, cache_dir=str(work))
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, MixfuseError):
            raise error.__cause__ from None
        raise


def truncate(encoded: Encoded, length: int, side: str) -> Encoded:
    """A chat of at most `length` tokens: `left` cuts its beginning, `right` its end, `drop` everything."""
    part = {"left": slice(-length, None), "right": slice(length), "drop": slice(0)}[side]
    ids, labels = encoded.input_ids[part], encoded.labels[part]
    return Encoded(ids, [-100, *labels[1:]] if labels else [])


def is_held_out(key: str, share: float) -> bool:
    """Whether an example with this key is in the held-out share. A hash decides, so equal keys are on the same side."""
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
