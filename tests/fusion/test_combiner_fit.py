"""Fitting a combiner to pools whose truth is known."""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

import numpy as np
import pytest
from combiner_pools import pool, remarked

from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.combiner.artefact import Combiner
from mixfuse.fusion.combiner.evidence import Comparison, Question
from mixfuse.fusion.combiner.fit import Options, calibrate, combiner_of, fit_weights
from mixfuse.fusion.measure.combiner_fit import fit_combiner
from mixfuse.fusion.measure.combiner_replay import Figures, replay

EVEN = {"a": 0.6, "b": 0.6, "c": 0.6}


def weights(questions: Sequence[Question]) -> Combiner:
    """A combiner without policies and figures."""
    options = Options({}, {})
    return combiner_of(fit_weights(questions, options), questions, "choice", options)


def figures(train: Sequence[Question], test: Sequence[Question]) -> Figures:
    return replay(weights(train), test)


def test_members_weigh_what_the_truth_says_they_do() -> None:
    """Independent members: the best score of a vote is log(accuracy · wrong options / (1 - accuracy))."""
    accuracies = {"a": 0.8, "b": 0.6, "c": 0.4}
    fitted = weights(pool(3000, accuracies))
    for first, second in (("a", "b"), ("b", "c")):
        gap = fitted.members[first].weight - fitted.members[second].weight
        truth = [math.log(accuracies[name] / (1 - accuracies[name])) for name in (first, second)]
        assert gap == pytest.approx(truth[0] - truth[1], abs=0.35)


def test_independent_members_of_like_strength_beat_the_best_of_them() -> None:
    seen = figures(pool(600, EVEN), pool(1500, EVEN, seed=1))
    assert seen.difference.low > 0.05
    assert seen.weighed >= seen.majority - 0.01


def test_members_that_copy_one_another_do_not_outvote_a_better_one() -> None:
    """Three copies of a weak member: votes by log-odds follow them, the combiner knows better."""
    accuracies = {"strong": 0.7, "other": 0.6, "weak": 0.6, "copy": 0.6, "again": 0.6}
    copies = {"copy": "weak", "again": "weak"}
    train, test = (pool(1500, accuracies, seed=seed, copies=copies, copied=0.95) for seed in (0, 1))
    fitted = weights(train)
    seen = replay(fitted, test)
    assert seen.majority < seen.best_member_accuracy - 0.03
    assert seen.naive < seen.weighed - 0.03
    assert seen.difference.low > 0.05
    assert {pair.first + pair.second: pair.weight for pair in fitted.pairs}["weakcopy"] < -0.1
    alone = replay(fitted.model_copy(update={"pairs": [], "counts": []}), test)
    assert alone.weighed < seen.weighed - 0.02


def test_a_member_that_is_right_in_its_domain_only_is_believed_there() -> None:
    domains = {"law": {"a": 0.9, "b": 0.3}, "maths": {"a": 0.3, "b": 0.9}}
    train, test = (pool(800, {"a": 0.5, "b": 0.5}, seed=seed, domains=domains) for seed in (0, 1))
    seen = figures(train, test)
    assert seen.difference.low > 0.15
    assert figures(train, [replace(question, domain=None) for question in test]).weighed < seen.weighed - 0.1


def test_a_judge_gets_the_weight_that_it_earns() -> None:
    def judged(questions: Sequence[Question], shift: float, seed: int) -> list[Question]:
        generator = np.random.default_rng(seed)
        result = []
        for question in questions:
            marks = [float(bool(answer.right)) for answer in question.answers]
            odds = [shift * (marks[0] - marks[1]), shift * (marks[1] - marks[2])]
            comparisons = [Comparison("j", n, n + 1, float(generator.normal(value))) for n, value in enumerate(odds)]
            result.append(replace(question, comparisons=tuple(comparisons)))
        return result

    train, test = pool(600, EVEN), pool(1000, EVEN, seed=1)
    good = weights(judged(train, 2.0, 0))
    assert good.judges["j"] > 0.5
    assert abs(weights(judged(train, 0.0, 0)).judges["j"]) < 0.15
    assert replay(good, judged(test, 2.0, 1)).weighed > figures(train, test).weighed + 0.05


@pytest.mark.parametrize(
    ("accuracies", "copies"),
    [
        (EVEN, {}),
        ({"a": 0.8, "b": 0.4, "c": 0.4, "d": 0.4}, {}),
        ({"a": 0.75, "b": 0.7, "c": 0.7, "d": 0.7}, {"c": "b", "d": "b"}),
        ({"a": 0.9, "b": 0.85}, {}),
    ],
)
def test_a_hundred_marked_questions_do_no_harm(accuracies: dict[str, float], copies: dict[str, str]) -> None:
    test = pool(2000, accuracies, seed=99, copies=copies)
    for seed in range(3):
        seen = figures(pool(100, accuracies, seed=seed, copies=copies), test)
        assert seen.difference.high > -0.005, (seed, seen.difference)
        assert not seen.fallback or seen.difference.value == 0


def test_where_weighing_gains_nothing_the_best_member_is_returned_and_it_says_why() -> None:
    combiner = fit_combiner(pool(200, {"a": 0.9, "b": 0.2}), "choice")
    assert "shows no gain" in combiner.fallback
    assert combiner.figures["weighed"] == combiner.figures["best_member_accuracy"]
    assert [policy.asked for policy in combiner.policies] == [1.0] * len(combiner.policies)


def test_the_confidence_is_as_right_as_it_says() -> None:
    train, test = pool(1000, EVEN), pool(3000, EVEN, seed=1)
    assert figures(train, test).ece < 0.03
    # A wrong calibration shows: everything but the calibration is the same.
    wrong = weights(train)
    wrong = wrong.model_copy(
        update={"calibration": [c.model_copy(update={"intercept": c.intercept + 1}) for c in wrong.calibration]}
    )
    assert replay(wrong, test).ece > 0.08


def test_calibration_recovers_a_slope_and_an_intercept() -> None:
    generator = np.random.default_rng(0)
    odds = generator.normal(0, 2, 5000)
    right = (generator.random(5000) < 1 / (1 + np.exp(-(0.5 * odds - 0.3)))).astype(float)
    fitted = calibrate(1 / (1 + np.exp(-odds)), right)
    assert (fitted.slope, fitted.intercept) == pytest.approx((0.5, -0.3), abs=0.1)


def test_questions_without_marks_are_counted_and_left_out() -> None:
    questions = pool(400, EVEN)
    unmarked = remarked(questions, lambda question, _: int(question.id) < 300)
    combiner = fit_combiner(unmarked, "choice")
    assert (combiner.data.questions, combiner.data.marked) == (400, 300)
    assert combiner.figures["n"] == 300
    assert combiner.figures["limits"] == ["100 of 400 questions have no mark and are left out."]


def test_rows_with_one_marked_answer_help_the_fit() -> None:
    """Thirty questions marked throughout are few; 600 more, of which one answer is marked, tell the members apart."""
    questions = pool(630, {"a": 0.8, "b": 0.6, "c": 0.3})
    partly = remarked(questions, lambda question, place: int(question.id) < 30 or place == int(question.id) % 3)
    combiner = fit_combiner(partly, "choice")
    assert combiner.figures["n"] == 30
    assert combiner.data.marked == 630
    order = [combiner.members[name].weight for name in "abc"]
    assert order == sorted(order, reverse=True)
    assert combiner.members["a"].accuracy == pytest.approx(0.8, abs=0.06)
    assert any("600 questions are marked in part. They help" in limit for limit in combiner.figures["limits"])


def test_feedback_for_bad_answers_only_is_named_as_a_limit() -> None:
    questions = pool(300, EVEN)
    partly = remarked(questions, lambda question, place: int(question.id) < 150 or not question.answers[place].right)
    combiner = fit_combiner(partly, "choice")
    assert any("bad answers only" in limit for limit in combiner.figures["limits"])
    every = fit_combiner(questions, "choice")
    assert every.figures["limits"] == []


def test_members_asked_in_doubt_are_judged_by_how_often_they_were_asked() -> None:
    """`b` is always asked on hard questions, where it does badly, and on one easy question in ten."""
    generator = np.random.default_rng(0)
    hard, easy = pool(200, {"a": 0.4, "b": 0.3}), pool(2000, {"a": 0.8, "b": 0.9}, seed=1)
    asked = [
        question if generator.random() < 0.1 else replace(question, answers=question.answers[:1]) for question in easy
    ]
    biased = fit_weights([*hard, *asked], Options({}, {}, strengths=(1.0,)))
    assert biased.accuracies[1] < 0.7
    recorded = [replace(question, propensities={"b": 0.1}) for question in asked]
    weighed = fit_weights([*hard, *recorded], Options({}, {}, strengths=(1.0,)))
    assert weighed.accuracies[1] == pytest.approx((200 * 0.3 + 2000 * 0.9) / 2200, abs=0.08)


def test_too_few_marks_are_refused() -> None:
    with pytest.raises(MixfuseError, match="20 of 50 questions are marked; a combiner needs at least 30"):
        fit_combiner(remarked(pool(50, EVEN), lambda question, _: int(question.id) < 20), "choice")


def test_members_that_never_answered_the_same_question_cannot_be_compared() -> None:
    questions = [
        replace(question, answers=question.answers[number % 2 : number % 2 + 1])
        for number, question in enumerate(pool(200, EVEN))
    ]
    with pytest.raises(MixfuseError, match="no question has a marked answer of every member"):
        fit_combiner(questions, "choice")


def test_one_member_alone_has_a_calibrated_confidence() -> None:
    combiner = fit_combiner(pool(200, {"a": 0.7}), "choice")
    assert combiner.best_member == "a"
    assert combiner.figures["weighed"] == combiner.figures["best_member_accuracy"]
    assert combiner.figures["ece"] < 0.1


def test_the_same_answers_give_the_same_combiner() -> None:
    first, second = (fit_combiner(pool(120, EVEN), "choice") for _ in range(2))
    assert first.revision == second.revision
    other = fit_combiner(pool(120, EVEN, seed=5), "choice")
    assert other.data.sha256 != first.data.sha256


def test_the_share_that_all_fail_bounds_what_any_selection_reaches() -> None:
    questions = pool(200, EVEN)
    combiner = fit_combiner(questions, "choice")
    fails = mean(not any(answer.right for answer in question.answers) for question in questions)
    seen = combiner.figures["all_fail"]
    assert seen["value"] == pytest.approx(fails)
    assert seen["low"] < fails < seen["high"]
    assert combiner.figures["oracle"] == pytest.approx(1 - fails)
