"""The form of OpenAI's chat completions: an answer, its stream, a failure, and the `fusion` object in each."""

from dataclasses import dataclass
from typing import Any

import orjson
from starlette.types import Send

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.trace import Trace, Usage
from mixfuse.fusion.answering.request import FusionRequest
from mixfuse.fusion.http.chat import ChatRequest
from mixfuse.fusion.http.completion import EventStream
from mixfuse.fusion.http.statuses import error_body


@dataclass(frozen=True)
class ChatWire:
    """Writes answers as chat completions.

    Attributes:
        chat_request: The request as the client sent it.
    """

    chat_request: ChatRequest

    def whole(self, request: FusionRequest, trace: Trace, answer: str) -> dict[str, Any]:
        """Returns a `chat.completion`."""
        return _completion(self.chat_request, request, trace, answer)

    def stream(self, send: Send, request: FusionRequest) -> "ChatStream | None":
        """Returns a stream of `chat.completion.chunk` events, if the client wants one."""
        return ChatStream(send, self.chat_request, request) if self.chat_request.stream else None

    def failure(self, error: MixfuseError, trace: Trace | None) -> dict[str, Any]:
        """Returns OpenAI's error object; the tokens used are billed even if there is no answer."""
        return failure(error, trace)


def failure(error: MixfuseError, trace: Trace | None) -> dict[str, Any]:
    """Returns OpenAI's error object; the tokens used are billed even if there is no answer."""
    billed = {"usage": _usage(trace.usage), "trace_id": trace.id} if trace else {}
    return {**error_body(error), **billed}


class ChatStream(EventStream):
    """Sends a completion as chunks; a failure is the last event."""

    def __init__(self, send: Send, chat_request: ChatRequest, request: FusionRequest) -> None:
        super().__init__(send)
        self._include_usage = chat_request.stream_options.include_usage
        self._head = {
            "id": _completion_id(request.id),
            "object": "chat.completion.chunk",
            "created": int(request.created_at),
            "model": chat_request.model,
        }
        self._role_sent = False

    async def text(self, text: str) -> None:
        """Sends a piece of the answer."""
        await self._role()
        await self._chunk({"content": text})

    async def thought(self, text: str) -> None:
        """Sends a piece of the model's thoughts."""
        await self._role()
        await self._chunk({"reasoning_content": text})

    async def end(self, request: FusionRequest, trace: Trace) -> None:
        """Sends the tool calls, the finish reason, the `fusion` block, the usage if asked for, and the end mark."""
        await self._role()
        if request.tool_calls:
            await self._chunk(
                {"tool_calls": [{"index": place, **call} for place, call in enumerate(request.tool_calls)]}
            )
        await self._chunk({}, finish_reason=request.finish_reason, **fusion_block(request, trace))
        if self._include_usage:
            await self._event(orjson.dumps({**self._head, "choices": [], "usage": _usage(trace.usage)}))
        await self._event(b"[DONE]", more=False)

    async def fail(self, error: dict[str, Any]) -> None:
        """Ends the stream with an error event."""
        await self._event(orjson.dumps(error), more=False)

    async def _role(self) -> None:
        """Sends the answer's first chunk, once."""
        await self._begin()
        if not self._role_sent:
            self._role_sent = True
            await self._chunk({"role": "assistant", "content": ""})

    async def _chunk(self, delta: dict[str, Any], *, finish_reason: str | None = None, **extra: Any) -> None:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        await self._event(orjson.dumps({**self._head, "choices": [choice], **usage, **extra}))


def _completion(chat_request: ChatRequest, request: FusionRequest, trace: Trace, answer: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer, "refusal": None}
    if request.tool_calls:
        message |= {"content": answer or None, "tool_calls": request.tool_calls}
    if request.plan.settings.include_reasoning:
        message["reasoning_content"] = request.thoughts
    return {
        "id": _completion_id(trace.id),
        "object": "chat.completion",
        "created": int(trace.created_at),
        "model": chat_request.model,
        "choices": [
            {
                "index": 0,
                "message": message,
                "logprobs": request.logprobs,
                "finish_reason": request.finish_reason,
            }
        ],
        "usage": _usage(trace.usage),
        **fusion_block(request, trace),
    }


def fusion_block(request: FusionRequest, trace: Trace) -> dict[str, Any]:
    """Returns how the answer was made, as far as `expose` allows, under the key `fusion`."""
    expose = request.plan.settings.expose
    if expose == "none":
        return {}
    block: dict[str, Any] = {
        "trace_id": trace.id,
        "mode": trace.mode,
        "reason": trace.reason,
        "error": trace.error,
        "winner": trace.winner,
        "candidates": [
            {"candidate": candidate.index, "member": candidate.member.name} for candidate in request.candidates
        ],
        "verdicts": [verdict.model_dump() for verdict in trace.verdicts],
        "failed": [
            {
                "member": call.member,
                "candidate": call.candidate,
                "stage": call.stage,
                "type": call.outcome,
                "message": call.error,
            }
            for call in trace.calls
            if call.outcome != "ok"
        ],
        "cost": sum(call.cost for call in trace.calls),
        "latency_ms": round(trace.duration_ms, 1),
    }
    if trace.cached_from is not None:
        block["cached_from"] = trace.cached_from
    if request.plan.skipped:
        block["skipped"] = [{"member": name, "reason": "no_images"} for name in request.plan.skipped]
    if trace.debate is not None:
        block["debate"] = {"rounds": len(trace.debate.rounds) - 1, "stopped": trace.debate.stopped}
    if (weighing := trace.weighing) is not None:
        block |= weighing.model_dump(exclude={"propensities", "domain"})
    if trace.analysis is not None:
        block["analysis"] = trace.analysis.model_dump()
    if trace.citations is not None:
        block["citations"] = [citation.model_dump() for citation in trace.citations]
    if expose == "full":
        for shown, candidate in zip(block["candidates"], request.candidates, strict=True):
            shown["text"] = candidate.text
            if candidate.tool_calls:
                shown["tool_calls"] = candidate.tool_calls
        # What a member wrote stands with its candidate; what a judge wrote, nowhere else.
        unsaid = {"thoughts", "tool_calls"}
        block["calls"] = [
            call.model_dump(exclude=unsaid if call.stage == "verdict" else {*unsaid, "text"}) for call in trace.calls
        ]
    return {"fusion": block}


def _completion_id(trace_id: str) -> str:
    return f"chatcmpl-{trace_id.removeprefix('trace-')}"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
