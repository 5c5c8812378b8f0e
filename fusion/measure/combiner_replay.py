"""What a combiner is worth on recorded answers: no model is asked, and thousands of questions take seconds.

The weights and policies are followed exactly as a gateway follows them: by `artefact.weigh` and `policy.next_member`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.extras import needs_extra
from mixfuse.fusion.answering.strengths import Comparison
from mixfuse.fusion.combiner.artefact import Combiner, Policy, Weighing, grouped, weigh
from mixfuse.fusion.combiner.asking import next_member
from mixfuse.fusion.combiner.evidence import UNREAD, Answer, Question
from mixfuse.fusion.measure.statistics import Difference, Estimate, difference

_ECE_BINS = 10


@dataclass(frozen=True)
class CurvePoint:
    """What one target reaches.

    Attributes:
        target: The confidence at which asking stopped.
        accuracy: Share of right answers.
        cost_ratio: Cost a question over that of asking the best member alone; None where that costs nothing.
        asked: Members a question.
        ece: Expected calibration error of the confidences; None where it was not measured.
    """

    target: float
    accuracy: float
    cost_ratio: float | None
    asked: float
    ece: float | None


@dataclass(frozen=True)
class Figures:
    """How a pool's answers do on some questions, by several ways to choose one.

    Attributes:
        n: Questions.
        best_member: The member that was right most often on the questions the combiner was fitted to.
        best_member_accuracy: Its share of right answers.
        majority: Of the answer that most members gave; of ties, that of the more accurate member.
        naive: Of votes weighed by each member's own log-odds.
        weighed: Of the combiner's, with every member asked.
        oracle: Share of questions to which some member was right.
        all_fail: Share of questions that every member fails, with its exact 95 % interval (Clopper-Pearson 1934). No
            selection can be right more often than one minus it (arXiv 2606.27288).
        difference: `weighed` minus the best member, paired.
        majority_difference: `weighed` minus `majority`, paired.
        ece: Expected calibration error of the confidences with every member asked, 10 equal bins.
        members: Each member's share of right answers.
        fallback: Why the best member is returned whatever the others say, where that is so.
        curve: Accuracy over cost, by target.
    """

    n: int
    best_member: str
    best_member_accuracy: float
    majority: float
    naive: float
    weighed: float
    oracle: float
    all_fail: Estimate
    difference: Difference
    majority_difference: Difference
    ece: float
    members: dict[str, float]
    fallback: str
    curve: list[CurvePoint]

    def to_json(self) -> dict[str, Any]:
        """One JSON object, keys as the attributes."""
        return {
            **{name: value for name, value in vars(self).items() if name not in ("curve",)},
            "all_fail": self.all_fail.to_json(),
            "difference": self.difference.to_json(),
            "majority_difference": self.majority_difference.to_json(),
            "curve": [asdict(point) for point in self.curve],
        }


@dataclass(frozen=True)
class Asked:
    """Where asking stopped on one question.

    Attributes:
        members: Asked, in order.
        weighing: Of their answers; None where none of them answered.
        right: The mark of the answer that is returned.
        confidence: In it.
        cost: Of the answers, in the combiner's prices.
    """

    members: tuple[str, ...]
    weighing: Weighing | None
    right: bool
    confidence: float
    cost: float


def replay(combiner: Combiner, questions: Sequence[Question]) -> Figures:
    """Works out the figures.

    Args:
        combiner: Fitted to other questions.
        questions: Those in which every answer of the combiner's members is marked count.

    Raises:
        MixfuseError: No question is marked throughout.
    """
    usable = [question for question in questions if _complete(combiner, question)]
    if not usable:
        raise MixfuseError(
            "no question has a marked answer of every member of the combiner "
            f"({', '.join(combiner.members)}); mark the answers with `correct`"
        )
    best = [_member_mark(question, combiner.best_member) for question in usable]
    weighings = [weigh_all(combiner, question) for question in usable]
    weighed = [_mark(question, weighing.leader) for question, weighing in zip(usable, weighings, strict=True)]
    majority = [_vote(combiner, question, dict.fromkeys(combiner.members, 1.0)) for question in usable]
    log_odds = {name: _log_odds(member.accuracy) for name, member in combiner.members.items()}
    naive = [_vote(combiner, question, log_odds) for question in usable]
    some = [float(any(answer.right for answer in _own(combiner, question))) for question in usable]
    keys = [question.id for question in usable]
    return Figures(
        n=len(usable),
        best_member=combiner.best_member,
        best_member_accuracy=_mean(best),
        majority=_mean(majority),
        naive=_mean(naive),
        weighed=_mean(weighed),
        oracle=_mean(some),
        all_fail=clopper_pearson(len(some) - int(sum(some)), len(some)),
        difference=difference(keys, weighed, best),
        majority_difference=difference(keys, weighed, majority),
        ece=expected_calibration_error([weighing.confidence for weighing in weighings], weighed),
        members={name: _mean([_member_mark(question, name) for question in usable]) for name in combiner.members},
        fallback=combiner.fallback,
        curve=[_point(combiner, policy, usable) for policy in combiner.policies],
    )


def weigh_all(combiner: Combiner, question: Question) -> Weighing:
    """Weighs every answer of the combiner's members."""
    return _weigh_some(combiner, question, tuple(combiner.members))[0]


def ask(combiner: Combiner, policy: Policy, question: Question) -> Asked:
    """Follows a policy on one recorded question."""
    members: list[str] = []
    weighing, confidence, cost, places = None, 0.0, 0.0, list[int]()
    while (name := next_member(combiner, policy, members, confidence)) is not None:
        members.append(name)
        cost += combiner.members[name].price * sum(answer.member == name for answer in question.answers)
        if any(answer.member in members for answer in question.answers):
            weighing, places = _weigh_some(combiner, question, tuple(members))
            confidence = weighing.confidence
    right = weighing is not None and bool(question.answers[places[weighing.leader]].right)
    sure = policy.calibration(confidence) if weighing is not None else 0.0
    return Asked(tuple(members), weighing, right, sure, cost)


def clopper_pearson(count: int, n: int) -> Estimate:
    """The exact 95 % interval of a share (Biometrika 26, 1934)."""
    with needs_extra("measure"):
        from scipy import stats
    low = stats.beta.ppf(0.025, count, n - count + 1) if count else 0.0
    high = stats.beta.ppf(0.975, count + 1, n - count) if count < n else 1.0
    return Estimate(count / n, float(low), float(high))


def expected_calibration_error(confidences: Sequence[float], marks: Sequence[float]) -> float:
    """Mean distance between confidence and share of right answers, over 10 equal bins weighed by their answers."""
    bins: dict[int, list[float]] = {}
    for confidence, mark in zip(confidences, marks, strict=True):
        bins.setdefault(min(_ECE_BINS - 1, int(confidence * _ECE_BINS)), []).append(confidence - mark)
    return sum(abs(sum(gaps)) for gaps in bins.values()) / max(1, len(marks))


def _point(combiner: Combiner, policy: Policy, questions: Sequence[Question]) -> CurvePoint:
    results = [ask(combiner, policy, question) for question in questions]
    price = combiner.members[combiner.best_member].price
    alone = _mean(
        [price * sum(answer.member == combiner.best_member for answer in question.answers) for question in questions]
    )
    marks = [float(result.right) for result in results]
    return CurvePoint(
        target=policy.target,
        accuracy=_mean(marks),
        cost_ratio=_mean([result.cost for result in results]) / alone if alone else None,
        asked=_mean([len(result.members) for result in results]),
        ece=expected_calibration_error([result.confidence for result in results], marks),
    )


def _weigh_some(combiner: Combiner, question: Question, members: tuple[str, ...]) -> tuple[Weighing, list[int]]:
    """The weighing of some members' answers, and the places of those answers in the question."""
    places = [place for place, answer in enumerate(question.answers) if answer.member in members]
    number = {place: index for index, place in enumerate(places)}
    comparisons = [
        Comparison(row.judge, number[row.first], number[row.second], row.log_odds)
        for row in question.comparisons
        if row.first in number and row.second in number
    ]
    answers = [question.answers[place] for place in places]
    return weigh(combiner, answers, domain=question.domain, comparisons=comparisons), places


def _complete(combiner: Combiner, question: Question) -> bool:
    """Whether every member answered and every answer is marked."""
    own = _own(combiner, question)
    marked = all(answer.right is not None for answer in own)
    return marked and {answer.member for answer in own} == set(combiner.members)


def _own(combiner: Combiner, question: Question) -> list[Answer]:
    return [answer for answer in question.answers if answer.member in combiner.members]


def _mark(question: Question, leader: int) -> float:
    """The mark of the answer at a place among the answers in hand; here all of them are."""
    return float(bool(question.answers[leader].right))


def _member_mark(question: Question, name: str) -> float:
    return _mean([float(bool(answer.right)) for answer in question.answers if answer.member == name])


def _vote(combiner: Combiner, question: Question, weights: dict[str, float]) -> float:
    """The mark of the answer that most votes are for; of ties, that of the most accurate member."""
    answers = _own(combiner, question)
    given = Counter(answer.member for answer in answers)
    readable = [answer for answer in answers if answer.key != UNREAD] or answers
    accuracy = {name: member.accuracy for name, member in combiner.members.items()}

    def merit(places: list[int]) -> tuple[float, float]:
        voters = [readable[place].member for place in places]
        return sum(weights[name] / given[name] for name in voters), max(accuracy[name] for name in voters)

    places = max(grouped(readable).values(), key=merit)
    spokesman = max(places, key=lambda place: accuracy[readable[place].member])
    return float(bool(readable[spokesman].right))


def _log_odds(accuracy: float) -> float:
    """Of a member; a vote never counts against its answer, however weak the member."""
    clipped = min(0.999, max(0.001, accuracy))
    return max(0.01, math.log(clipped / (1 - clipped)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
