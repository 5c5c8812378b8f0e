"""Rows of the files that people keep data in: JSON Lines, JSON arrays, Parquet, CSV; packed, in shards, in folders."""

import csv
import glob
import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import parse_json, reading, unique_keys, why_unreadable

Rows: TypeAlias = Iterator[tuple[str, dict[str, Any]]]
"""The place of a row, for messages, and the row."""
OnBad: TypeAlias = Callable[[MixfuseError], None]
"""What is done about a row that cannot be read: raise the error, or note it and go on."""

ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
"""The files that are read, in upper case too; all but Parquet also with `.gz` behind."""
_LONGEST = 1 << 26  # bytes of a line, or characters of an array's element: a small packed file can unpack to a huge one
_MARKS = {b"\x1f\x8b": "a packed file (.gz)", b"PAR1": "a Parquet file (.parquet)"}
_BRACES = re.compile(r'[{}]|"(?:[^"\\]|\\.)*+(?P<end>")?', re.DOTALL)
_SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation",
           "dev": "validation", "eval": "test"}  # fmt: skip


def stop(error: MixfuseError) -> None:
    """The `OnBad` that stops at the first bad row."""
    raise error


def files_of(path: Path) -> list[Path]:
    """The data files that a path names: a file, a folder of shards, or a pattern (`train-*.parquet`), in their order.

    Raises:
        MixfuseError: There is none, a folder holds files of several kinds or splits, or an ending is not read.
    """
    try:
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if _is_shard(file, path)]
            _check_folder(path, found)
        elif not path.exists() and any(mark in str(path) for mark in "*?["):
            found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
            if not found:
                raise MixfuseError(f"{path}: no file fits the pattern")
        else:
            return [path]
    except (OSError, ValueError) as error:
        raise MixfuseError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return found


def _is_shard(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    return not hidden and kind_of(file)[0] in ENDINGS and (file.is_file() or not file.exists())


def _check_folder(folder: Path, files: list[Path]) -> None:
    if not files:
        raise MixfuseError(f"{folder}: the folder holds no file that ends in {', '.join(ENDINGS)}")
    kinds = Counter(kind_of(file)[0] for file in files)
    if len(kinds) > 1:
        most = max(kinds, key=lambda kind: (kinds[kind], kind))
        raise MixfuseError(
            f"{folder}: the folder holds {' and '.join(sorted(kinds))}; name one kind: {folder}/**/*{most}"
        )
    splits = {split: part for file in files for part in file.relative_to(folder).parts if (split := _split(part))}
    if len(splits) > 1:
        name = splits[max(splits)]
        pattern = f"{name}/**/*{kind}" if (kind := next(iter(kinds))) not in name else f"{max(splits)}*{kind}"
        raise MixfuseError(
            f"{folder}: the folder holds several splits ({', '.join(sorted(splits))}); name one by a pattern: "
            f"{folder}/**/{pattern}"
        )


def _split(name: str) -> str:
    """The split that a file or a folder is named after, or nothing."""
    return _SPLITS.get(re.split(r"[^a-z]", name.lower())[0], "")


def kind_of(file: Path) -> tuple[str, bool]:
    """A file's ending in lower case, without the `.gz` of a packed one, and whether it is packed."""
    endings = [ending.lower() for ending in file.suffixes[-2:]]
    if endings and endings[-1] == ".gz":
        return (endings[0] if len(endings) > 1 else ""), True
    return (endings[-1] if endings else ""), False


def read(
    file: Path, wanted: Collection[str] | None = None, bad: OnBad = stop, unread: Counter[str] | None = None
) -> Rows:
    """Reads the rows of one file, one at a time.

    Args:
        file: The file. One without an ending is read as JSON Lines.
        wanted: The columns that are read of a Parquet file; by default all but dates. Other formats give whole rows.
        bad: What to do about a row that cannot be read.
        unread: Gets the columns of a Parquet file that are not read → rows.

    Raises:
        MixfuseError: The file is missing, is none of these formats, or cannot be read at all.
    """
    ending, packed = kind_of(file)
    if ending and (ending not in ENDINGS or (packed and ending == ".parquet")):
        raise MixfuseError(
            f"{file}: files that end in {file.suffix!r} are not read; convert or unpack it to one of "
            f"{', '.join(ENDINGS)} (or .gz behind any but .parquet)"
        )
    with reading(file):
        if ending == ".parquet":
            yield from _parquet(file, wanted, bad, unread)
            return
        with gzip.open(file) if packed else file.open("rb") as opened:
            stream = cast(io.BufferedReader, opened)  # a GzipFile reads as one does
            start = stream.peek(64)[:64]
            if start.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise MixfuseError(f"{file}: the text is UTF-16; save it as UTF-8")
            for mark, what in _MARKS.items():
                if start.startswith(mark):
                    raise MixfuseError(f"{file}: this is {what}; give the file that ending")
            if b"\0" in start:
                raise MixfuseError(f"{file}: the text holds NUL bytes, as UTF-16 does; save it as UTF-8")
            if ending in (".csv", ".tsv"):
                yield from _csv(file, stream, bad)
            elif start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                yield from _array(file, stream, bad)
            else:
                yield from _lines(file, stream, bad)


def _lines(file: Path, stream: BinaryIO, bad: OnBad) -> Rows:
    for number, line in enumerate(iter(lambda: stream.readline(_LONGEST), b""), start=1):
        where = f"{file}:{number}"
        content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not content.strip():
            continue
        if len(line) == _LONGEST:
            raise MixfuseError(f"{where}: the line is longer than {_LONGEST >> 20} MiB")
        try:
            row = parse_json(content.decode())
        except UnicodeDecodeError as error:
            bad(MixfuseError(f"{where}: not UTF-8 text ({error.reason})"))
        except ValueError as error:
            hint = ""
            if (number == 1 and content.strip() in (b"{", b"[")) or file.suffix.lower() == ".json":
                hint = "; a JSON file holds one array of rows, or one row a line"
            bad(MixfuseError(f"{where}: malformed JSON: {error}{hint}"))
        else:
            if isinstance(row, dict):
                yield where, row
            else:
                bad(MixfuseError(f"{where}: expected a JSON object, found {type(row).__name__}"))


def _array(file: Path, stream: BinaryIO, bad: OnBad) -> Rows:
    """The objects of one JSON array, without holding the whole file: elements are read as they come."""
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape") as text:
        buffer, position, line, number, ended = text.read(1 << 16).lstrip()[1:], 0, 1, 0, False
        while True:
            while position < len(buffer) and buffer[position] in " \t\r\n,":
                line += buffer[position] == "\n"
                position += 1
            if position == len(buffer):
                if ended:
                    raise MixfuseError(f"{file}:{line}: the JSON array has no end; the file may be cut off")
                more = text.read(1 << 20)
                buffer, position, ended = more, 0, not more
                continue
            if buffer[position] == "]":
                rest = buffer[position + 1 :]
                while rest and not rest.strip():
                    rest = text.read(1 << 20)
                if rest:
                    raise MixfuseError(
                        f"{file}:{line}: there is more text after the end of the JSON array; a file holds one array of "
                        "rows, or one row a line"
                    )
                return
            where = f"{file}: row {number} (line {line})"
            try:
                row, end = decoder.raw_decode(buffer, position)
            except (ValueError, RecursionError) as error:
                cut = isinstance(error, json.JSONDecodeError)  # or malformed
                why = error.msg if isinstance(error, json.JSONDecodeError) else why_unreadable(error)
                if (after := _closed(buffer, position)) is not None:
                    last = line + buffer.count("\n", position, after)
                    upto = f" (up to line {last})" if last > line else ""
                    bad(MixfuseError(f"{where}: malformed JSON: {why}{upto}"))
                    line, position, number = last, after, number + 1
                    continue
                if not cut:
                    raise MixfuseError(f"{where}: malformed JSON: {why}") from None
                if len(buffer) - position > _LONGEST:
                    raise MixfuseError(f"{where}: malformed JSON, or a row longer than {_LONGEST >> 20} MiB") from None
                more = text.read(max(1 << 20, len(buffer)))
                if not more:
                    raise MixfuseError(f"{where}: malformed JSON: {why}") from None
                buffer, position = buffer[position:] + more, 0
                continue
            line += buffer.count("\n", position, end)
            position, number = end, number + 1
            if isinstance(row, dict):
                yield where, row
            else:
                bad(MixfuseError(f"{where}: expected a JSON object, found {type(row).__name__}"))


def _closed(text: str, start: int) -> int | None:
    """The place behind the object that begins at `start`, by its braces; None if it does not end in this text."""
    if text[start] != "{":
        return None
    depth = 0
    for mark in _BRACES.finditer(text, start):
        if mark[0].startswith('"') and mark["end"] is None:
            return None
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return mark.end()
    return None


def _csv(file: Path, stream: BinaryIO, bad: OnBad) -> Rows:
    """Rows by the names in the first line; an empty cell is an absent key."""
    csv.field_size_limit(_LONGEST)
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        head = text.readline(_LONGEST)
        delimiter = max(",;\t", key=head.count)
        try:
            (names,) = list(csv.reader([head], delimiter=delimiter)) or [[]]
            names = [name.strip() for name in names]
            if len(set(names)) < len(names):
                raise MixfuseError(f"{file}:1: two columns have the same name")
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            for cells in reader:
                where = f"{file}:{reader.line_num + 1}"
                if len(cells) != len(names):
                    if cells:
                        bad(MixfuseError(f"{where}: {len(cells)} cells, but the first line names {len(names)} columns"))
                else:
                    yield where, {name: cell for name, cell in zip(names, cells, strict=True) if cell}
        except csv.Error as error:
            raise MixfuseError(f"{file}: not a readable CSV file: {error}") from None


def _parquet(file: Path, wanted: Collection[str] | None, bad: OnBad, unread: Counter[str] | None) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            # Dates say nothing that is learned, and Python cannot hold all of them.
            dates = {entry.name for entry in table.schema_arrow if pyarrow.types.is_temporal(entry.type)}
            columns = [name for name in names if (name not in dates if wanted is None else name in wanted)]
            if len(set(columns)) < len(columns):
                raise MixfuseError(f"{file}: two columns have the same name")
            if unread is not None:
                unread.update({name: table.metadata.num_rows for name in names[:100] if name not in columns})
            if columns == [] and names:
                columns = names[:1]  # the reader of the shape names what it misses
            for batch in table.iter_batches(batch_size=1000, columns=columns):
                for place in range(batch.num_rows):
                    where = f"{file}: row {number}"
                    number += 1
                    try:
                        (row,) = batch.slice(place, 1).to_pylist()
                    except (ArithmeticError, ValueError) as error:  # not UTF-8, or no date that Python has
                        bad(MixfuseError(f"{where}: a value cannot be read: {why_unreadable(error)}"))
                        continue
                    yield where, without_nulls(row)
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise MixfuseError(f"{file}: not a readable Parquet file: {error}") from None


def without_nulls(value: Any) -> Any:
    """A row of a table with columns, where every row has every key: keys without a value are left out."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value
