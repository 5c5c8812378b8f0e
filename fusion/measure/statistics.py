"""Intervals and tests for shares of pairs or tasks, where several may be of one prompt.

Whole prompts are drawn and whole prompts change sides: what is asked of one prompt is not independent. No numpy: the
gateway's room stays light, and a thousand resamples of a thousand prompts take a second without it.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, NamedTuple

from mixfuse.contracts.judge_protocol import Calibration
from mixfuse.fusion.measure.comparisons import Comparison, Measure, Views, marks

RESAMPLES = 1000
SEED = 0
# So many different sums are followed exactly; marks of 0, ½ and 1 stay far below, real numbers soon pass it.
_EXACT_SUMS = 20_000
_FLIPS = 10_000


class Figure(NamedTuple):
    """A value with its 95 % interval: bootstrap over prompts, percentiles."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """As `{"value", "low", "high"}`."""
        return self._asdict()

    def __str__(self) -> str:
        return f"{self.value:.3f}  [{self.low:.3f}, {self.high:.3f}]"


class Difference(NamedTuple):
    """How much better A did than B on the same pairs or tasks.

    Attributes:
        value: Mean of A's marks minus mean of B's.
        low: Of the 95 % interval, bootstrap over prompts.
        high: Likewise.
        p: Two-sided: how often chance alone would bring a difference as large, if A and B were alike.
        test: `mcnemar` where each prompt has one mark of 0 or 1 (exact), else `sign_flip` by prompt.
        better: Prompts on which A did better.
        worse: Prompts on which B did.
    """

    value: float
    low: float
    high: float
    p: float
    test: Literal["mcnemar", "sign_flip"]
    better: int
    worse: int

    def to_json(self) -> dict[str, float | int | str]:
        """One JSON object, keys as the attributes."""
        return self._asdict()

    def __str__(self) -> str:
        return f"{self.value:+.3f}  [{self.low:+.3f}, {self.high:+.3f}], p = {self.p:.3g}"


class Clusters:
    """Gives figures their intervals, always by the same resamples of the same prompts.

    Args:
        keys: The prompt of each row.
    """

    def __init__(self, keys: Sequence[Hashable]) -> None:
        grouped: dict[Hashable, list[int]] = defaultdict(list)
        for index, key in enumerate(keys):
            grouped[key].append(index)
        self._members = list(grouped.values())
        generator = random.Random(SEED)  # noqa: S311 - statistics, not secrets
        count = len(self._members)
        self._draws = [generator.choices(range(count), k=count) for _ in range(RESAMPLES)]
        sizes = [len(indices) for indices in self._members]
        self._drawn_rows = [sum(sizes[one] for one in draw) for draw in self._draws]

    def mean(self, values: Sequence[float]) -> Figure:
        """The mean of one value a row.

        Raises:
            ValueError: There are no rows.
        """
        if not values:
            raise ValueError("no rows, so no mean")
        sums = self.sums(values)
        totals = (sum(sums[one] for one in draw) for draw in self._draws)
        means = [total / rows for total, rows in zip(totals, self._drawn_rows, strict=True)]
        return _figure(sum(values) / len(values), means)

    def of(self, statistic: Callable[[Sequence[int]], float | None]) -> Figure:
        """Any statistic of rows.

        Args:
            statistic: Indices of rows, as often as each was drawn → its value; None where these rows have none.

        Raises:
            ValueError: It has none for the rows as they are.
        """
        value = statistic([index for indices in self._members for index in indices])
        if value is None:
            raise ValueError("the statistic has no value for these rows")
        drawn = ([index for one in draw for index in self._members[one]] for draw in self._draws)
        return _figure(value, [found for rows in drawn if (found := statistic(rows)) is not None])

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum over each prompt's rows."""
        return [sum(values[index] for index in indices) for indices in self._members]


def _figure(value: float, resampled: list[float]) -> Figure:
    resampled.sort()
    if not resampled:
        return Figure(value, value, value)
    return Figure(value, resampled[int(0.025 * len(resampled))], resampled[max(0, int(0.975 * len(resampled)) - 1)])


def difference(keys: Sequence[Hashable], a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compares two sets of marks on the same rows.

    Args:
        keys: The prompt of each row.
        a: A's mark of each row.
        b: B's.

    Raises:
        ValueError: There are no rows.
    """
    gains = [x - y for x, y in zip(a, b, strict=True)]
    clusters = Clusters(keys)
    by_prompt = clusters.sums(gains)
    # Exact McNemar is the sign flip of marks that differ by 1: a binomial test of the discordant prompts.
    paired_marks = len(by_prompt) == len(gains) and all(gain in (-1.0, 0.0, 1.0) for gain in gains)
    return Difference(
        *clusters.mean(gains),
        p=sign_flip(by_prompt),
        test="mcnemar" if paired_marks else "sign_flip",
        better=sum(gain > 0 for gain in by_prompt),
        worse=sum(gain < 0 for gain in by_prompt),
    )


def paired(
    rows: Sequence[Comparison],
    views_a: Sequence[Views],
    views_b: Sequence[Views],
    *,
    measure: Measure = "both_orders_correct",
    calibrations: tuple[Calibration | None, Calibration | None] = (None, None),
) -> Difference:
    """How much better judge A is than judge B on the same pairs; human ties are left out.

    Args:
        rows: The pairs.
        views_a: Judge A's, in the same order.
        views_b: Judge B's.
        measure: What counts as right.
        calibrations: A's and B's.

    Raises:
        ValueError: No pair has a label other than a tie.
    """
    kept = [index for index, row in enumerate(rows) if row.label != "tie"]
    decided = [rows[index] for index in kept]
    a, b = (
        marks(decided, [views[index] for index in kept], measure, calibration)
        for views, calibration in zip((views_a, views_b), calibrations, strict=True)
    )
    return difference([row.prompt for row in decided], a, b)


def sign_flip(gains: Sequence[float]) -> float:
    """The two-sided p-value of a sum of gains, were each as likely to have the other sign.

    Exact, by following every possible sum, where the gains leave few different ones; else by random flips.

    Args:
        gains: One for each independent unit (a prompt).
    """
    moved = [gain for gain in gains if not math.isclose(gain, 0.0, abs_tol=1e-12)]
    observed = abs(sum(moved)) - 1e-9
    chances = {0.0: 1.0}
    for gain in moved:
        after: dict[float, float] = defaultdict(float)
        for total, chance in chances.items():
            after[round(total + gain, 9)] += chance / 2
            after[round(total - gain, 9)] += chance / 2
        chances = after
        if len(chances) > _EXACT_SUMS:
            return _random_flips(moved, observed)
    return min(1.0, sum(chance for total, chance in chances.items() if abs(total) >= observed))


def _random_flips(moved: Sequence[float], observed: float) -> float:
    generator = random.Random(SEED)  # noqa: S311 - statistics, not secrets
    whole = sum(moved)
    as_large = 0
    for _ in range(_FLIPS):
        flipped = generator.getrandbits(len(moved))
        total = whole - 2 * sum(gain for place, gain in enumerate(moved) if flipped >> place & 1)
        as_large += abs(total) >= observed
    # The observed signs are one of the possible draws (Phipson and Smyth 2010): p is never 0.
    return (as_large + 1) / (_FLIPS + 1)
