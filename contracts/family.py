"""A Mixtral's sizes, as its `config.json` names them: what both rooms' planners compute with."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mixfuse.contracts.errors import MixfuseError


class Shape(NamedTuple):
    """Sizes, under the symbols of `docs/planning.md`.

    Attributes:
        L: Layers.
        H: Hidden size.
        I: Intermediate size of an expert.
        E: Experts a layer.
        K: Experts a token passes through.
        A: Query heads.
        G: Key and value heads.
        D: Size of a head.
        V: Vocabulary.
        tied: Whether the output layer is the embedding.
    """

    L: int
    H: int
    I: int  # noqa: E741 - the symbol in docs/planning.md
    E: int
    K: int
    A: int
    G: int
    D: int
    V: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """Reads a `config.json`.

        Raises:
            MixfuseError: It is no Mixtral's, or a size is missing.
        """
        if config.get("model_type") != "mixtral":
            raise MixfuseError(f"a {config.get('model_type')!r} model; mixfuse plans for Mixtral")
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            return cls(
                L=int(config["num_hidden_layers"]),
                H=hidden,
                I=int(config["intermediate_size"]),
                E=int(config["num_local_experts"]),
                K=int(config.get("num_experts_per_tok", 2)),
                A=heads,
                G=int(config["num_key_value_heads"]),
                D=int(config.get("head_dim") or hidden // heads),
                V=int(config["vocab_size"]),
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except KeyError as error:
            raise MixfuseError(f"config.json names no {error.args[0]!r}") from None


def base_parameters(shape: Shape) -> int:
    """P = L·(2H·(A+G)·D + 3·E·H·I + E·H + 2H) + (1 or 2)·V·H + H."""
    L, H, I, E, _, A, G, D, V, tied = shape  # noqa: N806, E741
    return L * (2 * H * (A + G) * D + 3 * E * H * I + E * H + 2 * H) + (1 if tied else 2) * V * H + H


def active_parameters(shape: Shape) -> int:
    """Of P, what one token passes through: K of E experts."""
    return base_parameters(shape) - shape.L * 3 * (shape.E - shape.K) * shape.H * shape.I
