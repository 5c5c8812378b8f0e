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
from mixfuse.fusion.combiner.fit import (
    Options,
    _calibrations,
    _fallback,
    calibrate,
    combiner_of,
    fit_weights,
    scores_by_fold,
)
from mixfuse.fusion.combiner.table import probabilities
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


def test_where_no_member_stands_out_weighing_is_the_safer_choice() -> None:
    """Six equal members, few marks: the one that was right most often by chance is no better than the others."""
    names = dict.fromkeys("abcdef", 0.6)
    test = pool(2000, names, seed=99)
    for seed in range(6):
        combiner = weights(pool(60, names, seed=seed, copies={"c": "b", "d": "b"}))
        assert not combiner.fallback
        assert replay(combiner, test).difference.value > 0.03


def test_a_strong_penalty_leaves_votes_that_count_alike() -> None:
    """Weights are pulled towards their mean, not towards 0: what is left is the majority vote."""
    fitted = fit_weights(pool(60, {"a": 0.8, "b": 0.6, "c": 0.4}), Options({}, {}, strengths=(100.0,)))
    values = fitted.parameters[fitted.table.layout.blocks["member"]]
    assert values.mean() > 0.5
    assert np.ptp(values) < 0.3


@pytest.mark.parametrize(
    ("accuracies", "gained", "lost", "reason"),
    [
        ({"a": 0.9, "b": 0.4}, 0, 20, "differs from the best member by -0.050"),
        ({"a": 0.9, "b": 0.4}, 10, 10, "by +0.000"),  # no gain, and an error
        ({"a": 0.9, "b": 0.4}, 11, 10, "by +0.003"),  # a gain within a quarter of its error
        ({"a": 0.9, "b": 0.4}, 20, 2, ""),
        ({"a": 0.6, "b": 0.6}, 0, 20, ""),  # neither member stands out
    ],
)
def test_a_member_is_preferred_where_it_stands_out_and_weighing_gains_nothing(
    accuracies: dict[str, float], gained: int, lost: int, reason: str
) -> None:
    fitted = fit_weights(pool(400, accuracies), Options({}, {}, strengths=(1.0,)))
    weighed = fitted.table.mark[:, fitted.best].copy()
    weighed[np.flatnonzero(weighed == 0)[:gained]] = 1.0
    weighed[np.flatnonzero(fitted.table.mark[:, fitted.best] == 1)[:lost]] = 0.0
    said = _fallback(fitted.table, fitted.accuracies, weighed)
    assert reason in said
    assert bool(said) == bool(reason)


def test_the_confidence_in_a_preferred_member_is_that_of_its_own_answers() -> None:
    """Its class need not be the likeliest: here it hardly ever is."""
    fitted = fit_weights(pool(800, {"a": 0.9, "b": 0.25}), Options({}, {}, strengths=(1.0,)))
    calibrations = _calibrations(
        fitted.table, fitted.fold, fitted.held_out, fitted.accuracies, np.random.default_rng(0), preferred=1
    )
    shares = probabilities(scores_by_fold(fitted.table, fitted.fold, fitted.held_out))[:, :-1]
    of_b = (shares * fitted.table.share[:, 1]).sum(1)
    assert mean(calibrations[-1](float(value)) for value in of_b) == pytest.approx(0.25, abs=0.05)
    leading = mean(fitted.calibration[-1](float(value)) for value in shares.max(1))
    assert leading == pytest.approx(0.9, abs=0.05)


def test_where_weighing_gains_nothing_the_best_member_is_returned_and_it_says_why() -> None:
    combiner = fit_combiner(pool(200, {"a": 0.9, "b": 0.2}), "choice")
    assert "shows no gain" in combiner.fallback
    assert combiner.figures["weighed"] == combiner.figures["best_member_accuracy"]
    assert [policy.asked for policy in combiner.policies] == [1.0] * len(combiner.policies)


def test_the_confidence_is_as_right_as_it_says() -> None:
    train, test = pool(1000, EVEN), pool(3000, EVEN, seed=1)
    seen = figures(train, test)
    assert seen.ece < 0.03
    assert seen.ece_chance == pytest.approx(0.015, abs=0.01)
    assert figures(train, test[:100]).ece_chance > 2 * seen.ece_chance  # few questions show more by chance
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


def test_rows_of_one_prompt_are_in_one_fold() -> None:
    """A prompt asked many times must not be fitted to and measured by at once."""
    questions = [replace(question, prompt=f"prompt {number // 4}") for number, question in enumerate(pool(200, EVEN))]
    fitted = fit_weights(questions, Options({}, {}, strengths=(1.0,)))
    assert len(set(fitted.fold.tolist())) == 5
    assert all(len(set(fitted.fold[start : start + 4])) == 1 for start in range(0, 200, 4))
    with pytest.raises(MixfuseError, match="the 200 marked rows have 2 different prompts"):
        fit_combiner([replace(question, prompt=f"{number % 2}") for number, question in enumerate(questions)], "choice")


def test_a_pool_of_many_members_is_fitted_and_its_policies_keep_the_best() -> None:
    """More members than a policy can choose among: six are kept, and the best and the cheap are among them."""
    accuracies = {"best": 0.85, **{f"m{number}": 0.3 for number in range(11)}, "cheap": 0.8}
    prices = {name: 1.0 for name in accuracies} | {"best": 10.0, "cheap": 0.1}
    said: list[str] = []
    combiner = fit_combiner(pool(400, accuracies), "choice", prices, progress=said.append)
    asked = {name for policy in combiner.policies for actions in policy.actions.values() for name in actions if name}
    assert {"best", "cheap"} <= asked
    assert all(len(state.split("+")) < 6 for policy in combiner.policies for state in policy.actions)
    assert any("penalty" in line for line in said)


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


def test_members_asked_together_by_chance_are_each_judged_by_that_chance() -> None:
    """`b` and `c` are asked on hard questions, and together on one easy question in ten, as `explore` asks them."""
    generator = np.random.default_rng(0)
    hard, easy = pool(400, {"a": 0.4, "b": 0.3, "c": 0.6}), pool(2000, {"a": 0.9, "b": 0.9, "c": 0.95}, seed=1)
    together = dict.fromkeys("bc", 0.1)
    log = [
        replace(question, propensities=together)
        if generator.random() < 0.1
        else replace(question, answers=question.answers[:1])
        for question in easy
    ]
    fitted = fit_weights([*hard, *log], Options({}, {}, strengths=(1.0,)))
    assert fitted.accuracies[1:] == pytest.approx(
        [(400 * 0.3 + 2000 * 0.9) / 2400, (400 * 0.6 + 2000 * 0.95) / 2400], abs=0.05
    )
    assert fitted.weight.max() / fitted.weight.min() == pytest.approx(10)  # asked together: not a tenth of a tenth
