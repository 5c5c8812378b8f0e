"""What labelled pairs and a judge's verdicts on them come to, beside rules that look at no content. No calls here.

A judge that favours a position is right in both orders on few pairs, one that favours length is no better
than `longer`, and one that knows an author's style no better than `strongest_member`; the report shows each.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.table import Table

from mixfuse.contracts.calibration import credit
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import Calibration
from mixfuse.fusion.measure.comparisons import Comparison, Label
from mixfuse.fusion.measure.marks import Measure, Views, marks, paired
from mixfuse.fusion.measure.official import official
from mixfuse.fusion.measure.statistics import Clusters, Difference, Estimate, difference

Reading = Literal["logprobs", "parsed", "scores"]
"""What a verdict is read from: the log-probabilities of its token, the text that the judge wrote, or the two scores."""

BINS = 10
MEASURES: tuple[Measure, ...] = ("both_orders_correct", "first_order", "order_averaged", "consistency")
WORDS: Mapping[Measure, str] = {
    "both_orders_correct": "right in both orders",
    "first_order": "right in the first order",
    "order_averaged": "right, orders averaged",
    "consistency": "consistent",
}
"""The measures as the terminal, the report and docs/judging.md call them."""
# By the length of the better answer over that of the worse one: each bin's name and largest ratio.
LENGTHS = (
    ("half as long or less", 0.5),
    ("shorter", 0.9),
    ("as long, within a tenth", 1 / 0.9),
    ("longer", 2.0),
    ("over twice as long", math.inf),
)


class Bin(NamedTuple):
    """Pairs whose verdicts have about the same confidence.

    Attributes:
        low: The lowest confidence, from ½ on.
        high: The highest.
        n: How many pairs.
        confidence: The mean probability that the preferred answer is the better one.
        accuracy: How often it is.
    """

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


class Reliability(NamedTuple):
    """Whether a judge is right as often as its probabilities claim.

    Attributes:
        ece: Expected calibration error (Guo et al. 2017, arXiv 1706.04599): the mean gap between confidence and
            accuracy over bins of equal width, of the order-averaged probability. Resampling can only widen gaps, so the
            interval is biased upwards.
        bins: The bins that hold pairs.
    """

    ece: Estimate
    bins: list[Bin]

    def to_json(self) -> dict[str, Any]:
        """`{"ece", "bins"}`."""
        return {"ece": self.ece.to_json(), "bins": [bin_._asdict() for bin_ in self.bins]}


@dataclass(frozen=True)
class JudgeReport:
    """The figures of a judge. Shares are of the pairs that people did not call a tie, unless stated otherwise.

    Attributes:
        n: Judged pairs that people did not call a tie.
        prompts: The number of their prompts.
        human_ties: Pairs that people called a tie.
        both_orders_correct: Right whichever answer was shown first.
        first_order: Right in the first order; a verdict of exactly ½ or none counts as wrong.
        order_averaged: The mean over both orders is on the right side; exactly ½ counts half.
        consistency: Both orders name the same answer.
        parse_failures: Verdicts (two a pair) that could not be read, including those of failed calls.
        ties: The judge's ties: `share` of the pairs; and if people called some pairs a tie, `of_human_ties` (the share
            of those that the judge calls a tie) and `three_way` (accuracy over all pairs and the three labels).
        kappa: Cohen's kappa of the judge's verdicts (first, second, tie) and the labels, over all pairs: 1 is full
            agreement, 0 what chance alone would bring. None where both are one label throughout.
        reliability: Of the judge's raw probabilities.
        calibrated: Of its calibrated ones, where it has a calibration; the other figures then use it as well.
        by_length: Figures by the length of the better answer over that of the worse one.
        by_source: Estimates by file, and by the rows' `source`.
        official: Public benchmarks' own metrics, over their own rows.
        failed_calls: Calls that failed, by type.
        baselines: The same pairs by rules that read no answer; each with its measure, and with the difference of the
            judge, orders averaged, from it (`judge_minus_rule`).
        against: Other judges on the same pairs, each with its figures and the paired difference.
        views: The verdicts, in the order of the rows.
        calibration: The judge's.
        read: What the verdicts were read from.
    """

    n: int
    prompts: int
    human_ties: int
    both_orders_correct: Estimate
    first_order: Estimate
    order_averaged: Estimate
    consistency: Estimate
    parse_failures: int
    ties: dict[str, Estimate]
    reliability: Reliability
    kappa: Estimate | None = None
    calibrated: Reliability | None = None
    by_length: dict[str, dict[str, Any]] = field(default_factory=dict)
    by_source: dict[str, dict[str, Any]] = field(default_factory=dict)
    official: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed_calls: dict[str, int] = field(default_factory=dict)
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    against: dict[str, dict[str, Any]] = field(default_factory=dict)
    views: list[Views] = field(default_factory=list, repr=False)
    calibration: Calibration | None = None
    read: Reading = "logprobs"

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
            "kappa": self.kappa and self.kappa.to_json(),
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
                shown = Estimate(**value) if isinstance(value, dict) else f"{value:.3f}"
                table.add_row(f"{benchmark}, official: {name.replace('_', ' ')}", str(shown))
        for length, part in self.by_length.items():
            share = Estimate(**part["both_orders_correct"])
            table.add_row(f"by length: {length}", f"{share} ({part['n']} pairs)")
        table.add_section()
        random_ = self.baselines["random"]
        table.add_row(f"a coin, {WORDS['both_orders_correct']}", f"{random_['both_orders_correct']:.3f}")
        table.add_row(f"a coin, {WORDS['first_order']}", f"{random_['first_order']:.3f}")
        for name in ("longer", "shorter", "strongest_member"):
            if name in self.baselines:
                row = self.baselines[name]
                note = f"  ({row['member']}; chosen on these very pairs)" if "member" in row else ""
                table.add_row(name.replace("_", " "), f"{Estimate(**row['both_orders_correct'])}{note}")
        for name, other in self.against.items():
            table.add_section()
            compared_by: tuple[Measure, ...] = ("both_orders_correct", "order_averaged")
            for measure in compared_by:
                words = WORDS[measure]
                table.add_row(f"{name}, {words}", str(Estimate(**other[measure])))
                table.add_row(f"minus {name}, {words}", str(Difference(**other["difference"][measure])))
        return table

    def lines(self) -> list[tuple[str, Estimate]]:
        """The judge's own figures, in words."""
        own = [(WORDS[name], getattr(self, name)) for name in MEASURES]
        ties = {
            "share": "called a tie",
            "of_human_ties": "human ties called a tie",
            "three_way": "right, with ties",
        }
        own += [(ties[name], share) for name, share in self.ties.items()]
        if self.kappa:
            own.append(("Cohen's kappa", self.kappa))
        own.append(("calibration error", self.reliability.ece))
        if self.calibrated:
            own.append(("calibration error, calibrated", self.calibrated.ece))
        return own


def report(
    rows: Sequence[Comparison],
    views: Sequence[Views],
    *,
    failed_calls: Mapping[str, int] | None = None,
    calibration: Calibration | None = None,
    read: Reading = "logprobs",
    against: "Mapping[str, JudgeReport] | None" = None,
) -> JudgeReport:
    """Computes the figures; pure.

    Args:
        rows: The pairs.
        views: The judge's, in the same order.
        failed_calls: Calls that failed, by type.
        calibration: The judge's.
        read: What the verdicts were read from.
        against: Other judges' reports on the same rows, by their names.

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
    own_report = JudgeReport(
        n=len(decided),
        prompts=len({row.prompt for row in decided}),
        human_ties=len(rows) - len(decided),
        **own,
        parse_failures=sum(outcome.parse_failures for outcome in outcomes),
        ties=_ties(rows, views, calibration),
        reliability=_reliability(decided, seen, None, clusters),
        kappa=_kappa(rows, [outcome.winner for outcome in outcomes]),
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
    return compared(rows, own_report, against or {})


def compared(rows: Sequence[Comparison], own: JudgeReport, others: Mapping[str, JudgeReport]) -> JudgeReport:
    """A judge's report, compared with other judges.

    Args:
        rows: The pairs that all of them judged.
        own: The judge's.
        others: The other judges' reports, by their names.
    """

    def beside(other: JudgeReport) -> dict[str, Any]:
        calibrations = (own.calibration, other.calibration)
        gaps = {
            name: paired(rows, own.views, other.views, measure=name, calibrations=calibrations) for name in MEASURES
        }
        figures: dict[str, Any] = {name: getattr(other, name).to_json() for name in MEASURES}
        return {**figures, "difference": {name: gap.to_json() for name, gap in gaps.items()}}

    return replace(own, against={name: beside(other) for name, other in others.items()})


def _ties(rows: Sequence[Comparison], views: Sequence[Views], calibration: Calibration | None) -> dict[str, Estimate]:
    winners = [view.outcome(calibration).winner for view in views]
    prompts = [row.prompt for row in rows]
    decided = [place for place, row in enumerate(rows) if row.label != "tie"]
    human = [place for place, row in enumerate(rows) if row.label == "tie"]

    def called_a_tie(places: Sequence[int]) -> Estimate:
        return Clusters([prompts[place] for place in places]).mean([float(winners[place] == "tie") for place in places])

    shares = {"share": called_a_tie(decided)}
    if human:
        shares["of_human_ties"] = called_a_tie(human)
        right = [float(winner == row.label) for winner, row in zip(winners, rows, strict=True)]
        shares["three_way"] = Clusters(prompts).mean(right)
    return shares


def _kappa(rows: Sequence[Comparison], winners: Sequence[Label]) -> Estimate | None:
    """Cohen's kappa over the three labels (Educational and Psychological Measurement 20, 1960)."""
    places: dict[Label, int] = {"first": 0, "second": 1, "tie": 2}
    cells = np.array([3 * places[row.label] + places[winner] for row, winner in zip(rows, winners, strict=True)])

    def kappa(drawn: npt.NDArray[np.intp]) -> float | None:
        table = np.bincount(cells[drawn], minlength=9).reshape(3, 3) / len(drawn)
        by_chance = float(table.sum(axis=0) @ table.sum(axis=1))
        return None if by_chance > 1 - 1e-12 else (float(np.trace(table)) - by_chance) / (1 - by_chance)

    clusters = Clusters([row.prompt for row in rows])
    return None if kappa(np.arange(len(rows))) is None else clusters.estimate(kappa)


def _reliability(
    rows: Sequence[Comparison], views: Sequence[Views], calibration: Calibration | None, clusters: Clusters
) -> Reliability:
    scores = [view.outcome(calibration).score for view in views]
    confidence = np.array([max(score, 1 - score) for score in scores])
    right = np.array([credit(row.toward_better(score - 0.5)) for score, row in zip(scores, rows, strict=True)])
    bin_of = np.minimum(BINS - 1, ((confidence - 0.5) * 2 * BINS).astype(int))

    def error(indices: npt.NDArray[np.intp]) -> float:
        gaps = np.bincount(bin_of[indices], weights=(right - confidence)[indices], minlength=BINS)
        return float(np.abs(gaps).sum() / len(indices))

    bins = []
    for number in range(BINS):
        inside = bin_of == number
        if inside.any():
            low, high = 0.5 + number / (2 * BINS), 0.5 + (number + 1) / (2 * BINS)
            means = (float(values[inside].mean()) for values in (confidence, right))
            bins.append(Bin(low, high, int(inside.sum()), *means))
    return Reliability(clusters.estimate(error), bins)


def _by_length(
    rows: Sequence[Comparison], views: Sequence[Views], calibration: Calibration | None
) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[int]] = {name: [] for name, _ in LENGTHS}
    for place, row in enumerate(rows):
        ratio = (len(row.better) + 1) / (len(row.worse) + 1)
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
    """Every rule's figures; `judged` are the judge's marks, orders averaged, because a rule has no order to flip."""

    def rule(leanings: Sequence[float]) -> dict[str, Any]:
        marked = [credit(row.toward_better(lean)) for lean, row in zip(leanings, rows, strict=True)]
        figure = clusters.mean(marked).to_json()
        gap = difference([row.prompt for row in rows], judged, marked)
        return {"both_orders_correct": figure, "first_order": figure, "judge_minus_rule": gap.to_json()}

    baselines: dict[str, dict[str, Any]] = {"random": {"both_orders_correct": 0.25, "first_order": 0.5}}
    baselines["longer"] = rule([len(row.first) - len(row.second) for row in rows])
    baselines["shorter"] = rule([len(row.second) - len(row.first) for row in rows])
    if all(row.models for row in rows):
        strength = _win_rates(rows)
        by_name = rule([strength[a] - strength[b] for row in rows for a, b in [row.models or ("", "")]])
        member = max(sorted(strength), key=lambda name: strength[name])
        baselines["strongest_member"] = {**by_name, "member": member, "in_sample": True}
    return baselines


def _win_rates(rows: Sequence[Comparison]) -> dict[str, float]:
    won: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if row.models:
            won[row.models[0]].append(row.label == "first")
            won[row.models[1]].append(row.label == "second")
    return {name: sum(results) / len(results) for name, results in won.items()}
