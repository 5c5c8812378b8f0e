"""The answer to one chat completion request, whole or streamed: runs the mode, watches the client, stores the trace."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.trace import Trace, Usage
from mixfuse.fusion.answering.request import FusionRequest
from mixfuse.fusion.http.chat import ChatRequest
from mixfuse.fusion.http.statuses import error_body, error_headers, status_of
from mixfuse.fusion.modes.registry import answer as answer_in_mode

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class JsonResponse(Response):
    """A JSON response. Written by orjson, since Starlette's own takes several times as long."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Returns the content as JSON."""
        return orjson.dumps(content)


class Completion(Response):
    """One completion under way.

    Args:
        chat_request: The request as the client sent it.
        request: The request as the modes see it.
        store: Takes its trace, once, however it ends.
    """

    def __init__(
        self, chat_request: ChatRequest, request: FusionRequest, store: Callable[[Trace], Awaitable[None]]
    ) -> None:
        self._chat_request, self._request, self._store = chat_request, request, store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers the request; called by Starlette."""
        request = self._request
        stream = _EventStream(send, self._chat_request, request) if self._chat_request.stream else None
        request.emit = stream.text if stream else None
        try:
            async with stream.kept_alive(request.plan.settings.keep_alive_ms / 1000) if stream else nullcontext():
                answer = await _unless_disconnected(receive, answer_in_mode(request))
        except ClientDisconnect:
            await self._store(request.trace(None, outcome="cancelled", error="the client went away"))
            return
        except asyncio.CancelledError:
            await self._store(request.trace(None, outcome="cancelled", error="the gateway was stopped"))
            raise
        except MixfuseError as error:
            response = await self._fail(error, stream)
        except Exception:
            logger.exception("a request failed because of a bug")
            response = await self._fail(MixfuseError("internal error", kind="internal_error"), stream)
        else:
            response = await self._succeed(answer, stream)
        if response is not None:
            await response(scope, receive, send)

    async def _succeed(self, answer: str, stream: "_EventStream | None") -> Response | None:
        """Stores the trace and ends the stream; returns the response of a request that is not streamed."""
        trace = self._request.trace(answer)
        await self._store(trace)
        if stream:
            await stream.end(self._request, trace)
            return None
        return JsonResponse(_completion(self._chat_request, self._request, trace, answer))

    async def _fail(self, failure: MixfuseError, stream: "_EventStream | None") -> Response | None:
        """Stores the trace and ends a stream that has begun; returns the response if none has begun."""
        trace = self._request.trace(None, outcome=failure.kind, error=str(failure))
        await self._store(trace)
        # The tokens used are billed even if there is no answer.
        body = {**error_body(failure), "usage": _usage(trace.usage), "trace_id": trace.id}
        if stream and stream.begun:
            await stream.fail(body)
            return None
        return JsonResponse(body, status_of(failure), error_headers(failure))


class _EventStream:
    """Sends a completion as server-sent events; the response begins with the first piece of text."""

    def __init__(self, send: Send, chat_request: ChatRequest, request: FusionRequest) -> None:
        self._send = send
        self._include_usage = chat_request.stream_options.include_usage
        self._head = {
            "id": _completion_id(request.id),
            "object": "chat.completion.chunk",
            "created": int(request.created_at),
            "model": chat_request.model,
        }
        self.begun = False
        self._role_sent = False
        self._events = 0

    @asynccontextmanager
    async def kept_alive(self, every_s: float) -> AsyncIterator[None]:
        """Sends a comment after each silence of this length until the block ends; the first begins the response.

        From then on a failure has no HTTP status any more: it is the stream's last event.
        """

        async def comment() -> None:
            while True:
                before = self._events
                await asyncio.sleep(every_s)
                if self._events == before:
                    await self._begin()
                    await self._send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})

        commenting = asyncio.create_task(comment())
        try:
            yield
        finally:
            commenting.cancel()
            await asyncio.wait({commenting})

    async def text(self, text: str) -> None:
        """Sends a piece of the answer."""
        await self._role()
        await self._chunk({"content": text})

    async def end(self, request: FusionRequest, trace: Trace) -> None:
        """Sends the tool calls, the finish reason, the `fusion` block, the usage if asked for, and the end mark."""
        await self._role()
        if request.tool_calls:
            await self._chunk(
                {"tool_calls": [{"index": place, **call} for place, call in enumerate(request.tool_calls)]}
            )
        await self._chunk({}, finish_reason=request.finish_reason, **_fusion_block(request, trace))
        if self._include_usage:
            await self._event({**self._head, "choices": [], "usage": _usage(trace.usage)})
        await self._data(b"[DONE]", more=False)

    async def fail(self, error: dict[str, Any]) -> None:
        """Ends the stream with an error event."""
        await self._data(orjson.dumps(error), more=False)

    async def _begin(self) -> None:
        if not self.begun:
            self.begun = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _role(self) -> None:
        """Sends the answer's first chunk, once."""
        await self._begin()
        if not self._role_sent:
            self._role_sent = True
            await self._chunk({"role": "assistant", "content": ""})

    async def _chunk(self, delta: dict[str, Any], *, finish_reason: str | None = None, **extra: Any) -> None:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        await self._event({**self._head, "choices": [choice], **usage, **extra})

    async def _event(self, event: dict[str, Any]) -> None:
        await self._data(orjson.dumps(event))

    async def _data(self, data: bytes, *, more: bool = True) -> None:
        self._events += 1
        await self._send({"type": "http.response.body", "body": b"data: %b\n\n" % data, "more_body": more})


async def _unless_disconnected(receive: Receive, work: Awaitable[Result]) -> Result:
    """Awaits `work` and cancels it if the client disconnects.

    Raises:
        ClientDisconnect: The client disconnected first.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait({working, leaving})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _completion(chat_request: ChatRequest, request: FusionRequest, trace: Trace, answer: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer, "refusal": None}
    if request.tool_calls:
        message |= {"content": answer or None, "tool_calls": request.tool_calls}
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
        **_fusion_block(request, trace),
    }


def _fusion_block(request: FusionRequest, trace: Trace) -> dict[str, Any]:
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
    if request.plan.skipped:
        block["skipped"] = [{"member": name, "reason": "no_images"} for name in request.plan.skipped]
    if trace.debate is not None:
        block["debate"] = {"rounds": len(trace.debate.rounds) - 1, "stopped": trace.debate.stopped}
    if (weighing := trace.weighing) is not None:
        block |= weighing.model_dump(exclude={"propensities", "domain"})
    if trace.citations is not None:
        block["citations"] = [citation.model_dump() for citation in trace.citations]
    if expose == "full":
        for shown, candidate in zip(block["candidates"], request.candidates, strict=True):
            shown["text"] = candidate.text
            if candidate.tool_calls:
                shown["tool_calls"] = candidate.tool_calls
        block["calls"] = [call.model_dump(exclude={"text", "tool_calls"}) for call in trace.calls]
    return {"fusion": block}


def _completion_id(trace_id: str) -> str:
    return f"chatcmpl-{trace_id.removeprefix('trace-')}"


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
