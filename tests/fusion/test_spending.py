"""The sums of spending: worked out from traces, written with them once, and read by day, key, mode and member."""

from functools import partial
from typing import Any

import pytest
from sqlalchemy import text

from mixfuse.contracts.database import Database, opened
from mixfuse.contracts.trace import Trace
from mixfuse.fusion.store import spending, trace_facts
from mixfuse.fusion.store.spending import Slice
from mixfuse.fusion.store.traces import insert, row_of

DAY = 1_767_225_600.0  # 2026-01-01
ALL = Slice("2026-01-01", "2026-12-31")


def call(member: str, cost: float, stage: str = "answer", **fields: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    return {"stage": stage, "member": member, "model": member, "usage": usage, "cost": cost, **fields}


def trace(number: int, mode: str, calls: list[dict[str, Any]], **fields: Any) -> Trace:
    rest = {"id": f"t{number}", "created_at": DAY, "model": mode, "messages": [], "candidates": ["a", "b", "c"]}
    return Trace.model_validate({**rest, "mode": mode, "calls": calls, **fields})


def auto(number: int, asked: dict[str, float], judge: float = 0.0, **fields: Any) -> Trace:
    calls = [call(name, cost, candidate="abc".index(name)) for name, cost in asked.items()]
    calls += [call("judge", judge, "verdict")] if judge else []
    weighing = {"confidence": 0.9, "stopped": "target", "asked": list(asked), "classes": []}
    return trace(number, "auto", calls, weighing=weighing, winner=0, **fields)


def write(database: Database, *traces: Trace) -> None:
    database.run_now(partial(insert, rows=[row_of(one, one.model_dump_json()) for one in traces]))


def test_the_sums_are_those_of_the_traces(place: str) -> None:
    with opened(place) as database:
        write(
            database,
            trace(1, "best_of", [call("a", 0.5, candidate=0), call("b", 0.25, candidate=1)], key="k1"),
            trace(2, "best_of", [call("a", 0.5, candidate=0, outcome="timeout"), call("a", 1.0, candidate=0)]),
            auto(3, {"a": 0.5}, judge=0.125, key="k1", created_at=DAY + 86400),
        )
        write(database, auto(3, {"a": 0.5}, judge=0.125, key="k1", created_at=DAY + 86400))  # from the spool, again
        read = database.run_now
        days = read(lambda connection: spending.by(connection, "day", ALL))
        assert [(one.name, one.requests, one.cost) for one in days] == [
            ("2026-01-01", 2, 2.25),
            ("2026-01-02", 1, 0.625),
        ]
        keys = read(lambda connection: spending.by(connection, "key_id", ALL))
        assert [(one.name, one.requests, one.cost) for one in keys] == [("", 1, 1.5), ("k1", 2, 1.375)]
        of_key = Slice("2026-01-01", "2026-12-31", "k1")
        modes = read(lambda connection: spending.by(connection, "mode", of_key))
        assert [(one.name, one.requests, one.cost) for one in modes] == [("best_of", 1, 0.75), ("auto", 1, 0.625)]
        found = {(one.member, one.stage): one for one in read(lambda c: spending.by_member(c, ALL))}
        a = found["a", "answer"]
        assert (a.calls, a.asked, a.spared, a.prompt_tokens, a.completion_tokens, a.cost) == (4, 3, 0, 40, 20, 2.5)
        assert (found["b", "answer"].spared, found["c", "answer"].calls, found["c", "answer"].spared) == (1, 0, 1)
        assert found["judge", "verdict"].cost == 0.125
        assert read(lambda connection: spending.by(connection, "day", Slice("2026-01-02", "2026-01-02"))) == days[1:]
        assert read(lambda connection: spending.first_day_of_all(connection, None)) == "2026-01-01"
        assert read(lambda connection: spending.first_day_of_all(connection, "k1")) == "2026-01-01"
        assert read(lambda connection: spending.first_day_of_all(connection, "k2")) is None


def test_what_auto_saved_is_worked_out_from_the_means(place: str) -> None:
    with opened(place) as database:
        write(database, trace(1, "best_of", [call("b", 0.25, candidate=1), call("a", 0.75, candidate=0)]))
        assert database.run_now(lambda connection: spending.saved(connection, ALL)) is None
        write(database, auto(2, {"a": 0.5}, judge=0.125), auto(3, {"a": 0.25, "b": 0.75}))
        found = database.run_now(lambda connection: spending.saved(connection, ALL))
        assert found is not None
        # b was asked twice, for 0.5 on the mean, and left out once; nobody ever asked c, which was left out twice.
        assert (found.requests, found.paid, found.spared, found.unasked) == (2, 1.625, 3, 0.5)
        assert (found.unknown, found.unpriced, found.share) == (["c"], [], 1.625 / 2.125)
        assert (
            database.run_now(lambda connection: spending.saved(connection, Slice("2026", "2027", mode="merge"))) is None
        )
        write(database, trace(4, "merge", [call("c", 0.0, candidate=2)]))
        found = database.run_now(lambda connection: spending.saved(connection, ALL))
        assert found is not None
        assert (found.unknown, found.unpriced, found.unasked) == ([], ["c"], 0.5)


def test_a_kept_answer_saves_nothing_of_autos() -> None:
    kept = auto(1, {"a": 0.5}).model_copy(update={"calls": [], "cached_from": "t0"})
    assert spending.sums_of(kept).calls == {}


@pytest.mark.parametrize(
    ("fields", "right"),
    [
        ({}, None),
        ({"feedback": [{"comment": "hm"}]}, None),
        ({"winner": 1, "feedback": [{"correct": [1]}]}, 1),
        ({"winner": 1, "feedback": [{"correct": [0]}]}, None),
        ({"winner": 1, "feedback": [{"best": 0}]}, 0),
        ({"winner": 1, "feedback": [{"correct": [1]}, {"score": -1.0}]}, 0),
        ({"winner": 1, "feedback": [{"score": 1.0}, {"unmarked": [1]}]}, None),
        ({"feedback": [{"score": 1.0}]}, 1),  # a merged text is no candidate
        ({"feedback": [{"correct": [0, 1, 2]}]}, None),
        ({"candidates": ["a"], "feedback": [{"wrong": [0]}]}, 0),
        ({"winner": 0, "feedback": [{"score": 0}, {"score": True}]}, 1),
    ],
)
def test_whether_the_returned_answer_is_marked(fields: dict[str, Any], right: int | None) -> None:
    assert trace_facts.marked_right(trace(1, "merge", [], **fields)) == right


def test_right_answers_cost_what_all_marked_ones_cost(place: str) -> None:
    with opened(place) as database:
        marked = [{"feedback": [{"score": score}]} for score in (1.0, 1.0, 1.0, -1.0)]
        write(database, *(auto(number, {"a": 0.75}, **fields) for number, fields in enumerate(marked)))
        write(database, auto(9, {"a": 5.0}), trace(8, "merge", [call("a", 1.0)], feedback=[{"score": -1.0}], key="k"))
        found = {one.mode: one for one in database.run_now(lambda connection: spending.right_answers(connection, ALL))}
        assert (found["auto"].marked, found["auto"].right, found["auto"].each) == (4, 3, 1.0)
        low, high = found["auto"].interval
        assert high is not None
        assert (round(0.75 / low, 3), round(0.75 / high, 3)) == (0.954, 0.301)  # Wilson's interval of 3 in 4
        assert (found["merge"].each, found["merge"].interval[1]) == (None, None)
        own = database.run_now(
            lambda connection: spending.right_answers(connection, Slice("2026-01-01", "2026-01-01", "k"))
        )
        assert [one.mode for one in own] == ["merge"]
        assert database.run_now(lambda c: spending.right_answers(c, Slice("2026-01-02", "2026-12-31"))) == []


def test_a_time_of_no_calendar_hides_no_other_trace(place: str) -> None:
    with opened(place) as database:
        write(database, trace(1, "m", [], created_at=DAY), trace(2, "m", [], created_at=1000 * DAY))
        write(database, trace(3, "m", [], created_at=-1e30), trace(4, "m", [], created_at=1e30, key="k"))
        database.run_now(lambda connection: connection.execute(text("DELETE FROM trace_facts")))
        database.run_now(lambda connection: connection.execute(text("DELETE FROM spent_on_requests")))
        assert database.run_now(lambda connection: trace_facts.backfill(connection, None, 10)) is None
        days = database.run_now(lambda connection: spending.by(connection, "day", Slice("0001-01-01", "9999-12-31")))
        assert [(one.name, one.requests) for one in days] == [("0001-01-01", 1), ("2026-01-01", 1), ("9999-12-31", 2)]


def test_every_database_takes_every_filter(place: str) -> None:
    odd = "a\0b"
    with opened(place) as database:
        write(database, trace(1, "m", []))
        for filters in (
            trace_facts.Filters(mode=odd, key_id=odd, reason=odd, outcome=odd),
            trace_facts.Filters(member=odd),
            trace_facts.Filters(words=odd, min_cost=-1e308, min_ms=1e308, since=-1e308, until=1e308),
        ):
            assert database.run_now(lambda c, filters=filters: trace_facts.find(c, filters)).rows == []


def test_traces_of_an_earlier_version_are_added_once(place: str) -> None:
    with opened(place) as database:
        write(database, trace(1, "best_of", [call("a", 0.5, candidate=0)]), trace(2, "merge", [call("b", 1.0)]))
        for statement in ("DELETE FROM trace_facts", "DELETE FROM spent_on_requests", "DELETE FROM spent_on_calls"):
            database.run_now(lambda connection, statement=statement: connection.execute(text(statement)))
        write(database, trace(3, "merge", [call("b", 1.0)]))
        for _ in range(2):
            assert database.run_now(lambda connection: trace_facts.backfill(connection, None, 10)) is None
            modes = database.run_now(lambda connection: spending.by(connection, "mode", ALL))
            assert [(one.name, one.requests, one.cost) for one in modes] == [("merge", 2, 2.0), ("best_of", 1, 0.5)]
            members = database.run_now(lambda connection: spending.by_member(connection, ALL))
            assert [(one.member, one.cost) for one in members] == [("b", 2.0), ("a", 0.5)]
