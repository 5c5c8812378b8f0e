"""Reads and writes files: a file is written whole or not at all, and an error names the file and the line."""

import codecs
import errno
import gzip
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mixfuse.contracts.errors import MixfuseError

_OF_THE_PATH = frozenset(
    {
        errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG,
        errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.ENODEV, errno.EBUSY,
    }
)  # fmt: skip
_LONGEST_SHOWN = 200
_LONGEST_LINE = 1 << 26  # characters: a packed file of some kilobytes can unpack to a line that fills the memory


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it into place when the block succeeds.

    Raises:
        MixfuseError: The disk is full, the folder cannot be written, or `path` is a device or another special file,
            which a file would take the place of; nothing is left behind.
    """
    path = Path(path)
    with disk_errors(path):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise MixfuseError(f"cannot write {path}: it is no regular file; choose another output path", kind="disk")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(0o666 & ~_umask())
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path` and renames it into place when the block succeeds.

    Args:
        path: The final path of the folder.
        replace: Replace an existing folder; otherwise an existing one is refused.

    Raises:
        MixfuseError: `path` exists and `replace` is false, or the disk is full; nothing is left behind.
    """
    path = Path(path)
    with disk_errors(path):
        if path.exists() and not replace:
            raise MixfuseError(f"{path} exists already; choose another place or remove it first")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        temporary.chmod(0o777 & ~_umask())
        old = temporary.with_name(temporary.name + ".old")
        try:
            yield temporary
            for file in temporary.rglob("*"):
                # safetensors makes files readable for their owner only, but a server may run as another user.
                file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
            if replace and path.exists():
                os.replace(path, old)
            try:
                os.replace(temporary, path)
            except OSError:
                if old.exists():
                    os.replace(old, path)
                raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk or a missing permission while `path` is written into one line.

    Raises:
        MixfuseError: No space is left, or the path cannot be written (kind "disk").
    """
    try:
        yield
    except MixfuseError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        # safetensors wraps the system's error in its own type, which leaves only the text. torch.save does not name the
        # cause; it only reports that its archive (inline_container) could not be written.
        torch_writer = isinstance(error, RuntimeError) and "inline_container" in str(error)
        if code in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error) or torch_writer:
            raise MixfuseError(f"no disk space left to write {path}; free some and run again", kind="disk") from error
        if code in _OF_THE_PATH or (code == errno.ENOENT and _concerns(error, Path(path))):
            raise MixfuseError(
                f"cannot write {shown(path)}: {os.strerror(code)}; choose another output path", kind="disk"
            ) from error
        raise


def _concerns(error: BaseException, path: Path) -> bool:
    """Whether an error names the path or a folder above it, and not a file that is read while it is written."""
    named = getattr(error, "filename", None)
    return isinstance(named, str) and (Path(named) == path or Path(named) in path.parents)


def shown(path: Path | str) -> str:
    """A path for a message, shortened if it is too long to read."""
    text = str(path)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN // 2]}…{text[-_LONGEST_SHOWN // 2 :]}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes one JSON object a line to `path`, whole or not at all; returns the number of rows."""
    count = 0
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a JSON object of its keys and values, as `object_pairs_hook`; the `json` module lets the last one win.

    Raises:
        ValueError: A key stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
    return found


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the errors of reading a file, packed or not, into one line each.

    Raises:
        MixfuseError: The file is missing, cannot be read, or is no whole gzip file.
    """
    try:
        yield
    except FileNotFoundError:
        raise MixfuseError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise MixfuseError(f"{path}: not a whole gzip file ({error})") from None
    except OSError as error:
        raise MixfuseError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_json(path: Path, *, most: int | None = None) -> Any:
    """Reads one JSON document.

    Args:
        path: The file.
        most: Refuse a file of more bytes.

    Raises:
        MixfuseError: The file is missing, cannot be read, or is not JSON, or a key stands twice in an object.
    """
    try:
        with reading(path), Path(path).open("rb") as stream:
            content = stream.read() if most is None else stream.read(most + 1)
        if most is not None and len(content) > most:
            raise MixfuseError(f"{path}: larger than {most >> 20} MiB, which no such file is")
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except (RecursionError, ValueError) as error:  # malformed, not UTF-8, or a number of too many digits
        raise MixfuseError(f"{path}: not valid JSON ({why_unreadable(error)})") from None


def parse_json(text: str) -> Any:
    """JSON text as a value.

    Raises:
        ValueError: It is no JSON, or a key stands twice in an object; the text says why.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from None
    except (RecursionError, ValueError) as error:
        raise ValueError(why_unreadable(error)) from None


def why_unreadable(error: Exception) -> str:
    """Why a value cannot be read, in plain words."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text ({error.reason})"
    return "a number has too many digits" if "int_max_str_digits" in str(error) else str(error)


def iter_jsonl(path: Path, *, required: Iterable[str] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads a JSONL file of objects, one line at a time.

    Args:
        path: The file, one JSON object a line; blank lines are skipped. One that ends in `.gz` is unpacked.
        required: Keys every row must have.

    Yields:
        The number of the line, from 1, and its object.

    Raises:
        MixfuseError: The file is missing or cannot be read, or a line is malformed (the message names file and line).
    """
    path = Path(path)
    wanted = tuple(required)
    if path.is_dir():
        raise MixfuseError(f"{path} is a folder; name a .jsonl file")
    try:
        with reading(path), _open_text(path) as stream:
            for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_LINE), ""), start=1):
                if not line.strip():
                    continue
                if len(line) == _LONGEST_LINE:
                    raise MixfuseError(f"{path}:{number}: the line is longer than {_LONGEST_LINE >> 20} MiB")
                try:
                    row = parse_json(line)
                except ValueError as error:
                    raise MixfuseError(f"{path}:{number}: malformed JSON: {error}") from None
                if not isinstance(row, dict):
                    raise MixfuseError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
                missing = [key for key in wanted if key not in row]
                if missing:
                    raise MixfuseError(f"{path}:{number}: missing key {missing[0]!r}")
                yield number, row
    except UnicodeDecodeError as error:
        raise MixfuseError(f"{path}: not UTF-8 text ({error.reason})") from None


def iter_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads a file of objects, one a line or all in one JSON array.

    Yields:
        The place of an object for messages, `file:line` or `file: row N`, and the object.

    Raises:
        MixfuseError: The file is missing or malformed, or holds something other than objects.
    """
    path = Path(path)
    if not _is_array(path):
        for number, row in iter_jsonl(path):
            yield f"{path}:{number}", row
        return
    for number, row in enumerate(read_json(path), start=1):
        if not isinstance(row, dict):
            raise MixfuseError(f"{path}: row {number}: expected a JSON object, found {type(row).__name__}")
        yield f"{path}: row {number}", row


def refuse_halves(value: Any, place: str) -> None:
    """Refuses texts with half a surrogate pair, which JSON can escape and no file can hold.

    Raises:
        MixfuseError: There is one; the message names the place.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        if 0xDC80 <= ord(error.object[error.start]) <= 0xDCFF:  # how Python keeps a byte that is no UTF-8
            raise MixfuseError(f"{place}: not UTF-8 text (or half a character, {half}); save it as UTF-8") from None
        raise MixfuseError(
            f"{place}: a text holds half a character ({half}, half of a surrogate pair); write all of it or remove it"
        ) from None


def _is_array(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    except OSError:
        return False  # `iter_jsonl` reports why the file cannot be read


def _open_text(path: Path) -> TextIO:
    """Opens a text, which may begin with a byte order mark and may be packed."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def read_jsonl(path: Path, *, required: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Reads all rows of a JSONL file of objects.

    Raises:
        MixfuseError: As `iter_jsonl`, or the file is empty.
    """
    rows = [row for _, row in iter_jsonl(path, required=required)]
    if not rows:
        raise MixfuseError(f"{path}: the data set is empty")
    return rows


def sha256_file(path: Path) -> str:
    """Returns the hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """Returns a value's canonical JSON: UTF-8, sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode(errors="surrogatepass")  # JSON can escape half a surrogate pair


def sha256_json(value: Any) -> str:
    """Returns the hex SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
