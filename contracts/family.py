"""A family of mixture-of-experts models, and the sizes of one of its models.

Each family is one file in `contracts/families/`. It holds every name and size that differs between families, for
training, serving and the planners. Nothing here imports torch or transformers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from mixfuse.contracts.errors import MixfuseError


class Shape(NamedTuple):
    """The sizes of a model, named by the symbols of `docs/planning.md`.

    Attributes:
        L: Layers; each has a mixture of experts.
        H: Hidden size.
        I: Intermediate size of an expert.
        E: Experts per layer.
        K: Experts per token.
        A: Query heads.
        G: Key and value heads.
        D: Size of a head.
        V: Size of the vocabulary.
        tied: Whether the output layer shares the embedding's weight.
        qk_norm: Whether each layer normalises each head's queries and keys, with two weights of size D.
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
    """A key of `config.json` whose values select variants of the family, of which mixfuse supports only some.

    Attributes:
        key: The key.
        supported: The supported values. A missing key is supported, too.
        reason: Why other values are refused.
    """

    key: str
    supported: tuple[Any, ...]
    reason: str


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        model_type: Its name in `config.json`, and the name of its module in transformers.
        title: Its name in text.
        class_prefix: The prefix of its classes in transformers, as in `MixtralForCausalLM`.
        checkpoint_block: The name of a layer's MoE block in saved checkpoints. vLLM uses the same name for the modules
            of an adapter: `model.layers.N.{checkpoint_block}.experts.E.{gate}`.
        gate: The name of an expert's gate projection in saved checkpoints and in vLLM.
        up: The name of its up projection.
        down: The name of its down projection.
        experts_keys: The keys of `config.json` that can hold the number of experts, the preferred one first.
        inner_key: The key for an expert's intermediate size.
        tool_parser: Which of vLLM's parsers reads the family's tool calls (`vllm/tool_parsers`).
        default_top_k: Experts per token if `config.json` has no `num_experts_per_tok`.
        qk_norm: Whether queries and keys are normalised.
        tiny: Additional keys for the config of a tiny random model (`mixfuse base build --tiny`).
        unsupported: Keys of `config.json` with values that are refused.
        attention: The attention projections, in PEFT and in vLLM.
        expert_parameters: The 3-D parameters that hold a layer's experts in transformers 5, with the names for PEFT's
            `target_parameters`: gate and up together, and down.
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
    tool_parser: str
    qk_norm: bool = False
    tiny: Mapping[str, Any] = field(default_factory=dict)
    unsupported: tuple[Unsupported, ...] = ()
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    expert_parameters: tuple[str, ...] = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

    @property
    def expert_projections(self) -> tuple[str, str, str]:
        """The names of an expert's gate, down and up projections in an adapter that vLLM applies."""
        return self.gate, self.down, self.up

    @cached_property
    def adapter_module(self) -> re.Pattern[str]:
        """Matches the end of the name of a module that can have a LoRA; groups `layer`, `expert`, `projection`."""
        experts = rf"{re.escape(self.checkpoint_block)}\.experts\.(?P<expert>\d+)"
        return re.compile(rf"\.layers\.(?P<layer>\d+)\.(?:self_attn|{experts})\.(?P<projection>\w+)$")

    @cached_property
    def expert_factor(self) -> re.Pattern[str]:
        """Matches the name of one expert's factor; groups `layer` (a prefix), `expert`, `projection`, `side`."""
        block, projections = re.escape(self.checkpoint_block), "|".join(map(re.escape, self.expert_projections))
        return re.compile(
            rf"^(?P<layer>.*\.layers\.\d+)\.{block}\.experts\.(?P<expert>\d+)\.(?P<projection>{projections})"
            r"\.lora_(?P<side>[AB])\.weight$"
        )

    def factor_name(self, layer: str, expert: int, projection: str, side: str) -> str:
        """Returns the name of one expert's factor; `layer` is the prefix that ends with the layer's number."""
        return f"{layer}.{self.checkpoint_block}.experts.{expert}.{projection}.lora_{side}.weight"

    def checkpoint_pieces(self, name: str, experts: int) -> list[tuple[int, int | None, str]] | None:
        """Lists the stored tensors that make up a fused expert parameter of transformers 5.

        Args:
            name: The parameter's name in transformers, e.g. `model.layers.0.mlp.experts.gate_up_proj`.
            experts: Experts per layer.

        Returns:
            (expert, half, name of the stored tensor). Half 0 is gate, half 1 is up, None is the whole matrix. The list
            is None if the parameter is not a fused expert parameter.
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
        """Returns the stored name of a parameter of transformers 5 that is stored as one tensor."""
        return name.replace(".mlp.", f".{self.checkpoint_block}.")

    def shape(self, config: Mapping[str, Any]) -> Shape:
        """Reads the sizes in a `config.json` of this family.

        Raises:
            MixfuseError: A size is missing or is none that a model can have, or the config selects a variant that is
                not supported.
        """
        for key, supported, reason in self.unsupported:
            if key in config and config[key] not in supported:
                raise MixfuseError(f"config.json: {key} is {config[key]!r}, which mixfuse does not support: {reason}")
        experts_key = next((key for key in self.experts_keys if key in config), self.experts_keys[0])
        hidden, heads = _size(config, "hidden_size", 1 << 20), _size(config, "num_attention_heads", 1 << 14)
        experts, groups = _size(config, experts_key, 1 << 12), _size(config, "num_key_value_heads", heads)
        if heads % groups:
            raise MixfuseError(
                f"config.json: {heads} num_attention_heads cannot be divided among {groups} num_key_value_heads"
            )
        if config.get("head_dim") is None and hidden < heads:
            raise MixfuseError(f"config.json: hidden_size {hidden} is less than num_attention_heads {heads}")
        return Shape(
            L=_size(config, "num_hidden_layers", 1 << 8),
            H=hidden,
            I=_size(config, self.inner_key, 1 << 20),
            E=experts,
            K=_size({"num_experts_per_tok": self.default_top_k, **config}, "num_experts_per_tok", experts),
            A=heads,
            G=groups,
            D=hidden // heads if config.get("head_dim") is None else _size(config, "head_dim", 1 << 14),
            V=_size(config, "vocab_size", 1 << 24),
            tied=bool(config.get("tie_word_embeddings", False)),
            qk_norm=self.qk_norm,
        )


def _size(config: Mapping[str, Any], key: str, most: int) -> int:
    """Reads one size; the bounds are far above any model's, and let nothing be computed for hours."""
    if key not in config:
        raise MixfuseError(f"config.json has no {key!r}")
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise MixfuseError(f"config.json: {key} must be a whole number from 1 to {most}, not {str(value)[:40]}")
    return value


def norm_parameters(shape: Shape) -> int:
    """Returns the parameters of a layer's norms: 2H, plus 2D if queries and keys are normalised."""
    return 2 * shape.H + (2 * shape.D if shape.qk_norm else 0)


def base_parameters(shape: Shape) -> int:
    """P = L·(2H·(A+G)·D + 3·E·H·I + E·H + norms) + (1 or 2)·V·H + H."""
    L, H, I, E, _, A, G, D, V, tied, _ = shape  # noqa: N806, E741
    layer = 2 * H * (A + G) * D + 3 * E * H * I + E * H + norm_parameters(shape)
    return L * layer + (1 if tied else 2) * V * H + H


def active_parameters(shape: Shape) -> int:
    """Returns the parameters that one token uses: P without E - K of each layer's experts."""
    return base_parameters(shape) - shape.L * 3 * (shape.E - shape.K) * shape.H * shape.I
