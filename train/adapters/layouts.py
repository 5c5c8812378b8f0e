"""Converts a LoRA on a mixture of experts to the layout that vLLM applies.

PEFT with transformers 5 trains a layer's experts as two 3-D parameters and saves them *fused*. PEFT with transformers 4
trained the projections of each expert as modules (`w1`, `w2` and `w3` for Mixtral) and saved them *per expert*. vLLM
applies only the per-expert layout, and only if it is complete: one rank, one scale, and in each layer all experts or
none. The converted adapter has this form and computes the same.
"""

import math
import re
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mixfuse.contracts.bounded_json import shortened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import config_of, family_of
from mixfuse.contracts.family import Family, Shape
from mixfuse.contracts.linear_patterns import Pattern
from mixfuse.contracts.peft_config import is_plain_name, refusals

Weights = dict[str, torch.Tensor]

_ATTENTION = re.compile(r"^base_model\.model\.model\.layers\.\d+\.self_attn\.\w+\.lora_[AB]\.weight$")
# PEFT nests two wrappers: `experts.base_layer` is the inner one (gate_up_proj), `experts` the outer one (down_proj).
FUSED = re.compile(r"^(?P<layer>.*\.layers\.\d+)\.mlp\.experts(?P<inner>\.base_layer)?\.lora_(?P<side>[AB])\.weight$")


class Layout(NamedTuple):
    """One adapter in the layout that vLLM applies and, if possible, also in PEFT's fused layout.

    Attributes:
        family: The base's family.
        weights: Factors per expert, with the names of `Family.factor_name`; A is (r, in), B is (out, r).
        config: PEFT's config for `weights`.
        fused: `(weights, config)` in PEFT's fused layout. None if no experts are adapted, or if an expert's gate and up
            projections do not share their A, which this layout requires.
    """

    family: Family
    weights: Weights
    config: dict[str, Any]
    fused: tuple[Weights, dict[str, Any]] | None

    @property
    def has_experts(self) -> bool:
        """Whether any expert is adapted."""
        return any(self.family.expert_factor.match(name) for name in self.weights)


def convert(weights: Weights, config: dict[str, Any], base: Path, *, source: Path) -> Layout:
    """Converts an adapter in any layout.

    Args:
        weights: The adapter's tensors by PEFT's saved names.
        config: PEFT's `adapter_config.json`.
        base: The base model's folder.
        source: The adapter's folder, for error messages.

    Raises:
        MixfuseError: vLLM cannot serve the adapter, or it does not fit the base.
    """
    family = family_of(base)
    shape = family.shape(config_of(base))
    _check_supported(config, source)
    config = {**config, "init_lora_weights": True}  # the factors are no start any more
    ranks = ByModule(config, "rank_pattern", "r", source)
    alphas = ByModule(config, "alpha_pattern", "lora_alpha", source)
    _check_factors(weights, ranks, shape, source)
    is_fused = any(FUSED.match(name) for name in weights)
    plain, plain_config = _with_one_scale(weights, config, ranks, alphas)
    plain = per_expert(family, plain, config, experts=shape.E)
    plain = _with_all_experts(family, _with_one_rank(plain), shape)
    _check_targets(family, plain, shape, source)
    plain_config = _per_expert_config(plain_config, plain, base)
    if is_fused:
        return Layout(family, plain, plain_config, (weights, {**config, "base_model_name_or_path": str(base)}))
    return with_fused(family, plain, plain_config)


def with_fused(family: Family, weights: Weights, config: dict[str, Any]) -> Layout:
    """Adds PEFT's fused layout, if possible, to per-expert factors of one rank."""
    fused = fuse(family, weights)
    if fused is None:
        return Layout(family, weights, config, None)
    layers = sorted({int(_layer(name)) for name in fused if FUSED.match(name)})
    modules = [name for name in config["target_modules"] if name not in family.expert_projections]
    parameters = [f"layers.{layer}.{parameter}" for layer in layers for parameter in family.expert_parameters]
    return Layout(
        family, weights, config, (fused, {**config, "target_modules": modules, "target_parameters": parameters})
    )


def per_expert(family: Family, weights: Weights, config: dict[str, Any], *, experts: int) -> Weights:
    """Splits fused expert factors by expert; other tensors are unchanged.

    PEFT stores the factors of a 3-D parameter as matrices: A is (E·r, in), expert-major; B is (out, r·E), rank-major
    (peft 0.21, `ParamWrapper.get_delta_weight`). Gate and up share A. The first half of B's rows is gate, the second
    half is up.

    Args:
        family: The base's family.
        weights: The adapter's tensors by PEFT's saved names.
        config: The adapter's config.
        experts: E, the number of experts per layer.

    Returns:
        The tensors, with the names of the family's checkpoints (`Family.factor_name`).
    """
    result: Weights = {}
    for name, tensor in weights.items():
        match = FUSED.match(name)
        if not match:
            result[name] = tensor.contiguous()
            continue
        gate_up = _is_gate_up(match, config)
        if match["side"] == "A":
            by_expert = tensor.reshape(experts, -1, tensor.shape[1])  # (E, r, in)
        else:
            by_expert = tensor.reshape(tensor.shape[0], -1, experts).permute(2, 0, 1)  # (E, out, r)
        for expert, factor in enumerate(by_expert):
            if not gate_up:
                parts = {family.down: factor}
            elif match["side"] == "A":
                parts = {family.gate: factor, family.up: factor}
            else:
                gate, up = factor.chunk(2)
                parts = {family.gate: gate, family.up: up}
            for projection, part in parts.items():
                key = family.factor_name(match["layer"], expert, projection, match["side"])
                result[key] = part.contiguous().clone()
    return result


def fuse(family: Family, weights: Weights) -> Weights | None:
    """Inverts `per_expert`.

    Args:
        family: The base's family.
        weights: Factors per expert, for all experts of a layer or none.

    Returns:
        The fused tensors; None if no experts are adapted, or if gate and up do not share their A.
    """
    experts: dict[str, int] = {}
    for name in weights:
        if match := family.expert_factor.match(name):
            experts[match["layer"]] = max(experts.get(match["layer"], 0), int(match["expert"]) + 1)
    if not experts:
        return None
    result = {name: tensor for name, tensor in weights.items() if not family.expert_factor.match(name)}
    for layer, count in experts.items():

        def factors(projection: str, side: str, layer: str = layer, count: int = count) -> list[torch.Tensor]:
            return [weights[family.factor_name(layer, expert, projection, side)] for expert in range(count)]

        if not all(map(torch.equal, factors(family.gate, "A"), factors(family.up, "A"))):
            return None
        gate_up = [torch.cat(pair) for pair in zip(factors(family.gate, "B"), factors(family.up, "B"), strict=True)]
        inner, outer = f"{layer}.mlp.experts.base_layer", f"{layer}.mlp.experts"
        for wrapper, down, up in (
            (inner, factors(family.gate, "A"), gate_up),
            (outer, factors(family.down, "A"), factors(family.down, "B")),
        ):
            result[f"{wrapper}.lora_A.weight"] = torch.cat(down)  # (E·r, in)
            result[f"{wrapper}.lora_B.weight"] = torch.stack(up, dim=-1).flatten(1)  # (out, r·E)
    return result


def _with_one_scale(
    weights: Weights, config: dict[str, Any], ranks: "ByModule", alphas: "ByModule"
) -> tuple[Weights, dict[str, Any]]:
    """Multiplies each module's scale into its B if ranks or alphas differ by module; the config's scale is then 1.

    Otherwise the weights are unchanged. rsLoRA's scale is rewritten as an ordinary one: when PEFT loads per-expert
    factors, it doubles the rank and alpha of gate and up (peft 0.21, `_convert_peft_config_moe`), and alpha / √r would
    be √2 times too large.
    """
    root = bool(config.get("use_rslora"))
    if not config.get("rank_pattern") and not config.get("alpha_pattern"):
        alpha = config["lora_alpha"] * math.sqrt(config["r"]) if root else config["lora_alpha"]
        return weights, {**config, "use_rslora": False, "lora_alpha": alpha}
    result: Weights = {}
    for name, tensor in weights.items():
        rank, alpha = ranks.of(name), alphas.of(name)
        scale = alpha / math.sqrt(rank) if root else alpha / rank
        result[name] = tensor.float() * scale if ".lora_B." in name else tensor.float()
    scaled = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "lora_alpha": None}
    return result, {**config, **scaled}


class ByModule:
    """The rank or alpha of each module: of the first pattern that matches its name, else the config's.

    Patterns match as PEFT's do (peft 0.21, `get_pattern_key`), in linear time whatever they are. Most are plain names,
    which are looked up.

    Args:
        config: PEFT's config.
        pattern: Its key with the patterns.
        key: Its key with the value of all other modules.
        source: The adapter's folder, for error messages.

    Raises:
        MixfuseError: A pattern does not match in linear time.
    """

    def __init__(self, config: dict[str, Any], pattern: str, key: str, source: Path) -> None:
        self._config, self._default = config, float(config[key])
        self._names: dict[str, tuple[int, float]] = {}
        self._others: list[tuple[int, float, Pattern]] = []
        for place, (name, value) in enumerate((config.get(pattern) or {}).items()):
            if is_plain_name(name):
                self._names[name] = (place, float(value))
                continue
            try:
                self._others.append((place, float(value), Pattern(rf"^(?:.*\.)?(?:{name})$")))
            except ValueError:
                raise MixfuseError(
                    f"{source}: {pattern} {shortened(name, 80)!r} cannot be matched in linear time; name the modules",
                    kind="adapter",
                ) from None

    def of(self, name: str) -> float:
        """The value for the module of a factor."""
        module = name.split(".lora_", maxsplit=1)[0].removeprefix("base_model.model.")
        if match := FUSED.match(name):
            parameter = "gate_up_proj" if _is_gate_up(match, self._config) else "down_proj"
            module = f"{module.removesuffix('.base_layer')}.{parameter}"
        parts = module.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        place, value = min((self._names[end] for end in ends if end in self._names), default=(None, self._default))
        for other, found, pattern in self._others:
            if place is not None and other > place:
                break
            if pattern.found_in(module):
                return found
        return value


def _is_gate_up(match: re.Match[str], config: dict[str, Any]) -> bool:
    """Whether a fused factor is of gate and up. If only one parameter is targeted, its wrapper is the outer one."""
    targets = {name.rsplit(".", 1)[-1] for name in config.get("target_parameters") or ()}
    return bool(match["inner"]) or targets == {"gate_up_proj"}


def _with_one_rank(weights: Weights) -> Weights:
    """Pads factors of smaller ranks with zeros."""
    rank = max((tensor.shape[_rank_side(name)] for name, tensor in weights.items()), default=0)
    result: Weights = {}
    for name, tensor in weights.items():
        side = _rank_side(name)
        missing = rank - tensor.shape[side]
        zeros = tensor.new_zeros((missing, tensor.shape[1]) if side == 0 else (tensor.shape[0], missing))
        result[name] = torch.cat([tensor, zeros], dim=side) if missing else tensor
    return result


def _with_all_experts(family: Family, weights: Weights, shape: Shape) -> Weights:
    """Adds the missing factors, as zeros, in each layer that has any expert factors."""
    result = dict(weights)
    example_by_layer = {match["layer"]: name for name in weights if (match := family.expert_factor.match(name))}
    for layer, name in example_by_layer.items():
        rank = weights[name].shape[_rank_side(name)]
        for expert, projection in product(range(shape.E), family.expert_projections):
            wide_in, wide_out = _sizes(family, shape)[projection]
            for side, size in (("A", (rank, wide_in)), ("B", (wide_out, rank))):
                key = family.factor_name(layer, expert, projection, side)
                if key not in result:
                    result[key] = weights[name].new_zeros(size)
    return result


def _per_expert_config(config: dict[str, Any], weights: Weights, base: Path) -> dict[str, Any]:
    """Returns the PEFT config of per-expert factors, whose targets are all modules and no parameters."""
    rank = next((tensor.shape[_rank_side(name)] for name, tensor in weights.items()), config["r"])
    alpha = rank if config["lora_alpha"] is None else config["lora_alpha"]
    modules = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in weights})
    targets = {"target_modules": modules, "target_parameters": None}
    return {**config, **targets, "r": rank, "lora_alpha": alpha, "base_model_name_or_path": str(base)}


def _check_supported(config: dict[str, Any], source: Path) -> None:
    if refusal := next(refusals(config), None):
        raise MixfuseError(f"{source}: {refusal.what}", kind="adapter")


def _check_factors(weights: Weights, ranks: ByModule, shape: Shape, source: Path) -> None:
    """Checks that factors come in pairs and are matrices of the config's rank, times the base's experts if fused.

    Split by a wrong number of experts, a fused factor would still give matrices, but those of a different adapter.
    """
    for name, tensor in weights.items():
        twin = name.replace(".lora_A.", ".lora_B.") if _rank_side(name) == 0 else name.replace(".lora_B.", ".lora_A.")
        if twin not in weights:
            raise MixfuseError(f"{source}: {name} has no {twin}; the file is incomplete", kind="adapter")
        rank = ranks.of(name)
        expected = rank * (shape.E if FUSED.match(name) else 1)
        if tensor.ndim != 2 or tensor.shape[_rank_side(name)] != expected:
            fits = f"rank {rank:g} (r, rank_pattern)"
            if FUSED.match(name):
                fits = f"rank {rank:g} and the base model's {shape.E} experts; it belongs to another base model"
            raise MixfuseError(
                f"{source}: {name} has shape {list(tensor.shape)}, which does not fit {fits}", kind="adapter"
            )


def _check_targets(family: Family, weights: Weights, shape: Shape, source: Path) -> None:
    """Compares each tensor's name and its width on the model's side with the base."""
    sizes = _sizes(family, shape)
    for name, tensor in weights.items():
        module = name.split(".lora_")[0].rsplit(".", 1)[-1]
        expert = family.expert_factor.match(name)
        place = _ATTENTION if module not in family.expert_projections else family.expert_factor
        is_served = module in sizes and place.match(name)
        if not is_served:
            raise MixfuseError(
                f"{source}: {name} is not a part of {family.title} for which vLLM serves LoRA", kind="adapter"
            )
        side = _rank_side(name)
        outside = int(_layer(name)) >= shape.L or (expert and int(expert["expert"]) >= shape.E)
        if tensor.shape[1 - side] != sizes[module][side] or outside:
            raise MixfuseError(
                f"{source}: {name} has shape {list(tensor.shape)}, which does not fit the base model; "
                "it belongs to another base model",
                kind="adapter",
            )


def _sizes(family: Family, shape: Shape) -> dict[str, tuple[int, int]]:
    """Returns (in, out) for each module."""
    queries, keys = shape.A * shape.D, shape.G * shape.D
    return {
        "q_proj": (shape.H, queries),
        "k_proj": (shape.H, keys),
        "v_proj": (shape.H, keys),
        "o_proj": (queries, shape.H),
        family.gate: (shape.H, shape.I),
        family.down: (shape.I, shape.H),
        family.up: (shape.H, shape.I),
    }


def _rank_side(name: str) -> int:
    """The dimension of the rank: A is (r, in), B is (out, r)."""
    return 0 if ".lora_A." in name else 1


def _layer(name: str) -> str:
    match = re.search(r"\.layers\.(\d+)\.", name)
    return match[1] if match else ""
