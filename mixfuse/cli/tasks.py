"""`mixfuse tasks …`: tasks with verifiers."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser of `mixfuse tasks`."""
    tasks = options.group(commands, "tasks", "tasks with verifiers")
    tasks_make = tasks.add_parser("make", help="chats to train on: each task with its reference answer")
    tasks_make.add_argument("tasks", type=Path, metavar="TASK_FILE")
    tasks_make.add_argument("--out", type=Path, required=True, metavar="FILE")
    tasks_make.add_argument("--split", choices=("train", "pool", "heldout"), default="train")
    tasks_make.add_argument("--count", type=int, default=100, help="how many tasks (default 100)")
    tasks_make.add_argument("--seed", type=int, default=0)
    tasks_make.set_defaults(command=_tasks_make)


def _tasks_make(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.files import write_jsonl
    from mixfuse.contracts.tasks import make

    tasks = make(arguments.tasks, arguments.split, arguments.count, seed=arguments.seed)
    count = write_jsonl(arguments.out, (task.chat() for task in tasks))
    print(f"{arguments.out}: {count} chats")
