"""How good a judge is: both orders of labelled pairs, beside rules that look at no content.

A judge that favours a position is right in both orders on few pairs, one that favours length is no better
than `longer`, and one that knows an author's style no better than `strongest_member`; the report shows each.
"""

import asyncio
import hashlib
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from rich.table import Table

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import Calibration, comparison, new_nonce
from mixfuse.contracts.progress import bar as progress_bar
from mixfuse.fusion.answering.verdicts import (
    LOGPROB_PARAMETERS,
    WRITTEN_PARAMETERS,
    JudgeEndpoint,
    NoLogprobsError,
    OrderedPair,
    logprob_verdict,
    written_verdict,
)
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import Ledger
from mixfuse.fusion.calls.pool import all_or_raise, fan_out
from mixfuse.fusion.calls.upstream import Client, Endpoint, Purpose, http_client
from mixfuse.fusion.measure.comparisons import Comparison, Measure, Views, credit, load, marks
from mixfuse.fusion.measure.official import official
from mixfuse.fusion.measure.statistics import Clusters, Difference, Figure, difference, paired
from mixfuse.fusion.store.cache import Cache

__all__ = ["Comparison", "JudgeReport", "Views", "evaluate", "load", "paired", "report"]

BINS = 10
MEASURES: tuple[Measure, ...] = ("both_orders_correct", "first_order", "order_averaged", "consistency")
# How long the better answer is beside the worse one: the ratio up to which each bin reaches.
LENGTHS = (
    ("half as long or less", 0.5),
    ("shorter", 0.9),
    ("as long, within a tenth", 1 / 0.9),
    ("longer", 2.0),
    ("over twice as long", math.inf),
)


class Bin(NamedTuple):
    """Pairs with verdicts of like confidence.

    Attributes:
        low: The least confidence, from ½ on.
        high: The most.
        n: How many pairs.
        confidence: Their mean probability that the answer preferred is the better one.
        accuracy: How often it is.
    """

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


class Reliability(NamedTuple):
    """Whether a judge is right as often as it says.

    Attributes:
        ece: Expected calibration error (Guo et al. 2017, arXiv 1706.04599): the mean gap between confidence and
            accuracy over bins of equal width, of the order-averaged probability. Resampling can only widen gaps, so its
            interval lies high.
        bins: Those that hold pairs.
    """

    ece: Figure
    bins: list[Bin]

    def to_json(self) -> dict[str, Any]:
        """`{"ece", "bins"}`."""
        return {"ece": self.ece.to_json(), "bins": [one._asdict() for one in self.bins]}


@dataclass(frozen=True)
class JudgeReport:
    """What an evaluation came to; shares are of the pairs that people did not call a tie, unless they say otherwise.

    Attributes:
        n: Pairs judged that people did not call a tie.
        prompts: Prompts they are of.
        human_ties: Pairs that people called a tie.
        both_orders_correct: Right whichever answer was shown first.
        first_order: Right in the first order; a verdict of exactly ½ or none counts as wrong.
        order_averaged: The mean over both orders is on the right side; exactly ½ counts half.
        consistency: Both orders name the same answer.
        parse_failures: Verdicts, two a pair, that could not be read; those of failed calls among them.
        ties: The judge's ties: `share` of the pairs; where people have ties, too, `of_human_ties` (how many of those
            the judge calls a tie) and `three_way` (first, second or tie as people say, over all pairs).
        reliability: Of the judge's probabilities as they are.
        calibrated: The same after its calibration, where it has one; the other figures are with it as well.
        by_length: By how long the better answer is beside the worse one.
        by_source: By file, and by what the rows call their source.
        official: Public benchmarks' own metrics, of the rows that are theirs.
        failed_calls: Calls that failed, by type.
        baselines: The same pairs by rules that read nothing; each names its measure, and by how much the judge, orders
            averaged, does better (`judge_minus_rule`).
        against: Other judges on the same pairs, each with its figures and the paired difference.
        views: The verdicts, in the order of the rows.
        calibration: The judge's.
        read: What the verdicts were read from: log-probabilities, or what the judge wrote where there are none.
    """

    n: int
    prompts: int
    human_ties: int
    both_orders_correct: Figure
    first_order: Figure
    order_averaged: Figure
    consistency: Figure
    parse_failures: int
    ties: dict[str, Figure]
    reliability: Reliability
    calibrated: Reliability | None = None
    by_length: dict[str, dict[str, Any]] = field(default_factory=dict)
    by_source: dict[str, dict[str, Any]] = field(default_factory=dict)
    official: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed_calls: dict[str, int] = field(default_factory=dict)
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    against: dict[str, dict[str, Any]] = field(default_factory=dict)
    views: list[Views] = field(default_factory=list, repr=False)
    calibration: Calibration | None = None
    read: Literal["logprobs", "parsed"] = "logprobs"

    def to_json(self) -> dict[str, Any]:
        """One JSON object, without the verdicts; every accuracy is `{"value", "low", "high"}`."""
        return {
            "n": self.n,
            "prompts": self.prompts,
            "human_ties": self.human_ties,
            **{name: getattr(self, name).to_json() for name in MEASURES},
            "read": self.read,
            "parse_failures": self.parse_failures,
            "failed_calls": self.failed_calls,
            "ties": {name: figure.to_json() for name, figure in self.ties.items()},
            "calibration": {
                "raw": self.reliability.to_json(),
                "calibrated": self.calibrated and self.calibrated.to_json(),
                "parameters": self.calibration and self.calibration.model_dump(),
            },
            "by_length": self.by_length,
            "by_source": self.by_source,
            "official": self.official,
            "baselines": self.baselines,
            "against": self.against,
        }

    def table(self) -> Table:
        """The report for the terminal."""
        title = f"{self.n} pairs of {self.prompts} prompts, and {self.human_ties} human ties"
        table = Table(title=title, title_justify="left")
        table.add_column("")
        table.add_column("share, 95 % interval over prompts")
        for words, figure in self.lines():
            table.add_row(words, str(figure))
        table.add_row("verdicts not read", f"{self.parse_failures} of {2 * (self.n + self.human_ties)}")
        for kind, count in self.failed_calls.items():
            table.add_row(f"calls failed: {kind}", str(count))
        for benchmark, metrics in self.official.items():
            table.add_section()
            for name, value in metrics.items():
                shown = Figure(**value) if isinstance(value, dict) else f"{value:.3f}"
                table.add_row(f"{benchmark}, official: {name.replace('_', ' ')}", str(shown))
        table.add_section()
        random_ = self.baselines["random"]
        table.add_row("random, both orders", f"{random_['both_orders_correct']:.3f}")
        table.add_row("random, first order", f"{random_['first_order']:.3f}")
        for name in ("longer", "shorter", "strongest_member"):
            if name in self.baselines:
                row = self.baselines[name]
                note = f"  ({row['member']}; chosen on these very pairs)" if "member" in row else ""
                table.add_row(name.replace("_", " "), f"{Figure(**row['both_orders_correct'])}{note}")
        for name, other in self.against.items():
            table.add_section()
            for measure in ("both_orders_correct", "order_averaged"):
                words = measure.replace("_", " ")
                table.add_row(f"{name}, {words}", str(Figure(**other[measure])))
                table.add_row(f"this judge minus {name}, {words}", str(Difference(**other["difference"][measure])))
        return table

    def lines(self) -> list[tuple[str, Figure]]:
        """The judge's own figures, in words."""
        words = ("right in both orders", "right in the first order", "right, orders averaged", "consistent")
        own = [(word, getattr(self, name)) for word, name in zip(words, MEASURES, strict=True)]
        said = {
            "share": "called a tie",
            "of_human_ties": "human ties called a tie",
            "three_way": "right, with ties",
        }
        own += [(said[name], figure) for name, figure in self.ties.items()]
        own.append(("calibration error", self.reliability.ece))
        if self.calibrated:
            own.append(("calibration error, calibrated", self.calibrated.ece))
        return own


async def evaluate(
    judge_endpoint: Endpoint,
    rows: Sequence[Comparison],
    *,
    concurrency: int = 8,
    progress: bool = True,
    cache: Cache | None = None,
    name: str = "the judge",
) -> JudgeReport:
    """Has a judge compare every pair in both orders, human ties as well.

    A judge whose endpoint gives no log-probabilities writes its verdicts; its probabilities are then 0 and 1.

    Args:
        judge_endpoint: The judge, with its calibration where it has one.
        rows: From `load`.
        concurrency: Calls under way at once.
        progress: Show a bar on stderr.
        cache: Entered; verdicts that are in it are not asked for again. Where the endpoint has no revision, its URL
            and model stand for it.
        name: What the bar calls it.

    Raises:
        MixfuseError: There is nothing to judge, the judge cannot be reached, or all its calls failed.
    """
    if all(row.label == "tie" for row in rows):
        raise MixfuseError("no pair is left to judge: none has a label other than a tie")
    free = asyncio.Semaphore(concurrency)
    failures: list[CallError] = []
    purpose = Purpose("verdict", "judge")

    judge = judge_endpoint.revision or f"{judge_endpoint.base_url} {judge_endpoint.model}"
    no_logprobs = {"judge": judge, "gives": "log-probabilities"}
    read: Literal["logprobs", "parsed"] = "parsed" if cache and cache.get(no_logprobs) else "logprobs"

    async def view(client: Client, order: _Order) -> float | None:
        nonlocal read
        try:
            async with free:
                question = order.question(judge, read)
                if told := cache and cache.get(question):
                    return None if told.value is None else float(told.value)
                ask = logprob_verdict if read == "logprobs" else written_verdict
                pair = OrderedPair(order.prompt, order.first, order.second, nonce=order.nonce)
                p = await ask(JudgeEndpoint(client, judge_endpoint, purpose, Ledger()), pair)
        except NoLogprobsError:
            if read == "logprobs" and cache:
                cache.put(no_logprobs, True)
            read = "parsed"
            return await view(client, order)
        if cache:
            cache.put(question, p)
        return p

    async def one(client: Client, order: _Order) -> float | None:
        try:
            return await view(client, order)
        except CallError as error:
            if error.kind == "unreachable":  # nor will the next thousand calls reach it
                raise
            failures.append(error)
            return None
        finally:
            bar.advance(shown)

    with progress_bar(progress) as bar:
        shown = bar.add_task(f"verdicts of {name}", total=2 * len(rows))
        async with http_client() as client:
            asked = [one(client, order) for order in _orders(rows)]
            views = all_or_raise(await fan_out(asked, quorum=len(asked)))
    if len(failures) == len(asked):
        raise MixfuseError(f"every call to the judge failed, the last: {failures[-1]}", kind="judge_failed")
    return report(
        rows,
        [Views(*both) for both in zip(views[::2], views[1::2], strict=True)],
        failed_calls=Counter(failure.kind for failure in failures),
        calibration=judge_endpoint.calibration,
        read=read,
    )


def known(revision: str, rows: Sequence[Comparison], cache: Cache) -> bool:
    """Whether a cache holds every verdict of a judge's revision on these rows, so that nobody needs to serve it."""
    return all(cache.holds(order.question(revision, "logprobs")) for order in _orders(rows))


class _Order(NamedTuple):
    """One order of one pair."""

    prompt: str
    first: str
    second: str
    nonce: str

    def question(self, judge: str, read: Literal["logprobs", "parsed"]) -> dict[str, Any]:
        """What a verdict is kept under."""
        messages = comparison(self.prompt, self.first, self.second, nonce=self.nonce)
        parameters = LOGPROB_PARAMETERS if read == "logprobs" else WRITTEN_PARAMETERS
        return {"judge": judge, "messages": messages, "parameters": parameters}


def _orders(rows: Sequence[Comparison]) -> Iterator[_Order]:
    """Both orders of every pair, side by side; they share a nonce, so that a prefix cache serves both."""
    for row in rows:
        nonce = _nonce(row)
        yield _Order(row.prompt, row.first, row.second, nonce)
        yield _Order(row.prompt, row.second, row.first, nonce)


def _nonce(row: Comparison) -> str:
    """The same in every run, so that a run can be repeated; nobody could have known it who wrote these answers."""
    texts = (row.prompt, row.first, row.second)
    seed = hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).digest()
    return new_nonce(*texts, draw=random.Random(seed).randbytes)  # noqa: S311 - guards a measurement, not a service


def report(
    rows: Sequence[Comparison],
    views: Sequence[Views],
    *,
    failed_calls: Mapping[str, int] | None = None,
    calibration: Calibration | None = None,
    read: Literal["logprobs", "parsed"] = "logprobs",
    against: "Mapping[str, JudgeReport] | None" = None,
) -> JudgeReport:
    """Works out the figures; pure.

    Args:
        rows: What was judged.
        views: The judge's, in the same order.
        failed_calls: Calls that failed, by type.
        calibration: The judge's.
        read: What the verdicts were read from.
        against: Other judges' reports on the same rows, by what they are to be called.

    Raises:
        MixfuseError: No row has a label other than a tie.
    """
    both = [(row, view) for row, view in zip(rows, views, strict=True) if row.label != "tie"]
    if not both:
        raise MixfuseError("no pair is left to judge: none has a label other than a tie")
    decided, seen = [row for row, _ in both], [view for _, view in both]
    clusters = Clusters([row.prompt for row in decided])
    outcomes = [view.outcome(calibration) for view in views]
    own: dict[str, Any] = {name: clusters.mean(marks(decided, seen, name, calibration)) for name in MEASURES}
    found = JudgeReport(
        n=len(decided),
        prompts=len({row.prompt for row in decided}),
        human_ties=len(rows) - len(decided),
        **own,
        parse_failures=sum(outcome.parse_failures for outcome in outcomes),
        ties=_ties(rows, views, calibration),
        reliability=_reliability(decided, seen, None, clusters),
        calibrated=_reliability(decided, seen, calibration, clusters) if calibration else None,
        by_length=_by_length(decided, seen, calibration),
        by_source=_by_source(decided, seen, calibration),
        official=official(rows, views),
        failed_calls=dict(failed_calls or {}),
        baselines=_baselines(decided, clusters, marks(decided, seen, "order_averaged", calibration)),
        views=list(views),
        calibration=calibration,
        read=read,
    )
    return compared(rows, found, against or {})


def compared(rows: Sequence[Comparison], own: JudgeReport, others: Mapping[str, JudgeReport]) -> JudgeReport:
    """A judge's report, with other judges beside it.

    Args:
        rows: What all of them judged.
        own: The judge's.
        others: The others', by what they are to be called.
    """

    def beside(other: JudgeReport) -> dict[str, Any]:
        calibrations = (own.calibration, other.calibration)
        gaps = {
            name: paired(rows, own.views, other.views, measure=name, calibrations=calibrations) for name in MEASURES
        }
        figures: dict[str, Any] = {name: getattr(other, name).to_json() for name in MEASURES}
        return {**figures, "difference": {name: gap.to_json() for name, gap in gaps.items()}}

    return replace(own, against={name: beside(other) for name, other in others.items()})


def _ties(rows: Sequence[Comparison], views: Sequence[Views], calibration: Calibration | None) -> dict[str, Figure]:
    said = [view.outcome(calibration).winner for view in views]
    prompts = [row.prompt for row in rows]
    decided = [place for place, row in enumerate(rows) if row.label != "tie"]
    human = [place for place, row in enumerate(rows) if row.label == "tie"]

    def called_a_tie(places: Sequence[int]) -> Figure:
        return Clusters([prompts[place] for place in places]).mean([float(said[place] == "tie") for place in places])

    found = {"share": called_a_tie(decided)}
    if human:
        found["of_human_ties"] = called_a_tie(human)
        right = [float(one == row.label) for one, row in zip(said, rows, strict=True)]
        found["three_way"] = Clusters(prompts).mean(right)
    return found


def _reliability(
    rows: Sequence[Comparison], views: Sequence[Views], calibration: Calibration | None, clusters: Clusters
) -> Reliability:
    scores = [view.outcome(calibration).score for view in views]
    sure = [max(score, 1 - score) for score in scores]
    right = [credit(score - 0.5, row) for score, row in zip(scores, rows, strict=True)]
    place = [min(BINS - 1, int((confidence - 0.5) * 2 * BINS)) for confidence in sure]

    def error(indices: Sequence[int]) -> float:
        gaps = [0.0] * BINS
        for index in indices:
            gaps[place[index]] += right[index] - sure[index]
        return sum(map(abs, gaps)) / len(indices)

    bins = []
    for number in range(BINS):
        inside = [index for index, found in enumerate(place) if found == number]
        if inside:
            low, high = 0.5 + number / (2 * BINS), 0.5 + (number + 1) / (2 * BINS)
            means = (sum(values[index] for index in inside) / len(inside) for values in (sure, right))
            bins.append(Bin(low, high, len(inside), *means))
    return Reliability(clusters.of(error), bins)


def _by_length(
    rows: Sequence[Comparison], views: Sequence[Views], calibration: Calibration | None
) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[int]] = {name: [] for name, _ in LENGTHS}
    for place, row in enumerate(rows):
        better, worse = (row.first, row.second) if row.label == "first" else (row.second, row.first)
        ratio = (len(better) + 1) / (len(worse) + 1)
        groups[next(name for name, most in LENGTHS if ratio <= most)].append(place)
    return {name: _part(places, rows, views, calibration) for name, places in groups.items() if places}


def _by_source(
    rows: Sequence[Comparison], views: Sequence[Views], calibration: Calibration | None
) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        groups[row.file].append(place)
        if row.source:
            groups[f"{row.file}: {row.source}"].append(place)
    return {name: _part(places, rows, views, calibration) for name, places in sorted(groups.items())}


def _part(
    places: Sequence[int], rows: Sequence[Comparison], views: Sequence[Views], calibration: Calibration | None
) -> dict[str, Any]:
    inside, seen = [rows[place] for place in places], [views[place] for place in places]
    clusters = Clusters([row.prompt for row in inside])
    figures: dict[str, Any] = {name: clusters.mean(marks(inside, seen, name, calibration)) for name in MEASURES}
    return {"n": len(inside), **{name: figure.to_json() for name, figure in figures.items()}}


def _baselines(rows: Sequence[Comparison], clusters: Clusters, judged: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Every rule's figures; `judged` are the judge's marks, orders averaged: a rule knows no order, so that is fair."""

    def rule(leanings: Sequence[float]) -> dict[str, Any]:
        marked = [credit(leaning, row) for leaning, row in zip(leanings, rows, strict=True)]
        figure = clusters.mean(marked).to_json()
        gap = difference([row.prompt for row in rows], judged, marked)
        return {"both_orders_correct": figure, "first_order": figure, "judge_minus_rule": gap.to_json()}

    found: dict[str, dict[str, Any]] = {"random": {"both_orders_correct": 0.25, "first_order": 0.5}}
    found["longer"] = rule([len(row.first) - len(row.second) for row in rows])
    found["shorter"] = rule([len(row.second) - len(row.first) for row in rows])
    if all(row.models for row in rows):
        strength = _win_rates(rows)
        by_name = rule([strength[a] - strength[b] for row in rows for a, b in [row.models or ("", "")]])
        member = max(sorted(strength), key=lambda name: strength[name])
        found["strongest_member"] = {**by_name, "member": member, "in_sample": True}
    return found


def _win_rates(rows: Sequence[Comparison]) -> dict[str, float]:
    won: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if row.models:
            won[row.models[0]].append(row.label == "first")
            won[row.models[1]].append(row.label == "second")
    return {name: sum(results) / len(results) for name, results in won.items()}
