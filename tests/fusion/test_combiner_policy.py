"""Asking one after another: policies on pools where the cheapest path is known."""

import numpy as np
import pytest
from combiner_pools import pool

from mixfuse.fusion.combiner.artefact import BINS, Combiner
from mixfuse.fusion.combiner.asking import bin_of, next_member, policy_for
from mixfuse.fusion.combiner.policy import Outcomes, plan, walk
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
    return Outcomes(confidence, right, np.array([1.0, 5.0]), np.ones(count), 1)


def test_the_cheapest_path_is_taken() -> None:
    """Cheap first, and the dear member only where the cheap one is in doubt: 1 + 0.4 · 5 instead of 5."""
    known = outcomes()
    actions = plan(known, target=0.95, worth=50.0)
    assert actions[0, 0] == 0
    assert actions[1, bin_of(0.98)] == -1
    assert actions[1, bin_of(0.12)] == 1
    end = walk(known, actions, 0.95, np.arange(1000))
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
    for policy, point in zip(priced.policies, seen.curve, strict=True):
        assert point.accuracy == pytest.approx(policy.accuracy, abs=0.035)
        assert point.cost_ratio == pytest.approx(policy.cost_ratio, abs=0.1)
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


def test_every_confidence_has_a_bin() -> None:
    assert [bin_of(value) for value in (0.0, 1.0)] == [0, BINS - 1]
    assert {bin_of(value / 1000) for value in range(1001)} == set(range(BINS))
