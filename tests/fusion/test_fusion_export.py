"""Traces as pool rows: whose word counts, and from when on."""

from pathlib import Path
from typing import Any

import pytest

from mixfuse.contracts.database import Database, opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import read_jsonl
from mixfuse.contracts.trace import Call, Trace, Verdict
from mixfuse.fusion.config import TraceConfig
from mixfuse.fusion.store.export_traces import export, read
from mixfuse.fusion.store.traces import TraceStore


def trace(number: int, *feedback: dict[str, Any], key: str | None = None, winner: int = 0) -> Trace:
    """Two candidates, "right" and "wrong"; the judge prefers `winner`."""
    texts = (f"right {number}", f"wrong {number}")
    calls = [
        Call(stage="answer", member="m", model="m", candidate=place, text=text) for place, text in enumerate(texts)
    ]
    verdict_on_pair = Verdict(
        first=0, second=1, winner="first" if winner == 0 else "second", score=0.9, consistent=True
    )
    return Trace(
        id=f"trace-{number:04}",
        created_at=1000.0 + number,
        model="fusion/best-of",
        mode="best_of",
        key=key,
        messages=[{"role": "user", "content": f"Question {number}?"}],
        candidates=["alpha", "beta"],
        calls=calls,
        verdicts=[verdict_on_pair],
        winner=winner,
        reason="judged",
        answer=texts[winner],
        feedback=list(feedback),
    )


async def stored(place: Path, traces: list[Trace]) -> Path:
    with opened(place) as database:
        store = TraceStore(database, TraceConfig())
        for entry in traces:
            await store.add(entry)
        await store.close()
    return place


def marks(database: Database, **keys: Any) -> tuple[dict[str, dict[str, bool]], dict[str, int]]:
    rows, counts = read(database, **keys)
    return {row["id"]: {entry["text"]: entry["correct"] for entry in row["responses"]} for row in rows}, counts


GOOD, BAD = {"best": 0}, {"best": 1}


async def test_only_traces_of_a_time_are_read(tmp_path: Path) -> None:
    place = await stored(tmp_path / "traces.sqlite3", [trace(number, GOOD) for number in range(6)])
    with opened(place) as database:
        marked, counts = marks(database, since=1001.0, until=1004.0)
        assert list(marked) == ["trace-0002", "trace-0003", "trace-0004"], "after `since`, up to `until`"
        assert counts == {"traces": 3, "rows": 3, "right": 3, "wrong": 3}
        assert len(marks(database)[0]) == 6


async def test_users_who_contradict_everyone_are_not_heard(tmp_path: Path) -> None:
    """Each trace has one user's word, and the judge is the other witness; a user without a name is their key."""
    traces = [trace(number, GOOD, key="key-fair") for number in range(12)]
    traces += [trace(number, BAD, key="key-foul") for number in range(20, 32)]
    traces += [trace(number, BAD, key="key-new") for number in range(40, 44)]  # too few marks to say anything of
    place = await stored(tmp_path / "traces.sqlite3", traces)
    with opened(place) as database:
        marked, counts = marks(database, min_agreement=0.5)
        assert (counts["users"], counts["users_not_heard"], counts["marks_not_heard"]) == (2, 1, 24)
        assert {name[:8] for name in marked} == {"trace-00"}
        assert set(marked) == {f"trace-{number:04}" for number in (*range(12), *range(40, 44))}
        assert len(marks(database)[0]) == 28


async def test_a_mark_that_was_taken_back_counts_for_nobody(tmp_path: Path) -> None:
    """A user who takes every foul mark back is not compared with anybody."""
    foul = {"correct": [1], "wrong": [0], "user": "foul"}
    back = {"unmarked": [0, 1], "user": "foul"}
    traces = [trace(number, GOOD, foul, {**back, "unmarked": [1]}, back) for number in range(10)]
    traces += [trace(20, {"correct": [0]}, {"unmarked": [0]})]
    place = await stored(tmp_path / "traces.sqlite3", traces)
    with opened(place) as database:
        _, counts = marks(database)
        assert counts == {"traces": 11, "rows": 0, "right": 0, "wrong": 0}
        marked, counts = marks(database, min_agreement=0.5)
        assert (counts["users"], counts["users_not_heard"]) == (1, 0), "only who is left with marks"
        assert marked == {}


async def test_other_users_outweigh_the_judge_and_verifiers_both(tmp_path: Path) -> None:
    """The judge is always wrong here, and three of four users right."""
    fair = [{"best": 0, "user": f"fair-{number}"} for number in range(3)]
    foul = {"best": 1, "user": "foul"}
    traces = [trace(number, *fair, foul, winner=1) for number in range(10)]
    place = await stored(tmp_path / "traces.sqlite3", traces)
    with opened(place) as database:
        assert not marks(database)[0]["trace-0000"]["right 0"], "the last word counts where everyone is heard"
        marked, counts = marks(database, min_agreement=0.5)
        assert (counts["users"], counts["users_not_heard"]) == (4, 1)
        assert marked["trace-0000"] == {"right 0": True, "wrong 0": False}

        class Swapped:
            """A verifier that says the opposite of them."""

            reference = ""

            def __init__(self, prompt: str) -> None:
                self.prompt = prompt

            def verify(self, answer: str) -> bool:
                return answer.startswith("wrong")

        tasks = [Swapped(f"Question {number}?") for number in range(10)]
        _, counts = marks(database, min_agreement=0.5, tasks=tasks)
        assert (counts["users"], counts["users_not_heard"]) == (4, 3)


async def test_an_export_of_which_nothing_is_known_is_refused(tmp_path: Path) -> None:
    place = await stored(tmp_path / "traces.sqlite3", [trace(1)])
    with opened(place) as database:
        with pytest.raises(MixfuseError, match="none of 1 traces says which answers are right"):
            export(database, tmp_path / "pool.jsonl")
        assert not (tmp_path / "pool.jsonl").exists()
        assert export(database, tmp_path / "pool.jsonl", label="judge")["rows"] == 1
    assert read_jsonl(tmp_path / "pool.jsonl")[0]["responses"][0] == {
        "model": "alpha",
        "text": "right 1",
        "correct": True,
    }
