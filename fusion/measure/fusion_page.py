"""A report on fusing as pages, and its answers as a file."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mixfuse.contracts.files import write_jsonl
from mixfuse.contracts.report import Mark, Section, Table, intervals, scatter
from mixfuse.contracts.report import write as write_report
from mixfuse.fusion.labels.collect import AnyTask
from mixfuse.fusion.measure.eval_fusion import Answers, FusionReport, arm_cells

READING = (
    "Accuracy is the share of tasks with a right answer; a failed request counts as wrong. A member alone is asked as "
    "often as the pool asks it, and its mean is what asking it once gives. As often: that member sampled as often as "
    "the whole pool is and fused by the same judge, so that fusing is not praised for what more samples alone would "
    "do. Random member: one drawn anew for each task. Majority: what most answers of all members say. Oracle: somebody "
    "was right. Intervals are 95 %, by drawing tasks with replacement."
)


def write(
    out: Path,
    report: FusionReport,
    tasks: Sequence[AnyTask],
    answers: Answers,
    *,
    verify: Callable[[AnyTask, str], bool],
    about: dict[str, Any],
) -> None:
    """Writes `report.md`, `report.html`, `report.json`, the plots, and `answers.jsonl` with a line for each task.

    Args:
        out: The folder.
        report: What came out.
        tasks: Every task, those the best member was chosen on as well.
        answers: To them.
        verify: Whether an answer is right.
        about: What was asked and how, for `report.json`.

    Raises:
        MixfuseError: The folder cannot be written.
    """
    write_jsonl(out / "answers.jsonl", _lines(tasks, answers, verify))
    write_report(out, "Does fusing help?", sections(report, about), {**about, **report.to_json()})


def sections(report: FusionReport, about: dict[str, Any]) -> list[Section]:
    """The report for people."""
    header = ("", "right, 95 % interval", "$ a task", "tokens a task", "median s", "95th percentile s", "failed")
    arms = report.arms()
    aside = set(report.baselines)
    marks = [(Mark(name, arm.accuracy, aside=name.replace(" ", "_") in aside), arm) for name, arm in arms]
    chosen = (
        f"The best member, {report.best_member}, was chosen on {report.chosen_on} other tasks."
        if report.chosen_on
        else f"The best member, {report.best_member}, was chosen on these very tasks, which flatters it."
    )
    asked = "; ".join(f"{name} {value}" for name, value in about.items())
    differences = [
        (mode, rival.replace("_", " "), str(gap), gap.test.replace("_", " "), str(gap.better), str(gap.worse))
        for mode, rivals in report.differences.items()
        for rival, gap in rivals.items()
    ]
    closed = [(mode, "-" if figure is None else str(figure)) for mode, figure in report.gap_closed.items()]
    paid = [(mark, arm.cost) for mark, arm in marks if arm.latency_ms is not None]
    waited = [(mark, arm.latency_ms[0] / 1000) for mark, arm in marks if arm.latency_ms is not None]
    over_tokens = [(mark, arm.tokens) for mark, arm in marks if arm.latency_ms is not None]
    across = (paid, "dollars a task") if any(cost for _, cost in paid) else (over_tokens, "tokens a task")
    return [
        Section("In a word", [report.verdict.words, f"{report.tasks} tasks. {chosen} Asked: {asked}."]),
        Section(
            "Accuracy, cost, latency",
            [
                READING,
                Table(header, [(name, *arm_cells(arm)) for name, arm in arms]),
                intervals("accuracy", [mark for mark, _ in marks], "Right answers, with 95 % intervals"),
                scatter("cost", across[0], across[1], f"Right answers, with 95 % intervals, over {across[1]}"),
                scatter("latency", waited, "median seconds a task", "Right answers over how long a task takes"),
            ],
        ),
        Section(
            "Task by task",
            [
                "The mode minus its rival on the same tasks; p by flipping signs, or McNemar's for marks of 0 and 1.",
                Table(("mode", "rival", "difference, 95 % interval, p", "test", "better on", "worse on"), differences),
                "The share of the way from the best member to the oracle that a mode goes:",
                Table(("mode", "gap closed, 95 % interval"), closed),
            ],
        ),
    ]


def _lines(
    tasks: Sequence[AnyTask], answers: Answers, verify: Callable[[AnyTask, str], bool]
) -> Iterator[dict[str, Any]]:
    for task in tasks:
        arms = {
            arm: [{**one._asdict(), "right": one.text is not None and verify(task, one.text)} for one in several]
            for arm, several in answers[task.id].items()
        }
        yield {"id": task.id, "prompt": task.prompt, "reference": task.reference, "arms": arms}
