"""Recorded answers with marks, as they are read."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import write_jsonl
from mixfuse.fusion.combiner.evidence import UNREAD, Answer, Comparison, Question, read_pool, subset

GOOD: dict[str, Any] = {
    "id": "q",
    "domain": "law",
    "prompt": "?",
    "responses": [
        {"model": "a", "text": "The answer is (B).", "choice": "B", "correct": True},
        {"model": "b", "text": "?", "choice": None, "correct": False},
    ],
}


def one(tmp_path: Path, row: dict[str, Any]) -> Question:
    write_jsonl(tmp_path / "pool.jsonl", [row])
    return read_pool([tmp_path / "pool.jsonl"])[0][0]


def test_a_row_is_read(tmp_path: Path) -> None:
    verdict = {"first": 0, "second": 1, "score": 0.5, "judge": "j"}
    question = one(tmp_path, GOOD | {"verdicts": [verdict], "propensities": {"b": 0.25}})
    assert [(answer.member, answer.key, answer.right) for answer in question.answers] == [
        ("a", "choice B", True),
        ("b", UNREAD, False),
    ]
    assert question.domain == "law"
    assert question.comparisons == (Comparison("j", 0, 1, 0.0),)
    assert question.propensities == {"b": 0.25}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"responses": None}, "needs 'responses', a list of answers"),
        ({"responses": []}, "needs 'responses', a list of answers"),
        ({"responses": [3]}, "an answer needs 'model' and 'text'"),
        ({"responses": [{"text": "x"}]}, "an answer needs 'model' and 'text'"),
        ({"responses": [{"model": "a"}]}, "an answer needs 'model' and 'text'"),
        ({"responses": [{"model": "a", "text": None}]}, "an answer needs 'model' and 'text'"),
        ({"responses": [{"model": "a", "text": "x", "correct": 1}]}, "'correct' of a must be true or false"),
        ({"responses": [{"model": "a", "text": "x", "choice": 1}]}, "'choice' of a must be text"),
        ({"domain": 3}, "'domain' must be text"),
        ({"verdicts": 3}, "'verdicts' must be a list"),
        ({"verdicts": [{"first": 0, "second": 1}]}, "a verdict needs"),
        ({"verdicts": [{"first": 0, "second": 2, "score": 0.5}]}, "a verdict needs"),
        ({"verdicts": [{"first": 0, "second": 0, "score": 0.5}]}, "a verdict needs"),
        ({"verdicts": [{"first": 0, "second": 1, "score": 1.5}]}, "a verdict needs"),
        ({"propensities": {"a": 0}}, "'propensities' must map members to probabilities above 0, at most 1"),
        ({"propensities": {"a": 1.1}}, "'propensities'"),
        ({"propensities": {"a": "often"}}, "'propensities'"),
        ({"propensities": {"a": True}}, "'propensities'"),
        ({"propensities": [0.5]}, "'propensities'"),
    ],
)
def test_an_odd_row_is_refused_by_file_and_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = tmp_path / "pool.jsonl"
    write_jsonl(file, [GOOD, GOOD | {"id": "other"} | changes])
    with pytest.raises(MixfuseError) as error:
        read_pool([file])
    assert str(error.value).startswith(f"{file}:2: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_row_that_stands_there_twice_counts_once(tmp_path: Path) -> None:
    """The same file named twice, a copy of it, and a row without an id."""
    nameless = {key: value for key, value in GOOD.items() if key != "id"}
    file, copy = tmp_path / "pool.jsonl", tmp_path / "copy.jsonl"
    write_jsonl(file, [GOOD, nameless])
    write_jsonl(copy, [nameless, GOOD])
    assert len(read_pool([file, file, copy])[0]) == len(read_pool([file])[0]) == 2


@pytest.mark.parametrize(
    "changes", [{"prompt": "another?"}, {"responses": GOOD["responses"][:1]}, {"domain": "maths"}, {"id": "q", "x": 1}]
)
def test_an_id_of_two_different_rows_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    file, other = tmp_path / "pool.jsonl", tmp_path / "other.jsonl"
    write_jsonl(file, [GOOD])
    write_jsonl(other, [GOOD | changes])
    with pytest.raises(MixfuseError) as error:
        read_pool([file, other])
    assert str(error.value).startswith(f"{other}:1: the id 'q' is that of {file}:1, too")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "pool.jsonl"
    file.write_text(text)
    with pytest.raises(MixfuseError, match=rf"{file}.*no rows"):
        read_pool([file])


def test_a_line_of_megabytes_is_read_and_a_broken_one_refused_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "pool.jsonl"
    huge = GOOD | {"responses": [{"model": "a", "text": "x" * 5_000_000, "choice": "B", "correct": True}]}
    file.write_text(json.dumps(huge) + "\n")
    assert read_pool([file])[0][0].answers[0].length == pytest.approx(15.4, abs=0.1)
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps(huge)[:4_000_000] + "\n")
    with pytest.raises(MixfuseError) as error:
        read_pool([file])
    assert str(error.value).startswith(f"{file}:2: malformed JSON")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("responses", "reference", "agreement"),
    [
        ([{"model": "a", "text": "B", "choice": "B"}], "B", "choice"),
        ([{"model": "a", "text": "so 7"}], "7", "number"),
        ([{"model": "a", "text": "so 7"}], "3 + 4 = 7\n#### 7", "number"),
        ([{"model": "a", "text": "red"}], "red", "exact"),
        ([{"model": "a", "text": "red"}], None, "exact"),
    ],
)
def test_what_makes_answers_equal_is_worked_out(
    tmp_path: Path, responses: list[Any], reference: str | None, agreement: str
) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "?", "responses": responses, "reference": reference}])
    assert read_pool([tmp_path / "p.jsonl"])[1] == agreement


def test_a_cut_or_contested_answer_is_doubtful(tmp_path: Path) -> None:
    texts = {"The answer is (B).": False, "The answer is (A). No: the answer is (B).": True}
    for text, doubtful in texts.items():
        row = GOOD | {"responses": [{"model": "a", "text": text, "choice": "B"}]}
        assert one(tmp_path, row).answers[0].doubtful == doubtful
    cut = GOOD | {"responses": [{"model": "a", "text": "The answer is (B).", "choice": "B", "finish_reason": "length"}]}
    assert one(tmp_path, cut).answers[0].doubtful


def test_a_subset_keeps_the_comparisons_of_its_own_answers() -> None:
    answers = tuple(Answer(name, name) for name in "abc")
    comparisons = (Comparison("j", 0, 1, 1.0), Comparison("j", 1, 2, 2.0))
    (part,) = subset([Question("q", answers, comparisons=comparisons)], ["b", "c"])
    assert [answer.member for answer in part.answers] == ["b", "c"]
    assert part.comparisons == (Comparison("j", 0, 1, 2.0),)
    assert subset([Question("q", answers)], ["d"]) == []
