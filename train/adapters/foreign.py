"""Reads a LoRA adapter as any tool wrote it: PEFT, unsloth, axolotl, ms-swift, LLaMA-Factory, exports from Megatron.

Nothing is fixed in silence. `read` returns the adapter under PEFT's names, and a finding for whatever vLLM or PEFT
would not apply as it was trained: with what `export` does about it, or that it is refused.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mixfuse.contracts import adapter as contract
from mixfuse.contracts import peft_config
from mixfuse.contracts.adapter_weights import Tensors, safetensors_header
from mixfuse.contracts.bounded_json import read_object, shortened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import known_families
from mixfuse.train.adapters import pairing
from mixfuse.train.adapters.layouts import FUSED, Weights

INDEX = f"{contract.WEIGHTS}.index.json"
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
_PLACE = re.compile(r"^(?:(?:base_model|model)\.)*(?P<rest>layers\.\d+\..+)$")
_MEGATRON = re.compile(
    r"(^|\.)(decoder\.layers|linear_qkv|linear_fc[12]|linear_proj|local_experts|linear_in|linear_out)\."
)
_NUMBER = re.compile(r"(?:0|[1-9][0-9]{0,5})$")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_NAMED_PARAMETER = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
_EXPERT = re.compile(
    r"\.(?P<block>mlp|block_sparse_moe|feed_forward|moe)\.experts\.(?P<expert>\d+)\."
    r"(?P<projection>w1|w2|w3|gate_proj|up_proj|down_proj)$"
)
_STACKED = re.compile(r"\.experts\.(w1|w2|w3|gate_proj|up_proj|down_proj|gate_up_proj)$")
_EMBEDDING = re.compile(r"(?:^|\.)(?P<name>(?:model\.)?embed_tokens|lm_head)(?:\.base_layer)?\.weight$")
_ROLES = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
_KINDS = (
    ("lora_magnitude_vector", "DoRA's magnitudes"),
    (".bias", "biases"),
    ("lora_embedding_", "LoRA on embeddings"),
    ("trainable_tokens_", "trained tokens"),
    ("modules_to_save.", "a module that was trained whole"),
    ("scale", "scales of quantised factors"),
)
_TAGS = {"unsloth": "unsloth", "axolotl": "axolotl", "llama-factory": "LLaMA-Factory", "ms-swift": "ms-swift"}


class Finding(NamedTuple):
    """Something about an adapter that somebody will not apply as it was trained.

    Attributes:
        what: What is found, a clause without its subject.
        vllm: Whether vLLM applies the adapter as it was trained all the same.
        peft: The same for PEFT.
        mend: What `adapter export` does about it; None if it refuses the adapter.
    """

    what: str
    vllm: bool
    peft: bool
    mend: str | None


@dataclass
class Foreign:
    """An adapter as it was read.

    Attributes:
        folder: Its folder.
        weights: Its factors under PEFT's names; those of experts fused, or by the names that the tool uses.
        config: Its `adapter_config.json`.
        maker: Who made it.
        findings: What is not as vLLM and PEFT need it.
        fit: The fit of both orders of the columns of fused factors; None if there is no order to tell.
    """

    folder: Path
    weights: Weights
    config: dict[str, Any]
    maker: str
    findings: list[Finding] = field(default_factory=list)
    fit: pairing.Pairing | None = None

    @property
    def fused(self) -> bool:
        """Whether experts are adapted in PEFT's fused layout."""
        return any(map(self.is_fused, self.weights))

    def is_fused(self, name: str) -> bool:
        """Whether a factor holds a layer's experts in PEFT's fused layout."""
        return FUSED.match(name) is not None

    @property
    def layout(self) -> str:
        """The layout, in words."""
        if self.fused:
            return "experts fused (PEFT's target_parameters)"
        if any(".experts." in name for name in self.weights):
            return "experts one by one"
        return "attention only" if self.weights else "no factors"

    def refuse(self) -> None:
        """Raises the first finding that cannot be mended.

        Raises:
            MixfuseError: There is one (`kind` "adapter").
        """
        for finding in self.findings:
            if finding.mend is None:
                raise MixfuseError(f"{self.folder}: {finding.what}", kind="adapter")


def read(folder: Path, *, base: Path | None = None, columns: pairing.Order | None = None) -> Foreign:
    """Reads an adapter that any tool wrote.

    Args:
        folder: The folder with its `adapter_config.json` and safetensors files.
        base: The base model's folder, to compare embeddings with that were saved along, and for the names of experts.
        columns: The order of the columns of fused factors; None: it is told from the file.

    Raises:
        MixfuseError: It cannot be read at all: no config, no safetensors, damaged or linked to elsewhere.
    """
    files, findings = _files(folder), []
    where = _weight_map(folder) if len(files) > 1 or files[0].name != contract.WEIGHTS else None
    config = read_object(_inside(folder, contract.CONFIG), most=peft_config.MOST_CONFIG_BYTES)
    if len(files) > 1 or files[0].name != contract.WEIGHTS:
        findings.append(
            Finding(
                f"its weights lie in {len(files)} shards, which neither vLLM nor PEFT reads",
                vllm=False,
                peft=False,
                mend="written as one file",
            )
        )
    stored = _stored(folder, files, where)
    found = Foreign(folder, {}, config, _maker(folder, config, stored), findings)
    findings += (Finding(*refusal, mend=None) for refusal in peft_config.refusals(config))
    _named(found, stored, base)
    _typed(found)
    if not any(finding.mend is None for finding in findings):
        _configured(found)
        _unstacked(found)
        _ordered(found, columns)
        _expert_names(found, base)
        _applied(found)
    return found


def _stored(folder: Path, files: list[Path], where: dict[str, str] | None) -> dict[str, torch.Tensor]:
    """The tensors of all files.

    Args:
        folder: The adapter's folder.
        files: Its files.
        where: Tensor → the shard that the index names for it; None if there is no index.
    """
    stored: dict[str, torch.Tensor] = {}
    for path in files:
        for name in safetensors_header(path):
            if name in stored:
                raise MixfuseError(f"{folder}: {shortened(name, 120)} lies in two files", kind="adapter")
            if where is not None and where.get(name) != path.name:
                says = "does not name it" if name not in where else f"says {shortened(where[name], 80)}"
                raise MixfuseError(
                    f"{folder}: {shortened(name, 120)} lies in {path.name}, and {INDEX} {says}; the shards are not of "
                    "one save: save the adapter again",
                    kind="adapter",
                )
        try:
            stored.update(load_file(path))
        except SafetensorError as error:
            what = shortened(str(error), 200)
            raise MixfuseError(f"{path}: not a whole safetensors file ({what})", kind="adapter") from None
    if where is not None and (missing := next((name for name in where if name not in stored), None)):
        raise MixfuseError(
            f"{folder}: {shortened(missing, 120)} is missing, which {INDEX} says lies in "
            f"{shortened(where[missing], 80)}; save the adapter again",
            kind="adapter",
        )
    return stored


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor → shard, as the index says; None if there is no index."""
    if not (folder / INDEX).exists():
        return None
    where = read_object(_inside(folder, INDEX), most=_MOST_INDEX_BYTES).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise MixfuseError(f"{folder / INDEX}: has no weight_map", kind="adapter")
    if outside := next((name for name in where.values() if "/" in name or name.startswith(".")), None):
        raise MixfuseError(f"{folder / INDEX}: {shortened(outside, 80)!r} lies outside the folder", kind="adapter")
    return where


def _files(folder: Path) -> list[Path]:
    """The safetensors files of an adapter: one, or the shards that an index names, or all with a shard's name."""
    shards = {path.name for path in folder.glob("adapter_model-*-of-*.safetensors")}
    if (folder / contract.WEIGHTS).exists() or (folder / contract.WEIGHTS).is_symlink():
        if beside := sorted(shards):
            raise MixfuseError(
                f"{folder}: holds {contract.WEIGHTS} and shards ({beside[0]}), and nothing says which are meant; "
                "remove the others",
                kind="adapter",
            )
        return [_inside(folder, contract.WEIGHTS)]
    if where := _weight_map(folder):
        names = set(where.values())
        here = {path.name for path in folder.iterdir()}
        if missing := next((name for name in sorted(names) if name not in here), None):
            raise MixfuseError(f"{folder}: {shortened(missing, 120)} is missing, which {INDEX} names", kind="adapter")
        if extra := next(iter(sorted(shards - names)), None):
            raise MixfuseError(f"{folder}: {INDEX} does not name {extra}; remove what is not meant", kind="adapter")
    else:
        names = shards
        numbers = [re.fullmatch(r"adapter_model-(\d{1,9})-of-(\d{1,9})\.safetensors", name) for name in names]
        counts = {int(number[2]) for number in numbers if number}
        numbered = {int(number[1]) for number in numbers if number}
        if names and (None in numbers or counts != {len(names)} or numbered != set(range(1, len(names) + 1))):
            listed = shortened(", ".join(sorted(names)), 160)
            raise MixfuseError(
                f"{folder}: only {len(names)} shards of a save are here, or of several ({listed})", kind="adapter"
            )
    if not names:
        pickled = next((path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth")), None)
        why = f"it has no {contract.WEIGHTS} (pickled .bin files are refused)"
        if pickled:
            why += f"; {shortened(pickled, 80)} is one: save the adapter again with safetensors"
        raise MixfuseError(f"{folder} is neither a run nor a PEFT adapter: {why}", kind="adapter")
    return [_inside(folder, name) for name in sorted(names)]


_MOST_INDEX_BYTES = 16 << 20


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder, which may be a link only as the Hub's cache makes them.

    Raises:
        MixfuseError: It is a link to elsewhere.
    """
    path = folder / name
    if path.is_symlink():
        try:
            real, root = path.resolve(), folder.resolve()
        except (OSError, RuntimeError):
            raise MixfuseError(f"{path}: is a link that leads back to itself", kind="adapter") from None
        cache = root.parent.parent if root.parent.name == "snapshots" else root
        if not real.is_relative_to(cache):
            raise MixfuseError(f"{path}: is a link out of the folder; put the file itself there", kind="adapter")
    return path


def _maker(folder: Path, config: dict[str, Any], stored: dict[str, torch.Tensor]) -> str:
    """Who made an adapter, from the traces that each tool leaves; PEFT if there are none."""
    card = ""
    if (folder / "README.md").is_file():
        with (folder / "README.md").open("rb") as stream:
            card = stream.read(1 << 16).decode(errors="replace").lower()
    peft = f"PEFT {shortened(str(config['peft_version']), 20)}" if config.get("peft_version") else "PEFT"
    name = None
    if any(_MEGATRON.search(stored_name) for stored_name in stored):
        return "Megatron"
    if (folder / contract.MANIFEST).is_file():
        name = "mixfuse"
    elif _is_unsloths(config):
        name = "unsloth"
    elif (folder / "additional_config.json").is_file() or "swift_version" in config:
        name = "ms-swift"
    elif any((folder / trace).is_file() for trace in ("llamaboard_config.yaml", "training_args.yaml")):
        name = "LLaMA-Factory"
    else:
        name = next((title for tag, title in _TAGS.items() if re.search(rf"\b{tag}\b", card)), None)
    return f"{name} ({peft})" if name else peft


def _is_unsloths(config: dict[str, Any]) -> bool:
    mapping = config.get("auto_mapping")
    fixed = isinstance(mapping, dict) and bool(mapping.get("unsloth_fixed"))
    return fixed or "lora_B_layout" in config or str(config.get("base_model_name_or_path")).startswith("unsloth/")


def _named(found: Foreign, stored: dict[str, torch.Tensor], base: Path | None) -> None:
    """Puts the factors under PEFT's names, and names what is no factor."""
    mended: Counter[str] = Counter()
    adapters: set[str] = set()
    weights: dict[str, torch.Tensor] = {}
    others: dict[str, list[str]] = {}
    for name, tensor in stored.items():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        mended.update({f"{part}." for part in name.split(".") if part in _WRAPPERS})
        plain = ".".join(parts)
        match = _FACTOR.match(plain)
        if match is None or ".lora_" in match["module"]:
            if not _MEGATRON.search(name) and (kind := _other(found, plain, tensor, base)):
                others.setdefault(kind, []).append(name)
            continue
        if match["adapter"]:
            adapters.add(match["adapter"])
            mended[f".{match['adapter']}."] += 1
        module = match["module"]
        if odd := next((part for part in module.split(".") if part.isdecimal() and not _NUMBER.match(part)), None):
            what = f"its names hold {shortened(odd, 40)!r}, which is no number of a layer or expert"
            found.findings.append(Finding(what, vllm=False, peft=False, mend=None))
            return
        if place := _PLACE.match(module):
            full = f"base_model.model.model.{place['rest']}"
            if full != module:
                mended[f"{module[: -len(place['rest'])] or 'layers'} for base_model.model.model."] += 1
            module = full
        key = f"{module}.lora_{match['side']}.weight"
        if key in weights:
            found.findings.append(Finding(f"it holds {shortened(key, 120)} twice, under two names", False, False, None))
            return
        weights[key] = tensor
    found.weights = weights
    if len(adapters) > 1:
        found.findings.append(
            Finding(f"it holds {len(adapters)} adapters ({', '.join(sorted(adapters)[:4])})", False, False, None)
        )
    if any(_MEGATRON.search(name) for name in stored):
        example = next(name for name in stored if _MEGATRON.search(name))
        what = (
            f"its names are Megatron's own ({shortened(example, 100)}); export it to Hugging Face names first, with "
            "Megatron-Bridge or: swift export --to_hf true"
        )
        found.findings.append(Finding(what, vllm=False, peft=False, mend=None))
        return
    if mended:
        listed = ", ".join(f"{part} ({count})" for part, count in sorted(mended.items()))
        what = f"its names hold {listed}, so factors are not found"
        found.findings.append(Finding(what, vllm=False, peft=False, mend="written under PEFT's names"))
    for kind, names in others.items():
        what = f"it holds {kind}: {shortened(names[0], 120)}" + (f" and {len(names) - 1} more" if names[1:] else "")
        found.findings.append(Finding(f"{what}; vLLM cannot serve it, train LoRA alone", False, True, None))
    if not weights and not others:
        found.findings.append(Finding("the adapter is empty", vllm=False, peft=False, mend=None))


def _other(found: Foreign, name: str, tensor: torch.Tensor, base: Path | None) -> str | None:
    """The kind of a tensor that is no factor of a LoRA; None for an embedding that is the base's own."""
    if match := _EMBEDDING.search(name):
        if base is None:
            return "an embedding or output layer (is it the base's own? --base tells)"
        key = "lm_head.weight" if match["name"] == "lm_head" else "model.embed_tokens.weight"
        if not _is_the_bases(key, tensor, base):
            return "an embedding or output layer that was trained or resized"
        what = f"it holds {name}, which is the base's own"
        found.findings.append(Finding(what, vllm=False, peft=True, mend="left out"))
        return None
    return next((title for part, title in _KINDS if part in name), "a tensor that is no LoRA factor")


def _is_the_bases(key: str, tensor: torch.Tensor, base: Path) -> bool:
    for path in sorted(base.glob("*.safetensors")):
        file = Tensors(path)
        for name in (key, "model.embed_tokens.weight"):  # a tied output layer is stored once
            if name in file.header and file.header[name]["shape"] == list(tensor.shape):
                own = file.read(name)
                if own is not None and torch.equal(torch.from_numpy(own).to(tensor.dtype), tensor):
                    return True
    return False


def _typed(found: Foreign) -> None:
    """Turns eight-bit floats into bfloat16, which holds them exactly; other types than floats are refused."""
    eight = [name for name, tensor in found.weights.items() if "float8" in str(tensor.dtype)]
    for name in eight:
        found.weights[name] = found.weights[name].to(torch.bfloat16)
    if eight:
        what = f"{len(eight)} of its factors are eight-bit floats (fp8)"
        found.findings.append(Finding(what, vllm=True, peft=True, mend="written in bfloat16, which holds them exactly"))
    for name, tensor in found.weights.items():
        problem = None
        if tensor.dtype not in _FLOATS:
            problem = f"{shortened(name, 120)} is quantised ({tensor.dtype}); save the adapter in bfloat16"
        elif not tensor.numel():
            problem = "the adapter is empty (ZeRO-3 partitions saved without gathering?)"
        elif tensor.ndim not in (2, 3) or (tensor.ndim == 3 and not _STACKED.search(name.split(".lora_")[0])):
            problem = f"{shortened(name, 120)} has shape {list(tensor.shape)[:9]}, which no factor has"
        if problem:
            found.findings.append(Finding(problem, vllm=False, peft=False, mend=None))
            return


def _configured(found: Foreign) -> None:
    """Names the keys of the config that nobody applies to what is saved, or that PEFT does not know; drops them."""
    findings, config = found.findings, found.config
    start = config.get("init_lora_weights", True)
    if isinstance(start, str):
        what = f"its start is {shortened(start, 40)!r} (init_lora_weights); the factors are those of a plain LoRA"
        findings.append(Finding(what, vllm=True, peft=True, mend="the start is written as a plain one"))
    elif idle := [key for key in peft_config.START_KEYS if config.get(key)]:
        what = f"its {', '.join(idle)} set the start of a training, and its init_lora_weights is a plain one"
        findings.append(Finding(what, vllm=True, peft=True, mend="left out"))
    dropped = set(peft_config.START_KEYS)
    if config.get("megatron_config"):
        what = "it has a megatron_config, with which PEFT looks for Megatron's own layers"
        findings.append(Finding(what, vllm=True, peft=False, mend="left out"))
        dropped |= {"megatron_config"}
    experts = any(".experts" in name for name in found.weights)
    if config.get("fan_in_fan_out"):
        what = "its fan_in_fan_out is true, which is for layers that store their weight transposed"
        findings.append(Finding(what, vllm=True, peft=not experts, mend="written as false"))
        config["fan_in_fan_out"] = False
    dropout = config.get("lora_dropout") or 0.0
    plain = isinstance(dropout, int | float) and 0 <= dropout < 1
    if not plain or (dropout and experts):
        what = f"its lora_dropout is {shortened(repr(dropout), 40)}, which " + (
            "PEFT refuses for experts" if plain else "is no share below 1"
        )
        findings.append(Finding(what, vllm=True, peft=False, mend="written as 0: only training uses it"))
        config["lora_dropout"] = 0.0
    known = peft_config.KNOWN_KEYS | peft_config.OTHER_TOOLS_KEYS
    if unknown := sorted(key for key in config.keys() - known if config[key] not in (None, False, "", [], {})):
        listed = shortened(", ".join(unknown[:4]), 120) + (f" and {len(unknown) - 4} more" if unknown[4:] else "")
        what = f"its adapter_config.json has keys that neither PEFT 0.21 nor vLLM knows: {listed}; nobody applies them"
        findings.append(Finding(what, vllm=True, peft=True, mend="left out"))
    for key in dropped | (config.keys() - known):
        config.pop(key, None)


def _unstacked(found: Foreign) -> None:
    """Turns stacked factors of experts, (E, r, in) and (E, out, r), into PEFT's fused ones or those of each expert."""
    stacked = {name for name, tensor in found.weights.items() if tensor.ndim == 3}
    experts = max((found.weights[name].shape[0] for name in stacked), default=0)
    counts = {found.weights[name].shape[0] for name in stacked} - {1}  # one factor that all experts share
    if len(counts) > 1:
        what = f"its stacked factors are of {' and of '.join(map(str, sorted(counts)[:4]))} experts"
        found.findings.append(Finding(what, vllm=False, peft=False, mend=None))
        return
    result: Weights = {}
    renamed = 0
    for name, tensor in found.weights.items():
        module, side = name.split(".lora_")[0], name.split(".lora_")[1][0]
        stem = module.rsplit(".", 1)[0]
        match = _STACKED.search(module)
        if name in stacked and match:
            wide = tensor.expand(experts, *tensor.shape[1:])
            if match[1] in ("gate_up_proj", "down_proj") and "gate_up_proj" in str(stacked):
                wrapper = f"{stem}.base_layer" if match[1] == "gate_up_proj" else stem
                flat = wide.reshape(-1, wide.shape[2]) if side == "A" else wide.permute(1, 2, 0).flatten(1)
                result[f"{wrapper}.lora_{side}.weight"] = flat.contiguous()
            else:
                for expert, factor in enumerate(wide):
                    result[f"{stem}.{expert}.{match[1]}.lora_{side}.weight"] = factor.contiguous().clone()
            renamed += 1
        elif tensor.ndim == 2 and (named := _NAMED_PARAMETER.search(module)):
            wrapper = f"{stem}.base_layer" if named[1] == "gate_up_proj" else stem
            result[f"{wrapper}.lora_{side}.weight"] = tensor
            renamed += 1
        else:
            result[name] = tensor
    if renamed:
        what = f"{renamed} factors of its experts are stacked or named after their parameters"
        found.findings.append(Finding(what, vllm=False, peft=False, mend="written per expert"))
        found.weights = result


def _ordered(found: Foreign, columns: pairing.Order | None) -> None:
    """Tells the order of the columns of fused factors, and puts them into PEFT's."""
    names = [name for name in found.weights if (match := FUSED.match(name)) and match["side"] == "B"]
    rank = found.config.get("r")
    if not names or not isinstance(rank, int) or found.config.get("rank_pattern"):
        return
    experts = found.weights[names[0]].shape[1] // rank
    if experts * rank != found.weights[names[0]].shape[1]:
        return
    found.fit = pairing.told([found.weights[name] for name in names], experts)
    if found.fit is None:
        return
    marked = {"rank_major": "peft", "grouped_by_expert": "blocks"}.get(str(found.config.get("lora_B_layout")))
    measured = found.fit.order
    if columns is None and marked and measured and marked != measured:
        what = (
            f"its lora_B_layout is {found.config['lora_B_layout']}, but {found.fit}; name the right order with "
            "--expert-columns"
        )
        found.findings.append(Finding(what, vllm=False, peft=False, mend=None))
        return
    order = columns or marked or measured
    if order is None and found.maker.startswith("unsloth"):
        what = (
            "it was made by unsloth, whose versions before September 2026 give each expert's columns of B to others, "
            f"and the file does not tell: {found.fit}; name the order with --expert-columns peft or blocks"
        )
        found.findings.append(Finding(what, vllm=False, peft=False, mend=None))
    if order == "blocks":
        by = "its lora_B_layout says so" if marked else "as you said" if columns else str(found.fit)
        what = f"the columns of B are in blocks, an expert after the other (unsloth before September 2026): {by}"
        found.findings.append(Finding(what, vllm=False, peft=False, mend="the columns are put into PEFT's order"))
        for name in names:
            found.weights[name] = pairing.as_peft(found.weights[name], experts)
    found.config.pop("lora_B_layout", None)


def _expert_names(found: Foreign, base: Path | None) -> None:
    """Puts factors of single experts under the names of the family's checkpoints, which vLLM expects."""
    kind = None
    if base is not None and (base / "config.json").is_file():
        kind = read_object(base / "config.json", most=peft_config.MOST_CONFIG_BYTES).get("model_type")
    family = known_families().get(str(kind))
    if family is None:
        return
    by_role = {"gate": family.gate, "up": family.up, "down": family.down}
    result: Weights = {}
    renamed: list[str] = []
    for name, tensor in found.weights.items():
        module, _, tail = name.partition(".lora_")
        if match := _EXPERT.search(module):
            projection = by_role[_ROLES[match["projection"]]]
            module = f"{module[: match.start()]}.{family.checkpoint_block}.experts.{match['expert']}.{projection}"
        key = f"{module}.lora_{tail}"
        renamed += [name] if key != name else []
        result[key] = tensor
    if renamed and len(result) == len(found.weights):
        what = f"its experts have other names than {family.title}'s ({shortened(renamed[0], 120)})"
        found.findings.append(Finding(what, vllm=False, peft=False, mend=f"written under {family.title}'s names"))
        found.weights = result


def _applied(found: Foreign) -> None:
    """Names what vLLM and PEFT do not apply of an adapter in one of the two known layouts."""
    findings, config = found.findings, found.config
    _targeted(found)
    for side in "BA":
        every = [factor for name, factor in found.weights.items() if ".experts" in name and f".lora_{side}." in name]
        if every and not any(factor.any() for factor in every):
            what = f"every lora_{side} of its experts is zero, so its experts do nothing: were they trained, and saved?"
            findings.append(Finding(what, vllm=True, peft=True, mend="written as zeros"))
    if found.fused:
        what = "its experts are fused; vLLM loads the file and does not apply them"
        findings.append(Finding(what, vllm=False, peft=True, mend="written per expert"))
        return
    layers: dict[str, set[tuple[str, str]]] = {}
    for name in found.weights:
        if match := _EXPERT.search(name.partition(".lora_")[0]):
            layers.setdefault(name[: match.start()], set()).add((match["expert"], match["projection"]))
    experts = 1 + max((int(expert) for members in layers.values() for expert, _ in members), default=-1)
    partial = [layer for layer, members in layers.items() if len(members) < 3 * experts]
    if partial:
        what = f"{len(partial)} layers have factors of some experts or projections only; vLLM takes all or none"
        findings.append(Finding(what, vllm=False, peft=True, mend="the others are written as zeros"))
    if layers and config.get("use_rslora"):
        what = "its scale is rsLoRA's, which PEFT makes √2 times too large for experts one by one"
        findings.append(Finding(what, vllm=True, peft=False, mend="written as an ordinary alpha / r"))
    if layers and (config.get("rank_pattern") or config.get("alpha_pattern")):
        what = "its experts have ranks or alphas of their own, which vLLM packs into one"
        findings.append(Finding(what, vllm=False, peft=True, mend="written with one rank and one alpha"))


_MEND_TARGETS = "the targets are written from its factors"


def _targeted(found: Foreign) -> None:
    """Compares the modules and parameters that the config names with the factors that are there."""
    config, findings = found.config, found.findings
    modules = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in found.weights}
    plain = sorted(name for name in modules if not re.search(r"\.experts(\.base_layer)?$", name))
    experts = sorted(parameter for name in modules - set(plain) if (parameter := _parameter(found, name)))
    what = None
    try:
        targets = peft_config.Targets(config)
        left: dict[str, tuple[str, ...]] = {name: _TARGET_KEYS for name in plain if not targets.module(name)}
        left |= {name: ("target_parameters",) for name in experts if not targets.parameter(name)}
        if name := next(iter(left), None):
            keys = [key for key in left[name] if config.get(key) not in (None, [], "")] or left[name][:1]
            what = f"its {' and '.join(keys)} leave out {shortened(name, 120)}, whose factors it holds"
    except ValueError as error:
        what = f"its {error} cannot be read, or compared with its factors in linear time"
    if isinstance(config.get("target_modules"), str) and config.get("layers_to_transform") not in (None, []):
        what = "it has layers_to_transform beside a pattern of target_modules, which PEFT refuses together"
    if what:
        findings.append(Finding(f"{what}; PEFT does not apply it", vllm=True, peft=False, mend=_MEND_TARGETS))
    elif absent := _absent(config, [*plain, *experts]):
        what = f"its {absent[0]} names {shortened(absent[1], 80)!r}, of which it holds no factors"
        lost = absent[0] == "target_parameters"
        if lost:
            what += "; its experts were not saved: save the adapter again, or take the name out"
        findings.append(Finding(what, vllm=not lost, peft=not lost, mend=None if lost else _MEND_TARGETS))
    elif isinstance(config.get("target_modules"), str):
        what = f"its target_modules are the text {shortened(config['target_modules'], 80)!r}"
        findings.append(Finding(what, vllm=True, peft=True, mend=_MEND_TARGETS))
    else:
        return
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in plain})
    if experts:
        config["target_parameters"] = sorted({".".join(name.split(".")[-3:]) for name in experts})
    for key in _TARGET_KEYS[1:]:
        config.pop(key, None)


_TARGET_KEYS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def _parameter(found: Foreign, module: str) -> str | None:
    """The parameter that a fused factor belongs to; None if only one is adapted and the config does not say which."""
    stem = module.removesuffix(".base_layer")
    named = {name.rpartition(".")[2] for name in found.config.get("target_parameters") or ()}
    if stem != module or named == {"gate_up_proj"}:
        return f"{stem}.gate_up_proj"
    return f"{stem}.down_proj"


def _absent(config: dict[str, Any], names: list[str]) -> tuple[str, str] | None:
    """The first name of the config's lists that no factor has, with its key; None if there is none."""
    here = {end for name in names for end in peft_config.endings(name)}
    for key in ("target_parameters", "target_modules"):
        listed = config.get(key)
        for name in sorted(listed) if isinstance(listed, list) else ():
            if name not in here:
                return key, name
    return None


def pairs(found: Foreign) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yields each module that is adapted, with its A and B.

    Raises:
        MixfuseError: A factor lacks the other (`kind` "adapter").
    """
    for name, factor in found.weights.items():
        module, _, side = name.rpartition(".lora_")
        other = f"{module}.lora_{'B' if side[0] == 'A' else 'A'}.weight"
        if other not in found.weights:
            raise MixfuseError(f"{found.folder}: {name} has no {other}; the file is incomplete", kind="adapter")
        if side[0] == "A":
            yield module, factor, found.weights[other]


def with_base(found: Foreign, base: Path) -> Iterator[Finding]:
    """Yields what does not fit a base: names, widths, layers, experts, and the size of what the adapter changes."""
    from mixfuse.contracts.adapter_weights import check_pairs
    from mixfuse.train.adapters.layouts import convert
    from mixfuse.train.adapters.saving import check_weights

    try:
        check_weights(found.weights, found.folder)
        layout = convert(found.weights, found.config, base, source=found.folder)
        check_pairs(
            (
                (name.removesuffix(".lora_A.weight"), a.float().numpy(), layout.weights[_b_of(name)].float().numpy())
                for name, a in layout.weights.items()
                if ".lora_A." in name
            ),
            found.folder,
            peft_config.scale(layout.config),
            base=base,
        )
    except MixfuseError as error:
        yield Finding(str(error).removeprefix(f"{found.folder}: "), vllm=False, peft=False, mend=None)


def _b_of(name: str) -> str:
    return name.replace(".lora_A.", ".lora_B.")
