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
        "Needs neither a GPU nor the weights. Exits with 1 if it does not fit.",
    )
    plan.add_argument("recipe", type=Path, metavar="RECIPE", help="a training recipe or a serve config (YAML)")
    options.add_overrides(plan, "the file")
    options.add_hardware(plan)
    plan.add_argument(
        "--host-memory", metavar="SIZE", help="memory of one host, for training and on a CPU (default: not checked)"
    )
    plan.add_argument("--reserve", metavar="SIZE", help="for training: keep free on each GPU (default: 4GiB)")
    plan.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: plan for G processes per host without GPUs"
    )
    plan.add_argument(
        "--tflops",
        type=options.real(),
        help="for training: peak of one GPU, for the time (default: 989, an H100 in bfloat16)",
    )
    plan.add_argument(
        "--utilisation",
        type=options.real(most=1),
        help="for training: share of the peak that it reaches (default: 0.3)",
    )
    plan.add_argument(
        "--bandwidth",
        type=options.real(),
        metavar="GB/s",
        help="for training: what one GPU receives per second (default: 450; 50 with several nodes)",
    )
    plan.add_argument(
        "--memory-bandwidth",
        type=options.real(),
        metavar="GB/s",
        help="for training with quantization: what one GPU reads and writes of its memory per second (default: 2000)",
    )
    plan.add_argument("--concurrency", type=options.whole(), help="for serving: requests at once (default: 1)")
    plan.add_argument("--header", action="store_true", help="print only the memory line for the recipe's header")
    options.add_json(plan, "the plan")


def _plan(arguments: argparse.Namespace) -> int:
    from mixfuse.app.planning import print_plan

    return print_plan(arguments)
