"""What a combiner is worth on recorded answers: no model is asked, and thousands of questions take seconds.

The weights and policies are followed exactly as a gateway follows them: by `artefact.weigh` and `policy.next_member`.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.extras import needs_extra
from mixfuse.fusion.answering.strengths import Comparison
from mixfuse.fusion.combiner.artefact import Combiner, Policy, Weighing, grouped, weigh
from mixfuse.fusion.combiner.asking import next_member
from mixfuse.fusion.combiner.evidence import UNREAD, Answer, Question
from mixfuse.fusion.measure.statistics import Difference, Estimate, difference

_ECE_BINS = 10

Weighed = tuple[Weighing, list[int]]
"""A weighing of some members' answers, and the places of those answers in the question."""


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
        ece_chance: What perfectly honest confidences would show there on so few questions.
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
    ece_chance: float
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
class Marks:
    """What each way to choose an answer gets, question by question: 1 for a right answer, 0 for a wrong one.

    Attributes:
        keys: The questions' ids.
        domains: Their domains, None where there is none.
        members: Member → its marks; of several answers to one question their mean.
        best_member: The member that was right most often on the questions the combiner was fitted to.
        majority: As in `Figures`; so are `naive` and `weighed`.
        confidence: In the weighed answer.
        some: Some member's answer is right.
    """

    keys: list[str]
    domains: list[str | None]
    members: dict[str, list[float]]
    best_member: str
    majority: list[float]
    naive: list[float]
    weighed: list[float]
    confidence: list[float]
    some: list[float]

    @property
    def best(self) -> list[float]:
        """The best member's marks."""
        return self.members[self.best_member]

    def figures(self, fallback: str, curve: list[CurvePoint]) -> Figures:
        """The figures of these marks."""
        return Figures(
            n=len(self.keys),
            best_member=self.best_member,
            best_member_accuracy=_mean(self.best),
            majority=_mean(self.majority),
            naive=_mean(self.naive),
            weighed=_mean(self.weighed),
            oracle=_mean(self.some),
            all_fail=clopper_pearson(len(self.some) - int(sum(self.some)), len(self.some)),
            difference=difference(self.keys, self.weighed, self.best),
            majority_difference=difference(self.keys, self.weighed, self.majority),
            ece=expected_calibration_error(self.confidence, self.weighed),
            ece_chance=chance_calibration_error(self.confidence),
            members={name: _mean(marks) for name, marks in self.members.items()},
            fallback=fallback,
            curve=curve,
        )


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
    usable = with_domains(combiner, complete(combiner.members, questions))
    return marks(combiner, usable).figures(combiner.fallback, curve(combiner, usable))


def with_domains(combiner: Combiner, questions: Sequence[Question]) -> list[Question]:
    """The questions, each without a domain with the one that the combiner reads in its prompt, as a gateway does."""
    return [
        replace(question, domain=combiner.domain_of(question.prompt)) if question.domain is None else question
        for question in questions
    ]


def complete(members: Collection[str], questions: Sequence[Question]) -> list[Question]:
    """The questions in which every member answered and every answer of theirs is marked.

    Raises:
        MixfuseError: There are none.
    """
    usable = [question for question in questions if is_complete(members, question)]
    if not usable:
        raise MixfuseError(
            f"no question has a marked answer of every member ({', '.join(members)}), so they cannot be compared; mark "
            "answers with `correct`, and have all members answer some questions (`pool collect`, or `explore` of the "
            "mode auto)"
        )
    return usable


def is_complete(members: Collection[str], question: Question) -> bool:
    """Whether every member answered a question and every answer of theirs is marked."""
    own = [answer for answer in question.answers if answer.member in members]
    return all(answer.right is not None for answer in own) and {answer.member for answer in own} == set(members)


def marks(combiner: Combiner, questions: Sequence[Question]) -> Marks:
    """The marks of every way to choose an answer, on complete questions (`complete`)."""
    weighings = [weigh_all(combiner, question) for question in questions]
    log_odds = {name: _log_odds(member.accuracy) for name, member in combiner.members.items()}
    return Marks(
        keys=[question.group for question in questions],
        domains=[question.domain for question in questions],
        members={name: [_member_mark(question, name) for question in questions] for name in combiner.members},
        best_member=combiner.best_member,
        majority=[_vote(combiner, question, dict.fromkeys(combiner.members, 1.0)) for question in questions],
        naive=[_vote(combiner, question, log_odds) for question in questions],
        weighed=[_mark(combiner, row, weighing) for row, weighing in zip(questions, weighings, strict=True)],
        confidence=[weighing.confidence for weighing in weighings],
        some=[float(any(answer.right for answer in _own(combiner, question))) for question in questions],
    )


def among(combiner: Combiner, questions: Sequence[Question], members: Sequence[str]) -> list[float]:
    """The marks of the weighed answers where some members only were asked."""
    results = []
    for question in questions:
        weighing, places = _weigh_some(combiner, question, tuple(members))
        results.append(float(bool(question.answers[places[weighing.leader]].right)))
    return results


def curve(combiner: Combiner, questions: Sequence[Question]) -> list[CurvePoint]:
    """What each of the combiner's policies reaches on complete questions."""
    price = combiner.members[combiner.best_member].price
    alone = _mean(
        [price * sum(answer.member == combiner.best_member for answer in question.answers) for question in questions]
    )
    results: list[list[Asked]] = []  # question, policy
    for question in questions:
        known: dict[frozenset[str], Weighed] = {}
        results.append([ask(combiner, policy, question, known) for policy in combiner.policies])
    return [_point(policy, [row[number] for row in results], alone) for number, policy in enumerate(combiner.policies)]


def weigh_all(combiner: Combiner, question: Question) -> Weighing:
    """Weighs every answer of the combiner's members."""
    return _weigh_some(combiner, question, tuple(combiner.members))[0]


def ask(
    combiner: Combiner, policy: Policy, question: Question, known: dict[frozenset[str], Weighed] | None = None
) -> Asked:
    """Follows a policy on one recorded question.

    Args:
        combiner: That weighs.
        policy: One of its own.
        question: With the answers of members that may be asked.
        known: What is kept from one policy to the next: members → the weighing of their answers.
    """
    known = {} if known is None else known
    members: list[str] = []
    weighing, confidence, cost, places = None, 0.0, 0.0, list[int]()
    while (name := next_member(combiner, policy, members, confidence, question.domain)) is not None:
        members.append(name)
        cost += combiner.members[name].price * sum(answer.member == name for answer in question.answers)
        if any(answer.member in members for answer in question.answers):
            key = frozenset(members)
            if key not in known:
                known[key] = _weigh_some(combiner, question, tuple(members))
            weighing, places = known[key]
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


@dataclass(frozen=True)
class Bin:
    """Answers of like confidence.

    Attributes:
        low: The least confidence in the bin.
        high: The most.
        n: Its answers.
        confidence: Their mean confidence.
        accuracy: The share of them that are right.
    """

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


def reliability(confidences: Sequence[float], marks: Sequence[float]) -> list[Bin]:
    """Confidence beside the share of right answers, in those of 10 equal bins that hold answers."""
    bins: dict[int, list[tuple[float, float]]] = {}
    for confidence, mark in zip(confidences, marks, strict=True):
        bins.setdefault(min(_ECE_BINS - 1, int(confidence * _ECE_BINS)), []).append((confidence, mark))
    return [
        Bin(
            number / _ECE_BINS,
            (number + 1) / _ECE_BINS,
            len(rows),
            _mean([confidence for confidence, _ in rows]),
            _mean([mark for _, mark in rows]),
        )
        for number, rows in sorted(bins.items())
    ]


def expected_calibration_error(confidences: Sequence[float], marks: Sequence[float]) -> float:
    """Mean distance between confidence and share of right answers, over the bins weighed by their answers."""
    bins = reliability(confidences, marks)
    return sum(bin_.n * abs(bin_.confidence - bin_.accuracy) for bin_ in bins) / max(1, len(marks))


def chance_calibration_error(confidences: Sequence[float], draws: int = 200) -> float:
    """What perfectly honest confidences would show as their calibration error on so few answers: a mean over draws."""
    values = np.asarray(confidences, float)
    bins = np.minimum(_ECE_BINS - 1, (values * _ECE_BINS).astype(int))
    gaps = values - (np.random.default_rng(0).random((draws, len(values))) < values)
    of_bin = gaps @ (bins[:, None] == np.arange(_ECE_BINS))  # (draws, bins)
    return float(np.abs(of_bin).sum(1).mean() / max(1, len(values)))


def _point(policy: Policy, results: Sequence[Asked], alone: float) -> CurvePoint:
    marks = [float(result.right) for result in results]
    return CurvePoint(
        target=policy.target,
        accuracy=_mean(marks),
        cost_ratio=_mean([result.cost for result in results]) / alone if alone else None,
        asked=_mean([len(result.members) for result in results]),
        ece=expected_calibration_error([result.confidence for result in results], marks),
    )


def _weigh_some(combiner: Combiner, question: Question, members: tuple[str, ...]) -> Weighed:
    places = [place for place, answer in enumerate(question.answers) if answer.member in members]
    number = {place: index for index, place in enumerate(places)}
    comparisons = [
        Comparison(row.judge, number[row.first], number[row.second], row.log_odds)
        for row in question.comparisons
        if row.first in number and row.second in number
    ]
    answers = [question.answers[place] for place in places]
    return weigh(combiner, answers, domain=question.domain, comparisons=comparisons), places


def _own(combiner: Combiner, question: Question) -> list[Answer]:
    return [answer for answer in question.answers if answer.member in combiner.members]


def _mark(combiner: Combiner, question: Question, weighing: Weighing) -> float:
    """The mark of the answer that a weighing of all the combiner's members returns."""
    return float(bool(_own(combiner, question)[weighing.leader].right))


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
