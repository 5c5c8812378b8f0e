"""Export: turns a PEFT adapter into an adapter directory whose experts vLLM applies.

PEFT trains a layer's experts as two 3-D parameters a layer and saves them fused. vLLM loads that file with "Success"
and silently ignores the experts (proven in tests/serve/test_engine.py). Written per expert, under the names of
the family's checkpoints, the same adapter works in vLLM and in plain PEFT.
"""

import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mixfuse.contracts import adapter as contract
from mixfuse.contracts import judge_protocol, model_card
from mixfuse.contracts.adapter import Fingerprint, Manifest, Probes
from mixfuse.contracts.adapter_weights import check_directory
from mixfuse.contracts.agreement import effect_in
from mixfuse.contracts.bounded_json import read_object, shortened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import family_of
from mixfuse.contracts.files import atomic_directory, write_json, write_text
from mixfuse.contracts.peft_config import MOST_CONFIG_BYTES
from mixfuse.contracts.strict_yaml import validate
from mixfuse.train.adapters import foreign
from mixfuse.train.adapters.layouts import Layout, convert
from mixfuse.train.adapters.pairing import Order
from mixfuse.train.adapters.saving import check_weights, library_versions


def export(
    source: Path,
    out: Path,
    *,
    base: Path | None = None,
    role: str | None = None,
    full_hash: bool = False,
    columns: Order | None = None,
) -> Manifest:
    """Writes an adapter directory, whole or not at all.

    Args:
        source: A finished run's folder, an adapter directory, or any PEFT LoRA folder, its experts fused or per expert.
        out: The folder to create.
        base: The base model; by default the one that the run, the manifest or the adapter's config names.
        role: The role; by default the run's or the manifest's, else "domain".
        full_hash: Hash every tensor of the base for its fingerprint, which reads the whole base.
        columns: The order of the columns of fused B factors; by default it is told from the file.

    Returns:
        The manifest.

    Raises:
        MixfuseError: `source` is not a LoRA adapter of this base, or is empty, all zero or not finite.
    """
    if not source.is_dir():
        raise MixfuseError(f"{source}: no such run or adapter folder", kind="adapter")
    adapter, origin = _read_origin(source)
    role = _role(role or origin.get("role") or "domain")
    base = base or Path(origin.get("base") or _named_base(adapter))
    if not _is_here(base):
        named = shortened(repr(str(base)), 200)
        raise MixfuseError(f"{source}: its base model {named} is not here; name it with --base", kind="adapter")
    _check_family(adapter, base)
    found = foreign.read(adapter, base=base, columns=columns)
    found.refuse()
    check_weights(found.weights, source)
    layout = convert(found.weights, found.config, base, source=source)
    # The protocol that it was trained with, which may differ from the current one.
    protocol = (origin.get("judge_protocol") or judge_protocol.describe()) if role == "judge" else None
    facts = {
        key: origin[key]
        for key in ("recipe", "metrics", "training_data", "libraries", "chat_template")
        if origin.get(key)
    }
    if role == "judge" and origin.get("calibration"):
        facts["calibration"] = origin["calibration"]
    fingerprint = contract.fingerprint(base, exact=full_hash)
    probes = _read_probes(source, adapter, same_base=_same_base(origin, base, fingerprint))
    return write_directory(
        out, layout, base, fingerprint, role=role, probes=probes, judge_protocol=protocol, source=source, **facts
    )


def write_directory(
    out: Path,
    layout: Layout,
    base: Path,
    fingerprint: Fingerprint,
    *,
    role: str,
    source: Path,
    probes: Probes | None = None,
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
        probes: Its probes; None if it has none.
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
        if probes is not None:
            write_text(temporary / contract.PROBES, probes.model_dump_json() + "\n")
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
            "effect": effect_in(probes.logprobs) if probes is not None else None,
        }
        manifest = validate(keys | facts, Manifest, source=str(source))
        write_text(temporary / model_card.CARD, model_card.render(manifest))
        manifest = manifest.model_copy(update={"files": contract.file_hashes(temporary)})
        write_json(temporary / contract.MANIFEST, manifest.model_dump(mode="json"))
        try:
            contract.verify(temporary)
            check_directory(temporary, base=base if (base / "config.json").is_file() else None)
        except MixfuseError as error:
            raise MixfuseError(str(error).replace(str(temporary), str(source)), kind=error.kind) from None
    return manifest


def _role(name: object) -> str:
    """A role's name, which a server must be able to swap.

    Raises:
        MixfuseError: It is none.
    """
    try:
        return contract.check_role_name(str(name))
    except ValueError as error:
        raise MixfuseError(f"--role: {error}") from None


def _same_base(origin: dict[str, Any], base: Path, fingerprint: Fingerprint) -> bool:
    """Whether the base is the one that the adapter was made on."""
    if isinstance(origin.get("base_fingerprint"), Fingerprint):
        return not origin["base_fingerprint"].differences(fingerprint)
    return bool(origin.get("base")) and Path(origin["base"]).resolve() == base.resolve()


def _read_probes(source: Path, adapter: Path, *, same_base: bool) -> Probes | None:
    """The probes of a run or an adapter directory; those of another base say nothing about this one."""
    folder = source if (source / contract.MANIFEST).is_file() else adapter
    return contract.read_probes(folder) if same_base else None


def _check_family(adapter: Path, base: Path) -> None:
    """Checks that the base that an adapter names, if it is here, is of this base's family.

    The families' names of experts stand for one another (`foreign`), so names and sizes alone would not tell.

    Raises:
        MixfuseError: It is of another.
    """
    named = Path(_named_base(adapter))
    if not _is_here(named):
        return
    families = family_of(named), family_of(base)
    if families[0] != families[1]:
        raise MixfuseError(
            f"{adapter}: it was made for {named}, which is {families[0].title}; {base} is {families[1].title}",
            kind="adapter",
        )


def _is_here(base: Path) -> bool:
    """Whether a base's folder is on this machine; a config can name what no file system takes for a name."""
    try:
        return (base / "config.json").is_file()
    except OSError:
        return False


def _named_base(adapter: Path) -> str:
    """The base that an adapter's config names."""
    named = read_object(adapter / contract.CONFIG, most=MOST_CONFIG_BYTES).get("base_model_name_or_path")
    return named if isinstance(named, str) else ""


def _read_origin(source: Path) -> tuple[Path, dict[str, Any]]:
    """The PEFT folder in `source`, and the facts about its origin: base, role, recipe, metrics and so on."""
    if (source / "recipe.json").is_file():
        if not (source / "run.json").is_file():
            raise MixfuseError(f"{source} is a run that has not finished; run its train command again to resume it")
        return source / "adapter", read_object(source / "run.json", most=contract.MOST_TEXT_BYTES)
    if os.path.lexists(source / contract.MANIFEST):
        manifest = contract.verify(source)
        fused = source / "peft"
        return fused if fused.is_dir() else source, {
            **manifest.model_dump(mode="json"),
            "base": manifest.base_path,
            "base_fingerprint": manifest.base,
        }
    return source, {}


def write_manifest(directory: Path, manifest: Manifest, *, probes: Probes | None = None) -> None:
    """Rewrites the manifest of an adapter directory, its model card and, if passed, its probes; the revision stays."""
    texts = {model_card.CARD: model_card.render(manifest, model_card.named(directory))}
    if probes is not None:
        texts[contract.PROBES] = probes.model_dump_json() + "\n"
    contract.rewrite(directory, manifest, texts)
