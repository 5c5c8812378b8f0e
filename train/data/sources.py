"""Data sets read row by row: a `.jsonl` or `.parquet` file, or a data set on the Hugging Face Hub."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import iter_jsonl, sha256_file
from mixfuse.train.recipe import DataSource


def rows(source: DataSource, *, required: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads a data set row by row.

    Args:
        source: The data set.
        required: Keys that every row must have.

    Yields:
        The row's place (file and line, or name and number) for messages, and the row.

    Raises:
        MixfuseError: The data set is missing, cannot be read or is empty, or a row is malformed.
    """
    empty = True
    for where, row in _rows(source, required):
        empty = False
        missing = next((key for key in required if key not in row), None)
        if missing is not None:
            raise MixfuseError(f"{where}: missing key {missing!r}")
        yield where, row
    if empty:
        raise MixfuseError(f"{source.name}: the data set is empty")


def describe_source(source: DataSource) -> dict[str, Any]:
    """A data set as `run.json` and a manifest describe it: name, SHA-256 of its file, rows, licence."""
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
            f"{source.name}: cannot be loaded from the Hugging Face Hub or its local cache: {error}; on a machine "
            "without the Hub, name a local .jsonl or .parquet file as 'path'"
        ) from None
