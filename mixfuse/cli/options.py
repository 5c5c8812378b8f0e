"""Options that several commands share."""

import argparse
import os
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def group(commands: Commands, name: str, words: str) -> Commands:
    """Adds a command that only has sub-commands, such as `mixfuse adapter`, and returns its empty list of them."""
    return commands.add_parser(name, help=words, description=words).add_subparsers(required=True, metavar="COMMAND")


def add_url(parser: argparse.ArgumentParser) -> None:
    """Adds `--url`, the address of a running server."""
    parser.add_argument(
        "--url",
        default=os.environ.get("MIXFUSE_URL", "http://127.0.0.1:8080"),
        help="the running server (default $MIXFUSE_URL or http://127.0.0.1:8080)",
    )


def add_database(parser: argparse.ArgumentParser) -> None:
    """Adds `--db`, the database of traces, keys and roles."""
    parser.add_argument(
        "--db",
        default=os.environ.get("MIXFUSE_TRACE_DB", "runs/traces.sqlite3"),
        metavar="PATH_OR_URL",
        help="the gateway's trace_db (default $MIXFUSE_TRACE_DB or runs/traces.sqlite3)",
    )
