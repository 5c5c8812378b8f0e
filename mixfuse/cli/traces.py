"""`mixfuse traces …`: traces of the gateway."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser of `mixfuse traces`."""
    traces = options.group(commands, "traces", "what the gateway did")
    traces_export = traces.add_parser("export", help="traces as pool responses, for mixfuse pairs build")
    traces_export.add_argument("--out", type=Path, required=True, metavar="FILE")
    traces_export.add_argument(
        "--label",
        choices=("feedback", "judge"),
        default="feedback",
        help="whose word says which answers are right: users' (default), or the judge's own",
    )
    traces_export.add_argument("--tasks", type=Path, help="a task file: its verifiers say which answers are right")
    traces_export.add_argument("--split", choices=("train", "pool", "heldout"), default="pool")
    traces_export.add_argument("--count", type=int, default=100, help="how many tasks of the file (default 100)")
    traces_export.add_argument("--seed", type=int, default=0, help="of the tasks")
    traces_export.add_argument("--days", type=float, help="only traces of the last so many days")
    traces_export.add_argument(
        "--min-agreement",
        type=float,
        metavar="SHARE",
        help="leave out users who agree with others less often than this",
    )
    options.add_database(traces_export)
    traces_export.set_defaults(command=_traces_export)


def _traces_export(arguments: argparse.Namespace) -> None:
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
