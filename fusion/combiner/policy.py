"""Whom to ask next: members are asked one after another until the answer is sure enough.

A policy is a table: the members asked so far and the confidence reached → the member to ask next, or to stop. It is
worked out backwards from the state in which everybody was asked (dynamic programming over recorded questions, as in
cascades of language models: FrugalGPT, arXiv 2305.05176). In each state it takes the step that gains most right answers
for its price, later steps included. One step of foresight would not do: where two cheap members disagree, a third is
worth its price only because it may outvote one of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from mixfuse.fusion.combiner.artefact import BINS, Combiner, Policy
from mixfuse.fusion.combiner.fit import Fitted, calibrate, leading_marks, scores_by_fold
from mixfuse.fusion.combiner.gain import worth_of
from mixfuse.fusion.combiner.table import Floats, Table, probabilities

TARGETS = (0.4, 0.5, *(round(0.55 + 0.025 * step, 3) for step in range(17)))
# Members that a policy chooses among; of more, those that add least are asked by no policy. More states fit noise: of
# the pool of eight in benchmarks/combiner.py, cross-validated, six are right .731 of the time at half the best member's
# cost and .741 at 0.8 of it, all eight .729 and .734.
_MOST_MEMBERS = 6
# Questions that a policy is worked out on, and that members are shortlisted by: of more, a sample.
_MOST_QUESTIONS = 5000
_SHORTLIST_QUESTIONS = 2000
# What the best member's price counts for there, in right answers.
_PRICE = 0.1
# Questions that a domain's gains are pulled towards those of all questions by, before they decide whom to ask first.
_PULL_OF_DOMAIN = 30.0
# Rows that a bin's mean is pulled towards its own confidence by.
_PULL = 5.0


@dataclass(frozen=True)
class Outcomes:
    """What would be answered in every state, on questions in which every member answered.

    Attributes:
        confidence: (Q, 2^M) Calibrated; the state's bits say who was asked.
        right: (Q, 2^M) The mark of the answer that would be returned.
        prices: (M,) Of one answer of each member.
        weight: (Q,) Of each question.
        best: Index of the best member.
        domain: (Q,) Index of each question's domain; -1 where there is none.
        domains: The domains' names.
    """

    confidence: Floats
    right: Floats
    prices: Floats
    weight: Floats
    best: int
    domain: NDArray[np.int64]
    domains: tuple[str, ...] = ()


class Steps(NamedTuple):
    """A policy as arrays.

    Attributes:
        actions: (2^M, BINS) the member to ask next; -1 to stop. What stands for the empty state does in every bin.
        first: (D,) the member to ask first, by the question's domain.
    """

    actions: NDArray[np.int64]
    first: NDArray[np.int64]


@dataclass(frozen=True)
class Walk:
    """Where a policy ends on each question.

    Attributes:
        state: (Q,) The members asked, as bits.
        cost: (Q,) The price of their answers.
    """

    state: NDArray[np.int64]
    cost: Floats


def outcomes(fitted: Fitted, prices: Sequence[float], members: Sequence[int] | None = None) -> Outcomes | None:
    """Works out every state by weights that have not seen the question; None where no question is complete.

    Args:
        fitted: The weights.
        prices: Of one answer of each of `members`.
        members: Indices of those that may be asked, the best among them; all where it is None.
    """
    members = range(len(fitted.table.layout.members)) if members is None else members
    complete = fitted.complete
    if not len(complete):
        return None
    if len(complete) > _MOST_QUESTIONS:
        complete = np.sort(np.random.default_rng(0).permutation(complete)[:_MOST_QUESTIONS])
    table, fold = fitted.table.rows(complete), fitted.fold[complete]
    confidence = np.zeros((len(table), 2 ** len(members)))
    right = np.zeros_like(confidence)
    for state in range(1, 2 ** len(members)):
        confidence[:, state], right[:, state] = _outcome(
            fitted, table, fold, [member for place, member in enumerate(members) if state >> place & 1]
        )
    best = list(members).index(fitted.best)
    return Outcomes(
        confidence,
        right,
        np.asarray(prices, float),
        fitted.weight[complete],
        best,
        table.domain,
        fitted.table.layout.domains,
    )


def _outcome(fitted: Fitted, table: Table, fold: NDArray[np.int64], members: Sequence[int]) -> tuple[Floats, Floats]:
    """(confidence, mark) of each question's leading answer where these members were asked."""
    asked = np.zeros(table.answered.shape, bool)
    asked[:, list(members)] = True
    scores = scores_by_fold(table, fold, fitted.held_out, asked)
    calibration = fitted.calibration[min(len(members), len(fitted.calibration)) - 1]
    lead = np.clip(probabilities(scores)[:, :-1].max(1), 1e-6, 1 - 1e-6)
    odds = calibration.slope * np.log(lead / (1 - lead)) + calibration.intercept
    return 1 / (1 + np.exp(-odds)), leading_marks(table, scores, fitted.accuracies, asked)


def shortlist(fitted: Fitted, prices: Sequence[float]) -> list[int]:
    """The members that a policy chooses among: the best, and those that together are right most often for their price.

    With `_MOST_MEMBERS` or fewer these are all; the states of more are too many to work out. The best member stands by
    itself while the others are chosen: the point of a policy is to do without it.
    """
    every = range(len(prices))
    if len(prices) <= _MOST_MEMBERS:
        return list(every)
    complete = fitted.complete[:_SHORTLIST_QUESTIONS]
    if not len(complete):
        return [fitted.best]
    table, fold = fitted.table.rows(complete), fitted.fold[complete]
    unit = prices[fitted.best] or 1.0
    chosen: list[int] = []
    while len(chosen) + 1 < _MOST_MEMBERS:
        worth = {
            member: float(np.mean(_outcome(fitted, table, fold, [*chosen, member])[1])) - _PRICE * prices[member] / unit
            for member in every
            if member != fitted.best and member not in chosen
        }
        chosen.append(max(worth, key=lambda member: worth[member]))
    return sorted([fitted.best, *chosen])


def plan(known: Outcomes, target: float, worth: float, rows: NDArray[np.int64] | None = None) -> Steps:
    """The best policy for one target; see `plans`."""
    return plans(known, [target], [worth], rows)[0]


def plans(
    known: Outcomes, targets: Sequence[float], worths: Sequence[float], rows: NDArray[np.int64] | None = None
) -> list[Steps]:
    """The best policy for each of T targets.

    Whom to ask first may depend on the question's domain: before anybody has answered, that is all that is known of it.
    Later it is the confidence that the members' weights in the domain have gone into.

    Args:
        known: Every state's outcomes.
        targets: The confidences at which asking stops.
        worths: What one right answer more is worth, in the prices' unit; for each target.
        rows: The questions to plan on; all of them where it is None.
    """
    confidence, right, weight, domain = known.confidence, known.right, known.weight, known.domain
    if rows is not None:
        confidence, right, weight, domain = confidence[rows], right[rows], weight[rows], domain[rows]
    count, states = confidence.shape
    members = len(known.prices)
    places = bins_of(confidence)
    centres = (np.arange(BINS) + 0.5) / BINS
    below = centres[:, None] < np.asarray(targets)  # (BINS, T)
    price = known.prices[:, None] / np.asarray(worths)  # (M, T) in right answers
    actions = np.full((len(targets), states, BINS), -1)
    value: dict[int, Floats] = {}  # state → (Q, T), in right answers
    for state in sorted(range(1, states), key=lambda number: -number.bit_count()):
        place = places[:, state]
        of_bin = sparse.csr_matrix((weight, (place, np.arange(count))), shape=(BINS, count))
        rows_in = np.asarray(of_bin.sum(1))
        stop = _pulled(of_bin @ right[:, [state]], rows_in, centres[:, None])
        best = np.where(below & (rows_in > 0), stop, np.inf)  # elsewhere asking stops
        chosen = np.full((BINS, len(targets)), -1)
        others = [member for member in range(members) if not state >> member & 1]
        for member in others:
            gain = _pulled(of_bin @ value[state | 1 << member], rows_in, stop) - price[member]
            better = gain > best + 1e-6
            best[better], chosen[better] = gain[better], member
        actions[:, state] = _like_the_nearest(chosen, rows_in[:, 0] > 0, below).T
        here = np.repeat(right[:, [state]], len(targets), 1)
        step = chosen[place]  # (Q, T)
        for member in others:
            here = np.where(step == member, value[state | 1 << member] - price[member], here)
        value[state] = here
        for larger in [state | 1 << member for member in others]:
            if not any(smaller not in value for smaller in _one_less(larger)):
                del value[larger]  # nothing that is still to come looks at it
    # The empty state has no confidence: whatever its bin, the first step is the same.
    gains = np.array([np.average(value[1 << m], axis=0, weights=weight) - price[m] for m in range(members)])  # (M, T)
    actions[:, 0] = gains.argmax(0)[:, None]
    first = np.zeros((len(targets), len(known.domains)), np.int64)
    for number in range(len(known.domains)):
        own = domain == number
        sums = np.array([weight[own] @ (value[1 << m][own] - price[m]) for m in range(members)])
        pulled = (sums + _PULL_OF_DOMAIN * gains) / (weight[own].sum() + _PULL_OF_DOMAIN)
        first[:, number] = pulled.argmax(0)
    return [Steps(*steps) for steps in zip(actions, first, strict=True)]


def _like_the_nearest(
    chosen: NDArray[np.int64], seen: NDArray[np.bool_], below: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Has bins in which no question was do as the nearest that had some; of two as near, as the lower.

    A request whose domain is not known has confidences that no question of the fit had: that is no reason to stop.

    Args:
        chosen: (BINS, T) the member to ask next; -1 to stop.
        seen: (BINS,) whether a question was in the bin.
        below: (BINS, T) whether the bin is below the target.
    """
    chosen = chosen.copy()
    for target in range(chosen.shape[1]):
        full, empty = np.flatnonzero(seen & below[:, target]), np.flatnonzero(~seen & below[:, target])
        if len(full):
            chosen[empty, target] = chosen[full[np.abs(full - empty[:, None]).argmin(1)], target]
    return chosen


def bins_of(confidence: Floats) -> NDArray[np.int64]:
    """Like `asking.bin_of`, for arrays."""
    return np.minimum(BINS - 1, (confidence * BINS).astype(np.int64))


def _one_less(state: int) -> list[int]:
    """The states with one member less, the empty one left out."""
    return [less for member in range(state.bit_length()) if state >> member & 1 and (less := state ^ 1 << member)]


def walk(known: Outcomes, steps: Steps, target: float, rows: NDArray[np.int64]) -> Walk:
    """Follows a policy on some questions."""
    anywhere = steps.actions[0, 0]
    first = np.append(steps.first, anywhere)[known.domain[rows]]  # -1: no domain
    state = np.zeros(len(rows), int)
    cost = np.zeros(len(rows))
    going = np.ones(len(rows), bool)
    while going.any():
        confidence = known.confidence[rows, state]
        action = np.where(state > 0, steps.actions[state, bins_of(confidence)], first)
        going &= (action >= 0) & ((state == 0) | (confidence < target))
        moved = np.flatnonzero(going)
        cost[moved] += known.prices[action[moved]]
        state[moved] |= 1 << action[moved]
    return Walk(state, cost)


def policies(fitted: Fitted, combiner: Combiner, folds: int = 3) -> list[Policy]:
    """One policy a target, each with the figures it reaches on questions that it was not planned on."""
    prices = [member.price for member in combiner.members.values()]
    if combiner.fallback:
        return [_only(combiner.best_member, target, fitted) for target in TARGETS]
    members = shortlist(fitted, prices)
    names = [list(combiner.members)[member] for member in members]
    known = outcomes(fitted, [prices[member] for member in members], members)
    if known is None:
        return []
    worths = [worth_of(target) * (known.prices[known.best] or 1.0) for target in TARGETS]
    trials = _trials(known, worths, np.random.default_rng(0).permutation(len(known.right)) % folds)
    every = plans(known, TARGETS, worths)
    return [_policy(known, names, *parts) for parts in zip(TARGETS, every, trials, strict=True)]


@dataclass(frozen=True)
class _Trial:
    """A target, tried on questions that were not planned on."""

    accuracy: float
    cost: float
    asked: float
    confidence: Floats
    right: Floats


def _trials(known: Outcomes, worths: Sequence[float], fold: NDArray[np.int64]) -> list[_Trial]:
    shape = len(TARGETS), len(fold)
    confidence, right, cost, asked = (np.zeros(shape) for _ in range(4))
    for number in range(int(fold.max()) + 1):
        rows = np.flatnonzero(fold == number)
        others = np.flatnonzero(fold != number)
        for place, steps in enumerate(plans(known, TARGETS, worths, others)):
            end = walk(known, steps, TARGETS[place], rows)
            confidence[place, rows] = known.confidence[rows, end.state]
            right[place, rows] = known.right[rows, end.state]
            cost[place, rows] = end.cost
            asked[place, rows] = [int(state).bit_count() for state in end.state]
    means = [np.average(values, axis=1, weights=known.weight) for values in (right, cost, asked)]
    return [
        _Trial(float(accuracy), float(price), float(members), *marks)
        for accuracy, price, members, *marks in zip(*means, confidence, right, strict=True)
    ]


def _policy(known: Outcomes, names: Sequence[str], target: float, steps: Steps, trial: _Trial) -> Policy:
    actions = steps.actions
    reachable = [0, *sorted({1 << int(member) for member in steps.first})]
    for state in reachable:
        for member in {int(action) for action in actions[state] if action >= 0}:
            if state | 1 << member not in reachable:
                reachable.append(state | 1 << member)
    table = {
        "+".join(name for place, name in enumerate(names) if state >> place & 1): [
            names[action] if action >= 0 else "" for action in actions[state]
        ]
        for state in reachable
        if state + 1 < 2 ** len(names)
    }
    return Policy(
        target=target,
        accuracy=trial.accuracy,
        cost_ratio=trial.cost / (known.prices[known.best] or 1.0),
        asked=trial.asked,
        actions=table,
        first={
            domain: names[member]
            for domain, member in zip(known.domains, steps.first, strict=True)
            if member != actions[0, 0]
        },
        calibration=calibrate(trial.confidence, trial.right),
    )


def _only(member: str, target: float, fitted: Fitted) -> Policy:
    """The policy that asks the best member and nobody else."""
    marks = fitted.table.mark[:, fitted.best]
    return Policy(
        target=target,
        accuracy=float(np.nanmean(marks)),
        cost_ratio=1.0,
        asked=1.0,
        actions={"": [member] * BINS},
    )


def _pulled(sums: NDArray[Any], weight: NDArray[Any], towards: NDArray[Any]) -> Floats:
    """(BINS,) weighted means, pulled towards values as by some more rows: few rows in a bin decide little."""
    result: Floats = (sums + _PULL * towards) / (weight + _PULL)
    return result
