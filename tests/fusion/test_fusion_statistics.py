"""Intervals and paired tests: values known from formulas, and whole prompts as what is drawn and flipped."""

import math
import random

import pytest

from mixfuse.fusion.measure.comparisons import Comparison
from mixfuse.fusion.measure.marks import Views, paired
from mixfuse.fusion.measure.statistics import FLIPS, Clusters, difference, mcnemar, sign_flip, wilson


def binomial(b: int, c: int) -> float:
    """The exact two-sided p-value (McNemar 1947; a binomial test of the discordant pairs)."""
    n, k = b + c, min(b, c)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 5), (9, 2), (1, 12), (40, 20), (300, 250)])
def test_one_mark_a_prompt_is_exact_mcnemar(b: int, c: int) -> None:
    a = [1.0] * b + [0.0] * c + [1.0] * 30
    other = [0.0] * b + [1.0] * c + [1.0] * 30
    interval = difference(range(len(a)), a, other)
    assert interval.test == "mcnemar"
    assert (interval.better, interval.worse) == (b, c)
    assert interval.p == pytest.approx(binomial(b, c), rel=1e-9)
    assert interval.value == pytest.approx((b - c) / len(a))


def test_pairs_of_one_prompt_change_sides_together() -> None:
    keys = ["p"] * 4 + ["q"] * 4
    interval = difference(keys, [1.0] * 8, [0.0] * 8)
    assert interval.test == "sign_flip"
    assert interval.p == pytest.approx(0.5)  # two prompts: 2 of 4 ways of signs are as extreme
    assert difference(range(8), [1.0] * 8, [0.0] * 8).p == pytest.approx(2 / 2**8)


def test_many_different_gains_are_flipped_at_random_and_give_nearly_the_exact_value() -> None:
    generator = random.Random(3)
    gains = [generator.gauss(0.4, 1) for _ in range(24)]
    exact_like = sign_flip(gains)
    # The normal approximation of the sign-flip distribution.
    z = abs(sum(gains)) / math.sqrt(sum(gain**2 for gain in gains))
    assert exact_like == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.03)
    assert exact_like == sign_flip(gains)


def test_up_to_fourteen_prompts_are_flipped_exactly() -> None:
    gains = [3.0, 2.0, -1.0, 0.0, 5.0, 1.0, -2.0, 4.0, 1.5, 0.5, -0.5, 2.5, 1.0, 3.5, 0.25]
    moved = [gain for gain in gains if gain]
    assert len(moved) == 14
    sums = [sum(gain if flips >> n & 1 else -gain for n, gain in enumerate(moved)) for flips in range(2**14)]
    exact = sum(abs(one) >= abs(sum(moved)) - 1e-9 for one in sums) / 2**14
    assert sign_flip(gains) == pytest.approx(exact, rel=1e-9)


def test_a_random_p_value_is_never_zero() -> None:
    assert sign_flip([1.0] * 300) == pytest.approx(2 / (FLIPS + 1))


def test_one_prompt_or_none_is_no_evidence() -> None:
    assert sign_flip([3.0]) == sign_flip([]) == sign_flip([0.0, 0.0]) == mcnemar(0, 0) == 1
    assert difference(["p", "p"], [1.0, 1.0], [0.0, 0.0]).p == 1


def test_marks_of_a_half_are_no_mcnemar() -> None:
    assert difference(range(3), [1.0, 0.5, 1.0], [0.0, 0.0, 0.0]).test == "sign_flip"


def test_wilsons_interval_is_the_textbooks() -> None:
    z, n, k = 1.959964, 20, 3
    centre = (k + z * z / 2) / (n + z * z)
    half = z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    interval = wilson([True] * k + [False] * (n - k))
    assert interval == pytest.approx((0.15, centre - half, centre + half), abs=1e-6)
    assert wilson([False] * 10).low == 0
    with pytest.raises(ValueError, match="n"):
        wilson([])


def test_intervals_cover_the_truth_about_as_often_as_they_claim() -> None:
    generator = random.Random(7)
    covered = 0
    for _ in range(200):
        figure = Clusters([n // 3 for n in range(120)]).mean(
            [float(generator.random() < 0.5 + 0.3 * (n // 3 % 2) - 0.15) for n in range(120)]
        )
        covered += figure.low <= 0.5 <= figure.high
    assert 180 <= covered <= 198


def test_no_difference_is_no_evidence() -> None:
    interval = difference(range(5), [1.0] * 5, [1.0] * 5)
    assert (interval.value, interval.low, interval.high, interval.p) == (0, 0, 0, 1)


def test_a_means_interval_is_about_the_normal_one() -> None:
    generator = random.Random(1)
    values = [float(generator.random() < 0.7) for _ in range(400)]
    figure = Clusters(range(400)).mean(values)
    spread = 1.96 * math.sqrt(figure.value * (1 - figure.value) / 400)
    assert figure.low == pytest.approx(figure.value - spread, abs=0.005)
    assert figure.high == pytest.approx(figure.value + spread, abs=0.005)


def test_a_statistic_of_rows_sees_each_as_often_as_it_was_drawn() -> None:
    values = [float(number % 3) for number in range(30)]
    clusters = Clusters([number // 2 for number in range(30)])
    by_rows = clusters.estimate(lambda rows: sum(values[row] for row in rows) / len(rows))
    assert by_rows == pytest.approx(clusters.mean(values))
    never = clusters.estimate(lambda rows: 1.0 if sorted(rows) == list(range(30)) else None)
    assert never == (1, 1, 1)
    with pytest.raises(ValueError, match="no value"):
        clusters.estimate(lambda _rows: None)
    with pytest.raises(ValueError, match="no rows"):
        Clusters([]).mean([])


def test_prompts_weigh_by_their_rows() -> None:
    keys, values = ["p", "q", "q", "q"], [1.0, 0.0, 0.0, 0.0]
    assert Clusters(keys).mean(values) == (0.25, 0, 1)


def test_two_judges_on_the_same_pairs() -> None:
    rows = [Comparison(f"p{n // 2}", "x", "y", "first" if n % 2 else "second") for n in range(12)]
    knows = [Views(0.9, 0.1) if row.label == "first" else Views(0.1, 0.9) for row in rows]
    favours_a = [Views(0.9, 0.8)] * 12
    tie = [Comparison("p0", "x", "y", "tie")]
    interval = paired([*rows, *tie], [*knows, Views(0.5, 0.5)], [*favours_a, Views(0.5, 0.5)])
    assert (interval.value, interval.low, interval.high) == (1, 1, 1)
    assert (interval.better, interval.worse, interval.test) == (6, 0, "sign_flip")
    assert interval.p == pytest.approx(2 / 2**6)
    averaged = paired(rows, knows, favours_a, measure="order_averaged")
    assert averaged.value == pytest.approx(0.5)
    assert paired(rows, favours_a, knows).value == -1
