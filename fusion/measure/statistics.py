"""Intervals and paired tests for marks of pairs or tasks, where several may belong to one prompt.

Whole prompts are drawn and whole prompts change sides, because marks of one prompt are not independent. Nothing here
knows what is marked. SciPy is imported when the first test is computed.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mixfuse.contracts.extras import needs_extra

RESAMPLES = 1000
SEED = 0
# All 2^n sign flips of n prompts are enumerated up to this many; of more, as many are drawn at random.
FLIPS = 1 << 14
_TAIL = 0.025  # of a 95 % interval


class Estimate(NamedTuple):
    """A value with its 95 % interval.

    Attributes:
        value: The estimate itself.
        low: The lower end.
        high: The upper end.
    """

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
    """Rows grouped by prompt, and the cluster bootstrap over them: every estimate uses the same draws of prompts.

    Args:
        keys: The prompt of each row.
    """

    def __init__(self, keys: Sequence[Hashable]) -> None:
        numbers: dict[Hashable, int] = {}
        self._of_row = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.intp)
        count = len(numbers)
        self._rows = [np.flatnonzero(self._of_row == number) for number in range(count)]
        self._sizes = np.bincount(self._of_row, minlength=count)
        self._draws = np.random.default_rng(SEED).integers(0, max(1, count), (RESAMPLES, count))

    def mean(self, values: Sequence[float]) -> Estimate:
        """The mean of one value a row.

        Raises:
            ValueError: There are no rows.
        """
        if not len(values):
            raise ValueError("no rows, so no mean")
        sums = self.sums(values)
        means = sums[self._draws].sum(axis=1) / self._sizes[self._draws].sum(axis=1)
        return _percentile_interval(float(sums.sum() / len(values)), means)

    def estimate(self, statistic: Callable[[npt.NDArray[np.intp]], float | None]) -> Estimate:
        """Any statistic of rows.

        Args:
            statistic: Indices of rows, as often as each was drawn → its value; None where these rows have none.

        Raises:
            ValueError: It has none for the rows as they are.
        """
        value = statistic(np.arange(len(self._of_row)))
        if value is None:
            raise ValueError("the statistic has no value for these rows")
        drawn = (statistic(np.concatenate([self._rows[number] for number in draw])) for draw in self._draws)
        return _percentile_interval(value, np.array([one for one in drawn if one is not None]))

    def sums(self, values: Sequence[float]) -> npt.NDArray[np.float64]:
        """The sum over each prompt's rows."""
        sums = np.zeros(len(self._rows))
        np.add.at(sums, self._of_row, np.asarray(values, dtype=np.float64))
        return sums


def _percentile_interval(value: float, resampled: npt.NDArray[np.float64]) -> Estimate:
    if not resampled.size:
        return Estimate(value, value, value)
    low, high = np.quantile(resampled, (_TAIL, 1 - _TAIL))
    return Estimate(value, float(low), float(high))


def difference(keys: Sequence[Hashable], a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compares two sets of marks on the same rows.

    Args:
        keys: The prompt of each row.
        a: A's mark of each row.
        b: B's.

    Raises:
        ValueError: There are no rows.
    """
    gains = np.array([x - y for x, y in zip(a, b, strict=True)], dtype=np.float64)
    clusters = Clusters(keys)
    mean = clusters.mean(gains.tolist())
    by_prompt = clusters.sums(gains.tolist())
    better, worse = int((by_prompt > 0).sum()), int((by_prompt < 0).sum())
    one_mark_a_prompt = len(by_prompt) == len(gains) and bool(np.isin(gains, (-1.0, 0.0, 1.0)).all())
    p = mcnemar(better, worse) if one_mark_a_prompt else sign_flip(by_prompt)
    return Difference(*mean, p, "mcnemar" if one_mark_a_prompt else "sign_flip", better, worse)


def mcnemar(better: int, worse: int) -> float:
    """The exact two-sided p-value of discordant pairs: a binomial test (McNemar 1947)."""
    if not better + worse:
        return 1.0
    return float(_stats().binomtest(better, better + worse).pvalue)


def sign_flip(gains: Sequence[float] | npt.NDArray[np.float64]) -> float:
    """The two-sided p-value of a sum of gains, if each were as likely to have the other sign.

    Exact up to 14 gains other than zero: all sign flips are enumerated. Of more gains, `FLIPS` flips are drawn, and
    the observed signs count as one of them (Phipson and Smyth 2010), so that p is never 0.

    Args:
        gains: One for each independent unit (a prompt).
    """
    values = np.asarray(gains, dtype=np.float64)
    moved = values[~np.isclose(values, 0.0, atol=1e-12)]
    if moved.size < 2:  # one unit has two signs, both as extreme
        return 1.0
    test = _stats().permutation_test(
        (moved,), np.sum, permutation_type="samples", vectorized=True, n_resamples=FLIPS, batch=1024, rng=SEED
    )
    return float(test.pvalue)


def wilson(marks: Sequence[bool]) -> Estimate:
    """A share with Wilson's 95 % interval (JASA 22, 1927), which is sound for shares near 0 and 1.

    Args:
        marks: Of independent rows.

    Raises:
        ValueError: There are no marks.
    """
    test = _stats().binomtest(sum(marks), len(marks))
    low, high = test.proportion_ci(method="wilson")
    return Estimate(float(test.statistic), float(low), float(high))


def _stats() -> Any:
    with needs_extra("measure"):
        from scipy import stats
    return stats
