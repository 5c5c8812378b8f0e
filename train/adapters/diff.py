"""`mixfuse adapter diff`: how two adapters differ, module by module."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mixfuse.contracts import plots
from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.adapters.factors import Factors, Place, inner_product, with_progress


class ModuleDifference(NamedTuple):
    """How two adapters change one module.

    Attributes:
        place: Where the module is.
        norm_a: ‖Δ‖ of the first adapter; 0 if it does not change the module.
        norm_b: ‖Δ‖ of the second.
        inner: The inner product of the two changes.
    """

    place: Place
    norm_a: float
    norm_b: float
    inner: float


@dataclass(frozen=True)
class Difference:
    """How two adapters differ, module by module."""

    a: Factors
    b: Factors
    modules: tuple[ModuleDifference, ...]

    def grouped(self) -> dict[int, dict[str, ModuleDifference]]:
        """Layer → "attention" or an expert's number → the difference over all its modules."""
        groups: dict[tuple[int, str], list[ModuleDifference]] = defaultdict(list)
        for module in self.modules:
            expert = module.place.expert
            groups[module.place.layer, "attention" if expert is None else str(expert)].append(module)
        result: dict[int, dict[str, ModuleDifference]] = defaultdict(dict)
        for (layer, column), members in groups.items():
            result[layer][column] = combined(members)
        return dict(result)

    def to_json(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {
            "a": _described(self.a),
            "b": _described(self.b),
            "same_base": not self.a.manifest.base.differences(self.b.manifest.base),
            "total": _figures(combined(self.modules)),
            "modules": [{**module.place._asdict(), **_figures(module)} for module in self.modules],
        }


def diff(a: Path, b: Path) -> Difference:
    """Compares two adapter directories.

    Raises:
        MixfuseError: One of them is damaged or not an adapter directory, or they fit no common base.
    """
    factors_a, factors_b = Factors(a), Factors(b)
    places = factors_a.places | factors_b.places
    modules = []
    for name in with_progress(sorted(places, key=lambda name: places[name].order), "comparing"):
        pairs = [factors[name] if name in factors.places else None for factors in (factors_a, factors_b)]
        shapes = {(pair.b.shape[0], pair.a.shape[1]) for pair in pairs if pair}
        if len(shapes) > 1:
            raise MixfuseError(f"{a} and {b} change {name} by matrices of other shapes: they are of other base models")
        norms = [math.sqrt(max(inner_product(pair, pair), 0)) if pair else 0.0 for pair in pairs]
        product = inner_product(pairs[0], pairs[1]) if pairs[0] and pairs[1] else 0.0
        modules.append(ModuleDifference(places[name], norms[0], norms[1], product))
    return Difference(factors_a, factors_b, tuple(modules))


def combined(modules: Iterable[ModuleDifference]) -> ModuleDifference:
    """Several modules as one: the squares of norms add up, and so do inner products."""
    members = list(modules)
    norm_a = math.hypot(*(member.norm_a for member in members))
    norm_b = math.hypot(*(member.norm_b for member in members))
    return ModuleDifference(members[0].place, norm_a, norm_b, sum(member.inner for member in members))


def cosine(module: ModuleDifference) -> float | None:
    """The cosine of the angle between the two changes; None if one of them is zero."""
    product = module.norm_a * module.norm_b
    return max(-1.0, min(1.0, module.inner / product)) if product else None


def print_difference(difference: Difference) -> None:
    """Prints both adapters' facts and a table: layers down, attention and experts across."""
    from rich.console import Console
    from rich.table import Table

    facts = Table(title="adapters")
    for heading in ("", "role", "revision", "rank", "alpha/r", "targets", "‖Δ‖"):
        facts.add_column(heading)
    total = combined(difference.modules)
    for name, factors, size in (("A", difference.a, total.norm_a), ("B", difference.b, total.norm_b)):
        row = _described(factors)
        targets = " ".join(row["targets"])
        facts.add_row(name, row["role"], row["revision"], str(row["rank"]), f"{row['scale']:g}", targets, f"{size:.4g}")
    groups = difference.grouped()
    columns = _columns(groups)
    table = Table(title="‖Δ‖ of A and B, cosine of the two")
    table.add_column("layer", justify="right")
    for column in columns:
        table.add_column(column, justify="right")
    for layer, cells in groups.items():
        table.add_row(str(layer), *[_cell(cells.get(column)) for column in columns])
    # In a file or a pipe, the table is as wide as it needs to be.
    console = Console(markup=False, emoji=False)
    console = console if console.is_terminal else Console(width=max(120, 12 + 24 * len(columns)))
    console.print(facts)
    console.print(table)
    angle = cosine(total)
    words = "" if angle is None else f", cosine {angle:.4f}"
    console.print(f"‖A - B‖ = {_figures(total)['norm_of_difference']:.4g}{words}", highlight=False)
    if difference.a.manifest.base.differences(difference.b.manifest.base):
        console.print("The adapters belong to different base models.")


def plot_difference(difference: Difference, path: Path) -> None:
    """Writes three heat maps as a PNG: both adapters' norms, and the cosine; layers down, attention and experts across.

    Args:
        difference: The result of `diff`.
        path: The PNG file.
    """
    groups = difference.grouped()
    columns, layers = _columns(groups), list(groups)
    nothing = ModuleDifference(Place(0, None, ""), 0, 0, 0)
    cells = [[groups[layer].get(column, nothing) for column in columns] for layer in layers]
    norms = [[[getattr(cell, side) for cell in row] for row in cells] for side in ("norm_a", "norm_b")]
    angles = [[math.nan if (angle := cosine(cell)) is None else angle for cell in row] for row in cells]
    largest = max(map(max, norms[0] + norms[1]))
    panels = [
        plots.HeatMap(f"‖Δ‖, A: {difference.a.manifest.revision}", norms[0], high=largest),
        plots.HeatMap(f"‖Δ‖, B: {difference.b.manifest.revision}", norms[1], high=largest),
        plots.HeatMap("cosine of A and B", angles, low=-1.0, high=1.0, colours="coolwarm"),
    ]
    names = ["att" if column == "attention" else column for column in columns]
    plots.save(plots.heat_maps(panels, columns=names, rows=layers, across="attention, experts"), path)


def _columns(groups: dict[int, dict[str, ModuleDifference]]) -> list[str]:
    return sorted(
        {column for cells in groups.values() for column in cells}, key=lambda c: (c != "attention", len(c), c)
    )


def _cell(module: ModuleDifference | None) -> str:
    if module is None:
        return ""
    angle = cosine(module)
    return f"{module.norm_a:.3g} {module.norm_b:.3g} " + ("-" if angle is None else f"{angle:.2f}")


def _figures(module: ModuleDifference) -> dict[str, float | None]:
    squared = module.norm_a**2 + module.norm_b**2 - 2 * module.inner
    return {
        "norm_a": module.norm_a,
        "norm_b": module.norm_b,
        "norm_of_difference": math.sqrt(max(squared, 0)),
        "cosine": cosine(module),
    }


def _described(factors: Factors) -> dict[str, Any]:
    manifest = factors.manifest
    targets = sorted({place.projection for place in factors.places.values()})
    facts = {"role": manifest.role, "revision": manifest.revision, "rank": manifest.rank}
    return {"directory": str(factors.directory), **facts, "scale": factors.scale, "targets": targets}
