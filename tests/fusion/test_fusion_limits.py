"""Between a request and its models: retries, hedging, circuit breaker, queue, budgets, and what the ledger says."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import Gateway, StartGateway

from mixfuse.contracts.trace import Call, Usage
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import (
    TEMPLATE_TOKENS,
    UNLIMITED_COMPLETION,
    Budget,
    Ledger,
    Spend,
    most,
    prompt_tokens,
)
from mixfuse.fusion.calls.model_limits import Circuit, Guard
from mixfuse.fusion.calls.upstream import Endpoint, Purpose, call, http_client
from mixfuse.fusion.config import Breaker, ModelConfig, Price, Retry

HELLO: list[Any] = [{"role": "user", "content": "why?"}]
BEST: dict[str, Any] = {"model": "fusion/best-of", "messages": HELLO}
FAST = {"attempts": 3, "backoff_ms": 1}


def member(upstream: FakeUpstream, name: str, **keys: Any) -> dict[str, Any]:
    return {"name": name, "base_url": upstream.base_url, "model": name, **keys}


async def calls(gateway: Gateway, who: str | None = None) -> list[dict[str, Any]]:
    """The attempts of the newest request, all or one member's."""
    (trace,) = (await gateway.http.get("/v1/traces", params={"limit": 1})).json()["data"]
    return [entry for entry in trace["calls"] if who in (None, entry["member"])]


# Retries


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [Script(status=503), Script(status=429), Script(cut=True)])
async def test_a_failure_that_may_pass_is_tried_again_and_each_attempt_entered(
    start_gateway: StartGateway, upstream: FakeUpstream, fault: Script, stream: bool
) -> None:
    upstream.models["alpha"].faults = [fault, fault]
    gateway = await start_gateway([member(upstream, "alpha", retry=FAST)])
    assert (await gateway.post(model="alpha", messages=HELLO, stream=stream)).status_code == 200
    attempts = await calls(gateway)
    assert [entry["outcome"] == "ok" for entry in attempts] == [False, False, True]
    assert [entry["attempt"] for entry in attempts] == [1, 2, 3]
    # What broke off in the middle was worked on and is paid for, by estimate; what was refused was not.
    assert [entry["estimated"] for entry in attempts] == [fault.cut, fault.cut, False]


async def test_attempts_come_to_an_end(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    upstream.models["alpha"] = Script(status=500)
    gateway = await start_gateway([member(upstream, "alpha", retry=FAST)])
    assert (await gateway.post(model="alpha", messages=HELLO)).status_code == 502
    assert len(upstream.requests) == 3


@pytest.mark.parametrize("fault", [Script(status=400), Script(status=401), Script(body=b"{}"), Script(refusal="no")])
async def test_a_failure_that_would_come_again_is_not_repeated(
    start_gateway: StartGateway, upstream: FakeUpstream, fault: Script
) -> None:
    upstream.models["alpha"] = fault
    gateway = await start_gateway([member(upstream, "alpha", retry=FAST)])
    assert (await gateway.post(model="alpha", messages=HELLO)).status_code >= 400
    assert len(upstream.requests) == 1


async def test_nothing_is_repeated_once_the_client_has_text(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    upstream.models["alpha"].break_after = 2
    gateway = await start_gateway([member(upstream, "alpha", retry=FAST)])
    response = await gateway.post(model="alpha", messages=HELLO, stream=True)
    assert "upstream_error" in response.text
    assert len(upstream.requests) == 1


async def test_retry_after_is_waited_for_but_not_past_the_deadline(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    upstream.models["alpha"].faults = [Script(status=429, headers={"retry-after": "3600"})]
    gateway = await start_gateway([member(upstream, "alpha", retry=FAST)])
    response = await gateway.post(model="alpha", messages=HELLO)
    assert (response.status_code, response.headers["retry-after"]) == (429, "3600")
    assert len(upstream.requests) == 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0.05", 0.05),
        (timedelta(hours=1), 3600),
        ("soon", None),
        (timedelta(hours=-1), 0),
    ],
)
async def test_retry_after_is_seconds_or_a_date(
    upstream: FakeUpstream, header: str | timedelta, seconds: float | None
) -> None:
    if isinstance(header, timedelta):
        header = format_datetime(datetime.now(UTC) + header, usegmt=True)
    upstream.models["alpha"] = Script(status=429, headers={"retry-after": header})
    async with http_client() as client:
        with pytest.raises(CallError) as caught:
            await call(
                client, Endpoint(upstream.base_url, "alpha"), HELLO, {}, purpose=Purpose("answer", "a"), ledger=Ledger()
            )
    assert caught.value.retry_after_s == (None if seconds is None else pytest.approx(seconds, abs=60))


def test_the_wait_doubles_up_to_its_limit_and_never_undercuts_the_endpoint() -> None:
    retry = Retry(attempts=9, backoff_ms=100, max_backoff_ms=300)
    guard = Guard("a", ModelConfig(role="base", retry=retry))
    failure = CallError("upstream_error", "", transient=True)
    waits = [guard.wait_before_retry_s(failure, attempts) for attempts in (1, 2, 3, 8)]
    for wait, longest in zip(waits, (0.1, 0.2, 0.3, 0.3), strict=True):
        assert wait is not None
        assert longest / 2 <= wait <= longest
    assert guard.wait_before_retry_s(CallError("rate_limited", "", transient=True, retry_after_s=7), 1) == 7
    assert guard.wait_before_retry_s(failure, 9) is None


async def test_an_upstream_key_never_comes_back_in_an_error(
    start_gateway: StartGateway, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-very-secret")
    upstream.models["alpha"] = Script(status=401, body=b'{"error": {"message": "bad key sk-very-secret"}}')
    gateway = await start_gateway([member(upstream, "alpha", api_key_env="TEST_KEY")])
    response = await gateway.post(model="alpha", messages=HELLO)
    assert "bad key [key]" in response.text
    assert "very-secret" not in response.text + (await gateway.http.get("/v1/traces")).text


# Hedging


@pytest.mark.parametrize("stream", [False, True])
async def test_a_silent_call_is_made_a_second_time_and_the_first_answer_counts(
    start_gateway: StartGateway, upstream: FakeUpstream, stream: bool
) -> None:
    upstream.models["alpha"].faults = [Script(hold=asyncio.Event())]
    gateway = await start_gateway([member(upstream, "alpha", hedge_after_ms=20)])
    assert (await gateway.post(model="alpha", messages=HELLO, stream=stream)).status_code == 200
    await upstream.wait_aborted("alpha")
    outcomes = {entry["outcome"]: entry for entry in await calls(gateway)}
    assert set(outcomes) == {"ok", "cancelled_hedge"}
    assert outcomes["cancelled_hedge"]["estimated"]
    assert outcomes["cancelled_hedge"]["usage"]["prompt_tokens"] > 0


async def test_an_answer_in_time_is_not_hedged(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = await start_gateway([member(upstream, "alpha", hedge_after_ms=60_000)])
    await gateway.post(model="alpha", messages=HELLO)
    assert len(upstream.requests) == 1


async def test_a_stream_that_speaks_is_not_hedged(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    hold = upstream.models["alpha"].hold = asyncio.Event()
    upstream.models["alpha"].hold_after = 1
    gateway = await start_gateway([member(upstream, "alpha", hedge_after_ms=1000)])
    stream = await gateway.client.chat.completions.create(model="alpha", messages=HELLO, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            await asyncio.sleep(1.1)  # the hedge's time comes and goes
            hold.set()
    assert len(upstream.requests) == 1


async def test_both_attempts_of_a_hedge_may_fail(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    hold = asyncio.Event()
    upstream.models["alpha"].faults = [Script(hold=hold, status=500), Script(status=429)]
    gateway = await start_gateway([member(upstream, "alpha", hedge_after_ms=20)])
    asking = asyncio.create_task(gateway.post(model="alpha", messages=HELLO))
    await upstream.wait_asked("alpha", 2)
    hold.set()
    assert (await asking).status_code in (429, 502)
    assert {entry["outcome"] for entry in await calls(gateway)} == {"rate_limited", "upstream_error"}


async def test_a_client_that_leaves_cancels_both_attempts(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    upstream.models["alpha"].hold = asyncio.Event()
    gateway = await start_gateway([member(upstream, "alpha", hedge_after_ms=20)])
    asking = asyncio.create_task(gateway.post(model="alpha", messages=HELLO))
    await upstream.wait_asked("alpha", 2)
    asking.cancel()
    await upstream.wait_aborted("alpha", 2)
    (trace,) = await gateway.first_traces()
    assert [entry["outcome"] for entry in trace["calls"]] == ["cancelled", "cancelled"]


# The circuit breaker


async def test_a_member_that_keeps_failing_is_left_alone(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    upstream.models["alpha"] = Script(status=500)
    gateway = await start_gateway([member(upstream, "alpha", breaker={"failures": 2}), "beta", "gamma"])
    for _ in range(3):
        assert (await gateway.post(**BEST)).status_code == 200
    assert [entry["outcome"] for entry in await calls(gateway, "alpha")] == ["circuit_open"]
    assert len(upstream.asked("alpha")) == 2


async def test_a_member_left_alone_is_tried_again_later(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    upstream.models["alpha"].faults = [Script(status=500)]
    breaker = {"failures": 1, "cooldown_ms": 1}
    gateway = await start_gateway([member(upstream, "alpha", breaker=breaker), "beta", "gamma"])
    await gateway.post(**BEST)
    assert [entry["outcome"] for entry in await calls(gateway, "alpha")] == ["upstream_error"]
    await gateway.post(**BEST)
    assert [entry["outcome"] for entry in await calls(gateway, "alpha")] == ["ok"]


def guard(**keys: Any) -> tuple[Guard, list[float]]:
    now = [0.0]
    return Guard("a", ModelConfig(role="base", **keys), clock=lambda: now[0]), now


def test_one_call_at_a_time_finds_out_whether_a_model_is_well() -> None:
    breaker, now = guard(breaker=Breaker(failures=1, cooldown_ms=1000))
    breaker.admit()
    breaker.report("timeout")
    assert breaker.circuit is Circuit.OPEN
    with pytest.raises(CallError, match="calls to it resume in") as caught:
        breaker.admit()
    assert caught.value.kind == "circuit_open"
    assert caught.value.retry_after_s == pytest.approx(1.0)
    now[0] = 1.0
    assert breaker.circuit is Circuit.HALF_OPEN
    breaker.admit()
    with pytest.raises(CallError) as caught:
        breaker.admit()  # the probe call has not ended
    assert caught.value.kind == "circuit_open"
    breaker.report("cancelled")  # it learned nothing
    breaker.admit()
    breaker.report("upstream_error")
    assert breaker.circuit is Circuit.OPEN
    now[0] = 2.0
    breaker.admit()
    breaker.report(None)
    assert breaker.circuit is Circuit.CLOSED


@pytest.mark.parametrize("kind", ["rate_limited", "context_length", "refused", "cancelled_straggler", "queue_full"])
def test_what_says_nothing_of_a_models_health_opens_nothing(kind: str) -> None:
    breaker, _ = guard(breaker=Breaker(failures=1))
    breaker.admit()
    breaker.report(kind)
    assert breaker.circuit is Circuit.CLOSED


# The queue


async def test_calls_beyond_the_limit_wait_and_beyond_the_queue_are_429(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    hold = upstream.models["alpha"].hold = asyncio.Event()
    gateway = await start_gateway([member(upstream, "alpha", max_concurrency=1, max_queue=1)])
    first = asyncio.create_task(gateway.post(model="alpha", messages=HELLO))
    await upstream.wait_asked("alpha")
    second = asyncio.create_task(gateway.post(model="alpha", messages=HELLO))
    await gateway.until_metric('mixfuse_queue_depth{member="alpha"}', 1)
    third = await gateway.post(model="alpha", messages=HELLO)
    assert (third.status_code, third.json()["error"]["type"]) == (429, "queue_full")
    assert int(third.headers["retry-after"]) >= 1
    assert len(upstream.requests) == 1
    hold.set()
    assert [(await one).status_code for one in (first, second)] == [200, 200]


async def test_a_place_in_the_queue_is_given_up_by_who_leaves() -> None:
    places, _ = guard(max_concurrency=1)
    assert places.enter()
    assert not places.enter()
    leaving, staying = (asyncio.create_task(places.wait()) for _ in range(2))
    await asyncio.sleep(0)
    assert places.queued == 2
    leaving.cancel()
    await asyncio.sleep(0)
    places.leave()
    await staying
    assert (places.queued, places.under_way) == (0, 1)
    last = asyncio.create_task(places.wait())
    await asyncio.sleep(0)
    places.leave()  # hands the place on in the same moment in which its taker is cancelled
    last.cancel()
    with pytest.raises(asyncio.CancelledError):
        await last
    assert places.under_way == 0


async def test_a_queued_straggler_costs_nothing(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    upstream.models["alpha"].hold = asyncio.Event()
    gateway = await start_gateway(
        [member(upstream, "alpha", max_concurrency=1), "beta", "gamma"],
        modes={"min_responses": 2, "grace_ms": 20},
    )
    blocking = asyncio.create_task(gateway.post(model="alpha", messages=HELLO))
    await upstream.wait_asked("alpha")
    assert (await gateway.post(**BEST)).status_code == 200
    (entry,) = await calls(gateway, "alpha")
    assert (entry["outcome"], entry["usage"]["prompt_tokens"]) == ("cancelled_straggler", 0)
    upstream.models["alpha"].hold.set()
    await blocking


# Budgets

PRICE = {"prompt": 0.0, "completion": 1000.0}  # a thousandth of a dollar a token


async def test_a_request_beyond_its_budget_is_refused_before_anything_is_sent(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    members = [member(upstream, name, price=PRICE) for name in ("alpha", "beta")]
    gateway = await start_gateway(members, modes={"max_cost": 0.019})
    response = await gateway.post(**BEST, max_tokens=10)  # 2 x 10 tokens might cost $0.02
    assert (response.status_code, response.json()["error"]["type"]) == (402, "budget")
    assert upstream.requests == []
    assert (await gateway.post(**BEST, max_tokens=9)).status_code == 200


async def test_a_judge_beyond_the_budget_is_done_without(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    members = [member(upstream, name, price=PRICE) for name in ("alpha", "beta")]
    judge = {"base_url": upstream.base_url, "model": "judge", "price": PRICE}
    gateway = await start_gateway(members, judge=judge, modes={"max_cost": 0.0105})
    assert (await gateway.post(**BEST, max_tokens=5)).status_code == 200  # 2 x 5 tokens; a verdict is one more
    (trace,) = (await gateway.http.get("/v1/traces")).json()["data"]
    assert trace["reason"] == "judge_failed"
    assert "budget" in {entry["outcome"] for entry in trace["calls"]}
    assert sum(entry["cost"] for entry in trace["calls"]) <= 0.0105


def test_a_reservation_counts_until_it_is_settled() -> None:
    budget = Budget("b", max_cost=1.0, max_tokens=100)
    one, other = Ledger(budgets=[budget]), Ledger(budgets=[budget])
    one.reserve(Spend(0.6, 60))
    with pytest.raises(CallError, match=r"b: \$0.6 of \$1"):
        other.reserve(Spend(0.6, 10))
    with pytest.raises(CallError, match="60 of 100 tokens taken"):
        other.reserve(Spend(0.1, 50))
    one.open(Spend(0.6, 60))  # what was reserved is not reserved twice
    used = Usage(prompt_tokens=5, completion_tokens=5)
    one.enter(Call(stage="answer", member="a", model="m", usage=used, cost=0.1), Spend(0.6, 60))
    assert not other.affords(Spend(0.6, 10))
    one.settle()
    one.settle()
    assert budget.used == pytest.approx(Spend(0.1, 10))
    other.reserve(Spend(0.6, 10))


def test_what_costs_more_than_was_reserved_is_counted_too() -> None:
    budget = Budget("b", max_cost=1.0)
    ledger = Ledger(budgets=[budget])
    ledger.open(Spend(0.5))
    ledger.enter(Call(stage="answer", member="a", model="m", cost=2.0), Spend(0.5))
    ledger.settle()
    assert budget.used.cost == 2.0
    assert not ledger.affords(Spend(0.01))


def test_the_most_a_call_may_cost_is_its_prompt_and_the_longest_answer() -> None:
    price = Price(prompt=1e6, completion=2e6)
    prompt = most(HELLO, {"max_tokens": 7}, price).tokens - 7
    assert len("why?") < prompt <= len("why?") + 2 * TEMPLATE_TOKENS
    assert most(HELLO, {"max_tokens": 7}, price) == Spend(prompt + 14, prompt + 7)
    assert most(HELLO, {"max_completion_tokens": 3, "max_tokens": 7}, price) == Spend(prompt + 6, prompt + 3)
    assert most(HELLO, {}, price).tokens == prompt + UNLIMITED_COMPLETION
    image = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "data:" + "x" * 10**6}}]
    assert 1000 < prompt_tokens([{"role": "user", "content": image}]) < 2000


def test_the_deadline_is_counted_from_the_beginning() -> None:
    ledger = Ledger(deadline_ms=1000)
    time.sleep(0.01)
    assert 0 < ledger.time_left_s() < 0.995
    assert Ledger().time_left_s() == float("inf")
