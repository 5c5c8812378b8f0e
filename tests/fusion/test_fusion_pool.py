"""The pool: one call's outcome, and many calls with quorum, grace, deadline and real cancellation."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import Gateway, StartGateway

from mixfuse.contracts.trace import Usage
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import Ledger
from mixfuse.fusion.calls.pool import HttpRoles, Pool, fan_out
from mixfuse.fusion.calls.responses import first_token_logprobs
from mixfuse.fusion.calls.upstream import Client, Endpoint, Purpose, Reply, call, http_client
from mixfuse.fusion.config import FusionConfig, Price

HELLO = [{"role": "user", "content": "hello you"}]
BEST_OF: dict[str, Any] = {"model": "fusion/best-of", "messages": HELLO}


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with http_client() as client:
        yield client


async def ask(client: Client, upstream: FakeUpstream, *, ledger: Ledger, stream: bool = False, **purpose: Any) -> Reply:
    async def swallow(_text: str) -> None: ...

    return await call(
        client,
        Endpoint(upstream.base_url, "alpha", "key", "r1"),
        HELLO,
        {"temperature": 0.3},
        purpose=Purpose("answer", "member", 0, **purpose),
        ledger=ledger,
        emit=swallow if stream else None,
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_is_entered_with_tokens_cost_and_revision(
    client: Client, upstream: FakeUpstream, stream: bool
) -> None:
    ledger = Ledger()
    price = Price(prompt=1, completion=2)
    reply = await ask(client, upstream, ledger=ledger, stream=stream, price=price)
    assert reply.text == "the answer of alpha"
    (entry,) = ledger.calls
    assert entry == reply.call
    assert (entry.member, entry.model, entry.revision, entry.candidate) == ("member", "alpha", "r1", 0)
    assert (entry.outcome, entry.text, entry.estimated) == ("ok", "the answer of alpha", False)
    assert entry.usage == Usage(prompt_tokens=10, completion_tokens=5)
    assert entry.cost == pytest.approx(20e-6)
    assert upstream.headers[0]["authorization"] == "Bearer key"
    assert upstream.requests[0]["temperature"] == 0.3


@pytest.mark.parametrize("stream", [False, True])
async def test_missing_usage_is_estimated_and_marked(client: Client, upstream: FakeUpstream, stream: bool) -> None:
    upstream.models["alpha"].usage = None
    ledger = Ledger()
    await ask(client, upstream, ledger=ledger, stream=stream)
    assert ledger.calls[0].estimated
    assert ledger.calls[0].usage == Usage(prompt_tokens=3, completion_tokens=5)  # 9 and 19 characters


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_not_followed(client: Client, upstream: FakeUpstream, status: int) -> None:
    location = {"location": f"{upstream.base_url}/chat/completions"}
    upstream.models["alpha"] = Script(status=status, headers=location)
    with pytest.raises(CallError, match=f"HTTP {status}"):
        await ask(client, upstream, ledger=Ledger())
    assert len(upstream.requests) == 1, "the key and the prompt went on to where the redirect points"


TOO_LONG = json.dumps({"error": {"message": "This model's maximum context length is 2048 tokens"}}).encode()
FAILURES = [
    (Script(status=500), "upstream_error"),
    (Script(status=401), "upstream_error"),
    (Script(status=400), "bad_request"),
    (Script(status=400, body=TOO_LONG), "context_length"),
    (Script(status=429), "rate_limited"),
    (Script(status=502, body=b"<html>"), "upstream_error"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("script", "kind"), FAILURES)
async def test_a_failure_has_a_type_and_an_entry(
    client: Client, upstream: FakeUpstream, script: Script, kind: str, stream: bool
) -> None:
    upstream.models["alpha"] = script
    ledger = Ledger()
    with pytest.raises(CallError) as caught:
        await ask(client, upstream, ledger=ledger, stream=stream)
    assert caught.value.kind == kind
    assert [(entry.outcome, entry.usage) for entry in ledger.calls] == [(kind, Usage())]
    assert ledger.calls[0].error == str(caught.value)


@pytest.mark.parametrize(
    "body", [b"not json", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}']
)
async def test_a_malformed_answer_is_invalid(client: Client, upstream: FakeUpstream, body: bytes) -> None:
    upstream.models["alpha"].body = body
    with pytest.raises(CallError) as caught:
        await ask(client, upstream, ledger=Ledger())
    assert caught.value.kind == "invalid_response"


@pytest.mark.parametrize("body", [b"", b"<html>busy</html>", b'{"choices": []}'])
async def test_what_is_no_event_stream_is_invalid(client: Client, upstream: FakeUpstream, body: bytes) -> None:
    upstream.models["alpha"].body = body
    with pytest.raises(CallError) as caught:
        await ask(client, upstream, ledger=Ledger(), stream=True)
    assert caught.value.kind == "invalid_response"


async def test_a_stream_that_breaks_off_is_an_error_with_what_came(client: Client, upstream: FakeUpstream) -> None:
    upstream.models["alpha"].break_after = 2
    ledger = Ledger()
    with pytest.raises(CallError) as caught:
        await ask(client, upstream, ledger=ledger, stream=True)
    assert caught.value.kind == "upstream_error"
    assert ledger.calls[0].text == "the answer "
    assert ledger.calls[0].estimated


async def test_line_separators_in_streamed_text_stay_text(client: Client, upstream: FakeUpstream) -> None:
    upstream.models["alpha"].text = "one\u2028two\x85three\u2029four"
    reply = await ask(client, upstream, ledger=Ledger(), stream=True)
    assert reply.text == "one\u2028two\x85three\u2029four"


async def test_nobody_listening_is_unreachable(client: Client, upstream: FakeUpstream) -> None:
    upstream.base_url = "http://127.0.0.1:9/v1"
    ledger = Ledger()
    with pytest.raises(CallError) as caught:
        await ask(client, upstream, ledger=ledger)
    assert caught.value.kind == "unreachable"
    assert ledger.calls[0].outcome == "unreachable"


async def test_a_call_past_its_limit_is_cancelled_upstream(client: Client, upstream: FakeUpstream) -> None:
    upstream.models["alpha"].hold = asyncio.Event()
    ledger = Ledger()
    with pytest.raises(CallError) as caught:
        await ask(client, upstream, ledger=ledger, timeout_s=0.2)
    assert caught.value.kind == "timeout"
    await upstream.wait_aborted("alpha")
    assert ledger.calls[0].outcome == "timeout"
    assert ledger.calls[0].estimated


async def test_a_role_nobody_serves_is_unreachable_and_entered(config: Callable[..., FusionConfig]) -> None:
    member = config([{"name": "d", "role": "domain"}]).members[0]
    ledger = Ledger()
    async with Pool(None) as pool:
        with pytest.raises(CallError) as caught:
            await pool.ask(member, HELLO, {}, purpose=Purpose.of(member, "answer", "d"), ledger=ledger)
    assert caught.value.kind == "unreachable"
    assert [(entry.member, entry.model, entry.outcome) for entry in ledger.calls] == [("d", "domain", "unreachable")]


async def test_a_running_gateway_stands_in_for_a_role_table(gateway: Gateway) -> None:
    roles = HttpRoles(f"{gateway.url}/v1")
    async with roles.lease("beta") as endpoint, http_client() as client:
        reply = await call(client, endpoint, HELLO, {}, purpose=Purpose("answer", "beta"), ledger=Ledger())
    assert reply.text == "the answer of beta"


async def test_defaults_and_system_of_a_member(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    member = {"name": "a", "base_url": upstream.base_url, "model": "alpha"}
    gateway = await start_gateway([{**member, "temperature": 0.1, "max_tokens": 9, "system": "Be brief."}])
    await gateway.post(model="a", messages=HELLO)
    await gateway.post(
        model="a",
        messages=[{"role": "developer", "content": "In French."}, *HELLO],
        temperature=0.9,
        max_completion_tokens=3,
    )
    first, second = upstream.requests
    assert (first["temperature"], first["max_tokens"]) == (0.1, 9)
    assert first["messages"] == [{"role": "system", "content": "Be brief."}, *HELLO]
    assert (second["temperature"], second["max_completion_tokens"]) == (0.9, 3)
    assert "max_tokens" not in second
    assert second["messages"][0] == {"role": "system", "content": "Be brief.\n\nIn French."}


def test_alike_tokens_are_added_up() -> None:
    top = [{"token": "A", "logprob": -1.0}, {"token": "B", "logprob": -2.0}, {"token": "A", "logprob": -1.0}]
    found = first_token_logprobs({"content": [{"token": "A", "logprob": -1.0, "top_logprobs": top}]})
    assert found == {"A": pytest.approx(-1.0 + 0.6931, abs=1e-4), "B": -2.0}
    for malformed in (None, {}, {"content": []}, {"content": None}, {"content": [{}]}):
        assert first_token_logprobs(malformed) == {}


# Fan-out, without HTTP


async def answer(value: str) -> str:
    return value


async def fail() -> str:
    raise CallError("upstream_error", "no")


async def never(ended: list[str]) -> str:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError as stop:
        ended.append(stop.args[0])
        raise
    return ""


def kinds(results: list[Any]) -> list[str]:
    return [result.kind if isinstance(result, CallError) else result for result in results]


async def test_fan_out_waits_for_all_where_no_grace_is_set() -> None:
    assert kinds(await fan_out([answer("a"), fail(), answer("b")], quorum=1)) == ["a", "upstream_error", "b"]


async def test_fan_out_cancels_stragglers_after_the_grace() -> None:
    ended: list[str] = []
    results = await fan_out([never(ended), answer("a")], quorum=1, grace_s=0.01)
    assert kinds(results) == ["cancelled_straggler", "a"]
    assert ended == ["cancelled_straggler"]


async def test_fan_out_cancels_at_the_deadline_without_a_quorum() -> None:
    ended: list[str] = []
    results = await fan_out([never(ended), answer("a")], quorum=2, grace_s=60, deadline_s=0.01)
    assert kinds(results) == ["timeout", "a"]
    assert ended == ["timeout"]


async def test_fan_out_gives_up_once_the_quorum_is_out_of_reach() -> None:
    ended: list[str] = []
    results = await fan_out([never(ended), fail()], quorum=2)
    assert kinds(results) == ["cancelled_straggler", "upstream_error"]


async def test_fan_out_cancelled_from_outside_cancels_all() -> None:
    ended: list[str] = []
    outer = asyncio.create_task(fan_out([never(ended), never(ended)], quorum=1))
    await asyncio.sleep(0.01)
    outer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await outer
    assert ended == ["cancelled", "cancelled"]


async def test_fan_out_does_not_hide_bugs() -> None:
    async def bug() -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fan_out([bug(), answer("a")], quorum=1)


# Fan-out, as a client sees it


async def test_a_hanging_member_is_left_behind_and_its_connection_closed(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    upstream.models["alpha"].hold = asyncio.Event()
    gateway = await start_gateway(modes={"min_responses": 2, "grace_ms": 10})
    fusion = (await gateway.post(**BEST_OF)).json()["fusion"]
    await upstream.wait_aborted("alpha")
    assert [candidate["member"] for candidate in fusion["candidates"]] == ["beta", "gamma"]
    assert [(one["member"], one["type"]) for one in fusion["failed"]] == [("alpha", "cancelled_straggler")]
    assert fusion["winner"] == 1  # candidates keep their numbers
    trace = await gateway.trace(fusion)
    assert trace["candidates"] == ["alpha", "beta", "gamma"]
    straggler = next(entry for entry in trace["calls"] if entry["member"] == "alpha")
    assert (straggler["outcome"], straggler["estimated"]) == ("cancelled_straggler", True)


async def test_the_deadline_ends_the_wait(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    upstream.models["gamma"].hold = asyncio.Event()
    gateway = await start_gateway(modes={"min_responses": 1, "deadline_ms": 1500})
    fusion = (await gateway.post(**BEST_OF)).json()["fusion"]
    await upstream.wait_aborted("gamma")
    assert [(one["member"], one["type"]) for one in fusion["failed"]] == [("gamma", "timeout")]


@pytest.mark.parametrize("mode", ["best-of", "merge", "debate"])
async def test_a_lone_survivor_is_returned_as_it_is(gateway: Gateway, upstream: FakeUpstream, mode: str) -> None:
    upstream.models["alpha"] = upstream.models["gamma"] = Script(status=500)
    body = (await gateway.post(model=f"fusion/{mode}", messages=HELLO)).json()
    assert body["choices"][0]["message"]["content"] == "the answer of beta"
    assert (body["fusion"]["reason"], body["fusion"]["winner"]) == ("lone_survivor", 1)
    assert len(upstream.asked("beta")) == 1
    assert upstream.asked("judge") == upstream.asked("synth") == []


@pytest.mark.parametrize("mode", ["best-of", "merge", "debate"])
@pytest.mark.parametrize("stream", [False, True])
async def test_too_few_answers_list_each_reason(
    start_gateway: StartGateway, upstream: FakeUpstream, mode: str, stream: bool
) -> None:
    upstream.models["alpha"] = Script(status=500)
    upstream.models["beta"] = Script(status=429)
    gateway = await start_gateway(modes={"min_responses": 2})
    response = await gateway.post(model=f"fusion/{mode}", messages=HELLO, stream=stream)
    assert response.status_code == 503
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("too_few_answers", "too_few_answers")
    reasons = {(one["member"], one["type"]) for one in error["failed"]}
    assert {("alpha", "upstream_error"), ("beta", "rate_limited")} <= reasons
    assert "alpha: upstream_error" in error["message"]
    # It goes on serving.
    upstream.models["alpha"] = Script("back again")
    assert (await gateway.post(model=f"fusion/{mode}", messages=HELLO)).status_code == 200
