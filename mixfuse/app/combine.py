"""`mixfuse combiner`: fits a combiner to marked answers, and says what weighing them is worth."""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.extras import needs_extra
from mixfuse.contracts.files import read_json
from mixfuse.contracts.paths import keep_apart
from mixfuse.contracts.strict_yaml import read_mapping
from mixfuse.fusion.calls.upstream import Endpoint
from mixfuse.fusion.config import Agreement
from mixfuse.fusion.store.cache import Cache

if TYPE_CHECKING:
    from rich.table import Table

_MOST_DOMAINS = 200  # a domain is a kind of question: who writes an id there would fit a weight to each question


@dataclass(frozen=True)
class PoolSource:
    """Recorded answers.

    Attributes:
        files: JSONL files, as `pool collect` and `traces export` write them, packed by gzip or not; or folders of them.
        agreement: What makes two answers equal; None to find out from the rows.
        prices: Member → dollars an answer.
        members: Those to use; None for all.
        limit: Read only this many rows of each file.
        price_file: Where prices came from, so that it is not written over.
    """

    files: Sequence[Path]
    agreement: Agreement | None = None
    prices: Mapping[str, float] = field(default_factory=dict)
    members: Sequence[str] | None = None
    limit: int | None = None
    price_file: Path | None = None


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

    if out is not None:
        keep_apart([out], _inputs(source))
        if out.is_file() and out.stat().st_size and not _is_combiner(out):
            raise MixfuseError(f"--out {out} is there and holds no combiner; name another file, or remove it")
    questions, agreement = _read(source)
    with _status(f"fitting to {len(questions)} questions") as notify:
        combiner = fit_combiner(questions, agreement, source.prices, seed=seed, progress=notify)
    if out is not None:
        save(combiner, out)
    return {
        **combiner.figures,
        "agreement": agreement,
        "revision": combiner.revision,
        "out": None if out is None else str(out),
    }


def report(source: PoolSource, out: Path | None, *, seed: int = 0) -> dict[str, Any]:
    """Works out whether a pool is worth fusing, by cross-validation on its own answers.

    Args:
        source: Marked answers.
        out: The folder of the report; None to write none.
        seed: Of the cross-validation.

    Returns:
        The figures, as one JSON object.

    Raises:
        MixfuseError: As `fit`; or the folder cannot be written.
    """
    with needs_extra("measure"):
        from mixfuse.fusion.measure import combiner_report
        from mixfuse.fusion.measure.combiner_fit import cross_validate

    questions, agreement = _read(source)
    with _status(f"fitting to {len(questions)} questions") as notify:
        validated = cross_validate(questions, agreement, source.prices, seed=seed, progress=notify)
        made = combiner_report.of_fit(validated, questions, notify, seed=seed)
    return _reported(made, out, {**_described(source, agreement), "seed": seed}, _inputs(source))


def replay_pool(
    source: PoolSource,
    combiner_file: Path | None,
    out: Path | None,
    *,
    seed: int = 0,
    judge: Endpoint | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Replays recorded answers, through a combiner or, without one, through one that is cross-validated on them.

    Args:
        source: Marked answers.
        combiner_file: The combiner.
        out: The folder of the report; None to write none.
        seed: Of the cross-validation, without a combiner.
        judge: Gives the verdicts of `best_of` in place of those recorded.
        cache: The file of its verdicts.

    Returns:
        The figures, as one JSON object; with verdicts, `best_of` too.

    Raises:
        MixfuseError: As `report`; or the file holds no combiner, or no question has marked answers of all its members,
            or the judge cannot be asked.
    """
    found = _replayed(source, combiner_file, out, seed=seed)
    from mixfuse.fusion.measure import best_of_replay

    members = list(found["members"])
    agreement = source.agreement or found.get("agreement")
    questions, _ = _read(replace(source, members=members, prices={}, agreement=agreement))
    if judge is not None:
        with Cache(cache) as known:
            questions = asyncio.run(best_of_replay.judged(questions, judge, cache=known))
    best_of = best_of_replay.figures(questions, members, found["best_member"])
    return found | ({} if best_of is None else {"best_of": best_of})


def _replayed(source: PoolSource, combiner_file: Path | None, out: Path | None, *, seed: int) -> dict[str, Any]:
    if combiner_file is None:
        return report(source, out, seed=seed)
    with needs_extra("measure"):
        from mixfuse.fusion.measure import combiner_report
    from mixfuse.fusion.combiner.artefact import load

    combiner = load(combiner_file)
    source = replace(source, agreement=source.agreement or combiner.agreement, members=list(combiner.members))
    questions, agreement = _read(source)
    if source.prices:
        combiner = _priced(combiner, source.prices)
    with _status("") as notify:
        made = combiner_report.of_replay(combiner, questions, notify)
    return _reported(
        made, out, {**_described(source, agreement), "revision": combiner.revision}, [*_inputs(source), combiner_file]
    )


def read_prices(words: Sequence[str], file: Path | None) -> dict[str, float]:
    """Prices from `NAME=DOLLARS` words and a YAML or JSON file of names and dollars; the words win.

    Raises:
        MixfuseError: One is no finite number, is negative, or is named twice.
    """
    values: dict[str, Any] = {str(name): value for name, value in read_mapping(file).items()} if file else {}
    named: dict[str, Any] = {}
    for word in words:
        name, separator, value = word.rpartition("=")
        if not separator or not name:
            raise MixfuseError(f"--price {word!r} is not of the form NAME=DOLLARS")
        if name in named:
            raise MixfuseError(f"--price names {name!r} twice")
        named[name] = value
    prices = {}
    for name, value in (values | named).items():
        try:
            price = -1.0 if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            price = -1.0
        if price != 0 and not 1e-12 <= price < 1e9:
            raise MixfuseError(
                f"the price of {name[:80]!r} must be a number of dollars: 0, or from 1e-12 to 1e9 "
                f"(got {str(value)[:80]!r})"
            )
        prices[name] = price
    return prices


def print_figures(figures: Mapping[str, Any]) -> None:
    """Shows the figures as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table("answer chosen", "right", title=f"{figures['n']} questions")
    table.add_row(f"best member ({escape(figures['best_member'])})", _percent(figures["best_member_accuracy"]))
    if figures["best_by_domain"] is not None:
        table.add_row("best member of each domain", _percent(figures["best_by_domain"]))
    table.add_row("majority vote", _percent(figures["majority"]))
    table.add_row("votes weighed by each member's own log-odds", _percent(figures["naive"]))
    table.add_row("weighed by the combiner", _percent(figures["weighed"]))
    table.add_row("some member is right (oracle)", _percent(figures["oracle"]))
    console.print(table)
    if (best_of := figures.get("best_of")) is not None:
        gap = best_of["difference"]
        console.print(
            f"best_of on {best_of['n']} questions with verdicts: {_percent(best_of['accuracy'])}, "
            f"best member {_percent(best_of['best_member_accuracy'])}, {gap['value']:+.3f} "
            f"[{gap['low']:+.3f}, {gap['high']:+.3f}]"
        )
    gap = figures["difference"]
    console.print(f"weighed - best member: {gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}], 95 %")
    fail = figures["all_fail"]
    console.print(
        f"All members fail {_percent(fail['value'])} of the questions (95 %: {_percent(fail['low'])} to "
        f"{_percent(fail['high'])}). No way to choose among their answers can be right on those."
    )
    console.print(f"calibration error of its confidence: {figures['ece']:.3f}")
    if figures["fallback"]:
        console.print(f"The combiner returns {figures['best_member']}'s answers: {figures['fallback']}.", markup=False)
    if figures["curve"]:
        console.print(_curve(figures["curve"]))
    if "by_member" in figures:
        console.print(_worth(figures["by_member"]))
    for sentence in [figures["verdict"], *figures["limits"]]:
        console.print(sentence, markup=False)
    if figures.get("out") and "by_member" in figures:
        console.print(f"{figures['out']}/report.html, report.md, report.json", markup=False, soft_wrap=True)


def _curve(points: Sequence[Mapping[str, Any]]) -> "Table":
    from rich.table import Table

    table = Table("target", "right", "cost / best member's", "members asked", title="asking until sure enough")
    targets: dict[tuple[str, ...], list[str]] = {}
    for point in points:
        ratio = "-" if point["cost_ratio"] is None else f"{point['cost_ratio']:.2f}"
        cells: tuple[str, ...] = (_percent(point["accuracy"]), ratio, f"{point['asked']:.1f}")
        targets.setdefault(cells, []).append(f"{point['target']:g}")
    for cells, several in targets.items():
        table.add_row(" to ".join(dict.fromkeys((several[0], several[-1]))), *cells)
    return table


def _worth(members: Mapping[str, Mapping[str, Any]]) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table("member", "right", "without it", "worth", "95 %", title="who earns its place")
    for name, member in members.items():
        worth, without = member["worth"], member["without"]
        table.add_row(
            escape(name),
            _percent(member["accuracy"]["value"]),
            "-" if without is None else _percent(without["value"]),
            "-" if worth is None else f"{worth['value']:+.3f}",
            "-" if worth is None else f"{worth['low']:+.3f} to {worth['high']:+.3f}",
        )
    return table


def print_json(figures: Mapping[str, Any]) -> None:
    """Prints the figures as one line."""
    print(json.dumps(figures, allow_nan=False))


def _read(source: PoolSource) -> tuple[list[Any], Agreement]:
    from mixfuse.fusion.combiner.evidence import members_of, read_pool, subset

    questions, agreement = read_pool(_files(source.files), source.agreement, limit=source.limit)
    known = members_of(questions)
    for name in (*(source.members or ()), *source.prices):
        if name not in known:
            raise MixfuseError(f"no answer is of a member {name!r}; the members are {_some(known)}")
    for name in source.members or known:
        if source.prices and name not in source.prices:
            raise MixfuseError(f"there is no price of {name!r}; name one for every member, or none")
    questions = subset(questions, source.members) if source.members else questions
    _check_names(questions)
    return questions, agreement


def _files(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and those of folders, each once.

    Raises:
        MixfuseError: A folder holds no data.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")])
            if not inside:
                raise MixfuseError(f"{path} is a folder without a .jsonl file; name the files")
            files += inside
        else:
            files.append(path)
    return list({file.resolve(): file for file in files}.values())


def _check_names(questions: Sequence[Any]) -> None:
    """Refuses names that cannot be shown, and more of them than a combiner has weights for.

    Raises:
        MixfuseError: There are such.
    """
    from mixfuse.fusion.combiner.artefact import LONGEST_NAME, MOST_MEMBERS, is_name
    from mixfuse.fusion.combiner.evidence import members_of

    domains = {question.domain for question in questions if question.domain}
    judges = {comparison.judge for question in questions for comparison in question.comparisons}
    named = {"members": members_of(questions), "domains": sorted(domains), "judges": sorted(judges)}
    for kind, names in named.items():
        if (odd := next((name for name in names if not is_name(name)), None)) is not None:
            raise MixfuseError(
                f"{odd[:80]!a} cannot be the name of one of the {kind}: "
                f"a name has up to {LONGEST_NAME} characters that can be printed"
            )
    for kind, most in (("members", MOST_MEMBERS), ("domains", _MOST_DOMAINS), ("judges", MOST_MEMBERS)):
        if len(named[kind]) > most:
            raise MixfuseError(f"the answers name {len(named[kind])} {kind}, and a combiner weighs at most {most}")


def _is_combiner(path: Path) -> bool:
    """Whether a file holds a combiner, of this version or another."""
    try:
        data = read_json(path)
    except MixfuseError:
        return False
    return isinstance(data, dict) and {"version", "agreement", "members"} <= data.keys()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _reported(made: Any, out: Path | None, settings: dict[str, Any], inputs: Sequence[Path | None]) -> dict[str, Any]:
    """The figures of a report, which is written where a folder is named."""
    with needs_extra("measure"):
        from mixfuse.fusion.measure import combiner_page

    if out is not None:
        for name in combiner_page.FILES:
            keep_apart([out / name], inputs)
        combiner_page.write(out, made, settings)
    return {**settings, **made.to_json(), "out": None if out is None else str(out)}


def _inputs(source: PoolSource) -> list[Path | None]:
    return [*_files(source.files), source.price_file]


def _described(source: PoolSource, agreement: Agreement) -> dict[str, Any]:
    """The source, for a report."""
    return {"data": [str(file) for file in source.files], "agreement": agreement, "prices": dict(source.prices)}


@contextmanager
def _status(words: str) -> Iterator[Callable[[str], None]]:
    """Shows what is being worked out on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status(escape(words)) as status:
        yield lambda now: status.update(escape(now))


def _priced(combiner: Any, prices: Mapping[str, float]) -> Any:
    members = {
        name: member.model_copy(update={"price": prices.get(name, member.price)})
        for name, member in combiner.members.items()
    }
    return combiner.model_copy(update={"members": members})


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
