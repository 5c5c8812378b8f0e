"""Running a gateway: API keys and their budgets, readiness, metrics, spans."""

import asyncio
import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import openai
import pytest
from fake_upstream import FakeUpstream, Script, serving
from fusion_harness import Gateway, StartGateway
from pydantic import ValidationError

from mixfuse.cli.entry import main
from mixfuse.contracts.database import opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.calls.ledger import Spend
from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.http.gateway import create_app
from mixfuse.fusion.http.key_limits import KeyBudget
from mixfuse.fusion.http.keys import KeyRing, create, revoke
from mixfuse.fusion.store.traces import Spent

HELLO: list[Any] = [{"role": "user", "content": "why?"}]
BEST: dict[str, Any] = {"model": "fusion/best-of", "messages": HELLO}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "traces.sqlite3"


def key(place: Path, name: str = "jane", **limits: Any) -> str:
    with opened(place) as database:
        return create(database, name, **limits)[1]


def use(gateway: Gateway, secret: str) -> None:
    gateway.http.headers["authorization"] = f"Bearer {secret}"


# API keys


async def test_a_gateway_with_keys_wants_one_everywhere(start_gateway: StartGateway, place: Path) -> None:
    secret = key(place)
    gateway = await start_gateway()
    wrong = ["", "Bearer", "Bearer mf-wrong", f"Basic {secret}", f"Bearer {secret}x"]
    for authorization in wrong:
        gateway.http.headers["authorization"] = authorization
        for response in (
            await gateway.post(**BEST),
            await gateway.post(not_even="valid"),
            await gateway.http.get("/v1/models"),
            await gateway.http.get("/v1/traces"),
            await gateway.http.get("/v1/traces/trace-1"),
            await gateway.http.post("/v1/traces/trace-1/feedback", json={}),
        ):
            assert (response.status_code, response.json()["error"]["type"]) == (401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
    use(gateway, secret)
    assert (await gateway.post(**BEST)).status_code == 200
    assert (await gateway.http.get("/healthz")).status_code == 200
    with pytest.raises(openai.AuthenticationError, match="API key"):
        await gateway.client.chat.completions.create(model="alpha", messages=HELLO)


async def test_the_secret_is_nowhere_but_with_its_owner(start_gateway: StartGateway, place: Path) -> None:
    secret = key(place)
    gateway = await start_gateway()
    use(gateway, secret)
    assert (await gateway.post(**BEST)).status_code == 200
    (trace,) = await gateway.first_traces()
    assert trace["key"].startswith("key-")
    for path in place.parent.rglob("*"):
        assert path.is_dir() or secret.removeprefix("mf-").encode() not in path.read_bytes()


async def test_whoever_has_a_key_sees_their_own_traces(
    start_gateway: StartGateway, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXFUSE_ADMIN_KEY", "admin")
    jane, joe = key(place, "jane"), key(place, "joe")
    gateway = await start_gateway()
    use(gateway, jane)
    fusion = (await gateway.post(**BEST)).json()["fusion"]
    path = f"/v1/traces/{fusion['trace_id']}"
    assert (await gateway.http.get(path)).status_code == 200
    use(gateway, joe)
    assert (await gateway.http.get(path)).status_code == 404
    assert (await gateway.http.post(f"{path}/feedback", json={"score": 1})).status_code == 404
    assert (await gateway.http.get("/v1/traces")).json()["data"] == []
    use(gateway, "admin")
    assert len((await gateway.http.get("/v1/traces")).json()["data"]) == 1


async def test_a_keys_rate_is_kept(start_gateway: StartGateway, place: Path) -> None:
    secret = key(place, per_minute=2)
    gateway = await start_gateway()
    use(gateway, secret)
    assert [(await gateway.post(**BEST)).status_code for _ in range(2)] == [200, 200]
    response = await gateway.post(**BEST)
    assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limited")
    assert 1 <= int(response.headers["retry-after"]) <= 30


async def test_a_key_ends_after_its_last_day(
    start_gateway: StartGateway, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    today = datetime.now(UTC).date()
    secret = key(place, "jane", last_day=today)
    gateway = await start_gateway()
    use(gateway, secret)
    assert (await gateway.post(**BEST)).status_code == 200
    tomorrow = time.time() + 86_400
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda: tomorrow)
        response = await gateway.post(**BEST)
        assert (response.status_code, response.json()["error"]["type"]) == (401, "unauthorized")
        assert "has expired" in response.json()["error"]["message"]
        main(["keys", "list", "--db", str(place)])
        assert "expired" in capsys.readouterr().out
        key(place, "jane")  # the name is free again
    with pytest.raises(MixfuseError, match="is over"):
        key(place, "joe", last_day=today - timedelta(days=1))
    with pytest.raises(SystemExit) as ended:
        main(["keys", "add", "joe", "--until", "soon", "--db", str(place)])
    assert ended.value.code == 2


async def test_a_keys_budget_is_kept_over_requests_and_restarts(
    start_gateway: StartGateway, upstream: FakeUpstream, place: Path
) -> None:
    secret = key(place, max_tokens=20, period="total")
    one = await start_gateway()
    use(one, secret)
    assert (await one.post(model="alpha", messages=HELLO, max_tokens=5)).json()["usage"]["total_tokens"] == 15
    response = await one.post(model="alpha", messages=HELLO, max_tokens=5)
    assert (response.status_code, response.json()["error"]["type"]) == (402, "budget")
    assert "15 of 20 tokens" in response.json()["error"]["message"]
    await one.http.get("/v1/traces")  # it is in the database once it was read
    other = await start_gateway()
    use(other, secret)
    assert (await other.post(model="alpha", messages=HELLO, max_tokens=5)).status_code == 402


async def test_requests_at_once_cannot_overdraw_a_budget(
    start_gateway: StartGateway, upstream: FakeUpstream, place: Path
) -> None:
    secret = key(place, max_tokens=100)
    gateway = await start_gateway()
    use(gateway, secret)
    hold = upstream.models["alpha"].hold = asyncio.Event()
    first = asyncio.create_task(gateway.post(model="alpha", messages=HELLO, max_tokens=60))
    await upstream.wait_asked("alpha")
    assert (await gateway.post(model="alpha", messages=HELLO, max_tokens=60)).status_code == 402
    hold.set()
    assert (await first).status_code == 200  # and used 15 of the 61
    assert (await gateway.post(model="alpha", messages=HELLO, max_tokens=60)).status_code == 200


async def test_failed_and_refused_requests_leave_the_budget_as_it_was(
    start_gateway: StartGateway, upstream: FakeUpstream, place: Path
) -> None:
    secret = key(place, max_tokens=100)
    gateway = await start_gateway()
    use(gateway, secret)
    upstream.models["alpha"].faults = [Script(status=500)] * 4
    for _ in range(4):
        assert (await gateway.post(model="alpha", messages=HELLO, max_tokens=60)).status_code == 502
    assert (await gateway.post(model="alpha", messages=HELLO, max_tokens=60)).status_code == 200


async def test_what_other_gateways_spend_arrives(place: Path) -> None:
    with opened(place) as database:
        made, _ = create(database, "jane", max_cost=1.0, period="total")
        ring = KeyRing(database, "auto")
        budget = ring.admit(made)
        assert isinstance(budget, KeyBudget)
        budget.add(Spend(0.2, 2))  # spent here, not in the database yet
        budget.rebase(Spend(0.5, 5))  # what others spent, as the database says
        assert budget.used == pytest.approx(Spend(0.7, 7))
        ring.committed(Spent(made.id, "2026-01-01", Spend(0.2, 2)))
        assert budget.used == pytest.approx(Spend(0.7, 7))
        budget.rebase(Spend(0.7, 7))  # which now includes our own
        assert budget.used == pytest.approx(Spend(0.7, 7))


def test_bad_keys_are_refused_in_one_line(place: Path) -> None:
    with opened(place) as database:
        for limits in ({"max_cost": 0}, {"max_tokens": -1}, {"per_minute": 0}):
            with pytest.raises(MixfuseError, match="must be more than 0"):
                create(database, "jane", **limits)  # type: ignore[arg-type]
        with pytest.raises(MixfuseError, match="needs a name"):
            create(database, " ")
        create(database, "jane")
        with pytest.raises(MixfuseError, match="already"):
            create(database, "jane")
        revoke(database, "jane")
        create(database, "jane")
        with pytest.raises(MixfuseError, match="no valid key 'joe'"):
            revoke(database, "joe")


def test_revoking_the_last_key_does_not_open_the_gateway(place: Path) -> None:
    key(place)
    with opened(place) as database:
        revoke(database, "jane")
        assert KeyRing(database, "auto").needed
        assert not KeyRing(database, "off").needed
        assert KeyRing(database, "off").identify(None) is None


# Readiness


async def test_ready_while_enough_members_are_well(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    members = [
        {"name": name, "base_url": upstream.base_url, "model": name, "breaker": {"failures": 1}}
        for name in ("alpha", "beta")
    ]
    gateway = await start_gateway(members, modes={"min_responses": 2})
    assert (await gateway.http.get("/readyz")).json() == {"status": "ok", "problems": []}
    upstream.models["alpha"] = Script(status=500)
    await gateway.post(model="alpha", messages=HELLO)
    response = await gateway.http.get("/readyz")
    assert response.status_code == 503
    assert "give 1 answers" in response.json()["problems"][0]
    assert (await gateway.http.get("/healthz")).json() == {"status": "ok"}


async def test_not_ready_while_the_database_cannot_be_written(
    start_gateway: StartGateway, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixfuse.fusion.http.gateway._LEAVE_S", 0.2)
    gateway = await start_gateway()
    other = sqlite3.connect(place, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # somebody holds it
    response = await gateway.http.get("/readyz")
    other.execute("ROLLBACK")
    other.close()
    assert response.status_code == 503
    assert "trace database" in response.json()["problems"][0]
    monkeypatch.setattr("mixfuse.fusion.http.gateway._LEAVE_S", 30)
    assert (await gateway.http.get("/readyz")).status_code == 200


async def test_not_ready_while_the_engine_is_not_well(config: Callable[..., FusionConfig]) -> None:
    well = [True]
    async with serving(create_app(config(), None, checks={"engine": lambda: well[0]})) as url:
        gateway = Gateway(url)
        assert (await gateway.http.get("/readyz")).status_code == 200
        well[0] = False
        response = await gateway.http.get("/readyz")
        assert (response.status_code, response.json()["problems"]) == (503, ["engine does not work"])
        await gateway.close()


# Metrics


async def test_metrics_are_the_traces_added_up(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    def priced(name: str) -> dict[str, Any]:
        price = {"prompt": 1.0, "completion": 1.0}
        return {"name": name, "base_url": upstream.base_url, "model": name, "price": price}

    gateway = await start_gateway([priced("alpha"), priced("beta"), priced("gamma")])
    upstream.models["gamma"].faults = [None, Script(status=500)]
    upstream.models["beta"].usage = None
    for _ in range(2):
        assert (await gateway.post(**BEST)).status_code == 200
    assert (await gateway.post(model="gamma", messages=HELLO, n=2)).status_code == 400
    found = await gateway.metrics()
    assert found['mixfuse_requests_total{mode="best_of",outcome="ok"}'] == 2
    assert found['mixfuse_request_seconds_count{mode="best_of"}'] == 2
    assert found['mixfuse_calls_total{member="gamma",outcome="ok",stage="answer"}'] == 1
    assert found['mixfuse_calls_total{member="gamma",outcome="upstream_error",stage="answer"}'] == 1
    assert found['mixfuse_tokens_total{estimated="false",kind="prompt",member="alpha"}'] == 20
    assert found['mixfuse_tokens_total{estimated="true",kind="completion",member="beta"}'] > 0
    assert found['mixfuse_cost_dollars_total{member="alpha"}'] == pytest.approx(30e-6)
    assert found['mixfuse_circuit_state{member="alpha"}'] == 0
    assert found['mixfuse_calls_under_way{member="alpha"}'] == 0
    assert found['mixfuse_refused_requests_total{type="invalid_request_error"}'] == 1
    await gateway.until_metric("mixfuse_trace_backlog", 0)


# Spans


class _Collector(BaseHTTPRequestHandler):
    """An OTLP/HTTP collector that keeps what it is sent."""

    received: list[bytes]

    def do_POST(self) -> None:
        self.received.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_arguments: object) -> None: ...


async def test_spans_tell_the_request_and_its_calls(
    config: Callable[..., FusionConfig], upstream: FakeUpstream
) -> None:
    proto = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    received: list[bytes] = []
    collector = ThreadingHTTPServer(("127.0.0.1", 0), type("Collector", (_Collector,), {"received": received}))
    thread = Thread(target=collector.serve_forever)
    thread.start()
    upstream.models["gamma"] = Script(status=500)
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    try:
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        async with serving(create_app(config(otel={"endpoint": endpoint}), None)) as url:
            gateway = Gateway(url)
            gateway.http.headers["traceparent"] = traceparent
            assert (await gateway.post(**BEST)).status_code == 200
            await gateway.close()
    finally:
        await asyncio.to_thread(collector.shutdown)
        collector.server_close()
        thread.join()
    spans = [
        span
        for body in received
        for resource in proto.ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    (root,) = [span for span in spans if span.name == "fusion best_of"]
    below = [span for span in spans if span.parent_span_id == root.span_id]
    assert len(spans) == 1 + len(below)
    assert {span.trace_id.hex() for span in spans} == {"0af7651916cd43dd8448eb211c80319c"}
    assert root.parent_span_id.hex() == "b7ad6b7169203331"
    names = [span.name for span in below]
    assert names.count("verdict judge") == 2
    assert {"answer alpha", "answer beta", "answer gamma"} <= set(names)
    assert {span.name for span in below if span.status.code == 2} == {"answer gamma"}
    for span in below:
        assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= root.end_time_unix_nano
    attributes = {one.key: one.value for one in root.attributes}
    assert attributes["gen_ai.usage.input_tokens"].int_value == 40  # two answers and two verdicts, 10 each
    assert b"the answer of" not in b"".join(received)


async def test_a_budget_in_dollars_that_limits_nothing_is_told(
    start_gateway: StartGateway, place: Path, caplog: pytest.LogCaptureFixture, upstream: FakeUpstream
) -> None:
    key(place, max_cost=1.0)
    priced = {"name": "alpha", "base_url": upstream.base_url, "model": "alpha", "price": {"completion": 1.0}}
    for members, told in ((None, True), ([priced], False)):
        caplog.clear()
        gateway = await start_gateway(members)
        assert ("limits nothing" in caplog.text) == told
        ready = (await gateway.http.get("/readyz")).json()
        assert ready["status"] == "ok"
        assert any("no model has a price" in problem for problem in ready["problems"]) == told


async def test_what_is_free_to_budgets_is_told(
    start_gateway: StartGateway, place: Path, caplog: pytest.LogCaptureFixture, upstream: FakeUpstream
) -> None:
    model = {"base_url": upstream.base_url, "model": "alpha"}
    members = [{"name": "alpha", "price": {"completion": 1.0}, **model}, {"name": "free", **model}]
    for budget, told in ((None, False), (1.0, True)):
        key(place, name=f"with {budget}", max_cost=budget)
        caplog.clear()
        await start_gateway(members)
        free = "free, the judge, the synthesizer have no `price`: what has no price is free to them"
        assert (free in caplog.text) == told


@pytest.mark.parametrize("keys", [{"modes": {"max_cost": 1}}, {"presets": {"cheap": {"max_cost": 0.1}}}])
def test_a_configs_limit_in_dollars_needs_prices(config: Callable[..., FusionConfig], keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="limits nothing, since no model has a 'price'"):
        config(**keys)


def test_keys_add_refuses_a_budget_that_the_config_gives_no_price_to(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fusion.yaml"
    words = ["keys", "add", "jane", "--db", str(place), "--config", str(path)]
    model = "{name: a, base_url: 'http://127.0.0.1:9/v1', model: a%s}"
    path.write_text(f"members: [{model % ''}]\n")
    assert main([*words, "--budget", "5"]) == 2
    assert "has a `price`" in capsys.readouterr().err
    assert main(words) == 2
    path.write_text(f"members: [{model % ', price: {prompt: 1}'}]\n")
    assert main([*words, "--budget", "5"]) == 0
    assert "note" not in capsys.readouterr().err
    path.write_text(f"members: [{model % ', price: {prompt: 1}'}, {(model % '').replace('name: a', 'name: b')}]\n")
    words[2] = "joan"
    assert main([*words, "--budget", "5"]) == 0
    assert f"note: b has no `price` in {path}; what has no price is free to the budget" in capsys.readouterr().err
