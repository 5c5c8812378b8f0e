"""OpenAI's Responses API on the same runs: its requests as chat completions, its answers and its events.

Source: the types of OpenAI's own client, `openai.types.responses`.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.types import Send

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.trace import Trace, Usage
from mixfuse.fusion.answering.request import FusionRequest
from mixfuse.fusion.http.chat_completion import fusion_block
from mixfuse.fusion.http.completion import EventStream
from mixfuse.fusion.http.fields import Fields
from mixfuse.fusion.http.statuses import RequestError, error_body
from mixfuse.fusion.messages import Message

# Parameters of the API that are not supported, with the values that change nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "background": (False,),
    "truncation": ("disabled",),
    "service_tier": ("auto", "default"),
}
_ECHOED = (
    "instructions",
    "max_output_tokens",
    "metadata",
    "previous_response_id",
    "reasoning",
    "store",
    "temperature",
    "top_p",
    "user",
)
_INCLUDABLE = ("message.output_text.logprobs", "reasoning.encrypted_content")


@dataclass(frozen=True)
class ResponsesRequest:
    """A request of the Responses API, read.

    Attributes:
        chat: The same request as the body of a chat completion; its messages do not have those of `previous` yet.
        previous: The id of the trace of the response that it continues.
        stream: Whether the client wants events.
        echo: What a response repeats of its request.
    """

    chat: dict[str, Any]
    previous: str | None
    stream: bool
    echo: dict[str, Any]


def read(body: object) -> ResponsesRequest:
    """Reads the body of a request.

    Raises:
        RequestError: It is malformed, or asks for something that is not supported.
    """
    fields = Fields(body)
    echo = {key: body.get(key) for key in _ECHOED} if isinstance(body, dict) else {}
    chat: dict[str, Any] = {"model": fields.need("model", str)}
    instructions = fields.take("instructions", str)
    messages = [{"role": "system", "content": instructions}] if instructions else []
    chat["messages"] = [*messages, *_messages(fields)]
    for key in ("temperature", "top_p", "parallel_tool_calls", "metadata", "fusion", "plugins"):
        chat[key] = fields.take(key)
    for key in ("user", "safety_identifier", "prompt_cache_key"):
        chat[key] = fields.take(key, str)
    chat["max_tokens"] = fields.take("max_output_tokens", int)
    chat["response_format"], chat["verbosity"] = _text(fields)
    reasoning = Fields(fields.take("reasoning") or {}, "reasoning")
    chat["reasoning_effort"] = reasoning.take("effort", str)
    if reasoning.take("summary", str) is not None:  # there is one form of thoughts here, whatever summary is wanted
        chat["include_reasoning"] = True
    reasoning.end()
    tools = list(fields.take("tools", list) or ())
    chat["tools"] = [_tool(Fields(tool, f"tools.{number}")) for number, tool in enumerate(tools)] or None
    choice = fields.take("tool_choice")
    chat["tool_choice"] = _tool_choice(Fields(choice, "tool_choice")) if isinstance(choice, dict) else choice
    for number, included in enumerate(fields.take("include", list) or ()):
        if included not in _INCLUDABLE:
            raise RequestError(
                f"'include.{number}': {included!r} is not supported here; {' and '.join(_INCLUDABLE)} are",
                code="unsupported_parameter",
                param="include",
            )
        if included == _INCLUDABLE[0]:
            chat["logprobs"] = True
    chat["top_logprobs"] = fields.take("top_logprobs", int)
    if chat["top_logprobs"] is not None:
        chat["logprobs"] = True
    previous = fields.take("previous_response_id", str)
    stream = bool(fields.take("stream", bool))
    options = Fields(fields.take("stream_options") or {}, "stream_options")
    options.only("include_obfuscation", False)
    options.end()
    for key, neutral in _NEUTRAL.items():
        fields.only(key, *neutral)
    # Traces are stored as the config says, whatever the request wants.
    fields.ignore("store", "prompt_cache_retention")
    fields.end()
    echo |= {"tools": tools, "tool_choice": choice or "auto", "text": _echoed_text(chat)}
    echo["parallel_tool_calls"] = chat["parallel_tool_calls"] is not False
    wanted = {key: value for key, value in chat.items() if value is not None}
    return ResponsesRequest(wanted, None if previous is None else trace_id(previous), stream, echo)


def trace_id(response_id: str) -> str:
    """Returns the id of the trace of a response.

    Raises:
        RequestError: It is no response's id.
    """
    if not response_id.startswith("resp_"):
        raise RequestError(
            f"{response_id!r} is no response's id; it begins with 'resp_'",
            code="invalid_value",
            param="previous_response_id",
        )
    return f"trace-{response_id.removeprefix('resp_')}"


def continued(request: ResponsesRequest, trace: Trace | None) -> dict[str, Any]:
    """Returns the chat request with the conversation that a stored trace holds before its own messages.

    Instructions are those of this request alone, as at OpenAI.

    Raises:
        RequestError: There is no such trace, or it does not hold the whole conversation.
    """
    param = "previous_response_id"
    if trace is None or trace.answer is None:
        raise RequestError(
            "there is no such response, or it failed", code="previous_response_not_found", param=param, status=404
        )
    if not trace.messages:
        raise RequestError(
            "the text of that response was not stored (traces.store_text); send the conversation as 'input'",
            code="previous_response_not_found",
            param=param,
        )
    if any(isinstance(message["content"], list) for message in trace.messages):
        raise RequestError(
            "that conversation has images, which are not stored; send the conversation as 'input'",
            code="unsupported_parameter",
            param=param,
        )
    before = [message for message in trace.messages if message["role"] != "system"]
    answer: Message = {"role": "assistant", "content": trace.answer}
    if trace.tool_calls:
        answer["tool_calls"] = trace.tool_calls
    own = request.chat["messages"]
    system, rest = (own[:1], own[1:]) if request.echo.get("instructions") else ([], own)
    return {**request.chat, "messages": [*system, *before, answer, *rest]}


def _messages(fields: Fields) -> list[Message]:
    """Returns the input as chat messages; calls that follow one another are one message, as they were one answer."""
    value = fields.take("input")
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise RequestError("'input' must be a text or a list of items", code="invalid_value", param="input")
    messages: list[Message] = []
    for number, item in enumerate(value):
        one = Fields(item, f"input.{number}")
        kind = one.take("type", str) or "message"
        one.ignore("id", "status")
        if kind == "message":
            messages.append(_message(one))
        elif kind == "function_call":
            call = {
                "id": one.need("call_id", str),
                "type": "function",
                "function": {"name": one.need("name", str), "arguments": one.need("arguments", str)},
            }
            last = messages[-1] if messages else None
            if last is None or last["role"] != "assistant":
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            else:
                last["tool_calls"] = [*last.get("tool_calls", ()), call]
        elif kind == "function_call_output":
            output = one.take("output")
            content = output if isinstance(output, str) else _content(Fields({"output": output}, one.place), "output")
            messages.append({"role": "tool", "tool_call_id": one.need("call_id", str), "content": content})
        elif kind == "reasoning":
            # Earlier thoughts are no part of the conversation that members see.
            one.ignore("summary", "content", "encrypted_content")
        else:
            raise RequestError(
                f"'input.{number}': items of type {kind!r} are not supported here",
                code="unsupported_parameter",
                param=f"input.{number}",
            )
        one.end()
    return messages


def _message(one: Fields) -> Message:
    role = one.need("role", str)
    one.ignore("phase")
    content = one.take("content")
    if not isinstance(content, str):
        content = _content(Fields({"content": content}, one.place), "content")
    return {"role": role, "content": content}


def _content(holder: Fields, key: str) -> Any:
    parts: list[dict[str, Any]] = []
    for part in holder.objects(key):
        kind = part.need("type", str)
        if kind in ("input_text", "output_text", "text"):
            parts.append({"type": "text", "text": part.need("text", str)})
            part.ignore("annotations", "logprobs")
        elif kind == "refusal":
            parts.append({"type": "text", "text": part.need("refusal", str)})
        elif kind == "input_image" and part.take("file_id") is None:
            image = {"url": part.need("image_url", str), "detail": part.take("detail", str)}
            parts.append({"type": "image_url", "image_url": {k: v for k, v in image.items() if v is not None}})
        else:
            raise RequestError(
                f"{part.place!r}: content of type {kind!r} is not supported here; text and images by URL are",
                code="unsupported_parameter",
                param=part.place,
            )
        part.end()
    return parts


def _text(fields: Fields) -> tuple[dict[str, Any] | None, str | None]:
    """Returns (chat's `response_format`, the verbosity)."""
    text = Fields(fields.take("text") or {}, "text")
    form = text.take("format", dict)
    verbosity = text.take("verbosity", str)
    text.end()
    if form is None or form.get("type") == "text":
        return None, verbosity
    if form.get("type") != "json_schema":
        return form, verbosity
    return {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}, verbosity


def _echoed_text(chat: dict[str, Any]) -> dict[str, Any]:
    form = chat["response_format"] or {"type": "text"}
    return {"format": {"type": form["type"], **form.get("json_schema", {})} if "type" in form else form}


def _tool(tool: Fields) -> dict[str, Any]:
    kind = tool.need("type", str)
    if kind != "function":
        raise RequestError(
            f"{tool.place!r}: tools of type {kind!r} are not supported here; 'function' is",
            code="unsupported_parameter",
            param=tool.place,
        )
    function = {key: tool.take(key) for key in ("name", "description", "parameters", "strict")}
    tool.end()
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _tool_choice(choice: Fields) -> dict[str, Any]:
    if choice.take("type", str) != "function":
        raise choice.unsupported("type")
    name = choice.need("name", str)
    choice.end()
    return {"type": "function", "function": {"name": name}}


@dataclass(frozen=True)
class ResponsesWire:
    """Writes answers as responses.

    Attributes:
        request: The request as the client sent it.
    """

    request: ResponsesRequest

    def whole(self, request: FusionRequest, trace: Trace, answer: str) -> dict[str, Any]:
        """Returns a `response`."""
        shown = request.thoughts if request.plan.settings.include_reasoning else None
        return _response(self.request, request, trace, _items(request, answer, shown or ""))

    def stream(self, send: Send, request: FusionRequest) -> "ResponseStream | None":
        """Returns a stream of `response.…` events, if the client wants one."""
        return ResponseStream(send, self.request, request) if self.request.stream else None

    def failure(self, error: MixfuseError, trace: Trace | None) -> dict[str, Any]:
        """Returns OpenAI's error object; the tokens used are billed even if there is no answer."""
        billed = {"usage": _usage(trace.usage), "trace_id": trace.id} if trace else {}
        return {**error_body(error), **billed}


@dataclass
class _Open:
    """An item that a stream is writing."""

    item_id: str
    place: int
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class ResponseStream(EventStream):
    """Sends a response as events: thoughts if the client asked for them, the message, and a tool call after another.

    An item is opened by its first piece of text.
    """

    def __init__(self, send: Send, asked: ResponsesRequest, request: FusionRequest) -> None:
        super().__init__(send)
        self._asked, self._request = asked, request
        self._number = 0
        self._created = False
        self._thoughts: _Open | None = None
        self._message: _Open | None = None

    async def text(self, text: str) -> None:
        """Sends a piece of the answer."""
        message = self._message or await self._open_message()
        message.pieces.append(text)
        await self._part("output_text.delta", message, content_index=0, delta=text, logprobs=[])

    async def thought(self, text: str) -> None:
        """Sends a piece of the model's thoughts; none once the answer has begun."""
        if self._message is None:
            thoughts = self._thoughts or await self._open_thoughts()
            thoughts.pieces.append(text)
            await self._part("reasoning_summary_text.delta", thoughts, summary_index=0, delta=text)

    async def end(self, request: FusionRequest, trace: Trace) -> None:
        """Sends the ends of the message, the tool calls, and the whole response."""
        await self._create()
        if self._message is None:
            await self._close_thoughts()
        items = _items(
            request,
            self._message.text if self._message else "",
            self._thoughts.text if self._thoughts else "",
        )
        for place, item in enumerate(items):
            if item["type"] == "message":
                message = self._message or await self._open_message()
                part = item["content"][0]
                await self._part("output_text.done", message, content_index=0, text=part["text"], logprobs=[])
                await self._part("content_part.done", message, content_index=0, part=part)
            elif item["type"] == "function_call":
                begun = {**item, "arguments": "", "status": "in_progress"}
                await self._named("output_item.added", output_index=place, item=begun)
                call = _Open(item["id"], place)
                await self._part("function_call_arguments.delta", call, delta=item["arguments"])
                await self._part("function_call_arguments.done", call, arguments=item["arguments"], name=item["name"])
            else:
                continue  # it ended where the answer began
            await self._named("output_item.done", output_index=place, item=item)
        response = _response(self._asked, request, trace, items)
        await self._named(response["status"], more=False, response=response)

    async def fail(self, error: dict[str, Any]) -> None:
        """Ends the stream with a failed response."""
        await self._create()
        told = {"code": error["error"]["code"], "message": error["error"]["message"]}
        response = {**_head(self._asked, self._request, "failed"), "error": told, "usage": error.get("usage")}
        await self._named("failed", more=False, response=response)

    async def _create(self) -> None:
        """Sends the stream's first two events, once."""
        if not self._created:
            self._created = True
            begun = _head(self._asked, self._request, "in_progress")
            await self._named("created", response=begun)
            await self._named("in_progress", response=begun)

    async def _open_message(self) -> _Open:
        await self._create()
        await self._close_thoughts()
        item = {**_message_item(self._request, ""), "status": "in_progress", "content": []}
        message = self._message = _Open(item["id"], 1 if self._thoughts else 0)
        await self._named("output_item.added", output_index=message.place, item=item)
        await self._part("content_part.added", message, content_index=0, part=_text_part("", None))
        return message

    async def _open_thoughts(self) -> _Open:
        await self._create()
        item = {**_reasoning_item(self._request, ""), "summary": []}
        thoughts = self._thoughts = _Open(item["id"], 0)
        await self._named("output_item.added", output_index=0, item=item)
        await self._part("reasoning_summary_part.added", thoughts, summary_index=0, part=_summary(""))
        return thoughts

    async def _close_thoughts(self) -> None:
        """Sends the end of the thoughts, where there are any; what follows is the answer."""
        if (thoughts := self._thoughts) is not None:
            text = thoughts.text
            await self._part("reasoning_summary_text.done", thoughts, summary_index=0, text=text)
            await self._part("reasoning_summary_part.done", thoughts, summary_index=0, part=_summary(text))
            await self._named("output_item.done", output_index=0, item=_reasoning_item(self._request, text))

    async def _part(self, kind: str, of: _Open, **data: Any) -> None:
        await self._named(kind, item_id=of.item_id, output_index=of.place, **data)

    async def _named(self, kind: str, /, *, more: bool = True, **data: Any) -> None:
        name = f"response.{kind}"
        event = {"type": name, "sequence_number": self._number, **data}
        self._number += 1
        await self._event(orjson.dumps(event), name=name, more=more)


def _head(asked: ResponsesRequest, request: FusionRequest, status: str) -> dict[str, Any]:
    return {
        "id": f"resp_{request.id.removeprefix('trace-')}",
        "object": "response",
        "created_at": int(request.created_at),
        "model": asked.chat["model"],
        "status": status,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "usage": None,
        "background": False,
        "service_tier": "default",
        "truncation": "disabled",
        **asked.echo,
    }


def _response(
    asked: ResponsesRequest, request: FusionRequest, trace: Trace, items: list[dict[str, Any]]
) -> dict[str, Any]:
    reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(request.finish_reason)
    return {
        **_head(asked, request, "incomplete" if reason else "completed"),
        "completed_at": int(time.time()),
        "output": items,
        "incomplete_details": {"reason": reason} if reason else None,
        "usage": _usage(trace.usage),
        **fusion_block(request, trace),
    }


def _items(request: FusionRequest, answer: str, thoughts: str) -> list[dict[str, Any]]:
    """Returns the items of an answer: the thoughts that are shown, its text, then its tool calls."""
    items = [_reasoning_item(request, thoughts)] if thoughts else []
    if answer or not request.tool_calls:
        items.append(_message_item(request, answer))
    for number, call in enumerate(request.tool_calls or ()):
        items.append(
            {
                "id": f"fc_{request.id.removeprefix('trace-')}_{number}",
                "type": "function_call",
                "call_id": call["id"],
                "name": call["function"]["name"],
                "arguments": call["function"]["arguments"],
                "status": "completed",
            }
        )
    return items


def _message_item(request: FusionRequest, answer: str) -> dict[str, Any]:
    return {
        "id": f"msg_{request.id.removeprefix('trace-')}",
        "type": "message",
        "role": "assistant",
        "status": "incomplete" if request.finish_reason == "length" else "completed",
        "content": [_text_part(answer, request.logprobs)],
    }


def _reasoning_item(request: FusionRequest, thoughts: str) -> dict[str, Any]:
    return {"id": f"rs_{request.id.removeprefix('trace-')}", "type": "reasoning", "summary": [_summary(thoughts)]}


def _summary(text: str) -> dict[str, Any]:
    return {"type": "summary_text", "text": text}


def _text_part(text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": (logprobs or {}).get("content") or []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }
