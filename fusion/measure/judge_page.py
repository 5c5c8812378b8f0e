"""A judge's report as pages, and its verdicts as a file."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mixfuse.contracts.files import write_jsonl
from mixfuse.contracts.report import Mark, Plot, Point, Section, Table, intervals, reliability
from mixfuse.contracts.report import write as write_report
from mixfuse.fusion.measure.comparisons import Comparison
from mixfuse.fusion.measure.eval_judge import JudgeReport, Reliability
from mixfuse.fusion.measure.statistics import Difference, Figure

RULES = ("longer", "shorter", "strongest_member")
READING = (
    "Right in both orders: the judge named the better answer whichever was shown first; a coin does in a quarter of "
    "the pairs. Consistent: both orders name the same answer, right or wrong. Orders averaged: the mean of both "
    "probabilities is on the better answer's side. Intervals are 95 %, by drawing prompts with replacement."
)


def write(out: Path, report: JudgeReport, rows: Sequence[Comparison], *, judge: str) -> None:
    """Writes `report.md`, `report.html`, `report.json`, the plots, and `verdicts.jsonl` with a line for each pair.

    Args:
        out: The folder.
        report: Of these rows.
        rows: In the order they were judged in.
        judge: What the judge is called.

    Raises:
        MixfuseError: The folder cannot be written.
    """
    write_jsonl(out / "verdicts.jsonl", _verdicts(report, rows))
    write_report(out, f"The judge {judge}", sections(report), {"judge": judge, **report.to_json()})


def sections(report: JudgeReport) -> list[Section]:
    """The report for people."""
    found = [
        Section("In a word", verdict(report)),
        Section("The judge", _own(report)),
        Section("Beside rules that read nothing, and other judges", _beside(report)),
        Section("Calibration", _calibration(report)),
        Section("By length", [_parts("How long the better answer is", report.by_length), _length_plot(report)]),
        Section("By source", [_parts("Source", report.by_source)]),
    ]
    if report.official:
        found.append(Section("Public benchmarks' own metrics", [_official(report)]))
    return found


def verdict(report: JudgeReport) -> list[str | Table | Plot]:
    """What may be said of the judge, each in a sentence that rests on an interval."""
    both = report.both_orders_correct
    said: list[str | Table | Plot] = [
        f"On {report.n} pairs of {report.prompts} prompts it is right in both orders on {_percent(both)}. "
        + _placed("a coin (25 %)", both.low > 0.25, both.high < 0.25)
    ]
    for name in RULES:
        if name in report.baselines:
            gap = Difference(**report.baselines[name]["judge_minus_rule"])
            said.append(
                f"Always taking the {name.replace('_', ' ')} is right on "
                f"{_percent(Figure(**report.baselines[name]['first_order']))}; the judge, orders averaged, on "
                f"{_percent(report.order_averaged)}, a difference of {gap}. " + _told("that rule", gap)
            )
    for name, other in report.against.items():
        gap = Difference(**other["difference"]["both_orders_correct"])
        said.append(
            f"Beside {name}, right in both orders: {gap} ({gap.test.replace('_', ' ')}; better on {gap.better} "
            f"prompts, worse on {gap.worse}). " + _told(name, gap)
        )
    return said


def _told(than: str, gap: Difference) -> str:
    return _placed(than, gap.low > 0 and gap.p < 0.05, gap.high < 0 and gap.p < 0.05)


def _placed(than: str, better: bool, worse: bool) -> str:
    if better:
        return f"It is better than {than}."
    return f"It is worse than {than}." if worse else f"These pairs do not tell it from {than}."


def _percent(figure: Figure) -> str:
    return f"{100 * figure.value:.1f} % [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"


def _own(report: JudgeReport) -> list[str | Table | Plot]:
    rows = [(words, str(figure)) for words, figure in report.lines()]
    rows.append(("verdicts not read", f"{report.parse_failures} of {2 * (report.n + report.human_ties)}"))
    rows.append(("verdicts read from", "log-probabilities" if report.read == "logprobs" else "what the judge wrote"))
    rows.append(("human ties, which count for no accuracy", str(report.human_ties)))
    rows += [(f"calls failed: {kind}", str(count)) for kind, count in report.failed_calls.items()]
    return [READING, Table(("", "share, 95 % interval"), rows)]


def _beside(report: JudgeReport) -> list[str | Table | Plot]:
    marks = [Mark("this judge", report.both_orders_correct)]
    marks += [Mark(name, Figure(**other["both_orders_correct"])) for name, other in report.against.items()]
    for name in RULES:
        if name in report.baselines:
            figure = Figure(**report.baselines[name]["both_orders_correct"])
            marks.append(Mark(f"always the {name.replace('_', ' ')}", figure, aside=True))
    coin = report.baselines["random"]["both_orders_correct"]
    caption = "Right in both orders, with 95 % intervals; the dashed line is a coin"
    rows = [(mark.label, str(mark.figure)) for mark in marks] + [("a coin", f"{coin:.3f}")]
    blocks: list[str | Table | Plot] = [
        Table(("right in both orders", "share, 95 % interval"), rows),
        intervals("accuracy", marks, caption, at=coin),
    ]
    if "strongest_member" in report.baselines:
        member = report.baselines["strongest_member"]["member"]
        blocks.insert(
            0, f"The strongest member is {member}; it was chosen on these very pairs, which flatters that rule."
        )
    differences = [
        (name, measure.replace("_", " "), str(Difference(**value)))
        for name, other in report.against.items()
        for measure, value in other["difference"].items()
    ]
    if differences:
        blocks.append(Table(("this judge minus", "measure", "difference, 95 % interval, p"), differences))
    return blocks


def _calibration(report: JudgeReport) -> list[str | Table | Plot]:
    measured = {"as it is": report.reliability}
    if report.calibrated:
        measured["calibrated"] = report.calibrated
    points = {name: _points(one, report.n) for name, one in measured.items()}
    caption = "How often the judge is right, by how sure it is; on the dashed line it is as right as it says"
    rows = [
        (name, f"{bin_.low:.2f} to {bin_.high:.2f}", str(bin_.n), f"{bin_.confidence:.3f}", f"{bin_.accuracy:.3f}")
        for name, one in measured.items()
        for bin_ in one.bins
    ]
    said = [f"Expected calibration error, {name}: {one.ece}." for name, one in measured.items()]
    if report.calibration:
        parameters = report.calibration
        said.append(f"Temperature {parameters.temperature:g}, tie margin {parameters.tie_margin:g}.")
    return [
        " ".join(said),
        reliability("reliability", points, caption),
        Table(("probabilities", "confidence", "pairs", "mean confidence", "accuracy"), rows),
    ]


def _points(measured: Reliability, n: int) -> list[Point]:
    return [Point(bin_.confidence, bin_.accuracy, bin_.n / n) for bin_ in measured.bins]


def _parts(header: str, parts: dict[str, dict[str, Any]]) -> Table:
    measures = ("both_orders_correct", "order_averaged", "consistency")
    rows = [
        (name, str(part["n"]), *(str(Figure(**part[measure])) for measure in measures)) for name, part in parts.items()
    ]
    return Table((header, "pairs", "right in both orders", "right, orders averaged", "consistent"), rows)


def _length_plot(report: JudgeReport) -> Plot:
    marks = [Mark(f"{name} ({part['n']})", Figure(**part["order_averaged"])) for name, part in report.by_length.items()]
    caption = (
        "Right, orders averaged, by how long the better answer is beside the worse; a rise means it favours length"
    )
    return intervals("by_length", marks, caption, at=0.5)


def _official(report: JudgeReport) -> Table:
    rows = [
        (benchmark, name.replace("_", " "), str(Figure(**value)) if isinstance(value, dict) else f"{value:.3f}")
        for benchmark, metrics in report.official.items()
        for name, value in metrics.items()
    ]
    return Table(("benchmark", "metric", ""), rows)


def _verdicts(report: JudgeReport, rows: Sequence[Comparison]) -> Iterator[dict[str, Any]]:
    for number, (row, view) in enumerate(zip(rows, report.views, strict=True)):
        outcome = view.outcome(report.calibration)
        yield {
            "pair": number,
            "file": row.file,
            "source": row.source,
            "item": row.item,
            "label": row.label,
            "winner": outcome.winner,
            "score": outcome.score,
            "forward": view.forward,
            "backward": view.backward,
        }
