"""What several commands share: how a command is added, and options that mean the same everywhere."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.paths import check_output, expand, keep_apart
from mixfuse.contracts.strict_yaml import odd_dash

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""The list that commands, or the sub-commands of one command, are added to."""
Function: TypeAlias = Callable[[argparse.Namespace], int | None]
"""Runs a command; returns its exit status, None for 0."""

MOST = 2**53
"""The most that an option's number may be: up to here a double and a database column hold every whole number."""


def whole(least: int = 1, most: int = MOST) -> Callable[[str], int]:
    """Returns the `type` of an option that takes a whole number in a range."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            between = f"from {least} to {most}" if most < MOST else f"of {least} or more"
            raise argparse.ArgumentTypeError(f"must be a whole number {between}, not {text[:40]!r}")
        return value

    return read


def real(above: float | None = 0.0, *, least: float | None = None, most: float = MOST) -> Callable[[str], float]:
    """Returns the `type` of an option that takes a number in a range; `nan` and `inf` are none.

    Args:
        above: What it must be more than; not looked at where `least` is set.
        least: The least that it may be.
        most: The most that it may be.
    """

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        fits = value >= least if least is not None else above is None or value > above
        if not (fits and abs(value) <= most):  # NaN compares false with everything
            limit = f"of {least:g} or more" if least is not None else f"above {above:g}" if above is not None else ""
            upto = f", at most {most:g}" if most < MOST else ""
            raise argparse.ArgumentTypeError(f"must be a number {limit}{upto}, not {text[:40]!r}".replace("  ", " "))
        return value

    return read


def out_file(text: str) -> Path:
    """The `type` of an argument that names a file to write; an argument of type `Path` is read."""
    return Path(_expanded(text))


def out_folder(text: str) -> Path:
    """The `type` of an argument that names a folder to write."""
    return Path(_expanded(text))


def reference(text: str) -> str:
    """The `type` of an argument that names an adapter directory, which is read, or something on a server."""
    return _expanded(text)


def database(text: str) -> str:
    """The `type` of an argument that names a database, which is read, by its path or URL."""
    return _expanded(text)


def _expanded(text: str) -> str:
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def mistyped(parser: argparse.ArgumentParser, words: Sequence[str]) -> str | None:
    """Says what is wrong with an option that was pasted with another dash than `-`; None if there is none."""
    names = set(_option_names(parser))
    for word in words:
        name = word.partition("=")[0]
        if not name.isascii() and (dash := odd_dash(name)):
            plain = "".join("-" if odd_dash(letter) else letter for letter in name)
            if (right := f"--{plain.lstrip('-')}") in names:
                return f"{dash}; write {right}"
    return None


def _option_names(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _option_names(below)


def settle_paths(arguments: argparse.Namespace) -> argparse.Namespace:
    """Expands the paths of a parsed command line, and refuses outputs that cannot be written or would destroy an input.

    Returns:
        The same command line.

    Raises:
        MixfuseError: An environment variable is not set, or as in `contracts.paths`.
    """
    inputs: list[Path] = []
    outputs: list[Path] = []
    for action in arguments.own._actions if "own" in arguments else ():
        value = getattr(arguments, action.dest, None)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if action.type is Path:
            try:
                values = [Path(expand(str(path))) for path in values]
            except ValueError as error:
                raise MixfuseError(f"{'/'.join(action.option_strings) or action.metavar}: {error}") from None
            setattr(arguments, action.dest, values if isinstance(value, list) else values[0] if values else value)
            inputs += values
        elif action.type in (reference, database):
            inputs += [Path(text) for text in values if "://" not in text]
        elif action.type in (out_file, out_folder):
            for path in values:
                check_output(path, folder=action.type is out_folder)
            outputs += values
    keep_apart(outputs, inputs)
    return arguments


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
    parser.set_defaults(command=function, own=parser)
    return parser


def add_overrides(parser: argparse.ArgumentParser, of_what: str) -> None:
    """Adds the trailing `key=value` arguments, which replace keys of a YAML file."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"replace a key of {of_what}")


def is_override(word: str) -> bool:
    """Whether a word of a command line has the form `dotted.key=value`."""
    return re.match(r"[A-Za-z_][\w.]*=", word) is not None


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
    parser.add_argument("--count", type=whole(), default=100, help="number of tasks (default: 100)")
    parser.add_argument("--seed", type=whole(0), default=0, help="seed of the tasks (default: 0)")


def add_hardware(parser: argparse.ArgumentParser) -> None:
    """Adds the options that describe the hardware to plan for."""
    parser.add_argument("--nodes", type=whole(), default=1, metavar="N", help="plan: number of hosts (default: 1)")
    parser.add_argument(
        "--gpus-per-node", type=whole(), default=8, metavar="G", help="plan: number of GPUs per host (default: 8)"
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


def add_engine(parser: argparse.ArgumentParser, *aliases: str) -> None:
    """Adds the options that choose the engine on which adapters are tried."""
    parser.add_argument(
        "--config", type=Path, metavar="SERVE.YAML", help="use the engine of this serve config, with all its settings"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="type of weights and activations (default: the config's, else float32 on a CPU, the base's on a GPU)",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        type=whole(),
        metavar="N",
        help="divide each layer over N GPUs (default: the config's)",
    )
    parser.add_argument(
        "--engine-url",
        *aliases,
        dest="engine_url",
        metavar="URL",
        help="use this running vLLM; its key is in the environment, VLLM_API_KEY",
    )


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
        type=database,
        default=os.environ.get("MIXFUSE_TRACE_DB", "runs/traces.sqlite3"),
        metavar="PATH_OR_URL",
        help="the gateway's trace_db (default: $MIXFUSE_TRACE_DB, else runs/traces.sqlite3)",
    )


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."
