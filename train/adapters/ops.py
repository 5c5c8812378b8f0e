"""Adapters out of adapters: `mixfuse adapter compose | prune`.

What comes out is an adapter directory like any other, in float32. It has not been through the parity gate, and a
judge's calibration is gone: both were measured on other weights.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from mixfuse.contracts.adapter import LORA_RANKS, Manifest
from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.adapters.export import write_directory
from mixfuse.train.adapters.factors import Factors, Pair, Place, norm, stacked, tracked, truncated
from mixfuse.train.adapters.layouts import Weights, with_fused
from mixfuse.train.adapters.saving import check_weights

_EXACT = 1e-5  # relative; what rounding the factors to float32 may come to
_VANISHED = 1e-6


class Composed(NamedTuple):
    """What `compose` made.

    Attributes:
        relative_error: ‖Δ - Σ wᵢΔᵢ‖ / ‖Σ wᵢΔᵢ‖ over the whole adapter.
    """

    manifest: Manifest
    relative_error: float


def compose(
    parts: Sequence[tuple[Path, float]],
    out: Path,
    *,
    method: Literal["sum", "concat"],
    rank: int | None = None,
    role: str | None = None,
) -> Composed:
    """Makes one adapter whose change to the base is the weighted sum of several adapters' changes.

    Args:
        parts: Adapter directories and their weights.
        out: The adapter directory to create.
        method: "concat" puts the factors side by side: exact, ranks add up. "sum" then takes the nearest delta of
            `rank`.
        rank: For "sum"; by default the largest of the parts.
        role: By default that of the first part.

    Raises:
        MixfuseError: A part is not right, or of another base; judge protocols differ; the rank is none that vLLM
            serves; or the parts cancel each other out.
    """
    _check_free(out)
    source = _WeightedSum(parts)
    first = source.adapters[0].manifest
    role = role or first.role
    protocol = _one_protocol(source.adapters, role)
    if method == "concat":
        if rank is not None:
            raise MixfuseError("--rank goes with --method sum; the rank of concat is the sum of its parts' ranks")
        _check_rank(source.rank, "use --method sum --rank R, or prune the parts")
        weights: Weights = {}
        for name in tracked(source.places, "joining"):
            weights |= _named(name, source[name])
        rank = source.rank
    else:
        rank = max(adapter.manifest.rank for adapter in source.adapters) if rank is None else rank
        _check_rank(rank, "choose a smaller one")
        if rank > source.rank:
            raise MixfuseError(f"rank {rank} is more than the parts have together, {source.rank}; use --method concat")
        weights = _truncated(source, rank).weights
    error = _relative_error(source, weights)
    if method == "concat" and error > _EXACT:
        raise MixfuseError(f"{out}: the result differs from the sum of its parts by {error:.1e}; nothing was written")
    described = [
        {"role": one.manifest.role, "revision": one.manifest.revision, "rank": one.manifest.rank, "weight": weight}
        for one, weight in zip(source.adapters, source.weights, strict=True)
    ]
    data = [entry for adapter in source.adapters for entry in adapter.manifest.training_data]
    manifest = _write(
        out,
        source.adapters[0],
        weights,
        rank,
        role=role,
        judge_protocol=protocol,
        recipe={"composed": {"method": method, "parts": described}},
        metrics={"relative_error": error},
        training_data=[entry for place, entry in enumerate(data) if entry not in data[:place]],
    )
    return Composed(manifest, error)


class _WeightedSum:
    """Several adapters as one, by the same words as `Factors`: a module's factors stand side by side.

    Args:
        parts: Adapter directories and their weights.

    Raises:
        MixfuseError: There are not two, a weight is none, a directory is not right, or the bases differ.
    """

    def __init__(self, parts: Sequence[tuple[Path, float]]) -> None:
        if len(parts) < 2:
            raise MixfuseError("compose takes two adapter directories or more")
        for directory, weight in parts:
            if not math.isfinite(weight) or weight == 0:
                raise MixfuseError(f"{directory}: its weight is {weight}; it must be a number other than 0")
        self.adapters = [Factors(directory) for directory, _ in parts]
        self.weights = [weight for _, weight in parts]
        self.rank = sum(adapter.manifest.rank for adapter in self.adapters)
        places: dict[str, Place] = {}
        first = self.adapters[0]
        for adapter in self.adapters:
            places |= adapter.places
            if differing := first.manifest.base.differences(adapter.manifest.base):
                raise MixfuseError(
                    f"{adapter.directory} is of another base model than {first.directory} (their "
                    f"{', '.join(differing)} differ); only adapters of one base can be composed",
                    kind="adapter",
                )
        self.places = dict(sorted(places.items(), key=lambda item: item[1].order))

    def __getitem__(self, module: str) -> Pair:
        found = [adapter[module] if module in adapter.places else None for adapter in self.adapters]
        like = next(pair for pair in found if pair is not None)
        pairs = []
        for adapter, weight, pair in zip(self.adapters, self.weights, found, strict=True):
            rank = adapter.manifest.rank
            nothing = Pair(like.a.new_zeros(rank, like.a.shape[1]), like.b.new_zeros(like.b.shape[0], rank))
            a, b = pair or nothing
            pairs.append(Pair(a, b * weight))
        return stacked(pairs)


def _one_protocol(adapters: Sequence[Factors], role: str) -> dict[str, Any] | None:
    """The judge protocol of an adapter composed of these.

    Raises:
        MixfuseError: There are several, or none and it shall be a judge.
    """
    judges = [adapter for adapter in adapters if adapter.manifest.judge_protocol is not None]
    for judge in judges[1:]:
        if judge.manifest.judge_protocol != judges[0].manifest.judge_protocol:
            raise MixfuseError(
                f"{judge.directory} and {judges[0].directory} were trained with different judge protocols; "
                "train one of them again",
                kind="adapter",
            )
    if role == "judge" and not judges:
        raise MixfuseError("none of the parts was trained with a judge protocol, so together they are no judge")
    return judges[0].manifest.judge_protocol if role == "judge" else None


def _check_free(out: Path) -> None:
    if out.exists():  # said before the work, not after it
        raise MixfuseError(f"{out} exists already; choose another place or remove it first")


def _check_rank(rank: int, way_out: str) -> None:
    if not 0 < rank <= LORA_RANKS[-1]:
        raise MixfuseError(f"rank {rank} is none that vLLM serves (1 to {LORA_RANKS[-1]}); {way_out}")


def _relative_error(source: _WeightedSum, weights: Weights) -> float:
    """‖Δ - Σ wᵢΔᵢ‖ / ‖Σ wᵢΔᵢ‖, from the factors that are about to be written.

    Raises:
        MixfuseError: The parts cancel each other out.
    """
    apart = total = size = 0.0
    for name in tracked(source.places, "checking"):
        wanted = source[name]
        got = Pair(weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"])
        apart += norm(stacked([wanted, Pair(got.a, -got.b)])) ** 2
        total += norm(wanted) ** 2
        for adapter, weight in zip(source.adapters, source.weights, strict=True):
            size += (weight * norm(adapter[name])) ** 2 if name in adapter.places else 0.0
    if total <= _VANISHED**2 * size:
        raise MixfuseError("the parts cancel each other out; nothing would be left", kind="adapter")
    return math.sqrt(apart / total)


class Energy(NamedTuple):
    """How much of a module's ‖Δ‖² a lower rank keeps; gate and up of an expert count together where they share A."""

    place: Place
    kept: float
    total: float

    @property
    def share(self) -> float:
        """Between 0 and 1; a module that did nothing has lost nothing."""
        return self.kept / self.total if self.total else 1.0


class Pruned(NamedTuple):
    """What `prune` made."""

    manifest: Manifest
    energies: tuple[Energy, ...]

    @property
    def share(self) -> float:
        """Of the whole adapter."""
        return _share(self.energies)

    def to_json(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        modules = [{**energy.place._asdict(), "energy_kept": energy.share} for energy in self.energies]
        return {"revision": self.manifest.revision, "energy_kept": self.share, "modules": modules}


def prune(directory: Path, out: Path, *, rank: int) -> Pruned:
    """Makes an adapter of lower rank: in every module the nearest there is.

    Args:
        directory: An adapter directory.
        out: The adapter directory to create.
        rank: Below the adapter's own.

    Raises:
        MixfuseError: The directory is not right, or the rank is not below its own.
    """
    _check_free(out)
    source = Factors(directory)
    manifest = source.manifest
    if not 0 < rank < manifest.rank:
        raise MixfuseError(f"{directory} is of rank {manifest.rank}; choose a rank from 1 to {manifest.rank - 1}")
    reduced = _truncated(source, rank)
    written = _write(
        out,
        source,
        reduced.weights,
        rank,
        role=manifest.role,
        judge_protocol=manifest.judge_protocol,
        recipe={"pruned": {"revision": manifest.revision, "rank": manifest.rank, "recipe": manifest.recipe}},
        metrics={
            "energy_kept": _share(reduced.energies),
            "least_energy_kept": min(energy.share for energy in reduced.energies),
        },
        training_data=manifest.training_data,
    )
    return Pruned(written, reduced.energies)


def print_energies(pruned: Pruned) -> None:
    """Prints what each kind of module has kept, and where least was."""
    from rich.console import Console
    from rich.table import Table

    kinds: dict[str, list[Energy]] = defaultdict(list)
    for energy in pruned.energies:
        kinds[energy.place.projection].append(energy)
    table = Table(title="‖Δ‖² kept")
    for heading in ("module", "of all", "least", "where"):
        table.add_column(heading)
    for kind, energies in kinds.items():
        worst = min(energies, key=lambda energy: energy.share)
        where = f"layer {worst.place.layer}" + ("" if worst.place.expert is None else f", expert {worst.place.expert}")
        table.add_row(kind, f"{_share(energies):.2%}", f"{worst.share:.2%}", where)
    Console().print(table)


class _Reduced(NamedTuple):
    weights: Weights
    energies: tuple[Energy, ...]


def _truncated(source: Factors | _WeightedSum, rank: int) -> _Reduced:
    """Every module's nearest delta of that rank.

    Where w1 and w3 of an expert share their A they go on sharing one: PEFT's fused layout can hold nothing else. Both
    keep the directions that matter most to the two together.
    """
    weights: Weights = {}
    energies = []
    done: set[str] = set()
    for name in tracked(source.places, "reducing"):
        if name in done:
            continue
        place, pair = source.places[name], source[name]
        twin = name.removesuffix("w1") + "w3"
        other = source[twin] if place.projection == "w1" and twin in source.places else None
        if other is not None and torch.equal(pair.a, other.a):
            both = truncated(Pair(pair.a, torch.cat([pair.b, other.b])), rank)
            gate, up = both.pair.b.chunk(2)
            weights |= _named(name, Pair(both.pair.a, gate)) | _named(twin, Pair(both.pair.a.clone(), up))
            done.add(twin)
            energies.append(Energy(place._replace(projection="w1+w3"), both.kept, both.total))
        else:
            least = truncated(pair, rank)
            weights |= _named(name, least.pair)
            energies.append(Energy(place, least.kept, least.total))
    return _Reduced(weights, tuple(energies))


def _share(energies: Iterable[Energy]) -> float:
    kept, total = (sum(column) for column in zip(*((energy.kept, energy.total) for energy in energies), strict=True))
    return kept / total if total else 1.0


def _named(module: str, pair: Pair) -> Weights:
    return {f"{module}.lora_A.weight": pair.a.contiguous(), f"{module}.lora_B.weight": pair.b.contiguous()}


def _write(out: Path, like: Factors, weights: Weights, rank: int, *, role: str, **facts: Any) -> Manifest:
    """Writes factors of scale 1 as an adapter directory of the same base as `like`."""
    check_weights(weights, out)
    modules = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in weights})
    config = {**like.config, "r": rank, "lora_alpha": rank, "target_modules": modules}
    layout = with_fused(weights, config)
    base = like.manifest
    return write_directory(out, layout, Path(base.base_path), base.base, role=role, source=out, **facts)
