"""Fitting a judge's `Calibration` to labelled pairs, and measuring how far its probabilities are off.

A pair is two log-odds, one for each order, of the *better* answer over the worse one: positive is right. What is fitted
is what `judge_protocol.combine` will do with them at run time.
"""

import math
from collections.abc import Iterable, Sequence

from mixfuse.contracts.judge_protocol import Calibration, combine, probability

LogOdds = tuple[float, float]

_COLDEST, _HOTTEST = 0.02, 50.0
_BINS = 10


def fit(pairs: Sequence[LogOdds], ties: Sequence[LogOdds] = ()) -> Calibration:
    """Fits the temperature, then the tie margin.

    The temperature minimises the negative log-likelihood of the order-averaged probability (Guo et al. 2017, arXiv
    1706.04599, for one view), with Platt's targets (1999): where a few pairs are all judged right or flipped, the
    likeliest temperature is zero, and everything would be certain. The margin maximises the mean credit of a verdict: 1
    where it is right, ½ for a tie, 0 where it is wrong, and 1 for a tie that people called one; of equal margins it is
    the smallest.

    Args:
        pairs: Of each labelled pair the log-odds of its better answer, in both orders.
        ties: Of pairs that people called a tie, the log-odds of the first answer.

    Returns:
        `Calibration()`, which changes nothing, where there are no pairs.
    """
    if not pairs:
        return Calibration()
    temperature = _temperature(pairs)
    scores = [combined(pair, Calibration(temperature=temperature)) for pair in pairs]
    tied = [combined(pair, Calibration(temperature=temperature)) for pair in ties]
    margins = sorted({0.0, *(round(abs(score - 0.5) + 1e-4, 4) for score in (*scores, *tied))})

    def credited(margin: float) -> float:
        decided = sum(0.5 if abs(score - 0.5) <= margin else float(score > 0.5) for score in scores)
        return decided + sum(abs(score - 0.5) <= margin for score in tied)

    margin = max((margin for margin in margins if margin < 0.5), key=lambda margin: (credited(margin), -margin))
    return Calibration(temperature=temperature, tie_margin=margin)


def combined(pair: LogOdds, calibration: Calibration | None = None) -> float:
    """The order-averaged probability of the better answer, as `combine` scores it at run time."""
    return combine(probability(pair[0]), 1.0 - probability(pair[1]), calibration).score


def nll(pairs: Sequence[LogOdds], temperature: float = 1.0, target: float = 1.0) -> float:
    """Mean negative log-likelihood of the order-averaged probability, in nats a pair.

    Args:
        pairs: The log-odds of the better answers.
        temperature: What they are divided by.
        target: The probability with which the better answer is taken to be better.
    """

    def of(pair: Iterable[float]) -> float:
        # In logs: at small temperatures both probabilities may be too small for a float.
        first, second = (-_softplus(-log_odds / temperature) for log_odds in pair)
        high, low = max(first, second), min(first, second)
        return math.log(2) - high - math.log1p(math.exp(low - high))

    right = sum(map(of, pairs))
    wrong = sum(of(-log_odds for log_odds in pair) for pair in pairs) if target < 1 else 0.0
    return (target * right + (1 - target) * wrong) / len(pairs)


def expected_error(pairs: Sequence[LogOdds], calibration: Calibration | None = None, *, bins: int = _BINS) -> float:
    """Expected calibration error of the order-averaged verdicts: confidence against share right, equal-width bins.

    A score of exactly ½ is half right.
    """
    by_bin: dict[int, list[tuple[float, float]]] = {}
    for pair in pairs:
        score = combined(pair, calibration)
        confidence = max(score, 1.0 - score)
        by_bin.setdefault(min(bins - 1, int((confidence - 0.5) * 2 * bins)), []).append((confidence, credit(score)))
    gaps = (abs(sum(confidence - right for confidence, right in held)) for held in by_bin.values())
    return sum(gaps) / len(pairs) if pairs else 0.0


def credit(score: float) -> float:
    """What an order-averaged probability of the better answer is worth: 1 above ½, ½ there, 0 below."""
    return 0.5 if abs(score - 0.5) < 1e-9 else float(score > 0.5)


def _temperature(pairs: Sequence[LogOdds]) -> float:
    """Golden-section search over the logarithm; the likelihood may have more than one valley, so a grid comes first."""
    low, high = math.log(_COLDEST), math.log(_HOTTEST)
    steps = 60
    grid = [low + (high - low) * number / steps for number in range(steps + 1)]
    target = (len(pairs) + 1) / (len(pairs) + 2)

    def cost(log_temperature: float) -> float:
        return nll(pairs, math.exp(log_temperature), target)

    best = min(range(len(grid)), key=lambda number: cost(grid[number]))
    left, right = grid[max(0, best - 1)], grid[min(steps, best + 1)]
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        one, two = right - ratio * (right - left), left + ratio * (right - left)
        if cost(one) <= cost(two):
            right = two
        else:
            left = one
    return round(math.exp((left + right) / 2), 6)


def _softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))
