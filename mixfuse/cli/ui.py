"""`mixfuse ui`: the page at `/ui` without a gateway."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser."""
    ui = options.add_command(
        commands, "ui", _ui, "show recorded requests, runs and reports in a browser, without a gateway"
    )
    ui.add_argument(
        "--traces", type=options.database, metavar="DB", help="a trace database: a SQLite file, or a postgresql:// URL"
    )
    ui.add_argument("--runs", type=Path, metavar="FOLDER", help="a folder of training runs and reports")
    ui.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE",
        help="pairs of answers to vote on, as JSON lines; the votes go into NAME.votes.jsonl beside the file",
    )
    ui.add_argument(
        "--port",
        type=options.whole(0, 65535),
        default=8081,
        help="port to listen on; 0 picks a free one (default: 8081)",
    )


def _ui(arguments: argparse.Namespace) -> None:
    from mixfuse.app.viewer import run_viewer

    run_viewer(arguments.traces, arguments.runs, arguments.pairs, arguments.port)
