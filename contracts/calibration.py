"""Fitting a judge's `Calibration` to labelled pairs, and measuring how far its probabilities are off.

A pair is two log-odds of the *better* answer over the worse one, one for each order: positive is right. The fit is of
what `judge_protocol.combine` does with them at run time.
"""

import math
from collections.abc import Iterable, Sequence

from mixfuse.contracts.extras import needs_extra
from mixfuse.contracts.judge_protocol import Calibration, combine, probability

LogOdds = tuple[float, float]

_COLDEST, _HOTTEST = 0.02, 50.0
_BINS = 10
_GRID = 60


def fit(pairs: Sequence[LogOdds], ties: Sequence[LogOdds] = ()) -> Calibration:
    """Fits the temperature, then the tie margin.

    The temperature minimises the negative log-likelihood of the order-averaged probability (Guo et al. 2017, arXiv
    1706.04599, for one view), with Platt's targets (1999). Without them, a few pairs that are all judged right or
    flipped would have a likeliest temperature of zero, which makes every verdict certain. The margin maximises the mean
    credit of a verdict: 1 for a right one, ½ for a tie, 0 for a wrong one, and 1 for a tie that people called a tie
    too. Of equally good margins the smallest is taken.

    Args:
        pairs: For each labelled pair, the log-odds of its better answer in both orders.
        ties: For each pair that people called a tie, the log-odds of the first answer in both orders.

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
        temperature: Divides the log-odds.
        target: The probability that the answer labelled as better is the better one.
    """

    def cost(pair: Iterable[float]) -> float:
        # In logs: at small temperatures both probabilities may be too small for a float.
        first, second = (-_softplus(-log_odds / temperature) for log_odds in pair)
        high, low = max(first, second), min(first, second)
        return math.log(2) - high - math.log1p(math.exp(low - high))

    right = sum(map(cost, pairs))
    wrong = sum(cost(-log_odds for log_odds in pair) for pair in pairs) if target < 1 else 0.0
    return (target * right + (1 - target) * wrong) / len(pairs)


def expected_error(pairs: Sequence[LogOdds], calibration: Calibration | None = None, *, bins: int = _BINS) -> float:
    """Expected calibration error of the order-averaged verdicts: confidence against share right, equal-width bins.

    A score of exactly ½ is half right.
    """
    by_bin: dict[int, list[tuple[float, float]]] = {}
    for pair in pairs:
        score = combined(pair, calibration)
        confidence = max(score, 1.0 - score)
        by_bin.setdefault(min(bins - 1, int((confidence - 0.5) * 2 * bins)), []).append(
            (confidence, credit(score - 0.5))
        )
    gaps = (abs(sum(confidence - right for confidence, right in rows)) for rows in by_bin.values())
    return sum(gaps) / len(pairs) if pairs else 0.0


def credit(lean: float) -> float:
    """The credit for a lean towards the better answer: 1 for any, ½ for none, 0 for a lean away from it."""
    return 0.5 if abs(lean) < 1e-9 else float(lean > 0)


def _temperature(pairs: Sequence[LogOdds]) -> float:
    """The likeliest temperature. A grid comes first, because the likelihood may have several local maxima."""
    with needs_extra("measure"):
        from scipy.optimize import minimize_scalar
    target = (len(pairs) + 1) / (len(pairs) + 2)

    def cost(log_temperature: float) -> float:
        return nll(pairs, math.exp(log_temperature), target)

    low, step = math.log(_COLDEST), math.log(_HOTTEST / _COLDEST) / _GRID
    grid = [low + step * number for number in range(_GRID + 1)]
    nearest = min(range(len(grid)), key=lambda number: cost(grid[number]))
    bounds = (grid[max(0, nearest - 1)], grid[min(_GRID, nearest + 1)])
    return round(math.exp(minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-7}).x), 6)


def _softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))
