"""`mixfuse train …`: fine-tuning."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parsers."""
    train = options.add_group(commands, "train", "fine-tune a model with LoRA under DeepSpeed ZeRO-3")
    for stage, summary in (
        ("sft", "train the domain model on chats (supervised fine-tuning)"),
        ("judge", "train the judge on preference pairs (DPO)"),
    ):
        details = "An interrupted run continues from its last checkpoint when the same command is run again."
        parser = options.add_command(train, stage, _train, summary, details)
        parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a training recipe (YAML)")
        options.add_overrides(parser, "the recipe")
        parser.set_defaults(stage=stage)


def _train(arguments: argparse.Namespace) -> None:
    from mixfuse.train.run import start

    start(arguments.stage, arguments.recipe, arguments.overrides)
