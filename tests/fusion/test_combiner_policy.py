"""Asking one after another: policies on pools where the cheapest path is known."""

from dataclasses import replace

import numpy as np
import pytest
from combiner_pools import pool

from mixfuse.fusion.combiner import policy as policy_module
from mixfuse.fusion.combiner.artefact import BINS, Combiner
from mixfuse.fusion.combiner.asking import bin_of, next_member, policy_for
from mixfuse.fusion.combiner.evidence import Question
from mixfuse.fusion.combiner.fit import Options, fit_weights
from mixfuse.fusion.combiner.policy import Outcomes, plan, plans, shortlist, walk
from mixfuse.fusion.combiner.policy import outcomes as outcomes_of
from mixfuse.fusion.measure.combiner_fit import fit_combiner
from mixfuse.fusion.measure.combiner_replay import ask, replay

EVEN = {"a": 0.75, "b": 0.75, "c": 0.75}


@pytest.fixture(scope="module")
def priced() -> Combiner:
    """`cheap` is nearly as good as `dear`, at a tenth of its price; `middle` is as good as `cheap`."""
    accuracies = {"dear": 0.8, "cheap": 0.75, "middle": 0.75}
    return fit_combiner(pool(1500, accuracies), "choice", {"dear": 10.0, "cheap": 1.0, "middle": 2.0})


def outcomes() -> Outcomes:
    """Two members: the first knows when it is right; the second is always right, and dear."""
    count = 1000
    sure = np.arange(count) < 600
    confidence, right = np.zeros((count, 4)), np.zeros((count, 4))
    confidence[:, 1] = np.where(sure, 0.98, 0.12)
    right[:, 1] = np.where(sure, 1.0, 0.1)
    confidence[:, 2], right[:, 2] = 0.97, 1.0
    confidence[:, 3], right[:, 3] = 0.97, 1.0
    return Outcomes(confidence, right, np.array([1.0, 5.0]), np.ones(count), 1, np.full(count, -1))


def test_the_cheapest_path_is_taken() -> None:
    """Cheap first, and the dear member only where the cheap one is in doubt: 1 + 0.4 · 5 instead of 5."""
    known = outcomes()
    steps = plan(known, target=0.95, worth=50.0)
    actions = steps.actions
    assert actions[0, 0] == 0
    assert actions[1, bin_of(0.98)] == -1
    assert actions[1, bin_of(0.12)] == 1
    end = walk(known, steps, 0.95, np.arange(1000))
    assert end.cost.mean() == pytest.approx(1 + 0.4 * 5)
    assert known.right[np.arange(1000), end.state].mean() == 1.0


def test_nobody_is_asked_who_costs_more_than_a_right_answer_is_worth() -> None:
    known = outcomes()
    end = walk(known, plan(known, target=0.95, worth=5.0), 0.95, np.arange(1000))
    assert set(end.state) == {1}


def test_a_target_that_is_reached_stops_the_asking_whatever_more_would_gain() -> None:
    known = outcomes()
    end = walk(known, plan(known, target=0.1, worth=1e6), 0.1, np.arange(1000))
    assert (np.array([int(state).bit_count() for state in end.state]) == 1).all()


def test_two_cheap_members_are_asked_for_the_sake_of_the_third() -> None:
    """One more vote never turns the first round; the second step pays only with the third in sight."""
    combiner = fit_combiner(pool(1500, EVEN), "choice")
    policy = policy_for(combiner, 0.9)
    assert policy is not None
    assert policy.accuracy > combiner.figures["best_member_accuracy"] + 0.05
    assert 2 < policy.asked < 3


def test_the_best_members_accuracy_costs_a_fraction_of_its_price(priced: Combiner) -> None:
    test = pool(1500, {"dear": 0.8, "cheap": 0.75, "middle": 0.75}, seed=1)
    seen = replay(priced, test)
    reached = [point.cost_ratio for point in seen.curve if point.accuracy >= seen.best_member_accuracy]
    # cheap + middle cost 0.3; they disagree on 42 in 100 questions, on which the dear one is asked, too
    assert min(ratio for ratio in reached if ratio is not None) == pytest.approx(0.3 + 0.42, abs=0.1)
    assert max(point.accuracy for point in seen.curve) > seen.best_member_accuracy + 0.03
    first = {next_member(priced, policy, [], 0.0) for policy in priced.policies}
    assert first <= {"cheap", "middle"}


def test_a_policys_own_figures_hold_on_other_questions(priced: Combiner) -> None:
    seen = replay(priced, pool(3000, {"dear": 0.8, "cheap": 0.75, "middle": 0.75}, seed=2))
    # At the target at which two policies are worth the same, the folds may have planned one and the combiner the other.
    pairs = list(zip(priced.policies, seen.curve, strict=True))
    assert sorted(abs(point.accuracy - policy.accuracy) for policy, point in pairs)[-2] < 0.02
    assert sorted(abs((point.cost_ratio or 0) - policy.cost_ratio) for policy, point in pairs)[-2] < 0.1
    for _, point in pairs:
        assert point.ece is not None
        assert point.ece < 0.05


def test_cost_and_members_are_counted_as_asked(priced: Combiner) -> None:
    policy = priced.policies[-1]
    for question in pool(50, {"dear": 0.8, "cheap": 0.75, "middle": 0.75}, seed=3):
        result = ask(priced, policy, question)
        assert result.cost == sum(priced.members[name].price for name in result.members)
        assert len(set(result.members)) == len(result.members) >= 1


def test_a_member_that_failed_is_not_asked_again(priced: Combiner) -> None:
    policy = priced.policies[-1]
    first = next_member(priced, policy, [], 0.0)
    assert first is not None
    second = next_member(priced, policy, [first], 0.0)
    assert second != first


def test_the_policy_of_a_target_between_two_is_the_higher(priced: Combiner) -> None:
    targets = [policy.target for policy in priced.policies]
    assert targets == sorted(targets)
    between = (targets[0] + targets[1]) / 2
    picked = policy_for(priced, between)
    assert picked is not None
    assert picked.target == targets[1]
    highest = policy_for(priced, 1.0)
    assert highest is not None
    assert highest.target == targets[-1]
    assert policy_for(priced.model_copy(update={"policies": []}), 0.8) is None


def gappy(count: int) -> list[Question]:
    """Two members. Every third question lacks an answer of `b`, every fifth a mark of `a`; equal answers may be marked
    differently, as an open answer's may be."""
    generator = np.random.default_rng(0)
    questions = []
    for number, question in enumerate(pool(count, {"a": 0.7, "b": 0.6})):
        first, second = question.answers
        if number % 5 == 0:
            first = replace(first, right=None)
        if generator.random() < 0.3:
            second = replace(second, right=not second.right)
        questions.append(replace(question, answers=(first,) if number % 3 == 0 else (first, second)))
    return questions


def test_states_are_worked_out_on_complete_questions_and_answered_by_those_who_were_asked() -> None:
    questions = gappy(300)
    fitted = fit_weights(questions, Options({}, {}, strengths=(1.0,)))
    marked = [question for question in questions if any(answer.right is not None for answer in question.answers)]
    whole = [q for q in marked if len(q.answers) == 2 and q.answers[0].right is not None]
    known = outcomes_of(fitted, [1.0, 2.0])
    assert known is not None
    assert known.right.shape == known.confidence.shape == (len(whole), 4)
    for place in range(2):
        assert known.right[:, 1 << place].tolist() == [float(bool(q.answers[place].right)) for q in whole]
    assert (known.confidence[:, 0] == 0).all()
    assert ((known.confidence[:, 1:] > 0) & (known.confidence[:, 1:] < 1)).all()
    assert known.prices.tolist() == [1.0, 2.0]


def test_of_very_many_questions_a_sample_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = fit_weights(pool(300, EVEN), Options({}, {}, strengths=(1.0,)))
    every = outcomes_of(fitted, [1.0] * 3)
    monkeypatch.setattr(policy_module, "_MOST_QUESTIONS", 100)
    some, again = outcomes_of(fitted, [1.0] * 3), outcomes_of(fitted, [1.0] * 3)
    assert every is not None
    assert some is not None
    assert again is not None
    assert (len(every.right), len(some.right)) == (300, 100)
    assert (some.right == again.right).all()
    assert len({tuple(row) for row in some.confidence}) > 10  # not one question a hundred times


def test_no_question_answered_by_all_leaves_nothing_to_plan_on() -> None:
    questions = [
        replace(q, answers=q.answers[n % 2 : n % 2 + 1]) for n, q in enumerate(pool(100, {"a": 0.7, "b": 0.6}))
    ]
    fitted = fit_weights(questions, Options({}, {}, strengths=(1.0,)))
    assert outcomes_of(fitted, [1.0, 1.0]) is None


def test_of_many_members_those_are_kept_that_are_right_most_often_for_their_price() -> None:
    accuracies = {"best": 0.85, "good": 0.8, "dear": 0.8, "cheap": 0.75} | {f"weak{number}": 0.2 for number in range(5)}
    questions = pool(600, accuracies, copies={"dear": "good"}, copied=1.0)
    fitted = fit_weights(questions, Options({}, {}, strengths=(3.0,)))
    prices = [10.0, 1.0, 9.0, 0.5, *[0.5] * 5]
    kept = [fitted.table.layout.members[place] for place in shortlist(fitted, prices)]
    assert len(kept) == 6
    assert {"best", "good", "cheap"} <= set(kept)
    assert "dear" not in kept
    assert kept == [name for name in accuracies if name in kept]
    assert shortlist(fitted, [0.0] * 9)  # free members have no price to be measured by
    assert shortlist(
        fit_weights(pool(100, dict.fromkeys("abcdef", 0.6)), Options({}, {}, strengths=(3.0,))), [1.0] * 6
    ) == [*range(6)]


def test_a_plan_is_made_on_the_rows_named() -> None:
    """On the questions of which the first member is sure it is enough; on the others it is not worth asking."""
    known = outcomes()
    sure, unsure = np.arange(600), np.arange(600, 1000)
    assert (plan(known, 0.95, 50.0, sure).actions[1] == -1).all()
    assert plan(known, 0.95, 50.0, unsure).actions[0, 0] == 1


def test_plans_of_several_targets_are_those_of_each() -> None:
    known = outcomes()
    both = plans(known, [0.1, 0.95], [5.0, 50.0])
    assert (both[0].actions == plan(known, 0.1, 5.0).actions).all()
    assert (both[1].actions == plan(known, 0.95, 50.0).actions).all()


def test_every_confidence_has_a_bin() -> None:
    assert [bin_of(value) for value in (0.0, 1.0)] == [0, BINS - 1]
    assert {bin_of(value / 1000) for value in range(1001)} == set(range(BINS))


def test_a_confidence_that_no_question_of_the_fit_had_does_as_the_nearest_that_one_had() -> None:
    known = outcomes()  # after the first member the confidence is 0.12 or 0.98
    actions = plan(known, target=0.95, worth=50.0).actions
    assert [int(actions[1, bin_of(confidence)]) for confidence in (0.0, 0.12, 0.5, 0.85)] == [1, 1, 1, 1]
    assert actions[1, bin_of(0.98)] == -1
    unseen = Outcomes(np.full((1000, 4), 0.98), known.right, known.prices, known.weight, known.best, known.domain)
    assert (plan(unseen, target=0.95, worth=50.0).actions[1:] == -1).all()  # below the target nothing was seen at all


SPECIALISTS = {"law": {"lawyer": 0.9, "doctor": 0.5}, "medicine": {"lawyer": 0.5, "doctor": 0.9}}


def test_a_question_of_a_specialists_domain_is_first_put_to_it() -> None:
    combiner = fit_combiner(pool(600, {"lawyer": 0.7, "doctor": 0.7}, domains=SPECIALISTS), "choice")
    policy = policy_for(combiner, 0.8)
    assert policy is not None
    asked = {domain: next_member(combiner, policy, [], 0.0, domain) for domain in SPECIALISTS}
    assert asked == {"law": "lawyer", "medicine": "doctor"}
    seen = replay(combiner, pool(1500, {"lawyer": 0.7, "doctor": 0.7}, domains=SPECIALISTS, seed=1))
    point = next(point for point in seen.curve if point.target == policy.target)
    assert point.accuracy > seen.best_member_accuracy + 0.1  # at the price of one answer: nobody else is asked
    assert point.cost_ratio == pytest.approx(1.0, abs=0.05)
    # Without a domain, or where the specialist cannot be asked, another is.
    general = next_member(combiner, policy, [], 0.0)
    assert general in ("lawyer", "doctor")
    assert next_member(combiner, policy, ["lawyer"], 0.0, "law") == "doctor"
    assert next_member(combiner, policy, ["lawyer"], 0.95, "law") is None


def test_a_domain_of_few_questions_does_not_change_whom_to_ask_first() -> None:
    known = outcomes()
    domain = np.where(np.arange(1000) < 990, 0, 1)
    right = known.right.copy()
    right[990:, 1] = 1.0  # ten questions on which the cheap member happens to be right
    known = replace(known, domain=domain, domains=("many", "few"), right=right)
    assert (plan(known, target=0.95, worth=50.0).first == 0).all()
    assert (plan(replace(known, prices=np.array([5.0, 1.0])), target=0.95, worth=50.0).first == 1).all()
