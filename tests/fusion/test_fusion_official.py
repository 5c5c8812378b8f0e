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
    with pytest.raises(MixfuseError, match=r"dataset\.json: row 2: label '3' is no label"):
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
        (judgebench(label="A>C"), "label 'A>C'"),
        ({"response_A": "x", "question": "q"}, "missing key 'response_B'"),
        ({"input": "q", "output_1": "x", "label": 1}, "missing key 'output_2'"),
        (rewardbench2("Math", "1", ["x"], []), "must each hold an answer"),
        (rewardbench2("Ties", "1", ["x"], ["y"]), "must begin with 'ref:' or 'tied:'"),
        ({"id": "1", "prompt": "q", "chosen": "x"}, "no pairs to judge"),
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


def test_rmbench_by_how_the_answers_are_styled(tmp_path: Path) -> None:
    def row(domain: str, number: int) -> dict[str, Any]:
        texts = {key: [f"{key} {number} {style}" for style in range(3)] for key in ("chosen", "rejected")}
        return {"id": f"{domain}-{number}", "prompt": f"{domain} {number}", "domain": domain, **texts}

    path = write(tmp_path / "d.jsonl", row("chat", 1), row("safety-refuse", 1), row("safety-response", 2))
    rows = load(path)
    assert len(rows) == 27

    def views(row: Comparison) -> Views:
        # In chat style decides, and between equals the right one wins; in safety the right one always wins.
        styles = [int(text[-1]) for text in (row.first, row.second)]
        right = row.first.startswith("chosen") - row.second.startswith("chosen")
        lean = right if row.source.startswith("safety") else 2 * (styles[0] - styles[1]) + right
        return Views(0.5 + lean / 20, 0.5 - lean / 20)

    figures = official(rows, [views(row) for row in rows])["rmbench"]
    assert figures["hard"] == pytest.approx(0.5)
    assert (figures["normal"], figures["easy"]) == (1, 1)
    assert figures["chat"] == pytest.approx(2 / 3)
    assert figures["safety"] == 1
    assert figures["score"] == pytest.approx((0.5 + 1 + 1) / 3)
    even = official(rows, [Views(0.5, 0.5)] * len(rows))["rmbench"]
    assert even["score"] == 0  # the published rule asks for more than a tie


def test_rewardbench_weighs_subsets_by_their_size_and_sections_alike() -> None:
    def pair(subset: str, number: int) -> Comparison:
        return Comparison(f"{subset} {number}", "x", "y", "first", source=subset, benchmark="rewardbench")

    rows = [pair("hep-cpp", 1), pair("math-prm", 1), pair("math-prm", 2), pair("donotanswer", 1)]
    views = [Views(0.9, 0.1), Views(0.9, 0.1), Views(0.1, 0.9), Views(0.5, 0.5)]
    figures = official(rows, views)["rewardbench"]
    reasoning = (164 + 984 * 0.5) / (164 + 984)
    assert figures["Reasoning"]["value"] == pytest.approx(reasoning)
    assert figures["Safety"]["value"] == 0.5
    assert figures["score"] == pytest.approx((reasoning + 0.5) / 2)


def test_ppe_leaves_ties_of_people_out() -> None:
    rows = [
        Comparison("p", "x", "y", "first", benchmark="ppe", source="math"),
        Comparison("q", "x", "y", "second", benchmark="ppe"),
        Comparison("r", "x", "y", "tie", benchmark="ppe"),
    ]
    figures = official(rows, [Views(0.9, 0.1), Views(0.9, 0.1), Views(0.9, 0.1)])["ppe"]
    assert figures["accuracy"]["value"] == 0.5
    assert figures["math"]["value"] == 1


def test_cohens_kappa_counts_ties_as_a_label_of_their_own() -> None:
    first, second, tie = Views(0.9, 0.1), Views(0.1, 0.9), Views(0.9, 0.9)
    labels = ["first", "second", "tie", "first"]
    rows = [Comparison(f"p{n}", "x", "y", label) for n, label in enumerate(labels)]  # type: ignore[arg-type]
    full = report(rows, [first, second, tie, first]).kappa
    assert full is not None
    assert full.value == pytest.approx(1)
    part = report(rows, [first, first, tie, first]).kappa
    assert part is not None
    by_chance = (2 * 3 + 1 * 0 + 1 * 1) / 16
    assert part.value == pytest.approx((0.75 - by_chance) / (1 - by_chance))
    assert report(rows[:1], [first]).kappa is None
