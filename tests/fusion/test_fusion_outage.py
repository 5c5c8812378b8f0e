"""One request or one reply is never an outage: each case is sent over real HTTP, and the gateway serves on."""

import asyncio
import json
import re
import sqlite3
import time
from pathlib import Path
from typing import Any

import hostile
import httpx
import pytest
import sqlalchemy
from fake_upstream import FakeUpstream, Script
from fusion_harness import Gateway, StartGateway
from postgres import Postgres, emptied

from mixfuse.contracts import bounded_json
from mixfuse.contracts.database import Database, opened, probe
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import validate
from mixfuse.contracts.trace import Call, Trace, Usage
from mixfuse.fusion.calls.responses import MOST_TOKENS
from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.store.export_traces import read
from mixfuse.fusion.store.spool import SET_ASIDE, Spool

HELLO: list[Any] = [{"role": "user", "content": "why?"}]


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth - 1):
        value = {"properties": value}
    return value


def completion(usage: Any = None, **message: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": "an answer"} | message, "finish_reason": "stop"}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


def poisoned(number: int = 0) -> Trace:
    """A trace whose tokens no database holds, as an older version spooled it."""
    call = Call(stage="answer", member="a", model="m", text="x", usage=Usage(prompt_tokens=10**19))
    return Trace(created_at=1e9 + number, model="m", mode="best_of", messages=HELLO, calls=[call])


async def serves(gateway: Gateway) -> None:
    """The gateway answers, stores what it answers, and says that it is ready."""
    response = await gateway.post(model="fusion/best-of", messages=HELLO)
    assert response.status_code == 200
    assert (await gateway.trace(response.json()["fusion"]))["answer"]
    ready = await gateway.http.get("/readyz")
    assert ready.status_code == 200, ready.text


def change(tmp_path: Path, statement: str, *values: Any) -> None:
    with sqlite3.connect(tmp_path / "traces.sqlite3") as database:
        database.execute(statement, values)
    database.close()


# What upstreams claim


@pytest.mark.parametrize("claim", [10**18, 2**63 - 1, 2**64 - 1, 10**30, MOST_TOKENS + 1, -1, 1e18, True, "7", None])
async def test_an_incredible_usage_is_estimated(
    start_gateway: StartGateway, upstream: FakeUpstream, claim: Any
) -> None:
    gateway = await start_gateway()
    upstream.models["alpha"].body = completion({"prompt_tokens": claim, "completion_tokens": claim})
    response = await gateway.post(model="alpha", messages=HELLO)
    assert response.status_code == 200
    assert response.json()["usage"]["total_tokens"] < 100
    (call,) = (await gateway.trace(response.json()["fusion"]))["calls"]
    assert call["estimated"]
    await serves(gateway)


@pytest.mark.parametrize(
    "when", ["inf", "-inf", "nan", "1e400", "-5", "1e18", "x", "Mon, 01 Jan 99999999999999 00:00:00 GMT", ""]
)
@pytest.mark.parametrize("status", [429, 503])
async def test_any_retry_after_is_survived(
    start_gateway: StartGateway, upstream: FakeUpstream, when: str, status: int
) -> None:
    gateway = await start_gateway()
    upstream.models["alpha"] = Script(status=status, headers={"retry-after": when})
    response = await gateway.post(model="alpha", messages=HELLO)
    assert response.status_code == (429 if status == 429 else 502)
    assert 1 <= int(response.headers.get("retry-after", 1)) <= 86_400
    await serves(gateway)


@pytest.mark.parametrize("logprob", [710, 1e308, -1e308, 10**400, "x", None])
async def test_any_log_probability_is_survived(
    start_gateway: StartGateway, upstream: FakeUpstream, logprob: Any
) -> None:
    gateway = await start_gateway()
    top = [{"token": token, "logprob": logprob} for token in ("A", "A", "B")]
    body = json.loads(completion())
    body["choices"][0]["logprobs"] = {"content": [{"token": "A", "logprob": logprob, "top_logprobs": top}]}
    upstream.models["judge"].body = json.dumps(body).encode()
    response = await gateway.post(model="fusion/best-of", messages=HELLO)
    assert response.status_code == 200
    assert (await gateway.http.get("/v1/traces")).json().keys() == {"object", "data", "has_more"}


@pytest.mark.parametrize(
    "last",
    [
        {"usage": {"prompt_tokens": 3, "completion_tokens": 4}},
        {"choices": None, "usage": {"prompt_tokens": 3, "completion_tokens": 4}},
        {"object": "statistics"},
    ],
)
async def test_a_last_chunk_without_choices_fails_no_stream(
    start_gateway: StartGateway, upstream: FakeUpstream, last: dict[str, Any]
) -> None:
    gateway = await start_gateway()
    chunk = {"choices": [{"index": 0, "delta": {"content": "hello"}, "finish_reason": "stop"}]}
    events = b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in (chunk, last))
    upstream.models["alpha"].body = events + b"data: [DONE]\n\n"
    response = await gateway.post(model="alpha", messages=HELLO, stream=True)
    assert "hello" in response.text
    assert '"error":{' not in response.text
    assert response.text.rstrip().endswith("[DONE]")


async def test_no_reply_of_an_endpoint_is_a_500(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    def at(model: str) -> dict[str, Any]:
        return {"base_url": upstream.base_url, "model": model, "breaker": None}  # every kind is to arrive

    gateway = await start_gateway(
        [{"name": name, **at(name)} for name in ("alpha", "beta", "gamma")],
        judge=at("judge"),
        synthesizer=at("synth"),
        modes={"agreement": "choice", "cite": True},
    )
    for kind, reply in hostile.REPLIES.items():
        headers = reply.headers | {"content-type": reply.content_type}
        script = Script(body=reply.body, status=reply.status, headers=headers)
        for model, asked in (("alpha", "alpha"), ("judge", "fusion/best-of"), ("synth", "fusion/merge")):
            well, upstream.models[model] = upstream.models[model], script
            for stream in (False, True):
                response = await gateway.post(model=asked, messages=HELLO, stream=stream)
                where = (kind, model, stream, response.text[:500])
                assert response.status_code in {200, 400, 429, 502, 503, 504}, where
                assert "internal_error" not in response.text, where
            upstream.models[model] = well
    await serves(gateway)
    listing = (await gateway.http.get("/v1/traces", params={"limit": 1000})).json()
    assert len(listing["data"]) == 6 * len(hostile.REPLIES) + 1
    assert "unreadable" not in listing


# Numbers in requests


@pytest.mark.parametrize(("seed", "status"), [(2**63 - 1, 200), (-(2**63), 200), (2**64 - 1, 400), (2**63, 400)])
async def test_the_greatest_seeds_are_taken_or_refused(
    start_gateway: StartGateway, upstream: FakeUpstream, seed: int, status: int
) -> None:
    gateway = await start_gateway()
    response = await gateway.post(model="fusion/best-of", messages=HELLO, seed=seed, fusion={"samples": 2})
    assert response.status_code == status, response.text
    if status == 200:
        seeds = [request["seed"] for request in upstream.asked("alpha")]
        assert len(set(seeds)) == 2
        assert all(-(2**63) <= one < 2**63 for one in seeds)
    else:
        assert response.json()["error"]["param"] == "seed"
    await serves(gateway)


# Depth


def bodies(depth: int) -> list[tuple[str, dict[str, Any]]]:
    tool = {"type": "function", "function": {"name": "f", "parameters": nested(depth)}}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": nested(depth)}}
    return [
        ("/v1/chat/completions", {"model": "fusion/best-of", "messages": HELLO, "tools": [tool]}),
        ("/v1/chat/completions", {"model": "alpha", "messages": HELLO, "metadata": nested(depth)}),
        ("/v1/chat/completions", {"model": "alpha", "messages": HELLO, "response_format": schema}),
        ("/v1/traces/trace-1/feedback", nested(depth)),
    ]


@pytest.mark.parametrize("depth", [bounded_json.MAX_DEPTH + 1, 200, 300, 900])
async def test_what_is_too_deep_to_be_read_again_is_refused(start_gateway: StartGateway, depth: int) -> None:
    gateway = await start_gateway()
    for path, body in bodies(depth):
        response = await gateway.http.post(path, content=json.dumps(body))
        assert (response.status_code, response.json()["error"]["code"]) == (400, "too_deep"), response.text
    response = await gateway.http.post("/v1/chat/completions", content=b"[" * 1_000_000)
    assert response.status_code == 400
    await serves(gateway)


async def test_the_deepest_tools_that_are_taken_can_be_read_again(start_gateway: StartGateway) -> None:
    gateway = await start_gateway()
    _, body = bodies(bounded_json.MAX_DEPTH - 4)[0]
    answer = await gateway.post(**body)
    assert answer.status_code == 200, answer.text
    trace = await gateway.trace(answer.json()["fusion"])
    assert trace["parameters"]["tools"] == body["tools"]
    response = await gateway.http.post(
        f"/v1/traces/{trace['id']}/feedback", json={"metadata": nested(bounded_json.MAX_DEPTH - 1)}
    )
    assert response.status_code == 200
    assert len((await gateway.http.get("/v1/traces")).json()["data"]) == 1


@pytest.mark.parametrize("depth", [150, 250, 2000])
async def test_a_reply_that_is_too_deep_is_no_answer(
    start_gateway: StartGateway, upstream: FakeUpstream, depth: int
) -> None:
    gateway = await start_gateway()
    deep = b"[" * depth + b"]" * depth
    upstream.models["alpha"].body = completion(tool_calls="DEEP").replace(b'"DEEP"', deep)
    upstream.models["beta"] = Script(status=400, body=b'{"error": {"message": ' + deep + b"}}")
    for model, status in (("alpha", 502), ("beta", 400)):
        response = await gateway.post(model=model, messages=HELLO)
        assert response.status_code == status, response.text
    upstream.models["beta"] = Script("the answer of beta")
    await serves(gateway)


# Rows that cannot be written or read


async def test_a_trace_that_cannot_be_written_is_set_aside_and_counted(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway()
    await serves(gateway)
    change(
        tmp_path,
        "CREATE TRIGGER no BEFORE INSERT ON traces WHEN NEW.model = 'beta' BEGIN SELECT RAISE(ABORT, 'no'); END",
    )
    bad = (await gateway.post(model="beta", messages=HELLO)).json()["fusion"]["trace_id"]
    assert (await gateway.http.get(f"/v1/traces/{bad}")).status_code == 404
    assert bad in (tmp_path / "traces.sqlite3.spool" / SET_ASIDE).read_text()
    assert (await gateway.metrics())["mixfuse_traces_set_aside_total"] == 1
    await serves(gateway)
    assert "1 traces could not be written" in (await gateway.http.get("/readyz")).text


async def test_what_was_set_aside_is_written_once_it_is_put_back(start_gateway: StartGateway, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "traces.sqlite3.spool")
    trace = Trace(created_at=1e9, model="m", mode="best_of", messages=HELLO)
    spool.set_aside(trace.model_dump_json().encode() + b"\n")
    spool.close()
    first = await start_gateway()
    assert (await first.http.get("/v1/traces")).json()["data"] == []
    (tmp_path / "traces.sqlite3.spool" / SET_ASIDE).rename(tmp_path / "traces.sqlite3.spool" / "again.jsonl")
    second = await start_gateway()
    assert [one["id"] for one in (await second.http.get("/v1/traces")).json()["data"]] == [trace.id]


@pytest.mark.parametrize(
    "line", ["", "{}", "no trace", '{"id": "\\ud800"}', "[" * 500, '{"created_at": 1e999}', "\x00"]
)
async def test_a_spool_is_replayed_past_every_poison(start_gateway: StartGateway, tmp_path: Path, line: str) -> None:
    spool = Spool(tmp_path / "traces.sqlite3.spool")
    good = Trace(created_at=1e9, model="m", mode="best_of", messages=HELLO)
    for record in (poisoned().model_dump_json(), line, good.model_dump_json(), poisoned(1).model_dump_json()):
        spool.append(record.encode() + b"\n")
    spool.close()
    gateway = await start_gateway()
    assert [one["id"] for one in (await gateway.http.get("/v1/traces")).json()["data"]] == [good.id]
    await serves(gateway)
    assert (await gateway.metrics())["mixfuse_traces_set_aside_total"] == 3
    assert [path.name for path in (tmp_path / "traces.sqlite3.spool").glob("*.jsonl") if path.stat().st_size] == [
        SET_ASIDE
    ]


@pytest.mark.parametrize("record", ["{", "", "[]", '{"id": 1}', json.dumps(nested(300))])
async def test_a_trace_that_cannot_be_read_is_left_out_and_named(
    start_gateway: StartGateway, tmp_path: Path, record: str, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await start_gateway()
    ids = [(await gateway.post(model="fusion/best-of", messages=HELLO)).json()["fusion"]["trace_id"] for _ in range(3)]
    await gateway.http.post(f"/v1/traces/{ids[0]}/feedback", json={"best": 1})
    change(tmp_path, "UPDATE traces SET record = ? WHERE id = ?", record, ids[1])
    listing = (await gateway.http.get("/v1/traces")).json()
    assert [one["id"] for one in listing["data"]] == [ids[2], ids[0]]
    assert listing["unreadable"] == [ids[1]]
    for response in (
        await gateway.http.get(f"/v1/traces/{ids[1]}"),
        await gateway.http.post(f"/v1/traces/{ids[1]}/feedback", json={"best": 1}),
    ):
        assert (response.status_code, response.json()["error"]["type"]) == (422, "trace_unreadable")
    assert (await gateway.metrics())["mixfuse_traces_unreadable_total"] == 3
    await serves(gateway)
    with opened(tmp_path / "traces.sqlite3") as database:
        for share in (None, 0.5):
            rows, counts = read(database, min_agreement=share)
            assert [row["id"] for row in rows] == [ids[0]]
            assert counts["unreadable"] == 1
    assert ids[1] in caplog.text


async def test_every_id_of_a_trace_is_found_or_not(place: str, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(trace_db=place)
    for name in ("x", "%00", "trace-%00", "%ff", "%ed%a0%80", "%F0%9F%98%80", "a" * 5000, "%2e%2e", "'", "%25"):
        for response in (
            await gateway.http.get(f"/v1/traces/{name}"),
            await gateway.http.post(f"/v1/traces/{name}/feedback", json={}),
        ):
            assert response.status_code == 404, (name, response.text)
    for limit in ("0", "-1", "9" * 30, "1e3", "x", "", "%00"):
        assert (await gateway.http.get(f"/v1/traces?limit={limit}")).status_code in (200, 400)


async def test_readiness_says_that_the_writer_cannot_write(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    await serves(gateway)
    with opened(tmp_path / "traces.sqlite3") as other:
        other.run_now(lambda c: c.execute(sqlalchemy.text("ALTER TABLE traces RENAME TO elsewhere")))
        assert (await gateway.post(model="alpha", messages=HELLO)).status_code == 200
        async with asyncio.timeout(30):
            while (await gateway.http.get("/readyz")).status_code != 503:  # noqa: ASYNC110 - another task's
                await asyncio.sleep(0.01)
        assert "takes no traces" in (await gateway.http.get("/readyz")).text
        other.run_now(lambda c: c.execute(sqlalchemy.text("ALTER TABLE elsewhere RENAME TO traces")))
    async with asyncio.timeout(30):
        while (await gateway.http.get("/readyz")).status_code != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert len((await gateway.http.get("/v1/traces")).json()["data"]) == 2


# Patterns and schemas: work that grows faster than its input


async def stays_awake(gateway: Gateway, work: Any) -> float:
    """Runs `work` while others ask for the gateway's health; returns the longest that one waited, in seconds."""
    task = asyncio.ensure_future(work)
    longest = 0.0
    while not task.done():
        began = time.monotonic()
        assert (await gateway.http.get("/healthz")).status_code == 200
        longest = max(longest, time.monotonic() - began)
    await task
    return longest


@pytest.mark.parametrize("pattern", [r"[\w.]+@[\w.]+", r"(a+)+@", r"(?s)a.*z|a", r"(\w+\s?)+\d@"])
async def test_no_pattern_of_redact_holds_up_others(start_gateway: StartGateway, pattern: str) -> None:
    gateway = await start_gateway(traces={"redact": [pattern]})
    prompt = [{"role": "user", "content": "a" * 60_000 + "!"}]
    answer = await gateway.post(model="alpha", messages=prompt)
    assert answer.status_code == 200
    path = f"/v1/traces/{answer.json()['fusion']['trace_id']}/feedback"
    longest = await stays_awake(
        gateway, gateway.http.post(path, json={"comment": "a" * 5_000_000 + " jane@example.org"})
    )
    assert longest < 5  # of minutes with Python's engine
    feedback = (await gateway.http.get("/v1/traces")).json()["data"][0]["feedback"]
    assert len(feedback) == 1
    assert "@example" not in feedback[0]["comment"] or pattern != r"[\w.]+@[\w.]+"


async def test_redaction_knows_all_alphabets_and_the_keys_of_objects(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(traces={"redact": [r"[\w.]+@[\w.]+", r"\b\d{4}\b"]})
    secrets = ["jürgen@bücher.example", "太郎@例え.テスト", "\u0661\u0662\u0663\u0664"]
    answer = await gateway.post(model="alpha", messages=[{"role": "user", "content": " ".join(secrets)}])
    path = f"/v1/traces/{answer.json()['fusion']['trace_id']}"
    await gateway.http.post(f"{path}/feedback", json={"metadata": {secrets[0]: {"x": [secrets[1]]}}})
    trace = (await gateway.http.get(path)).json()
    assert trace["messages"][0]["content"] == f"[redacted] [redacted] {secrets[2]}"  # \b is ASCII's
    assert trace["feedback"] == [{"metadata": {"[redacted]": {"x": ["[redacted]"]}}}]


@pytest.mark.parametrize("pattern", ["(?=a)b", "(?<!a)b", r"(a)\1", "a++", "(?x)a", "a{5000}", "["])
def test_what_no_linear_engine_can_do_is_refused_by_name(pattern: str) -> None:
    members = [{"name": "a", "base_url": "http://127.0.0.1:1/v1", "model": "m"}]
    with pytest.raises(MixfuseError, match=r"'traces.redact'.*" + re.escape(pattern[:2])):
        validate({"members": members, "traces": {"redact": [pattern]}}, FusionConfig, source="c")


def schema(**keys: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": keys}}


EVIL = r"^(a|a)*$"
DOUBLING = {f"d{level}": {"anyOf": [{"$ref": f"#/$defs/d{level + 1}"}] * 2} for level in range(40)} | {
    "d40": {"type": "number"}
}


@pytest.mark.parametrize(
    ("form", "answer", "status"),
    [
        (schema(type="string", pattern=EVIL), json.dumps("a" * 50 + "!"), 502),
        (schema(type="string", pattern=EVIL), json.dumps("a" * 50), 200),
        (schema(type="object", patternProperties={EVIL: {"type": "number"}}), json.dumps({"a" * 50 + "!": ""}), 200),
        (schema(patternProperties={EVIL: {}}, additionalProperties=False), json.dumps({"a" * 50 + "!": ""}), 502),
        (schema(patternProperties={"^a": {}}, additionalProperties=False), json.dumps({"a" * 50 + "!": ""}), 200),
        (schema(**{"$ref": "#/$defs/d0", "$defs": DOUBLING}), '"x"', 502),
        (schema(type="array", uniqueItems=True), json.dumps([{"a": n} for n in range(20_000)]), 200),
        (schema(type="array", uniqueItems=True), "[1, true, 1.0]", 502),
        (schema(type="array", uniqueItems=True), "[1, true, 0, false]", 200),
        (schema(pattern="(?=a)"), "1", 400),
        (schema(patternProperties={r"(a)\1": {}}), "1", 400),
        (schema(properties={f"p{n}": {"type": "string"} for n in range(9000)}), "{}", 400),
        (schema(unevaluatedProperties=False), "{}", 400),
    ],
)
async def test_no_schema_holds_up_others(
    start_gateway: StartGateway, upstream: FakeUpstream, form: dict[str, Any], answer: str, status: int
) -> None:
    gateway = await start_gateway()
    upstream.models["alpha"].text = answer
    responses: list[httpx.Response] = []

    async def ask() -> None:
        responses.append(await gateway.post(model="alpha", messages=HELLO, response_format=form))

    assert await stays_awake(gateway, ask()) < 5
    assert responses[0].status_code == status, responses[0].text
    await serves(gateway)


@pytest.mark.parametrize(
    ("mode", "answer"),
    [
        ("fusion/best-of", "answer" + " " * 200_000 + "!"),
        ("fusion/merge", "[from " + "1" * 200_000),
        ("fusion/merge", " " * 200_000 + "!"),
        ("fusion/merge", "[from 1, 2 and " * 20_000),
    ],
)
async def test_no_answer_holds_up_others(
    start_gateway: StartGateway, upstream: FakeUpstream, mode: str, answer: str
) -> None:
    gateway = await start_gateway(modes={"agreement": "choice", "cite": True})
    for name in ("alpha", "synth"):
        upstream.models[name].text = answer

    async def ask() -> None:
        assert (await gateway.post(model=mode, messages=HELLO)).status_code == 200

    assert await stays_awake(gateway, ask()) < 5


# The database and the disk


async def needs_the_database(gateway: Gateway) -> list[httpx.Response]:
    """Asks on every path that needs the database, all at once and twice: none waits for the time of another."""
    http = gateway.http
    return await asyncio.gather(
        *(http.get(path) for path in ("/v1/traces", "/v1/traces/trace-1") for _ in range(2)),
        http.post("/v1/traces/trace-1/feedback", json={"best": 1}),
        http.post("/v1/responses", json={"model": "alpha", "input": "why?", "previous_response_id": "resp_1"}),
    )


async def is_503_and_answers_on(gateway: Gateway) -> list[str]:
    """With the database away: paths that need it are 503 in their time, others are answered; returns the traces."""
    ids = []
    for _ in range(3):
        answer = await gateway.post(model="fusion/best-of", messages=HELLO)
        assert answer.status_code == 200
        ids.append(answer.json()["fusion"]["trace_id"])
    began = time.monotonic()
    assert {response.status_code for response in await needs_the_database(gateway)} == {503}
    ready = await gateway.http.get("/readyz")
    assert (ready.status_code, "trace database" in ready.text) == (503, True)
    assert time.monotonic() - began < 10  # of a second each, as the tests set it
    assert (await gateway.post(model="fusion/merge", messages=HELLO)).status_code == 200
    return ids


async def is_back(gateway: Gateway, ids: list[str]) -> None:
    async with asyncio.timeout(60):
        while (await gateway.http.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - another's
            await asyncio.sleep(0.05)
        found: set[str] = set()
        while not found.issuperset(ids):
            listing = await gateway.http.get("/v1/traces")
            found = {one["id"] for one in listing.json()["data"]} if listing.status_code == 200 else set()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixfuse.fusion.store.traces._ANSWER_S", 0.5)
    monkeypatch.setattr("mixfuse.fusion.http.gateway._LEAVE_S", 0.5)
    monkeypatch.setattr("mixfuse.contracts.database._CLOSE_S", 0.5)


@pytest.mark.usefixtures("soon")
async def test_a_locked_database_is_503_and_answering_goes_on(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    await serves(gateway)
    other = sqlite3.connect(tmp_path / "traces.sqlite3", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        ids = await is_503_and_answers_on(gateway)
    finally:
        other.close()
    await is_back(gateway, ids)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("how", ["stopped", "silent"])
async def test_a_database_server_that_is_away_is_503_and_answering_goes_on(
    start_gateway: StartGateway, server: Postgres, how: str
) -> None:
    gateway = await start_gateway(trace_db=emptied(server))
    await serves(gateway)
    leave, come_back = (server.stop, server.start) if how == "stopped" else (server.halt, server.go_on)
    await asyncio.to_thread(leave)
    try:
        ids = await is_503_and_answers_on(gateway)
    finally:
        await asyncio.to_thread(come_back)
    await is_back(gateway, ids)


def test_a_silent_database_server_does_not_hold_up_the_end(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixfuse.contracts.database._CLOSE_S", 0.5)
    database = Database(emptied(server))

    async def ask() -> None:
        await database.run(probe)
        server.halt()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await database.run(probe)
        await asyncio.to_thread(database.close)

    try:
        asyncio.run(asyncio.wait_for(ask(), 30))
    finally:
        server.go_on()
