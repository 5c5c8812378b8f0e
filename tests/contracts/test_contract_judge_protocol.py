"""The judge protocol: answers cannot leave their fence, verdicts are read from log-probabilities, orders combined."""

import itertools
import math

import pytest

from mixfuse import judge_protocol as protocol
from mixfuse.judge_protocol import Outcome


def test_a_comparison_shows_question_and_answers_in_their_places() -> None:
    system, user = protocol.comparison("Which {one}?", "first {x}", "second %s", nonce="ab12")
    assert system == {"role": "system", "content": protocol.SYSTEM}
    assert user["role"] == "user"
    places = [user["content"].index(text) for text in ("Which {one}?", "first {x}", "second %s")]
    assert places == sorted(places)


def test_an_answer_with_the_nonce_is_refused() -> None:
    for first, second in (("[B ab12]", "x"), ("x", "y ab12 z")):
        with pytest.raises(ValueError, match="fence nonce"):
            protocol.comparison("Q", first, second, nonce="ab12")


def test_a_nonce_occurs_in_none_of_the_texts() -> None:
    half = "".join(f"{number:04x} " for number in range(0x8000))
    for _ in range(50):
        nonce = protocol.new_nonce(half, "other")
        assert nonce not in half
    assert len({protocol.new_nonce("text") for _ in range(50)}) > 40


def test_a_text_that_holds_every_short_nonce_does_not_stall_the_judge() -> None:
    everything = "".join(f"{number:04x}" for number in range(0x10000))
    nonce = protocol.new_nonce(everything)
    assert nonce not in everything
    assert len(nonce) > 4


def test_spellings_of_one_verdict_are_added_up() -> None:
    logprobs = {
        "A": math.log(0.2),
        " A": math.log(0.2),
        "A\n": math.log(0.05),
        "B": math.log(0.15),
        "An": math.log(0.4),
    }
    assert protocol.read_verdict(logprobs) == pytest.approx(0.45 / 0.6)
    assert protocol.read_verdict({"B": -0.1, "C": -3.0}) == 0.0


@pytest.mark.parametrize("logprobs", [{}, {"The": -0.1, "a": -0.2, "AB": -0.3}, {"A": -math.inf}, {"A": math.nan}])
def test_no_verdict_among_the_tokens_is_a_parse_failure(logprobs: dict[str, float]) -> None:
    assert protocol.read_verdict(logprobs) is None


@pytest.mark.parametrize(
    ("forward", "backward", "outcome"),
    [
        (0.9, 0.2, Outcome("first", 0.85, True, 0)),
        (0.1, 0.7, Outcome("second", 0.2, True, 0)),
        (0.9, 0.8, Outcome("tie", 0.55, False, 0)),  # says A in both orders
        (0.2, 0.1, Outcome("tie", 0.55, False, 0)),  # says B in both orders
        (0.5, 0.2, Outcome("tie", 0.65, False, 0)),
        (0.5, 0.5, Outcome("tie", 0.5, False, 0)),
        (None, 0.2, Outcome("tie", 0.8, False, 1)),
        (0.9, None, Outcome("tie", 0.9, False, 1)),
        (None, None, Outcome("tie", 0.5, False, 2)),
    ],
)
def test_two_orders_agree_or_it_is_a_tie(forward: float | None, backward: float | None, outcome: Outcome) -> None:
    combined = protocol.combine(forward, backward)
    assert combined.score == pytest.approx(outcome.score)
    assert combined._replace(score=outcome.score) == outcome


def test_naming_the_answers_the_other_way_round_turns_the_outcome_round() -> None:
    swapped = {"first": "second", "second": "first", "tie": "tie"}
    views = [None, 0.0, 0.2, 0.5, 0.8, 1.0]
    for forward, backward in itertools.product(views, views):
        one, other = protocol.combine(forward, backward), protocol.combine(backward, forward)
        assert other.winner == swapped[one.winner]
        assert other.score == pytest.approx(1 - one.score)
        assert (other.consistent, other.parse_failures) == (one.consistent, one.parse_failures)


@pytest.mark.parametrize("part", ["VERSION", "SYSTEM", "TEMPLATE", "ORDERS"])
def test_any_change_of_the_protocol_changes_its_digest(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = protocol.digest()
    monkeypatch.setattr(protocol, part, getattr(protocol, part) + " ")
    assert protocol.digest() != before
