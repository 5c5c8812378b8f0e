"""What mixfuse has to know of a family of mixture-of-experts models, and the sizes of one model of it.

A family is one file in `contracts/families/`. Training, serving and the planners ask it for every name and size that
differs between families; nothing here imports torch or transformers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from mixfuse.contracts.errors import MixfuseError


class Shape(NamedTuple):
    """The sizes of a model, under the symbols of `docs/planning.md`.

    Attributes:
        L: Layers, each with a mixture of experts.
        H: Hidden size.
        I: Intermediate size of an expert.
        E: Experts a layer.
        K: Experts a token passes through.
        A: Query heads.
        G: Key and value heads.
        D: Size of a head.
        V: Vocabulary.
        tied: Whether the output layer is the embedding.
        qk_norm: Whether each layer normalises its queries and keys, head by head, with two weights of size D.
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
    qk_norm: bool


class Unsupported(NamedTuple):
    """A key of `config.json` that describes a variant of the family that mixfuse refuses.

    Attributes:
        key: The key.
        supported: The values that mean the supported form; a missing key means it, too.
        reason: Why other values are refused.
    """

    key: str
    supported: tuple[Any, ...]
    reason: str


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        model_type: What `config.json` calls it, and the name of its module in transformers.
        title: What people call it.
        class_prefix: What the names of its classes in transformers begin with, as in `MixtralForCausalLM`.
        checkpoint_block: The name of a layer's MoE block in saved checkpoints. vLLM names the modules of an adapter the
            same way: `model.layers.N.{checkpoint_block}.experts.E.{gate}`.
        gate: The name of an expert's gate projection in saved checkpoints and in vLLM.
        up: The name of its up projection.
        down: The name of its down projection.
        experts_keys: The keys of `config.json` that may hold the number of experts, the preferred one first.
        inner_key: The key that holds an expert's intermediate size.
        default_top_k: Experts a token passes through where `config.json` does not say.
        qk_norm: Whether queries and keys are normalised.
        tiny: Further keys for the config of a tiny random model (`mixfuse base build --tiny`).
        unsupported: The variants that are refused.
        attention: The attention projections, in PEFT and in vLLM.
        expert_parameters: The 3-D parameters that hold a layer's experts in transformers 5, as PEFT's
            `target_parameters` names them: gate beside up, and down.
    """

    model_type: str
    title: str
    class_prefix: str
    checkpoint_block: str
    gate: str
    up: str
    down: str
    experts_keys: tuple[str, ...]
    inner_key: str
    default_top_k: int
    qk_norm: bool = False
    tiny: Mapping[str, Any] = field(default_factory=dict)
    unsupported: tuple[Unsupported, ...] = ()
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    expert_parameters: tuple[str, ...] = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

    @property
    def expert_projections(self) -> tuple[str, str, str]:
        """The names of an expert's gate, down and up projection in an adapter that vLLM applies."""
        return self.gate, self.down, self.up

    @cached_property
    def adapter_module(self) -> re.Pattern[str]:
        """Matches the end of the name of a module that an adapter may change, with `layer`, `expert`, `projection`."""
        experts = rf"{re.escape(self.checkpoint_block)}\.experts\.(?P<expert>\d+)"
        return re.compile(rf"\.layers\.(?P<layer>\d+)\.(?:self_attn|{experts})\.(?P<projection>\w+)$")

    @cached_property
    def expert_factor(self) -> re.Pattern[str]:
        """Matches the name of one expert's factor, with `layer` (a prefix), `expert`, `projection` and `side`."""
        block, projections = re.escape(self.checkpoint_block), "|".join(map(re.escape, self.expert_projections))
        return re.compile(
            rf"^(?P<layer>.*\.layers\.\d+)\.{block}\.experts\.(?P<expert>\d+)\.(?P<projection>{projections})"
            r"\.lora_(?P<side>[AB])\.weight$"
        )

    def factor_name(self, layer: str, expert: int, projection: str, side: str) -> str:
        """The name of one expert's factor; `layer` is everything up to and with the layer's number."""
        return f"{layer}.{self.checkpoint_block}.experts.{expert}.{projection}.lora_{side}.weight"

    def checkpoint_pieces(self, name: str, experts: int) -> list[tuple[int, int | None, str]] | None:
        """Where a checkpoint keeps the pieces of a fused expert parameter of transformers 5.

        Args:
            name: The parameter's name in transformers, e.g. `model.layers.0.mlp.experts.gate_up_proj`.
            experts: Experts a layer.

        Returns:
            (expert, half, name of the stored tensor): half 0 is gate, half 1 is up, None is the whole matrix. None
            where the parameter is not a fused expert parameter.
        """
        stem, _, parameter = self.checkpoint_name(name).rpartition(".")
        if not stem.endswith(".experts"):
            return None
        if parameter == "gate_up_proj":
            return [
                (expert, half, f"{stem}.{expert}.{projection}.weight")
                for half, projection in enumerate((self.gate, self.up))
                for expert in range(experts)
            ]
        if parameter == "down_proj":
            return [(expert, None, f"{stem}.{expert}.{self.down}.weight") for expert in range(experts)]
        return None

    def checkpoint_name(self, name: str) -> str:
        """The name under which a checkpoint keeps a parameter of transformers 5 that is stored whole."""
        return name.replace(".mlp.", f".{self.checkpoint_block}.")

    def shape(self, config: Mapping[str, Any]) -> Shape:
        """Reads the sizes in a `config.json` of this family.

        Raises:
            MixfuseError: A size is missing, or the model is a variant that is not supported.
        """
        for key, supported, reason in self.unsupported:
            if key in config and config[key] not in supported:
                raise MixfuseError(f"config.json: {key} is {config[key]!r}, which mixfuse does not support: {reason}")
        experts_key = next((key for key in self.experts_keys if key in config), self.experts_keys[0])
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            return Shape(
                L=int(config["num_hidden_layers"]),
                H=hidden,
                I=int(config[self.inner_key]),
                E=int(config[experts_key]),
                K=int(config.get("num_experts_per_tok", self.default_top_k)),
                A=heads,
                G=int(config["num_key_value_heads"]),
                D=int(config.get("head_dim") or hidden // heads),
                V=int(config["vocab_size"]),
                tied=bool(config.get("tie_word_embeddings", False)),
                qk_norm=self.qk_norm,
            )
        except KeyError as error:
            raise MixfuseError(f"config.json names no {error.args[0]!r}") from None


def norm_parameters(shape: Shape) -> int:
    """Weights of a layer's norms: 2H, and 2D more where queries and keys are normalised."""
    return 2 * shape.H + (2 * shape.D if shape.qk_norm else 0)


def base_parameters(shape: Shape) -> int:
    """P = L·(2H·(A+G)·D + 3·E·H·I + E·H + norms) + (1 or 2)·V·H + H."""
    L, H, I, E, _, A, G, D, V, tied, _ = shape  # noqa: N806, E741
    layer = 2 * H * (A + G) * D + 3 * E * H * I + E * H + norm_parameters(shape)
    return L * layer + (1 if tied else 2) * V * H + H


def active_parameters(shape: Shape) -> int:
    """Of P, what one token passes through: K of E experts."""
    return base_parameters(shape) - shape.L * 3 * (shape.E - shape.K) * shape.H * shape.I
