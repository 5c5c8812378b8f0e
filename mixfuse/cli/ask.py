"""`mixfuse ask`: one fused answer."""

import argparse
import os

from mixfuse.cli import options
from mixfuse.contracts.mode_names import FUSED_MODES, descriptions


def register(commands: options.Commands) -> None:
    """Adds the parser."""
    ask = options.add_command(
        commands, "ask", _ask, "ask a running server one question; shows every candidate and why one won"
    )
    ask.add_argument("prompt", metavar="PROMPT", help="the question")
    ask.add_argument(
        "--mode",
        choices=FUSED_MODES,
        default="best_of",
        help="; ".join(text.rstrip(".").replace("%", "%%") for text in descriptions().values()),
    )
    ask.add_argument(
        "--max-tokens", type=options.whole(), help="most tokens of the answer (default: each member's own)"
    )
    ask.add_argument(
        "--temperature", type=options.real(least=0), help="sampling temperature (default: each member's own)"
    )
    options.add_url(ask)


def _ask(arguments: argparse.Namespace) -> None:
    from mixfuse.fusion.http.ask_client import ask
    from mixfuse.fusion.http.keys import API_KEY

    ask(
        arguments.prompt,
        mode=arguments.mode,
        url=arguments.url,
        api_key=os.environ.get(API_KEY),
        temperature=arguments.temperature,
        max_tokens=arguments.max_tokens,
    )
