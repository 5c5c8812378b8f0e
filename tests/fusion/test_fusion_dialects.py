"""How endpoints want to be asked and what they answer: own parameters, odd errors, many verdicts in a call."""

import asyncio
import json
import logging
from typing import Any

import openai
import pytest
from fake_upstream import Batches, FakeUpstream, Script
from fusion_harness import Gateway, StartGateway

from mixfuse.fusion.config import Member

HELLO: list[Any] = [{"role": "user", "content": "why?"}]
ASK: dict[str, Any] = {"model": "fusion/best-of", "messages": HELLO}
PASSED: dict[str, Any] = {
    "reasoning_effort": "low",
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "verbosity": "low",
    "logit_bias": {"50256": -100.0},
    "user": "someone",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
}


# Parameters


async def test_parameters_go_to_every_call_that_writes_text(gateway: Gateway, upstream: FakeUpstream) -> None:
    messages = [{"role": "user", "name": "Ann", "content": "why?"}]
    for model, asked in (("fusion/best-of", "alpha"), ("fusion/merge", "synth"), ("alpha", "alpha")):
        upstream.requests.clear()
        await gateway.client.chat.completions.create(model=model, messages=messages, **PASSED)
        (request,) = upstream.asked(asked)
        assert {name: request[name] for name in PASSED} == PASSED
        assert upstream.asked("alpha")[0]["messages"] == messages


async def test_metadata_goes_to_the_trace(gateway: Gateway) -> None:
    answer = await gateway.client.chat.completions.create(**ASK, metadata={"ticket": "17"})
    assert (await gateway.trace(answer.model_extra["fusion"]))["metadata"] == {"ticket": "17"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"metadata": "x"}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"reasoning_effort": "a lot"}, "reasoning_effort"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(gateway: Gateway, body: dict[str, Any], param: str) -> None:
    response = await gateway.post(**ASK, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_a_member_has_parameters_and_headers_of_its_own(
    start_gateway: StartGateway,
    upstream: FakeUpstream,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TEAM_TOKEN", "tt-0123456789")
    member = {
        "name": "alpha",
        "base_url": upstream.base_url,
        "model": "alpha",
        "defaults": {"top_p": 0.9, "seed": 1},
        "extra_body": {"chat_template_kwargs": {"enable_thinking": False}, "temperature": 1.0},
        "extra_headers": {"x-team": "Bearer ${TEAM_TOKEN}"},
        "drop_params": ["user", "stream_options"],
        "rename_params": {"max_tokens": "max_output_tokens"},
    }
    caplog.set_level(logging.DEBUG)
    gateway = await start_gateway([member])
    for stream in (False, True):
        upstream.requests.clear()
        response = await gateway.post(
            model="alpha", messages=HELLO, seed=7, max_tokens=9, temperature=0.0, user="u", stream=stream
        )
        assert response.status_code == 200
        (request,) = upstream.requests
        wanted = {"seed": 7, "top_p": 0.9, "temperature": 1.0, "max_output_tokens": 9}
        assert wanted.items() <= request.items()
        assert request["chat_template_kwargs"] == {"enable_thinking": False}
        assert not {"user", "max_tokens", "stream_options"} & request.keys()
        assert upstream.headers[-1]["x-team"] == "Bearer tt-0123456789"
    # An endpoint that repeats the header in its error does not lead it to a client, a log or a trace.
    upstream.models["alpha"] = Script(
        status=401, body=b'{"error": {"message": "bad token ' + b"x" * 285 + b'tt-0123456789"}}'
    )
    response = await gateway.post(model="alpha", messages=HELLO)
    traces = await gateway.http.get("/v1/traces")
    assert "[key]" in response.text or "tt-0" not in response.text
    assert "tt-0" not in response.text + traces.text + caplog.text + repr(Member.model_validate(member))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"extra_body": {"messages": []}}, "set by the gateway"),
        ({"drop_params": ["model"]}, "set by the gateway"),
        ({"rename_params": {"seed": "stream"}}, "set by the gateway"),
        ({"extra_headers": {"content-length": "1"}}, "no header that can be set"),
        ({"extra_headers": {"x": "a\r\nb: c"}}, "one line"),
        ({"extra_headers": {"x": "${NO_SUCH_VARIABLE}"}}, "NO_SUCH_VARIABLE"),
    ],
)
def test_a_wrong_key_of_a_member_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Member.model_validate({"name": "a", "base_url": "http://h/v1", "model": "a", **keys})


@pytest.mark.parametrize("model", ["alpha", "fusion/best-of", "fusion/merge"])
async def test_max_completion_tokens_is_learned_once(gateway: Gateway, upstream: FakeUpstream, model: str) -> None:
    def refuse(asked: dict[str, Any]) -> tuple[int, str] | None:
        wrong = "max_tokens" in asked
        return (400, "'max_tokens' is not supported; use 'max_completion_tokens' instead") if wrong else None

    for script in upstream.models.values():
        script.refuse = refuse
    for tries in (2, 1):
        upstream.requests.clear()
        response = await gateway.post(model=model, messages=HELLO, max_tokens=50)
        assert response.status_code == 200, response.text
        assert len(upstream.asked("alpha")) == tries
        assert upstream.asked("alpha")[-1]["max_completion_tokens"] == 50


async def test_an_answer_can_be_sent_back_as_the_client_writes_it(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["alpha"] = Script("hello", thoughts="a thought")
    answer = await gateway.client.chat.completions.create(
        model="alpha", messages=HELLO, extra_body={"include_reasoning": True}
    )
    written = answer.choices[0].message.model_dump()
    assert written["reasoning_content"] == "a thought"
    upstream.requests.clear()
    messages = [*HELLO, written, {"role": "user", "content": "and?"}]
    await gateway.client.chat.completions.create(model="fusion/best-of", messages=messages)
    sent = upstream.asked("alpha")[0]["messages"]
    assert sent == [*HELLO, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "and?"}]
    call = {
        "id": "c",
        "type": "function",
        "index": 0,
        "function": {"name": "f", "arguments": "{}", "parsed_arguments": {}},
    }
    odd = {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "x"}],
        "refusal": None,
        "annotations": [{"type": "url_citation"}],
        "audio": None,
        "function_call": None,
        "parsed": {"a": 1},
        "tool_calls": [call],
    }
    response = await gateway.post(
        model="beta", messages=[*HELLO, odd, {"role": "tool", "tool_call_id": "c", "content": "1"}]
    )
    assert response.status_code == 200, response.text
    assert upstream.asked("beta")[-1]["messages"][1] == {
        "role": "assistant",
        "content": "x",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    response = await gateway.post(
        model="beta", messages=[{"role": "assistant", "content": "", "audio": {"id": "a"}}, *HELLO]
    )
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages.0.audio")


# Errors of endpoints

RATE = {"message": "slow down", "type": "rate_limit_error", "code": "rate_limit_exceeded"}
ODD_ERRORS: list[Any] = [
    (200, {"error": {**RATE}}, "rate_limited", "rate_limit_exceeded"),
    (200, {"error": {"message": "slow down", "code": 429}}, "rate_limited", "rate_limited"),
    (200, [{"error": {"message": "slow down", "code": 429, "status": "RESOURCE_EXHAUSTED"}}], "rate_limited", None),
    (429, {"detail": "slow down"}, "rate_limited", "rate_limited"),
    (
        200,
        {"error": {"message": "seed is odd", "type": "invalid_request_error"}},
        "bad_request",
        "invalid_request_error",
    ),
    (400, [{"error": {"message": "seed is odd", "status": "INVALID_ARGUMENT"}}], "bad_request", "INVALID_ARGUMENT"),
    (422, {"detail": [{"loc": ["body", "seed"], "msg": "seed is odd"}]}, "bad_request", "bad_request"),
    (400, {"object": "error", "message": "seed is odd", "code": 400}, "bad_request", "bad_request"),
    (200, {"error": "it broke"}, "upstream_error", "upstream_error"),
    (200, {"detail": "it broke"}, "upstream_error", "upstream_error"),
    (200, {"error": {"message": "prompt too long", "code": "context_length_exceeded"}}, "context_length", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "body", "kind", "code"), ODD_ERRORS)
async def test_an_error_keeps_its_reason_wherever_it_stands(
    gateway: Gateway, upstream: FakeUpstream, status: int, body: Any, kind: str, code: str | None, stream: bool
) -> None:
    upstream.models["alpha"] = Script(status=status, body=json.dumps(body).encode())
    if stream and status == 200:
        upstream.models["alpha"] = Script(events=[body])
    response = await gateway.post(model="alpha", messages=HELLO, stream=stream)
    error = response.json()["error"]
    assert error["type"] == kind
    assert response.status_code == {"rate_limited": 429, "upstream_error": 502}.get(kind, 400)
    assert code is None or error["code"] == code
    assert any(words in error["message"] for words in ("slow down", "seed is odd", "it broke", "too long"))
    assert response.json()["usage"]["total_tokens"] == 0


async def test_the_requests_own_fault_is_not_retried_and_a_rate_limit_is(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    member = {
        "name": "alpha",
        "base_url": upstream.base_url,
        "model": "alpha",
        "retry": {"attempts": 3, "backoff_ms": 1},
    }
    gateway = await start_gateway([member])
    upstream.models["alpha"].faults = [Script(body=json.dumps({"error": RATE}).encode())]
    assert (await gateway.post(model="alpha", messages=HELLO)).status_code == 200
    assert len(upstream.requests) == 2
    upstream.requests.clear()
    upstream.models["alpha"] = Script(
        status=400, body=json.dumps({"error": {"message": "a\nb\x1b[2J" + "c" * 999}}).encode()
    )
    with pytest.raises(openai.BadRequestError) as caught:
        await gateway.client.chat.completions.create(model="alpha", messages=HELLO)
    assert len(upstream.requests) == 1
    assert "a b" in caught.value.message
    assert "\x1b" not in caught.value.message
    assert len(caught.value.body["message"]) < 350  # type: ignore[index]


def pieces(*calls: dict[str, Any]) -> list[Any]:
    chunks = [{"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]} for call in calls]
    return [*chunks, {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}]


def piece(arguments: str, name: str | None = None, **more: Any) -> dict[str, Any]:
    return {**more, "function": {"arguments": arguments, **({"name": name} if name else {})}}


STREAMED_CALLS = {
    "no index": pieces(piece('{"a":', "f", id="1"), piece("1}"), piece("{}", "g", id="2")),
    "one index for all": pieces(piece('{"a":1}', "f", id="1", index=0), piece("{}", "g", id="2", index=0)),
    "whole calls without an index": pieces(piece('{"a":1}', "f", id="1"), piece("{}", "g", id="2")),
    "an index that begins at 1": pieces(piece('{"a":1}', "f", id="1", index=1), piece("{}", "g", id="2", index=2)),
    "as OpenAI": pieces(
        piece("", "f", id="1", index=0),
        piece('{"a":', index=0),
        piece("1}", index=0),
        piece("{}", "g", id="2", index=1),
    ),
}


@pytest.mark.parametrize("form", STREAMED_CALLS)
async def test_streamed_tool_calls_need_no_index(gateway: Gateway, upstream: FakeUpstream, form: str) -> None:
    upstream.models["alpha"].events = STREAMED_CALLS[form]
    tools: list[Any] = [{"type": "function", "function": {"name": name}} for name in "fg"]
    calls: list[Any] = []
    stream = await gateway.client.chat.completions.create(model="alpha", messages=HELLO, tools=tools, stream=True)
    async for chunk in stream:
        calls += chunk.choices[0].delta.tool_calls or []
    found = [(call.index, call.id, call.function.name, call.function.arguments) for call in calls]
    assert found == [(0, "1", "f", '{"a":1}'), (1, "2", "g", "{}")]


# Many verdicts in one call


def verdict_lines(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [call for call in trace["calls"] if call["stage"] == "verdict"]


@pytest.mark.parametrize("verdicts", ["auto", "parsed"])
async def test_a_round_of_verdicts_is_one_call(
    start_gateway: StartGateway, upstream: FakeUpstream, verdicts: str
) -> None:
    upstream.batches = Batches()
    gateway = await start_gateway(judge={"base_url": upstream.base_url, "model": "judge", "verdicts": verdicts})
    for number in (1, 2):
        fusion = (await gateway.post(**ASK)).json()["fusion"]
        assert (fusion["reason"], fusion["winner"], len(fusion["verdicts"])) == ("judged", 1, 3)
        assert {verdict["read"] for verdict in fusion["verdicts"]} == {"logprobs" if verdicts == "auto" else "parsed"}
        assert (len(upstream.batches.requests), upstream.asked("judge")) == (number, [])
        lines = verdict_lines(await gateway.trace(fusion))
        assert [line["outcome"] for line in lines] == ["ok"] * 6
        # 10 and 5 tokens each, and one more: the shares add up to what the endpoint reported.
        assert sum(line["usage"]["prompt_tokens"] for line in lines) == 61
        assert sum(line["usage"]["completion_tokens"] for line in lines) == 30
        assert all(line["usage"]["prompt_tokens"] >= 8 for line in lines)


@pytest.mark.parametrize("status", [404, 405])
async def test_an_endpoint_without_batches_is_asked_once(
    start_gateway: StartGateway, upstream: FakeUpstream, status: int
) -> None:
    upstream.batches = Batches(status=status)
    gateway = await start_gateway()
    for number in (6, 12):
        fusion = (await gateway.post(**ASK)).json()["fusion"]
        assert (fusion["winner"], fusion["failed"]) == (1, [])
        assert (len(upstream.batches.requests), len(upstream.asked("judge"))) == (1, number)
        assert len(verdict_lines(await gateway.trace(fusion))) == 6


async def test_batches_can_be_turned_off(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    upstream.batches = Batches()
    gateway = await start_gateway(judge={"base_url": upstream.base_url, "model": "judge", "batch": False})
    await gateway.post(**ASK)
    assert (upstream.batches.requests, len(upstream.asked("judge"))) == ([], 6)


async def test_a_verdict_that_is_missing_is_asked_for_again(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    upstream.batches = Batches(left_out=(1, 4))
    gateway = await start_gateway()
    fusion = (await gateway.post(**ASK)).json()["fusion"]
    assert (fusion["reason"], fusion["winner"]) == ("judged", 1)
    assert len(upstream.asked("judge")) == 2
    lines = verdict_lines(await gateway.trace(fusion))
    assert sorted(line["outcome"] for line in lines) == ["invalid_response"] * 2 + ["ok"] * 6


async def test_a_batch_that_fails_as_a_whole_is_asked_one_by_one(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    upstream.batches = Batches()

    def refuse(asked: dict[str, Any]) -> tuple[int, str] | None:
        return (400, "one prompt has an odd token") if isinstance(asked["messages"][0], list) else None

    upstream.models["judge"].refuse = refuse
    gateway = await start_gateway()
    fusion = (await gateway.post(**ASK)).json()["fusion"]
    assert (fusion["reason"], len(upstream.asked("judge"))) == ("judged", 6)
    lines = verdict_lines(await gateway.trace(fusion))
    assert sorted(line["outcome"] for line in lines) == ["bad_request"] * 6 + ["ok"] * 6
    assert sum(line["usage"]["prompt_tokens"] for line in lines if line["outcome"] != "ok") == 0


async def test_a_client_that_leaves_cancels_the_batch(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    upstream.batches = Batches()
    upstream.models["judge"].hold = asyncio.Event()
    gateway = await start_gateway()
    asking = asyncio.create_task(gateway.post(**ASK))
    await upstream._until(lambda: bool(upstream.batches and upstream.batches.requests))
    asking.cancel()
    await upstream.wait_aborted("judge")
    (trace,) = await gateway.first_traces()
    assert [line["outcome"] for line in verdict_lines(trace)] == ["cancelled"] * 6


async def test_what_a_batch_may_cost_is_reserved_as_a_whole(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    upstream.batches = Batches()
    judge = {"base_url": upstream.base_url, "model": "judge", "price": {"prompt": 1e6, "completion": 1e6}}
    gateway = await start_gateway(judge=judge, modes={"max_cost": 400.0})
    fusion = (await gateway.post(**ASK)).json()["fusion"]
    assert fusion["reason"] == "judge_failed"
    assert "max_cost" in fusion["error"]
    assert upstream.batches.requests == []
