"""The `mixfuse` command: parses the arguments, runs one command and returns its exit status.

Each command is the file of its name beside this one (`mixfuse adapter push` is in `adapter.py`): `register` adds its
parsers, and its functions import the rooms only when they run, so that `mixfuse --help` answers at once. A new command
is a new file and an entry in `JOBS`.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

from mixfuse import __version__
from mixfuse.cli import (
    adapter,
    ask,
    base,
    combiner,
    completion,
    data,
    doctor,
    eval,
    experts,
    gateway,
    init,
    keys,
    launch,
    loop,
    options,
    pairs,
    plan,
    pool,
    report,
    roles,
    serve,
    tasks,
    traces,
    train,
    ui,
)
from mixfuse.contracts.errors import exit_code

JOBS: Mapping[str, tuple[ModuleType, ...]] = {
    "Start a project": (init, base, completion),
    "Make training data": (tasks, data, pool, pairs),
    "Train": (plan, doctor, train, launch, experts),
    "Check and publish adapters": (adapter,),
    "Serve": (serve, gateway, roles, keys),
    "Ask, measure and improve": (ask, eval, combiner, traces, ui, report, loop),
}
"""The commands by the job they belong to, as `mixfuse` without arguments lists them."""

_DESCRIPTION = (
    "mixfuse tunes Mixtral into a domain model and a judge, serves both with vLLM, and fuses the answers of a pool of "
    "models into one."
)
_FIRST_STEPS = """
first steps:
  mixfuse init my-project --for tiny   write a project that runs on a CPU; its README.md has the next commands
  mixfuse COMMAND --help               explain a command
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; without any it prints the overview.

    Returns:
        0 for success; 2 for an error that the user can fix, printed as one line on standard error; 75 for a run that
        SIGTERM stopped; 130 after Ctrl-C; 141 when the reader of standard output has gone.
    """
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if problem := options.mistyped(parser, words):
        print(f"mixfuse: error: {problem}", file=sys.stderr)
        return 2
    arguments = read_words(parser, words)
    command: Callable[[argparse.Namespace], int | None] = arguments.command
    try:
        return exit_code(lambda: command(options.settle_paths(arguments)))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def read_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Reads a command line as `parse_args` does; overrides may also stand behind options, which argparse refuses."""
    arguments, further = parser.parse_known_args(words)
    if further:
        if not hasattr(arguments, "overrides") or not all(map(options.is_override, further)):
            parser.error(f"unrecognized arguments: {' '.join(further)}")
        arguments.overrides = [*arguments.overrides, *further]
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; its defaults hold it as `parser`, for `mixfuse completion`."""
    parser = _TopParser(prog="mixfuse", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"mixfuse {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=argparse.ArgumentParser)
    parser.commands = commands
    parser.set_defaults(command=lambda _arguments: parser.print_help(), parser=parser)
    for modules in JOBS.values():
        for module in modules:
            module.register(commands)
    return parser


class _TopParser(argparse.ArgumentParser):
    """A parser whose help lists the commands by job."""

    commands: "argparse._SubParsersAction[argparse.ArgumentParser]"

    def format_help(self) -> str:
        """The usage, the commands of each job with their summaries, and the first steps."""
        summaries = {action.dest: action for action in self.commands._choices_actions}
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for job, modules in JOBS.items():
            formatter.start_section(job)
            formatter.add_arguments([summaries[module.__name__.rpartition(".")[2]] for module in modules])
            formatter.end_section()
        return formatter.format_help() + _FIRST_STEPS
