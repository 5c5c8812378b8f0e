"""Export: turns a PEFT adapter into an adapter directory whose experts vLLM applies.

PEFT trains a layer's experts as two 3-D parameters a layer and saves them fused. vLLM loads that file with "Success"
and silently ignores the experts (proven in tests/serve/test_engine.py). Written per expert, under the names of
the family's checkpoints, the same adapter works in vLLM and in plain PEFT.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from mixfuse.contracts import adapter as contract
from mixfuse.contracts import judge_protocol, model_card
from mixfuse.contracts.adapter import Fingerprint, Manifest, Probes
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import atomic_directory, read_json, write_json, write_text
from mixfuse.contracts.strict_yaml import validate
from mixfuse.train.adapters.layouts import Layout, convert
from mixfuse.train.adapters.saving import check_weights, library_versions


def export(
    source: Path,
    out: Path,
    *,
    base: Path | None = None,
    role: str | None = None,
    full_hash: bool = False,
) -> Manifest:
    """Writes an adapter directory, whole or not at all.

    Args:
        source: A finished run's folder, an adapter directory, or any PEFT LoRA folder, its experts fused or per expert.
        out: The folder to create.
        base: The base model; by default the one that the run, the manifest or the adapter's config names.
        role: The role; by default the run's or the manifest's, else "domain".
        full_hash: Hash every tensor of the base for its fingerprint, which reads the whole base.

    Returns:
        The manifest.

    Raises:
        MixfuseError: `source` is not a LoRA adapter of this base, or is empty, all zero or not finite.
    """
    if not source.is_dir():
        raise MixfuseError(f"{source}: no such run or adapter folder", kind="adapter")
    adapter, origin = _read_origin(source)
    if not (adapter / contract.WEIGHTS).is_file():
        raise MixfuseError(
            f"{source} is neither a run nor a PEFT adapter: it has no {contract.WEIGHTS} "
            "(pickled .bin files are refused)",
            kind="adapter",
        )
    config = read_json(adapter / contract.CONFIG)
    base = base or Path(origin.get("base") or config.get("base_model_name_or_path") or "")
    if not (base / "config.json").is_file():
        raise MixfuseError(f"{source}: its base model {str(base)!r} is not here; name it with --base", kind="adapter")
    contract.safetensors_header(adapter / contract.WEIGHTS)  # reports a truncated file in one line
    weights = load_file(adapter / contract.WEIGHTS)
    check_weights(weights, source)
    layout = convert(weights, config, base, source=source)
    role = role or origin.get("role") or "domain"
    # The protocol that it was trained with, which may differ from the current one.
    protocol = (origin.get("judge_protocol") or judge_protocol.describe()) if role == "judge" else None
    facts = {key: origin[key] for key in ("recipe", "metrics", "training_data", "libraries") if origin.get(key)}
    if role == "judge" and origin.get("calibration"):
        facts["calibration"] = origin["calibration"]
    fingerprint = contract.fingerprint(base, exact=full_hash)
    return write_directory(out, layout, base, fingerprint, role=role, judge_protocol=protocol, source=source, **facts)


def write_directory(
    out: Path,
    layout: Layout,
    base: Path,
    fingerprint: Fingerprint,
    *,
    role: str,
    source: Path,
    **facts: Any,
) -> Manifest:
    """Writes an adapter directory, whole or not at all.

    Args:
        out: The folder to create.
        layout: The adapter.
        base: The base model's folder; it may be absent on this machine.
        fingerprint: The base's fingerprint.
        role: The role.
        source: Where the adapter comes from, for messages.
        facts: Further keys of the manifest.

    Returns:
        The manifest.

    Raises:
        MixfuseError: `out` exists, the disk is full, or a fact does not fit the manifest's schema.
    """
    with atomic_directory(out) as temporary:
        save_file(layout.weights, temporary / contract.WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / contract.CONFIG, layout.config)
        if layout.fused:
            (temporary / "peft").mkdir()
            save_file(layout.fused[0], temporary / "peft" / contract.WEIGHTS, metadata={"format": "pt"})
            write_json(temporary / "peft" / contract.CONFIG, layout.fused[1])
        files = contract.file_hashes(temporary)
        keys = {
            "role": role,
            "revision": contract.revision_of(files),
            "base": fingerprint,
            "base_path": str(base),
            "model_type": layout.family.model_type,
            "rank": int(layout.config["r"]),
            "experts_trained": layout.has_experts,
            "files": files,
            "libraries": library_versions(),
        }
        manifest = validate(keys | facts, Manifest, source=str(source))
        write_text(temporary / model_card.CARD, model_card.render(manifest))
        manifest = manifest.model_copy(update={"files": contract.file_hashes(temporary)})
        write_json(temporary / contract.MANIFEST, manifest.model_dump(mode="json"))
        contract.verify(temporary)
    return manifest


def _read_origin(source: Path) -> tuple[Path, dict[str, Any]]:
    """The PEFT folder in `source`, and the facts about its origin: base, role, recipe, metrics and so on."""
    if (source / "recipe.json").is_file():
        if not (source / "run.json").is_file():
            raise MixfuseError(f"{source} is a run that has not finished; run its train command again to resume it")
        return source / "adapter", read_json(source / "run.json")
    if (source / contract.MANIFEST).is_file():
        manifest = contract.verify(source)
        fused = source / "peft"
        return fused if fused.is_dir() else source, {**manifest.model_dump(mode="json"), "base": manifest.base_path}
    return source, {}


def write_manifest(directory: Path, manifest: Manifest, *, probes: Probes | None = None) -> None:
    """Rewrites the manifest of an adapter directory, its model card and, if passed, its probes; the revision stays."""
    texts = {model_card.CARD: model_card.render(manifest, model_card.named(directory))}
    if probes is not None:
        texts[contract.PROBES] = probes.model_dump_json() + "\n"
    contract.rewrite(directory, manifest, texts)
