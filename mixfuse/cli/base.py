"""`mixfuse base …`: the embedded base model."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser of `mixfuse base`."""
    base = options.group(commands, "base", "the embedded base model")
    build = base.add_parser("build", help="SmolLM2-135M upcycled into a Mixtral")
    build.add_argument("out", type=Path, metavar="OUT")
    build.add_argument("--experts", type=int, default=4, help="experts a layer (default 4)")
    build.add_argument("--tiny", action="store_true", help="a random two-layer Mixtral, for fast tests")
    build.add_argument("--seed", type=int, default=0)
    build.set_defaults(command=_base_build)


def _base_build(arguments: argparse.Namespace) -> None:
    from mixfuse.train.model.embedded_base import build

    facts = build(arguments.out, experts=arguments.experts, tiny=arguments.tiny, seed=arguments.seed)
    equal = facts.get("max_logit_difference")
    words = f"; logits equal the dense model's to {equal:.1e}" if equal is not None else ""
    size = f"{facts['parameters'] / 1e6:.0f} M parameters"
    print(f"{arguments.out}: Mixtral with {arguments.experts} experts, {size}{words}")
