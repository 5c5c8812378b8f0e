"""`mixfuse traces …`: the recorded requests of the gateway."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parsers."""
    traces = options.add_group(commands, "traces", "read the recorded requests of the gateway")
    export = options.add_command(traces, "export", _export, "export traces as pool rows for `mixfuse pairs build`")
    export.add_argument("--out", type=options.out_file, required=True, metavar="FILE", help="the JSONL file to write")
    export.add_argument(
        "--label",
        choices=("feedback", "judge"),
        default="feedback",
        help="what marks an answer as right: users' feedback (default) or the judge's verdicts",
    )
    export.add_argument(
        "--tasks", type=Path, metavar="FILE", help="a task file (YAML); its verifiers mark the answers to its tasks"
    )
    options.add_tasks_options(export, split="pool")
    export.add_argument("--days", type=options.real(), metavar="DAYS", help="only traces of the last DAYS days")
    export.add_argument(
        "--min-agreement",
        type=options.real(least=0, most=1),
        metavar="SHARE",
        help="ignore users who agree with the others less often than this",
    )
    options.add_database(export)


def _export(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.database import opened
    from mixfuse.fusion.store.export_traces import export

    tasks = None
    if arguments.tasks is not None:
        from mixfuse.contracts.tasks import make

        tasks = make(arguments.tasks, arguments.split, arguments.count, seed=arguments.seed)
    with opened(arguments.db, create=False) as database:
        counts = export(
            database,
            arguments.out,
            label=arguments.label,
            tasks=tasks,
            days=arguments.days,
            min_agreement=arguments.min_agreement,
        )
    print(f"{arguments.out}: " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()))
