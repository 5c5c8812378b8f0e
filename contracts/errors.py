"""The error type that users see, and the exit status of a command."""

import errno
import json
import os
import sys
import time
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_OF_THE_PATH = frozenset(
    {errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EBUSY}
)
_LONGEST_SHOWN = 100
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the run was only interrupted, run it again


class MixfuseError(Exception):
    """An error that the user can fix: bad input, a missing file, a port in use, an adapter of another base.

    The message is one line that says what is wrong and how to fix it. The command line prints it and exits with
    `exit_code`; the gateway answers with a typed status of 4xx or 5xx.

    Attributes:
        kind: A short, stable name of the failure (`invalid_request`, `adapter`, `engine`, …), used as the HTTP error
            `type`.
        exit_code: What the command exits with.
    """

    exit_code = 2

    def __init__(self, message: str, *, kind: str = "invalid_request") -> None:
        super().__init__(printable(" ".join(message.split())))
        self.kind = kind


_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """A text with its control characters, turns of direction and halves of surrogate pairs written as escapes.

    Messages name files and keys that somebody else chose: they must not steer a terminal, and a database or an answer
    in UTF-8 must be able to hold them.
    """
    if text.isprintable():
        return text
    return "".join(
        ascii(letter)[1:-1] if letter in _BIDI or unicodedata.category(letter) in ("Cc", "Cs") else letter
        for letter in text
    )


class Preempted(MixfuseError):  # noqa: N818 - it is not a failure
    """A run stopped after SIGTERM. The same command continues it."""

    exit_code = PREEMPTED

    def __init__(self, message: str) -> None:
        super().__init__(message, kind="preempted")


def exit_code(command: Callable[[], int | None]) -> int:
    """Runs a command; prints an error as one line on standard error, from one process of a distributed run.

    Returns:
        The command's own exit status, the error's (2 for an error that the user can fix, 75 after SIGTERM), or 130
        after Ctrl-C.
    """
    try:
        return command() or 0
    except MixfuseError as error:
        _tell_launcher(str(error))
        # Only rank 0 of a training run prints, so that there is one line; a full disk may concern another rank alone.
        if os.environ.get("RANK", "0") == "0" or error.kind == "disk":
            print(f"mixfuse: {'' if isinstance(error, Preempted) else 'error: '}{error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        # Any option that takes a path may get one that no file can have, or that this user may not use.
        if error.errno not in _OF_THE_PATH or not isinstance(error.filename, str):
            raise
        name = error.filename if len(error.filename) <= _LONGEST_SHOWN else f"{error.filename[:_LONGEST_SHOWN]}…"
        print(f"mixfuse: error: {printable(name)}: {error.strerror}; choose another path", file=sys.stderr)
        return MixfuseError.exit_code
    except KeyboardInterrupt:
        if "WORLD_SIZE" not in os.environ:  # only the command itself prints, not the processes it launched
            print("mixfuse: interrupted; the same command continues where it can", file=sys.stderr)
        return 130


def _tell_launcher(message: str) -> None:
    """Writes the reason where torchrun looks for it, which lets the launcher print it last, below all tracebacks."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        error = {"message": message, "timestamp": str(int(time.time()))}
        with suppress(OSError):  # the error may be about this very disk
            Path(file).write_text(json.dumps(error), encoding="utf-8")
