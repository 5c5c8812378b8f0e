"""What several commands share: how a command is added, and options that mean the same everywhere."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""The list that commands, or the sub-commands of one command, are added to."""
Function: TypeAlias = Callable[[argparse.Namespace], int | None]
"""Runs a command; returns its exit status, None for 0."""


def add_group(commands: Commands, name: str, summary: str) -> Commands:
    """Adds a command that consists of sub-commands, such as `mixfuse adapter`.

    Without a sub-command it prints its help and exits with 2.

    Returns:
        The list to add the sub-commands to.
    """
    parser = commands.add_parser(name, help=summary, description=_sentence(summary))
    subcommands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def explain(_arguments: argparse.Namespace) -> int:
        parser.print_help(sys.stderr)
        return 2

    parser.set_defaults(command=explain)
    return subcommands


def add_command(
    commands: Commands, name: str, function: Function, summary: str, details: str = ""
) -> argparse.ArgumentParser:
    """Adds one command.

    Args:
        commands: The list to add it to.
        name: The word that the user types.
        function: What runs it.
        summary: One line for the list of commands; without a capital and a full stop.
        details: Further sentences for the command's own help.

    Returns:
        Its parser, to add arguments to.
    """
    description = " ".join([_sentence(summary), details]).strip()
    parser = commands.add_parser(name, help=summary, description=description)
    parser.set_defaults(command=function)
    return parser


def add_overrides(parser: argparse.ArgumentParser, of_what: str) -> None:
    """Adds the trailing `key=value` arguments, which replace keys of a YAML file."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"replace a key of {of_what}")


def add_tasks_options(parser: argparse.ArgumentParser, *, split: str) -> None:
    """Adds `--split`, `--count` and `--seed`, which choose tasks of a task file.

    Args:
        parser: The command's parser.
        split: The default of `--split`.
    """
    parser.add_argument(
        "--split",
        choices=("train", "pool", "heldout"),
        default=split,
        help=f"which part of the tasks; no prompt is in two of them (default: {split})",
    )
    parser.add_argument("--count", type=int, default=100, help="number of tasks (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the tasks (default: 0)")


def add_hardware(parser: argparse.ArgumentParser) -> None:
    """Adds the options that describe the hardware to plan for."""
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="plan: number of hosts (default: 1)")
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="G", help="plan: number of GPUs per host (default: 8)"
    )
    parser.add_argument(
        "--gpu-memory", default="80GiB", metavar="SIZE", help="plan: memory of one GPU (default: 80GiB)"
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="plan: a folder with config.json, if the base is not on this machine"
    )


def add_json(parser: argparse.ArgumentParser, what: str = "the result") -> None:
    """Adds `--json`, for programs that read the output."""
    parser.add_argument("--json", action="store_true", help=f"print {what} as one JSON object on the last line")


def add_url(parser: argparse.ArgumentParser) -> None:
    """Adds `--url`, the address of a running server."""
    parser.add_argument(
        "--url",
        default=os.environ.get("MIXFUSE_URL", "http://127.0.0.1:8080"),
        help="address of the running server (default: $MIXFUSE_URL, else http://127.0.0.1:8080)",
    )


def add_database(parser: argparse.ArgumentParser) -> None:
    """Adds `--db`, the database of traces, keys and roles."""
    parser.add_argument(
        "--db",
        default=os.environ.get("MIXFUSE_TRACE_DB", "runs/traces.sqlite3"),
        metavar="PATH_OR_URL",
        help="the gateway's trace_db (default: $MIXFUSE_TRACE_DB, else runs/traces.sqlite3)",
    )


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."
