"""`mixfuse ask`: one fused answer."""

import argparse

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser of `mixfuse ask`."""
    ask = commands.add_parser("ask", help="one fused answer, with who said what and why it won")
    ask.add_argument("prompt", metavar="PROMPT")
    ask.add_argument("--mode", choices=("best_of", "merge", "debate"), default="best_of")
    ask.add_argument("--max-tokens", type=int)
    ask.add_argument("--temperature", type=float)
    options.add_url(ask)
    ask.set_defaults(command=_ask)


def _ask(arguments: argparse.Namespace) -> None:
    from mixfuse.fusion.http.ask import run

    run(
        arguments.prompt,
        mode=arguments.mode,
        url=arguments.url,
        temperature=arguments.temperature,
        max_tokens=arguments.max_tokens,
    )
