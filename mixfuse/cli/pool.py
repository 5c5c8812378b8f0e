"""`mixfuse pool …`: answers of the pool of models."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser of `mixfuse pool`."""
    pool = options.group(commands, "pool", "the pool of models")
    collect = pool.add_parser("collect", help="ask every member, mark the answers with the tasks' verifiers")
    collect.add_argument("config", type=Path, metavar="CONFIG", help="the fusion config that names the members")
    collect.add_argument("--tasks", type=Path, required=True, help="a task file (configs/tiny/tasks.yaml)")
    collect.add_argument("--out", type=Path, required=True, metavar="FILE")
    collect.add_argument("--split", choices=("train", "pool", "heldout"), default="pool")
    collect.add_argument("--count", type=int, default=100, help="how many tasks (default 100)")
    collect.add_argument("--samples", type=int, default=2, help="answers a member and task (default 2)")
    collect.add_argument("--temperature", type=float, default=0.8)
    collect.add_argument("--max-tokens", type=int, default=64)
    collect.add_argument("--concurrency", type=int, default=8)
    collect.add_argument("--seed", type=int, default=0, help="of the tasks")
    options.add_url(collect)
    collect.set_defaults(command=_pool_collect)


def _pool_collect(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.strict_yaml import load
    from mixfuse.contracts.tasks import Task, make
    from mixfuse.fusion.config import FusionConfig
    from mixfuse.fusion.labels.collect import run

    config = load(arguments.config, FusionConfig)
    tasks = make(arguments.tasks, arguments.split, arguments.count, seed=arguments.seed)
    run(
        config,
        arguments.url,
        tasks,
        samples=arguments.samples,
        temperature=arguments.temperature,
        max_tokens=arguments.max_tokens,
        out=arguments.out,
        concurrency=arguments.concurrency,
        verify=Task.verify,
        seed=arguments.seed,
    )
