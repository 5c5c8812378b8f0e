"""`mixfuse pool …`: answers of the pool of models."""

import argparse
import os
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parsers."""
    pool = options.add_group(commands, "pool", "collect answers of the models in the pool")
    collect = options.add_command(
        pool, "collect", _collect, "ask every member and mark the answers with the tasks' verifiers"
    )
    collect.add_argument("config", type=Path, metavar="CONFIG", help="the fusion config that names the members (YAML)")
    collect.add_argument("--tasks", type=Path, required=True, metavar="FILE", help="a task file (YAML)")
    collect.add_argument("--out", type=options.out_file, required=True, metavar="FILE", help="the JSONL file to write")
    options.add_tasks_options(collect, split="pool")
    collect.add_argument("--samples", type=options.whole(1), default=2, help="answers per member and task (default: 2)")
    collect.add_argument(
        "--temperature", type=options.real(least=0), default=0.8, help="sampling temperature (default: 0.8)"
    )
    collect.add_argument(
        "--max-tokens", type=options.whole(1), default=64, help="most tokens of an answer (default: 64)"
    )
    collect.add_argument("--concurrency", type=options.whole(1), default=8, help="requests at once (default: 8)")
    options.add_url(collect)


def _collect(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.strict_yaml import load
    from mixfuse.contracts.tasks import Task, TaskSet, make
    from mixfuse.fusion.batch import Sampling, Target
    from mixfuse.fusion.config import FusionConfig
    from mixfuse.fusion.http.keys import API_KEY
    from mixfuse.fusion.labels.collect import collect_answers

    config = load(arguments.config, FusionConfig)
    tasks = make(arguments.tasks, arguments.split, arguments.count, seed=arguments.seed)
    collect_answers(
        config,
        Target(arguments.url, os.environ.get(API_KEY)),
        TaskSet(tasks, Task.verify),
        Sampling(arguments.temperature, arguments.max_tokens, arguments.seed),
        arguments.out,
        samples=arguments.samples,
        concurrency=arguments.concurrency,
    )
