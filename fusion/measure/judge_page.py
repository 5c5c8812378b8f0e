"""The pages of a judge's evaluation, and its verdicts as a file."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mixfuse.contracts import plots
from mixfuse.contracts.files import write_jsonl
from mixfuse.contracts.plots import Mark, Point
from mixfuse.contracts.report import Block, Plot, Section, Table
from mixfuse.contracts.report import write as write_report
from mixfuse.fusion.measure.comparisons import Comparison
from mixfuse.fusion.measure.judge_report import WORDS, JudgeReport, Reliability
from mixfuse.fusion.measure.statistics import Difference, Estimate

RULES = ("longer", "shorter", "strongest_member")
READING = (
    "Right in both orders: the judge names the better answer whichever is shown first; a coin does so in a quarter "
    "of the pairs. Consistent: both orders name the same answer, right or wrong. Orders averaged: the mean of both "
    "probabilities is on the better answer's side. Intervals are 95 %, by drawing prompts with replacement."
)


def write(out: Path, report: JudgeReport, rows: Sequence[Comparison], *, judge: str) -> None:
    """Writes `report.md`, `report.html`, `report.json`, the plots, and `verdicts.jsonl` with a line for each pair.

    Args:
        out: The folder.
        report: The figures of these rows.
        rows: In the order of the verdicts.
        judge: The name of the judge.

    Raises:
        MixfuseError: The folder cannot be written.
    """
    write_jsonl(out / "verdicts.jsonl", _verdicts(report, rows))
    write_report(out, f"The judge {judge}", sections(report), {"judge": judge, **report.to_json()})


def sections(report: JudgeReport) -> list[Section]:
    """The report for people."""
    parts = [
        Section("Summary", verdict(report)),
        Section("The judge", _own(report)),
        Section("Compared with rules that read no answer, and with other judges", _compared(report)),
        Section("Calibration", _calibration(report)),
        Section("By length", [_parts("Length of the better answer", report.by_length), _length_plot(report)]),
        Section("By source", [_parts("Source", report.by_source)]),
    ]
    if report.official:
        parts.append(Section("Public benchmarks' own metrics", [_official(report)]))
    return parts


def verdict(report: JudgeReport) -> list[Block]:
    """The conclusions, each a sentence that rests on an interval."""
    both = report.both_orders_correct
    sentences: list[Block] = [
        f"On {report.n} pairs of {report.prompts} prompts it is right in both orders on {_percent(both)}. "
        + _sentence("a coin (25 %)", both.low > 0.25, both.high < 0.25)
    ]
    for name in RULES:
        if name in report.baselines:
            gap = Difference(**report.baselines[name]["judge_minus_rule"])
            sentences.append(
                f"Always taking the {name.replace('_', ' ')} is right on "
                f"{_percent(Estimate(**report.baselines[name]['first_order']))}; the judge, orders averaged, on "
                f"{_percent(report.order_averaged)}, a difference of {gap}. " + _conclusion("that rule", gap)
            )
    for name, other in report.against.items():
        gap = Difference(**other["difference"]["both_orders_correct"])
        sentences.append(
            f"Compared with {name}, right in both orders: {gap} ({gap.test.replace('_', ' ')}; better on {gap.better} "
            f"prompts, worse on {gap.worse}). " + _conclusion(name, gap)
        )
    return sentences


def _conclusion(than: str, gap: Difference) -> str:
    return _sentence(than, gap.low > 0 and gap.p < 0.05, gap.high < 0 and gap.p < 0.05)


def _sentence(than: str, better: bool, worse: bool) -> str:
    if better:
        return f"It is better than {than}."
    return f"It is worse than {than}." if worse else f"These pairs do not tell it from {than}."


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} % [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _own(report: JudgeReport) -> list[Block]:
    rows = [(words, str(share)) for words, share in report.lines()]
    rows.append(("verdicts not read", f"{report.parse_failures} of {2 * (report.n + report.human_ties)}"))
    rows.append(("verdicts read from", "log-probabilities" if report.read == "logprobs" else "what the judge wrote"))
    rows.append(("human ties, which count for no accuracy", str(report.human_ties)))
    rows += [(f"calls failed: {kind}", str(count)) for kind, count in report.failed_calls.items()]
    return [READING, Table(("", "share, 95 % interval"), rows)]


def _compared(report: JudgeReport) -> list[Block]:
    marks = [Mark("this judge", report.both_orders_correct)]
    marks += [Mark(name, Estimate(**other["both_orders_correct"])) for name, other in report.against.items()]
    for name in RULES:
        if name in report.baselines:
            share = Estimate(**report.baselines[name]["both_orders_correct"])
            marks.append(Mark(f"always the {name.replace('_', ' ')}", share, muted=True))
    coin = report.baselines["random"]["both_orders_correct"]
    caption = "Right in both orders, with 95 % intervals; the dashed line is a coin"
    rows = [(mark.label, str(mark.estimate)) for mark in marks] + [("a coin", f"{coin:.3f}")]
    blocks: list[Block] = [
        Table(("right in both orders", "share, 95 % interval"), rows),
        Plot("accuracy.svg", plots.intervals(marks, reference=coin), caption),
    ]
    if "strongest_member" in report.baselines:
        member = report.baselines["strongest_member"]["member"]
        blocks.insert(
            0, f"The strongest member is {member}; it was chosen on these very pairs, which flatters that rule."
        )
    differences = [
        (name, WORDS[measure], str(Difference(**value)))
        for name, other in report.against.items()
        for measure, value in other["difference"].items()
    ]
    if differences:
        blocks.append(Table(("this judge minus", "measure", "difference, 95 % interval, p"), differences))
    return blocks


def _calibration(report: JudgeReport) -> list[Block]:
    measured = {"raw": report.reliability}
    if report.calibrated:
        measured["calibrated"] = report.calibrated
    points = {name: _points(side, report.n) for name, side in measured.items()}
    caption = "Accuracy by confidence; on the dashed line the judge is right as often as its probabilities claim"
    rows = [
        (name, f"{bin_.low:.2f} to {bin_.high:.2f}", str(bin_.n), f"{bin_.confidence:.3f}", f"{bin_.accuracy:.3f}")
        for name, side in measured.items()
        for bin_ in side.bins
    ]
    sentences = [f"Expected calibration error, {name}: {side.ece}." for name, side in measured.items()]
    if report.calibration:
        parameters = report.calibration
        sentences.append(f"Temperature {parameters.temperature:g}, tie margin {parameters.tie_margin:g}.")
    return [
        " ".join(sentences),
        Plot("reliability.svg", plots.reliability(points), caption),
        Table(("probabilities", "confidence", "pairs", "mean confidence", "accuracy"), rows),
    ]


def _points(measured: Reliability, n: int) -> list[Point]:
    return [Point(bin_.confidence, bin_.accuracy, bin_.n / n) for bin_ in measured.bins]


def _parts(header: str, parts: dict[str, dict[str, Any]]) -> Table:
    measures = ("both_orders_correct", "order_averaged", "consistency")
    rows = [
        (name, str(part["n"]), *(str(Estimate(**part[measure])) for measure in measures))
        for name, part in parts.items()
    ]
    return Table((header, "pairs", "right in both orders", "right, orders averaged", "consistent"), rows)


def _length_plot(report: JudgeReport) -> Plot:
    marks = [
        Mark(f"{name} ({part['n']})", Estimate(**part["order_averaged"])) for name, part in report.by_length.items()
    ]
    caption = (
        "Right, orders averaged, by the length of the better answer over that of the worse one; "
        "a rise from top to bottom means that the judge favours length"
    )
    return Plot("by_length.svg", plots.intervals(marks, reference=0.5), caption)


def _official(report: JudgeReport) -> Table:
    rows = [
        (benchmark, name.replace("_", " "), str(Estimate(**value)) if isinstance(value, dict) else f"{value:.3f}")
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
