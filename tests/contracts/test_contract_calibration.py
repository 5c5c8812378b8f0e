"""A judge's calibration: what is fitted to labelled pairs, and what it does to verdicts at run time."""

import math
import random

import pytest

from mixfuse.contracts import calibration
from mixfuse.contracts.judge_protocol import Calibration, combine, probability


def judged(count: int, sharpness: float, bias: float = 0.0) -> list[calibration.LogOdds]:
    """Pairs whose true log-odds are known, and a judge that overstates them; a bias favours what is shown first."""
    rng = random.Random(3)
    pairs = []
    for _ in range(count):
        truth = rng.gauss(0, 1.5)
        sign = 1 if rng.random() < probability(truth) else -1  # which answer people called better
        pairs.append((sharpness * (sign * truth + bias), sharpness * (sign * truth - bias)))
    return pairs


def test_an_overconfident_judge_is_cooled_to_what_it_knows() -> None:
    pairs = judged(4000, sharpness=5.0)
    fitted = calibration.fit(pairs)
    assert fitted.temperature == pytest.approx(5.0, rel=0.1)
    assert calibration.expected_error(pairs) > 0.1
    assert calibration.expected_error(pairs, fitted) < 0.03
    assert calibration.nll(pairs, fitted.temperature) < calibration.nll(pairs)


def test_no_temperature_near_the_fitted_one_is_more_likely() -> None:
    pairs = judged(300, sharpness=0.2, bias=2.0)
    fitted = calibration.fit(pairs)
    best, target = math.inf, 301 / 302  # Platt's
    for factor in (1, 0.5, 0.9, 0.99, 1.01, 1.1, 2):
        cost = calibration.nll(pairs, fitted.temperature * factor, target)
        best = cost if factor == 1 else best
        assert cost >= best


def test_the_likelihood_is_that_of_the_order_averaged_probability() -> None:
    pairs = [(1.0, -3.0), (0.5, 2.0)]
    expected = -sum(math.log(calibration.combined(pair, Calibration(temperature=2.0))) for pair in pairs) / 2
    assert calibration.nll(pairs, 2.0) == pytest.approx(expected)
    unsure = -sum(math.log(calibration.combined((-a, -b), Calibration(temperature=2.0))) for a, b in pairs) / 2
    assert calibration.nll(pairs, 2.0, target=0.9) == pytest.approx(0.9 * expected + 0.1 * unsure)
    assert math.isfinite(calibration.nll([(-1000.0, -2000.0)], 0.05))


def test_a_few_pairs_that_are_right_or_flip_make_no_judge_certain() -> None:
    """The likeliest temperature is zero: certain where the orders agree, and ½ where not."""
    pairs = [(0.2, 0.3)] * 12 + [(1.0, -0.9)] * 24
    fitted = calibration.fit(pairs)
    assert calibration.nll(pairs, 0.02) < calibration.nll(pairs, fitted.temperature)
    assert 0.5 < calibration.combined((0.2, 0.3), fitted) < 0.999
    assert calibration.combined((1.0, -0.9), fitted) > 0.5, "what both orders say together is lost"


def test_a_score_of_one_half_is_half_right() -> None:
    pairs = [(2.0, -2.0)] * 4
    assert calibration.combined(pairs[0]) == pytest.approx(0.5)
    assert calibration.expected_error(pairs) == pytest.approx(0)


def test_verdicts_that_are_wrong_near_one_half_become_ties() -> None:
    wrong_when_unsure = [(-0.1, -0.1)] * 6 + [(0.1, 0.1)] * 2 + [(3.0, 3.0)] * 20
    fitted = calibration.fit(wrong_when_unsure)
    assert fitted.tie_margin > 0
    assert combine(probability(0.1), 1 - probability(0.1), fitted).winner == "tie"
    assert combine(probability(3.0), 1 - probability(3.0), fitted).winner == "first"
    right_when_unsure = [(0.1, 0.1)] * 6 + [(-0.1, -0.1)] * 2 + [(3.0, 3.0)] * 20
    assert calibration.fit(right_when_unsure).tie_margin == 0
    # A margin above both unsure verdicts gains as much as it loses; of equal margins the smallest is taken.
    assert calibration.fit([(0.1, 0.1), (-0.2, -0.2)] + [(3.0, 3.0)] * 20).tie_margin == 0
    # People's own ties are credited as ties.
    assert calibration.fit(right_when_unsure, ties=[(0.05, -0.02)] * 9).tie_margin > 0


def test_without_pairs_nothing_is_changed() -> None:
    assert calibration.fit([]) == Calibration()
    for forward, backward in ((0.9, 0.2), (0.5, 0.5), (None, 0.3), (1.0, 0.0)):
        assert combine(forward, backward, Calibration()) == combine(forward, backward)


def test_a_temperature_moves_scores_and_turns_no_verdict_round() -> None:
    for forward, backward in ((0.9, 0.2), (0.3, 0.6), (0.8, 0.7), (1.0, 0.0), (0.6, None)):
        plain = combine(forward, backward)
        cooled = combine(forward, backward, Calibration(temperature=3.0))
        assert (cooled.winner, cooled.consistent, cooled.parse_failures) == (
            plain.winner,
            plain.consistent,
            plain.parse_failures,
        )
        assert abs(cooled.score - 0.5) <= abs(plain.score - 0.5)
    assert combine(0.9, 0.1, Calibration(temperature=2.0)).score == pytest.approx(0.75)  # odds 9 become 3
