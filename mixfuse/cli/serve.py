"""`mixfuse serve`: the server."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser of `mixfuse serve`."""
    serve = commands.add_parser("serve", help="vLLM with the adapters of each role, and the gateway in front")
    serve.add_argument("config", type=Path, metavar="CONFIG")
    serve.add_argument("overrides", nargs="*", metavar="key=value")
    serve.add_argument(
        "--dry-run", action="store_true", help="print vLLM's command and its memory plan; 1: does not fit"
    )
    serve.add_argument("--nodes", type=int, default=1, metavar="N", help="for the plan: hosts (default 1)")
    serve.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="G", help="for the plan: GPUs a host (default 8)"
    )
    serve.add_argument("--gpu-memory", default="80GiB", metavar="SIZE", help="for the plan: of one GPU (default 80GiB)")
    serve.add_argument(
        "--model", type=Path, metavar="DIR", help="for the plan: config.json, where the base is not here"
    )
    serve.add_argument(
        "--device", choices=("cuda", "cpu"), help="for the plan (default: what the installed vLLM is for)"
    )
    serve.set_defaults(command=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        from mixfuse.app.planning import dry_run

        return dry_run(arguments)
    from mixfuse.app.server import run

    run(arguments.config, arguments.overrides)
    return 0
