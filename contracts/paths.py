"""Paths that people write: `~` and environment variables in them, and outputs that would destroy an input."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from mixfuse.contracts.errors import MixfuseError

_VARIABLE = re.compile(r"\$(?:\$|(\w+)|\{([^}]*)\})", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def expand(text: str) -> str:
    """Replaces a leading `~`, and `$NAME` and `${NAME}`, in a path or URL; `$$` stands for a dollar sign.

    Raises:
        ValueError: A variable is not set, its name is none, or there is no such user.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name is None:
            return "$" if found[0] == "$$" else found[0]
        if not _NAME.fullmatch(name):
            if found[2] is None:  # $5: no variable can be called so
                return found[0]
            raise ValueError(f"{found[0]!r} in {text!r} names no environment variable; write $$ for a dollar sign")
        if not (found_value := os.environ.get(name)):
            raise ValueError(
                f"the environment variable {name} in {text!r} is not set; set it, or write $$ for a dollar sign"
            )
        return found_value

    if "\0" in text:
        raise ValueError("a path holds no NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text!r} is no text that can be written as UTF-8") from None
    path = _VARIABLE.sub(value, text)
    if not text.startswith("~"):
        return path
    home = os.path.expanduser(path)
    if home.startswith("~"):
        raise ValueError(
            f"{text!r}: there is no home folder of {path.partition('/')[0]}; write ./~ for a file of that name"
        )
    return home


def _expanded(value: object) -> object:
    return expand(value) if isinstance(value, str) else value


FilePath = Annotated[Path, BeforeValidator(_expanded)]
"""A path in a config: `~` and environment variables are replaced."""
Location = Annotated[str, BeforeValidator(_expanded)]
"""A path or a URL in a config, replaced likewise."""


def resolved(path: Path) -> Path:
    """A path without links; absolute alone where it has no such form: reading it says why."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # a circle of links, no permission, a NUL character
        return path.absolute()


def keep_apart(outputs: Iterable[Path], inputs: Iterable[Path | None]) -> None:
    """Refuses an output that is one of the inputs, or that lies in a folder that is an input.

    Relative spellings, symbolic links and hard links are seen through. Every command with inputs and outputs calls it
    before it reads or writes anything.

    Raises:
        MixfuseError: An output would overwrite an input, or be put into one.
    """
    known = [source for source in inputs if source is not None]  # None: an input that was not named
    for out in outputs:
        for source in known:
            if _same(out, source):
                raise MixfuseError(
                    f"the output {out} is the input {source} and would be overwritten; choose another output path"
                )
            if _lies_in(out, source):
                raise MixfuseError(
                    f"the output {out} lies in the folder {source}, which is an input; choose another output path"
                )


def _lies_in(out: Path, folder: Path) -> bool:
    try:
        return folder.is_dir() and folder.resolve() in out.resolve().parents
    except (OSError, RuntimeError):  # as for `_same`
        return False


def _same(one: Path, other: Path) -> bool:
    try:
        return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))
    except (OSError, RuntimeError):  # a circle of links, a folder that cannot be read: reading it reports that
        return False


def check_output(out: Path, *, folder: bool) -> None:
    """Refuses an output that could not be written, before any work is done for it.

    Args:
        out: The file or folder.
        folder: Whether it is to be a folder.

    Raises:
        MixfuseError: A parent is a file, the folder cannot be written, or something of another kind has that path (kind
            "disk").
    """
    try:
        if out.exists():
            fits = out.is_dir() if folder else out.is_file()
            if not fits:
                kind = "a folder" if out.is_dir() else "a file" if out.is_file() else "no regular file"
                wanted = "name a folder" if folder else "give the file"
                raise MixfuseError(f"cannot write {out}: it is {kind}; {wanted}", kind="disk")
        above = next(_existing(out.parent), None)
    except OSError as error:
        raise MixfuseError(
            f"cannot write {str(out)[:200]}: {error.strerror}; choose another output path", kind="disk"
        ) from None
    if above is not None and not above.is_dir():
        raise MixfuseError(f"cannot write {out}: {above} is a file, not a folder", kind="disk")
    if above is not None and not os.access(above, os.W_OK | os.X_OK):
        raise MixfuseError(f"cannot write {out}: no permission to write in {above}", kind="disk")


def _existing(path: Path) -> Iterator[Path]:
    """The path and those above it that exist, nearest first."""
    for candidate in (path, *path.parents):
        if os.path.lexists(candidate):
            yield candidate
