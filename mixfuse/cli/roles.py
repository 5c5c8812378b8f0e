"""`mixfuse roles …`: the roles of a running server."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser of `mixfuse roles`."""
    roles = options.group(commands, "roles", "the roles of a running server")
    roles_list = roles.add_parser("list", help="which adapter revision serves each role")
    roles_list.set_defaults(command=_roles_list)
    swap = roles.add_parser("swap", help="serve a role by another adapter, without restart")
    swap.add_argument("role", metavar="ROLE")
    swap.add_argument("dir", type=Path, metavar="DIR")
    swap.add_argument("--shadow", type=int, metavar="N", help="first, N live requests are done again by the new one")
    swap.add_argument("--canary", metavar="SHARE", help="then it is given this share of the requests (10%%)")
    swap.add_argument("--for", dest="for_", metavar="TIME", help="how long it is a canary (90s, 10m, 2h)")
    swap.add_argument("--requests", type=int, metavar="N", help="or until N requests have met it")
    swap.add_argument("--timeout", default="10m", metavar="TIME", help="to wait for those requests (default 10m)")
    swap.add_argument(
        "--limit", action="append", default=[], metavar="NAME=VALUE", help="instead of the serve config's `gate.NAME`"
    )
    swap.set_defaults(command=_roles_swap)
    rollback = roles.add_parser("rollback", help="serve a role by what served it before; again and again goes on back")
    rollback.add_argument("role", metavar="ROLE")
    rollback.add_argument(
        "--db", metavar="PATH_OR_URL", help="change the role table in this trace_db, without a server"
    )
    rollback.set_defaults(command=_roles_rollback)
    roles_history = roles.add_parser("history", help="what happened to a role, newest first")
    roles_history.add_argument("role", metavar="ROLE")
    roles_history.add_argument("--limit", type=int, default=20, metavar="N", help="the newest N (default 20)")
    roles_history.set_defaults(command=_roles_history)
    pin = roles.add_parser("pin", help="a role's adapter stays loaded, whatever needs a place in the engine")
    pin.add_argument("role", metavar="ROLE")
    pin.set_defaults(command=_roles_pin, pinned=True)
    unpin = roles.add_parser("unpin", help="a role's adapter may make room for another")
    unpin.add_argument("role", metavar="ROLE")
    unpin.set_defaults(command=_roles_pin, pinned=False)
    for of_roles in (roles_list, swap, rollback, roles_history, pin, unpin):
        of_roles.add_argument("--json", action="store_true", help="JSON instead of words")
        options.add_url(of_roles)


def _roles_list(arguments: argparse.Namespace) -> None:
    from mixfuse.app.roles_admin import list_roles

    list_roles(arguments.url, as_json=arguments.json)


def _roles_swap(arguments: argparse.Namespace) -> None:
    from mixfuse.app.roles_admin import seconds, share, swap_role, swap_through_gate
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


def _roles_rollback(arguments: argparse.Namespace) -> None:
    from mixfuse.app.roles_admin import roll_role_back, roll_stored_role_back

    if arguments.db is not None:
        roll_stored_role_back(arguments.db, arguments.role, as_json=arguments.json)
    else:
        roll_role_back(arguments.url, arguments.role, as_json=arguments.json)


def _roles_history(arguments: argparse.Namespace) -> None:
    from mixfuse.app.roles_admin import show_history

    show_history(arguments.url, arguments.role, limit=arguments.limit, as_json=arguments.json)


def _roles_pin(arguments: argparse.Namespace) -> None:
    from mixfuse.app.roles_admin import pin_role

    pin_role(arguments.url, arguments.role, arguments.pinned, as_json=arguments.json)
