"""The pages of a report on whether a pool is worth fusing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixfuse.contracts import plots
from mixfuse.contracts.plots import Mark, Point
from mixfuse.contracts.report import Block, Plot, Section, Table
from mixfuse.contracts.report import write as write_report
from mixfuse.fusion.measure.combiner_report import Member, Report
from mixfuse.fusion.measure.statistics import Difference, Estimate

FILES = ("report.md", "report.html", "report.json", "ways.svg", "cost.svg", "confidence.svg")
_WAYS = {
    "best_member": "the best member",
    "best_by_domain": "the best member of each domain",
    "majority": "majority vote",
    "naive": "votes weighed by each member's own log-odds",
    "weighed": "weighed by the combiner",
    "oracle": "some member is right (oracle)",
}
_MOST_DOMAINS = 50
READING = (
    "Each way chooses one of the answers in hand. The best member was chosen on all these questions, which flatters it "
    "a little; the best member of each domain was chosen on other questions. Intervals are 95 %, by drawing questions "
    "with replacement."
)


def write(out: Path, report: Report, settings: dict[str, Any]) -> None:
    """Writes `report.md`, `report.html`, `report.json` and the plots.

    Args:
        out: The folder.
        report: The figures.
        settings: What they were worked out from, for `report.json`.

    Raises:
        MixfuseError: The folder cannot be written.
    """
    write_report(out, "Is this pool worth fusing?", sections(report), {**settings, **report.to_json()})


def sections(report: Report) -> list[Section]:
    """The report for people."""
    parts = [
        Section("Summary", _summary(report)),
        Section("Ways to choose an answer", _ways(report)),
        Section("Accuracy over cost", _cost(report)),
        Section("Is its confidence right?", _confidence(report)),
        Section("Which members earn their place", _members(report)),
    ]
    if report.domains:
        parts.append(Section("By domain", _domains(report)))
    parts.append(Section("What these answers cannot show", _limits(report)))
    return parts


def _summary(report: Report) -> list[Block]:
    figures = report.figures
    return [
        report.verdict.words,
        f"{figures.n} questions are marked throughout. All members fail {_percent(figures.all_fail)} of them. No way "
        f"to choose among these answers can be right on more than {100 * (1 - figures.all_fail.low):.1f} %; only a "
        "better member helps there.",
        *([f"A combiner fitted to them returns {figures.best_member}'s answers: {figures.fallback}."]
          if figures.fallback else []),
        *earning(report),
    ]  # fmt: skip


def earning(report: Report) -> list[str]:
    """Which members earn their place, in sentences; none where it could not be worked out."""
    known = {name: member.worth for name, member in report.members.items() if member.worth is not None}
    if report.verdict.choice != "fuse" or not known:
        return []
    earn = [name for name, worth in known.items() if worth.low > 0]
    idle = [name for name, worth in known.items() if worth.low <= 0]
    sentences = [f"Shown to earn their place: {', '.join(earn) or 'none of them, one by one'}."]
    if idle:
        sentences.append(
            f"Not shown to: {', '.join(idle)}. Two members that repeat each other both look idle, but one of them may "
            "be needed: leave out one at a time and look again."
        )
    return [" ".join(sentences)]


def _ways(report: Report) -> list[Block]:
    marks = [Mark(_named(report, name), estimate, muted=name != "weighed") for name, estimate in report.ways.items()]
    gaps = [
        ("weighed - best member", report.figures.difference),
        ("weighed - majority", report.figures.majority_difference),
    ]
    if report.figures.fallback:
        gaps.append(("weighed - best member, if the weighing were trusted", report.weighing))
    return [
        READING,
        Table(
            ("the answer of", "right, 95 % interval"), [(mark.label, str(Estimate(*mark.estimate))) for mark in marks]
        ),
        Plot("ways.svg", plots.intervals(marks), "Share of right answers, with 95 % intervals"),
        Table(
            ("", "difference, 95 % interval, p", "better on", "worse on"),
            [(words, str(gap), str(gap.better), str(gap.worse)) for words, gap in gaps],
        ),
    ]


def _cost(report: Report) -> list[Block]:
    figures = report.figures
    targets: dict[tuple[str, str, str], list[str]] = {}
    for point, estimate in zip(figures.curve, report.curve, strict=True):
        ratio = "-" if point.cost_ratio is None else f"{point.cost_ratio:.2f}"
        targets.setdefault((str(estimate), ratio, f"{point.asked:.2f}"), []).append(f"{point.target:g}")
    rows = [(" to ".join(dict.fromkeys((several[0], several[-1]))), *cells) for cells, several in targets.items()]
    if not rows:
        return ["There is no curve: no policy was worked out."]
    blocks: list[Block] = [
        f"Members are asked one after another until the answer is as probable as the target. Cost is over that of "
        f"asking {figures.best_member} alone. Targets that come to the same are one line."
    ]
    priced = [
        (point.cost_ratio, estimate)
        for point, estimate in zip(figures.curve, report.curve, strict=True)
        if point.cost_ratio is not None
    ]
    unit = report.members[figures.best_member].price
    if priced and unit:
        members = [(Mark(name, member.accuracy), member.price / unit) for name, member in report.members.items()]
        everyone = sum(member.price for member in report.members.values()) / unit
        members.append((Mark("all, weighed", report.ways["weighed"]), everyone))
        blocks.append(
            Plot(
                "cost.svg",
                plots.tradeoff(priced, members, across=f"cost over {figures.best_member}'s"),
                "Share of right answers over cost; the line is asking one after another, with 95 % intervals",
            )
        )
    return [*blocks, Table(("target", "right, 95 % interval", "cost ratio", "members asked"), rows)]


def _confidence(report: Report) -> list[Block]:
    n = report.figures.n
    points = [Point(bin_.confidence, bin_.accuracy, bin_.n / n) for bin_ in report.reliability]
    rows = [
        (f"{bin_.low:.1f} to {bin_.high:.1f}", str(bin_.n), f"{bin_.confidence:.3f}", f"{bin_.accuracy:.3f}")
        for bin_ in report.reliability
    ]
    return [
        f"Expected calibration error with every member asked: {report.figures.ece:.3f}. Were every confidence exactly "
        f"right, chance alone would make it {report.figures.ece_chance:.3f} on so few questions. On the dashed line "
        "answers are right as often as the confidence says.",
        Plot(
            "confidence.svg",
            plots.reliability({"weighed": points}, least=0.0),
            "Share of right answers by confidence; the area of a point shows how many answers it stands for",
        ),
        Table(("confidence", "answers", "mean confidence", "right"), rows),
    ]


def _members(report: Report) -> list[Block]:
    how = (
        "the combiner is fitted again without it"
        if report.refitted
        else "it is not asked, and the weights stay as they are"
    )
    rows = [
        (
            name,
            str(member.accuracy),
            f"{member.price:g}",
            f"{100 * member.alone:.1f} %",
            "-" if member.without is None else f"{member.without.value:.3f}",
            "-" if member.worth is None else str(member.worth),
            _place(member),
        )
        for name, member in report.members.items()
    ]
    header = (
        "member",
        "right, 95 % interval",
        "price",
        "right alone",
        "weighed without it",
        "worth",
        "earns its place",
    )
    return [
        f"Worth: weighing all answers minus weighing those of the others ({how}), on the same questions. Right alone: "
        "it is right and no other member is.",
        Table(header, rows),
    ]


def _place(member: Member) -> str:
    if member.worth is None:
        return "-"
    if member.worth.low > 0:
        return "yes"
    return "no: better without it" if member.worth.high < 0 else "not shown"


def _domains(report: Report) -> list[Block]:
    shown = list(report.domains.items())[:_MOST_DOMAINS]
    rows = [
        (
            name,
            str(domain.n),
            f"{domain.member} {domain.accuracy:.3f}",
            f"{domain.best_member:.3f}",
            f"{domain.majority:.3f}",
            f"{domain.weighed:.3f}",
            f"{domain.oracle:.3f}",
            _short(domain.difference),
        )
        for name, domain in shown
    ]
    header = (
        "domain", "questions", "best there", report.figures.best_member, "majority", "weighed", "oracle",
        f"weighed - {report.figures.best_member}",
    )  # fmt: skip
    more = len(report.domains) - len(shown)
    return [
        "The best member there was chosen on the domain's own questions. That flatters it, the more the fewer they "
        "are.",
        Table(header, rows),
        *([f"{more} smaller domains are in report.json."] if more else []),
        *_read(report),
    ]


def _read(report: Report) -> list[str]:
    if not (read := report.domain_reader):
        return []
    return [
        "Where a request does not name its domain, it can be read from the question's words: for "
        f"{read['named']:.0%} of these questions, rightly for {read['accuracy']:.0%} of those. Weighing is right on "
        f"{read['weighed']:.1%} with domains so read, and on {read['weighed_without']:.1%} without any."
    ]


def _limits(report: Report) -> list[Block]:
    return [
        *report.limits,
        "They cannot show whether tomorrow's questions are like these, whether a mark is right, and what a member "
        "would have said that was not asked.",
    ]


def _named(report: Report, way: str) -> str:
    return f"{_WAYS[way]} ({report.figures.best_member})" if way == "best_member" else _WAYS[way]


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} % [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _short(gap: Difference) -> str:
    return f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


__all__: Sequence[str] = ["FILES", "earning", "sections", "write"]
