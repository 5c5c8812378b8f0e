"""`mixfuse data …`: the data of a recipe."""

import argparse
import json
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parsers."""
    data = options.add_group(commands, "data", "look at the data of a recipe")
    preview = options.add_command(
        data,
        "preview",
        _preview,
        "print chats as the model will see them, with what is learned, and counts",
        "Reads all data and the base's tokenizer, and loads no model. Learned text is green, or between ⟦ and ⟧ where "
        "the output is no terminal.",
    )
    preview.add_argument("recipe", type=Path, metavar="RECIPE", help="an SFT recipe (YAML)")
    options.add_overrides(preview, "the recipe")
    preview.add_argument(
        "-n", type=options.whole(0), default=3, metavar="N", dest="chats", help="chats of each data set (default: 3)"
    )
    options.add_json(preview)
    prepare = options.add_command(
        data,
        "prepare",
        _prepare,
        "tokenise a recipe's data into the cache that its runs share",
        "Reads the base's tokenizer and loads no model. A run whose data is prepared starts with it at once. Data that "
        "is prepared already is not tokenised again.",
    )
    prepare.add_argument("recipe", type=Path, metavar="RECIPE", help="a training recipe (YAML)")
    options.add_overrides(prepare, "the recipe")
    options.add_json(prepare)


def _prepare(arguments: argparse.Namespace) -> None:
    from mixfuse.train.stages.prepare_data import prepare_recipe

    report = prepare_recipe(arguments.recipe, arguments.overrides)
    for row in report["data"]:
        held_out = f", {row['held_out']} held out" if row["held_out"] else ""
        print(f"{row['name']}: {row['train']} rows to train on{held_out}, {row['bytes']} bytes in {row['folder']}")
    if arguments.json:
        print(json.dumps(report))


def _preview(arguments: argparse.Namespace) -> None:
    from mixfuse.train.stages.data_preview import in_colour, lines, preview

    report = preview(arguments.recipe, arguments.overrides, chats=arguments.chats)
    for line in lines(report, colour=in_colour()):
        print(line)
    if arguments.json:
        print(json.dumps(report))
