"""Filters of preference pairs, and the rules that read no content."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from train_harness import PROJECT

from mixfuse.contracts.files import read_jsonl
from mixfuse.train.data import pairs
from mixfuse.train.data.pair_filters import Filters, Selection, auc, bias, matched, near, select
from mixfuse.train.data.pairs import Preference

DATA = PROJECT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is absent (../shared/data)")
NO_FILTER: dict[str, Any] = {"balance": (), "near": None, "per_prompt": 99, "dev_share": 0.0}


def pair(prompt: str, better: str = "yes, it is", worse: str = "no, not so", **keys: Any) -> Preference:
    return Preference(prompt, better, worse, **keys)


def selected(preferences: list[Preference], *, against: Any = (), weights: Any = None, **keys: Any) -> Selection:
    return select(preferences, Filters(**NO_FILTER | keys), against=against, weights=weights)


def unbalanced(count: int, longer_wins: float) -> list[Preference]:
    """Pairs whose better answer is the longer one in that share of cases."""
    rng = random.Random(1)
    made = []
    for number in range(count):
        short, long = "x" * rng.randint(5, 40), "y" * rng.randint(50, 200)
        better, worse = (long, short) if rng.random() < longer_wins else (short, long)
        made.append(pair(f"{number}?", better, worse))
    return made


@pytest.mark.parametrize(
    ("leanings", "expected"),
    [
        ([], 0.5),
        ([1.0], 1.0),
        ([-1.0], 0.0),
        ([0.0, 0.0], 0.5),
        ([3.0, -3.0], 0.5),
        ([1.0, -2.0], 0.25),  # 1 > -1, 1 < 2, -2 < -1, -2 < 2: one of four
        ([2.0, 2.0, -2.0], 2 / 3),
    ],
)
def test_the_area_under_the_curve(leanings: list[float], expected: float) -> None:
    assert auc(leanings) == pytest.approx(expected)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30))
def test_the_area_is_the_share_of_examples_in_order(leanings: list[int]) -> None:
    worth = [1.0 if one > -other else 0.5 if one == -other else 0.0 for one in leanings for other in leanings]
    assert auc(leanings) == pytest.approx(sum(worth) / len(worth))


def test_balance_takes_the_length_out() -> None:
    result = selected(unbalanced(600, 0.8), balance=("length",))
    assert result.before.auc["length"] > 0.75
    assert 0.48 < result.after.auc["length"] < 0.52
    longer = sum(len(one.better) > len(one.worse) for one in result.train)
    assert longer * 2 == len(result.train)
    assert len(result.train) > 200, "nearly all of the rarer kind should be kept"
    assert result.left_out["without a mirror image"] == 600 - len(result.train)


def test_pairs_of_equal_length_need_no_mirror_image() -> None:
    equal = [pair(f"{number}?", "right", "wrong") for number in range(7)]
    assert len(selected(equal, balance=("length",)).train) == 7
    assert selected([pair("1?", "longer", "not")], balance=("length",)).train == []


def test_balance_takes_the_strongest_member_out() -> None:
    rng = random.Random(2)
    made = [
        pair(f"{number}?", models=("strong-1", "weak-2") if rng.random() < 0.75 else ("weak-2", "strong-1"))
        for number in range(400)
    ]
    result = selected(made, balance=("model",))
    assert result.before.auc["model"] > 0.7
    assert result.after.auc["model"] == 0.5
    assert Counter(one.models for one in result.train) == dict.fromkeys(
        (("strong-1", "weak-2"), ("weak-2", "strong-1")), len(result.train) // 2
    )


def test_balance_takes_the_markup_out() -> None:
    plain, marked = "first\nsecond", "- first\n- second"
    made = [
        pair(f"{number}?", marked if number % 4 else plain, plain if number % 4 else marked) for number in range(80)
    ]
    result = selected(made, balance=("style",))
    assert result.before.auc["list items"] > 0.7
    assert (result.after.auc["list items"], len(result.train)) == (0.5, 40)


@given(st.integers(1, 4), st.floats(0, 1), st.integers(0, 3))
def test_balanced_pairs_never_break_the_cap(per_prompt: int, longer_wins: float, seed: int) -> None:
    made = [Preference(f"{hash(one.prompt) % 20}?", one.better, one.worse) for one in unbalanced(60, longer_wins)]
    units = matched(made, ("length",), per_prompt, seed)
    kept = [one for unit in units for one in unit]
    assert max(Counter(one.prompt for one in kept).values(), default=0) <= per_prompt
    assert len(set(kept)) == len(kept)
    assert all(len(unit) == 2 for unit in units)
    assert all((len(a.better) > len(a.worse)) != (len(b.better) > len(b.worse)) for a, b in units)


def test_every_source_is_balanced_by_itself_and_weights_keep_the_balance() -> None:
    first = [Preference(one.prompt, one.better, one.worse, "first") for one in unbalanced(300, 0.7)]
    second = [Preference(one.prompt, one.better, one.worse, "second") for one in unbalanced(200, 0.3)]
    for one in second:
        object.__setattr__(one, "prompt", f"other {one.prompt}")
    result = selected([*first, *second], balance=("length",), weights={"first": 1.0, "second": 2.0})
    by_source = Counter(one.source for one in result.train)
    assert by_source["second"] == pytest.approx(2 * by_source["first"], abs=2)
    for source in by_source:
        own = [one for one in result.train if one.source == source]
        assert sum(len(one.better) > len(one.worse) for one in own) * 2 == len(own)
    assert result.left_out["above the source's weight"] > 0


def test_duplicates_and_contradictions_are_left_out() -> None:
    made = [
        pair("Same?", "good", "bad"),
        pair(" Same?", "good ", "bad"),
        pair("Other?", "good", "bad"),
        pair("Other?", "bad", "good"),
        pair("Empty?", "good", "  "),
        pair("Equal?", "good", "good "),
    ]
    result = selected(made)
    assert result.train == [made[0]]
    assert result.left_out["duplicates"] == 1
    assert result.left_out["preferred both ways round"] == 2
    assert result.left_out["empty or equal answers"] == 2


def test_weak_preferences_are_left_out_on_request() -> None:
    made = [pair("1?", margin=1 / 3), pair("2?", margin=1.0)]
    assert len(selected(made).train) == 2
    assert selected(made, min_margin=0.5).train == [made[1]]


def test_an_answer_that_names_its_model_is_left_out() -> None:
    named = ("gpt-9-turbo", "domain")
    made = [
        pair("1?", "As GPT-9-Turbo, I say yes", models=named),
        pair("2?", "It is in the public domain", models=named),
        pair("3?", "A gpt-9-turbocharger", models=named),
    ]
    result = selected(made)
    assert {one.prompt for one in result.train} == {"2?", "3?"}
    assert result.left_out["an answer names its model"] == 1


SENTENCE = "A farmer has twelve cows and buys {} more at the market on a rainy day in {}, how many are there now?"


def test_what_an_evaluation_set_asks_is_not_trained_on() -> None:
    made = [pair(SENTENCE.format(3, "May")), pair(SENTENCE.format(4, "May")), pair("Why is the sky blue?")]
    against = [SENTENCE.format(3, "May").upper()]
    assert {one.prompt for one in selected(made, against=against).train} == {made[1].prompt, made[2].prompt}
    result = selected(made, against=against, near=0.6)
    assert [one.prompt for one in result.train] == [made[2].prompt]
    assert result.left_out["in an evaluation set"] == 2


def test_no_near_duplicate_stands_across_the_split() -> None:
    made = [pair(SENTENCE.format(number, month)) for number in range(40) for month in ("May", "June")]
    made += [pair(f"Question {number} of its own kind: {'abc'[number % 3] * number}") for number in range(40)]
    result = selected(made, dev_share=0.2, near=0.6)
    assert result.dev
    assert not near([one.prompt for one in result.dev], [one.prompt for one in result.train], 0.6)
    assert result.left_out["near a dev prompt"] > 40
    assert selected(made, dev_share=0.2).left_out["near a dev prompt"] == 0


texts = st.lists(st.sampled_from(["red", "blue", "two", "cows", "7"]), min_size=0, max_size=9).map(" ".join)


@given(st.lists(texts, max_size=8), st.lists(texts, max_size=8), st.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_near_finds_exactly_what_comparing_all_with_all_finds(one: list[str], other: list[str], share: float) -> None:
    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[start : start + 3]) for start in range(max(1, len(words) - 2))}

    expected = {
        text
        for text in other
        if any(len(shingles(text) & shingles(o)) >= share * len(shingles(text) | shingles(o)) for o in one)
    }
    assert near(one, other, share) == expected


def test_equal_arguments_select_equal_pairs() -> None:
    made = unbalanced(200, 0.7)
    again = selected(made[::-1], balance=("length",))
    assert selected(made, balance=("length",)).train == again.train


def labelled() -> list[Preference]:
    found = []
    for row in read_jsonl(DATA / "pandalm" / "train.jsonl"):
        if row["label"] != "tie":
            better, worse = (row["response_a"], row["response_b"])[:: 1 if row["label"] == "A" else -1]
            models = (better["model"], worse["model"])
            found.append(Preference(row["prompt"], better["text"], worse["text"], models=models))
    return found


def checked() -> list[Preference]:
    rows = pairs.read_pool(DATA / "gsm8k_pool" / "dev.jsonl")
    return [one for row in rows for one in pairs.of_pool(row)]


@needs_data
@pytest.mark.parametrize("read", [labelled, checked])
def test_real_pairs_can_be_balanced(read: Callable[[], list[Preference]]) -> None:
    plain = selected(read(), per_prompt=4)
    by_length = selected(read(), per_prompt=4, balance=("length",))
    by_both = selected(read(), per_prompt=4, balance=("length", "model"))
    assert plain.after.auc["length"] > 0.55
    assert abs(by_length.after.auc["length"] - 0.5) < 0.02
    assert len(by_length.train) > 0.6 * len(plain.train)
    assert plain.after.auc["model"] > by_length.after.auc["model"] - 0.1 > 0.5
    assert abs(by_both.after.auc["model"] - 0.5) < 0.02
    assert bias(by_both.train) == by_both.after
