"""`mixfuse combiner …`: weighs a pool's answers by what members got right before."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parsers."""
    combiner = options.add_group(commands, "combiner", "weigh a pool's answers by what its members got right before")
    fit = options.add_command(
        combiner,
        "fit",
        _fit,
        "fit a combiner to marked answers",
        "Prints figures from cross-validation: the best member, the majority, the combiner, and accuracy over cost.",
    )
    add_pool(fit)
    fit.add_argument("--out", type=Path, required=True, metavar="FILE", help="write the combiner here (JSON)")
    fit.add_argument("--seed", type=int, default=0, help="seed of the cross-validation (default: 0)")
    options.add_json(fit, "the figures")
    report = options.add_command(
        combiner,
        "report",
        _report,
        "say whether a pool is worth fusing",
        "Prints the same figures as fit and writes no combiner.",
    )
    add_pool(report)
    report.add_argument("--seed", type=int, default=0, help="seed of the cross-validation (default: 0)")
    options.add_json(report, "the figures")


def add_pool(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name recorded answers."""
    parser.add_argument("data", type=Path, nargs="+", metavar="FILE", help="answers with marks, one question a line")
    parser.add_argument(
        "--agreement",
        choices=("exact", "number", "json", "choice"),
        help="what makes two answers equal (default: as the rows suggest)",
    )
    parser.add_argument("--members", nargs="+", metavar="NAME", help="use only these members (default: all)")
    add_prices(parser)


def add_prices(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name prices."""
    parser.add_argument(
        "--price",
        action="append",
        default=[],
        metavar="NAME=DOLLARS",
        help="price of one answer of a member; repeatable (default: 1 for every member)",
    )
    parser.add_argument("--prices", type=Path, metavar="FILE", help="prices in a YAML or JSON file: NAME: DOLLARS")


def _fit(arguments: argparse.Namespace) -> None:
    _run(arguments, arguments.out)


def _report(arguments: argparse.Namespace) -> None:
    _run(arguments, None)


def _run(arguments: argparse.Namespace, out: Path | None) -> None:
    from mixfuse.app.combine import PoolSource, fit, print_figures, print_json, read_prices

    prices = read_prices(arguments.price, arguments.prices)
    source = PoolSource(arguments.data, arguments.agreement, prices, arguments.members)
    figures = fit(source, out, seed=arguments.seed)
    print_figures(figures)
    if out is not None:
        print(f"{out}: combiner {figures['revision']}")
    if arguments.json:
        print_json(figures)
