"""`mixfuse plan`: memory and time of a recipe or a serve config."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser of `mixfuse plan`."""
    plan = commands.add_parser("plan", help="what a recipe or a serve config takes, before anything is paid for")
    plan.add_argument("recipe", type=Path, metavar="RECIPE", help="of training, or a serve config")
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.add_argument("--nodes", type=int, default=1, metavar="N", help="hosts (default 1)")
    plan.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="GPUs a host (default 8)")
    plan.add_argument("--gpu-memory", default="80GiB", metavar="SIZE", help="of one GPU (default 80GiB)")
    plan.add_argument("--host-memory", metavar="SIZE", help="of one host (default: not checked)")
    plan.add_argument("--reserve", default="4GiB", metavar="SIZE", help="kept free on a GPU (default 4GiB)")
    plan.add_argument("--model", type=Path, metavar="DIR", help="config.json of the base, where the base is not here")
    plan.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: G processes a host, no GPU")
    plan.add_argument("--tflops", type=float, default=989, help="a GPU's peak, for time (default 989: H100, bfloat16)")
    plan.add_argument("--utilisation", type=float, default=0.3, help="of the peak, assumed (default 0.3)")
    plan.add_argument("--bandwidth", type=float, metavar="GB/s", help="a GPU receives (default 450, several nodes 50)")
    plan.add_argument("--concurrency", type=int, help="requests at once, for serving (default: the config's)")
    plan.add_argument("--header", action="store_true", help="only the line for a recipe's header")
    plan.add_argument("--json", action="store_true", help="one JSON object on the last line")
    plan.set_defaults(command=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    from mixfuse.app.planning import run

    run(arguments)
