"""Kept answers: who gets one, who does not, and what it costs."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import FakeRoles, Gateway, StartGateway
from pydantic import ValidationError

from mixfuse.contracts.database import opened
from mixfuse.fusion.http.keys import create

ASKED: dict[str, Any] = {
    "model": "fusion/best-of",
    "messages": [{"role": "user", "content": "Which?"}],
    "fusion": {"cache": True},
}


async def ask(gateway: Gateway, **change: Any) -> dict[str, Any]:
    response = await gateway.post(**(ASKED | change))
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def settled(gateway: Gateway, body: dict[str, Any]) -> dict[str, Any]:
    """Returns the body's trace. An answer is kept before its trace can be read: one thread does both in order."""
    return await gateway.trace(body["fusion"])


@pytest.mark.parametrize("model", ["fusion/best-of", "fusion/merge", "fusion/debate", "alpha"])
async def test_the_same_request_gets_the_same_answer_and_calls_nobody(
    gateway: Gateway, upstream: FakeUpstream, model: str
) -> None:
    first = await ask(gateway, model=model)
    await settled(gateway, first)
    asked = len(upstream.requests)
    again = await ask(gateway, model=model)
    assert len(upstream.requests) == asked
    assert again["choices"] == first["choices"]
    assert again["usage"]["total_tokens"] == 0
    assert (again["fusion"]["cost"], again["fusion"]["cached_from"]) == (0, first["fusion"]["trace_id"])
    assert again["fusion"]["reason"] == first["fusion"]["reason"]
    trace = await settled(gateway, again)
    assert (trace["calls"], trace["cached_from"]) == ([], first["fusion"]["trace_id"])
    assert "cached_from" not in first["fusion"]


async def test_it_is_streamed_and_other_apis_get_it(gateway: Gateway, upstream: FakeUpstream) -> None:
    first = await ask(gateway)
    await settled(gateway, first)
    asked = len(upstream.requests)
    stream = await gateway.client.chat.completions.create(
        model="fusion/best-of", messages=ASKED["messages"], stream=True, extra_body={"fusion": {"cache": True}}
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
    assert text == first["choices"][0]["message"]["content"]
    response = await gateway.client.responses.create(
        model="fusion/best-of", input="Which?", extra_body={"fusion": {"cache": True}}
    )
    assert response.output_text == text
    assert len(upstream.requests) == asked


async def test_tool_calls_are_kept(gateway: Gateway, upstream: FakeUpstream) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    upstream.models["alpha"] = Script(tool_calls=[("weather", "{}")])
    first = await ask(gateway, model="alpha", tools=[tool])
    await settled(gateway, first)
    again = await ask(gateway, model="alpha", tools=[tool])
    assert again["choices"] == first["choices"]
    assert again["choices"][0]["message"]["tool_calls"]
    assert len(upstream.asked("alpha")) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": "Which? "}]},
        {"messages": [{"role": "system", "content": "Be short."}, *ASKED["messages"]]},
        {"temperature": 0.1},
        {"seed": 7},
        {"model": "fusion/merge"},
        {"fusion": {"cache": True, "members": ["alpha", "beta"]}},
        {"fusion": {"cache": True, "samples": 2}},
        {"fusion": {"cache": True, "judge": "gamma"}},
        {"fusion": {"cache": False}},
        {"fusion": {}},
    ],
)
async def test_another_request_is_worked_out(gateway: Gateway, upstream: FakeUpstream, change: dict[str, Any]) -> None:
    await settled(gateway, await ask(gateway))
    asked = len(upstream.requests)
    other = await ask(gateway, **change)
    assert len(upstream.requests) > asked
    assert "cached_from" not in other["fusion"]


async def test_another_key_gets_nothing_of_it(start_gateway: StartGateway, tmp_path: Path) -> None:
    with opened(tmp_path / "traces.sqlite3") as database:
        headers = [{"authorization": f"Bearer {create(database, name)[1]}"} for name in ("one", "two")]
    gateway = await start_gateway()
    bodies = []
    for header in (headers[0], headers[1], headers[0]):
        body = (await gateway.http.post("/v1/chat/completions", json=ASKED, headers=header)).json()
        await gateway.http.get(f"/v1/traces/{body['fusion']['trace_id']}", headers=header)
        bodies.append(body)
    assert ["cached_from" in body["fusion"] for body in bodies] == [False, False, True]
    assert bodies[2]["fusion"]["cached_from"] == bodies[0]["fusion"]["trace_id"]


async def test_degraded_answers_are_not_kept(gateway: Gateway, upstream: FakeUpstream) -> None:
    judge = upstream.models["judge"]
    upstream.models["judge"] = Script(status=500)
    first = await ask(gateway)
    assert first["fusion"]["reason"] == "judge_failed"
    await settled(gateway, first)
    upstream.models["judge"] = judge
    assert (await ask(gateway))["fusion"]["reason"] == "judged"


async def test_a_swapped_role_answers_anew_and_a_rolled_back_one_has_its_answer(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    roles = FakeRoles(upstream, "domain")
    for revision in ("r1", "r2"):
        upstream.models[f"domain@{revision}"] = Script(f"the answer of {revision}")
    gateway = await start_gateway(["alpha", {"name": "tuned", "role": "domain"}], roles=roles)
    texts = []
    for revision in ("r1", "r1", "r2", "r1"):
        roles.revision = revision
        body = await ask(gateway, model="tuned")
        await settled(gateway, body)
        texts.append((body["choices"][0]["message"]["content"], "cached_from" in body["fusion"]))
    assert texts == [
        ("the answer of r1", False),
        ("the answer of r1", True),
        ("the answer of r2", False),
        ("the answer of r1", True),
    ]
    assert roles.held == 0


async def test_an_answer_ends_with_its_time(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = await start_gateway(modes={"cache": True, "cache_ttl_s": 0.01})
    await settled(gateway, await ask(gateway, fusion={}))
    await asyncio.sleep(0.05)
    assert "cached_from" not in (await ask(gateway, fusion={}))["fusion"]


async def test_what_is_redacted_is_not_kept(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    upstream.models["alpha"] = Script("call 555-1234")
    gateway = await start_gateway(traces={"redact": [r"\d{3}-\d{4}"]})
    await settled(gateway, await ask(gateway, model="alpha"))
    again = await ask(gateway, model="alpha")
    assert again["choices"][0]["message"]["content"] == "call 555-1234"
    assert "cached_from" not in again["fusion"]


async def test_nothing_is_kept_where_no_text_may_be_stored(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(traces={"store_text": False})
    response = await gateway.post(**ASKED)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "fusion.cache")
    with pytest.raises(ValidationError, match="store_text"):
        await start_gateway(traces={"store_text": False}, modes={"cache": True})
