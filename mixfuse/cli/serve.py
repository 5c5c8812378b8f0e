"""`mixfuse serve`: the engine with its adapters, and the gateway."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser."""
    serve = options.add_command(
        commands,
        "serve",
        _serve,
        "serve the base and one adapter per role with vLLM, behind the fusion gateway",
    )
    serve.add_argument("config", type=Path, metavar="CONFIG", help="a serve config (YAML)")
    options.add_overrides(serve, "the config")
    serve.add_argument(
        "--dry-run",
        action="store_true",
        help="print vLLM's command and its memory plan; exit with 1 if it does not fit",
    )
    options.add_hardware(serve)
    serve.add_argument(
        "--device", choices=("cuda", "cpu"), help="plan: the device (default: that of the installed vLLM)"
    )


def _serve(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        from mixfuse.app.planning import dry_run

        return dry_run(arguments)
    from mixfuse.app.server import run

    run(arguments.config, arguments.overrides)
    return 0
