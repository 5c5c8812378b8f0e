"""The trace store: nothing is lost, nothing is counted twice, on SQLite and on a real PostgreSQL."""

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy
from fake_upstream import FakeUpstream, Script
from fusion_harness import StartGateway
from postgres import Postgres, emptied

from mixfuse.contracts.database import MIGRATIONS, Database, opened, probe
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import validate
from mixfuse.contracts.trace import Call, Trace, Usage
from mixfuse.fusion.calls.ledger import Spend
from mixfuse.fusion.config import FusionConfig, TraceConfig
from mixfuse.fusion.store.spool import Spool
from mixfuse.fusion.store.traces import Spent, TraceStore, _spool_beside

HELLO: list[Any] = [{"role": "user", "content": "why?"}]


class Noted:
    """Notes which spending is in the database."""

    def __init__(self) -> None:
        self.spent: list[tuple[str, Spend]] = []
        self.left_behind: list[Spent] = []

    def committing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def committed(self, spent: Spent) -> None:
        self.spent.append((spent.key_id, spent.spend))

    def adopt(self, left_behind: Sequence[Spent]) -> None:
        self.left_behind += left_behind


@asynccontextmanager
async def store(place: str, tmp_path: Path, **config: Any) -> AsyncIterator[TraceStore]:
    spending = Noted()
    with opened(place) as database:
        traces = TraceStore(
            database,
            TraceConfig(spool=tmp_path / "spool", **config),
            spending=spending,
        )
        traces.spent = spending.spent  # type: ignore[attr-defined]
        await traces.start()
        try:
            yield traces
        finally:
            await traces.close()


def trace(number: int = 0, **keys: Any) -> Trace:
    call = Call(stage="answer", member="a", model="m", text="an answer", usage=Usage(prompt_tokens=3), cost=0.25)
    values = {"created_at": 1e9 + number, "model": "fusion/best-of", "mode": "best_of", "messages": HELLO}
    return Trace(**(values | {"calls": [call]} | keys))


def rows(place: str, query: str) -> list[tuple[Any, ...]]:
    with opened(place) as database:
        return [tuple(row) for row in database.run_now(lambda c: c.execute(sqlalchemy.text(query)).all())]


async def test_what_is_added_is_there_newest_first(place: str, tmp_path: Path) -> None:
    async with store(place, tmp_path) as traces:
        added = [trace(number) for number in range(5)] + [trace(9, mode="merge", answer="\x00\u2028\U0001f600")]
        for one in added:
            await traces.add(one)
        assert await traces.get(added[0].id) == added[0]
        assert traces.backlog == 0
        assert (await traces.newest(limit=2)).traces == [added[5], added[4]]
        assert (await traces.newest(mode="merge")).traces == [added[5]]
        assert await traces.get("trace-none") is None
    assert rows(place, "SELECT COUNT(*), SUM(cost), SUM(total_tokens) FROM traces") == [(6, 1.5, 18)]
    assert list((tmp_path / "spool").iterdir()) == []


async def test_feedback_is_added_in_order(place: str, tmp_path: Path) -> None:
    async with store(place, tmp_path) as traces:
        one = trace(key="key-1")
        await traces.add(one)
        await asyncio.gather(*(traces.add_feedback(one.id, {"score": score}) for score in range(5)))
        found = await traces.get(one.id)
        assert found is not None
        assert found.feedback == [{"score": score} for score in range(5)]
        assert await traces.add_feedback("trace-none", {}) is None
        assert await traces.add_feedback(one.id, {}, key_id="key-2") is None


async def test_a_key_sees_its_own_traces_only(place: str, tmp_path: Path) -> None:
    async with store(place, tmp_path) as traces:
        mine, other, open_ = trace(1, key="key-1"), trace(2, key="key-2"), trace(3)
        for one in (mine, other, open_):
            await traces.add(one)
        assert (await traces.newest(key_id="key-1")).traces == [mine]
        assert await traces.get(other.id, key_id="key-1") is None
        assert await traces.get(mine.id, key_id="key-1") == mine


async def test_usage_of_a_key_is_counted_once_however_often_a_trace_is_written(place: str, tmp_path: Path) -> None:
    one = trace(key="key-1")
    async with store(place, tmp_path) as traces:
        await traces.add(one)
        await traces.written()
        await traces.add(one)  # as after a commit whose confirmation was lost
        await traces.add(trace(1, key="key-1"))
        await traces.written()
        assert traces.spent == [("key-1", Spend(0.25, 3))] * 3  # type: ignore[attr-defined]
    assert rows(place, "SELECT key_id, day, requests, tokens, cost FROM key_usage") == [
        ("key-1", "2001-09-09", 2, 6, 0.5)
    ]


async def test_what_a_killed_process_left_is_written_by_the_next(place: str, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    left = [trace(number) for number in range(3)]
    for one in left:
        segment = spool.append(one.model_dump_json().encode() + b"\n")
    spool.append(b"no trace\n")
    with segment.path.open("ab") as file:
        file.write(left[0].model_dump_json().encode()[:40])  # killed in the middle of a write
    async with store(place, tmp_path) as traces:  # that process still lives
        assert (await traces.newest()).traces == []
    spool.close()  # the lock ends with the process
    async with store(place, tmp_path) as traces:
        assert (await traces.newest()).traces == left[::-1]
        assert traces.set_aside == 1
    (aside,) = (tmp_path / "spool").iterdir()
    assert aside.read_text() == "no trace\n"


async def test_a_database_that_is_away_is_waited_for(server: Postgres, tmp_path: Path) -> None:
    async with store(emptied(server), tmp_path) as traces:
        one = trace()
        await asyncio.to_thread(server.stop)
        try:
            await traces.add(one)
            await traces.written()  # does not wait for ever
            assert (traces.backlog, bool(traces.failure)) == (1, True)
            with pytest.raises(MixfuseError, match="cannot be read") as caught:
                await traces.get(one.id)
            assert caught.value.kind == "trace_db"
        finally:
            await asyncio.to_thread(server.start)
        async with asyncio.timeout(30):
            while traces.backlog:  # noqa: ASYNC110 - the store tells nobody
                await asyncio.sleep(0.01)
        assert await traces.get(one.id) == one
        assert traces.failure is None


async def test_a_database_that_stays_away_leaves_the_traces_in_the_spool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixfuse.fusion.store.traces._CLOSE_S", 0.05)
    monkeypatch.setattr("mixfuse.fusion.store.traces._MOST_WAITING", 2)
    place = str(tmp_path / "traces.sqlite3")
    left = [trace(number) for number in range(4)]  # more than are kept in memory
    with opened(place) as other:
        other.run_now(lambda c: c.execute(sqlalchemy.text("ALTER TABLE traces RENAME TO elsewhere")))
        async with store(place, tmp_path) as traces:
            for one in left:
                await traces.add(one)
            await traces.written()
            assert (bool(traces.failure), traces.backlog) == (True, 4)
        assert len(list((tmp_path / "spool").iterdir())) == 1
        other.run_now(lambda c: c.execute(sqlalchemy.text("ALTER TABLE elsewhere RENAME TO traces")))
    async with store(place, tmp_path) as traces:
        assert (await traces.newest()).traces == left[::-1]


async def test_a_trace_that_cannot_be_written_holds_up_no_other(tmp_path: Path) -> None:
    place = str(tmp_path / "traces.sqlite3")
    bad = trace(1)
    async with store(place, tmp_path) as traces:
        with opened(place) as other:
            other.run_now(
                lambda c: c.execute(
                    sqlalchemy.text(
                        f"CREATE TRIGGER no BEFORE INSERT ON traces WHEN NEW.id = '{bad.id}' "
                        "BEGIN SELECT RAISE(ABORT, 'no'); END"
                    )
                )
            )
        for one in (trace(0), bad, trace(2)):
            await traces.add(one)
        await traces.written()
        assert [one.created_at - 1e9 for one in (await traces.newest()).traces] == [2, 0]
    (left,) = (tmp_path / "spool").iterdir()
    assert bad.id in left.read_text()


async def test_traces_past_their_time_are_removed(place: str, tmp_path: Path) -> None:
    now = time.time()
    async with store(place, tmp_path) as traces:
        await traces.add(trace(created_at=now - 3 * 86400))
        await traces.add(trace(created_at=now - 1 * 86400))
    async with store(place, tmp_path, retention_days=2):
        async with asyncio.timeout(30):
            while rows(place, "SELECT COUNT(*) FROM traces") != [(1,)]:  # noqa: ASYNC110 - nor of this
                await asyncio.sleep(0.01)


# Through the gateway


async def test_redacted_text_is_never_on_the_disk(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path
) -> None:
    secret, card = "jane@example.org", "4111 1111 1111 1111"
    upstream.models["alpha"] = Script(f"write to {secret}")
    upstream.models["beta"] = Script(status=500, body=json.dumps({"error": {"message": f"no {secret}"}}).encode())
    gateway = await start_gateway(traces={"redact": [r"[\w.]+@[\w.]+", r"(\d{4} ?){4}"]})
    response = await gateway.post(
        model="fusion/best-of", messages=[{"role": "user", "content": f"I am {secret}, {card}"}]
    )
    assert response.status_code == 200
    (found,) = await gateway.first_traces()
    await gateway.http.post(f"/v1/traces/{found['id']}/feedback", json={"comment": f"thanks, {secret}"})
    (found,) = await gateway.first_traces()
    assert found["messages"][0]["content"] == "I am [redacted], [redacted]"
    assert found["feedback"] == [{"comment": "thanks, [redacted]"}]
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"[redacted]" in stored
    assert secret.encode() not in stored
    assert card.encode() not in stored


async def test_traces_without_text_still_tell_what_was_used(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(traces={"store_text": False})
    body = (await gateway.post(model="fusion/best-of", messages=HELLO, temperature=0.5, stop=["w"])).json()
    (found,) = await gateway.first_traces()
    assert (found["messages"], found["answer"], found["parameters"]) == ([], None, {"temperature": 0.5})
    assert {call["text"] for call in found["calls"]} == {None}
    assert sum(call["usage"]["prompt_tokens"] for call in found["calls"]) == body["usage"]["prompt_tokens"]
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"the answer of" not in stored


def test_each_database_has_a_spool_of_its_own() -> None:
    """Those of servers had one between them: traces that a killed gateway left went into another's database."""
    databases: list[Any] = [SimpleNamespace(name=f"postgresql://one/{name}") for name in ("a", "b")]
    spools = set(map(_spool_beside, databases))
    assert len(spools) == 2
    assert {spool.parent for spool in spools} == {Path("runs/trace-spool")}


async def test_two_gateways_share_a_database(place: str, start_gateway: StartGateway) -> None:
    one, other = await start_gateway(trace_db=place), await start_gateway(trace_db=place)
    for gateway in (one, other):
        assert (await gateway.post(model="alpha", messages=HELLO)).status_code == 200
        assert len(await gateway.first_traces()) >= 1
    assert len((await one.http.get("/v1/traces")).json()["data"]) == 2
    assert (await one.http.get("/readyz")).status_code == 200


# Opening


def test_the_first_databases_are_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite3"
    old = trace()
    connection = sqlite3.connect(path)
    for statement in MIGRATIONS[0]:
        connection.execute(statement)
    values = (old.id, 1.0, "m", "best_of", "ok", "judged", 3, 1.0, old.model_dump_json(exclude={"key"}))
    connection.execute("INSERT INTO traces VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
    connection.commit()
    connection.close()
    assert rows(str(path), "SELECT id, cost, key_id FROM traces") == [(old.id, 0.0, None)]
    assert rows(str(path), "SELECT version FROM schema_version") == [(len(MIGRATIONS),)]


def test_a_database_is_built_once_however_many_open_it(place: str) -> None:
    with opened(place) as one, opened(place) as other:
        for database in (one, other):
            database.run_now(probe)
    assert rows(place, "SELECT version FROM schema_version") == [(len(MIGRATIONS),)]


def test_a_database_of_a_newer_version_is_left_alone(place: str) -> None:
    with opened(place) as database:
        database.run_now(lambda c: c.execute(sqlalchemy.text("UPDATE schema_version SET version = 99")))
    with pytest.raises(MixfuseError, match="newer mixfuse"):
        Database(place)


@pytest.mark.parametrize("where", ["file", "folder", "postgresql://user:secret@127.0.0.1:9/nowhere", "file/below"])
def test_what_is_no_database_is_refused_in_one_line(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("this is a text file, and long enough not to be taken for an empty database" * 20)
    (tmp_path / "folder").mkdir()
    with pytest.raises(MixfuseError, match="cannot open the trace database") as caught:
        Database(where if "://" in where else tmp_path / where)
    assert caught.value.kind == "trace_db"
    assert "secret" not in str(caught.value)


def test_a_url_of_something_else_and_a_bad_pattern_are_refused() -> None:
    members = [{"name": "a", "base_url": "http://127.0.0.1:1/v1", "model": "m"}]
    with pytest.raises(MixfuseError, match="'trace_db': use a path, a sqlite:///"):
        validate({"members": members, "trace_db": "mysql://localhost/x"}, FusionConfig, source="c")
    with pytest.raises(MixfuseError, match=r"'traces.redact': '\[' is not a regular expression"):
        validate({"members": members, "traces": {"redact": ["["]}}, FusionConfig, source="c")


@pytest.mark.parametrize("kept", [{"redact": ["hush[0-9]*"]}, {"store_text": False}])
async def test_no_part_of_a_trace_keeps_what_shall_not_be_kept(
    start_gateway: StartGateway, upstream: FakeUpstream, kept: dict[str, Any]
) -> None:
    gateway = await start_gateway(traces=kept, modes={"max_rounds": 1})
    for number, name in enumerate(("alpha", "beta", "gamma")):
        upstream.models[name].text = f"hush{number}"
        upstream.models[name].tool_calls = [("hush", '{"hush": 1}')]
    upstream.models["synth"].text = "hush [from 1]"
    tools = [{"type": "function", "function": {"name": "hush"}}]
    asked = {"messages": [{"role": "user", "content": "hush?"}], "stop": ["hush"]}
    for body in (
        {"model": "fusion/debate"},
        {"model": "fusion/best-of", "tools": tools},
        {"model": "fusion/merge", "fusion": {"cite": True}},
    ):
        response = await gateway.post(**asked, **body)
        assert "hush" in response.text
        trace = await gateway.trace(response.json()["fusion"])
        assert trace["calls"]
        assert "hush" not in json.dumps(trace)
