"""The `mixfuse` command: parses the arguments, runs one command and returns its exit status.

Each command is the file of its name beside this one (`mixfuse adapter push` is in `adapter.py`): it adds its parser in
`register`, and its functions import the rooms when they run, so that `mixfuse --help` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from mixfuse import __version__
from mixfuse.cli import (
    adapter,
    ask,
    base,
    doctor,
    eval,
    experts,
    gateway,
    keys,
    launch,
    loop,
    pairs,
    plan,
    pool,
    roles,
    serve,
    tasks,
    traces,
    train,
)
from mixfuse.contracts.errors import exit_code

COMMANDS = (
    base,
    tasks,
    train,
    plan,
    experts,
    launch,
    doctor,
    pool,
    pairs,
    adapter,
    serve,
    gateway,
    roles,
    keys,
    traces,
    ask,
    loop,
    eval,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 for success; 2 for an error that the user can fix, printed as one line on standard error; 75 for a run that
        SIGTERM stopped; 130 after Ctrl-C; 141 when the reader of standard output has gone.
    """
    arguments = build_parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int | None] = arguments.command
    try:
        return exit_code(lambda: command(arguments))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="mixfuse", description="Tune Mixtral into a domain model and a judge; serve both; fuse."
    )
    parser.add_argument("--version", action="version", version=f"mixfuse {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.register(commands)
    return parser
