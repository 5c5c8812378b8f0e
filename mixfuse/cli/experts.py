"""`mixfuse experts …`: the experts of the base model."""

import argparse
import json
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser of `mixfuse experts`."""
    experts = options.group(commands, "experts", "the base model's experts")
    experts_profile = experts.add_parser("profile", help="which experts a recipe's data goes to, as a table and a plot")
    experts_profile.add_argument("recipe", type=Path, metavar="RECIPE")
    experts_profile.add_argument("overrides", nargs="*", metavar="key=value")
    experts_profile.add_argument("--out", type=Path, metavar="DIR", help="default: the recipe's `out` with -experts")
    experts_profile.add_argument("--json", action="store_true", help="one JSON object on the last line")
    experts_profile.set_defaults(command=_experts_profile)


def _experts_profile(arguments: argparse.Namespace) -> None:
    from mixfuse.train.model.choose_experts import profile

    record = profile(arguments.recipe, arguments.overrides, arguments.out)
    if arguments.json:
        print(json.dumps(record))
