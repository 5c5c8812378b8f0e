"""Whom to ask next: members are asked one after another until the answer is sure enough.

A policy is a table: the members asked so far and the confidence reached → the member to ask next, or to stop. It is
worked out backwards from the state in which everybody was asked (dynamic programming over recorded questions, as in
cascades of language models: FrugalGPT, arXiv 2305.05176). In each state it takes the step that gains most right answers
for its price, later steps included. One step of foresight would not do: where two cheap members disagree, a third is
worth its price only because it may outvote one of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixfuse.fusion.combiner.artefact import BINS, Combiner, Policy
from mixfuse.fusion.combiner.fit import Fitted, calibrate, leading_marks, scores_by_fold
from mixfuse.fusion.combiner.table import Floats, probabilities

TARGETS = (0.4, 0.5, *(round(0.55 + 0.025 * step, 3) for step in range(17)))
# Members that the policy chooses among; with more, those that are worth least are asked last.
_MOST_MEMBERS = 8
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
    """

    confidence: Floats
    right: Floats
    prices: Floats
    weight: Floats
    best: int


@dataclass(frozen=True)
class Walk:
    """Where a policy ends on each question.

    Attributes:
        state: (Q,) The members asked, as bits.
        cost: (Q,) The price of their answers.
    """

    state: NDArray[np.int64]
    cost: Floats


def outcomes(fitted: Fitted, prices: Sequence[float]) -> Outcomes | None:
    """Works out every state by weights that have not seen the question; None where no question is complete.

    Args:
        fitted: The weights, of at most `_MOST_MEMBERS` members.
        prices: Of one answer of each member.
    """
    complete = np.flatnonzero(fitted.table.answered.all(1) & ~np.isnan(fitted.table.mark).any(1))
    if not len(complete):
        return None
    table = fitted.table.rows(complete)
    fold, accuracies = fitted.fold[complete], fitted.accuracies
    members = table.answered.shape[1]
    confidence = np.zeros((len(table), 2**members))
    right = np.zeros_like(confidence)
    for state in range(1, 2**members):
        asked = np.broadcast_to(bits(state, members), table.answered.shape)
        scores = scores_by_fold(table, fold, fitted.held_out, asked)
        calibration = fitted.calibration[min(int(asked[0].sum()), len(fitted.calibration)) - 1]
        lead = np.clip(probabilities(scores)[:, :-1].max(1), 1e-6, 1 - 1e-6)
        odds = calibration.slope * np.log(lead / (1 - lead)) + calibration.intercept
        confidence[:, state] = 1 / (1 + np.exp(-odds))
        right[:, state] = leading_marks(table, scores, accuracies, asked)
    return Outcomes(confidence, right, np.asarray(prices, float), fitted.weight[complete], fitted.best)


def bits(state: int, members: int) -> NDArray[np.bool_]:
    """(M,) the members of a state."""
    return np.array([bool(state >> member & 1) for member in range(members)])


def worth_of(target: float) -> float:
    """What one right answer more is worth at a target, in prices of the best member's answer: 2 · odds^1.5.

    Who sets a higher target pays more for a right answer. The curve was chosen on benchmarks/combiner.py's pools: from
    about one answer of the best member at a target of ½ to hundreds of them at 0.97.
    """
    return float(2.0 * (target / (1.0 - min(target, 0.999))) ** 1.5)


def plan(known: Outcomes, target: float, worth: float, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """The best policy for one target.

    Args:
        known: Every state's outcomes.
        target: The confidence at which asking stops.
        worth: What one right answer more is worth, in the prices' unit.
        rows: The questions to plan on; all of them where it is None.

    Returns:
        (2^M, BINS) the member to ask next; -1 to stop.
    """
    confidence, right, weight = known.confidence, known.right, known.weight
    if rows is not None:
        confidence, right, weight = confidence[rows], right[rows], weight[rows]
    count, states = confidence.shape
    members = len(known.prices)
    places = np.minimum(BINS - 1, (confidence * BINS).astype(int))
    centres = (np.arange(BINS) + 0.5) / BINS
    actions = np.full((states, BINS), -1)
    value = np.zeros((count, states))  # in right answers
    for state in sorted(range(1, states), key=lambda number: -number.bit_count()):
        place = places[:, state]
        rows_in = np.bincount(place, weight, BINS)
        stop = _pulled(np.bincount(place, weight * right[:, state], BINS), rows_in, centres)
        best = np.where((centres < target) & (rows_in > 0), stop, np.inf)  # elsewhere asking stops
        for member in (member for member in range(members) if not state >> member & 1):
            later = np.bincount(place, weight * value[:, state | 1 << member], BINS)
            gain = _pulled(later, rows_in, stop) - known.prices[member] / worth
            better = gain > best + 1e-6
            best[better], actions[state, better] = gain[better], member
        value[:, state] = right[:, state]
        for member in np.unique(actions[state][actions[state] >= 0]):
            moved = actions[state, place] == member
            value[moved, state] = value[moved, state | 1 << int(member)] - known.prices[member] / worth
    # The empty state has no confidence: whatever its bin, the first step is the same.
    gains = [
        np.average(value[:, 1 << member], weights=weight) - known.prices[member] / worth for member in range(members)
    ]
    actions[0] = int(np.argmax(gains))
    return actions


def walk(known: Outcomes, actions: NDArray[np.int64], target: float, rows: NDArray[np.int64]) -> Walk:
    """Follows a policy on some questions."""
    state = np.zeros(len(rows), int)
    cost = np.zeros(len(rows))
    going = np.ones(len(rows), bool)
    while going.any():
        confidence = known.confidence[rows, state]
        action = actions[state, np.where(state > 0, np.minimum(BINS - 1, (confidence * BINS).astype(int)), 0)]
        going &= (action >= 0) & ((state == 0) | (confidence < target))
        moved = np.flatnonzero(going)
        cost[moved] += known.prices[action[moved]]
        state[moved] |= 1 << action[moved]
    return Walk(state, cost)


def policies(fitted: Fitted, combiner: Combiner, folds: int = 3) -> list[Policy]:
    """One policy a target, each with the figures it reaches on questions that it was not planned on."""
    names = list(combiner.members)
    prices = [combiner.members[name].price for name in names]
    if combiner.fallback:
        return [_only(combiner.best_member, target, fitted) for target in TARGETS]
    known = outcomes(fitted, prices)
    if known is None:
        return []
    fold = np.random.default_rng(0).permutation(len(known.right)) % folds
    best_cost = known.prices[known.best] or 1.0
    result: list[Policy] = []
    for target in TARGETS:
        worth = worth_of(target) * best_cost
        result.append(_policy(known, names, target, worth, _trial(known, target, worth, fold)))
    return result


@dataclass(frozen=True)
class _Trial:
    """A target and a worth, tried on questions that were not planned on."""

    accuracy: float
    cost: float
    asked: float
    confidence: Floats
    right: Floats


def _trial(known: Outcomes, target: float, worth: float, fold: NDArray[np.int64]) -> _Trial:
    confidence, right, cost, asked = (np.zeros(len(fold)) for _ in range(4))
    for number in range(int(fold.max()) + 1):
        rows = np.flatnonzero(fold == number)
        actions = plan(known, target, worth, np.flatnonzero(fold != number))
        end = walk(known, actions, target, rows)
        confidence[rows], right[rows] = known.confidence[rows, end.state], known.right[rows, end.state]
        cost[rows] = end.cost
        asked[rows] = [int(state).bit_count() for state in end.state]
    accuracy, price, members = (float(np.average(values, weights=known.weight)) for values in (right, cost, asked))
    return _Trial(accuracy, price, members, confidence, right)


def _policy(known: Outcomes, names: Sequence[str], target: float, worth: float, trial: _Trial) -> Policy:
    actions = plan(known, target, worth)
    reachable = [0]
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
