"""`mixfuse roles …`: which adapter serves each role of a running server."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parsers."""
    roles = options.add_group(commands, "roles", "show and change which adapter serves each role")
    listing = options.add_command(roles, "list", _list, "show the adapter revision that serves each role")
    swap = options.add_command(
        roles,
        "swap",
        _swap,
        "serve a role with another adapter, without a restart",
        "With --shadow or --canary the new adapter must first pass a gate on live requests.",
    )
    swap.add_argument("role", metavar="ROLE", help="the role, for example judge")
    swap.add_argument("dir", type=Path, metavar="DIR", help="the adapter directory")
    swap.add_argument(
        "--shadow", type=options.whole(), metavar="N", help="first repeat N live requests with the new adapter"
    )
    swap.add_argument("--canary", metavar="SHARE", help="then send it this share of the requests (for example 10%%)")
    swap.add_argument("--for", dest="for_", metavar="TIME", help="length of the canary phase (90s, 10m, 2h)")
    swap.add_argument("--requests", type=options.whole(), metavar="N", help="end the canary phase after N requests")
    swap.add_argument(
        "--timeout", default="10m", metavar="TIME", help="longest wait for enough requests (default: 10m)"
    )
    swap.add_argument(
        "--limit", action="append", default=[], metavar="NAME=VALUE", help="replace `gate.NAME` of the serve config"
    )
    rollback = options.add_command(
        roles,
        "rollback",
        _rollback,
        "return a role to its previous adapter",
        "Each further rollback goes one adapter further back.",
    )
    rollback.add_argument("role", metavar="ROLE", help="the role, for example judge")
    rollback.add_argument(
        "--db",
        type=options.database,
        metavar="PATH_OR_URL",
        help="change the role table in this trace_db directly, without a server",
    )
    history = options.add_command(roles, "history", _history, "show the changes of a role, newest first")
    history.add_argument("role", metavar="ROLE", help="the role, for example judge")
    history.add_argument(
        "--limit", type=options.whole(), default=20, metavar="N", help="show the newest N (default: 20)"
    )
    pin = options.add_command(roles, "pin", _pin, "keep the adapter of a role loaded in the engine")
    pin.add_argument("role", metavar="ROLE", help="the role, for example judge")
    pin.set_defaults(pinned=True)
    unpin = options.add_command(roles, "unpin", _pin, "let the engine unload the adapter of a role to make room")
    unpin.add_argument("role", metavar="ROLE", help="the role, for example judge")
    unpin.set_defaults(pinned=False)
    for parser in (listing, swap, rollback, history, pin, unpin):
        options.add_json(parser)
        options.add_url(parser)


def _list(arguments: argparse.Namespace) -> None:
    from mixfuse.app.roles_commands import list_roles

    list_roles(arguments.url, as_json=arguments.json)


def _swap(arguments: argparse.Namespace) -> None:
    from mixfuse.app.roles_commands import seconds, share, swap_role, swap_through_gate
    from mixfuse.contracts.strict_yaml import override

    gate = {
        "shadow": arguments.shadow,
        "canary": share(arguments.canary) if arguments.canary else None,
        "for_s": seconds(arguments.for_) if arguments.for_ else None,
        "requests": arguments.requests,
        "limits": override({}, arguments.limit),
    }
    if not any(gate.values()):
        swap_role(arguments.url, arguments.role, arguments.dir, as_json=arguments.json)
        return
    gate |= {"timeout_s": seconds(arguments.timeout)}
    swap_through_gate(arguments.url, arguments.role, arguments.dir, gate, as_json=arguments.json)


def _rollback(arguments: argparse.Namespace) -> None:
    from mixfuse.app.roles_commands import roll_role_back, roll_stored_role_back

    if arguments.db is not None:
        roll_stored_role_back(arguments.db, arguments.role, as_json=arguments.json)
    else:
        roll_role_back(arguments.url, arguments.role, as_json=arguments.json)


def _history(arguments: argparse.Namespace) -> None:
    from mixfuse.app.roles_commands import show_history

    show_history(arguments.url, arguments.role, limit=arguments.limit, as_json=arguments.json)


def _pin(arguments: argparse.Namespace) -> None:
    from mixfuse.app.roles_commands import pin_role

    pin_role(arguments.url, arguments.role, arguments.pinned, as_json=arguments.json)
