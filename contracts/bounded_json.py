"""JSON from outside: read by orjson, and refused where it is nested deeper than anything that reads it again allows.

pydantic reads 200 levels and writes 255, orjson writes 254, `json` as many as Python's stack holds. What is accepted
once must be readable for ever, also where a trace puts some levels around it.
"""

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import shown

MAX_DEPTH = 100
"""Levels of objects and arrays. A tool's schema has five to twenty."""


_MOST_CONTAINERS = 200_000
"""Objects and arrays in one file: an empty one takes three bytes of a file and sixty of memory."""


class TooDeepError(ValueError):
    """JSON that is nested more than `MAX_DEPTH` levels deep."""

    def __init__(self) -> None:
        super().__init__(f"JSON that is nested more than {MAX_DEPTH} levels deep")


def loads(content: bytes | bytearray | str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        TooDeepError: It is nested more than `MAX_DEPTH` levels deep.
        ValueError: It is not JSON.
    """
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        if "depth" in str(error) or "recursion" in str(error):
            raise TooDeepError from None
        raise
    if too_deep(value):
        raise TooDeepError
    return value


def too_deep(value: Any) -> bool:
    """Whether a JSON value is nested more than `MAX_DEPTH` levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for whole in level
            if isinstance(whole, dict | list)
            for part in (whole.values() if isinstance(whole, dict) else whole)
            if isinstance(part, dict | list)
        ]
        if not level:
            return False
    return True


def open_regular(path: Path, *, follow: bool = True) -> BinaryIO:
    """Opens a file of somebody else's; what is not a regular file (a pipe, a device, a folder) does not block.

    Args:
        path: The file.
        follow: Whether it may be a symbolic link.

    Raises:
        MixfuseError: It is missing, cannot be read, or is no regular file (`kind` "adapter").
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        if not follow and path.is_symlink():
            raise MixfuseError(f"{shown(path)}: is a link; put the file itself there", kind="adapter")
        handle = os.open(path, flags)
    except FileNotFoundError:
        raise MixfuseError(f"{shown(path)}: no such file", kind="adapter") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise MixfuseError(f"{shown(path)}: cannot be read: {reason}", kind="adapter") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):  # asked first: of a folder, `fdopen` would leave the handle open
        os.close(handle)
        raise MixfuseError(f"{shown(path)}: is no regular file", kind="adapter")
    return os.fdopen(handle, "rb")


@contextmanager
def reading_in(folder: Path) -> Iterator[None]:
    """Turns what the system says against reading somebody else's folder into one line; its files may change or vanish.

    Raises:
        MixfuseError: A file or a folder cannot be read (`kind` "adapter").
    """
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else str(folder)
        raise MixfuseError(f"{shortened(name, 200)}: cannot be read: {error.strerror}", kind="adapter") from None


def read_object(path: Path, *, most: int, follow: bool = True) -> dict[str, Any]:
    """Reads a JSON object from a file of somebody else's, within limits that keep time and memory small.

    Args:
        path: The file.
        most: Its largest size in bytes.
        follow: Whether it may be a symbolic link.

    Raises:
        MixfuseError: It is missing, no regular file, too large, nested too deep, not JSON or no object (`kind`
            "adapter").
    """
    with open_regular(path, follow=follow) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise MixfuseError(f"{shown(path)}: larger than {most >> 20} MiB, which no such file is", kind="adapter")
    return parse_object(content, shown(path))


def parse_object(content: bytes, source: str, *, containers: int = _MOST_CONTAINERS) -> dict[str, Any]:
    """Parses a JSON object as `json` does (NaN and infinity included), within limits of depth and count.

    Args:
        content: The JSON.
        source: Its file, for messages.
        containers: The most objects and arrays.

    Raises:
        MixfuseError: It is not JSON, no object, has a key twice or half a character, or is beyond a limit (`kind`
            "adapter").
    """
    try:
        if content.count(b"{") + content.count(b"[") > containers:
            raise ValueError(f"it holds more than {containers} objects and arrays")
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_once)
        if too_deep(value):
            raise TooDeepError
        if _HALF.search(content) and (half := _half(value)):
            raise ValueError(f"a text holds half a surrogate pair, {half}, which no file or database can hold")
    except RecursionError:
        raise MixfuseError(f"{source}: not valid JSON (it is nested too deep)", kind="adapter") from None
    except ValueError as error:
        raise MixfuseError(f"{source}: not valid JSON ({shortened(str(error), 200)})", kind="adapter") from None
    if not isinstance(value, dict):
        raise MixfuseError(f"{source}: holds no JSON object, but {_KINDS.get(type(value), 'a number')}", kind="adapter")
    return value


_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def _half(value: Any) -> str | None:
    """The first half of a surrogate pair in a value, which JSON can escape; None if there is none."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return ascii(error.object[error.start])[1:-1]
    return None


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ: of a key that stands twice, one value would be dropped in silence."""
    made = dict(items)
    if len(made) < len(items):
        twice, _ = Counter(key for key, _ in items).most_common(1)[0]
        raise ValueError(f"the key {shortened(repr(twice), 80)} stands twice")
    return made


_KINDS = {list: "a list", str: "a text", type(None): "null", bool: "true or false"}


def shortened(text: str, most: int) -> str:
    """A text for a message, cut if it is longer than `most` characters, without line breaks."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
