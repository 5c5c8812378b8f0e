"""`mixfuse completion`: scripts that let a shell complete mixfuse's commands, options and files."""

import argparse
from pathlib import Path

from mixfuse.cli import options

_DIRECTORIES = ("DIR", "OUT", "A", "B")
"""Metavars of paths that are folders."""


def register(commands: options.Commands) -> None:
    """Adds the parser."""
    completion = options.add_command(
        commands,
        "completion",
        _completion,
        "print a script that completes mixfuse's commands in your shell",
        "For bash, write it to ~/.local/share/bash-completion/completions/mixfuse; for zsh, to a file _mixfuse in a "
        "folder of $fpath.",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")


def _completion(arguments: argparse.Namespace) -> None:
    import shtab

    parser: argparse.ArgumentParser = arguments.parser
    _mark_paths(parser)
    print(shtab.complete(parser, shell=arguments.shell))


def _mark_paths(parser: argparse.ArgumentParser) -> None:
    """Tells shtab which arguments of a parser, and of its sub-commands, are files or folders."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                _mark_paths(subparser)
        elif action.type is Path:
            action.complete = shtab.DIRECTORY if action.metavar in _DIRECTORIES else shtab.FILE  # type: ignore[attr-defined]
