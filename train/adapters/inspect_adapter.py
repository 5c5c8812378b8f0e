"""What an adapter is, who made it, who will apply all of it, and what is wrong: `mixfuse adapter inspect`."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

from mixfuse.contracts import adapter as contract
from mixfuse.contracts.adapter_weights import Array, check_pairs
from mixfuse.contracts.errors import MixfuseError, printable
from mixfuse.contracts.families import family_of
from mixfuse.train.adapters import foreign
from mixfuse.train.adapters.foreign import Finding, Foreign
from mixfuse.train.adapters.layouts import ByModule
from mixfuse.train.adapters.saving import check_weights


@dataclass(frozen=True)
class Inspection:
    """One adapter, as a screen shows it.

    Attributes:
        source: Its folder, or its name on the Hub.
        what: Method, rank, scale, modules and number formats, in words.
        maker: Who made it.
        layout: The layout of its factors, in words.
        base: The base that it names, and whether it was compared with one.
        vllm: Whether vLLM applies all of it as it is.
        peft: Whether PEFT does.
        mixfuse: "as it is", "after export" or "no".
        columns: How well each order of the experts' columns of B fits; None if there is no order to tell.
        findings: What is wrong, and what `export` does about it.
    """

    source: str
    what: str
    maker: str
    layout: str
    base: str
    vllm: bool
    peft: bool
    mixfuse: str
    columns: str | None
    findings: list[Finding]

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "findings": [finding._asdict() for finding in self.findings]}

    def __str__(self) -> str:
        rows = {
            "is": self.what,
            "made by": self.maker,
            "layout": self.layout,
            "base": self.base,
            "columns": self.columns,
            "vLLM": "applies all of it" if self.vllm else self._not("vllm"),
            "PEFT": "applies all of it" if self.peft else self._not("peft"),
            "here": {
                "as it is": "served as it is",
                "after export": "served after: mixfuse adapter export",
                "no": "refused",
            }[self.mixfuse],
        }
        lines = [self.source, *(f"  {name:<8} {text}" for name, text in rows.items() if text is not None)]
        for finding in self.findings:
            lines.append(f"  wrong    {finding.what}")
            lines.append(f"           {f'export: {finding.mend}' if finding.mend else 'refused'}")
        return "\n".join(map(printable, lines))

    def _not(self, who: str) -> str:
        count = sum(not getattr(finding, who) for finding in self.findings)
        return f"does not apply it as it was trained ({count} reason{'s' if count > 1 else ''} below)"


def inspect(source: Path, *, base: Path | None = None, name: str | None = None) -> Inspection:
    """Looks at an adapter of any tool, or at a finished run's.

    Args:
        source: Its folder.
        base: The base model's folder, to compare with.
        name: What to call it; by default its folder.

    Raises:
        MixfuseError: It cannot be read at all, the base is no model of a known family, or an adapter directory was
            changed after its export.
    """
    if not source.is_dir():
        raise MixfuseError(f"{source}: no such run or adapter folder", kind="adapter")
    folder = source / "adapter" if (source / "recipe.json").is_file() else source
    own = (folder / contract.MANIFEST).exists() or (folder / contract.MANIFEST).is_symlink()
    manifest = None
    if base is not None:
        family_of(base)
    if own:
        known = contract.fingerprint(base) if base else None
        manifest = contract.verify(folder, base=known)
    found = foreign.read(folder, base=base)
    findings = list(found.findings)
    if not any(finding.mend is None for finding in findings):
        findings += foreign.with_base(found, base) if base else _alone(found)
    refused = any(finding.mend is None for finding in findings)
    named = (manifest.base_path if manifest else found.config.get("base_model_name_or_path")) or "not named"
    return Inspection(
        source=name or str(source),
        what=_what(found),
        maker=found.maker,
        layout=found.layout,
        base=f"{str(named)[:120]}; "
        + (f"compared with {base}" if base else "not compared with a base (--base BASE), so no effect is proven"),
        vllm=all(finding.vllm for finding in findings),
        peft=all(finding.peft for finding in findings),
        mixfuse="no" if refused else "as it is" if own and not findings else "after export",
        columns=_columns(found),
        findings=findings,
    )


def _alone(found: Foreign) -> list[Finding]:
    """What is wrong with the weights themselves."""
    try:
        check_weights(found.weights, found.folder)
        check_pairs(_products(found), found.folder, 1.0)
    except MixfuseError as error:
        return [Finding(str(error).removeprefix(f"{found.folder}: "), vllm=True, peft=True, mend=None)]
    return []


def _products(found: Foreign) -> Iterator[tuple[str, Array, Array]]:
    """Yields A and B of each module, those of each expert apart, the scale multiplied into B.

    Raises:
        MixfuseError: A factor lacks the other, or is not of the rank that the config says.
    """
    ranks = ByModule(found.config, "rank_pattern", "r", found.folder)
    alphas = ByModule(found.config, "alpha_pattern", "lora_alpha", found.folder)
    for name, a, b in foreign.pairs(found):
        factor = f"{name}.lora_A.weight"
        rank = int(ranks.of(factor))
        experts = a.shape[0] // rank if found.is_fused(factor) else 1
        if a.shape[0] != b.shape[1] or a.shape[0] != experts * rank:
            raise MixfuseError(f"{name} has factors {list(a.shape)} and {list(b.shape)}, not of rank {rank}")
        scale = alphas.of(factor) / (math.sqrt(rank) if found.config.get("use_rslora") else rank)
        for expert in range(experts):
            yield (
                name,
                a[expert * rank : (expert + 1) * rank].float().numpy(),
                b[:, expert::experts].float().numpy() * numpy.float32(scale),
            )


def _columns(found: Foreign) -> str | None:
    """In which order the experts' columns of B lie, and how sure that is."""
    if found.fit is None:
        return None
    order = {"peft": "in PEFT's order", "blocks": "in blocks, an expert after the other", None: "in no order to tell"}
    return f"{order[found.fit.order]}: {found.fit}"


def _what(found: Foreign) -> str:
    config = found.config
    parts = [str(config.get("peft_type"))[:40]]
    parts += [
        f"{key} {str(config[name])[:40]}" for key, name in (("rank", "r"), ("alpha", "lora_alpha")) if name in config
    ]
    if config.get("use_rslora"):
        parts.append("rsLoRA")
    modules = {name.split(".lora_")[0] for name in found.weights}
    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in found.weights.values())
    numbers = sum(tensor.numel() for tensor in found.weights.values())
    return f"{', '.join(parts)}; {len(modules)} modules, {numbers} numbers in {', '.join(kinds) or 'no factors'}"
