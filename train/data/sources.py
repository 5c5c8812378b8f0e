"""Data sets read row by row: files in any of the formats of `data_files.py`, or a data set on the Hugging Face Hub."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import reading, sha256_file, sha256_json
from mixfuse.train.data import data_files
from mixfuse.train.data.data_files import OnBad, Rows, stop
from mixfuse.train.recipe import DataSource


def rows(
    source: DataSource,
    *,
    required: Sequence[str] = (),
    wanted: Collection[str] | None = None,
    bad: OnBad = stop,
    unread: Counter[str] | None = None,
) -> Rows:
    """Reads a data set row by row.

    Args:
        source: The data set.
        required: Keys that every row must have.
        wanted: The columns that are read where columns can be chosen (Parquet, the Hub); by default all.
        bad: What to do about a row that is malformed; by default the error is raised.
        unread: Gets the columns that are not read, where columns can be chosen → rows.

    Yields:
        The row's place (file and line, or name and number) for messages, and the row.

    Raises:
        MixfuseError: The data set is missing, cannot be read or is empty, or a row is malformed.
    """
    empty = True

    def noted(error: MixfuseError) -> None:
        nonlocal empty
        empty = False
        bad(error)

    for where, row in _rows(source, wanted, noted, unread):
        empty = False
        missing = next((key for key in required if key not in row), None)
        if missing is not None:
            bad(MixfuseError(f"{where}: missing key {missing!r}"))
        else:
            yield where, row
    if empty:
        raise MixfuseError(f"{source.name}: the data set is empty")


def short_names(sources: Sequence[DataSource]) -> list[str]:
    """A name for each data set, for metrics: its file's without the ending, or the last part of its name on the Hub.

    Equal names are numbered: `chats`, `chats-2`.
    """
    names: list[str] = []
    for source in sources:
        stem = source.path.stem if source.path else str(source.hub).rpartition("/")[2]
        name, number = stem, 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names


def shared_out(limit: int | None, counts: Sequence[int]) -> list[int]:
    """How many of `limit` examples each data set gives: equally many, where it has as many; the others fill the rest.

    A set gives at least one, so that no set's loss goes unmeasured.

    Args:
        limit: The most examples of all sets together; None for all.
        counts: The examples of each set.
    """
    if limit is None:
        return list(counts)
    taken = [0] * len(counts)
    left = max(limit, len(counts))
    for position, number in enumerate(sorted(range(len(counts)), key=lambda number: counts[number])):
        taken[number] = min(counts[number], left // (len(counts) - position))
        left -= taken[number]
    return taken


def describe_source(source: DataSource) -> dict[str, Any]:
    """A data set as `run.json` and a manifest describe it: name, SHA-256 of its files, rows, licence."""
    count = 0

    def skipped(_: MixfuseError) -> None:
        nonlocal count
        count += 1

    count += sum(1 for _ in rows(source, wanted=(), bad=skipped))
    return {
        "name": source.path.name if source.path else source.name,
        "sha256": digest(source),
        "rows": count,
        "licence": source.licence,
    }


def digest(source: DataSource) -> str | None:
    """The SHA-256 of a data set's file; of several files that of their names and digests; None on the Hub.

    Raises:
        MixfuseError: A file is missing.
    """
    if source.path is None:
        return None
    files = data_files.files_of(source.path)
    if files == [source.path]:
        return _hash(source.path)
    return sha256_json([[file.name, _hash(file)] for file in files])


def _hash(file: Path) -> str:
    with reading(file):
        return sha256_file(file)


def _rows(source: DataSource, wanted: Collection[str] | None, bad: OnBad, unread: Counter[str] | None) -> Rows:
    if source.path is not None:
        for file in data_files.files_of(source.path):
            yield from data_files.read(file, wanted, bad, unread)
        return
    for number, row in enumerate(_hub(source, wanted, unread)):
        yield f"{source.name}: row {number}", data_files.without_nulls(row)


def hub_fingerprint(source: DataSource) -> str:
    """What tells a version of a data set on the Hub from another: the fingerprint of `datasets`, of its commit."""
    return str(_load_hub(source)._fingerprint)


def _hub(source: DataSource, wanted: Collection[str] | None, unread: Counter[str] | None) -> Iterator[Any]:
    data = _load_hub(source)
    chosen = [name for name in data.column_names if wanted is None or name in wanted]
    if unread is not None:
        unread.update({name: len(data) for name in data.column_names if name not in chosen})
    with _hub_errors(source):
        yield from data.select_columns(chosen or data.column_names[:1])


def _load_hub(source: DataSource) -> Any:
    import datasets

    with _hub_errors(source):
        return datasets.load_dataset(str(source.hub), source.subset, split=source.split)


@contextmanager
def _hub_errors(source: DataSource) -> Iterator[None]:
    import datasets

    try:
        yield
    except (OSError, ValueError, ArithmeticError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise MixfuseError(
            f"{source.name}: cannot be loaded from the Hugging Face Hub or its local cache: {error}; on a machine "
            "without the Hub, name a local .jsonl or .parquet file as 'path'"
        ) from None
