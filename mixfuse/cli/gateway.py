"""`mixfuse gateway`: the gateway by itself."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser of `mixfuse gateway`."""
    gateway = commands.add_parser("gateway", help="the gateway by itself, for a pool that is served elsewhere")
    gateway.add_argument("config", type=Path, metavar="CONFIG", help="a fusion config")
    gateway.add_argument("overrides", nargs="*", metavar="key=value")
    gateway.add_argument("--host", default="127.0.0.1")
    gateway.add_argument("--port", type=int, default=8080, help="0 takes any free one (default 8080)")
    gateway.add_argument(
        "--drain-s", type=int, default=10, help="seconds that requests under way may take after SIGTERM (default 10)"
    )
    gateway.set_defaults(command=_gateway)


def _gateway(arguments: argparse.Namespace) -> None:
    from mixfuse.app.server import GatewayConfig, run_gateway
    from mixfuse.contracts.strict_yaml import validate

    address = validate(
        {"host": arguments.host, "port": arguments.port, "drain_s": arguments.drain_s},
        GatewayConfig,
        source="mixfuse gateway",
    )
    run_gateway(arguments.config, arguments.overrides, address)
