"""The model card of an adapter directory: its `README.md`, as the Hugging Face Hub renders it.

Everything comes from the manifest, except for two facts that only a person knows: the base's name on the Hub and the
adapter's licence. They are stored in the card's metadata and survive a rewrite of the card.

The metadata's keys are the Hub's: https://github.com/huggingface/hub-docs/blob/main/modelcard.md
"""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mixfuse.contracts import judge_protocol
from mixfuse.contracts.adapter import LORA_RANKS, LORA_TARGETS, Manifest, TrainingData, rewrite
from mixfuse.contracts.bounded_json import open_regular
from mixfuse.contracts.errors import MixfuseError, printable
from mixfuse.contracts.families import family_named
from mixfuse.contracts.files import sha256_json
from mixfuse.contracts.yaml_text import parse

CARD = "README.md"
_MOST_FRONT_BYTES = 1 << 16
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
# Names of metrics measured on held-out data: a prefix, then the metric.
_MEASURED = re.compile(r"(?:best_)?(?:eval|dev|test|heldout)_(?P<metric>\w+)")


class Named(NamedTuple):
    """The facts about an adapter that only a person knows.

    Attributes:
        base_model: The base's name on the Hub, `org/name`.
        licence: The adapter's licence, as the Hub spells it (`apache-2.0`).
    """

    base_model: str | None = None
    licence: str | None = None


def is_hub_id(name: str) -> bool:
    """Whether this can be a repository's name on the Hub: `org/name`."""
    return bool(_HUB_ID.fullmatch(name)) and ".." not in name and "--" not in name


def named(directory: Path) -> Named:
    """Reads these facts from the card of an adapter directory."""
    path = directory / CARD
    if not os.path.lexists(path):
        return Named()
    with open_regular(path, follow=False) as stream:
        # A card's metadata is at its beginning; a character that is cut in two there is none of it.
        front_matter = _FRONT_MATTER.match(stream.read(_MOST_FRONT_BYTES).decode(errors="replace"))
    try:
        metadata = parse(front_matter[1], str(path)) if front_matter else None
    except MixfuseError as error:
        raise MixfuseError(f"{error}; its metadata is no YAML, export again", kind="adapter") from None
    if not isinstance(metadata, dict):
        return Named()
    base_model, licence = metadata.get("base_model"), metadata.get("license")
    # Cards of older exports gave the base's local path.
    return Named(
        base_model if isinstance(base_model, str) and is_hub_id(base_model) else None,
        licence if isinstance(licence, str) else None,
    )


def renew(directory: Path, manifest: Manifest, facts: Named | None = None) -> Manifest:
    """Rewrites the model card and the manifest; keeps weights and revision, removes a signature.

    Args:
        directory: The adapter directory.
        manifest: The new manifest; the card's hash is filled in.
        facts: Facts from a person; a fact that is None stays as it is in the card.

    Returns:
        The manifest as written.

    Raises:
        MixfuseError: A name or licence is not written as on the Hub, or the disk is full.
    """
    old, new = named(directory), facts or Named()
    for value, is_valid, kind in (
        (new.base_model, is_hub_id, "a model's name on the Hub, like mistralai/Mixtral-8x22B-v0.1"),
        (new.licence, _LICENCE.fullmatch, "a licence as the Hub spells it, like apache-2.0 (or other)"),
    ):
        if value is not None and not is_valid(value):
            raise MixfuseError(f"{value!r} is not {kind}")
    merged = Named(new.base_model or old.base_model, new.licence or old.licence)
    return rewrite(directory, manifest, {CARD: render(manifest, merged)})


def render(manifest: Manifest, facts: Named | None = None) -> str:
    """The model card: metadata in YAML, then Markdown."""
    facts = facts or Named()
    parts = [_what_it_is(manifest, facts), _use(manifest, facts)]
    if manifest.role == "judge":
        parts.append(_judging(manifest))
    parts += [_training(manifest, facts), _metrics(manifest), _parity(manifest), _limits(manifest)]
    front = yaml.safe_dump(metadata(manifest, facts), sort_keys=False, allow_unicode=True, width=1000)
    text = f"---\n{front}---\n\n" + "\n\n".join(parts) + "\n"
    return "\n".join(map(printable, text.split("\n")))  # names of somebody else's: the card is printed


def metadata(manifest: Manifest, facts: Named) -> dict[str, Any]:
    """The metadata for the Hub: base model, licence, data sets, tags, and results that fit its schema."""
    tags = [
        "mixfuse",
        "lora",
        manifest.model_type,
        manifest.role,
        *(["llm-as-a-judge"] if manifest.role == "judge" else []),
    ]
    result: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    if facts.licence:
        result["license"] = facts.licence
    if facts.base_model:
        result |= {"base_model": facts.base_model, "base_model_relation": "adapter"}
    if on_hub := [data.name for data in manifest.training_data if data.sha256 is None and is_hub_id(data.name)]:
        result["datasets"] = on_hub
    result["tags"] = list(dict.fromkeys(tags))
    if index := _model_index(manifest):
        result["model-index"] = index
    return result


def _model_index(manifest: Manifest) -> list[dict[str, Any]]:
    """The results measured on held-out data; the Hub's schema requires the data set of each."""
    data = _evaluated_on(manifest.recipe)
    metrics = [
        {"type": match["metric"], "value": value, "name": name}
        for name, value in _flat(manifest.metrics).items()
        if (match := _MEASURED.fullmatch(name)) and isinstance(value, int | float) and match["metric"] != "step"
    ]
    if not data or not metrics:
        return []
    result = {
        "task": {"type": "text-generation", "name": manifest.role},
        "dataset": {"name": ", ".join(data), "type": data[0]},
        "metrics": metrics,
    }
    return [{"name": f"{manifest.role}-{manifest.revision}", "results": [result]}]


def _evaluated_on(recipe: dict[str, Any]) -> list[str]:
    """The data sets a run was evaluated on: a file's name without its folders, or a name on the Hub."""
    evaluation = recipe.get("evaluation")
    if not isinstance(evaluation, dict):
        return []
    sources = evaluation.get("data") or recipe.get("data")  # default: a share of the training data
    if not isinstance(sources, list):
        return []
    named = (source for source in sources if isinstance(source, dict))
    return [str(source.get("hub") or Path(str(source.get("path"))).stem) for source in named]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _what_it_is(manifest: Manifest, facts: Named) -> str:
    trained = "attention and experts" if manifest.experts_trained else "attention"
    base = (
        f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
        if facts.base_model
        else f"`{_base(manifest)}`, a {family_named(manifest.model_type).title}"
    )
    fused = (
        " `peft/` holds the same weights in PEFT's fused layout; continue training from it."
        if _has_fused(manifest)
        else ""
    )
    return f"""# {manifest.role} adapter, revision {manifest.revision}

A LoRA adapter of rank {manifest.rank} on {trained} of {base}, for the role `{manifest.role}`, made with mixfuse.
Safetensors only. Each expert has its own tensors, a layout that both vLLM and PEFT load.{fused}"""


def _use(manifest: Manifest, facts: Named) -> str:
    base = facts.base_model or "BASE"
    rank = next((rank for rank in LORA_RANKS[1:] if rank >= manifest.rank), manifest.rank)
    return f"""## How to use it

`ADAPTER` is the name of this repository, or a folder with its files.

With mixfuse, in a running server:

```
mixfuse adapter pull ADAPTER DIR --base BASE_DIR
mixfuse roles swap {manifest.role} DIR
```

With vLLM:

```
vllm serve {base} --enable-lora --max-lora-rank {rank} \\
  --lora-target-modules {" ".join(LORA_TARGETS)} \\
  --lora-modules {manifest.role}=ADAPTER
```

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{base}")
model = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(model, "ADAPTER")
```"""


def _judging(manifest: Manifest) -> str:
    protocol = manifest.judge_protocol or {}
    listed = protocol.get("verdicts")
    verdicts = " or ".join(f"`{verdict}`" for verdict in listed) if isinstance(listed, list | tuple) else "not recorded"
    calibration = manifest.calibration
    read = (
        f"The judge is calibrated: log-odds are divided by {calibration.temperature:g}; a pair whose order-averaged "
        f"score is within {calibration.tie_margin:g} of 1/2 is a tie."
        if calibration
        else "The judge is not calibrated: its probabilities are the model's own."
    )
    same = protocol == judge_protocol.describe()
    text = f"system: {protocol.get('system')}\n\nuser:\n{protocol.get('template')}"
    return f"""## How it judges

It was trained with judge protocol {protocol.get("version")} (digest `{sha256_json(protocol)[:12]}`\
{"" if same else ", which is not the protocol of the mixfuse that wrote this card"}). mixfuse checks the digest before \
it serves the judge.
A comparison has the form below. The verdict is read from the log-probabilities of one token, \
{verdicts}. Each pair is judged in \
{protocol.get("orders")} orders; a verdict that flips with the order is a tie. {read}

````
{text.replace("````", "` ` ` `")}
````"""


def _training(manifest: Manifest, facts: Named) -> str:
    rows = [
        f"| {_cell(data.name)} | {'' if data.rows is None else data.rows} | {_cell(data.licence or 'not stated')} | "
        f"{_hash_or_hub(data)} |"
        for data in manifest.training_data
    ]
    table = (
        "\n".join(["| data | rows | licence | SHA-256 |", "| --- | --- | --- | --- |", *rows])
        if rows
        else "The training data is not recorded."
    )
    licence = facts.licence or "not stated; the licences of the base and of the data apply"
    libraries = ", ".join(f"{name} {version}" for name, version in manifest.libraries.items())
    quantised = manifest.recipe.get("quantization")
    base = (
        f"\n\nIt was trained on the base in {manifest.recipe.get('dtype')} with its frozen experts in {quantised}."
        if quantised
        else ""
    )
    return f"## Training data and licence\n\n{table}\n\nLicence of the adapter: {licence}.{base}" + (
        f"\n\nMade with {libraries}." if libraries else ""
    )


def _metrics(manifest: Manifest) -> str:
    rows = [f"| {_cell(name)} | {_cell(_figure(value))} |" for name, value in _flat(manifest.metrics).items()]
    return "## Metrics\n\n" + (
        "\n".join(["| metric | value |", "| --- | --- |", *rows]) if rows else "No metrics are recorded."
    )


def _parity(manifest: Manifest) -> str:
    parity = manifest.parity
    if not parity:
        return "## Parity\n\nNot measured yet: `mixfuse adapter verify DIR --base BASE`."
    experts = f", its experts alone by up to {parity.expert_effect:.2g}" if parity.expert_effect else ""
    return f"""## Parity

The log-probabilities in vLLM and PEFT differ by at most {parity.max_abs_logprob_difference:.1e} nats over \
{parity.tokens} prompt tokens
({parity.dtype}, {parity.engine}; tolerance {parity.tolerance:.0e}). The adapter changes them by up to \
{parity.adapter_effect:.2g} nats{experts}. So the test would have detected an engine that ignores the adapter."""


def _limits(manifest: Manifest) -> str:
    base = manifest.base
    parity = (
        f"Parity of vLLM with PEFT was measured on {manifest.parity.engine} in {manifest.parity.dtype} only."
        if manifest.parity
        else "Parity of vLLM with PEFT has not been measured."
    )
    return f"""## Limits

- It fits one base only: config `{base.config[:12]}`, tokenizer `{base.tokenizer[:12]}`, chat template \
`{base.chat_template[:12]}`,
  weights `{base.weights[:12]}`. mixfuse refuses any other base; PEFT and vLLM do not check it.
- {parity} Measure it on your own engine first:
  `mixfuse adapter verify DIR --base BASE`.
- The metrics come from its own training run and data. They say nothing about other tasks or languages.
- It was not tested for harmful or biased answers. It inherits those of its base and its data."""


def _has_fused(manifest: Manifest) -> bool:
    return any(name.startswith("peft/") for name in manifest.files)


def _base(manifest: Manifest) -> str:
    return Path(manifest.base_path).name


def _hash_or_hub(data: TrainingData) -> str:
    return f"`{data.sha256[:12]}…`" if data.sha256 else "on the Hub"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
