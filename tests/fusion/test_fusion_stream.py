"""Streams: what keeps them open, what ends them, and that nothing but valid chunks stands on `data:`."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import Gateway, StartGateway

HELLO: list[Any] = [{"role": "user", "content": "why?"}]
SOON = {"keep_alive_ms": 20}


async def until_comment(texts: AsyncIterator[str]) -> str:
    """What has come when the first comment has."""
    received = ""
    async for text in texts:
        received += text
        if ": keep-alive\n\n" in received:
            return received
    raise AssertionError(f"no comment came: {received!r}")


@pytest.mark.parametrize("model", ["fusion/best-of", "fusion/merge", "fusion/debate", "alpha"])
async def test_a_silent_stream_is_kept_open(start_gateway: StartGateway, upstream: FakeUpstream, model: str) -> None:
    gateway = await start_gateway(modes=SOON)
    hold = upstream.models["alpha"].hold = asyncio.Event()
    stream = gateway.http.stream(
        "POST", "/v1/chat/completions", json={"model": model, "messages": HELLO, "stream": True}
    )
    async with stream as response:
        assert response.status_code == 200
        texts = response.aiter_text()
        before = await until_comment(texts)
        assert "data:" not in before
        hold.set()
        rest = "".join([text async for text in texts])
    parts = [part for part in rest.split("\n\n") if part and part != ": keep-alive"]
    assert parts.pop() == "data: [DONE]"
    chunks = [json.loads(part.removeprefix("data: ")) for part in parts]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_the_client_never_sees_the_comments(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = await start_gateway(modes=SOON)
    hold = upstream.models["beta"].hold = asyncio.Event()
    creating = gateway.client.chat.completions.create(
        model="fusion/best-of", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    stream = await creating  # the headers are here, though no member's answer is: a comment brought them
    hold.set()
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "the answer of beta"
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


async def test_an_error_after_a_comment_is_the_last_event(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = await start_gateway(modes=SOON)
    hold = asyncio.Event()
    for name in ("alpha", "beta", "gamma"):
        upstream.models[name] = Script(status=500, hold=hold)
    stream = await gateway.client.chat.completions.create(model="fusion/best-of", messages=HELLO, stream=True)
    hold.set()
    with pytest.raises(openai.APIError, match="0 of at least 1 members answered") as caught:
        async for _chunk in stream:
            pass
    assert caught.value.body["failed"][0]["type"] == "upstream_error"


async def test_an_error_event_says_what_was_used_and_where_to_look(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["synth"].break_after = 2
    response = await gateway.post(model="fusion/merge", messages=HELLO, stream=True)
    *_, last = response.text.removesuffix("\n\n").split("\n\n")
    event = json.loads(last.removeprefix("data: "))
    assert event["error"]["type"] == "upstream_error"
    trace = await gateway.trace(event)
    assert event["usage"]["total_tokens"] == sum(
        call["usage"]["prompt_tokens"] + call["usage"]["completion_tokens"] for call in trace["calls"]
    )


async def test_a_client_that_leaves_a_silent_stream_cancels_everything(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    gateway = await start_gateway(modes=SOON)
    for name in ("alpha", "beta", "gamma"):
        upstream.models[name].hold = asyncio.Event()
    body = {"model": "fusion/debate", "messages": HELLO, "stream": True}
    async with gateway.http.stream("POST", "/v1/chat/completions", json=body) as response:
        await until_comment(response.aiter_text())
    for name in ("alpha", "beta", "gamma"):
        await upstream.wait_aborted(name)
    (trace,) = await gateway.first_traces()
    assert trace["outcome"] == "cancelled"


async def test_leaving_during_a_revision_cancels_all_of_them(gateway: Gateway, upstream: FakeUpstream) -> None:
    for name in ("alpha", "beta", "gamma"):
        upstream.models[name].hold = asyncio.Event()
        upstream.models[name].hold_from = 2
    asking = asyncio.create_task(gateway.post(model="fusion/debate", messages=HELLO))
    for name in ("alpha", "beta", "gamma"):
        await upstream.wait_asked(name, 2)
    asking.cancel()
    for name in ("alpha", "beta", "gamma"):
        await upstream.wait_aborted(name)
