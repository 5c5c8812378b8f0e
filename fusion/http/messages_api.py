"""Anthropic's Messages API on the same runs: its requests as chat completions, its answers and its events.

Source: the types of Anthropic's own client, `anthropic.types`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import orjson
from starlette.types import Send

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.trace import Trace, Usage
from mixfuse.fusion.answering.request import FusionRequest
from mixfuse.fusion.http.chat_completion import fusion_block
from mixfuse.fusion.http.completion import EventStream
from mixfuse.fusion.http.fields import Fields
from mixfuse.fusion.http.statuses import RequestError, status_of
from mixfuse.fusion.messages import Message

_TYPE_OF_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""HTTP status → the type that Anthropic's API gives an error of it; others are `api_error`."""

_STOPPED = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


@dataclass(frozen=True)
class MessagesRequest:
    """A request of the Messages API, read.

    Attributes:
        chat: The same request as the body of a chat completion.
        stream: Whether the client wants events.
    """

    chat: dict[str, Any]
    stream: bool


def read(body: object) -> MessagesRequest:
    """Reads the body of a request.

    Raises:
        RequestError: It is malformed, or asks for something that is not supported.
    """
    fields = Fields(body)
    chat: dict[str, Any] = {"model": fields.need("model", str), "max_tokens": fields.need("max_tokens", int)}
    system = fields.take("system")
    before = [] if system is None else [{"role": "system", "content": _texts(system, "system")}]
    messages = [message for turn in fields.objects("messages") for message in _turn(turn)]
    if not messages:
        raise RequestError("missing key 'messages'", code="missing_parameter", param="messages")
    chat["messages"] = [*before, *messages]
    for key in ("temperature", "top_p", "fusion"):
        chat[key] = fields.take(key)
    chat["stop"] = fields.take("stop_sequences", list)
    chat["tools"] = [_tool(tool) for tool in fields.objects("tools")] or None
    choice = fields.take("tool_choice")
    if choice is not None:
        chat |= _tool_choice(Fields(choice, "tool_choice"))
    config = Fields(fields.take("output_config") or {}, "output_config")
    chat["reasoning_effort"] = config.take("effort", str)
    form = config.take("format", dict)
    config.end()
    if form is not None:
        form_fields = Fields(form, "output_config.format")
        if form_fields.need("type", str) != "json_schema":
            raise form_fields.unsupported("type")
        schema = form_fields.need("schema", dict)
        form_fields.end()
        chat["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    thinking = Fields(fields.take("thinking") or {}, "thinking")
    if (kind := thinking.take("type", str)) == "adaptive":
        chat["include_reasoning"] = thinking.take("display", str) != "omitted"
    elif kind not in (None, "disabled"):
        raise RequestError(
            f"'thinking.type' {kind!r} is not supported here: members think as they are configured; use 'adaptive' to "
            "be shown their thoughts, and 'output_config.effort' to limit them",
            code="unsupported_parameter",
            param="thinking.type",
        )
    thinking.end()
    metadata = fields.take("metadata", dict)
    if metadata is not None:
        chat["metadata"] = metadata
    stream = bool(fields.take("stream", bool))
    fields.only("service_tier", "auto", "standard_only")
    fields.only("speed", "standard")
    fields.ignore("cache_control")
    fields.end()
    return MessagesRequest({key: value for key, value in chat.items() if value is not None}, stream)


def _turn(turn: Fields) -> list[Message]:
    """Returns the chat messages that a turn stands for: each tool result is one, before the text."""
    role = turn.need("role", str)
    if role not in ("user", "assistant", "system"):
        raise turn.wrong("role", "must be 'user' or 'assistant'")
    content = turn.take("content")
    turn.end()
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    results: list[Message] = []
    for block in Fields({"content": content}, turn.place).objects("content"):
        kind = block.need("type", str)
        block.ignore("cache_control")
        if kind in ("text", "image"):
            parts.append(_part(block, kind))
        elif kind == "tool_use" and role == "assistant":
            function = {"name": block.need("name", str), "arguments": orjson.dumps(block.need("input", dict)).decode()}
            calls.append({"id": block.need("id", str), "type": "function", "function": function})
            block.ignore("caller")
        elif kind == "tool_result" and role == "user":
            result = block.take("content")
            text = "" if result is None else _texts(result, block.at("content"))
            if block.take("is_error", bool):
                text = f"Error: {text}"
            results.append({"role": "tool", "tool_call_id": block.need("tool_use_id", str), "content": text})
        elif kind in ("thinking", "redacted_thinking") and role == "assistant":
            block.ignore("thinking", "signature", "data")  # earlier thoughts are no part of what members see
        else:
            raise _refused_block(block, kind)
        block.end()
    if calls:
        return [{"role": role, "content": parts or None, "tool_calls": calls}]
    return [*results, {"role": role, "content": parts}] if parts or not results else results


def _part(block: Fields, kind: str) -> dict[str, Any]:
    if kind == "text":
        block.ignore("citations")
        return {"type": "text", "text": block.need("text", str)}
    source = Fields(block.need("source", dict), block.at("source"))
    if (where := source.need("type", str)) == "base64":
        url = f"data:{source.need('media_type', str)};base64,{source.need('data', str)}"
    elif where == "url":
        url = source.need("url", str)
    else:
        raise source.unsupported("type")
    source.end()
    return {"type": "image_url", "image_url": {"url": url}}


def _texts(value: object, place: str) -> str:
    """Returns a text, or the texts of a list of text blocks as one."""
    if isinstance(value, str):
        return value
    texts = []
    holder, _, key = place.rpartition(".")
    for block in Fields({key: value}, holder).objects(key):
        if (kind := block.need("type", str)) != "text":
            raise _refused_block(block, kind)
        texts.append(block.need("text", str))
        block.ignore("cache_control", "citations")
        block.end()
    return "\n\n".join(texts)


def _refused_block(block: Fields, kind: str) -> RequestError:
    message = f"{block.place!r}: a block of type {kind!r} is not supported here"
    return RequestError(message, code="unsupported_parameter", param=block.place)


def _tool(tool: Fields) -> dict[str, Any]:
    if (kind := tool.take("type", str) or "custom") != "custom":
        raise RequestError(
            f"{tool.place!r}: tools of type {kind!r} are not supported here; tools with an 'input_schema' are",
            code="unsupported_parameter",
            param=tool.place,
        )
    function = {
        "name": tool.need("name", str),
        "description": tool.take("description", str),
        "parameters": tool.need("input_schema", dict),
        "strict": tool.take("strict", bool),
    }
    tool.ignore("cache_control")
    tool.end()
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _tool_choice(choice: Fields) -> dict[str, Any]:
    kind = choice.need("type", str)
    alone = choice.take("disable_parallel_tool_use", bool)
    chosen: dict[str, Any] = {} if alone is None else {"parallel_tool_calls": not alone}
    if kind == "tool":
        chosen["tool_choice"] = {"type": "function", "function": {"name": choice.need("name", str)}}
    elif kind in _CHOICES:
        chosen["tool_choice"] = _CHOICES[kind]
    else:
        raise choice.unsupported("type")
    choice.end()
    return chosen


@dataclass(frozen=True)
class MessagesWire:
    """Writes answers as messages.

    Attributes:
        request: The request as the client sent it.
    """

    request: MessagesRequest

    def whole(self, request: FusionRequest, trace: Trace, answer: str) -> dict[str, Any]:
        """Returns a `message`."""
        shown = request.thoughts if request.plan.settings.include_reasoning else None
        thoughts = [{"type": "thinking", "thinking": shown, "signature": ""}] if shown else []
        text = [{"type": "text", "text": answer}] if answer or not request.tool_calls else []
        calls = [_tool_use(call, _input(call)) for call in request.tool_calls or ()]
        return {
            **_head(self.request, request),
            "content": [*thoughts, *text, *calls],
            "stop_reason": _stop_reason(request),
            "usage": _usage(trace.usage),
            **fusion_block(request, trace),
        }

    def stream(self, send: Send, request: FusionRequest) -> "MessageStream | None":
        """Returns a stream of message events, if the client wants one."""
        return MessageStream(send, self.request, request) if self.request.stream else None

    def failure(self, error: MixfuseError, trace: Trace | None) -> dict[str, Any]:
        """Returns Anthropic's error object; the tokens used are billed even if there is no answer."""
        return failure(error, trace)


def failure(error: MixfuseError, trace: Trace | None = None) -> dict[str, Any]:
    """Returns Anthropic's error object."""
    kind = _TYPE_OF_STATUS.get(status_of(error), "api_error")
    billed = {"usage": _usage(trace.usage), "request_id": trace.id} if trace else {}
    return {"type": "error", "error": {"type": kind, "message": str(error)}, **billed}


class MessageStream(EventStream):
    """Sends a message as events: a block of thoughts where they are shown, one of text, and one for each tool call."""

    def __init__(self, send: Send, asked: MessagesRequest, request: FusionRequest) -> None:
        super().__init__(send)
        self._asked, self._request = asked, request
        self._started = False
        self._blocks = 0
        self._writing: Literal["thinking", "text"] | None = None

    async def text(self, text: str) -> None:
        """Sends a piece of the answer."""
        if self._writing != "text":
            await self._end_thoughts()
            self._writing = "text"
            await self._start_block({"type": "text", "text": ""})
        await self._delta({"type": "text_delta", "text": text})

    async def thought(self, text: str) -> None:
        """Sends a piece of the model's thoughts; none once the answer has begun."""
        if self._writing is None:
            self._writing = "thinking"
            await self._start_block({"type": "thinking", "thinking": "", "signature": ""})
        if self._writing == "thinking":
            await self._delta({"type": "thinking_delta", "thinking": text})

    async def end(self, request: FusionRequest, trace: Trace) -> None:
        """Sends the tool calls, why the message ended, and its usage."""
        await self._end_thoughts()
        if self._writing == "text":
            await self._stop_block()
        for call in request.tool_calls or ():
            await self._start_block(_tool_use(call, {}))
            await self._delta({"type": "input_json_delta", "partial_json": call["function"]["arguments"] or "{}"})
            await self._stop_block()
        await self._start()
        delta = {"stop_reason": _stop_reason(request), "stop_sequence": None}
        await self._named("message_delta", delta=delta, usage=_usage(trace.usage), **fusion_block(request, trace))
        await self._named("message_stop", more=False)

    async def fail(self, error: dict[str, Any]) -> None:
        """Ends the stream with an error event."""
        await self._event(orjson.dumps(error), name="error", more=False)

    async def _end_thoughts(self) -> None:
        if self._writing == "thinking":
            self._writing = None
            await self._stop_block()

    async def _start(self) -> None:
        if not self._started:
            self._started = True
            message = {**_head(self._asked, self._request), "content": [], "usage": _usage(Usage())}
            await self._named("message_start", message=message)

    async def _start_block(self, block: dict[str, Any]) -> None:
        await self._start()
        await self._named("content_block_start", index=self._blocks, content_block=block)

    async def _delta(self, delta: dict[str, Any]) -> None:
        await self._named("content_block_delta", index=self._blocks, delta=delta)

    async def _stop_block(self) -> None:
        await self._named("content_block_stop", index=self._blocks)
        self._blocks += 1

    async def _named(self, kind: str, /, *, more: bool = True, **data: Any) -> None:
        await self._event(orjson.dumps({"type": kind, **data}), name=kind, more=more)


def _head(asked: MessagesRequest, request: FusionRequest) -> dict[str, Any]:
    return {
        "id": f"msg_{request.id.removeprefix('trace-')}",
        "type": "message",
        "role": "assistant",
        "model": asked.chat["model"],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _stop_reason(request: FusionRequest) -> str:
    return "tool_use" if request.tool_calls else _STOPPED.get(request.finish_reason, "end_turn")


def _tool_use(call: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": arguments}


def _input(call: dict[str, Any]) -> dict[str, Any]:
    """Returns a call's arguments as an object; ones that are not JSON, as a model may write, as their text."""
    text = call["function"]["arguments"] or "{}"
    try:
        value = orjson.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"arguments": text}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }
