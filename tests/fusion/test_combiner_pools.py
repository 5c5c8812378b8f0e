"""What must hold of any pool: weighing is never significantly below the best member, whatever the members are like."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean

import numpy as np
import pytest
from combiner_pools import pool

from mixfuse.fusion.combiner.artefact import Combiner
from mixfuse.fusion.combiner.evidence import Answer, Question
from mixfuse.fusion.combiner.fit import Options, combiner_of, fit_weights
from mixfuse.fusion.measure.combiner_fit import fit_combiner
from mixfuse.fusion.measure.combiner_replay import replay

KINDS: dict[str, tuple[dict[str, float], dict[str, str], float]] = {
    "independent": ({"a": 0.75, "b": 0.65, "c": 0.55}, {}, 0.0),
    "one and the same": ({"a": 0.7, "b": 0.7, "c": 0.7}, {"b": "a", "c": "a"}, 1.0),
    "one far ahead": ({"a": 0.95, "b": 0.4, "c": 0.4, "d": 0.4}, {}, 0.0),
    "all alike": ({"a": 0.6, "b": 0.6, "c": 0.6, "d": 0.6}, {}, 0.0),
    "one always wrong": ({"a": 0.7, "b": 0.65, "c": 0.0}, {}, 0.0),
    "all always wrong but one": ({"a": 0.5, "b": 0.0, "c": 0.0}, {}, 0.0),
    "a copy of a weak one": ({"a": 0.75, "b": 0.5, "c": 0.5}, {"c": "b"}, 1.0),
    "a copy of the best": ({"a": 0.75, "b": 0.75, "c": 0.6}, {"b": "a"}, 1.0),
    "two": ({"a": 0.7, "b": 0.65}, {}, 0.0),
    "perfect": ({"a": 1.0, "b": 0.7}, {}, 0.0),
}


def drawn(kind: str, count: int, seed: int) -> list[Question]:
    accuracies, copies, copied = KINDS[kind]
    return pool(count, accuracies, seed=seed, copies=copies, copied=copied)


def weights(questions: Sequence[Question]) -> Combiner:
    options = Options({}, {})
    return combiner_of(fit_weights(questions, options), questions, "choice", options)


@pytest.mark.parametrize("count", [60, 100, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_weighing_is_never_significantly_below_the_best_member(kind: str, count: int) -> None:
    test = drawn(kind, 1500, 99)
    for seed in range(2):
        seen = replay(weights(drawn(kind, count, seed)), test)
        assert seen.difference.high >= -0.002, (seed, seen.difference)


@pytest.mark.parametrize("kind", ["independent", "all alike", "one always wrong"])
def test_where_members_are_wrong_on_different_questions_weighing_gains(kind: str) -> None:
    assert replay(weights(drawn(kind, 600, 0)), drawn(kind, 2000, 99)).difference.low > 0


def test_a_member_that_is_always_wrong_counts_against_its_answers() -> None:
    fitted = weights(drawn("one always wrong", 600, 0))
    assert fitted.members["c"].weight < min(fitted.members[name].weight for name in "ab") - 1
    assert fitted.members["c"].accuracy < 0.02


def test_copies_count_as_one() -> None:
    """A twin changes nothing: the three answers of `one and the same` are as sure as one of them."""
    fitted = weights(drawn("one and the same", 1000, 0))
    seen = replay(fitted, drawn("one and the same", 1000, 99))
    assert seen.difference.value == 0
    assert seen.ece < 0.03


def test_nothing_depends_on_the_order_of_rows_members_or_names() -> None:
    train, test = drawn("independent", 400, 0), drawn("independent", 800, 99)
    names = {"a": "zoe", "b": "max", "c": "ada"}

    def renamed(questions: Sequence[Question], order: Sequence[int], names: Mapping[str, str]) -> list[Question]:
        return [
            replace(
                question,
                answers=tuple(replace(question.answers[n], member=names[question.answers[n].member]) for n in order),
            )
            for question in questions
        ]

    one = replay(weights(train), test)
    other = replay(weights(renamed(train, (2, 0, 1), names)), renamed(test, (1, 2, 0), names))
    assert other.weighed == pytest.approx(one.weighed, abs=0.01)
    assert names[one.best_member] == other.best_member
    shuffled = [train[n] for n in np.random.default_rng(0).permutation(len(train))]
    assert replay(weights(shuffled), test).weighed == pytest.approx(one.weighed, abs=0.01)


def test_a_row_twice_says_no_more_than_once_of_how_sure_to_be() -> None:
    """Rows of one prompt stand in one fold, so that copies of rows do not make the cross-validation boast."""
    train, test = drawn("all alike", 150, 0), drawn("all alike", 1000, 99)
    train = [replace(question, prompt=f"prompt {question.id}") for question in train]
    thrice = [replace(question, id=f"{question.id}-{n}") for n in range(3) for question in train]
    once, again = fit_combiner(train, "choice"), fit_combiner(thrice, "choice")
    assert again.figures["weighed"] == pytest.approx(once.figures["weighed"], abs=0.03)
    assert again.figures["difference"]["high"] - again.figures["difference"]["low"] == pytest.approx(
        once.figures["difference"]["high"] - once.figures["difference"]["low"], rel=0.35
    )
    assert replay(again, test).ece < 0.12


def test_answers_that_nobody_can_read_are_weighed_too() -> None:
    questions = [
        replace(question, answers=(replace(question.answers[0], key="", right=False), *question.answers[1:]))
        if number % 3 == 0
        else question
        for number, question in enumerate(drawn("all alike", 600, 0))
    ]
    fitted = weights(questions)
    leaders = [
        question.answers[0].key == "" and fitted.unread < 0 for question in questions if not question.answers[0].key
    ]
    assert all(leaders)
    assert replay(fitted, questions).weighed > mean(float(bool(q.answers[1].right)) for q in questions)


def test_open_answers_are_weighed_by_member_alone() -> None:
    """No two answers are equal: the member that is right most often leads, and a judge could only help."""
    generator = np.random.default_rng(0)
    questions = [
        Question(
            str(n),
            tuple(
                Answer(name, f"{name} {n}", length=5.0, right=bool(generator.random() < share))
                for name, share in {"a": 0.8, "b": 0.6, "c": 0.5}.items()
            ),
        )
        for n in range(500)
    ]
    seen = replay(weights(questions[:300]), questions[300:])
    assert seen.difference.value == pytest.approx(0, abs=0.02)
    assert seen.ece < 0.1
