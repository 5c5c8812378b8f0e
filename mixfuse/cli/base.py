"""`mixfuse base …`: the small base model that comes with mixfuse."""

import argparse

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parsers."""
    base = options.add_group(commands, "base", "make the small base model that comes with mixfuse")
    build = options.add_command(
        base, "build", _build, "turn SmolLM2-135M into a Mixtral", "Each MLP is copied into every expert of its layer."
    )
    build.add_argument("out", type=options.out_folder, metavar="OUT", help="the folder to create")
    build.add_argument("--experts", type=options.whole(1), default=4, help="experts per layer (default: 4)")
    build.add_argument("--tiny", action="store_true", help="make a random two-layer model for fast tests instead")
    build.add_argument("--family", default="mixtral", metavar="TYPE", help="its model_type (default: mixtral)")
    build.add_argument("--seed", type=options.whole(0), default=0, help="seed of the random weights (default: 0)")


def _build(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.families import family_named
    from mixfuse.train.model.embedded_base import build

    facts = build(
        arguments.out, experts=arguments.experts, tiny=arguments.tiny, family=arguments.family, seed=arguments.seed
    )
    difference = facts.get("max_logit_difference")
    equality = f"; logits equal the dense model's to {difference:.1e}" if difference is not None else ""
    size = f"{facts['parameters'] / 1e6:.0f} M parameters"
    print(f"{arguments.out}: {family_named(arguments.family).title} with {arguments.experts} experts, {size}{equality}")
