"""Fitting a combiner to marked questions.

A conditional logit with an L2 penalty whose strength cross-validation chooses, fitted to every question in several
states (all members asked, and some of them), so that its probabilities hold while members are still being asked. The
penalty shrinks a domain's weights towards the member's weight in all domains.

Little data must do no harm: where cross-validation does not show that weighing beats the best member, the combiner
returns the best member's answer and says why (`Combiner.fallback`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import sha256_json
from mixfuse.fusion.combiner.artefact import (
    Calibrated,
    Combiner,
    Data,
    Length,
    MemberWeights,
    NoneOfThem,
    Pair,
    check,
)
from mixfuse.fusion.combiner.evidence import Question, members_of
from mixfuse.fusion.combiner.table import (
    Bools,
    Cells,
    Floats,
    Layout,
    Table,
    cells,
    dense_scores,
    probabilities,
    tabulate,
)
from mixfuse.fusion.config import Agreement

# Relative strength of the L2 penalty by kind of feature: what has more parameters for the same data is shrunk more.
_PENALTY = {
    "member": 1.0, "doubt": 1.0, "slope": 1.0, "square": 1.0, "pair": 5.0, "count": 5.0, "unread": 1.0, "judge": 0.1,
    "none": 0.01, "asked": 1.0, "domain": 5.0, "none_domain": 5.0,
}  # fmt: skip
STRENGTHS = (0.5, 1.0, 3.0, 10.0, 30.0)
FOLDS = 5
# States in which each question is fitted, beside the one with all members.
_STATES = 3
_LEAST_MARKED = 30
# Truncation of inverse propensities: one row must not outweigh all others.
_MOST_WEIGHT = 100.0


@dataclass(frozen=True)
class Options:
    """How to fit.

    Attributes:
        prices: Member → dollars an answer; 1 for a member that is not named.
        latencies: Member → milliseconds.
        strengths: Of the L2 penalty, to choose from.
        seed: Of the folds and the states.
    """

    prices: Mapping[str, float]
    latencies: Mapping[str, float]
    strengths: tuple[float, ...] = STRENGTHS
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """Parameters, and what cross-validation says of them.

    Attributes:
        table: The marked questions.
        parameters: (F,), fitted to all of them.
        fold: (Q,) Each question's fold.
        held_out: (FOLDS, F) Parameters fitted without each fold.
        strength: Of the penalty.
        weighed: (Q,) The mark of the weighed answer, by parameters that have not seen the question; NaN where it is
            not marked.
        accuracies: (M,) Each member's, as `member_accuracies` gives it.
        calibration: By the number of members that answered.
        weight: (Q,) One over the probability with which all members were asked, at most `_MOST_WEIGHT`.
    """

    table: Table
    parameters: Floats
    fold: NDArray[np.int64]
    held_out: Floats
    strength: float
    weighed: Floats
    accuracies: Floats
    calibration: list[Calibrated]
    weight: Floats

    @property
    def best(self) -> int:
        """Index of the member that is right most often."""
        return int(np.argmax(self.accuracies))


def layout_of(questions: Sequence[Question], members: Sequence[str] | None = None) -> Layout:
    """The features that some questions give rise to."""
    domains = sorted({question.domain for question in questions if question.domain})
    judges = sorted({comparison.judge for question in questions for comparison in question.comparisons})
    return Layout(tuple(members or members_of(questions)), tuple(domains), tuple(judges))


def fit_weights(questions: Sequence[Question], options: Options) -> Fitted:
    """Fits the weights.

    Raises:
        MixfuseError: There are too few marked questions to fit anything to.
    """
    layout = layout_of(questions)
    table = tabulate(questions, layout)
    marked = np.flatnonzero(table.marked)
    table = table.rows(marked)
    asked_with = _propensities([questions[row] for row in marked], layout)
    weight = np.minimum(1.0 / asked_with.prod(1), _MOST_WEIGHT)
    if len(table) < _LEAST_MARKED:
        raise MixfuseError(
            f"{len(table)} of {len(questions)} questions are marked; a combiner needs at least {_LEAST_MARKED}, and "
            "some hundreds to help"
        )
    accuracies = member_accuracies(table, asked_with)
    generator = np.random.default_rng(options.seed)
    fold = generator.permutation(len(table)) % FOLDS
    design = _design(table, generator)
    penalty = _penalty(layout)
    losses = {}
    candidates = {}
    start = np.zeros(layout.size)
    for strength in options.strengths:
        held_out = np.array(
            [_maximise(design, strength * penalty, fold[design.row] != number, start) for number in range(FOLDS)]
        )
        candidates[strength] = held_out
        losses[strength] = _loss(table, fold, held_out)
    strength = min(losses, key=lambda value: losses[value])
    held_out = candidates[strength]
    parameters = _maximise(design, strength * penalty, np.ones(len(design.row), bool), start)
    weighed = leading_marks(table, scores_by_fold(table, fold, held_out), accuracies)
    return Fitted(
        table,
        parameters,
        fold,
        held_out,
        strength,
        weighed,
        accuracies,
        _calibrations(table, fold, held_out, accuracies, generator),
        weight,
    )


def combiner_of(fitted: Fitted, questions: Sequence[Question], how: Agreement, options: Options) -> Combiner:
    """The artefact, still without policies and figures."""
    layout, parameters = fitted.table.layout, fitted.parameters
    blocks = {name: parameters[place] for name, place in layout.blocks.items()}
    domain = blocks["domain"].reshape(len(layout.members), len(layout.domains))
    accuracies = fitted.accuracies
    members = {
        name: MemberWeights(
            weight=float(blocks["member"][m]),
            domains={d: float(domain[m, k]) for k, d in enumerate(layout.domains)},
            doubt=float(blocks["doubt"][m]),
            length=Length(
                mean=float(fitted.table.length[m, 0]),
                spread=float(fitted.table.length[m, 1]),
                slope=float(blocks["slope"][m]),
                square=float(blocks["square"][m]),
            ),
            accuracy=float(accuracies[m]),
            price=float(options.prices.get(name, 1.0)),
            latency_ms=options.latencies.get(name),
        )
        for m, name in enumerate(layout.members)
    }
    combiner = Combiner(
        agreement=how,
        members=members,
        pairs=[
            Pair(first=layout.members[a], second=layout.members[b], weight=float(weight))
            for (a, b), weight in zip(layout.pairs, blocks["pair"], strict=True)
        ],
        counts=[float(value) for value in blocks["count"]],
        unread=float(blocks["unread"][0]),
        judges={name: float(value) for name, value in zip(layout.judges, blocks["judge"], strict=True)},
        none=NoneOfThem(
            weight=float(blocks["none"][0]),
            domains={d: float(value) for d, value in zip(layout.domains, blocks["none_domain"], strict=True)},
            asked=[float(value) for value in blocks["asked"]],
        ),
        calibration=fitted.calibration,
        best_member=layout.members[fitted.best],
        fallback=_fallback(fitted),
        data=Data(
            sha256=sha256_json([_described(question) for question in questions]),
            questions=len(questions),
            marked=len(fitted.table),
            complete=int(fitted.table.answered.all(1).sum()),
        ),
    )
    check(combiner, "the fitted combiner")
    return combiner


def leading_marks(table: Table, scores: Floats, accuracies: Floats, leaders: Bools | None = None) -> Floats:
    """(Q,) the mark of the answer that would be returned; NaN where it is not marked.

    Args:
        table: The questions.
        scores: (Q, C + 1), as `dense_scores` gives them.
        accuracies: (M,) Of equal answers that of the member that is right most often is returned.
        leaders: (Q, M) Members that may speak for a class, where not all were asked.
    """
    lead = scores[:, :-1].argmax(1)
    rows = np.arange(len(table))
    speaks = table.share[rows, :, lead] > 0  # (Q, M)
    if leaders is not None:
        speaks &= leaders
    clear = table.doubt[rows, :, lead] < table.share[rows, :, lead]
    merit = np.where(speaks, accuracies[None, :] + clear, -1.0)
    result: Floats = table.spokesman[rows, merit.argmax(1), lead]
    return result


def best_member_marks(fitted: Fitted) -> Floats:
    """(Q,) the marks of the best member, which was chosen on these questions too."""
    result: Floats = fitted.table.mark[:, fitted.best]
    return result


def calibrate(probability: Floats, right: Floats, prior: Calibrated | None = None) -> Calibrated:
    """Platt's calibration of the leading class, with a weak pull towards a prior (1999; identity where there is none).

    Args:
        probability: (n,) Of the model.
        right: (n,) Marks, 0 to 1.
        prior: What little data leaves it at.
    """
    prior = prior or Calibrated()
    if not len(right):
        return prior
    clipped = np.clip(probability, 1e-6, 1 - 1e-6)
    odds = np.log(clipped / (1 - clipped))

    def loss(values: Floats) -> tuple[float, Floats]:
        z = values[0] * odds + values[1]
        expected = 1 / (1 + np.exp(-z))
        gap = values - np.array([prior.slope, prior.intercept])
        gradient = np.array([((expected - right) * odds).sum(), (expected - right).sum()]) + 4 * gap
        return float((np.logaddexp(0, z) - right * z).sum() + 2 * (gap**2).sum()), gradient

    slope, intercept = minimize(
        loss, [prior.slope, prior.intercept], jac=True, method="L-BFGS-B", bounds=[(0.0, 5.0), (-5.0, 5.0)]
    ).x
    return Calibrated(slope=float(slope), intercept=float(intercept))


def states(generator: np.random.Generator, questions: int, members: int, count: int) -> list[Bools]:
    """(Q, M) masks of members asked: random numbers of random members, another for each question."""
    masks = []
    for _ in range(count):
        sizes = generator.integers(1, max(2, members), size=questions)
        order = generator.random((questions, members)).argsort(1).argsort(1)
        masks.append(order < sizes[:, None])
    return masks


def _design(table: Table, generator: np.random.Generator) -> Cells:
    """Every question in the state with all members and in some others, the states sharing its weight."""
    q, m = table.answered.shape
    everyone = np.ones((q, m), bool)
    several = [everyone, *(states(generator, q, m, _STATES) if m > 1 else [])]
    # The state with all members counts as much as the others together: it is what `weighed` means.
    shares = [0.5, *[0.5 / _STATES] * _STATES] if m > 1 else [1.0]
    return Cells.joined([cells(table, asked, np.full(q, share)) for asked, share in zip(several, shares, strict=True)])


def _maximise(design: Cells, penalty: Floats, chosen: Bools, start: Floats) -> Floats:
    """The parameters of the greatest penalised likelihood of the chosen pairs of question and state."""
    keep = chosen[design.question]
    features = design.features[keep]
    transposed = features.T.tocsr()
    number = (np.cumsum(chosen) - 1)[design.question[keep]]
    maybe, weight = design.maybe[keep], design.weight[chosen]
    count = int(chosen.sum())

    def loss(parameters: Floats) -> tuple[float, Floats]:
        scores = features @ parameters
        log_all, share_all = _log_sums(scores, number, count)
        log_true, share_true = _log_sums(np.where(maybe, scores, -np.inf), number, count)
        gradient = transposed @ (weight[number] * (share_all - share_true))
        value = (weight * (log_all - log_true)).sum() + 0.5 * (penalty * parameters**2).sum()
        return float(value), gradient + penalty * parameters

    return np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300}).x)


def _log_sums(scores: Floats, number: NDArray[np.int64], count: int) -> tuple[Floats, Floats]:
    """(log of the sum of exponentials by group, each cell's share of its group)."""
    highest = np.full(count, -np.inf)
    np.maximum.at(highest, number, scores)
    exponentials = np.exp(scores - highest[number])
    sums = np.bincount(number, exponentials, count)
    return highest + np.log(sums), exponentials / sums[number]


def _penalty(layout: Layout) -> Floats:
    values = np.zeros(layout.size)
    for name, place in layout.blocks.items():
        values[place] = _PENALTY[name]
    return values


def scores_by_fold(table: Table, fold: NDArray[np.int64], parameters: Floats, asked: Bools | None = None) -> Floats:
    """(Q, C + 1) scores, each question's by the parameters fitted without its fold.

    Args:
        table: The questions.
        fold: (Q,) Each question's fold.
        parameters: (FOLDS, F)
        asked: (Q, M) Whether each member was asked; all where it is None.
    """
    everyone = np.ones(table.answered.shape, bool) if asked is None else asked
    scores = np.empty((len(table), table.share.shape[2] + 1))
    for number, values in enumerate(parameters):
        rows = np.flatnonzero(fold == number)
        scores[rows] = dense_scores(table.rows(rows), values, everyone[rows])[0]
    return scores


def _loss(table: Table, fold: NDArray[np.int64], held_out: Floats) -> float:
    """Mean negative log-likelihood of the truth among the answers in hand, in nats a question."""
    share = probabilities(scores_by_fold(table, fold, held_out))
    return float(-np.log(np.clip((share * table.maybe).sum(1), 1e-12, None)).mean())


def member_accuracies(table: Table, asked_with: Floats) -> Floats:
    """(M,) the share of right answers, shrunk by two answers towards the pool's mean.

    Members that are asked where others are in doubt answer harder questions; marks count by one over the probability
    with which the member was asked (Horvitz and Thompson 1952).

    Args:
        table: The questions.
        asked_with: (Q, M) That probability.
    """
    counted = ~np.isnan(table.mark) / np.maximum(asked_with, 1.0 / _MOST_WEIGHT)
    mean = np.nanmean(table.mark) if counted.any() else 0.5
    result: Floats = ((np.nan_to_num(table.mark) * counted).sum(0) + 2 * mean) / (counted.sum(0) + 2)
    return result


def _propensities(questions: Sequence[Question], layout: Layout) -> Floats:
    """(Q, M) the probability with which each member was asked."""
    return np.array([[question.propensities.get(name, 1.0) for name in layout.members] for question in questions])


def _calibrations(
    table: Table, fold: NDArray[np.int64], held_out: Floats, accuracies: Floats, generator: np.random.Generator
) -> list[Calibrated]:
    """One calibration for each number of members that answered, all pulled towards the one of all states."""
    q, m = table.answered.shape
    parts: list[tuple[Floats, Floats, NDArray[np.int64]]] = []
    for asked in [np.ones((q, m), bool), *states(generator, q, m, 2 * m)]:
        answered = (table.answered & asked).sum(1)
        scores = scores_by_fold(table, fold, held_out, asked)
        lead = probabilities(scores)[:, :-1].max(1)
        marks = leading_marks(table, scores, accuracies, asked)
        usable = (answered > 0) & ~np.isnan(marks)
        parts.append((lead[usable], marks[usable], answered[usable]))
    lead, marks, answered = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    # A question is seen in many states: together they are worth one.
    pooled = calibrate(lead, marks)
    return [calibrate(lead[answered == number], marks[answered == number], pooled) for number in range(1, m + 1)]


def _fallback(fitted: Fitted) -> str:
    """Why the best member is to be preferred to weighing; empty where weighing is shown to gain."""
    gain = fitted.weighed - best_member_marks(fitted)
    gain = gain[~np.isnan(gain)]
    if len(gain) < _LEAST_MARKED:
        return "the answers that would be returned are not marked often enough to compare weighing with the best member"
    mean, error = float(gain.mean()), float(gain.std() / np.sqrt(len(gain)))
    if mean > 0.5 * error:
        return ""
    return (
        f"on {len(gain)} marked questions weighing differs from the best member by {mean:+.3f} ± {error:.3f}, which "
        "shows no gain"
    )


def _described(question: Question) -> Any:
    return [
        question.id,
        question.domain,
        [[answer.member, answer.key, answer.doubtful, answer.right] for answer in question.answers],
    ]
