"""Weighing the answers of one request: `artefact.weigh`."""

import math
from typing import Any

import numpy as np
import pytest
from combiner_pools import anything

from mixfuse.fusion.combiner.artefact import Combiner, strengths, weigh
from mixfuse.fusion.combiner.evidence import UNREAD, Answer, Comparison
from mixfuse.fusion.combiner.fit import Fitted, Options, combiner_of, fit_weights
from mixfuse.fusion.combiner.table import dense_scores, probabilities, tabulate


def combiner(**changes: Any) -> Combiner:
    """Two members, the first stronger."""
    members = {"a": {"weight": 2.0, "accuracy": 0.8, "price": 1.0}, "b": {"weight": 1.0, "accuracy": 0.6, "price": 1.0}}
    data = {"sha256": "", "questions": 1, "marked": 1, "complete": 1}
    fields = {"agreement": "choice", "members": members, "none": {"weight": 0.0}, "best_member": "a", "data": data}
    return Combiner.model_validate(fields | changes)


@pytest.mark.parametrize("seed", range(4))
def test_a_gateway_weighs_as_the_fit_does(seed: int) -> None:
    """Every kind of evidence at once: the light weighing and the arrays of the fit give equal probabilities."""
    questions = anything(60, seed)
    options = Options({}, {}, strengths=(1.0,))
    fitted = fit_weights(questions, options)
    # Random weights: fitted ones of a small pool are near 0, where a missing term would not show.
    parameters = np.random.default_rng(seed).normal(size=fitted.table.layout.size)
    fitted = Fitted(**{**vars(fitted), "parameters": parameters})
    light = combiner_of(fitted, questions, "choice", options).model_copy(update={"fallback": ""})
    table = tabulate(questions, fitted.table.layout, fitted.table.length)
    scores, exists = dense_scores(table, parameters, np.ones(table.answered.shape, bool))
    shares = probabilities(scores)
    for question, share, present in zip(questions, shares, exists, strict=True):
        weighing = weigh(light, question.answers, domain=question.domain, comparisons=question.comparisons)
        expected = sorted((float(value) for value in share[:-1][present]), reverse=True)
        assert [row.probability for row in weighing.classes] == pytest.approx(expected, abs=1e-9)
        assert weighing.none == pytest.approx(share[-1], abs=1e-9)


def test_a_member_that_the_combiner_does_not_know_weighs_the_mean_and_has_no_pairs() -> None:
    paired = combiner(pairs=[{"first": "a", "second": "b", "weight": 9.0}])
    weighing = weigh(paired, [Answer("new", "x"), Answer("a", "y")])
    assert {row.key: row.score for row in weighing.classes} == {"x": 1.5, "y": 2.0}
    assert weigh(paired, [Answer("new", "x"), Answer("a", "x")]).classes[0].score == 3.5


def test_only_unknown_members_are_weighed_too() -> None:
    weighing = weigh(combiner(), [Answer("n", "x"), Answer("m", "y"), Answer("o", "y")])
    assert weighing.classes[0].key == "y"
    assert 0 < weighing.confidence < 1


def test_two_answers_in_which_nothing_can_be_read_are_not_equal() -> None:
    weighing = weigh(combiner(unread=-1.0), [Answer("a", UNREAD), Answer("b", UNREAD)])
    assert [row.answers for row in weighing.classes] == [(0,), (1,)]
    assert [row.score for row in weighing.classes] == [1.0, 0.0]


def test_samples_of_one_member_share_its_vote() -> None:
    weighing = weigh(combiner(), [Answer("a", "x"), Answer("a", "x"), Answer("a", "y"), Answer("b", "y")])
    scores = {row.key: row.score for row in weighing.classes}
    assert scores == pytest.approx({"x": 2 * 2 / 3, "y": 2 / 3 + 1})


def test_the_answer_returned_is_the_most_accurate_members_unless_it_is_doubtful() -> None:
    answers = [Answer("b", "x"), Answer("a", "x")]
    assert weigh(combiner(), answers).leader == 1
    assert weigh(combiner(), [answers[0], Answer("a", "x", doubtful=True)]).leader == 0


def test_a_combiner_that_fell_back_returns_the_best_member_whatever_the_others_say() -> None:
    answers = [Answer("b", "x"), Answer("c", "x"), Answer("a", "y")]
    assert weigh(combiner(), answers).leader == 0
    assert weigh(combiner(fallback="few marks"), answers).leader == 2
    assert weigh(combiner(fallback="few marks"), answers[:2]).leader == 0


def test_a_judge_turns_round_what_votes_leave_close_and_one_without_weight_does_nothing() -> None:
    answers = [Answer("a", "x"), Answer("b", "y")]
    for_b = [Comparison("j", 0, 1, -3.0)]
    assert weigh(combiner(), answers, comparisons=for_b).leader == 0
    assert weigh(combiner(judges={"j": 1.0}), answers, comparisons=for_b).leader == 1
    assert weigh(combiner(judges={"k": 1.0}), answers, comparisons=for_b).leader == 0


def test_strengths_are_bradley_terrys() -> None:
    """Comparisons that agree with strengths of 1, 0 and -1 give them back, up to the ridge."""
    values = strengths([[0], [1], [2]], [Comparison("j", 0, 1, 1.0), Comparison("j", 1, 2, 1.0)])
    assert values == pytest.approx([1, 0, -1], abs=0.2)
    assert sum(values) == pytest.approx(0)
    assert strengths([[0, 1], [2]], [Comparison("j", 0, 1, 5.0)]) == [0, 0]


def test_the_confidence_is_calibrated_by_the_number_of_members_that_answered() -> None:
    calibration = [{"slope": 0.0, "intercept": 0.0}, {"slope": 0.0, "intercept": math.log(3)}]
    known = combiner(calibration=calibration)
    assert weigh(known, [Answer("a", "x"), Answer("a", "x")]).confidence == pytest.approx(0.5)
    assert weigh(known, [Answer("a", "x"), Answer("b", "x")]).confidence == pytest.approx(0.75)
    three = [Answer("a", "x"), Answer("b", "x"), Answer("c", "x")]
    assert weigh(known, three).confidence == pytest.approx(0.75)


def test_there_must_be_answers() -> None:
    with pytest.raises(ValueError, match="no answers"):
        weigh(combiner(), [])
