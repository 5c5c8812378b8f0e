"""`mixfuse tasks …`: tasks with verifiers."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parsers."""
    tasks = options.add_group(commands, "tasks", "make training data from tasks with verifiers")
    make = options.add_command(tasks, "make", _make, "write chats to train on: each task with its reference answer")
    make.add_argument("tasks", type=Path, metavar="TASK_FILE", help="the kinds of task (YAML)")
    make.add_argument("--out", type=options.out_file, required=True, metavar="FILE", help="the JSONL file to write")
    make.add_argument("--kind", action="append", default=[], metavar="NAME", help="only this kind; repeatable")
    options.add_tasks_options(make, split="train")


def _make(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.files import write_jsonl
    from mixfuse.contracts.tasks import make

    tasks = make(arguments.tasks, arguments.split, arguments.count, seed=arguments.seed, only=arguments.kind)
    count = write_jsonl(arguments.out, (task.chat() for task in tasks))
    print(f"{arguments.out}: {count} chats")
