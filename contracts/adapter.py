"""The adapter directory: training writes it, serving loads it.

```
DIR/
  adapter_config.json        per-expert layout: what vLLM applies and plain PEFT loads
  adapter_model.safetensors
  peft/                      PEFT's own fused layout, to continue training from, if the adapter has one
  manifest.json              role, base fingerprint, hashes, recipe, metrics, parity, judge protocol
  probes.json                prompts with expected answers, which a swap checks; written with the parity
  README.md                  the model card
```

`docs/adapter-directory.md` is the contract. An adapter's *revision* is a digest of the hashes of its weights and
configs, so equal files have equal revisions everywhere.
This module imports no torch, because the server verifies adapters with it.
"""

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, date, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from mixfuse.contracts import chat_template as templates
from mixfuse.contracts import peft_config
from mixfuse.contracts.adapter_weights import safetensors_header
from mixfuse.contracts.bounded_json import open_regular, read_object, reading_in, shortened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import config_of, family_named
from mixfuse.contracts.files import atomic_file, canonical_json, sha256_file, sha256_json, shown, write_json
from mixfuse.contracts.judge_protocol import MOST_TOKENIZER_BYTES, Calibration
from mixfuse.contracts.paths import FilePath
from mixfuse.contracts.strict_yaml import Strict, validate

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PROBES = "probes.json"
PARITY_TOLERANCE = 1e-3
LoraRank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]
"""The values that vLLM accepts for `max_lora_rank`."""
LORA_RANKS: tuple[LoraRank, ...] = get_args(LoraRank)
# All modules that an adapter may change. vLLM's default adds the router, which no recipe trains, and the output
# layer, with which the engine dies at the first batch where one of several requests asks for prompt
# log-probabilities (vLLM issue 16668).
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "experts")
MOST_MANIFEST_BYTES = 4 << 20
MOST_TEXT_BYTES = 16 << 20
"""Largest size of a JSON or Markdown file; none has a megabyte."""
_MOST_WEIGHTS_BYTES = 1 << 38  # 256 GiB; rank 512 on every expert of Mixtral 8x22B has 62
_MOST_NAME_BYTES = 128
_MOST_FILES = 10_000
_MOST_BESIDE = 1000  # files and folders that the manifest does not list, before a folder is not looked through
_MOST_PROBES_BYTES = 4 << 20
_MOST_BYTES = {CONFIG: peft_config.MOST_CONFIG_BYTES, PROBES: _MOST_PROBES_BYTES}
_MOST_PROBES, _MOST_PROBE_TOKENS = 1024, 1 << 17  # a parity run has some 170 prompts of 10,000 tokens
_SAMPLE = 1 << 16
_PIECE = 1 << 22
# Keys of a config that do not change the model: written by transformers, by peft, or for a local path.
_VOLATILE = (
    "transformers_version",
    "_name_or_path",
    "use_cache",
    "dtype",
    "torch_dtype",
    "output_router_logits",
)
_ROLE_NAME = re.compile(r"[^\W_][\w.-]{0,63}")
ALLOWED_SUFFIXES = (".safetensors", ".json", ".md")


class Fingerprint(Strict):
    """Identifies the base model of an adapter; each part is a hex SHA-256 unless stated otherwise.

    Attributes:
        config: Of `config.json` without the keys that do not change the model.
        tokenizer: Of `tokenizer.json`.
        chat_template: Of the chat template.
        weights: Of every tensor's name, type and shape and of samples of the bytes (64 KiB from the start, the middle
            and the end of every file). Cheap at 281 GB, and it still tells two models of one shape apart.
        weight_files: Name of each weight file → its size in bytes; None in manifests of version 1.
        tensors: Of every byte of every tensor, in whichever file it is. None by default, because it reads all weights.
    """

    config: str
    tokenizer: str
    chat_template: str
    weights: str
    weight_files: dict[str, int] | None = None
    tensors: str | None = None

    def differences(self, other: "Fingerprint") -> list[str]:
        """The parts in which two bases differ; a part that is None in one of them is ignored."""
        pairs = {part: (getattr(self, part), getattr(other, part)) for part in Fingerprint.model_fields}
        return [part for part, values in pairs.items() if None not in values and values[0] != values[1]]


class Deviation(Strict):
    """How far two sets of log-probabilities are apart, in nats.

    Attributes:
        median: Median of the absolute differences.
        p90: Their 90 % quantile.
        p99: Their 99 % quantile.
        worst: The largest difference.
        prompt: The number of the prompt with the worst token, from 0.
        position: The worst token's position in it, from 0.
    """

    median: float
    p90: float
    p99: float
    worst: float
    prompt: int = Field(ge=0)
    position: int = Field(ge=0)

    @property
    def quantiles(self) -> tuple[float, float, float]:
        """Median, 90 % and 99 % quantile."""
        return self.median, self.p90, self.p99

    def __str__(self) -> str:
        return (
            f"median {self.median:.2g}, 90 % {self.p90:.2g}, 99 % {self.p99:.2g}, worst {self.worst:.2g} nats "
            f"(token {self.position} of prompt {self.prompt + 1})"
        )


class Share(Strict):
    """How much of a part of an adapter's effect an engine shows.

    Attributes:
        part: Which part.
        value: 1 if all of it, 0 if none, 2 if twice.
        error: The standard error of that, from blocks of tokens.
    """

    part: str
    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.error:.2f} of {self.part}'s effect"


class Rest(Strict):
    """What an engine shows of an adapter's effect that is systematically no multiple of the known effect.

    Attributes:
        square: Its mean square as a share of that of the known effect; about 0, or just below, if there is nothing.
        error: The standard error of that, from texts.
        drift: What the base is systematically off by, in nats (root mean square).
    """

    square: float
    error: float
    drift: float

    def __str__(self) -> str:
        return (
            f"{math.sqrt(max(0.0, self.square)):.0%} (square {self.square:.3f} ± {self.error:.3f}; the base is "
            f"systematically off by {self.drift:.2g} nats)"
        )


class Effect(Strict):
    """The size of an adapter's effect on fixed token ids, by which a swap knows an adapter that has no probes.

    Attributes:
        median: Median of what it moves log-probabilities by, in nats.
        tokens: Number of tokens.
    """

    median: float
    tokens: int


class Parity(Strict):
    """The comparison of an adapter in vLLM with the same adapter in PEFT.

    Attributes:
        max_abs_logprob_difference: Largest difference over all prompt tokens, in nats.
        tolerance: Difference that is always allowed, in nats.
        adapter_effect: Largest difference between the base with and without the adapter, in nats. Above the
            tolerance, an engine that ignores the adapter fails the comparison.
        expert_effect: Largest difference that the expert part makes, in nats; None if no experts are trained.
        tokens: Number of prompt tokens compared.
        dtype: Number format of the engine, with its quantisation if it has one. PEFT computes in float32.
        engine: The engine and its version.
        platform: The system, its processor and the device used; None in manifests of version 1.
        measured_at: Time of the measurement, in UTC (ISO 8601); None in manifests of version 1.
        deviation: The differences as quantiles.
        base_deviation: Those of the base without the adapter, which the engine's number format makes.
        shares: How much of the adapter's effect the engine shows, by part.
        rest: What it shows that is no part of it; None if the number format needs no such test.
    """

    max_abs_logprob_difference: float
    tolerance: float
    adapter_effect: float
    expert_effect: float | None
    tokens: int
    dtype: str
    engine: str
    platform: str | None = None
    measured_at: str | None = None
    deviation: Deviation | None = None
    base_deviation: Deviation | None = None
    shares: list[Share] = []
    rest: Rest | None = None


class LogprobProbe(Strict):
    """A stored prompt with its log-probabilities: of every token after the first, given the tokens before it, in nats.

    Attributes:
        tokens: The prompt's token ids.
        logprobs: Under the adapter.
        base: Of the base alone; empty in files of earlier versions.
        no_experts: Under the adapter without its experts; empty if it trains none.
    """

    tokens: list[Annotated[int, Field(ge=0, lt=1 << 31)]] = Field(min_length=2)
    logprobs: list[float]
    base: list[float] = []
    no_experts: list[float] = []


class Measured(Strict):
    """What an engine of one number format said of the probes once the parity gate had passed there.

    Attributes:
        logprobs: Of each prompt, under the adapter; of the first tokens only, where the engine was too short.
        base: Of each prompt, of the base alone.
        verdicts: P(A) / (P(A) + P(B)) of each comparison; empty in files of earlier versions, and if it is no judge.
    """

    logprobs: list[Annotated[list[float], Field(min_length=1)]]
    base: list[Annotated[list[float], Field(min_length=1)]]
    verdicts: list[Annotated[float, Field(ge=0, le=1)]] = []


class VerdictProbe(Strict):
    """A stored comparison with a judge's verdict on it.

    Attributes:
        messages: The comparison as chat messages, from `judge_protocol.comparison`.
        p: P(A) / (P(A) + P(B)) for its first token, before calibration.
    """

    messages: list[dict[str, str]]
    p: float = Field(ge=0, le=1)


class Probes(Strict):
    """`probes.json`: prompts and expected answers with which a swap checks a freshly loaded adapter.

    Attributes:
        tolerance: Error of a log-probability that is always allowed in float32, in nats; engines of lower precision
            get more.
        precision: The number format in which they were computed: float32 by the parity gate, the training's by a run.
        logprobs: Prompts of the parity run.
        verdicts: Comparisons with a judge's verdicts.
        measured: Number format of an engine, with its quantisation → what it said. A swap in such an engine compares
            with that.
    """

    tolerance: float
    precision: str = "float32"
    logprobs: list[LogprobProbe] = Field(default=[], max_length=_MOST_PROBES)
    verdicts: list[VerdictProbe] = Field(default=[], max_length=_MOST_PROBES)
    measured: dict[str, Measured] = {}

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if sum(len(probe.tokens) for probe in self.logprobs) > _MOST_PROBE_TOKENS:
            raise ValueError(f"the prompts have more than {_MOST_PROBE_TOKENS} tokens, and each swap asks for all")
        for said in self.measured.values():
            if len(said.logprobs) != len(self.logprobs) or len(said.base) != len(self.logprobs):
                raise ValueError("`measured` has another number of prompts than `logprobs`")
            if said.verdicts and len(said.verdicts) != len(self.verdicts):
                raise ValueError("`measured` has another number of verdicts than `verdicts`")
        for number, probe in enumerate(self.logprobs):
            rows = [row for row in (probe.base, probe.no_experts) if row]
            for said in self.measured.values():
                if len(said.base[number]) != len(said.logprobs[number]) or len(said.base[number]) >= len(probe.tokens):
                    raise ValueError(f"`measured`: prompt {number + 1} has another number of tokens than in `logprobs`")
            if any(len(row) != len(probe.tokens) - 1 for row in (probe.logprobs, *rows)):
                raise ValueError(f"prompt {number + 1} needs a log-probability for each token but the first")
        return self


class TrainingData(Strict):
    """One data set an adapter was trained on.

    Attributes:
        name: Name of the file, or of the data set on the Hub.
        sha256: SHA-256 of the file; None for a data set on the Hub.
        rows: Number of rows.
        licence: The licence that its owner states; None if none is stated.
    """

    name: str
    sha256: str | None = None
    rows: int | None = None
    licence: str | None = None


class Signature(Strict):
    """An Ed25519 signature of the manifest's canonical JSON without this group.

    Canonical is UTF-8 with sorted keys and no spaces between them. The manifest holds every file's hash, so the
    signature covers the files too.

    Attributes:
        algorithm: The signature algorithm.
        public_key: The signer's public key, 32 bytes in hex. Whoever verifies decides which keys to trust.
        value: The signature, 64 bytes in hex.
    """

    algorithm: Literal["ed25519"] = "ed25519"
    public_key: str = Field(pattern="^[0-9a-f]{64}$")
    value: str = Field(pattern="^[0-9a-f]{128}$")


def _day(value: Any) -> Any:
    if isinstance(value, int | float):  # pydantic takes them for seconds since 1970
        raise ValueError("write a day as 2027-12-31")
    return value


class TrustedKey(Strict):
    """A public key whose signatures are accepted for some time.

    Attributes:
        key: A PEM file.
        until: The last day, in UTC; unlimited by default.
    """

    key: FilePath
    until: Annotated[date, BeforeValidator(_day)] | None = None

    @property
    def expired(self) -> bool:
        """Whether the last day is over."""
        return self.until is not None and datetime.now(UTC).date() > self.until


def _shown_on_screens(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds a control character")
    return text


def _few(files: Any) -> Any:
    """Refuses a list of files that no adapter has, before each of its entries is looked at."""
    if isinstance(files, dict) and len(files) > _MOST_FILES:
        raise ValueError(f"lists more than {_MOST_FILES} files")
    return files


class Manifest(Strict):
    """`manifest.json`.

    Attributes:
        schema_version: Version of this schema. Versions 1 and 2 are read too, and upgraded in memory.
        role: Purpose of the adapter: `domain`, `judge`, `synthesizer` or any other name.
        revision: 12 hex digits over the hashes of the weights and their configs; equal files have equal revisions.
        base: The base model.
        base_path: Path of the base model at the time of the export.
        model_type: Family of the base model, as its `config.json` names it. Versions 1 and 2 are of Mixtral.
        rank: LoRA rank r of every factor.
        experts_trained: Whether it holds factors of experts.
        files: Path of every file in the directory, except this one → its SHA-256.
        libraries: Versions of the libraries that made it.
        recipe: Recipe of the training run.
        metrics: Metrics of the training run.
        parity: The comparison of vLLM with PEFT; None if it was not measured yet.
        judge_protocol: The protocol that a judge was trained with; None for any other role.
        calibration: Calibration of a judge's probabilities; None if it was not measured.
        training_data: The data sets of the training.
        chat_template: The SHA-256 of the chat template that it was trained with, as `engine.chat_template` must name it
            where it serves; None if it is not known.
        effect: The size of its effect on fixed token ids; None if it was not measured.
        signature: The signature; None if nobody signed.
    """

    schema_version: int = SCHEMA_VERSION
    role: Annotated[str, AfterValidator(_shown_on_screens)] = Field(min_length=1, max_length=200)
    revision: str = Field(pattern="^[0-9a-f]{12}$")
    base: Fingerprint
    base_path: str
    model_type: str = "mixtral"
    rank: int
    experts_trained: bool
    files: Annotated[dict[str, str], BeforeValidator(_few)] = Field(min_length=1)
    libraries: dict[str, str] = {}
    recipe: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    parity: Parity | None = None
    judge_protocol: dict[str, Any] | None = None
    calibration: Calibration | None = None
    training_data: list[TrainingData] = []
    chat_template: str | None = None
    effect: Effect | None = None
    signature: Signature | None = None


def check_role_name(name: str) -> str:
    """Returns a role's name. It is a part of a URL, of a model's name in the engine and of a watched folder's path.

    Raises:
        ValueError: No adapter could be swapped in for a role of this name.
    """
    if not _ROLE_NAME.fullmatch(name) or len(os.fsencode(name)) > _MOST_NAME_BYTES:
        raise ValueError(
            f"{shortened(repr(name), 80)} cannot be a role's name, since it could not be swapped: a name has letters, "
            "digits, '.', '_' and '-', begins with a letter or a digit, and has 64 characters at most"
        )
    return name


def revision_of(files: dict[str, str]) -> str:
    """The revision of an adapter: 12 hex digits over the hashes of its weights and configs (card and probes aside)."""
    weights = {name: digest for name, digest in files.items() if not name.endswith(".md") and name != PROBES}
    return sha256_json(weights)[:12]


def fingerprint(base: Path, *, exact: bool = False) -> Fingerprint:
    """Fingerprints a base model's folder.

    Args:
        base: The folder.
        exact: Also hash every tensor. This reads all weights, with a progress bar on a terminal.

    Raises:
        MixfuseError: A file is missing.
    """
    with reading_in(base):
        return _fingerprint(base, exact=exact)


def _fingerprint(base: Path, *, exact: bool) -> Fingerprint:
    config = config_of(base)
    files = sorted(base.glob("*.safetensors"))
    if not files:
        raise MixfuseError(f"{base}: no .safetensors weights in the folder")
    tokenizer = base / "tokenizer.json"
    if _existing(tokenizer).stat().st_size > MOST_TOKENIZER_BYTES:
        raise MixfuseError(f"{tokenizer}: larger than {MOST_TOKENIZER_BYTES >> 20} MiB, which no such file is")
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
        chat_template = templates.read_file(template)
    else:
        settings = read_object(base / "tokenizer_config.json", most=MOST_TEXT_BYTES)
        chat_template = str(settings.get("chat_template") or "")
    return Fingerprint(
        config=sha256_json({key: value for key, value in config.items() if key not in _VOLATILE}),
        tokenizer=sha256_file(tokenizer),
        chat_template=hashlib.sha256(chat_template.encode()).hexdigest(),
        weights=weights.hexdigest(),
        weight_files={file.name: file.stat().st_size for file in files},
        tensors=_tensors_digest(files) if exact else None,
    )


def _tensors_digest(files: Sequence[Path]) -> str:
    """A digest of every tensor's name, type, shape and bytes, independent of the split into files."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    tensors: dict[str, list[Any]] = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("hashing", total=sum(file.stat().st_size for file in files))
        for file in files:
            header = safetensors_header(file)
            with file.open("rb") as stream:
                data = 8 + struct.unpack("<Q", stream.read(8))[0]
                for name, tensor in header.items():
                    start, end = tensor["data_offsets"]
                    stream.seek(data + start)
                    digest = hashlib.sha256()
                    for left in range(end - start, 0, -_PIECE):
                        digest.update(stream.read(min(left, _PIECE)))
                        progress.advance(bar, min(left, _PIECE))
                    tensors[name] = [tensor["dtype"], tensor["shape"], digest.hexdigest()]
    return sha256_json(tensors)


def read_manifest(directory: Path) -> Manifest:
    """Reads and validates an adapter directory's manifest.

    Raises:
        MixfuseError: There is no manifest, or it has another schema (`kind` "adapter").
    """
    with reading_in(directory):
        return _read_manifest(directory)[0]


def _read_manifest(directory: Path) -> tuple[Manifest, bytes]:
    """The manifest, and the bytes that a signature covers: its canonical JSON as stored, of any version."""
    path = directory / MANIFEST
    if not directory.is_dir():
        raise MixfuseError(f"{shown(directory)}: no such adapter directory", kind="adapter")
    if not path.is_symlink() and not path.exists():
        raise MixfuseError(
            f"{directory} has no {MANIFEST}; make an adapter directory with: mixfuse adapter export {directory} OUT",
            kind="adapter",
        )
    data = read_object(path, most=MOST_MANIFEST_BYTES, follow=False)
    version = data.get("schema_version")
    if (
        type(version) is not int or not 1 <= version <= SCHEMA_VERSION
    ):  # checked first, because another schema has other keys
        raise _bad(
            directory,
            f"{MANIFEST} has schema version {shortened(repr(version), 40)}, this version of mixfuse reads up to "
            f"{SCHEMA_VERSION}",
        )
    signed = canonical_json({key: value for key, value in data.items() if key != "signature"})
    # Versions 2 and 3 only added keys, all with defaults.
    return validate({**data, "schema_version": SCHEMA_VERSION}, Manifest, source=str(path)), signed


def read_probes(directory: Path) -> Probes | None:
    """Reads an adapter directory's stored probes; None if it has none.

    Raises:
        MixfuseError: The file has another shape (`kind` "adapter").
    """
    path = directory / PROBES
    with reading_in(directory):
        if not path.exists():
            return None
        return validate(read_object(path, most=_MOST_PROBES_BYTES, follow=False), Probes, source=str(path))


def verify(
    directory: Path,
    *,
    base: Fingerprint | None = None,
    trusted: Sequence[bytes | Path | TrustedKey] = (),
    revoked: Sequence[bytes | Path] = (),
) -> Manifest:
    """Checks an adapter directory: signature, hash of every file, no further files, shapes, rank, probes, base model.

    Args:
        directory: The adapter directory.
        base: Fingerprint of the base model to apply it to, if known.
        trusted: Ed25519 public keys, as PEM or as PEM files. One of them must have signed the manifest. Without any, an
            unsigned adapter is accepted, but an existing signature must be valid.
        revoked: Public keys whose signatures are refused, whoever trusts them.

    Returns:
        The manifest.

    Raises:
        MixfuseError: The first check that fails (`kind` "adapter"), or a trusted key that cannot be read.
    """
    with reading_in(directory):
        manifest, signed = _read_manifest(directory)
        _check_signature(directory, manifest, signed, trusted, revoked)
        _check_files(directory, manifest)
    if base is not None and (parts := manifest.base.differences(base)):
        raise _bad(
            directory,
            f"made on another base model (its {', '.join(parts)} differ); train or export it on this one",
        )
    return manifest


def rewrite(directory: Path, manifest: Manifest, texts: Mapping[str, str]) -> Manifest:
    """Rewrites a directory's manifest and text files beside the weights; removes a signature, which would be invalid.

    All files are written before the first is renamed into place. Only their hashes are computed anew; computing the
    others too would accept a file that was changed since `verify`.

    Args:
        directory: The adapter directory.
        manifest: The new manifest; the hashes of these files are filled in.
        texts: File name → text. None of the files may be part of the revision.

    Returns:
        The manifest as written.
    """
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    manifest = manifest.model_copy(update={"files": {**manifest.files, **hashes}, "signature": None})
    written = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
    texts = {**texts, MANIFEST: written + "\n"}
    with ExitStack() as renames:
        for name, text in texts.items():
            renames.enter_context(atomic_file(directory / name)).write_text(text, encoding="utf-8")
    return manifest


def sign(directory: Path, key: Path) -> Manifest:
    """Checks a directory and signs its manifest with an Ed25519 private key; replaces an earlier signature.

    Args:
        directory: The adapter directory.
        key: A PEM file.

    Raises:
        MixfuseError: A check fails (the earlier signature is not checked), or the file holds no such key.
    """
    from mixfuse.contracts.signing import sign as sign_with

    path = directory / MANIFEST
    manifest = read_manifest(directory).model_copy(update={"signature": None})
    with reading_in(directory):
        _check_files(directory, manifest)
    data = manifest.model_dump(mode="json", exclude={"signature"})
    public_key, value = sign_with(canonical_json(data), key)
    manifest = manifest.model_copy(update={"signature": Signature(public_key=public_key, value=value)})
    write_json(path, manifest.model_dump(mode="json"))
    return manifest


def _check_files(directory: Path, manifest: Manifest) -> None:
    most = 2 * len(manifest.files) + _MOST_BESIDE
    found = list(islice(directory.rglob("*"), most + 1))
    present = {str(path.relative_to(directory)) for path in found if path.is_symlink() or not path.is_dir()}
    if extra := sorted(present - {MANIFEST, *manifest.files}):
        raise _bad(directory, f"{shortened(extra[0], 200)} is not in the manifest; remove it or export again")
    if len(found) > most:
        raise _bad(directory, f"it holds more than {most} files and folders; remove what is not in the manifest")
    for name in manifest.files:
        if not name.endswith(ALLOWED_SUFFIXES):
            what = f"{shortened(name, 200)}: only safetensors, JSON and Markdown files belong in an adapter directory"
            raise _bad(directory, what)
        if name not in present:
            raise _bad(directory, f"{shortened(name, 200)} is missing; export again")
        if not (directory / name).is_symlink():
            _check_size(directory, name)
    for name, digest in manifest.files.items():
        if (directory / name).is_symlink() or _sha256(directory / name) != digest:
            raise _bad(directory, f"{name} was changed after export (its SHA-256 differs); export again")
    if manifest.revision != revision_of(manifest.files):
        raise _bad(directory, "the revision does not match the files; the manifest was changed after export")
    _check_shapes(directory, manifest)
    read_probes(directory)


def _check_size(directory: Path, name: str) -> None:
    """Refuses a file that is too large to be one of an adapter, before hashing it takes hours."""
    path = directory / name
    if not path.is_file():
        raise _bad(directory, f"{name} is no regular file; export again")
    size = path.stat().st_size
    most = _MOST_WEIGHTS_BYTES if name.endswith(".safetensors") else _MOST_BYTES.get(path.name, MOST_TEXT_BYTES)
    if size > most:
        raise _bad(directory, f"{name} is larger than {most >> 20} MiB, which no such file is")
    if size > MOST_TEXT_BYTES:
        safetensors_header(path)  # of the size that its header says


def _sha256(path: Path) -> str:
    """The SHA-256 of a file that may have become a pipe since it was looked at."""
    digest = hashlib.sha256()
    with open_regular(path, follow=False) as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _check_signature(
    directory: Path,
    manifest: Manifest,
    signed: bytes,
    trusted: Sequence[bytes | Path | TrustedKey],
    revoked: Sequence[bytes | Path],
) -> None:
    if manifest.signature is None:
        if trusted:
            raise _bad(directory, "is not signed, and a signature is demanded; sign it with: mixfuse adapter sign")
        return
    from mixfuse.contracts import signing

    by, name = signing.from_hex(manifest.signature.public_key), f"key {manifest.signature.public_key[:16]}…"
    if not signing.is_signed(signed, manifest.signature.value, by):
        raise _bad(directory, "its signature does not match; the manifest was changed after it was signed")
    if by in [signing.public_key(source) for source in revoked]:
        raise _bad(directory, f"signed with {name}, which was revoked; sign it with another")
    expired = None
    for source in trusted:
        limited = source if isinstance(source, TrustedKey) else None
        if by == signing.public_key(source.key if isinstance(source, TrustedKey) else source):
            if limited is None or not limited.expired:
                return
            expired = limited.until
    if expired is not None:
        raise _bad(directory, f"signed with {name}, which was trusted until {expired}; sign it with another")
    if trusted:
        raise _bad(directory, f"signed with {name}, which is not a trusted one")


def file_hashes(directory: Path) -> dict[str, str]:
    """Relative path of every file of an adapter directory, except the manifest → its SHA-256."""
    return {
        str(path.relative_to(directory)): sha256_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def _check_shapes(directory: Path, manifest: Manifest) -> None:
    config = read_object(directory / CONFIG, most=peft_config.MOST_CONFIG_BYTES, follow=False)
    if refusal := next(peft_config.refusals(config), None):
        raise _bad(directory, refusal.what)
    if pattern := next((key for key in ("rank_pattern", "alpha_pattern") if config.get(key)), None):
        raise _bad(directory, f"its {CONFIG} has a {pattern}, which no export writes; export it again")
    rank = config["r"]
    if rank != manifest.rank:
        raise _bad(directory, f"rank {rank} in {CONFIG}, {manifest.rank} in the manifest")
    header = safetensors_header(_existing(directory / WEIGHTS))
    if not header:
        raise _bad(directory, f"{WEIGHTS} holds no tensors")
    expert_factor = family_named(manifest.model_type).expert_factor
    experts = 0
    for name, tensor in header.items():
        shape = tensor["shape"]
        experts += bool(expert_factor.match(name))
        side = 0 if ".lora_A." in name else 1
        if len(shape) != 2 or shape[side] != rank or not math.prod(shape):
            raise _bad(directory, f"{name} has shape {shape}, which does not fit rank {rank}")
        twin = name.replace(".lora_A.", ".lora_B.") if side == 0 else name.replace(".lora_B.", ".lora_A.")
        if twin not in header:
            raise _bad(directory, f"{name} stands without {twin}")
    if bool(experts) != manifest.experts_trained:
        raise _bad(directory, f"{WEIGHTS} holds {experts} expert tensors, the manifest says otherwise")


def check_applied(directory: Path) -> None:
    """Checks that PEFT and vLLM apply every factor of a verified adapter directory.

    PEFT leaves out what the config's targets do not name. vLLM takes a layer's experts all together or not at all.

    Raises:
        MixfuseError: One of them would leave out a factor (`kind` "adapter").
    """
    with reading_in(directory):
        config = read_object(directory / CONFIG, most=peft_config.MOST_CONFIG_BYTES, follow=False)
        header = safetensors_header(_existing(directory / WEIGHTS))
    try:
        targets = peft_config.Targets(config)
    except ValueError as error:
        raise _bad(directory, f"its {error} cannot be matched in linear time; export it again") from None
    family = family_named(read_manifest(directory).model_type)
    layers: dict[str, set[str]] = {}
    for name in header:
        module = name.partition(".lora_")[0]
        if not targets.module(module.removeprefix("base_model.model.")):
            raise _bad(directory, f"its targets leave out {name}, so PEFT would not apply it; export it again")
        if match := family.expert_factor.match(name):
            layers.setdefault(match["layer"], set()).add(module)
    most = max(map(len, layers.values()), default=0)
    for layer, modules in layers.items():
        if len(modules) < most or most % len(family.expert_projections):
            what = f"{layer} has factors of some experts or projections only, and vLLM takes all or none"
            raise _bad(directory, f"{what}; export it again")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise MixfuseError(f"{path}: no such file")
    return path


def _bad(directory: Path, what: str) -> MixfuseError:
    """An error in a line of some length, whatever files and tensors are called."""
    return MixfuseError(f"{directory}: {shortened(what, 500)}", kind="adapter")
