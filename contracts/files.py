"""Reads and writes files: a file is written whole or not at all, and an error names the file and the line."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixfuse.contracts.errors import MixfuseError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it into place when the block succeeds.

    Raises:
        MixfuseError: The disk is full or the folder cannot be written; nothing is left behind.
    """
    path = Path(path)
    with disk_errors(path):
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
    if path.exists() and not replace:
        raise MixfuseError(f"{path} exists already; choose another place or remove it first")
    with disk_errors(path):
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
        if code in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise MixfuseError(
                f"cannot write {path}: {os.strerror(code)}; choose another output path", kind="disk"
            ) from error
        raise


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


def read_json(path: Path) -> Any:
    """Reads one JSON document.

    Raises:
        MixfuseError: The file is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MixfuseError(f"{path}: no such file") from None
    except OSError as error:
        raise MixfuseError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise MixfuseError(f"{path}: not valid JSON (it is nested too deep)") from None
    except ValueError as error:  # malformed, not UTF-8, or a number of too many digits
        raise MixfuseError(f"{path}: not valid JSON ({error})") from None


def iter_jsonl(path: Path, *, required: Iterable[str] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads a JSONL file of objects, one line at a time.

    Args:
        path: The file, one JSON object a line; blank lines are skipped.
        required: Keys every row must have.

    Yields:
        The number of the line, from 1, and its object.

    Raises:
        MixfuseError: The file is missing or cannot be read, or a line is malformed (the message names file and line).
    """
    path = Path(path)
    wanted = tuple(required)
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise MixfuseError(f"{path}:{number}: malformed JSON: {error.msg}") from None
                except RecursionError:
                    raise MixfuseError(f"{path}:{number}: malformed JSON: it is nested too deep") from None
                except ValueError as error:  # a number of too many digits
                    raise MixfuseError(f"{path}:{number}: malformed JSON: {error}") from None
                if not isinstance(row, dict):
                    raise MixfuseError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
                missing = [key for key in wanted if key not in row]
                if missing:
                    raise MixfuseError(f"{path}:{number}: missing key {missing[0]!r}")
                yield number, row
    except FileNotFoundError:
        raise MixfuseError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise MixfuseError(f"{path} is a folder; name a .jsonl file") from None
    except OSError as error:
        raise MixfuseError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise MixfuseError(f"{path}: not UTF-8 text ({error.reason})") from None


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
