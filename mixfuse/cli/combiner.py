"""`mixfuse combiner …`: weighs a pool's answers by what members got right before."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mixfuse.cli import options
from mixfuse.contracts.errors import MixfuseError

if TYPE_CHECKING:
    from mixfuse.app.combine import PoolSource


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
    fit.add_argument(
        "--out", type=options.out_file, required=True, metavar="FILE", help="write the combiner here (JSON)"
    )
    fit.add_argument("--seed", type=options.whole(0), default=0, help="seed of the cross-validation (default: 0)")
    options.add_json(fit, "the figures")
    report = options.add_command(
        combiner,
        "report",
        _report,
        "say whether a pool is worth fusing",
        "Prints what fit prints, and which members earn their place. It writes no combiner.",
    )
    add_pool(report)
    report.add_argument("--out", type=options.out_folder, metavar="DIR", help="write a report with plots here")
    report.add_argument("--seed", type=options.whole(0), default=0, help="seed of the cross-validation (default: 0)")
    options.add_json(report, "the figures")

    swap = options.add_command(combiner, "swap", _swap, "put a combiner in the place of the one that a gateway serves")
    swap.add_argument("new", type=Path, metavar="NEW", help="the combiner (JSON)")
    swap.add_argument(
        "file", type=options.out_file, metavar="FILE", help="the gateway's `combiner`; it is read again at once"
    )
    back = options.add_command(combiner, "rollback", _rollback, "put the combiner that was swapped out last back")
    back.add_argument("file", type=Path, metavar="FILE", help="the gateway's `combiner`")
    past = options.add_command(combiner, "history", _history, "list the combiners that were swapped out, oldest first")
    past.add_argument("file", type=Path, metavar="FILE", help="the gateway's `combiner`")


def add_pool(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name recorded answers."""
    parser.add_argument(
        "data",
        type=Path,
        nargs="+",
        metavar="DATA",
        help="answers with marks, one question a line: JSONL files, packed by gzip or not, or folders of them",
    )
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
    from mixfuse.app.combine import fit, print_figures, print_json

    figures = fit(_source(arguments), arguments.out, seed=arguments.seed)
    print_figures(figures)
    print(f"{arguments.out}: combiner {figures['revision']}")
    if arguments.json:
        print_json(figures)


def _report(arguments: argparse.Namespace) -> None:
    from mixfuse.app.combine import print_figures, print_json, report

    figures = report(_source(arguments), arguments.out, seed=arguments.seed)
    print_figures(figures)
    if arguments.json:
        print_json(figures)


def _swap(arguments: argparse.Namespace) -> None:
    from mixfuse.app.combiner_file import swap

    changed = swap(arguments.new, arguments.file)
    print(f"{arguments.file}: {changed.old or 'nothing'} -> {changed.new}")


def _rollback(arguments: argparse.Namespace) -> None:
    from mixfuse.app.combiner_file import rollback

    changed = rollback(arguments.file)
    print(f"{arguments.file}: {changed.old or 'nothing'} -> {changed.new}")


def _history(arguments: argparse.Namespace) -> None:
    from mixfuse.app.combiner_file import history

    found = history(arguments.file)
    if not found and not arguments.file.exists():
        raise MixfuseError(f"{arguments.file}: no such file, and no combiner was swapped out of it")
    for path in found:
        print(path)


def _source(arguments: argparse.Namespace) -> "PoolSource":
    from mixfuse.app.combine import PoolSource, read_prices

    prices = read_prices(arguments.price, arguments.prices)
    return PoolSource(arguments.data, arguments.agreement, prices, arguments.members, price_file=arguments.prices)
