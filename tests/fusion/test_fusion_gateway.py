"""The gateway: OpenAI's API as its own client sees it, usage, streaming, disconnects, and what is refused."""

import asyncio
import json
from typing import Any

import openai
import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import FakeRoles, Gateway, StartGateway, summed

from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.http.gateway import create_app

HELLO: list[Any] = [{"role": "user", "content": "why?"}]


async def events(gateway: Gateway, **body: Any) -> list[Any]:
    """The data of each event, parsed; the end mark as text."""
    response = await gateway.post(**body, stream=True)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    data = [part.removeprefix("data: ") for part in parts]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


# The official client


@pytest.mark.parametrize("model", ["fusion/auto", "fusion/best-of", "fusion/merge", "fusion/debate", "alpha"])
async def test_the_sync_client_gets_an_answer(gateway: Gateway, model: str) -> None:
    def ask() -> Any:
        return gateway.sync_client.chat.completions.create(model=model, messages=HELLO)

    answer = await asyncio.to_thread(ask)
    assert answer.object == "chat.completion"
    assert answer.model == model
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model_extra["fusion"]["trace_id"].startswith("trace-")


@pytest.mark.parametrize("model", ["fusion/auto", "fusion/best-of", "fusion/merge", "fusion/debate", "alpha"])
async def test_the_client_streams_what_it_would_get_whole(gateway: Gateway, model: str) -> None:
    whole = await gateway.client.chat.completions.create(model=model, messages=HELLO)
    stream = await gateway.client.chat.completions.create(
        model=model, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"


async def test_the_sync_client_streams(gateway: Gateway) -> None:
    def ask() -> str:
        stream = gateway.sync_client.chat.completions.create(model="fusion/merge", messages=HELLO, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    assert await asyncio.to_thread(ask) == "one merged answer in several words"


async def test_the_stream_helper_works(gateway: Gateway) -> None:
    async with gateway.client.chat.completions.stream(model="fusion/best-of", messages=HELLO) as stream:
        async for _event in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "the answer of beta"


async def test_models_are_modes_members_and_roles(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    upstream.models["domain@r1"] = Script("from the domain adapter")
    gateway = await start_gateway(roles=FakeRoles(upstream, "base", "domain", "alpha"))
    names = [model.id async for model in await gateway.client.models.list()]
    modes = ["fusion/auto", "fusion/best-of", "fusion/debate", "fusion/merge"]
    assert names == [*modes, "alpha", "beta", "gamma", "base", "domain"]
    answer = await gateway.client.chat.completions.create(model="domain", messages=HELLO)
    assert answer.choices[0].message.content == "from the domain adapter"
    trace = await gateway.trace(answer.model_extra["fusion"])
    assert trace["calls"][0]["revision"] == "r1"


async def test_a_pass_through_gives_the_models_logprobs(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["alpha"].logprobs = {"A": -0.1, "B": -2.5}
    answer = await gateway.client.chat.completions.create(
        model="alpha", messages=HELLO, max_tokens=1, logprobs=True, top_logprobs=20
    )
    top = answer.choices[0].logprobs.content[0].top_logprobs
    assert {entry.token: entry.logprob for entry in top} == {"A": -0.1, "B": -2.5}


async def test_only_supported_parameters_are_passed_on(gateway: Gateway, upstream: FakeUpstream) -> None:
    sent = {"temperature": 0.1, "top_p": 0.5, "max_tokens": 7, "seed": 3, "stop": ["END"], "user": "me"}
    await gateway.post(model="alpha", messages=HELLO, **sent, n=1, tools=None, store=False)
    assert upstream.requests == [{"model": "alpha", "messages": HELLO, **sent}]


# Usage and traces


@pytest.mark.parametrize("model", ["fusion/auto", "fusion/best-of", "fusion/merge", "fusion/debate", "alpha"])
async def test_usage_is_the_sum_over_the_traces_calls(gateway: Gateway, upstream: FakeUpstream, model: str) -> None:
    upstream.models["gamma"].usage = None  # estimated ones count too
    body = (await gateway.post(model=model, messages=HELLO)).json()
    assert body["usage"] == summed(await gateway.trace(body["fusion"]))
    *_, finish, usage, done = await events(gateway, model=model, messages=HELLO, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert usage["usage"] == summed(await gateway.trace(finish["fusion"]))


async def test_a_trace_tells_what_happened(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["gamma"] = Script(status=500)
    body = (await gateway.post(model="fusion/best-of", messages=HELLO, temperature=0.5)).json()
    trace = await gateway.trace(body["fusion"])
    assert (trace["model"], trace["mode"], trace["reason"]) == ("fusion/best-of", "best_of", "judged")
    assert (trace["messages"], trace["parameters"]) == (HELLO, {"temperature": 0.5})
    assert (trace["answer"], trace["winner"]) == ("the answer of beta", 1)
    stages = [call["stage"] for call in trace["calls"]]
    assert (stages.count("answer"), stages.count("verdict")) == (3, 2)
    assert trace["judge_protocol"]
    assert body["fusion"]["verdicts"] == trace["verdicts"]
    listed = (await gateway.http.get("/v1/traces")).json()["data"]
    assert [one["id"] for one in listed] == [trace["id"]]


async def test_feedback_is_kept_with_the_trace(gateway: Gateway) -> None:
    fusion = (await gateway.post(model="alpha", messages=HELLO)).json()["fusion"]
    path = f"/v1/traces/{fusion['trace_id']}/feedback"
    await gateway.http.post(path, json={"score": 1})
    await gateway.http.post(path, json={"score": -1})
    assert (await gateway.trace(fusion))["feedback"] == [{"score": 1}, {"score": -1}]


async def test_a_failed_request_leaves_a_trace(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["alpha"] = Script(status=500)
    assert (await gateway.post(model="alpha", messages=HELLO)).status_code == 502
    (trace,) = (await gateway.http.get("/v1/traces")).json()["data"]
    assert (trace["outcome"], trace["answer"]) == ("upstream_error", None)
    assert "500" in trace["error"]


async def test_traces_outlive_the_gateway(start_gateway: StartGateway) -> None:
    first = await start_gateway()
    fusion = (await first.post(model="alpha", messages=HELLO)).json()["fusion"]
    await first.trace(fusion)  # it is in the database once it has been read there
    second = await start_gateway()
    assert (await second.trace(fusion))["answer"] == "the answer of alpha"


# Streaming


@pytest.mark.parametrize("model", ["fusion/best-of", "fusion/merge", "alpha"])
async def test_every_chunk_is_valid(gateway: Gateway, model: str) -> None:
    *chunks, done = await events(gateway, model=model, messages=HELLO)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in chunks[1:-1])
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert not any("usage" in chunk for chunk in chunks)
    assert chunks[-1]["fusion"]["trace_id"].endswith(chunks[0]["id"].removeprefix("chatcmpl-"))


async def test_usage_comes_once_and_last(gateway: Gateway) -> None:
    *chunks, usage, done = await events(
        gateway, model="fusion/merge", messages=HELLO, stream_options={"include_usage": True}
    )
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 60


async def test_a_long_winner_comes_in_several_chunks(gateway: Gateway, upstream: FakeUpstream) -> None:
    text = "beta " + "\u2028wörd " * 100
    upstream.models["beta"].text = text
    *chunks, _done = await events(gateway, model="fusion/best-of", messages=HELLO)
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == text
    assert len(pieces) > 5


async def test_merge_streams_while_the_synthesizer_writes(gateway: Gateway, upstream: FakeUpstream) -> None:
    hold = upstream.models["synth"].hold = asyncio.Event()
    upstream.models["synth"].hold_after = 2
    stream = await gateway.client.chat.completions.create(model="fusion/merge", messages=HELLO, stream=True)
    text = ""
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        if text == "one merged ":
            hold.set()  # the rest is written only now that the client has these
    assert text == "one merged answer in several words"


async def test_an_error_after_the_first_token_is_the_last_event(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["synth"].break_after = 2
    *chunks, last = await events(gateway, model="fusion/merge", messages=HELLO)
    assert last["error"]["type"] == "upstream_error"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    stream = await gateway.client.chat.completions.create(model="fusion/merge", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="the stream broke off"):
        async for _chunk in stream:
            pass


# The client goes away


@pytest.mark.parametrize(("model", "held"), [("fusion/best-of", "beta"), ("fusion/best-of", "judge")])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_everything_upstream(
    gateway: Gateway, upstream: FakeUpstream, model: str, held: str, stream: bool
) -> None:
    upstream.models[held].hold = asyncio.Event()
    asking = asyncio.create_task(gateway.post(model=model, messages=HELLO, stream=stream))
    calls = 6 if held == "judge" else 1
    await upstream.wait_asked(held, calls)
    asking.cancel()
    await upstream.wait_aborted(held, calls)
    (trace,) = await gateway.first_traces()
    assert trace["outcome"] == "cancelled"
    assert "cancelled" in {call["outcome"] for call in trace["calls"]}


async def test_leaving_in_mid_stream_cancels_the_synthesizer(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["synth"].hold = asyncio.Event()
    upstream.models["synth"].hold_after = 2
    stream = await gateway.client.chat.completions.create(model="fusion/merge", messages=HELLO, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    await upstream.wait_aborted("synth")
    assert (await gateway.post(model="alpha", messages=HELLO)).status_code == 200


# Refusals

BEST = {"model": "fusion/best-of", "messages": HELLO}
REFUSED: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"messages": HELLO}, 400, "missing_parameter", "model"),
    ({"model": "alpha"}, 400, "missing_parameter", "messages"),
    ({"model": "alpha", "messages": []}, 400, "invalid_value", "messages"),
    ({"model": "alpha", "messages": "hi"}, 400, "invalid_value", "messages"),
    ({"model": "alpha", "messages": ["hi"]}, 400, "invalid_value", "messages.0"),
    ({"model": "alpha", "messages": [{"role": "user"}]}, 400, "missing_parameter", "messages.0.content"),
    ({"model": "alpha", "messages": [{"role": "wizard", "content": ""}]}, 400, "invalid_value", "messages.0.role"),
    ({**BEST, "model": "fusion/best_of"}, 404, "model_not_found", "model"),
    ({**BEST, "model": "nobody"}, 404, "model_not_found", "model"),
    ({**BEST, "n": 2}, 400, "unsupported_parameter", "n"),
    ({**BEST, "tools": [{"type": "function"}]}, 400, "missing_parameter", "tools.0.function"),
    ({**BEST, "tool_choice": "required"}, 400, "invalid_value", "tool_choice"),
    ({**BEST, "response_format": {"type": "xml"}}, 400, "invalid_value", "response_format"),
    ({**BEST, "logprobs": True}, 400, "unsupported_parameter", "logprobs"),
    ({**BEST, "model": "alpha", "logprobs": True, "stream": True}, 400, "unsupported_parameter", "logprobs"),
    ({**BEST, "tempreature": 1}, 400, "unknown_parameter", "tempreature"),
    ({**BEST, "temperature": "hot"}, 400, "invalid_value", "temperature"),
    ({**BEST, "max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    ({**BEST, "fusion": {"member": ["alpha"]}}, 400, "unknown_parameter", "fusion.member"),
    ({**BEST, "fusion": {"mode": "vote"}}, 400, "invalid_value", "fusion.mode"),
    ({**BEST, "fusion": {"members": ["delta"]}}, 400, "unknown_member", "fusion.members"),
    ({**BEST, "fusion": {"samples": 0}}, 400, "invalid_value", "fusion.samples"),
    ({**BEST, "model": "alpha", "fusion": {"mode": "merge"}}, 400, "unsupported_parameter", "fusion"),
]


@pytest.mark.parametrize(("body", "status", "code", "param"), REFUSED)
async def test_a_bad_request_is_refused_by_name(
    gateway: Gateway, upstream: FakeUpstream, body: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    response = await gateway.post(**body)
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
    assert error["message"]
    assert upstream.requests == []


async def test_malformed_json_is_refused(gateway: Gateway) -> None:
    for content in (b"{", b"\xff", b"[]", b"null"):
        response = await gateway.http.post("/v1/chat/completions", content=content)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "invalid_json"
    assert (await gateway.http.get("/healthz")).json() == {"status": "ok"}


async def test_the_client_raises_what_openai_would(gateway: Gateway, upstream: FakeUpstream) -> None:
    with pytest.raises(openai.NotFoundError, match=r"did you mean 'fusion/best-of'\?"):
        await gateway.client.chat.completions.create(model="fusion/bestof", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="'n' is not supported"):
        await gateway.client.chat.completions.create(model="alpha", messages=HELLO, n=2)
    upstream.models["alpha"] = Script(status=429)
    with pytest.raises(openai.RateLimitError, match="HTTP 429"):
        await gateway.client.chat.completions.create(model="alpha", messages=HELLO)


async def test_other_paths_and_methods_have_typed_errors(gateway: Gateway) -> None:
    for response, status in (
        (await gateway.http.get("/v1/chat/completions"), 405),
        (await gateway.http.get("/v1/nothing"), 404),
        (await gateway.http.get("/v1/traces/trace-none"), 404),
        (await gateway.http.post("/v1/traces/trace-none/feedback", json={}), 404),
        (await gateway.http.get("/v1/traces", params={"limit": "many"}), 400),
    ):
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


async def test_a_mode_whose_decider_is_missing_is_refused(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(judge=None, synthesizer=None, modes={"debate_ending": "merge"})
    for mode, decider in (("best-of", "judge"), ("merge", "synthesizer"), ("debate", "synthesizer")):
        error = (await gateway.post(model=f"fusion/{mode}", messages=HELLO)).json()["error"]
        assert (error["code"], decider in error["message"]) == ("mode_unavailable", True)


async def test_models_that_cannot_be_asked_are_not_listed(start_gateway: StartGateway) -> None:
    presets = {
        "judged": {"mode": "best_of"},
        "own": {"mode": "best_of", "judge": "alpha"},
        "written": {"mode": "merge"},
    }
    for keys, gone in (
        ({}, set()),
        ({"synthesizer": None}, {"fusion/merge", "written"}),
        ({"judge": None}, {"fusion/best-of", "fusion/debate", "judged"}),
        ({"judge": None, "modes": {"debate_ending": "merge"}}, {"fusion/best-of", "judged"}),
    ):
        gateway = await start_gateway(presets=presets, **keys)
        listed = {model["id"] for model in (await gateway.http.get("/v1/models")).json()["data"]}
        named = {"fusion/auto", "fusion/best-of", "fusion/debate", "fusion/merge", "alpha", *presets}
        assert named - listed == gone
        for name in named:
            assert (await gateway.http.get(f"/v1/models/{name}")).status_code == (404 if name in gone else 200)
            answer = await gateway.post(model=name, messages=HELLO)
            assert (answer.status_code == 400) == (name in gone), (name, answer.text)


@pytest.mark.parametrize(
    ("feedback", "param"),
    [
        ({"scores": 1}, "scores"), ({"corect": [0]}, "corect"), ({"thumbs": "up"}, "thumbs"),
        ({"score": 1, "User": "jane"}, "User"), ({"score": "1"}, "score"), ({"score": True}, "score"),
        ({"best": "0"}, "best"), ({"best": True}, "best"), ({"best": -1}, "best"), ({"correct": 0}, "correct"),
        ({"correct": ["0"]}, "correct.0"), ({"user": 7}, "user"), ({"metadata": []}, "metadata"),
        ({"correct": [0, 1], "wrong": [1]}, None), ({"best": 3}, None), ({"wrong": [99]}, None),
    ],
)  # fmt: skip
async def test_feedback_that_nothing_would_heed_is_refused_by_name(
    gateway: Gateway, feedback: dict[str, Any], param: str | None
) -> None:
    fusion = (await gateway.post(**BEST)).json()["fusion"]
    response = await gateway.http.post(f"/v1/traces/{fusion['trace_id']}/feedback", json=feedback)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert param is None or param.split(".")[0] in error["message"]
    assert (await gateway.trace(fusion))["feedback"] == []


async def test_all_forms_of_feedback_are_kept(gateway: Gateway) -> None:
    fusion = (await gateway.post(**BEST)).json()["fusion"]
    forms: list[dict[str, Any]] = [
        {"correct": [0, 2], "wrong": [1]}, {"best": 0, "user": "jane"}, {"score": -0.5, "comment": "no"},
        {"score": 1, "metadata": {"page": [1]}},
    ]  # fmt: skip
    for form in forms:
        response = await gateway.http.post(f"/v1/traces/{fusion['trace_id']}/feedback", json=form)
        assert response.status_code == 200, response.text
    assert (await gateway.trace(fusion))["feedback"] == forms


async def test_more_members_are_needed_than_were_asked_for(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(modes={"min_responses": 2})
    response = await gateway.post(**BEST, fusion={"members": ["alpha"]})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value")


async def test_a_request_may_choose_mode_and_members(gateway: Gateway, upstream: FakeUpstream) -> None:
    body = (await gateway.post(**BEST, fusion={"mode": "merge", "members": ["gamma", "alpha"]})).json()
    assert body["fusion"]["mode"] == "merge"
    assert [candidate["member"] for candidate in body["fusion"]["candidates"]] == ["alpha", "gamma"]
    assert upstream.asked("beta") == []


@pytest.mark.parametrize(
    ("script", "status", "kind"),
    [
        (Script(status=500), 502, "upstream_error"),
        (Script(body=b"nonsense"), 502, "invalid_response"),
        (Script(status=429), 429, "rate_limited"),
        (Script(status=400, body=b'{"error": {"code": "context_length_exceeded"}}'), 400, "context_length"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failing_model_gives_a_typed_status(
    gateway: Gateway, upstream: FakeUpstream, script: Script, status: int, kind: str, stream: bool
) -> None:
    upstream.models["alpha"] = script
    if stream and kind == "invalid_response":
        script.body = b"data: nonsense\n\n"
    response = await gateway.post(model="alpha", messages=HELLO, stream=stream)
    assert (response.status_code, response.json()["error"]["type"]) == (status, kind)


async def test_a_role_that_is_not_served_is_typed(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    members = [{"name": "d", "role": "domain"}]
    gateway = await start_gateway(members, roles=FakeRoles(upstream, "base"))
    response = await gateway.post(model="d", messages=HELLO)
    assert (response.status_code, response.json()["error"]["type"]) == (503, "unreachable")


def test_a_config_with_roles_needs_a_server(config: Any) -> None:
    with pytest.raises(MixfuseError, match="role 'domain'"):
        create_app(config([{"name": "d", "role": "domain"}]), None)
