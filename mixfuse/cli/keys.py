"""`mixfuse keys …`: API keys of the gateway."""

import argparse
import sys

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser of `mixfuse keys`."""
    keys = options.group(commands, "keys", "the gateway's API keys")
    keys_add = keys.add_parser("add", help="make a key; it is shown this once")
    keys_add.add_argument("name", metavar="NAME", help="whose it is")
    keys_add.add_argument("--budget", type=float, metavar="DOLLARS", help="the most it may spend in a period")
    keys_add.add_argument("--tokens", type=int, metavar="N", help="the most tokens it may use in a period")
    keys_add.add_argument("--period", choices=("day", "month", "total"), default="month")
    keys_add.add_argument("--rate", type=int, metavar="N", help="requests a minute")
    options.add_database(keys_add)
    keys_add.set_defaults(command=_keys_add)
    keys_list = keys.add_parser("list", help="keys, their limits and what they used")
    options.add_database(keys_list)
    keys_list.set_defaults(command=_keys_list)
    keys_revoke = keys.add_parser("revoke", help="end a key")
    keys_revoke.add_argument("name", metavar="NAME", help="its name or id")
    options.add_database(keys_revoke)
    keys_revoke.set_defaults(command=_keys_revoke)


def _keys_add(arguments: argparse.Namespace) -> None:
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
    print(f"{key.name} ({key.id}); the key is shown this once:", file=sys.stderr)
    print(secret)


def _keys_list(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.database import opened
    from mixfuse.fusion.http.keys import show

    with opened(arguments.db, create=False) as database:
        show(database)


def _keys_revoke(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.database import opened
    from mixfuse.fusion.http.keys import revoke

    with opened(arguments.db, create=False) as database:
        key = revoke(database, arguments.name)
    print(f"{key.name} ({key.id}) is revoked")
