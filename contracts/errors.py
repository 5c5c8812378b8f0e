"""The one error type a user sees, and the exit code it leads to."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again


class MixfuseError(Exception):
    """Something the user can mend: bad input, a missing file, a port in use, an adapter of another base.

    The message is one line that names what is wrong and how to mend it. The command line prints it and exits with
    `exit_code`; the gateway answers with a typed 4xx or 5xx.

    Attributes:
        kind: A short stable name of the failure (`invalid_request`, `adapter`, `engine`, …), used as the HTTP error
            `type`.
        exit_code: What the command exits with.
    """

    exit_code = 2

    def __init__(self, message: str, *, kind: str = "invalid_request") -> None:
        super().__init__(" ".join(message.split()))
        self.kind = kind


class Preempted(MixfuseError):  # noqa: N818 - nothing is wrong
    """A run was asked to stop by SIGTERM and has: the same command goes on from where it is."""

    exit_code = PREEMPTED

    def __init__(self, message: str) -> None:
        super().__init__(message, kind="preempted")


def exit_code(command: Callable[[], int | None]) -> int:
    """Runs a command; an error becomes one line on standard error, from one process of a run.

    Returns:
        What the command returned, the error's exit code (2 for something the user can mend, 75 after SIGTERM), or 130
        after Ctrl-C.
    """
    try:
        return command() or 0
    except MixfuseError as error:
        _tell_launcher(str(error))
        # One line, not one from every process of a training run; but a disk can be full for one of them alone.
        if os.environ.get("RANK", "0") == "0" or error.kind == "disk":
            print(f"mixfuse: {'' if isinstance(error, Preempted) else 'error: '}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if "WORLD_SIZE" not in os.environ:  # the command itself, not the processes it launched
            print("mixfuse: interrupted; the same command continues where it can", file=sys.stderr)
        return 130


def _tell_launcher(message: str) -> None:
    """Leaves the reason where torchrun looks for it, so that it can be the last thing said, below all tracebacks."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        error = {"message": message, "timestamp": str(int(time.time()))}
        with suppress(OSError):  # the disk may be what the message is about
            Path(file).write_text(json.dumps(error), encoding="utf-8")
