"""A request on its way from its mode to the client, in any API: runs the mode, watches the client, stores the trace.

The API's own form of an answer is a `Wire`: chat completions are in `chat_completion`.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.trace import Trace
from mixfuse.fusion.answering.request import FusionRequest
from mixfuse.fusion.http.statuses import error_headers, status_of, without_names
from mixfuse.fusion.modes.registry import answer as answer_in_mode

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Wire(Protocol):
    """How an API writes an answer, a stream and a failure."""

    def whole(self, request: FusionRequest, trace: Trace, answer: str) -> dict[str, Any]:
        """Returns the body of an answer that is not streamed."""

    def stream(self, send: Send, request: FusionRequest) -> "EventStream | None":
        """Returns what streams the answer; None if the client wants it whole."""

    def failure(self, error: MixfuseError, trace: Trace | None) -> dict[str, Any]:
        """Returns the body of a failure; `trace` if calls may have been made, which are billed."""


class JsonResponse(Response):
    """A JSON response. Written by orjson, since Starlette's own takes several times as long."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Returns the content as JSON."""
        return orjson.dumps(content)


class Completion(Response):
    """One completion under way.

    Args:
        wire: The form of the API that the client speaks.
        request: The request as the modes see it.
        store: Takes its trace, once, however it ends.
        work_out: Answers it.
    """

    def __init__(
        self,
        wire: Wire,
        request: FusionRequest,
        store: Callable[[Trace], Awaitable[None]],
        work_out: Callable[[FusionRequest], Awaitable[str]] = answer_in_mode,
    ) -> None:
        self._wire, self._request, self._store, self._work_out = wire, request, store, work_out

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers the request; called by Starlette."""
        request = self._request
        stream = self._wire.stream(send, request)
        request.emit = stream.text if stream else None
        request.think = stream.thought if stream and request.plan.settings.include_reasoning else None
        try:
            async with stream.kept_alive(request.plan.settings.keep_alive_ms / 1000) if stream else nullcontext():
                answer = await _unless_disconnected(receive, self._work_out(request))
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

    async def _succeed(self, answer: str, stream: "EventStream | None") -> Response | None:
        """Stores the trace and ends the stream; returns the response of a request that is not streamed."""
        trace = self._request.trace(answer)
        await self._store(trace)
        if stream:
            await stream.end(self._request, trace)
            return None
        return JsonResponse(self._wire.whole(self._request, trace, answer))

    async def _fail(self, failure: MixfuseError, stream: "EventStream | None") -> Response | None:
        """Stores the trace and ends a stream that has begun; returns the response if none has begun."""
        trace = self._request.trace(None, outcome=failure.kind, error=str(failure))
        await self._store(trace)
        if self._request.plan.settings.expose == "none":
            failure = without_names(failure)
        body = self._wire.failure(failure, trace)
        if stream and stream.begun:
            await stream.fail(body)
            return None
        return JsonResponse(body, status_of(failure), error_headers(failure))


class EventStream:
    """Sends an answer as server-sent events; the response begins with the first event or comment.

    An API's stream says what the events are: `text`, `end` and `fail`.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False
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
        raise NotImplementedError

    async def thought(self, text: str) -> None:
        """Sends a piece of the model's thoughts; an API that has no form for them sends nothing."""

    async def end(self, request: FusionRequest, trace: Trace) -> None:
        """Sends what follows the text, and ends the stream."""
        raise NotImplementedError

    async def fail(self, error: dict[str, Any]) -> None:
        """Ends the stream with an error event."""
        raise NotImplementedError

    async def _begin(self) -> None:
        if not self.begun:
            self.begun = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _event(self, data: bytes, *, name: str | None = None, more: bool = True) -> None:
        """Sends one event.

        Args:
            data: Its data, one line.
            name: Its name, where the API names events.
            more: Whether the stream goes on.
        """
        await self._begin()
        self._events += 1
        named = b"event: %b\n" % name.encode() if name else b""
        await self._send({"type": "http.response.body", "body": b"%bdata: %b\n\n" % (named, data), "more_body": more})


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
