"""`mixfuse loop`: one round of the improvement loop."""

import argparse
import json
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser of `mixfuse loop`."""
    loop = commands.add_parser("loop", help="from the traces since the last round to a better judge, or why not")
    loop.add_argument("config", type=Path, metavar="CONFIG")
    loop.add_argument("overrides", nargs="*", metavar="key=value")
    loop.add_argument("--json", action="store_true", help="the decision as one JSON object on the last line")
    loop.set_defaults(command=_loop)


def _loop(arguments: argparse.Namespace) -> None:
    from mixfuse.app import loop
    from mixfuse.contracts.strict_yaml import load

    decision = loop.run(load(arguments.config, loop.LoopConfig, arguments.overrides))
    for line in loop.lines(decision) if decision else ():
        print(line)
    if arguments.json:
        print(json.dumps(decision))
