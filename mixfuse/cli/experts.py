"""`mixfuse experts …`: the experts of the base model."""

import argparse
import json
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parsers."""
    experts = options.add_group(commands, "experts", "look at the experts of the base model")
    profile = options.add_command(
        experts, "profile", _profile, "count which experts the data of a recipe is routed to, as a table and a plot"
    )
    profile.add_argument("recipe", type=Path, metavar="RECIPE", help="a training recipe (YAML)")
    options.add_overrides(profile, "the recipe")
    profile.add_argument(
        "--out", type=options.out_folder, metavar="DIR", help="default: the recipe's `out` followed by -experts"
    )
    options.add_json(profile)


def _profile(arguments: argparse.Namespace) -> None:
    from mixfuse.train.stages.experts_profile import profile_experts

    record = profile_experts(arguments.recipe, arguments.overrides, arguments.out)
    if arguments.json:
        print(json.dumps(record))
