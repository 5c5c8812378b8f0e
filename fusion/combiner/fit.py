"""Fitting a combiner to marked questions.

A conditional logit with an L2 penalty whose strength cross-validation chooses, fitted to every question in several
states (all members asked, and some of them), so that its probabilities hold while members are still being asked. The
penalty shrinks a domain's weights towards the member's weight in all domains, and members' weights towards their mean.

Little data must do no harm: where cross-validation does not show that weighing beats the best member, and one member
stands out as the best, the combiner returns its answer and says why (`Combiner.fallback`). Where none stands out,
weighing is the safer choice: the member that was right most often on few questions is often not the best.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
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
# Kinds that are shrunk towards the members' mean instead of 0, which is shrunk hardly at all: with few marks all
# members count alike, so that weighing starts from the majority vote. Learned from 100 marked questions, weighing of
# the three small models in benchmarks/combiner.py is worth .009 more by this, of the four strongest .004; from 1 000,
# nothing.
_TOWARDS_MEAN = ("member", "doubt")
_PENALTY_OF_MEAN = 0.01
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
FOLDS = 5
# States in which each question is fitted, beside the one with all members, and the weight of that one: it is what
# `weighed` means. Cross-validated on the pool of eight in benchmarks/combiner.py, weighing gains .030 with a weight of
# 0.9 and .027 with 0.5; of what is answered where some members were asked nothing is lost.
_STATES = 3
_EVERYONE = 0.9
LEAST_MARKED = 30
# Standard errors by which weighing must gain, and by which a member must lead each of the others, before either is
# believed (`Combiner.fallback`). Of 168 draws of 100 and 300 marked questions from benchmarks/combiner.py's pools none
# was significantly below the pool's best member; with the first condition alone some fell back to a worse member.
_SPLITS = 3
_SHOWN = 0.5
_CLEAR = 2.0
# Truncation of inverse propensities: one row must not outweigh all others.
_MOST_WEIGHT = 100.0
# No class is less likely than exp of this beside the likeliest, so that the truth's probability is never 0.
_LEAST_LOG = -300.0


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
        held_out: (folds, F) Parameters fitted without each fold.
        strength: Of the penalty.
        weighed: (Q,) The mark of the weighed answer, by parameters that have not seen the question; NaN where it is
            not marked.
        accuracies: (M,) Each member's, as `member_accuracies` gives it.
        calibration: By the number of members that answered.
        weight: (Q,) One over the probability with which all members were asked, at most `_MOST_WEIGHT`.
        fallback: As `Combiner.fallback`.
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
    fallback: str

    @property
    def best(self) -> int:
        """Index of the member that is right most often."""
        return int(np.argmax(self.accuracies))

    @property
    def complete(self) -> NDArray[np.int64]:
        """The rows of the questions in which every member answered and every answer is marked."""
        return np.flatnonzero(self.table.answered.all(1) & ~np.isnan(self.table.mark).any(1))


def layout_of(questions: Sequence[Question], members: Sequence[str] | None = None) -> Layout:
    """The features that some questions give rise to."""
    domains = sorted({question.domain for question in questions if question.domain})
    judges = sorted({comparison.judge for question in questions for comparison in question.comparisons})
    return Layout(tuple(members or members_of(questions)), tuple(domains), tuple(judges))


def fit_weights(
    questions: Sequence[Question], options: Options, progress: Callable[[str], None] = lambda _: None
) -> Fitted:
    """Fits the weights.

    Args:
        questions: Marked and unmarked.
        options: How.
        progress: Is told of each penalty tried.

    Raises:
        MixfuseError: There are too few marked questions to fit anything to.
    """
    layout = layout_of(questions)
    table = tabulate(questions, layout)
    marked = np.flatnonzero(table.marked)
    table = table.rows(marked)
    if len(table) < LEAST_MARKED:
        raise MixfuseError(
            f"{len(table)} of {len(questions)} questions are marked; a combiner needs at least {LEAST_MARKED}, and "
            "some hundreds to help"
        )
    if (prompts := len({questions[row].group for row in marked})) < LEAST_MARKED:
        raise MixfuseError(
            f"the {len(table)} marked rows have {prompts} different prompts; a combiner needs at least {LEAST_MARKED}"
        )
    asked_with = _propensities([questions[row] for row in marked], layout)
    # Not the product: those whom a policy would not have asked are asked together, or not at all.
    weight = 1.0 / np.maximum(asked_with.min(1), 1.0 / _MOST_WEIGHT)
    accuracies = member_accuracies(table, asked_with)
    generator = np.random.default_rng(options.seed)
    fold = folds_of([questions[row].group for row in marked], generator)
    design = _design(table, generator)
    losses = {}
    candidates = {}
    # From the strongest penalty to the weakest: each starts where the one before it ended.
    held_out = np.zeros((int(fold.max()) + 1, layout.size))
    for strength in sorted(options.strengths, reverse=True):
        held_out = np.array(
            [
                _maximise(design, strength, layout, fold[design.row] != number, start)
                for number, start in enumerate(held_out)
            ]
        )
        candidates[strength] = held_out
        losses[strength] = truth_loss(table, fold, held_out)
        progress(f"penalty {strength:g}: {losses[strength]:.4f} nats a question")
    strength = min(losses, key=lambda value: losses[value])
    held_out = candidates[strength]
    parameters = _maximise(design, strength, layout, np.ones(len(design.row), bool), held_out.mean(0))
    weighed = leading_marks(table, scores_by_fold(table, fold, held_out), accuracies)
    # Which questions are in a fold together moves the gain by as much as its error: several splits decide.
    several = [weighed]
    for _ in range(_SPLITS - 1):
        other = folds_of([questions[row].group for row in marked], generator)
        refit = [
            _maximise(design, strength, layout, other[design.row] != number, parameters) for number in range(FOLDS)
        ]
        several.append(leading_marks(table, scores_by_fold(table, other, np.array(refit)), accuracies))
    fallback = _fallback(table, accuracies, np.mean(several, 0))
    best = int(np.argmax(accuracies)) if fallback else None
    return Fitted(
        table,
        parameters,
        fold,
        held_out,
        strength,
        weighed,
        accuracies,
        _calibrations(table, fold, held_out, accuracies, generator, preferred=best),
        weight,
        fallback,
    )


def folds_of(groups: Sequence[Hashable], generator: np.random.Generator) -> NDArray[np.int64]:
    """(Q,) each question's fold of `FOLDS`; the questions of a group are in the same."""
    numbers: dict[Hashable, int] = {}
    of_question = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    result: NDArray[np.int64] = (generator.permutation(len(numbers)) % FOLDS)[of_question]
    return result


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
        fallback=fitted.fallback,
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
    shares = [_EVERYONE, *[(1 - _EVERYONE) / _STATES] * _STATES] if m > 1 else [1.0]
    return Cells.joined([cells(table, asked, np.full(q, share)) for asked, share in zip(several, shares, strict=True)])


def _maximise(design: Cells, strength: float, layout: Layout, chosen: Bools, start: Floats) -> Floats:
    """The parameters of the greatest penalised likelihood of the chosen pairs of question and state."""
    penalty = strength * _penalty(layout)
    of_mean = [layout.blocks[name] for name in _TOWARDS_MEAN]
    keep = np.flatnonzero(chosen[design.question])
    keep = keep[np.argsort(design.question[keep], kind="stable")]  # the cells of a question stand together
    features = design.features[keep]
    transposed = features.T.tocsr()
    number = (np.cumsum(chosen) - 1)[design.question[keep]]
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    maybe, weight = design.maybe[keep], design.weight[chosen]
    of_cell = weight[number]

    def loss(parameters: Floats) -> tuple[float, Floats]:
        scores = features @ parameters
        # All scores of a question less its highest: no exponential overflows, and the truth's may only underflow.
        exponentials = np.exp(np.maximum(scores - np.maximum.reduceat(scores, starts)[number], _LEAST_LOG))
        true = exponentials * maybe
        of_all, of_true = np.add.reduceat(exponentials, starts), np.add.reduceat(true, starts)
        gradient = transposed @ (of_cell * (exponentials / of_all[number] - true / of_true[number]))
        value = (weight * np.log(of_all / of_true)).sum()
        gaps = parameters.copy()
        for place in of_mean:
            mean = parameters[place].mean()
            gaps[place] -= mean
            value += 0.5 * _PENALTY_OF_MEAN * len(parameters[place]) * mean**2
            gradient[place] += _PENALTY_OF_MEAN * mean
        return float(value + 0.5 * (penalty * gaps**2).sum()), gradient + penalty * gaps

    return np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300, "ftol": 1e-7}).x)


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
        parameters: (folds, F)
        asked: (Q, M) Whether each member was asked; all where it is None.
    """
    everyone = np.ones(table.answered.shape, bool) if asked is None else asked
    scores = np.empty((len(table), table.share.shape[2] + 1))
    for number, values in enumerate(parameters):
        rows = np.flatnonzero(fold == number)
        scores[rows] = dense_scores(table.rows(rows), values, everyone[rows])[0]
    return scores


def truth_loss(table: Table, fold: NDArray[np.int64], held_out: Floats) -> float:
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
    table: Table,
    fold: NDArray[np.int64],
    held_out: Floats,
    accuracies: Floats,
    generator: np.random.Generator,
    *,
    preferred: int | None,
) -> list[Calibrated]:
    """One calibration for each number of members that answered, all pulled towards the one of all states.

    Where one member's answer is preferred, whatever the others say, it is the class of that answer that is calibrated.
    """
    q, m = table.answered.shape
    parts: list[tuple[Floats, Floats, NDArray[np.int64]]] = []
    for asked in [np.ones((q, m), bool), *states(generator, q, m, 2 * m)]:
        answered = (table.answered & asked).sum(1)
        scores = scores_by_fold(table, fold, held_out, asked)
        if preferred is not None:
            chosen = (table.share[:, preferred] > 0) & asked[:, [preferred]]
            lead = _of_class(probabilities(scores)[:, :-1], chosen)
            scores[:, :-1] += np.where(chosen, 1e6, 0.0)  # it leads
        else:
            lead = probabilities(scores)[:, :-1].max(1)
        marks = leading_marks(table, scores, accuracies, asked)
        usable = (answered > 0) & ~np.isnan(marks)
        parts.append((lead[usable], marks[usable], answered[usable]))
    lead, marks, answered = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    # A question is seen in many states: together they are worth one.
    pooled = calibrate(lead, marks)
    return [calibrate(lead[answered == number], marks[answered == number], pooled) for number in range(1, m + 1)]


def _of_class(shares: Floats, chosen: Bools) -> Floats:
    """(Q,) the probability of the likeliest chosen class; of the likeliest of all where none is chosen."""
    result: Floats = np.where(chosen.any(1), np.where(chosen, shares, 0.0).max(1), shares.max(1))
    return result


def _fallback(table: Table, accuracies: Floats, weighed: Floats) -> str:
    """Why the best member is to be preferred to weighing; empty where weighing is.

    Args:
        table: The questions.
        accuracies: (M,)
        weighed: (Q,) Marks of weighed answers, by weights that have not seen the question; a mean over several splits.
    """
    best = int(np.argmax(accuracies))
    gain, error, n = _paired(weighed, table.mark[:, best])
    if n < LEAST_MARKED:
        return "the answers that would be returned are not marked often enough to compare weighing with the best member"
    if gain > _SHOWN * error or not _stands_out(table.mark, best):
        return ""
    return (
        f"on {n} marked questions weighing differs from the best member by {gain:+.3f} ± {error:.3f}, which "
        "shows no gain, and that member is clearly better than each of the others"
    )


def _stands_out(mark: Floats, best: int) -> bool:
    """Whether the best member is clearly better than each of the others."""
    for member in range(mark.shape[1]):
        lead, error, n = _paired(mark[:, best], mark[:, member])
        if member != best and n >= LEAST_MARKED and lead < _CLEAR * error:
            return False
    return True


def _paired(a: Floats, b: Floats) -> tuple[float, float, int]:
    """(mean of a - b, its standard error, how many) where both are known."""
    gaps = (a - b)[~np.isnan(a - b)]
    if not len(gaps):
        return 0.0, 0.0, 0
    return float(gaps.mean()), float(gaps.std() / np.sqrt(len(gaps))), len(gaps)


def _described(question: Question) -> Any:
    return [
        question.id,
        question.domain,
        [[answer.member, answer.key, answer.doubtful, answer.right] for answer in question.answers],
    ]
