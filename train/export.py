"""Export: a PEFT adapter becomes an adapter directory whose experts vLLM really applies.

PEFT trains Mixtral's experts as two 3-D parameters a layer and saves them fused. vLLM loads that file with "Success"
and silently ignores the experts (tests/serve/test_engine.py keeps the proof). Written per expert, under the names
Mixtral's checkpoints use, the same adapter is applied by vLLM and loaded by plain PEFT.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mixfuse import adapter as contract
from mixfuse import card, judge_protocol
from mixfuse.adapter import Manifest
from mixfuse.errors import MixfuseError
from mixfuse.files import atomic_directory, read_json, write_json, write_text
from train.run import libraries

# `experts.base_layer` is the inner of PEFT's two nested wrappers, gate_up_proj; `experts` the outer, down_proj.
_FUSED = re.compile(r"^(?P<layer>.*\.layers\.\d+)\.mlp\.experts(?P<inner>\.base_layer)?\.lora_(?P<side>[AB])\.weight$")
_PER_EXPERT = re.compile(r"\.block_sparse_moe\.experts\.\d+\.w[123]\.lora_[AB]\.weight$")


def export(source: Path, out: Path, *, base: Path | None = None, role: str | None = None) -> Manifest:
    """Writes an adapter directory, whole or not at all.

    Args:
        source: A finished run's folder, an adapter directory, or any PEFT LoRA folder, its experts fused or per expert.
        out: The folder to create.
        base: The base model; by default the one the run, the manifest or the adapter's config names.
        role: The role; by default the run's or the manifest's, else "domain".

    Returns:
        The manifest.

    Raises:
        MixfuseError: `source` is no LoRA adapter of this base, or is empty, all zero or not finite.
    """
    if not source.is_dir():
        raise MixfuseError(f"{source}: no such run or adapter folder", kind="adapter")
    adapter, origin = _origin(source)
    if not (adapter / contract.WEIGHTS).is_file():
        raise MixfuseError(
            f"{source} is neither a run nor a PEFT adapter: it has no {contract.WEIGHTS} "
            "(pickled .bin files are refused)",
            kind="adapter",
        )
    config = read_json(adapter / contract.CONFIG)
    _check_supported(config, source)
    base = base or Path(origin.get("base") or config.get("base_model_name_or_path") or "")
    if not (base / "config.json").is_file():
        raise MixfuseError(f"{source}: its base model {str(base)!r} is not here; name it with --base", kind="adapter")
    base_config = read_json(base / "config.json")
    if base_config.get("model_type") != "mixtral":
        raise MixfuseError(f"{base} is a {base_config.get('model_type')!r} model; mixfuse serves Mixtral")
    contract.safetensors_header(adapter / contract.WEIGHTS)  # says so in one line where the file is cut off
    fused = load_file(adapter / contract.WEIGHTS)
    check_weights(fused, source)
    _check_factors(fused, config, base_config, source)
    weights = per_expert(fused, config, experts=int(base_config["num_local_experts"]))
    _check_targets(weights, base_config, source)
    trains_experts = any(_PER_EXPERT.search(name) for name in weights)
    role = role or origin.get("role") or "domain"
    # The protocol it was trained with, which need not be today's.
    protocol = (origin.get("judge_protocol") or judge_protocol.describe()) if role == "judge" else None
    with atomic_directory(out) as temporary:
        save_file(weights, temporary / contract.WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / contract.CONFIG, per_expert_config(config, weights, base))
        if any(_FUSED.match(name) for name in fused):
            (temporary / "peft").mkdir()
            save_file(fused, temporary / "peft" / contract.WEIGHTS, metadata={"format": "pt"})
            write_json(temporary / "peft" / contract.CONFIG, {**config, "base_model_name_or_path": str(base)})
        files = contract.file_hashes(temporary)
        manifest = Manifest(
            role=role,
            revision=contract.revision_of(files),
            base=contract.fingerprint(base),
            base_path=str(base),
            rank=int(config["r"]),
            experts_trained=trains_experts,
            files=files,
            libraries=origin.get("libraries") or libraries(),
            recipe=origin.get("recipe", {}),
            metrics=origin.get("metrics", {}),
            judge_protocol=protocol,
        )
        write_text(temporary / card.CARD, card.render(manifest))
        manifest = manifest.model_copy(update={"files": contract.file_hashes(temporary)})
        write_json(temporary / contract.MANIFEST, manifest.model_dump(mode="json"))
        contract.verify(temporary)
    return manifest


def _origin(source: Path) -> tuple[Path, dict[str, Any]]:
    """The PEFT folder in `source`, and what is known of where it comes from."""
    if (source / "recipe.json").is_file():
        if not (source / "run.json").is_file():
            raise MixfuseError(f"{source} is a run that has not finished; run its train command again to resume it")
        return source / "adapter", read_json(source / "run.json")
    if (source / contract.MANIFEST).is_file():
        manifest = contract.verify(source)
        fused = source / "peft"
        return fused if fused.is_dir() else source, {**manifest.model_dump(mode="json"), "base": manifest.base_path}
    return source, {}


def check_weights(weights: dict[str, torch.Tensor], source: Path) -> None:
    """Refuses an adapter that would do nothing or break everything.

    Raises:
        MixfuseError: No tensors, an empty one, a NaN or infinity, or every B zero (an untrained LoRA).
    """
    if not weights or any(tensor.numel() == 0 for tensor in weights.values()):
        raise MixfuseError(
            f"{source}: the adapter is empty (ZeRO-3 partitions saved without gathering?)", kind="adapter"
        )
    broken = next((name for name, tensor in weights.items() if not torch.isfinite(tensor).all()), None)
    if broken:
        raise MixfuseError(f"{source}: {broken} holds NaN or infinity; the training diverged", kind="adapter")
    if not any(tensor.any() for name, tensor in weights.items() if ".lora_B." in name):
        raise MixfuseError(
            f"{source}: every lora_B is zero, so the adapter does nothing; train it first", kind="adapter"
        )


def per_expert(weights: dict[str, torch.Tensor], config: dict[str, Any], *, experts: int) -> dict[str, torch.Tensor]:
    """Rewrites fused expert factors per expert; every other tensor is passed through.

    PEFT lays a 3-D parameter's factors out flat: A is (E·r, in), expert-major; B is (out, r·E), rank-major (peft 0.21,
    `ParamWrapper.get_delta_weight`). Gate and up share A; B's first half of rows is gate, the second up.

    Args:
        weights: PEFT's saved names → tensors.
        config: The adapter's config.
        experts: E, the number of experts a layer.

    Returns:
        Names as in Mixtral's checkpoints (`…block_sparse_moe.experts.E.{w1,w2,w3}.lora_{A,B}.weight`).
    """
    targets = {name.rsplit(".", 1)[-1] for name in config.get("target_parameters") or ()}
    result: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        match = _FUSED.match(name)
        if not match:
            result[name] = tensor.contiguous()
            continue
        # With one parameter targeted there is one wrapper, and it is the outer one whichever it is.
        gate_up = bool(match["inner"]) or targets == {"gate_up_proj"}
        if match["side"] == "A":
            by_expert = tensor.reshape(experts, -1, tensor.shape[1])  # (E, r, in)
        else:
            by_expert = tensor.reshape(tensor.shape[0], -1, experts).permute(2, 0, 1)  # (E, out, r)
        for expert, factor in enumerate(by_expert):
            if not gate_up:
                parts = {"w2": factor}
            elif match["side"] == "A":
                parts = {"w1": factor, "w3": factor}
            else:
                gate, up = factor.chunk(2)
                parts = {"w1": gate, "w3": up}
            for projection, part in parts.items():
                key = f"{match['layer']}.block_sparse_moe.experts.{expert}.{projection}.lora_{match['side']}.weight"
                result[key] = part.contiguous().clone()
    return result


def per_expert_config(config: dict[str, Any], weights: dict[str, torch.Tensor], base: Path) -> dict[str, Any]:
    """The PEFT config that goes with `per_expert`'s tensors: every target a module name, no target parameters.

    rsLoRA's scale is written as an ordinary one: loading per-expert factors, PEFT doubles the rank and alpha of gate
    and up (peft 0.21, `_convert_peft_config_moe`), and alpha / √r would come out √2 times too great.
    """
    modules = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in weights})
    plain = {**config, "target_modules": modules, "target_parameters": None, "base_model_name_or_path": str(base)}
    if config.get("use_rslora"):
        plain |= {"use_rslora": False, "lora_alpha": config["lora_alpha"] * math.sqrt(config["r"])}
    return plain


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Renews the model card and the manifest of an adapter directory; the weights and the revision stay."""
    card.renew(directory, manifest)


def _check_supported(config: dict[str, Any], source: Path) -> None:
    if str(config.get("peft_type")) != "LORA":
        raise MixfuseError(f"{source}: a {config.get('peft_type')} adapter; only LoRA can be served", kind="adapter")
    if not isinstance(config.get("r"), int):
        raise MixfuseError(f"{source}: its {contract.CONFIG} names no rank 'r'", kind="adapter")
    if config.get("bias", "none") != "none" or config.get("use_dora") or config.get("modules_to_save"):
        raise MixfuseError(
            f"{source}: bias, DoRA and modules_to_save cannot be served by vLLM; train without them", kind="adapter"
        )
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise MixfuseError(
            f"{source}: ranks or scales that differ by module (rank_pattern, alpha_pattern) are not supported yet",
            kind="adapter",
        )


def _check_factors(
    weights: dict[str, torch.Tensor], config: dict[str, Any], base: dict[str, Any], source: Path
) -> None:
    """Checks that every factor is a matrix of the config's rank, and every fused one holds as many experts as the base.

    Cut at the wrong number of experts, a fused factor would still fall into matrices, of another adapter.
    """
    for name, tensor in weights.items():
        rank = int(config["r"]) * (int(base["num_local_experts"]) if _FUSED.match(name) else 1)
        side = 0 if ".lora_A." in name else 1
        if tensor.ndim != 2 or tensor.shape[side] != rank:
            raise MixfuseError(
                f"{source}: {name} has shape {list(tensor.shape)}, which does not fit rank {config['r']} and the base "
                f"model's {base['num_local_experts']} experts; it belongs to another base model",
                kind="adapter",
            )


def _check_targets(weights: dict[str, torch.Tensor], base: dict[str, Any], source: Path) -> None:
    """Checks every tensor's name and model-side width against the base's config."""
    hidden, inner = int(base["hidden_size"]), int(base["intermediate_size"])
    heads = int(base["num_attention_heads"])
    head_dim = int(base.get("head_dim") or hidden // heads)
    queries, keys = heads * head_dim, int(base["num_key_value_heads"]) * head_dim
    sizes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "w1": (hidden, inner),
        "w2": (inner, hidden),
        "w3": (hidden, inner),
    }
    for name, tensor in weights.items():
        module = name.split(".lora_")[0].rsplit(".", 1)[-1]
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if module not in sizes or layer is None or ".lora_" not in name:
            raise MixfuseError(f"{source}: {name} is not a part of Mixtral that vLLM serves LoRA for", kind="adapter")
        width = tensor.shape[1] if ".lora_A." in name else tensor.shape[0]
        wanted = sizes[module][0 if ".lora_A." in name else 1]
        if width != wanted or int(layer[1]) >= int(base["num_hidden_layers"]):
            raise MixfuseError(
                f"{source}: {name} has shape {list(tensor.shape)}, which does not fit the base model; "
                "it belongs to another one",
                kind="adapter",
            )
