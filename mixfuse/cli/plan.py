"""`mixfuse plan`: memory and time of a recipe or a serve config."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser."""
    plan = options.add_command(
        commands,
        "plan",
        _plan,
        "compute the memory and time that a recipe or a serve config needs",
        "Needs neither a GPU nor the weights.",
    )
    plan.add_argument("recipe", type=Path, metavar="RECIPE", help="a training recipe or a serve config (YAML)")
    options.add_overrides(plan, "the file")
    options.add_hardware(plan)
    plan.add_argument("--host-memory", metavar="SIZE", help="memory of one host (default: not checked)")
    plan.add_argument("--reserve", default="4GiB", metavar="SIZE", help="keep free on each GPU (default: 4GiB)")
    plan.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: plan for G processes per host without GPUs"
    )
    plan.add_argument(
        "--tflops", type=float, default=989, help="peak of one GPU, for the time (default: 989, an H100 in bfloat16)"
    )
    plan.add_argument(
        "--utilisation", type=float, default=0.3, help="share of the peak that training reaches (default: 0.3)"
    )
    plan.add_argument(
        "--bandwidth",
        type=float,
        metavar="GB/s",
        help="what one GPU receives per second (default: 450; 50 with several nodes)",
    )
    plan.add_argument("--concurrency", type=int, help="for serving: requests at once (default: from the config)")
    plan.add_argument("--header", action="store_true", help="print only the memory line for the recipe's header")
    options.add_json(plan, "the plan")


def _plan(arguments: argparse.Namespace) -> None:
    from mixfuse.app.planning import print_plan

    print_plan(arguments)
