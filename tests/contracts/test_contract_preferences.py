"""Preferences in public shapes: what each row is read as, what is left out, and what is refused under its name."""

import copy
import json
import re
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import iter_objects
from mixfuse.contracts.preferences import KEYS, Benchmark, Comparison, Preferences, read

HELLO = [{"role": "user", "content": "Name a sea."}]


ARENA = {"response_a": '["x"]', "response_b": '["y"]', "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def of(*rows: dict[str, Any], **keys: Any) -> Preferences:
    return read([(f"d.jsonl:{number}", row) for number, row in enumerate(rows, start=1)], **keys)


def one(row: dict[str, Any]) -> Comparison:
    (pair,) = of(row).pairs
    return pair


BETTER = [
    # chosen and rejected, as text, as messages, with and without the question in them
    {"prompt": "Name a sea.", "chosen": "North", "rejected": "Berlin"},
    {"question": "Name a sea.", "chosen": "North", "rejected": "Berlin"},
    {"prompt": HELLO, "chosen": [said("North")], "rejected": [said("Berlin")]},
    {"prompt": "Name a sea.", "chosen": [said("North")], "rejected": [said("Berlin")]},
    {"chosen": [*HELLO, said("North")], "rejected": [*HELLO, said("Berlin")]},
    {"prompt": "Name a sea.", "chosen": [*HELLO, said("North")], "rejected": [*HELLO, said("Berlin")]},
    {"chosen": json.dumps([*HELLO, said("North")]), "rejected": json.dumps([*HELLO, said("Berlin")])},
    {
        "chosen": "\n\nHuman: Name a sea.\n\nAssistant: North",
        "rejected": "\n\nHuman: Name a sea.\n\nAssistant: Berlin",
    },
    {"prompt": "\n\nHuman: Name a sea.\n\nAssistant:", "chosen": "North", "rejected": "Berlin"},
    {
        "conversations": [{"from": "human", "value": "Name a sea."}],
        "chosen": {"from": "gpt", "value": "North"},
        "rejected": {"from": "gpt", "value": "Berlin"},
    },
    {"instruction": "Name a sea.", "input": "", "chosen": "North", "rejected": "Berlin"},
    {"messages": [*HELLO, said("North")], "rejected_response": "Berlin"},
    {
        "input": {"messages": HELLO, "tools": []},
        "preferred_output": [said("North")],
        "non_preferred_output": [said("Berlin")],
    },
    {
        "chosen": [{"role": "user", "content": [{"type": "text", "text": "Name a sea."}]}, said("North")],
        "rejected": [{"role": "user", "content": [{"type": "text", "text": "Name a sea."}]}, said("Berlin")],
    },
    # two answers and a winner
    {"prompt": "Name a sea.", "response_a": "North", "response_b": "Berlin", "winner": "model_a"},
    {"prompt": "Name a sea.", "response_a": {"text": "Berlin"}, "response_b": {"text": "North"}, "label": "b"},
    {"instruction": "Name a sea.", "output_1": "Berlin", "output_2": "North", "preference": 2},
    {"instruction": "Name a sea.", "output_1": "North", "output_2": "Berlin", "preference": 1.0},
    {"input": "Name a sea.", "output_1": "North", "output_2": "Berlin", "label": 1},
    {
        "orig_instruction": "Name a sea.",
        "instruction": "###Task Description: ...",
        "orig_response_A": "Berlin",
        "orig_response_B": "North",
        "orig_preference": "B",
    },
    {"question_id": "q", "prompt": "Name a sea.", "response_1": "North", "response_2": "Berlin", "winner": "model_a"},
    {"context": HELLO, "response1": "North", "response2": "Berlin", "overall_preference": -3},
    {"prompt": "Name a sea.", "response_1": "Berlin", "response_2": "North", "preference_strength": "3"},
    {"history": "Name a sea.", "human_ref_A": "North", "human_ref_B": "Berlin", "labels": 1},
    {"prompt": "Name a sea.", "response_0": "Berlin", "response_1": "North", "better_response_id": 1},
    {"question": {"full_text": "Name a sea."}, "answer_0": "North", "answer_1": "Berlin", "score_0": 1, "score_1": -1},
    {
        "prompt": '["Name a sea."]',
        "response_a": '["Berlin"]',
        "response_b": '["North"]',
        "winner_model_a": 0,
        "winner_model_b": 1,
        "winner_tie": 0,
    },
    {
        "winner": "model_b",
        "conversation_a": [*HELLO, said("Berlin")],
        "conversation_b": [*HELLO, said("North")],
    },
    {
        "instruction": "Name a sea.",
        "input": "",
        "response1": "North",
        "response2": "Berlin",
        "annotator1": 1,
        "annotator2": 1,
        "annotator3": "1",
    },
    # several answers in order, or with scores
    {"prompt": "Name a sea.", "answers": [{"answer": "North", "rank": 1}, {"answer": "Berlin", "rank": 2}]},
    {"question": "Name a sea.", "answers": [{"text": "Berlin", "pm_score": 0}, {"text": "North", "pm_score": 3}]},
    {
        "instruction": "Name a sea.",
        "completions": [{"response": "Berlin", "overall_score": 1}, {"response": "North", "overall_score": 10.0}],
    },
    # a benchmark's lists
    {"prompt": "Name a sea.", "chosen": ["North"], "rejected": ["Berlin"]},
    {
        "prompt": "Name a sea.",
        "response_1": "Berlin",
        "response_2": "North",
        "scores": [False, True],
        "sampled_conflict_pairs": [[0, 1]],
    },
]


@pytest.mark.parametrize("row", BETTER, ids=lambda row: " ".join(row)[:60])
def test_the_better_answer_of_a_row(row: dict[str, Any]) -> None:
    pair = one(row)
    assert (pair.prompt, pair.better, pair.worse) == ("Name a sea.", "North", "Berlin")
    assert pair.label in ("first", "second")
    assert pair.margin == 1
    assert pair.conversation is None
    assert pair.item


def test_ids_are_the_rows_own_or_a_hash_of_the_content() -> None:
    row = {"prompt": "p", "chosen": "x", "rejected": "y"}
    assert one({**row, "id": 7}).item == "7"
    assert one({**row, "prompt_id": "q"}).item == "q"
    made = {one(row).item, one({**row, "chosen": "z"}).item}
    assert len(made) == 2
    assert one(dict(reversed(row.items()))).item in made


def test_a_conversation_keeps_its_roles() -> None:
    text = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: A sea?\n\nAssistant: "
    pair = one({"chosen": f"{text}North", "rejected": f"{text}Berlin"})
    assert pair.conversation == (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "A sea?"},
    )
    assert (pair.prompt, pair.better) == ("user: Hi\n\nassistant: Hello.\n\nuser: A sea?", "North")
    pair = one({"system": "Be brief.", "question": "A sea?", "chosen": "North", "rejected": "Berlin"})
    assert pair.conversation is not None
    assert [message["role"] for message in pair.conversation] == ["system", "user"]
    pair = one({"prompt": "Rewrite it.", "instruction": "no", "chosen": "North", "rejected": "Berlin"})
    assert pair.prompt == "Rewrite it."
    pair = one({"instruction": "Rewrite it.", "input": "A text.", "chosen": "North", "rejected": "Berlin"})
    assert pair.prompt == "Rewrite it.\n\nA text."


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "response_a": "x", "response_b": "y", "winner": "tie (bothbad)"},
        {"prompt": "p", "response_a": "x", "response_b": "y", "winner": "both_bad"},
        {"prompt": "p", "response_a": "x", "response_b": "y", "label": " Tie "},
        {"instruction": "p", "output_1": "x", "output_2": "y", "preference": 1.5},
        {"instruction": "p", "output_1": "x", "output_2": "y", "preference": 0},
        {"prompt": "p", "response_1": "x", "response_2": "y", "preference_strength": 0},
        {"prompt": "p", "chosen": "x", "rejected": "y", "score_chosen": 4.0, "score_rejected": 4},
        {"prompt": "p", "answers": [{"answer": "x", "rank": 1}, {"answer": "y", "rank": 1}]},
        {"question": "p", "answer_0": "x", "answer_1": "y", "score_0": 0, "score_1": 0.0},
        {"instruction": "p", "response1": "x", "response2": "y", "annotator1": 1, "annotator2": 2, "annotator3": 0},
    ],
)
def test_ties(row: dict[str, Any]) -> None:
    assert one(row).label == "tie"


@pytest.mark.parametrize(
    ("row", "margin"),
    [
        ({"chosen": "x", "rejected": "y", "score_chosen": 9.0, "score_rejected": 3.0}, 0.6),
        ({"chosen": "x", "rejected": "y", "chosen_score": "8", "rejected_score": "7.5"}, 0.05),
        ({"chosen": "x", "rejected": "y", "score_chosen": 25.5, "score_rejected": -3}, 1.0),
        ({"chosen": "x", "rejected": "y", "margin": 0.25}, 0.25),
        ({"response1": "x", "response2": "y", "overall_preference": -1}, 1 / 3),
        ({"output_1": "x", "output_2": "y", "preference": 1.25}, 0.5),
        ({"response_a": "x", "response_b": "y", "label": "A", "votes": ["1", "2", "1"]}, 1 / 3),
        ({"response_a": "x", "response_b": "y", "label": "A", "votes": ["1", "0", 1.0]}, 2 / 3),
        ({"response_a": "x", "response_b": "y", "label": "A", "votes": {"A": "3", "B": 1, "tie": None}}, 0.5),
        ({"response_a": "x", "response_b": "y", "label": "A", "votes": {"model_a": 1, "model_b": 3}}, -0.5),
        ({"response_a": "x", "response_b": "y", "label": "A", "votes": []}, 1.0),
        ({"completions": [{"response": "y", "overall_score": 2}, {"response": "x", "overall_score": 5}]}, 1 / 3),
        (
            {
                "completions": [
                    {"response": "y", "overall_score": 10, "fine-grained_score": 1.0},
                    {"response": "x", "overall_score": 2, "fine-grained_score": 5.0},
                ]
            },
            1.0,
        ),
    ],
)
def test_how_strong_a_preference_is(row: dict[str, Any], margin: float) -> None:
    pair = one({"prompt": "p", **row})
    assert pair.better == "x"
    assert pair.margin == pytest.approx(margin)


@pytest.mark.parametrize(
    ("words", "label"),
    [
        ("Model A", "first"), ("response_b", "second"), ("A<B", "second"), ("b<<a", "first"), ("[[B]]", "second"),
        ("Tied", "tie"), ("tie_bothbad", "tie"), ("tie (both good)", "tie"), ("both-bad", None), ("neither", "tie"),
        ("NO PREFERENCE", "tie"), ("[[C]]", "tie"), ("C", None), ("-1", None), ("", None), ("none", None),
    ],
)  # fmt: skip
def test_how_a_label_is_written(words: str, label: str | None) -> None:
    row = {"prompt": "p", "response_a": "x", "response_b": "y", "winner": words}
    if label is None:
        with pytest.raises(MixfuseError, match="write A, B or tie"):
            of(row)
    else:
        assert one(row).label == label


@pytest.mark.parametrize(
    ("row", "label", "margin"),
    [
        ({"winner": "m2"}, "second", 1), ({"label": "m1"}, "first", 1), ({"winner": "tie"}, "tie", 1),
        ({"winner": "m1", "votes": ["m1", "m1", "m2"]}, "first", 1 / 3),
        ({"winner": "m2", "votes": {"m1": 1, "m2": 3, "tie": 0}}, "second", 0.5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("named", ["columns", "answers"])
def test_the_winner_may_be_the_name_of_its_model(row: dict[str, Any], label: str, margin: float, named: str) -> None:
    answers: list[Any] = ["x", "y"]
    if named == "answers":
        answers = [{"text": text, "model": model} for text, model in zip(answers, ("m1", "m2"), strict=True)]
    else:
        row = {**row, "model_a": "m1", "model_b": "m2"}
    pair = one({"prompt": "p", "response_a": answers[0], "response_b": answers[1], **row})
    assert (pair.label, pair.margin, pair.models) == (label, pytest.approx(margin), ("m1", "m2"))


def test_a_winner_that_is_neither_model_or_both_is_refused() -> None:
    row = {"prompt": "p", "response_a": "x", "response_b": "y", "model_a": "m1", "model_b": "m2", "winner": "m3"}
    with pytest.raises(MixfuseError, match="winner 'm3' is no label; write A, B or tie, or 'm1' or 'm2' for the model"):
        of(row)
    with pytest.raises(MixfuseError, match="winner 'm1' is no label"):
        of({**row, "model_b": "m1", "winner": "m1"})


@pytest.mark.parametrize("row", BETTER, ids=lambda row: " ".join(row)[:60])
def test_no_other_column_of_a_row_is_read(row: dict[str, Any]) -> None:
    """What `pairs build` reads of a Parquet file is all that counts."""
    (less,) = of({key: value for key, value in row.items() if key in KEYS}).pairs
    assert less == one(row)


def test_values_of_tables_are_read() -> None:
    row = {"prompt": b"p", "chosen": "x", "rejected": "y", "score_chosen": Decimal(9), "score_rejected": Decimal(4)}
    pair = one({**row, "made": {"at": datetime(2024, 1, 1)}, "raw": b"\xff"})
    assert (pair.prompt, pair.better, pair.margin) == ("p", "x", 0.5)
    assert pair.item != one({**row, "raw": b"\xfe"}).item
    with pytest.raises(MixfuseError, match="neither role and content"):
        of({**row, "chosen": b"\xff"})
    sides = {f"conversation_{side}": json.dumps([*HELLO, said(text)]) for side, text in (("a", "x"), ("b", "y"))}
    assert one({**sides, "winner": "model_b"}).better == "y"
    answers = {"prompt": "p", "response_a": "x", "response_b": "y"}
    assert one({**answers, "label": "A", "votes": "[1, 1, 2]"}).margin == pytest.approx(1 / 3)
    with pytest.raises(MixfuseError, match="votes is a text, but no JSON"):
        of({**answers, "label": "A", "votes": "[1, 1"})
    found = of({**answers, "label": "A"}, answers)
    assert (len(found.pairs), found.left_out) == (1, {"rows without a label": 1})


def test_answers_in_rows_of_their_own_are_compared_by_their_scores() -> None:
    rows = [
        {"prompt": prompt, "response": text, "helpfulness": score, "verbosity": 1}
        for prompt, text, score in [("p", "x", 4), ("q", "alone", 3), ("p", "y", "2"), ("p", "z", 2)]
    ]
    found = of(*rows)
    assert {(pair.better, pair.worse, pair.margin) for pair in found.pairs if pair.label != "tie"} == {
        ("x", "y", 0.5),
        ("x", "z", 0.5),
    }
    assert [pair.label for pair in found.pairs].count("tie") == 1
    assert found.left_out == {"prompts with one scored answer": 1}
    graded = [{"orig_instruction": "p", "orig_response": text, "orig_score": text} for text in ("1", "5")]
    assert (of(*graded).pairs[0].better, of(*graded).pairs[0].margin) == ("5", 1.0)


def test_a_prompt_gives_at_most_so_many_pairs_the_same_every_time() -> None:
    row = {"prompt": "p", "answers": [{"answer": str(n), "rank": n} for n in range(7)]}
    assert len(of(row).pairs) == 21
    few = of(row, pairs_per_prompt=4).pairs
    assert len(few) == 4
    assert few == of(row, pairs_per_prompt=4).pairs
    assert set(few) < set(of(row).pairs)


def test_benchmarks_are_known_by_their_rows() -> None:
    lists = {"id": "i", "prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}
    pairs = of({**lists, "domain": "chat"}).pairs
    assert {(pair.benchmark, pair.source) for pair in pairs} == {("rmbench", "chat")}
    assert {(pair.better, pair.worse, pair.cell) for pair in pairs} >= {("a", "f", (0, 2)), ("c", "d", (2, 0))}
    assert {pair.benchmark for pair in of({**lists, "subset": "Focus"}).pairs} == {"rewardbench2"}
    row = {"id": 1, "prompt": "p", "chosen": "x", "chosen_model": "m", "rejected": "y", "rejected_model": "n"}
    pair = one({**row, "subset": "hep-go"})
    assert (pair.benchmark, pair.source) == ("rewardbench", "hep-go")
    assert pair.models == (("m", "n") if pair.label == "first" else ("n", "m"))
    assert one({**row, "subset": "mine"}).benchmark is None


def test_what_cannot_be_judged_is_counted() -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    calls = {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}
    found = of(
        {"prompt": "p", "chosen": "x", "rejected": "x"},
        {"chosen": [*HELLO, said("x")], "rejected": [{"role": "user", "content": "Other?"}, said("y")]},
        {"chosen": [image, said("x")], "rejected": [image, said("y")]},
        {"chosen": [*HELLO, calls], "rejected": [*HELLO, said("y")]},
        {"prompt": "p", "chosen": "x", "rejected": "y", "score_chosen": 1, "score_rejected": 2},
        {"instruction": "p", "output_1": "x", "output_2": "y", "preference": None},
        {"prompt": "p", "chosen": "x", "rejected": "y", "images": ["sea.png"]},
        {"prompt": " ", "chosen": "x", "rejected": "y"},
        {"instruction": "p", "completions": []},
        {"prompt": "p", "chosen": "x", "rejected": "y", "tools": [{"type": "function"}]},
        {"input": {"messages": HELLO, "tools": [{}]}, "preferred_output": "x", "non_preferred_output": "y"},
        {"prompt": "p", "chosen": "x", "rejected": "y", "tools": "[]"},
        {"prompt": "p", "chosen": "x", "rejected": "y", "images": []},
    )
    assert len(found.pairs) == 2
    assert found.left_out.total() == 11
    assert found.left_out["conversations with tools"] == 2
    assert found.left_out["conversations with images or other parts that are no text"] == 2
    assert "left out: equal answers 1, answers to different conversations 1" in found.described()


def test_an_arena_battle_of_several_turns_is_judged_where_they_parted() -> None:
    two = [*HELLO, said("North"), {"role": "user", "content": "Another?"}]
    row = {"winner": "model_a", "turn": 2, "model_a": "m", "model_b": "n"}
    pair = one({**row, "conversation_a": [*two, said("Baltic")], "conversation_b": [*two, said("Bonn")]})
    assert (pair.better, len(pair.conversation or ()), pair.models) == ("Baltic", 3, ("m", "n"))
    parted = [*HELLO, said("Bonn"), {"role": "user", "content": "Another?"}, said("Berlin")]
    both = {"conversation_a": [*two, said("Baltic")], "conversation_b": parted}
    assert of({**row, **both}).left_out == {"answers to different conversations": 1}
    assert one({**row, **both, "turn": 1}).worse == "Bonn"  # MT-bench's verdict on the first turn


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [*HELLO, said("x")]}, "a chat to train on"),
        ({"instruction": "p", "output": "x"}, "a chat to train on"),
        ({"prompt": "p", "completion": "x"}, "a chat to train on"),
        ({"prompt": "p", "completion": "x", "label": True}, "KTO"),
        ({"prompt": "p", "chosen": "x"}, "without a 'rejected' one"),
        ({"prompt": "p", "response_a": "x", "response_b": "y"}, "no column says which is better"),
        ({"prompt": "p", "responses": []}, "a pool row"),
        ({"id": "1", "prompt": [], "chosen": [], "rejected": [], "protocol": "x"}, "`mixfuse pairs build` wrote"),
        ({"a": 1, "b": 2}, "the keys 'a', 'b'"),
        ({}, "the keys none"),
        ({"chosen": "x", "rejected": "y"}, "no question"),
        ({"prompt": "", "chosen": [], "rejected": []}, "must each hold an answer"),
        ({"chosen": HELLO, "rejected": HELLO}, "no question"),
        ({"prompt": "p", "chosen": HELLO, "rejected": HELLO}, "must end with an assistant's answer"),
        ({"prompt": "p", "chosen": 1, "rejected": "y"}, "expected text"),
        ({"prompt": "p", "chosen": [{"role": "boss", "content": "x"}], "rejected": "y"}, "unknown role 'boss'"),
        ({"prompt": "p", "chosen": "x", "rejected": "y", "margin": 3}, "margin must be from 0 to 1"),
        ({"prompt": "p", "chosen": "x", "rejected": "y", "score_chosen": "NaN", "score_rejected": 1}, "a number"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "winner": "model_c"}, "write A, B or tie"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "label": 0}, "write A, B or tie"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "label": True}, "write A, B or tie"),
        ({"instruction": "p", "output_1": "x", "output_2": "y", "preference": 3}, "from 0 to 2"),
        ({"instruction": "p", "output_1": "x", "output_2": "y", "preference": 0.5}, "from 1 to 2"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "label": "A", "votes": ["3"]}, "the vote '3'"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "label": "A", "votes": [True]}, "the vote 'True'"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "label": "A", "votes": [None]}, "the vote 'None'"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "label": "A", "votes": {"A": -1}}, "from 0, found -1"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "label": "A", "votes": {"A": 1.5}}, "found 1.5"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "label": "A", "votes": {"C": 1}}, "the name 'C'"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "label": "tie", "votes": [-1]}, "the vote '-1'"),
        ({"prompt": "p", "response_a": "x", "label": "A"}, "missing key 'response_b'"),
        ({"prompt": "p", "response_a": "x", "response_b": None, "label": "A"}, "'response_b' holds no answer"),
        ({"prompt": "p", "chosen": "x", "rejected": None}, "'rejected' holds no answer"),
        ({"history": "p", "human_ref_A": "x", "human_ref_B": "y", "labels": 0.5}, "labels must be 0 or 1, found 0.5"),
        ({"prompt": "p", "response_0": "x", "response_1": "y", "better_response_id": 0.3}, "must be 0 or 1, found 0.3"),
        ({"prompt": "p", "scores": [1, 0], "sampled_conflict_pairs": [0, 1]}, "must hold pairs of answers"),
        ({"prompt": "p", "scores": [1, 0], "sampled_conflict_pairs": [[0, 1, 1]]}, "must hold pairs of answers"),
        ({**ARENA, "prompt": "[p]"}, "prompt is no JSON list of turns"),
        ({"messages": [*HELLO, said("x")], "rejected_messages": [*HELLO, said("y")]}, "write the last answer as"),
        ({"prompt": "p", "response": "x", "helpfulness": 9}, "helpfulness must be from 0 to 4"),
        ({"prompt": "p", "scores": [True], "sampled_conflict_pairs": [[0, 5]]}, "names the answers 0 and 5 of 1"),
        ({"prompt": "p", "answers": [{"answer": "x", "rank": "best"}]}, "rank must be a number"),
        ({"prompt": "p", "answers": [{"answer": "x"}, {"answer": "y", "rank": 1}]}, "and 'rank' or 'score'"),
        ({"prompt": "p", "chosen": "x", "rejected": ["y", "z"]}, "found a list of texts; write a row for each"),
        ({"prompt": "p", "chosen": "x", "rejected": "y", "weight": 0.3}, "'weight' is not read"),
        ({"prompt": "p", "chosen": "x", "rejected": "y", "label_smoothing": 0.1}, "'label_smoothing' is not read"),
        ({"prompt": "p", "completions": ["x"]}, "expected an object"),
        ({"prompt": "p", "chosen": ["x"], "rejected": ["y"], "subset": "Ties", "id": "9"}, "'ref:' or 'tied:'"),
    ],
)
def test_a_row_that_is_no_comparison_is_named(row: dict[str, Any], words: str) -> None:
    good = {"prompt": "p", "chosen": "x", "rejected": "y"}
    with pytest.raises(MixfuseError) as caught:
        of(good, row)
    assert str(caught.value).startswith("d.jsonl:2: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_lines_and_of_one_array(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "x", "rejected": "y"}, {"prompt": "q", "chosen": "x", "rejected": "y"}]
    for name, text in [
        ("d.jsonl", "\n".join(map(json.dumps, rows))),
        ("d.json", json.dumps(rows, indent=1)),
        ("bom.json", "\ufeff" + json.dumps(rows)),
    ]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert len(read(iter_objects(tmp_path / name)).pairs) == 2
    (tmp_path / "d.json").write_text("[1]")
    with pytest.raises(MixfuseError, match="row 1: expected a JSON object"):
        list(iter_objects(tmp_path / "d.json"))


def test_every_line_of_the_page_is_read_as_it_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.partition("\n## Preferences for the judge\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```jsonl\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        rows = [json.loads(line) for line in block.splitlines()]
        found = of(*rows)
        assert not found.left_out
        assert found.shapes.total() == len(rows)
        assert all(key in KEYS for row in rows for key in row if key not in ("confidence", "tags", "rubric"))
        for pair in found.pairs:
            assert pair.label == "tie" or re.search("North Sea|Constance|Biscay", pair.better)
            assert not re.search("North Sea|Constance|Biscay", pair.worse)
    assert {pair.benchmark for pair in of(*map(json.loads, blocks[3].splitlines())).pairs} == {*get_args(Benchmark)}


ODD = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        3,
        10**400,
        0.5,
        float("nan"),
        float("inf"),
        "",
        "1",
        "tie",
        "\ud83d",
        "1e999",
        "9" * 99,
        "[1]",
    ],
) | st.sampled_from(
    ["[" * 5000, "[{" * 3000, [], {}, [[]], [None], [{}], {"role": "user"}, [{"role": "user", "content": []}]],
)


def test_an_instruction_without_turns_is_an_empty_question() -> None:
    row = {"instruction": [], "input": "", "response1": "North", "response2": "Berlin", "preference": 1}
    with pytest.raises(MixfuseError, match="'instruction' is an empty question"):
        of(row)


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_no_row_is_a_traceback(data: st.DataObject) -> None:
    row = json.loads(json.dumps(data.draw(st.sampled_from(BETTER))))
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = row
        key = data.draw(st.sampled_from([*row, "votes", "margin", "system", "subset", "turn", "protocol"]))
        while data.draw(st.booleans()) and isinstance(place.get(key), dict) and place[key]:
            place, key = place[key], data.draw(st.sampled_from([*place[key]]))
        if isinstance(place.get(key), list) and place[key] and data.draw(st.booleans()):
            place[key][data.draw(st.integers(0, len(place[key]) - 1))] = copy.deepcopy(data.draw(ODD))
        else:
            place[key] = copy.deepcopy(data.draw(ODD))
        if not row:
            break
    try:
        of(row)
    except MixfuseError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 600


def test_half_a_character_is_named_with_its_line(tmp_path: Path) -> None:
    row = {"prompt": "p \ud83d", "chosen": "x", "rejected": "y"}
    whole = {"prompt": "p \ud83d\ude00", "chosen": "x", "rejected": "y"}
    path = tmp_path / "d.jsonl"
    path.write_text(f"{json.dumps({**row, 'prompt': 'p'})}\n{json.dumps(row)}\n")
    with pytest.raises(MixfuseError, match=r"d\.jsonl:2: a text holds half a character \(\\ud83d"):
        read(iter_objects(path))
    path.write_text('{"prompt": "p \\ud83d\\ude00", "chosen": "x", "rejected": "y"}\n')
    ((_, found),) = iter_objects(path)
    assert found["prompt"].encode("utf-16", "surrogatepass") == whole["prompt"].encode("utf-16", "surrogatepass")
    path.write_text(json.dumps([row]))
    with pytest.raises(MixfuseError, match=r"row 1: a text holds half a character"):
        read(iter_objects(path))
