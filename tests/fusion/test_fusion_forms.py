"""What an answer must be: JSON that fits a schema, calls of tools; and what it may be asked about: images."""

import asyncio
import json
from typing import Any

import openai
import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import Gateway, StartGateway, prefers
from pydantic import BaseModel

HELLO: list[Any] = [{"role": "user", "content": "where?"}]
MODES = ["fusion/best-of", "fusion/merge", "fusion/debate"]


class Place(BaseModel):
    city: str
    people: int


PARIS, ROME = '{"city": "Paris", "people": 2}', '{"city": "Rome", "people": 3}'
SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": Place.model_json_schema()}}


@pytest.fixture
def places(upstream: FakeUpstream) -> FakeUpstream:
    """alpha answers in prose, beta and gamma in JSON; the judge likes Rome."""
    upstream.models["alpha"].text = "It is Paris."
    upstream.models["beta"].text = PARIS
    upstream.models["gamma"].text = ROME
    upstream.models["judge"].verdict = prefers("Rome")
    upstream.models["synth"].text = ROME
    return upstream


# response_format


@pytest.mark.parametrize("model", MODES)
async def test_the_clients_parse_gives_the_pydantic_model(gateway: Gateway, places: FakeUpstream, model: str) -> None:
    answer = await gateway.client.chat.completions.parse(model=model, messages=HELLO, response_format=Place)
    assert answer.choices[0].message.parsed == Place(city="Rome", people=3)
    async with gateway.client.chat.completions.stream(model=model, messages=HELLO, response_format=Place) as stream:
        async for _event in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == Place(city="Rome", people=3)
    assert places.asked("beta")[0]["response_format"]["json_schema"]["schema"]["title"] == "Place"


async def test_the_sync_client_parses(gateway: Gateway, places: FakeUpstream) -> None:
    def ask() -> Any:
        return gateway.sync_client.chat.completions.parse(model=MODES[0], messages=HELLO, response_format=Place)

    assert (await asyncio.to_thread(ask)).choices[0].message.parsed.city == "Rome"


async def test_a_member_that_does_not_fit_is_no_candidate(start_gateway: StartGateway, places: FakeUpstream) -> None:
    # Nor does it count for the quorum: with beta slow, alpha's prose does not end the waiting.
    gateway = await start_gateway(modes={"grace_ms": 0})
    body = (await gateway.post(model=MODES[0], messages=HELLO, response_format=SCHEMA)).json()
    assert 0 not in [entry["candidate"] for entry in body["fusion"]["candidates"]]
    (failed,) = [entry for entry in body["fusion"]["failed"] if entry["member"] == "alpha"]
    assert (failed["type"], "not JSON" in failed["message"]) == ("invalid_response", True)
    trace = await gateway.trace(body["fusion"])
    assert {call["member"]: call["outcome"] for call in trace["calls"]}["alpha"] == "invalid_response"
    assert "It is Paris." in [call["text"] for call in trace["calls"]]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_synthesis_that_does_not_fit_gives_way_to_a_candidate_that_does(
    gateway: Gateway, places: FakeUpstream, stream: bool
) -> None:
    places.models["synth"].text = '{"city": "Rome"}'
    if stream:
        events = await gateway.client.chat.completions.create(
            model="fusion/merge", messages=HELLO, response_format=SCHEMA, stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in events if chunk.choices])
    else:
        body = (await gateway.post(model="fusion/merge", messages=HELLO, response_format=SCHEMA)).json()
        text = body["choices"][0]["message"]["content"]
        assert (body["fusion"]["reason"], body["fusion"]["winner"]) == ("synthesizer_failed", 1)
        assert "'people' is a required property" in body["fusion"]["error"]
    assert text == PARIS


@pytest.mark.parametrize("model", [*MODES, "alpha"])
@pytest.mark.parametrize("stream", [False, True])
async def test_without_an_answer_that_fits_it_is_a_typed_failure(
    gateway: Gateway, upstream: FakeUpstream, model: str, stream: bool
) -> None:
    response = await gateway.post(model=model, messages=HELLO, response_format=SCHEMA, stream=stream)
    error = response.json()["error"]
    if model == "alpha":
        assert (response.status_code, error["type"]) == (502, "invalid_response")
    else:
        assert (response.status_code, error["type"]) == (503, "too_few_answers")
        assert {failure["type"] for failure in error["failed"]} == {"invalid_response"}


async def test_json_is_compared_as_json(gateway: Gateway, places: FakeUpstream) -> None:
    places.models["gamma"].text = '{"people":2,"city":"Paris"}'
    body = (await gateway.post(model=MODES[0], messages=HELLO, response_format=SCHEMA)).json()
    assert body["fusion"]["reason"] == "agreement"


async def test_any_json_object_will_do(gateway: Gateway, places: FakeUpstream) -> None:
    places.models["gamma"].text = "[1]"
    kind = {"type": "json_object"}
    body = (await gateway.post(model=MODES[0], messages=HELLO, response_format=kind)).json()
    assert (body["choices"][0]["message"]["content"], body["fusion"]["reason"]) == (PARIS, "lone_survivor")
    assert places.asked("beta")[0]["response_format"] == kind


def schema(**properties: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", **properties}}}


@pytest.mark.parametrize(
    ("response_format", "words"),
    [
        ("json", "valid dictionary"),
        ({}, "must be 'text'"),
        ({"type": "json_schema"}, "needs a 'name' and a 'schema'"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "needs a 'name' and a 'schema'"),
        (schema(type="objekt"), "not a JSON schema"),
        (schema(properties={"a": {"$ref": "http://127.0.0.1:1/schema.json"}}), "points outside"),
        (schema(properties={"a": {"$ref": "file:///etc/passwd"}}), "points outside"),
    ],
)
async def test_a_bad_format_is_refused(gateway: Gateway, response_format: Any, words: str) -> None:
    response = await gateway.post(model=MODES[0], messages=HELLO, response_format=response_format)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", "response_format")
    assert words in error["message"]


async def test_a_schema_that_is_too_deep_or_points_nowhere_harms_nobody(gateway: Gateway, places: FakeUpstream) -> None:
    deep: dict[str, Any] = {}
    for _ in range(40):
        deep = {"type": "object", "properties": {"a": deep}}
    response = await gateway.post(model="beta", messages=HELLO, response_format=schema(properties={"a": deep}))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")
    lost = schema(properties={"city": {"$ref": "#/$defs/nowhere"}})
    response = await gateway.post(model="beta", messages=HELLO, response_format=lost)
    assert (response.status_code, response.json()["error"]["type"]) == (502, "invalid_response")
    endless = schema(**{"$ref": "#"})
    response = await gateway.post(model="beta", messages=HELLO, response_format=endless)
    assert (response.status_code, response.json()["error"]["type"]) == (502, "invalid_response")


# Tools

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
]
ROME_CALL, PARIS_CALL = ("weather", '{"city": "Rome", "days": 2}'), ("weather", '{"city": "Paris"}')


async def test_best_of_compares_what_would_be_called(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["alpha"].tool_calls = [PARIS_CALL]
    upstream.models["beta"].tool_calls = [ROME_CALL]
    upstream.models["gamma"].text = "no tools, just words"
    upstream.models["judge"].verdict = prefers("Rome")
    answer = await gateway.client.chat.completions.create(model=MODES[0], messages=HELLO, tools=TOOLS)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ROME_CALL
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (None, "tool_calls")
    assert upstream.asked("alpha")[0]["tools"] == TOOLS
    shown = " ".join(request["messages"][-1]["content"] for request in upstream.asked("judge"))
    assert 'calls the tool weather({"city": "Rome", "days": 2})' in shown
    trace = await gateway.trace(answer.model_extra["fusion"])
    assert trace["tool_calls"][0]["function"]["name"] == "weather"


async def test_equal_calls_are_agreement(gateway: Gateway, upstream: FakeUpstream) -> None:
    for model, arguments in {"alpha": '{"a":1,"b":2}', "beta": '{"b": 2, "a": 1}', "gamma": '{"a": 1, "b": 2}'}.items():
        upstream.models[model].tool_calls = [("add", arguments)]
    body = (await gateway.post(model=MODES[0], messages=HELLO, tools=TOOLS)).json()
    assert body["fusion"]["reason"] == "agreement"


@pytest.mark.parametrize("model", [*MODES, "alpha"])
async def test_tool_calls_stream(gateway: Gateway, upstream: FakeUpstream, model: str) -> None:
    for name in ("alpha", "beta", "gamma"):
        upstream.models[name].tool_calls = [ROME_CALL, PARIS_CALL]
    async with gateway.client.chat.completions.stream(model=model, messages=HELLO, tools=TOOLS) as stream:
        async for _event in stream:
            pass
        final = await stream.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == [ROME_CALL, PARIS_CALL]
    assert final.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("model", MODES[1:])
async def test_with_tools_the_first_member_answers_alone(gateway: Gateway, upstream: FakeUpstream, model: str) -> None:
    upstream.models["alpha"].tool_calls = [ROME_CALL]
    body = (await gateway.post(model=model, messages=HELLO, tools=TOOLS)).json()
    assert body["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"
    assert (body["fusion"]["reason"], body["fusion"]["winner"]) == ("primary", 0)
    assert upstream.asked("beta") == upstream.asked("synth") == []
    # Where it fails, the next does.
    upstream.models["alpha"] = Script(status=500)
    body = (await gateway.post(model=model, messages=HELLO, tools=TOOLS)).json()
    assert (body["choices"][0]["message"]["content"], body["fusion"]["winner"]) == ("the answer of beta", 1)
    # Tools that may not be called change nothing.
    body = (await gateway.post(model=model, messages=HELLO, tools=TOOLS, tool_choice="none")).json()
    assert body["fusion"]["reason"] != "primary"
    assert "tools" not in upstream.asked("gamma")[-1]


async def test_tools_may_be_refused(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = await start_gateway(modes={"tools": "refuse"})
    for model in MODES[1:]:
        with pytest.raises(openai.BadRequestError, match="'tools' are not supported in mode"):
            await gateway.client.chat.completions.create(model=model, messages=HELLO, tools=TOOLS)
    assert (await gateway.post(model=MODES[0], messages=HELLO, tools=TOOLS)).status_code == 200


async def test_a_conversation_with_tools_goes_on(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["alpha"].tool_calls = [ROME_CALL]
    first = await gateway.client.chat.completions.create(model="alpha", messages=HELLO, tools=TOOLS)
    message = first.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    upstream.models["alpha"].tool_calls = None
    answer = await gateway.client.chat.completions.create(
        model=MODES[0], messages=[*HELLO, message.model_dump(), result], tools=TOOLS
    )
    assert answer.choices[0].message.content == "the answer of beta"
    _, called, tool_message = upstream.asked("beta")[0]["messages"]
    assert called["tool_calls"][0]["function"] == {"name": "weather", "arguments": ROME_CALL[1]}
    assert tool_message == result
    user, assistant, tool, last = upstream.asked("judge")[0]["messages"]
    assert user["content"].endswith(HELLO[0]["content"])  # after the instruction
    assert assistant["tool_calls"] == called["tool_calls"]
    assert tool == result
    assert last["content"].startswith("[A ")


async def test_a_malformed_tool_call_is_an_invalid_response(gateway: Gateway, upstream: FakeUpstream) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "type": "function"}]}
    upstream.models["alpha"].body = json.dumps({"choices": [{"message": message}]}).encode()
    response = await gateway.post(model="alpha", messages=HELLO, tools=TOOLS)
    assert (response.status_code, response.json()["error"]["type"]) == (502, "invalid_response")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "messages.0.tool_call_id"),
        ({"role": "user", "content": "x", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": ""}}]},
         "messages.0.tool_calls"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "messages.0.content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
         "messages.0.content.tuple[union[TextPart,ImagePart],...].0.ImagePart.image_url.url"),
    ],
)  # fmt: skip
async def test_what_a_message_cannot_be(gateway: Gateway, message: dict[str, Any], param: str) -> None:
    response = await gateway.post(model="alpha", messages=[message])
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param.split(".tuple", maxsplit=1)[0])


# Images

PIXEL = "data:image/png;base64,iVBORw0KGgo="
PICTURE: list[Any] = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "what is it? "}, {"type": "image_url", "image_url": {"url": PIXEL}}],
    }
]


async def test_images_go_to_the_members_that_take_them(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    def at(name: str, **keys: Any) -> dict[str, Any]:
        return {"name": name, "base_url": upstream.base_url, "model": name, **keys}

    synthesizer = {"base_url": upstream.base_url, "model": "synth", "images": True}
    members = [at("alpha"), at("beta", images=True), at("gamma", images=True)]
    gateway = await start_gateway(members, synthesizer=synthesizer)
    body = (await gateway.post(model=MODES[0], messages=PICTURE)).json()
    assert (body["fusion"]["winner"], body["choices"][0]["message"]["content"]) == (0, "the answer of beta")
    assert body["fusion"]["skipped"] == [{"member": "alpha", "reason": "no_images"}]
    assert upstream.asked("alpha") == []
    assert upstream.asked("beta")[0]["messages"] == PICTURE
    assert "[question" in upstream.asked("judge")[0]["messages"][-1]["content"]
    assert "what is it? [image]" in upstream.asked("judge")[0]["messages"][-1]["content"]
    trace = await gateway.trace(body["fusion"])
    url = trace["messages"][0]["content"][1]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,sha256:")

    await gateway.post(model="fusion/merge", messages=PICTURE)
    text, image = upstream.asked("synth")[0]["messages"][-1]["content"]
    assert "what is it? [image]" in text["text"]
    assert image == PICTURE[0]["content"][1]


async def test_all_images_are_sent(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    def at(model: str) -> dict[str, Any]:
        return {"base_url": upstream.base_url, "model": model, "images": True}

    urls = ["https://images.example/1.png", PIXEL, "https://images.example/3.png"]
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    first = {"role": "user", "content": [{"type": "text", "text": "which? "}, *pictures[:2]]}
    messages = [first, {"role": "assistant", "content": "of what?"}, {"role": "user", "content": [pictures[2]]}]
    members = [{"name": name, **at(name)} for name in ("beta", "gamma")]
    gateway = await start_gateway(members, synthesizer=at("synth"))
    assert (await gateway.post(model=MODES[1], messages=messages)).status_code == 200
    assert upstream.asked("beta")[0]["messages"] == messages
    _, first_shown, _, last = upstream.asked("synth")[0]["messages"]
    assert first_shown == first
    text, *sent = last["content"]
    assert sent == pictures[2:]
    assert text["text"].count("[image]") == 1


async def test_images_that_nobody_takes_are_refused(gateway: Gateway, upstream: FakeUpstream) -> None:
    for model in (*MODES, "alpha"):
        response = await gateway.post(model=model, messages=PICTURE)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", "messages")
        assert "images: true" in error["message"]
    assert upstream.requests == []
