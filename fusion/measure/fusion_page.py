"""The pages of an evaluation of fusing, and its answers as a file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixfuse.contracts import plots
from mixfuse.contracts.files import write_jsonl
from mixfuse.contracts.plots import Mark
from mixfuse.contracts.report import Block, Plot, Section, Table
from mixfuse.contracts.report import write as write_report
from mixfuse.contracts.tasks import AnyTask, TaskSet
from mixfuse.fusion.measure.fusion_report import Answers, FusionReport, arm_cells

READING = (
    "Accuracy is the share of tasks with a right answer; a failed request counts as wrong. A member alone is asked as "
    "often as the pool asks it; its mean is the accuracy of asking it once. As often: that member is sampled as often "
    "as the whole pool is and fused by the same judge, so that fusing gets no credit for more samples alone. Random "
    "member: drawn anew for each task. Majority: the answer that most members give. Oracle: some member is right. "
    "Intervals are 95 %, by drawing tasks with replacement."
)


def write(
    out: Path, report: FusionReport, tasks: TaskSet[AnyTask], answers: Answers, *, settings: dict[str, Any]
) -> None:
    """Writes `report.md`, `report.html`, `report.json`, the plots, and `answers.jsonl` with a line for each task.

    Args:
        out: The folder.
        report: The figures.
        tasks: Every task, including those that the best member was chosen on.
        answers: Their answers.
        settings: How the tasks were asked, for `report.json`.

    Raises:
        MixfuseError: The folder cannot be written.
    """
    write_jsonl(out / "answers.jsonl", _lines(tasks, answers))
    write_report(out, "Does fusing help?", sections(report, settings), {**settings, **report.to_json()})


def sections(report: FusionReport, settings: dict[str, Any]) -> list[Section]:
    """The report for people."""
    on = f"{report.chosen_on} other tasks." if report.chosen_on else "these very tasks, which flatters it."
    chosen = f"The best member, {report.best_member}, was chosen on {on}"
    asked = "; ".join(f"{name} {value}" for name, value in settings.items())
    return [
        Section("Summary", [report.verdict.words, f"{report.tasks} tasks. {chosen} Settings: {asked}."]),
        Section("Accuracy, cost, latency", _arms(report)),
        Section("Task by task", _differences(report)),
    ]


def _arms(report: FusionReport) -> list[Block]:
    header = ("", "right, 95 % interval", "$ a task", "tokens a task", "median s", "95th percentile s", "failed")
    arms = [
        (Mark(name, arm.accuracy, muted=name.replace(" ", "_") in report.baselines), arm) for name, arm in report.arms()
    ]
    timed = [(mark, arm, arm.latency_ms[0] / 1000) for mark, arm in arms if arm.latency_ms is not None]
    priced = any(arm.cost for _, arm, _ in timed)
    across = "dollars a task" if priced else "tokens a task"
    costs = [(mark, arm.cost if priced else arm.tokens) for mark, arm, _ in timed]
    waits = [(mark, seconds) for mark, _, seconds in timed]
    return [
        READING,
        Table(header, [(mark.label, *arm_cells(arm)) for mark, arm in arms]),
        Plot("accuracy.svg", plots.intervals([mark for mark, _ in arms]), "Accuracy, with 95 % intervals"),
        Plot("cost.svg", plots.scatter(costs, across=across), f"Accuracy, with 95 % intervals, over {across}"),
        Plot(
            "latency.svg",
            plots.scatter(waits, across="median seconds a task"),
            "Accuracy, with 95 % intervals, over the time that a task takes",
        ),
    ]


def _differences(report: FusionReport) -> list[Block]:
    header = ("mode", "rival", "difference, 95 % interval, p", "test", "better on", "worse on")
    differences = [
        (mode, rival.replace("_", " "), str(gap), gap.test.replace("_", " "), str(gap.better), str(gap.worse))
        for mode, rivals in report.differences.items()
        for rival, gap in rivals.items()
    ]
    closed = [(mode, "-" if share is None else str(share)) for mode, share in report.gap_closed.items()]
    return [
        "The mode minus its rival on the same tasks; p by flipping signs, or McNemar's for marks of 0 and 1.",
        Table(header, differences),
        "The share of the gap between the best member and the oracle that a mode closes:",
        Table(("mode", "gap closed, 95 % interval"), closed),
    ]


def _lines(tasks: TaskSet[AnyTask], answers: Answers) -> Iterator[dict[str, Any]]:
    for task in tasks.tasks:
        arms = {
            arm: [
                {**answer._asdict(), "right": answer.text is not None and tasks.verify(task, answer.text)}
                for answer in several
            ]
            for arm, several in answers[task.id].items()
        }
        yield {"id": task.id, "prompt": task.prompt, "reference": task.reference, "arms": arms}
