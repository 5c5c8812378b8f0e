"""What the answers of a pool, its members and its modes come to, beside what else one could do. No calls here.

The fair rival of a fused answer is not one call of one member. It is the best member, sampled as often as the whole
pool is and fused by the same judge: `self_fusion`.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.table import Table

from mixfuse.contracts.tasks import AnyTask, TaskSet
from mixfuse.fusion.answering.agreement import text_key
from mixfuse.fusion.config import Agreement, FusedMode, FusionConfig
from mixfuse.fusion.measure.combiner_replay import expected_calibration_error
from mixfuse.fusion.measure.fusion_verdict import Verdict, decide
from mixfuse.fusion.measure.statistics import Clusters, Difference, Estimate, difference


class Answer(NamedTuple):
    """The result of one request.

    Attributes:
        text: None where it failed.
        cost: Dollars, all calls together.
        latency_ms: As the gateway measured it.
        tokens: Prompt and completion of all calls.
        failed: The failure's type.
        confidence: Mode `auto`'s, that the answer is right.
    """

    text: str | None
    cost: float = 0.0
    latency_ms: float = 0.0
    tokens: int = 0
    failed: str | None = None
    confidence: float | None = None


Answers = dict[str, dict[str, list[Answer]]]
"""Task id → arm → its answers. Arms are called `member NAME`, `MODE` and `self MODE`."""


@dataclass(frozen=True)
class Arm:
    """One arm of the comparison, on the reported tasks.

    Attributes:
        accuracy: Share of right answers; a failed request counts as wrong.
        cost: Dollars a task, on average.
        tokens: Tokens a task, on average.
        latency_ms: Median and 95th percentile of a task; None for an arm that nobody waits for (`random_member`,
            `oracle`).
        failed: Failed requests, by type.
        marks: One for each task, 0 to 1, in the tasks' order.
        ece: Expected calibration error of the confidences that came with the answers; None where none came.
    """

    accuracy: Estimate
    cost: float
    tokens: float
    latency_ms: tuple[float, float] | None
    failed: dict[str, int] = field(default_factory=dict)
    marks: tuple[float, ...] = field(default=(), repr=False)
    ece: float | None = None

    def to_json(self) -> dict[str, Any]:
        """One JSON object, without the marks."""
        latency = self.latency_ms and dict(zip(("median", "p95"), self.latency_ms, strict=True))
        figures = {"accuracy": self.accuracy.to_json(), "cost": self.cost, "tokens": self.tokens}
        return {**figures, "latency_ms": latency, "failed": self.failed, "ece": self.ece}


@dataclass(frozen=True)
class FusionReport:
    """The figures of an evaluation of fusing.

    Attributes:
        tasks: Tasks reported.
        chosen_on: Tasks the best member was chosen on; 0: on the reported ones.
        best_member: The member that was right most often there.
        members: Each member alone, asked as often as the pool asks it; the mean is the accuracy of asking once.
        modes: The pool, fused.
        self_fusion: The best member sampled as often as the pool is, fused in the same mode by the same judge.
        baselines: `random_member`; `majority` of all members' answers; `prior_weighted`: votes weighed by the log-odds
            of each member's accuracy on the tasks that the best member was chosen on; `oracle`: some member is right.
        differences: mode → rival (`best_member`, `self_fusion`, `majority`, `prior_weighted`) → the mode minus it.
        gap_closed: mode → the share of the gap between the best member and the oracle that the mode closes; None where
            there is no gap.
        verdict: The recommendation.
    """

    tasks: int
    chosen_on: int
    best_member: str
    members: dict[str, Arm]
    modes: dict[FusedMode, Arm]
    self_fusion: dict[FusedMode, Arm]
    baselines: dict[str, Arm]
    differences: dict[FusedMode, dict[str, Difference]]
    gap_closed: dict[FusedMode, Estimate | None]
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """One JSON object; every accuracy is `{"value", "low", "high"}`."""
        groups = ("members", "modes", "self_fusion", "baselines")
        return {
            "tasks": self.tasks,
            "chosen_on": self.chosen_on,
            "best_member": self.best_member,
            **{group: {name: arm.to_json() for name, arm in getattr(self, group).items()} for group in groups},
            "differences": {
                mode: {name: gap.to_json() for name, gap in by_rival.items()}
                for mode, by_rival in self.differences.items()
            },
            "gap_closed": {mode: share and share.to_json() for mode, share in self.gap_closed.items()},
            "verdict": vars(self.verdict),
        }

    def arms(self) -> list[tuple[str, Arm]]:
        """Every arm with its name in words."""
        arms: list[tuple[str, Arm]] = [(mode, arm) for mode, arm in self.modes.items()]
        arms += [(f"{self.best_member}, as often, {mode}", arm) for mode, arm in self.self_fusion.items()]
        arms += [(f"{name} alone", arm) for name, arm in self.members.items()]
        return arms + [(name.replace("_", " "), arm) for name, arm in self.baselines.items()]

    def table(self) -> Table:
        """The report for the terminal."""
        table = Table(title=f"{self.tasks} tasks; the best member was chosen on {self.chosen_on or 'these'}")
        for header in ("", "right, 95 % interval", "$ a task", "tokens a task", "median s", "p95 s", "failed"):
            table.add_column(header)
        for name, arm in self.arms():
            table.add_row(name, *arm_cells(arm))
        return table


def arm_cells(arm: Arm) -> tuple[str, ...]:
    """An arm's figures as cells: accuracy, dollars, tokens, median and 95th percentile in seconds, failures."""
    latency = ("-", "-") if arm.latency_ms is None else tuple(f"{ms / 1000:.2f}" for ms in arm.latency_ms)
    failed = ", ".join(f"{count} {kind}" for kind, count in arm.failed.items())
    return str(arm.accuracy), f"{arm.cost:.3g}", f"{arm.tokens:.0f}", *latency, failed or "-"


def report(
    tasks: TaskSet[AnyTask],
    answers: Answers,
    config: FusionConfig,
    modes: Sequence[FusedMode],
    *,
    best: str,
    chosen_on: int,
    same: Agreement,
    priors: Mapping[str, float] | None = None,
) -> FusionReport:
    """Computes the figures; pure.

    Args:
        tasks: The tasks to report.
        answers: Their answers, in every arm.
        config: The pool.
        modes: The modes that were asked.
        best: The best member.
        chosen_on: How many tasks it was chosen on.
        same: When two answers count as one for the votes.
        priors: Each member's accuracy where the best one was chosen; None: on the reported tasks.
    """
    table = _AnswerTable(tasks, answers, [member.name for member in config.members])
    members = {member.name: table.arm(f"member {member.name}") for member in config.members}
    fused = {mode: table.arm(mode) for mode in modes}
    self_fusion = {mode: table.arm(f"self {mode}") for mode in modes} if len(members) > 1 else {}
    baselines = _baselines(table, members, same, priors or {name: arm.accuracy.value for name, arm in members.items()})
    prompts = [task.prompt for task in tasks.tasks]
    differences: dict[FusedMode, dict[str, Difference]] = {}
    for mode in modes:
        rivals = {"best_member": members[best], **{name: baselines[name] for name in ("majority", "prior_weighted")}}
        if self_fusion:
            rivals["self_fusion"] = self_fusion[mode]
        differences[mode] = {
            name: difference(prompts, fused[mode].marks, rival.marks) for name, rival in rivals.items()
        }
    oracle = baselines["oracle"].marks
    accuracies = {mode: arm.accuracy.value for mode, arm in fused.items()}
    return FusionReport(
        tasks=len(tasks.tasks),
        chosen_on=chosen_on,
        best_member=best,
        members=members,
        modes=fused,
        self_fusion=self_fusion,
        baselines=baselines,
        differences=differences,
        gap_closed={
            mode: _gap_closed(table.clusters, arm.marks, members[best].marks, oracle) for mode, arm in fused.items()
        },
        verdict=decide(best, accuracies, differences, pool_size=sum(member.samples for member in config.members)),
    )


class _AnswerTable(Generic[AnyTask]):
    """The reported tasks with the answers of every arm.

    Args:
        tasks: The tasks to report.
        answers: Their answers.
        members: The members' names.
    """

    def __init__(self, tasks: TaskSet[AnyTask], answers: Answers, members: Sequence[str]) -> None:
        self.tasks, self._verify, self._answers = tasks.tasks, tasks.verify, answers
        self._members = members
        self.clusters = Clusters([task.prompt for task in self.tasks])

    def right(self, task: AnyTask, answer: Answer) -> float:
        return float(answer.text is not None and self._verify(task, answer.text))

    def arm(self, name: str) -> Arm:
        by_task = [self._answers[task.id][name] for task in self.tasks]
        marks = tuple(
            _mean([self.right(task, answer) for answer in several])
            for task, several in zip(self.tasks, by_task, strict=True)
        )
        every = [answer for several in by_task for answer in several]
        return Arm(
            self.clusters.mean(marks),
            _mean([answer.cost for answer in every]),
            _mean([answer.tokens for answer in every]),
            _latency([answer.latency_ms for answer in every if answer.failed is None]),
            dict(Counter(answer.failed for answer in every if answer.failed is not None)),
            marks,
            _ece(by_task, marks),
        )

    def of_member(self, task: AnyTask, name: str) -> list[Answer]:
        return self._answers[task.id][f"member {name}"]

    def of_all_members(self, task: AnyTask) -> list[Answer]:
        return [answer for name in self._members for answer in self._answers[task.id][f"member {name}"]]


def _baselines(
    table: _AnswerTable[AnyTask], members: Mapping[str, Arm], same: Agreement, priors: Mapping[str, float]
) -> dict[str, Arm]:
    """A random member, votes, and the oracle; all but the first cost as much as the whole pool."""
    pooled = [(task, table.of_all_members(task)) for task in table.tasks]
    voters = [name for name in members for _ in table.of_member(table.tasks[0], name)]
    weights = [_log_odds(priors[name]) for name in voters]
    at_random = tuple(map(_mean, zip(*(arm.marks for arm in members.values()), strict=True)))
    votes = tuple(table.right(task, _majority(answers, same)) for task, answers in pooled)
    weighed = tuple(table.right(task, _majority(answers, same, weights)) for task, answers in pooled)
    oracle = tuple(max(table.right(task, answer) for answer in answers) for task, answers in pooled)
    cost = _mean([sum(answer.cost for answer in answers) for _, answers in pooled])
    tokens = _mean([sum(answer.tokens for answer in answers) for _, answers in pooled])
    slowest = _latency([max(answer.latency_ms for answer in answers) for _, answers in pooled])
    mean = table.clusters.mean
    return {
        "random_member": Arm(
            mean(at_random),
            _mean([arm.cost for arm in members.values()]),
            _mean([arm.tokens for arm in members.values()]),
            None,
            marks=at_random,
        ),
        "majority": Arm(mean(votes), cost, tokens, slowest, marks=votes),
        "prior_weighted": Arm(mean(weighed), cost, tokens, slowest, marks=weighed),
        "oracle": Arm(mean(oracle), cost, tokens, None, marks=oracle),
    }


def _ece(by_task: Sequence[Sequence[Answer]], marks: Sequence[float]) -> float | None:
    sure = [
        (answers[0].confidence, mark)
        for answers, mark in zip(by_task, marks, strict=True)
        if len(answers) == 1 and answers[0].confidence is not None
    ]
    return expected_calibration_error([one for one, _ in sure], [mark for _, mark in sure]) if sure else None


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _latency(values: Sequence[float]) -> tuple[float, float] | None:
    """(median, 95th percentile)."""
    if not values:
        return None
    return float(np.median(values)), float(np.percentile(values, 95, method="inverted_cdf"))


def _majority(answers: Sequence[Answer], same: Agreement, weights: Sequence[float] | None = None) -> Answer:
    """The answer with the most votes, or the most weight; of a draw the earliest. A failed answer where all failed."""
    first: dict[str, Answer] = {}
    votes: dict[str, float] = {}
    for answer, weight in zip(answers, weights or [1.0] * len(answers), strict=True):
        if answer.text is not None and answer.text.strip():
            meaning = text_key(answer.text, same)
            first.setdefault(meaning, answer)
            votes[meaning] = votes.get(meaning, 0.0) + weight
    return first[max(votes, key=lambda meaning: votes[meaning])] if votes else answers[0]


def _log_odds(accuracy: float) -> float:
    """Of a member; a vote never counts against its answer, however weak the member."""
    clipped = min(0.99, max(0.01, accuracy))
    return max(0.01, math.log(clipped / (1 - clipped)))


def _gap_closed(
    clusters: Clusters, mode: Sequence[float], best: Sequence[float], oracle: Sequence[float]
) -> Estimate | None:
    gained, possible = np.subtract(mode, best), np.subtract(oracle, best)

    def closed(rows: npt.NDArray[np.intp]) -> float | None:
        gap = float(possible[rows].sum())
        return float(gained[rows].sum()) / gap if gap > 1e-9 else None

    return None if possible.sum() <= 1e-9 else clusters.estimate(closed)
