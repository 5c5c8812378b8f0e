"""The Responses API over real HTTP, with OpenAI's own client."""

from typing import Any

import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import Gateway, StartGateway
from openai import BadRequestError, NotFoundError
from pydantic import BaseModel

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "The weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


async def test_a_question_is_fused_and_the_response_repeats_its_request(gateway: Gateway) -> None:
    response = await gateway.client.responses.create(
        model="fusion/best-of", input="Which?", instructions="Be short.", temperature=0.5, max_output_tokens=50
    )
    assert response.output_text == "the answer of beta"
    assert (response.status, response.object, response.model) == ("completed", "response", "fusion/best-of")
    assert (response.instructions, response.temperature, response.max_output_tokens) == ("Be short.", 0.5, 50)
    assert response.usage is not None and response.usage.total_tokens > 0
    fusion = response.model_extra["fusion"]  # type: ignore[index]
    assert fusion["reason"] == "judged"
    assert response.id.removeprefix("resp_") == fusion["trace_id"].removeprefix("trace-")
    trace = await gateway.trace(fusion)
    assert trace["messages"] == [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Which?"}]
    assert trace["parameters"] == {"temperature": 0.5, "max_tokens": 50}


async def test_items_of_every_supported_type_reach_the_members(gateway: Gateway, upstream: FakeUpstream) -> None:
    await gateway.client.responses.create(
        model="alpha",
        tools=[WEATHER],  # type: ignore[list-item]
        input=[  # type: ignore[arg-type]
            {"role": "developer", "content": "Use the tool."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "How warm"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "secret thought"}]},
            {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [
                {"type": "output_text", "text": "I look.", "annotations": []}]},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}", "status": "completed"},
            {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "20"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "21"}]},
        ],
    )  # fmt: skip
    (sent,) = upstream.asked("alpha")
    assert [message["role"] for message in sent["messages"]] == ["system", "user", "assistant", "tool", "tool"]
    assert [call["id"] for call in sent["messages"][2]["tool_calls"]] == ["c1", "c2"]
    assert [message["content"] for message in sent["messages"][3:]] == ["20", "21"]
    assert "secret thought" not in str(sent)
    assert sent["tools"][0]["function"]["name"] == "weather"


async def test_who_asks_is_passed_on_as_in_chat_completions(gateway: Gateway, upstream: FakeUpstream) -> None:
    await gateway.client.responses.create(
        model="alpha", input="Which?", user="u1", safety_identifier="s1", prompt_cache_key="k1"
    )
    (sent,) = upstream.asked("alpha")
    assert (sent["user"], sent["safety_identifier"], sent["prompt_cache_key"]) == ("u1", "s1", "k1")


async def test_a_response_is_continued_by_its_id_with_its_own_instructions_alone(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    first = await gateway.client.responses.create(model="alpha", input="First?", instructions="Old.")
    second = await gateway.client.responses.create(
        model="alpha", input="Second?", instructions="New.", previous_response_id=first.id
    )
    third = await gateway.client.responses.create(model="alpha", input="Third?", previous_response_id=second.id)
    asked = [[message["content"] for message in request["messages"]] for request in upstream.asked("alpha")]
    answer = "the answer of alpha"
    assert asked[1] == ["New.", "First?", answer, "Second?"]
    assert asked[2] == ["First?", answer, "Second?", answer, "Third?"]
    assert third.previous_response_id == second.id
    with pytest.raises(NotFoundError, match="no such response"):
        await gateway.client.responses.create(model="alpha", input="?", previous_response_id="resp_0")
    with pytest.raises(BadRequestError, match="begins with 'resp_'"):
        await gateway.client.responses.create(model="alpha", input="?", previous_response_id="chatcmpl-0")


async def test_without_stored_text_no_response_can_be_continued(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(traces={"store_text": False})
    first = await gateway.client.responses.create(model="alpha", input="First?")
    with pytest.raises((BadRequestError, NotFoundError)) as refused:
        await gateway.client.responses.create(model="alpha", input="?", previous_response_id=first.id)
    assert refused.value.param == "previous_response_id"


async def test_tools_are_called_and_structured_output_is_parsed(gateway: Gateway, upstream: FakeUpstream) -> None:
    class Count(BaseModel):
        legs: int

    for model in ("alpha", "beta", "gamma"):
        upstream.models[model] = Script(tool_calls=[("weather", '{"city":"Oslo"}')])
    called = await gateway.client.responses.create(model="fusion/best-of", input="Warm?", tools=[WEATHER])  # type: ignore[list-item]
    (item,) = called.output
    assert item.type == "function_call"
    assert (item.name, item.arguments) == ("weather", '{"city":"Oslo"}')
    for model in ("alpha", "beta", "gamma"):
        upstream.models[model] = Script('{"legs": 24}')
    parsed = await gateway.client.responses.parse(model="fusion/best-of", input="Legs?", text_format=Count)
    assert parsed.output_parsed == Count(legs=24)
    assert upstream.asked("alpha")[-1]["response_format"]["json_schema"]["name"] == "Count"


@pytest.mark.parametrize("model", ["fusion/best-of", "fusion/merge", "alpha"])
async def test_a_stream_has_the_events_that_the_client_puts_together(gateway: Gateway, model: str) -> None:
    seen: list[str] = []
    text = ""
    async with gateway.client.responses.stream(model=model, input="Which?") as stream:
        async for event in stream:
            seen.append(event.type)
            if event.type == "response.output_text.delta":
                text += event.delta
        final = await stream.get_final_response()
    whole = await gateway.client.responses.create(model=model, input="Which?")
    assert text == final.output_text == whole.output_text
    assert seen[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert [kind for kind in seen if not kind.endswith(".delta")][4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert final.usage is not None and final.usage.total_tokens > 0


async def test_a_stream_with_tool_calls_and_one_that_is_cut(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["alpha"] = Script(tool_calls=[("weather", '{"city":"Oslo"}'), ("weather", "{}")])
    async with gateway.client.responses.stream(model="alpha", input="Warm?", tools=[WEATHER]) as stream:  # type: ignore[list-item]
        final = await stream.get_final_response()
    assert [(item.type, getattr(item, "arguments", "")) for item in final.output] == [
        ("function_call", '{"city":"Oslo"}'),
        ("function_call", "{}"),
    ]
    upstream.models["alpha"] = Script("half", finish="length")
    cut = await gateway.client.responses.create(model="alpha", input="Long?", max_output_tokens=1)
    assert cut.status == "incomplete" and cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"


async def test_a_stream_that_fails_after_it_began_ends_with_a_failed_response(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.models["alpha"] = Script("one two three four five six", break_after=2)
    events = [event async for event in await gateway.client.responses.create(model="alpha", input="?", stream=True)]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None
    assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input.0.content.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "input.0.content.0"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["x"]}, "input.0"),
        ({"text": {"format": {"type": "grammar"}}}, None),
        ({"max_output_tokens": True}, "max_output_tokens"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"surprise": 1}, "surprise"),
        ({"model": None}, "model"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(
    gateway: Gateway, upstream: FakeUpstream, change: dict[str, Any], param: str | None
) -> None:
    refused = await gateway.http.post("/v1/responses", json={"model": "alpha", "input": "?"} | change)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    assert not upstream.requests


async def test_a_model_is_found_by_its_name_even_with_a_slash(gateway: Gateway) -> None:
    assert (await gateway.client.models.retrieve("fusion/merge")).id == "fusion/merge"
    assert (await gateway.client.models.retrieve("alpha")).id == "alpha"
    with pytest.raises(NotFoundError):
        await gateway.client.models.retrieve("delta")


async def test_thoughts_are_shown_where_they_are_asked_for(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["alpha"] = Script("<think>three times eight</think>24")
    asked: dict[str, Any] = {"model": "alpha", "input": "Legs?"}
    assert [item.type for item in (await gateway.client.responses.create(**asked)).output] == ["message"]
    whole = await gateway.client.responses.create(**asked, reasoning={"summary": "auto"})
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert whole.output_text == "24"
    seen: list[str] = []
    async with gateway.client.responses.stream(**asked, reasoning={"summary": "auto"}) as stream:
        async for event in stream:
            seen.append(event.type)
        final = await stream.get_final_response()
    assert final.output[0].model_dump()["summary"][0]["text"] == "three times eight"
    assert final.output_text == "24"
    assert [kind for kind in seen if "item" in kind] == ["response.output_item.added", "response.output_item.done"] * 2


async def test_a_kept_answer_is_shown_with_its_thoughts_to_who_asks_for_them(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.models["alpha"] = Script("<think>three times eight</think>24")
    asked: dict[str, Any] = {"model": "alpha", "input": "Legs?", "extra_body": {"fusion": {"cache": True}}}
    first = await gateway.client.responses.create(**asked)
    await gateway.trace(first.model_extra["fusion"])  # type: ignore[index]
    again = await gateway.client.responses.create(**asked, reasoning={"summary": "auto"})
    assert len(upstream.asked("alpha")) == 1
    assert [item.type for item in again.output] == ["reasoning", "message"]
