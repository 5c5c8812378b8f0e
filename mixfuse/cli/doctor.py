"""`mixfuse doctor`: checks of the machines."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser."""
    doctor = options.add_command(
        commands,
        "doctor",
        _doctor,
        "check this machine",
        "Under `mixfuse launch` it checks all machines and the connections between them.",
    )
    doctor.add_argument(
        "recipe",
        type=Path,
        nargs="?",
        metavar="RECIPE",
        help="also check the recipe's base, data, disk space and processes",
    )
    options.add_overrides(doctor, "the recipe")
    doctor.add_argument("--nodes", type=options.whole(1), metavar="N", help="fail unless N machines take part")
    options.add_json(doctor, "the checks")


def _doctor(arguments: argparse.Namespace) -> int:
    from mixfuse.train.launching.doctor import examine_machines

    return examine_machines(arguments.recipe, arguments.overrides, nodes=arguments.nodes, as_json=arguments.json)
