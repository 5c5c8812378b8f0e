"""`mixfuse loop`: one round from recorded feedback to a better judge."""

import argparse
import json
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser."""
    loop = options.add_command(
        commands,
        "loop",
        _loop,
        "train a new judge from recorded feedback, and serve it if it is measurably better",
        "One call is one round; an interrupted round continues when the same command is run again.",
    )
    loop.add_argument("config", type=Path, metavar="CONFIG", help="a loop config (YAML); see docs/judging.md")
    options.add_overrides(loop, "the config")
    options.add_json(loop, "the decision")


def _loop(arguments: argparse.Namespace) -> None:
    from mixfuse.app.loop import run_round
    from mixfuse.app.loop_config import LoopConfig
    from mixfuse.app.promotion import summary_lines
    from mixfuse.contracts.strict_yaml import load

    decision = run_round(load(arguments.config, LoopConfig, arguments.overrides))
    for line in summary_lines(decision) if decision else ():
        print(line)
    if arguments.json:
        print(json.dumps(decision))
