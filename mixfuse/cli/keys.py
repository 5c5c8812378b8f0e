"""`mixfuse keys …`: API keys of the gateway."""

import argparse
import sys
from datetime import date
from pathlib import Path

from mixfuse.cli import options
from mixfuse.contracts.errors import MixfuseError


def register(commands: options.Commands) -> None:
    """Adds the parsers."""
    keys = options.add_group(commands, "keys", "manage the gateway's API keys")
    add = options.add_command(keys, "add", _add, "create a key and print it once")
    add.add_argument("name", metavar="NAME", help="name of the key's owner")
    add.add_argument(
        "--budget",
        type=options.real(),
        metavar="DOLLARS",
        help="most dollars per period, by the models' `price` in the config",
    )
    add.add_argument(
        "--config", type=Path, metavar="CONFIG", help="with --budget: refuse it if this fusion config names no price"
    )
    add.add_argument("--tokens", type=options.whole(), metavar="N", help="most tokens per period")
    add.add_argument(
        "--period",
        choices=("day", "month", "total"),
        default="month",
        help="period of the budget and the tokens (default: month)",
    )
    add.add_argument("--rate", type=options.whole(), metavar="N", help="most requests per minute")
    add.add_argument(
        "--until", type=_day, metavar="DAY", help="last day of the key, in UTC (2027-06-30; default: none)"
    )
    options.add_database(add)
    listing = options.add_command(keys, "list", _list, "show the keys, their limits and their usage")
    options.add_database(listing)
    revoke = options.add_command(keys, "revoke", _revoke, "revoke a key")
    revoke.add_argument("name", metavar="NAME", help="the key's name or id")
    options.add_database(revoke)


def _add(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.database import opened
    from mixfuse.contracts.strict_yaml import load
    from mixfuse.fusion.config import FusionConfig
    from mixfuse.fusion.http.keys import create, unpriced_text

    if arguments.config is not None:
        if arguments.budget is None:
            raise MixfuseError("--config is read for --budget only; leave it out")
        config = load(arguments.config, FusionConfig)
        if config.unpriced and config.priced:
            free = unpriced_text(config.unpriced)
            print(f"note: {free} in {arguments.config}; what has no price is free to the budget", file=sys.stderr)
        if not config.priced:
            raise MixfuseError(
                f"--budget {arguments.budget:g} would limit nothing: no model in {arguments.config} has a `price`; "
                "name the prices, or limit tokens with --tokens"
            )
    with opened(arguments.db) as database:
        key, secret = create(
            database,
            arguments.name,
            max_cost=arguments.budget,
            max_tokens=arguments.tokens,
            period=arguments.period,
            per_minute=arguments.rate,
            last_day=arguments.until,
        )
    print(f"{key.name} ({key.id}); this key is shown only once:", file=sys.stderr)
    print(secret)


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no day; write it as 2027-06-30") from None


def _list(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.database import opened
    from mixfuse.fusion.http.keys import show

    with opened(arguments.db, create=False) as database:
        show(database)


def _revoke(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.database import opened
    from mixfuse.fusion.http.keys import revoke

    with opened(arguments.db, create=False) as database:
        key = revoke(database, arguments.name)
    print(f"{key.name} ({key.id}) is revoked")
