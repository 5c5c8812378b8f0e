"""`mixfuse doctor`: checks of the machines."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser of `mixfuse doctor`."""
    doctor = commands.add_parser("doctor", help="this machine; under `launch`, all machines and what lies between them")
    doctor.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE", help="look at its base, disk and processes")
    doctor.add_argument("overrides", nargs="*", metavar="key=value")
    doctor.add_argument("--nodes", type=int, metavar="N", help="how many machines there should be")
    doctor.add_argument("--json", action="store_true", help="one JSON object on the last line")
    doctor.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from mixfuse.train.launching.doctor import run

    return run(arguments.recipe, arguments.overrides, nodes=arguments.nodes, as_json=arguments.json)
