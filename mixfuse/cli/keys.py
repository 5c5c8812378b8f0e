"""`mixfuse keys …`: API keys of the gateway."""

import argparse
import sys

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parsers."""
    keys = options.add_group(commands, "keys", "manage the gateway's API keys")
    add = options.add_command(keys, "add", _add, "create a key and print it once")
    add.add_argument("name", metavar="NAME", help="name of the key's owner")
    add.add_argument("--budget", type=float, metavar="DOLLARS", help="most dollars per period")
    add.add_argument("--tokens", type=int, metavar="N", help="most tokens per period")
    add.add_argument(
        "--period",
        choices=("day", "month", "total"),
        default="month",
        help="period of the budget and the tokens (default: month)",
    )
    add.add_argument("--rate", type=int, metavar="N", help="most requests per minute")
    options.add_database(add)
    listing = options.add_command(keys, "list", _list, "show the keys, their limits and their usage")
    options.add_database(listing)
    revoke = options.add_command(keys, "revoke", _revoke, "revoke a key")
    revoke.add_argument("name", metavar="NAME", help="the key's name or id")
    options.add_database(revoke)


def _add(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.database import opened
    from mixfuse.fusion.http.keys import create

    with opened(arguments.db) as database:
        key, secret = create(
            database,
            arguments.name,
            max_cost=arguments.budget,
            max_tokens=arguments.tokens,
            period=arguments.period,
            per_minute=arguments.rate,
        )
    print(f"{key.name} ({key.id}); this key is shown only once:", file=sys.stderr)
    print(secret)


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
