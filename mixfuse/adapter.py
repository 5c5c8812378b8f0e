"""The adapter directory: what training leaves and serving takes.

```
DIR/
  adapter_config.json        per-expert layout: what vLLM applies and plain PEFT loads
  adapter_model.safetensors
  peft/                      PEFT's own fused layout: to train on from (only where experts are trained)
  manifest.json              who it is: role, base fingerprint, hashes, recipe, metrics, parity, judge protocol
  README.md                  the model card
```

An adapter's *revision* is a digest of its files' hashes: equal files have equal revisions wherever they lie.
This module reads safetensors headers itself and imports no torch: the server verifies adapters with it.
"""

import hashlib
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

from pydantic import Field

from mixfuse.errors import MixfuseError
from mixfuse.files import read_json, sha256_file, sha256_json
from mixfuse.judge_protocol import Calibration
from mixfuse.recipe import Strict, validate

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PROBES = "probes.json"
PARITY_TOLERANCE = 1e-3
_SAMPLE = 1 << 16
# What transformers, peft or the user's disk write into a config without changing the model.
_VOLATILE = (
    "transformers_version",
    "_name_or_path",
    "use_cache",
    "dtype",
    "torch_dtype",
    "output_router_logits",
)
ALLOWED_SUFFIXES = (".safetensors", ".json", ".md")


class Fingerprint(Strict):
    """Which base model an adapter belongs to. Each field is a hex SHA-256.

    Attributes:
        config: Of `config.json`, less the keys that do not change the model.
        tokenizer: Of `tokenizer.json`.
        chat_template: Of the chat template.
        weights: Of every tensor's name, type and shape and of samples of the bytes (64 KiB from the start, the middle
            and the end of every file): cheap at 281 GB, and two models of one shape still differ.
    """

    config: str
    tokenizer: str
    chat_template: str
    weights: str


class Parity(Strict):
    """How an adapter in vLLM was compared with the same adapter in PEFT.

    Attributes:
        max_abs_logprob_difference: Worst over all prompt tokens, in nats.
        tolerance: What it had to stay within.
        adapter_effect: Worst difference the whole adapter makes to the base, in nats: what the gate could have seen.
        expert_effect: Worst difference the expert part makes; None where no experts are trained.
        tokens: How many prompt tokens were compared.
    """

    max_abs_logprob_difference: float
    tolerance: float
    adapter_effect: float
    expert_effect: float | None
    tokens: int
    dtype: str
    engine: str


class LogprobProbe(Strict):
    """A stored prompt with what the adapter says of it.

    Attributes:
        tokens: The prompt's token ids.
        logprobs: Of its tokens but the first, each given those before it, in nats; float32, under the adapter.
    """

    tokens: list[int] = Field(min_length=2)
    logprobs: list[float]


class VerdictProbe(Strict):
    """A stored comparison with a judge's verdict on it.

    Attributes:
        messages: The comparison as chat messages, from `judge_protocol.comparison`.
        p: P(A) / (P(A) + P(B)) for its first token, before calibration.
    """

    messages: list[dict[str, str]]
    p: float = Field(ge=0, le=1)


class Probes(Strict):
    """`probes.json`: what a swap asks a freshly loaded adapter before it serves, with the answers it must give.

    Attributes:
        tolerance: How far a log-probability may be off in float32, in nats; engines of less precision take more.
        logprobs: From the parity run.
        verdicts: Of a judge.
    """

    tolerance: float
    logprobs: list[LogprobProbe] = []
    verdicts: list[VerdictProbe] = []


class TrainingData(Strict):
    """One data set an adapter was trained on.

    Attributes:
        name: The file's name, or the data set's on the Hub.
        sha256: Of the file; None for a data set on the Hub.
        rows: How many.
        licence: As its owner states it; None where nothing was stated.
    """

    name: str
    sha256: str | None = None
    rows: int | None = None
    licence: str | None = None


class Manifest(Strict):
    """`manifest.json`.

    Attributes:
        calibration: How a judge's probabilities are to be read; None where that was not measured.
        training_data: What it was trained on.
    """

    schema_version: int = SCHEMA_VERSION
    role: str
    revision: str
    base: Fingerprint
    base_path: str
    rank: int
    experts_trained: bool
    files: dict[str, str] = Field(min_length=1)
    libraries: dict[str, str] = {}
    recipe: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    parity: Parity | None = None
    judge_protocol: dict[str, Any] | None = None
    calibration: Calibration | None = None
    training_data: list[TrainingData] = []


def revision_of(files: dict[str, str]) -> str:
    """The revision of an adapter: 12 hex digits over the hashes of its weights and configs (card and probes aside)."""
    weights = {name: digest for name, digest in files.items() if not name.endswith(".md") and name != PROBES}
    return sha256_json(weights)[:12]


def fingerprint(base: Path) -> Fingerprint:
    """Fingerprints a base model's folder.

    Raises:
        MixfuseError: A part of it is missing.
    """
    config = read_json(base / "config.json")
    files = sorted(base.glob("*.safetensors"))
    if not files:
        raise MixfuseError(f"{base}: no .safetensors weights in the folder")
    weights = hashlib.sha256()
    for file in files:
        header = safetensors_header(file)
        weights.update(sha256_json({name: [t["dtype"], t["shape"]] for name, t in header.items()}).encode())
        size = file.stat().st_size
        with file.open("rb") as stream:
            for start in (0, max(0, size // 2), max(0, size - _SAMPLE)):
                stream.seek(start)
                weights.update(stream.read(_SAMPLE))
    template = base / "chat_template.jinja"
    if template.is_file():
        chat_template = template.read_text(encoding="utf-8")
    else:
        chat_template = str(read_json(base / "tokenizer_config.json").get("chat_template") or "")
    return Fingerprint(
        config=sha256_json({key: value for key, value in config.items() if key not in _VOLATILE}),
        tokenizer=sha256_file(_existing(base / "tokenizer.json")),
        chat_template=hashlib.sha256(chat_template.encode()).hexdigest(),
        weights=weights.hexdigest(),
    )


def read_manifest(directory: Path) -> Manifest:
    """Reads and validates an adapter directory's manifest.

    Raises:
        MixfuseError: There is none, or it is not of this schema (`kind` "adapter").
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise MixfuseError(f"{directory}: no such adapter directory", kind="adapter")
    if not path.is_file():
        raise MixfuseError(
            f"{directory} has no {MANIFEST}; make an adapter directory with: mixfuse adapter export {directory} OUT",
            kind="adapter",
        )
    data = read_json(path)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:  # before the keys: those of another schema differ
        raise _bad(
            directory, f"{MANIFEST} has schema version {version!r}, this version of mixfuse reads {SCHEMA_VERSION}"
        )
    return validate(data, Manifest, source=str(path))


def read_probes(directory: Path) -> Probes | None:
    """Reads an adapter directory's stored probes; None where it has none.

    Raises:
        MixfuseError: The file is not of that shape (`kind` "adapter").
    """
    path = directory / PROBES
    return validate(read_json(path), Probes, source=str(path)) if path.is_file() else None


def verify(directory: Path, *, base: Fingerprint | None = None) -> Manifest:
    """Checks an adapter directory: every file's hash, nothing beside them, shapes against rank, and the base.

    Args:
        directory: The adapter directory.
        base: Fingerprint of the model it shall be applied to, where that is known.

    Returns:
        The manifest.

    Raises:
        MixfuseError: The first thing that is wrong (`kind` "adapter").
    """
    manifest = read_manifest(directory)
    files = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    present = {str(path.relative_to(directory)) for path in files} - {MANIFEST}
    if extra := sorted(present - set(manifest.files)):
        raise _bad(directory, f"{extra[0]} is not in the manifest; remove it or export again")
    for name, digest in manifest.files.items():
        if not name.endswith(ALLOWED_SUFFIXES):
            raise _bad(directory, f"{name}: only safetensors, JSON and Markdown files belong in an adapter directory")
        if name not in present:
            raise _bad(directory, f"{name} is missing; export again")
        if (directory / name).is_symlink() or sha256_file(directory / name) != digest:
            raise _bad(directory, f"{name} was changed after export (its SHA-256 differs); export again")
    if manifest.revision != revision_of(manifest.files):
        raise _bad(directory, "the revision does not match the files; the manifest was changed after export")
    _check_shapes(directory, manifest)
    if base is not None and base != manifest.base:
        parts = [part for part in Fingerprint.model_fields if getattr(base, part) != getattr(manifest.base, part)]
        raise _bad(
            directory,
            f"made on another base model (its {', '.join(parts)} differ); train or export it on this one",
        )
    return manifest


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Reads a safetensors file's header: tensor name → `{dtype, shape, data_offsets}`.

    Raises:
        MixfuseError: The file is truncated or no safetensors file.
    """
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(100 << 20, path.stat().st_size):
                raise ValueError("header too long")
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if path.stat().st_size != 8 + length + end:
            raise ValueError("truncated")
    except OSError as error:
        raise MixfuseError(f"{path}: cannot be read: {error.strerror}", kind="adapter") from None
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise MixfuseError(f"{path}: not a whole safetensors file ({error})", kind="adapter") from None
    return header


def file_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below an adapter directory but its manifest, by relative path."""
    return {
        str(path.relative_to(directory)): sha256_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


_EXPERT = re.compile(r"\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.lora_([AB])\.weight$")


def _check_shapes(directory: Path, manifest: Manifest) -> None:
    config = read_json(directory / CONFIG)
    rank = config.get("r")
    if rank != manifest.rank:
        raise _bad(directory, f"rank {rank} in {CONFIG}, {manifest.rank} in the manifest")
    header = safetensors_header(_existing(directory / WEIGHTS))
    if not header:
        raise _bad(directory, f"{WEIGHTS} holds no tensors")
    experts = 0
    for name, tensor in header.items():
        shape = tensor["shape"]
        experts += bool(_EXPERT.search(name))
        side = 0 if ".lora_A." in name else 1
        if len(shape) != 2 or shape[side] != rank or not math.prod(shape):
            raise _bad(directory, f"{name} has shape {shape}, which does not fit rank {rank}")
        twin = name.replace(".lora_A.", ".lora_B.") if side == 0 else name.replace(".lora_B.", ".lora_A.")
        if twin not in header:
            raise _bad(directory, f"{name} stands without {twin}")
    if bool(experts) != manifest.experts_trained:
        raise _bad(directory, f"{WEIGHTS} holds {experts} expert tensors, the manifest says otherwise")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise MixfuseError(f"{path}: no such file")
    return path


def _bad(directory: Path, what: str) -> MixfuseError:
    return MixfuseError(f"{directory}: {what}", kind="adapter")
