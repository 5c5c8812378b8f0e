"""The rest of an adapter's effect: another revision is found under rounding that hides it in every single token."""

import math
import re

import numpy
import pytest

from mixfuse.contracts import agreement
from mixfuse.contracts.adapter import Deviation
from mixfuse.contracts.agreement import REPEATED, Answers

TEXTS, BEGINNINGS, BEGINNING = 12, 12, 8
NOISE = 0.1
"""Nats: what rounding moves a token by; the adapter's effect is as large."""
PROMPTS = [
    [*([1000 + behind] * BEGINNING), *range(text * REPEATED, (text + 1) * REPEATED)]
    for text in range(TEXTS)
    for behind in range(BEGINNINGS)
]


class Engine:
    """Log-probabilities of `PROMPTS` under effects that are of the text, with rounding that is of the prompt."""

    def __init__(self, seed: int) -> None:
        self._draw = numpy.random.default_rng(seed)

    def effect(self) -> numpy.ndarray:
        of_text = self._draw.normal(0, 0.1, (TEXTS, 1, REPEATED))
        beginning = numpy.zeros((TEXTS, BEGINNINGS, BEGINNING - 1))
        return numpy.concatenate([beginning, of_text.repeat(BEGINNINGS, 1)], 2).reshape(len(PROMPTS), -1)

    def rounded(self, exact: numpy.ndarray) -> numpy.ndarray:
        return exact + self._draw.normal(0, NOISE, exact.shape)


def judged(seed: int, *, other: float, scale: float = 1.0, drift: float = 0.0) -> agreement.Comparison:
    """An engine that applies an adapter of which a part is another's, compared with the adapter."""
    engine = Engine(seed)
    base = numpy.full((len(PROMPTS), BEGINNING + REPEATED - 1), -2.0)
    right, strange = engine.effect(), engine.effect()
    off = drift * 10 * engine.effect()
    shown = scale * right + other * strange
    return agreement.compare(
        Answers((base + right).tolist(), base.tolist()),
        Answers(engine.rounded(base + off + shown).tolist(), engine.rounded(base + off).tolist()),
        PROMPTS,
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_right_adapter_shows_no_rest(seed: int) -> None:
    found = judged(seed, other=0.0)
    assert found.rest is not None
    assert abs(found.rest.square) < 4 * found.rest.error
    assert agreement.fault(found, tolerance=0.02) is None


@pytest.mark.parametrize("seed", range(5))
def test_another_revision_is_found_where_its_share_and_its_quantiles_pass(seed: int) -> None:
    found = judged(seed, other=0.5)
    assert found.rest is not None
    assert found.rest.square == pytest.approx(0.25, abs=0.08)
    assert not any(map(agreement.wrong, found.shares))
    fault = agreement.fault(found, tolerance=0.02)
    assert fault is not None
    assert "is it another revision?" in fault
    assert agreement.fault(found._replace(rest=None), tolerance=0.02) is None


def test_a_multiple_of_the_effect_is_the_shares_to_judge() -> None:
    found = judged(0, other=0.0, scale=2.0)
    assert found.rest is not None
    assert abs(found.rest.square) < 4 * found.rest.error
    assert "applies it twice" in str(agreement.fault(found, tolerance=1.0))


def test_a_base_that_is_off_allows_more() -> None:
    close, far = judged(0, other=0.0), judged(0, other=0.0, drift=0.5)
    assert close.rest is not None
    assert far.rest is not None
    assert far.rest.drift == pytest.approx(0.5, rel=0.2)
    assert agreement.most_rest(far.rest) > 2 * agreement.most_rest(close.rest)


def test_without_texts_behind_several_beginnings_there_is_no_rest() -> None:
    alone = [list(prompt) for number, prompt in enumerate(PROMPTS) if number % BEGINNINGS == 0]
    assert agreement.repeats(alone) == []
    assert len(agreement.repeats(PROMPTS)) == TEXTS
    rows = [[-1.0] * (len(prompt) - 1) for prompt in alone]
    assert agreement.rest(Answers(rows, rows), Answers(rows, rows), alone) is None


def drift(worst: float) -> Deviation:
    return agreement.deviation([[-2.0] * 200], [[-2.0 - worst] * 200])


def test_a_verdict_may_be_off_by_half_of_what_a_log_probability_may() -> None:
    assert agreement.verdict_limit(0.1, None) == pytest.approx(0.05)
    assert agreement.verdict_limit(0.1, drift(0.01)) == pytest.approx(0.05)
    assert agreement.verdict_limit(0.1, drift(0.3)) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([0.2, 0.75], None),
        ([0.2, 0.74], r"comparison 2 is 0\.740; it was 0\.800 then, and 0\.05 is allowed"),
        ([None, 0.8], "comparison 1 cannot be read"),
        ([math.nan, 0.8], "comparison 1 is nan"),
    ],
)
def test_a_verdict_that_is_off_or_cannot_be_read_is_a_fault(said: list[float | None], words: str | None) -> None:
    fault = agreement.verdict_fault(said, [0.2, 0.8], limit=0.0501, when="then")
    assert fault is None if words is None else re.search(words, fault or "")


def test_bases_that_another_batch_does_not_make_of_each_other_are_a_fault() -> None:
    allowed = agreement.batch_tolerance("bfloat16 fp8", 0.02)
    assert allowed == pytest.approx(0.1)
    assert agreement.batch_tolerance("float32", 1e-5) == pytest.approx(1e-3)
    one = [[-2.0] * 9]
    assert agreement.base_fault(one, [[-2.29] * 8 + [-9.0]], allowed=allowed) is None
    assert "not the same in all engines" in (agreement.base_fault(one, [[-2.31] * 9], allowed=allowed) or "")
