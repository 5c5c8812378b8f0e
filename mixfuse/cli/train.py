"""`mixfuse train …`: fine-tuning."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser of `mixfuse train`."""
    train = options.group(commands, "train", "fine-tune under DeepSpeed ZeRO-3")
    for stage, words in (
        ("sft", "the domain model, by supervised fine-tuning"),
        ("judge", "the judge, by DPO"),
    ):
        stage_parser = train.add_parser(stage, help=words)
        stage_parser.add_argument("recipe", type=Path, metavar="RECIPE")
        stage_parser.add_argument("overrides", nargs="*", metavar="key=value")
        stage_parser.set_defaults(command=_train, stage=stage)


def _train(arguments: argparse.Namespace) -> None:
    from mixfuse.train.run import start

    start(arguments.stage, arguments.recipe, arguments.overrides)
