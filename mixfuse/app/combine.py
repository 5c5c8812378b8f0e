"""`mixfuse combiner`: fits a combiner to marked answers, and says what weighing them is worth."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.extras import needs_extra
from mixfuse.contracts.strict_yaml import read_mapping
from mixfuse.fusion.config import Agreement


@dataclass(frozen=True)
class PoolSource:
    """Recorded answers.

    Attributes:
        files: JSONL files, as `pool collect` and `traces export` write them.
        agreement: What makes two answers equal; None to find out from the rows.
        prices: Member → dollars an answer.
        members: Those to use; None for all.
    """

    files: Sequence[Path]
    agreement: Agreement | None = None
    prices: Mapping[str, float] = field(default_factory=dict)
    members: Sequence[str] | None = None


def fit(source: PoolSource, out: Path | None, *, seed: int = 0) -> dict[str, Any]:
    """Fits a combiner, with its policies and cross-validated figures.

    Args:
        source: Marked answers.
        out: Where the combiner is written; None to write none.
        seed: Of the cross-validation.

    Returns:
        The figures, as one JSON object.

    Raises:
        MixfuseError: The rows have another shape or too few are marked, or a price names no member.
    """
    with needs_extra("measure"):
        from mixfuse.fusion.measure.combiner_fit import fit_combiner
    from mixfuse.fusion.combiner.artefact import save

    if out is not None and out.resolve() in {file.resolve() for file in source.files}:
        raise MixfuseError(f"--out {out} is one of the data files and would be overwritten; name another file")
    questions, agreement = _read(source)
    combiner = fit_combiner(questions, agreement, source.prices, seed=seed)
    if out is not None:
        save(combiner, out)
    return {**combiner.figures, "revision": combiner.revision, "out": None if out is None else str(out)}


def replay_pool(source: PoolSource, combiner_file: Path | None, *, seed: int = 0) -> dict[str, Any]:
    """Replays recorded answers, through a combiner or, without one, through one that is cross-validated on them.

    Returns:
        The figures, as one JSON object.

    Raises:
        MixfuseError: As `fit`; or the file holds no combiner, or no question has marked answers of all its members.
    """
    if combiner_file is None:
        return fit(source, None, seed=seed)
    with needs_extra("measure"):
        from mixfuse.fusion.measure.combiner_replay import replay
    from mixfuse.fusion.combiner.artefact import load

    combiner = load(combiner_file)
    source = replace(source, agreement=source.agreement or combiner.agreement, members=list(combiner.members))
    questions, _ = _read(source)
    if source.prices:
        combiner = _priced(combiner, source.prices)
    return {**replay(combiner, questions).to_json(), "revision": combiner.revision}


def read_prices(words: Sequence[str], file: Path | None) -> dict[str, float]:
    """Prices from `NAME=DOLLARS` words and a YAML or JSON file of names and dollars; the words win.

    Raises:
        MixfuseError: One is no finite number, or is negative.
    """
    values: dict[str, Any] = dict(read_mapping(file)) if file else {}
    for word in words:
        name, separator, value = word.rpartition("=")
        if not separator or not name:
            raise MixfuseError(f"--price {word!r} is not of the form NAME=DOLLARS")
        values[name] = value
    prices = {}
    for name, value in values.items():
        try:
            price = -1.0 if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            price = -1.0
        if not 0 <= price < 1e9:
            raise MixfuseError(f"the price of {name!r} must be a number of dollars, not below 0 (got {value!r})")
        prices[str(name)] = price
    return prices


def print_figures(figures: Mapping[str, Any]) -> None:
    """Shows the figures as a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("answer chosen", "right", title=f"{figures['n']} questions")
    table.add_row(f"best member ({figures['best_member']})", _percent(figures["best_member_accuracy"]))
    table.add_row("majority vote", _percent(figures["majority"]))
    table.add_row("votes weighed by each member's own log-odds", _percent(figures["naive"]))
    table.add_row("weighed by the combiner", _percent(figures["weighed"]))
    table.add_row("some member is right (oracle)", _percent(figures["oracle"]))
    console.print(table)
    gap = figures["difference"]
    console.print(f"weighed - best member: {gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}], 95 %")
    console.print(f"calibration error of its confidence: {figures['ece']:.3f}")
    if figures["fallback"]:
        console.print(f"The combiner returns {figures['best_member']}'s answers: {figures['fallback']}.", markup=False)
    if figures["curve"]:
        curve = Table("target", "right", "cost / best member's", "members asked", title="asking until sure enough")
        for point in figures["curve"]:
            curve.add_row(
                f"{point['target']:.2f}",
                _percent(point["accuracy"]),
                "-" if point["cost_ratio"] is None else f"{point['cost_ratio']:.2f}",
                f"{point['asked']:.1f}",
            )
        console.print(curve)
    for sentence in [figures.get("verdict", ""), *figures.get("limits", [])]:
        if sentence:
            console.print(sentence, markup=False)


def print_json(figures: Mapping[str, Any]) -> None:
    """Prints the figures as one line."""
    print(json.dumps(figures, allow_nan=False))


def _read(source: PoolSource) -> tuple[list[Any], Agreement]:
    from mixfuse.fusion.combiner.evidence import members_of, read_pool, subset

    questions, agreement = read_pool(source.files, source.agreement)
    known = members_of(questions)
    for name in (*(source.members or ()), *source.prices):
        if name not in known:
            raise MixfuseError(f"no answer is of a member {name!r}; the members are {', '.join(known)}")
    for name in source.members or known:
        if source.prices and name not in source.prices:
            raise MixfuseError(f"there is no price of {name!r}; name one for every member, or none")
    return (subset(questions, source.members) if source.members else questions), agreement


def _priced(combiner: Any, prices: Mapping[str, float]) -> Any:
    members = {
        name: member.model_copy(update={"price": prices.get(name, member.price)})
        for name, member in combiner.members.items()
    }
    return combiner.model_copy(update={"members": members})


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
