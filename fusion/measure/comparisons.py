"""Labelled pairs of answers to measure a judge by, read from our own file shapes and from public ones."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mixfuse.contracts import preferences
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import iter_objects
from mixfuse.contracts.preferences import (
    TIES,
    Benchmark,
    Comparison,
    Label,
    Preferences,
    object_of,
    pair_hash,
    placed,
    text_of,
)

__all__ = ["TIES", "Benchmark", "Comparison", "Label", "load", "load_all"]


def load(path: Path, *, limit: int | None = None, pairs_per_prompt: int = 4) -> list[Comparison]:
    """Reads the pairs of a file; see `load_all`."""
    return load_all(path, limit=limit, pairs_per_prompt=pairs_per_prompt).pairs


def load_all(
    path: Path,
    *,
    limit: int | None = None,
    pairs_per_prompt: int = 4,
    rows: Iterable[tuple[str, dict[str, Any]]] | None = None,
) -> Preferences:
    """Reads pairs, and says in which shapes they came and what was left out.

    The keys of a row tell which shape it has. Beside the shapes of `mixfuse.contracts.preferences` these are pool
    responses: `prompt` (and `messages`, if it is a conversation), `responses` with `model`, `text` and `correct`. Every
    answer marked correct is paired with every wrong one.

    Args:
        path: The file, one JSON object a line, or one JSON array of objects.
        limit: Read only this many rows.
        pairs_per_prompt: The most pairs of one pool row, or of one prompt with scored answers. Of more, some are chosen
            by hash, the same every time.
        rows: The file's rows with their places, where something else has read it.

    Raises:
        MixfuseError: A line is malformed or has none of these shapes (the message names file and line), or there are
            no pairs.
    """
    file = "/".join(path.resolve().parts[-2:])
    found = Preferences()

    def others() -> Iterator[tuple[str, dict[str, Any]]]:
        for place, row in islice(iter_objects(path) if rows is None else rows, limit):
            if "responses" not in row or preferences.is_comparison(row):
                yield place, row
                continue
            found.shapes["pool responses"] += 1
            try:
                found.pairs.extend(_from_pool(row, file, pairs_per_prompt))
            except KeyError as error:
                raise MixfuseError(f"{place}: missing key {error}") from None
            except TypeError as error:
                raise MixfuseError(f"{place}: {error}") from None

    read = preferences.read(others(), file=file, pairs_per_prompt=pairs_per_prompt)
    found.pairs += read.pairs
    found.shapes += read.shapes
    found.left_out += read.left_out
    if not found.pairs:
        left = f" ({found.described()})" if found.shapes else ""
        raise MixfuseError(f"{path}: it holds no pairs to judge{left}")
    return found


def _from_pool(row: dict[str, Any], file: str, most: int) -> list[Comparison]:
    prompt, source = text_of(row["prompt"]), text_of(row.get("source", ""))
    responses = [
        (text_of(entry["text"]), entry["model"], entry["correct"]) for entry in map(object_of, row["responses"])
    ]
    pairs = [(good, bad) for good in responses if good[2] is True for bad in responses if bad[2] is False]
    usable = {(good[0], bad[0]): (good[1], bad[1]) for good, bad in pairs if good[0].strip() and bad[0].strip()}
    chosen = sorted(usable, key=lambda texts: pair_hash(prompt, *texts))[:most]
    conversation = tuple(map(object_of, row["messages"])) if row.get("messages") else None
    return [
        placed(prompt, *texts, models=usable[texts], file=file, source=source, conversation=conversation)
        for texts in chosen
    ]
