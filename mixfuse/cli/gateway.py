"""`mixfuse gateway`: the fusion gateway without an engine."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser."""
    gateway = options.add_command(
        commands, "gateway", _gateway, "run the fusion gateway alone, over models that are served elsewhere"
    )
    gateway.add_argument("config", type=Path, metavar="CONFIG", help="a fusion config (YAML)")
    options.add_overrides(gateway, "the config")
    gateway.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    gateway.add_argument(
        "--port",
        type=options.whole(0, 65535),
        default=8080,
        help="port to listen on; 0 picks a free one (default: 8080)",
    )
    gateway.add_argument(
        "--drain-s",
        type=options.whole(0),
        default=10,
        help="seconds that open requests get after SIGTERM (default: 10)",
    )
    gateway.add_argument(
        "--workers",
        type=options.whole(1, 64),
        default=1,
        help="worker processes, which share keys, budgets, rates and circuit breakers (default: 1)",
    )


def _gateway(arguments: argparse.Namespace) -> None:
    from mixfuse.app.server import GatewayConfig, run_gateway
    from mixfuse.contracts.strict_yaml import validate

    address = validate(
        {"host": arguments.host, "port": arguments.port, "drain_s": arguments.drain_s},
        GatewayConfig,
        source="mixfuse gateway",
    )
    run_gateway(arguments.config, arguments.overrides, address, arguments.workers)
