"""Traces and recorded verdicts go into a combiner, beside pool files: through the commands, as a user runs them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from combiner_pools import pool, row

from mixfuse.cli.entry import main
from mixfuse.contracts.database import opened
from mixfuse.contracts.files import read_jsonl, write_jsonl
from mixfuse.contracts.trace import Call, Trace, Verdict, Weighing
from mixfuse.fusion.combiner.artefact import load
from mixfuse.fusion.combiner.evidence import Question
from mixfuse.fusion.config import TraceConfig
from mixfuse.fusion.store.traces import TraceStore

EVEN = {"a": 0.7, "b": 0.65, "c": 0.65}


def as_trace(number: int, question: Question, *, feedback: list[dict[str, Any]], **keys: Any) -> Trace:
    """The trace of a question that all members answered, and that a judge called `referee` was asked about."""
    answers = [
        Call(
            stage="answer", member=answer.member, model="m", candidate=place, text=f"The answer is ({answer.key[-1]})."
        )
        for place, answer in enumerate(question.answers)
    ]
    return Trace(
        id=f"trace-{number:04}",
        created_at=1000.0 + number,
        model="fusion/auto",
        mode="auto",
        messages=[{"role": "user", "content": f"Question {number}?"}],
        candidates=[answer.member for answer in question.answers],
        calls=[*answers, Call(stage="verdict", member="referee", model="m")],
        verdicts=[Verdict(first=2, second=0, winner="first", score=0.8, consistent=True)],
        winner=0,
        reason="judged",
        answer="x",
        feedback=feedback,
        **keys,
    )


async def exported(folder: Path, traces: list[Trace]) -> Path:
    place = folder / "traces.sqlite3"
    with opened(place) as database:
        store = TraceStore(database, TraceConfig())
        for trace in traces:
            await store.add(trace)
        await store.close()
    out = folder / "traces.jsonl"
    assert main(["traces", "export", "--db", str(place), "--out", str(out)]) == 0
    return out


def fitted(capsys: pytest.CaptureFixture[str], out: Path, *data: Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["combiner", "fit", *map(str, data), "--out", str(out), "--agreement", "choice", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(printed, dict)
    return printed


async def test_answers_without_a_mark_and_verdicts_are_exported_for_the_fit(tmp_path: Path) -> None:
    (question,) = pool(1, EVEN)
    weighing = Weighing(
        confidence=0.6, low_confidence=False, stopped="target", asked=["a"], domain="law", classes=[],
        propensities={"b": 0.02},
    )  # fmt: skip
    one = as_trace(1, question, feedback=[{"wrong": [1]}], weighing=weighing)
    (exported_row,) = read_jsonl(await exported(tmp_path, [one]))
    assert [(answer["model"], answer["correct"]) for answer in exported_row["responses"]] == [("b", False)]
    assert [(answer["model"], "correct" in answer) for answer in exported_row["unmarked"]] == [
        ("a", False),
        ("c", False),
    ]
    # The verdict was on candidates 2 and 0: c and a, which stand at places 2 and 1 of the row.
    assert exported_row["verdicts"] == [{"judge": "referee", "first": 2, "second": 1, "score": 0.8}]
    assert (exported_row["propensities"], exported_row["domain"]) == ({"b": 0.02}, "law")


async def test_traces_are_fitted_together_with_pool_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = pool(300, EVEN, seed=1)
    traces = [
        as_trace(
            number,
            question,
            feedback=[
                {"correct": [place for place, answer in enumerate(question.answers) if answer.right],
                 "wrong": [place for place, answer in enumerate(question.answers) if not answer.right]}
            ],
        )
        for number, question in enumerate(questions)
    ]  # fmt: skip
    data = tmp_path / "pool.jsonl"
    write_jsonl(data, [row(question) for question in pool(200, EVEN)])
    from_traces = await exported(tmp_path, traces)
    out = tmp_path / "combiner.json"
    assert fitted(capsys, out, data)["n"] == 200
    both = fitted(capsys, out, data, from_traces)
    assert (both["n"], load(out).data.questions, both["limits"]) == (500, 500, [])
    assert both["difference"]["low"] > 0


async def test_feedback_for_bad_answers_only_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = pool(200, EVEN, seed=1)
    traces = [
        as_trace(number, question, feedback=[{"score": -1}])
        for number, question in enumerate(questions)
        if not question.answers[0].right
    ]
    data = tmp_path / "pool.jsonl"
    write_jsonl(data, [row(question) for question in pool(200, EVEN)])
    figures = fitted(capsys, tmp_path / "combiner.json", data, await exported(tmp_path, traces))
    assert figures["n"] == 200
    assert any("comes only for bad answers makes members look worse" in sentence for sentence in figures["limits"])


def test_members_that_were_asked_in_part_are_weighed_by_the_recorded_chance_or_it_says_that_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Member c was asked where a was wrong, and by chance elsewhere, so its questions are the harder ones."""
    generator = np.random.default_rng(0)
    rows = []
    for question in pool(1500, {"a": 0.7, "b": 0.6, "c": 0.6}):
        hard = not question.answers[0].right
        chance = 0.9 if hard else 0.2
        keep = generator.random() < chance
        rows.append(
            {
                **row(question),
                "propensities": {"c": chance},
                "responses": row(question)["responses"][: 3 if keep else 2],
            }
        )
    data, out = tmp_path / "pool.jsonl", tmp_path / "combiner.json"
    write_jsonl(data, rows)
    figures = fitted(capsys, out, data)
    assert any("weighed by the recorded probabilities" in sentence for sentence in figures["limits"])
    assert not any("nothing can be weighed by that" in sentence for sentence in figures["limits"])
    write_jsonl(data, [{name: value for name, value in one.items() if name != "propensities"} for one in rows])
    assert any("nothing can be weighed by that" in sentence for sentence in fitted(capsys, out, data)["limits"])


def judged(questions: list[Question], seed: int) -> list[dict[str, Any]]:
    """Rows with the verdicts of two judges: `sharp` is right four times in five, `blunt` throws a coin."""
    generator = np.random.default_rng(seed)
    rows = []
    for question in questions:
        marks = [bool(answer.right) for answer in question.answers]
        verdicts = []
        for first, second in ((0, 1), (0, 2), (1, 2)):
            better = 0.8 if marks[first] else 0.2
            right = generator.random() < 0.8
            sharp = better if right else 1 - better
            for judge, score in (
                ("sharp", sharp if marks[first] != marks[second] else 0.5),
                ("blunt", generator.random()),
            ):
                verdicts.append({"judge": judge, "first": first, "second": second, "score": score})
        rows.append({**row(question), "verdicts": verdicts})
    return rows


def test_several_judges_get_the_weight_that_each_earns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test, plain = tmp_path / "train.jsonl", tmp_path / "test.jsonl", tmp_path / "plain.jsonl"
    write_jsonl(train, judged(pool(600, EVEN), 0))
    write_jsonl(test, judged(pool(600, EVEN, seed=1), 1))
    write_jsonl(plain, [row(question) for question in pool(600, EVEN, seed=1)])
    out = tmp_path / "combiner.json"
    fitted(capsys, out, train)
    judges = load(out).judges
    assert judges["sharp"] > 0.4
    assert abs(judges["blunt"]) < 0.2
    weighed = {}
    for name in (test, plain):
        capsys.readouterr()
        assert main(["eval", "fusion", "--pool", str(name), "--combiner", str(out), "--json"]) == 0
        weighed[name] = json.loads(capsys.readouterr().out.splitlines()[-1])["weighed"]
    assert weighed[test] > weighed[plain] + 0.03
