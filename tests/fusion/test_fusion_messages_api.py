"""The Messages API over real HTTP, with Anthropic's own client."""

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic
from fake_upstream import FakeUpstream, Script
from fusion_harness import Gateway

WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "The weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ASKED: dict[str, Any] = {
    "model": "fusion/best-of",
    "max_tokens": 50,
    "messages": [{"role": "user", "content": "Which?"}],
}


@pytest.fixture
async def claude(gateway: Gateway) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=gateway.url, api_key="unused", max_retries=0) as client:
        yield client


async def test_a_question_is_fused(claude: AsyncAnthropic, gateway: Gateway) -> None:
    message = await claude.messages.create(
        **ASKED, system="Be short.", stop_sequences=["END"], extra_body={"temperature": 0.5}
    )
    assert [(block.type, getattr(block, "text", "")) for block in message.content] == [("text", "the answer of beta")]
    assert (message.role, message.stop_reason, message.model) == ("assistant", "end_turn", "fusion/best-of")
    assert message.usage.input_tokens > 0 and message.usage.output_tokens > 0
    trace = await gateway.trace(message.model_extra["fusion"])  # type: ignore[index]
    assert trace["messages"] == [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Which?"}]
    assert trace["parameters"] == {"temperature": 0.5, "max_tokens": 50, "stop": ["END"]}


async def test_blocks_of_every_supported_type_reach_the_members(
    claude: AsyncAnthropic, gateway: Gateway, upstream: FakeUpstream
) -> None:
    await claude.messages.create(
        model="alpha",
        max_tokens=50,
        system=[
            {"type": "text", "text": "One."},
            {"type": "text", "text": "Two.", "cache_control": {"type": "ephemeral"}},
        ],
        tools=[WEATHER],  # type: ignore[list-item]
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Warm?"}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "secret thought", "signature": "s"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "20"}]},
                {"type": "text", "text": "And now?"},
            ]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c2", "name": "weather", "input": {}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c2", "is_error": True, "content": "down"}]},
        ],
    )  # fmt: skip
    (sent,) = upstream.asked("alpha")
    assert sent["messages"] == [
        {"role": "system", "content": "One.\n\nTwo."},
        {"role": "user", "content": "Warm?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "20"},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c2", "content": "Error: down"},
    ]  # fmt: skip
    assert (sent["tool_choice"], sent["parallel_tool_calls"]) == ("required", False)
    assert sent["tools"][0]["function"]["parameters"] == WEATHER["input_schema"]


async def test_tools_are_called_whole_and_streamed(claude: AsyncAnthropic, upstream: FakeUpstream) -> None:
    for model in ("alpha", "beta", "gamma"):
        upstream.models[model] = Script(tool_calls=[("weather", '{"city":"Oslo"}'), ("weather", "not JSON")])
    message = await claude.messages.create(**ASKED, tools=[WEATHER])
    assert message.stop_reason == "tool_use"
    assert [block.input for block in message.content if block.type == "tool_use"] == [
        {"city": "Oslo"},
        {"arguments": "not JSON"},
    ]
    for model in ("alpha", "beta", "gamma"):
        upstream.models[model] = Script(tool_calls=[("weather", '{"city":"Oslo"}')])
    async with claude.messages.stream(**ASKED, tools=[WEATHER]) as stream:
        final = await stream.get_final_message()
    assert [(block.type, getattr(block, "input", None)) for block in final.content] == [("tool_use", {"city": "Oslo"})]


@pytest.mark.parametrize("model", ["fusion/best-of", "fusion/merge", "alpha"])
async def test_a_stream_is_put_together_to_the_whole_message(claude: AsyncAnthropic, model: str) -> None:
    asked = ASKED | {"model": model}
    async with claude.messages.stream(**asked) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    whole = await claude.messages.create(**asked)
    assert [text] == [getattr(block, "text", "") for block in final.content]
    assert [text] == [getattr(block, "text", "") for block in whole.content]
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", whole.usage.output_tokens)


async def test_an_answer_that_is_cut_says_so(claude: AsyncAnthropic, upstream: FakeUpstream) -> None:
    upstream.models["alpha"] = Script("half", finish="length")
    message = await claude.messages.create(**(ASKED | {"model": "alpha"}))
    assert message.stop_reason == "max_tokens"


async def test_a_schema_is_kept(claude: AsyncAnthropic, upstream: FakeUpstream) -> None:
    upstream.models["alpha"] = Script('{"legs": 24}')
    schema = {"type": "object", "properties": {"legs": {"type": "integer"}}, "required": ["legs"]}
    await claude.messages.create(
        **(ASKED | {"model": "alpha"}),
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    assert upstream.asked("alpha")[0]["response_format"]["json_schema"]["schema"] == schema


async def test_failures_have_anthropics_form(claude: AsyncAnthropic, gateway: Gateway, upstream: FakeUpstream) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        await claude.messages.create(**(ASKED | {"model": "delta"}))
    assert unknown.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    upstream.models["alpha"] = Script(status=429)
    with pytest.raises(anthropic.RateLimitError):
        await claude.messages.create(**(ASKED | {"model": "alpha"}))
    upstream.models["alpha"] = Script("one two three four five six", break_after=2)
    with pytest.raises(anthropic.APIStatusError):
        async with claude.messages.stream(**(ASKED | {"model": "alpha"})) as stream:
            await stream.get_final_message()


async def test_the_key_comes_in_either_header(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = await gateway.http.post("/v1/messages", json=ASKED, headers={"x-api-key": "none"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "tool_use"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking"),
        ({"top_k": 5}, "top_k"),
        ({"container": "c"}, "container"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0"),
        ({"speed": "fast"}, "speed"),
        ({"surprise": 1}, "surprise"),
    ],
)  # fmt: skip
async def test_what_is_not_supported_is_refused_by_name(
    gateway: Gateway, upstream: FakeUpstream, change: dict[str, Any], named: str
) -> None:
    refused = await gateway.http.post("/v1/messages", json=ASKED | change)
    assert refused.status_code == 400
    body = refused.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert named in body["error"]["message"]
    assert not upstream.requests


async def test_thoughts_are_shown_where_they_are_asked_for(claude: AsyncAnthropic, upstream: FakeUpstream) -> None:
    upstream.models["alpha"] = Script("<think>three times eight</think>24")
    asked = ASKED | {"model": "alpha"}
    assert [block.type for block in (await claude.messages.create(**asked)).content] == ["text"]
    whole = await claude.messages.create(**asked, thinking={"type": "adaptive"})
    async with claude.messages.stream(**asked, thinking={"type": "adaptive"}) as stream:
        final = await stream.get_final_message()
    for message in (whole, final):
        assert [block.type for block in message.content] == ["thinking", "text"]
        assert getattr(message.content[0], "thinking", "") == "three times eight"
        assert getattr(message.content[1], "text", "") == "24"
    hidden = await claude.messages.create(**asked, thinking={"type": "adaptive", "display": "omitted"})
    assert [block.type for block in hidden.content] == ["text"]
