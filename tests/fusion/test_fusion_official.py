"""Public benchmarks: their formats as published, and their metrics against their own published code's results."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.measure.comparisons import Comparison, load
from mixfuse.fusion.measure.judge_report import report
from mixfuse.fusion.measure.marks import Views
from mixfuse.fusion.measure.official import official


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judgebench(**keys: Any) -> dict[str, Any]:
    row = {"pair_id": "x", "original_id": "o", "source": "mmlu-pro-math", "question": "q", "response_model": "m"}
    return {**row, "response_A": "one", "response_B": "two", "label": "A>B", **keys}


def test_judgebench_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "jb.jsonl", judgebench(), judgebench(label="B>A", source="livebench-math", pair_id="y"))
    first, second = load(path)
    assert (first.label, first.source, first.item, first.benchmark) == ("first", "mmlu-pro-math", "x", "judgebench")
    assert (second.label, second.prompt, second.first, second.second) == ("second", "q", "one", "two")


@pytest.mark.parametrize(
    ("view", "correct"),
    [
        (Views(0.9, 0.1), 1),  # both games right
        (Views(0.9, None), 1),  # one right, one without a verdict
        (Views(0.9, 0.5), 1),  # one right, one tie
        (Views(0.9, 0.9), 0),  # one right, one wrong: a tie, which is not correct
        (Views(0.5, 0.5), 0),
        (Views(None, None), 0),
        (Views(0.1, 0.9), 0),
    ],
)
def test_judgebench_counts_both_games_together(view: Views, correct: int) -> None:
    row = Comparison("q", "one", "two", "first", None, "f", "mmlu-pro-law", "judgebench", "x")
    mirrored = Comparison("q", "two", "one", "second", None, "f", "livecodebench", "judgebench", "y")
    scores_of = official([row, mirrored], [view, Views(view.backward, view.forward)])["judgebench"]
    assert scores_of["accuracy"]["value"] == correct
    assert scores_of["knowledge"]["value"] == scores_of["coding"]["value"] == correct
    assert "math" not in scores_of


def test_llmbar_is_one_array_with_whole_numbers_as_labels(tmp_path: Path) -> None:
    (tmp_path / "Natural").mkdir()
    path = tmp_path / "Natural" / "dataset.json"
    row = {"input": "q", "output_1": "one", "output_2": "two", "label": 1}
    path.write_text(json.dumps([row, {**row, "label": 2}]))
    pairs = load(path)
    assert [one.label for one in pairs] == ["first", "second"]
    assert {one.file for one in pairs} == {"Natural/dataset.json"}
    path.write_text(json.dumps([row, {**row, "label": 3}]))
    with pytest.raises(MixfuseError, match=r"dataset\.json: row 2: label '3' is none of 1, 2"):
        load(path)
    path.write_text(json.dumps([row, "text"]))
    with pytest.raises(MixfuseError, match="row 2: expected a JSON object"):
        load(path)


def test_llmbar_averages_the_orders() -> None:
    rows = [Comparison(f"q{n}", "one", "two", "first", benchmark="llmbar") for n in range(4)]
    views = [Views(0.9, 0.1), Views(0.9, 0.9), Views(0.1, 0.9), Views(None, 0.1)]
    scores_of = official(rows, views)["llmbar"]
    assert scores_of["accuracy_average"]["value"] == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert scores_of["positional_agreement"]["value"] == pytest.approx(2 / 4)


def rewardbench2(subset: str, item: str, chosen: list[str], rejected: list[str]) -> dict[str, Any]:
    counts = {"num_correct": len(chosen), "num_incorrect": len(rejected)}
    return {"id": item, "prompt": f"q{item}", "chosen": chosen, "rejected": rejected, **counts, "subset": subset}


def by_scores(rows: list[Comparison], scores: dict[str, float]) -> list[Views]:
    """The verdicts of a judge behind which there is a score for each answer; without a position bias."""

    def p(first: str, second: str) -> float:
        return 1 / (1 + math.exp(scores[second] - scores[first]))

    return [Views(p(row.first, row.second), p(row.second, row.first)) for row in rows]


def test_rewardbench2_best_of_four(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rb2.jsonl", *(rewardbench2("Math", f"{n}", [f"g{n}"], [f"{x}{n}" for x in "abc"]) for n in range(4))
    )
    rows = load(path)
    assert len(rows) == 12
    assert {row.source for row in rows} == {"Math"}
    scores = {"g0": 2, "a0": 1, "b0": 0, "c0": 0}  # best
    scores |= {"g1": 1, "a1": 2, "b1": 0, "c1": 0}  # beaten
    scores |= {"g2": 1, "a2": 1, "b2": 0, "c2": 0}  # shares the first place with one
    scores |= {"g3": 1, "a3": 1, "b3": 1, "c3": 1}  # says nothing
    scores_of = official(rows, by_scores(rows, scores))["rewardbench2"]
    assert scores_of["Math"]["value"] == pytest.approx((1 + 0 + 1 / 2 + 1 / 4) / 4)
    assert scores_of["score"] == scores_of["Math"]["value"]


def test_rewardbench2_ties_as_published(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rb2.jsonl",
        rewardbench2("Ties", "ref:0", ["r0"], ["s0"]),
        rewardbench2("Ties", "tied:0", ["t0", "u0"], ["v0", "w0"]),
        rewardbench2("Ties", "ref:1", ["r1"], ["s1"]),
        rewardbench2("Ties", "tied:1", ["t1", "u1"], ["v1"]),
        rewardbench2("Focus", "f", ["g"], ["a", "b", "c"]),
    )
    rows = load(path)
    assert len(rows) == 1 + 4 + 1 + 2 + 3
    scores = {"r0": 3.0, "s0": 1.0, "t0": 4.0, "u0": 3.5, "v0": 2.0, "w0": 1.0}
    scores |= {"r1": 1.0, "s1": 2.0, "t1": 3.0, "u1": 1.0, "v1": 0.5}
    scores |= {"g": 1.0, "a": 0.0, "b": 0.0, "c": 0.0}
    scores_of = official(rows, by_scores(rows, scores))["rewardbench2"]
    # rewardbench/utils.py, process_single_model, on the same scores: both tied prompts are accurate, one of the two
    # ref prompts is; gaps of the tied prompts 1.5 and 0.5, spreads 0.5 and 2, gaps of the ref prompts 2 and -1.
    margin = (math.tanh(1.5 / 0.5 - 1) + math.tanh(-1 / 2 - 1)) / 2
    expected = 0.3 * 1 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margin
    assert scores_of["Ties"]["value"] == pytest.approx(expected)
    assert scores_of["score"] == pytest.approx((expected + 1) / 2)
    assert scores_of["Ties"]["low"] <= expected <= scores_of["Ties"]["high"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (judgebench(label="A"), "label 'A'"),
        ({"response_A": "x", "question": "q"}, "missing key 'response_B'"),
        ({"input": "q", "output_1": "x", "label": 1}, "missing key 'output_2'"),
        (rewardbench2("Math", "1", ["x"], []), "must each hold an answer"),
        (rewardbench2("Ties", "1", ["x"], ["y"]), "must begin with 'ref:' or 'tied:'"),
        ({"id": "1", "prompt": "q", "chosen": "x", "rejected": "y"}, "no pairs to judge"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "d.jsonl", judgebench(), row)
    with pytest.raises(MixfuseError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert words in str(caught.value)


def test_several_files_are_one_report_by_source(tmp_path: Path) -> None:
    ours = {"prompt": "p", "response_a": {"text": "x"}, "response_b": {"text": "y"}, "label": "A"}
    paths = [write(tmp_path / "a.jsonl", ours, {**ours, "source": "law"}), write(tmp_path / "b.jsonl", judgebench())]
    rows = [row for path in paths for row in load(path)]
    scores_of = report(rows, [Views(0.9, 0.1), Views(0.9, 0.9), Views(0.9, 0.1)])
    folder = tmp_path.name
    assert {name: part["n"] for name, part in scores_of.by_source.items()} == {
        f"{folder}/a.jsonl": 2,
        f"{folder}/a.jsonl: law": 1,
        f"{folder}/b.jsonl": 1,
        f"{folder}/b.jsonl: mmlu-pro-math": 1,
    }
    assert scores_of.by_source[f"{folder}/a.jsonl: law"]["both_orders_correct"]["value"] == 0
    assert set(scores_of.official) == {"judgebench"}
