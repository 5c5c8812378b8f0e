"""The gateway: the fusion runtime behind OpenAI's HTTP API."""

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Any, TypeVar

import orjson
from prometheus_client import CONTENT_TYPE_LATEST as METRICS_TYPE
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from mixfuse.contracts.database import Database, probe
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.trace import Trace, Usage
from mixfuse.fusion.answering.request import Mode, Run, TooFewAnswersError
from mixfuse.fusion.calls.failures import STATUS
from mixfuse.fusion.calls.ledger import Budget, Ledger
from mixfuse.fusion.calls.model_limits import Circuit
from mixfuse.fusion.calls.pool import Pool, RoleSource
from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.http import chat
from mixfuse.fusion.http.chat import MODELS, ChatRequest, RequestError
from mixfuse.fusion.http.gateway_metrics import Metrics
from mixfuse.fusion.http.keys import ADMIN_KEY, KeyRing, UnauthorizedError, is_admin
from mixfuse.fusion.http.spans import Spans
from mixfuse.fusion.modes.best_of import best_of
from mixfuse.fusion.modes.debate import debate
from mixfuse.fusion.modes.merge import merge
from mixfuse.fusion.store.traces import TraceStore

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

# How long the end of a gateway waits for requests that are being cancelled to leave their traces.
_LEAVE_S = 5.0


async def pass_through(run: Run) -> str:
    """Answers with one model's own completion.

    Raises:
        CallError: The model gave no usable answer.
    """
    return await run.primary("pass_through")


MODES: dict[Mode, Callable[[Run], Awaitable[str]]] = {
    "best_of": best_of,
    "merge": merge,
    "debate": debate,
    "pass_through": pass_through,
}


Check = Callable[[], bool]
"""Whether something the gateway needs is well; `/readyz` asks."""

Observer = Callable[[Trace], None]
"""Told of each finished trace, its texts included even where none are stored, and once more for each feedback that
comes later (`Trace.feedback` is not empty then). Called from the event loop: it must return at once.
"""


def create_app(
    config: FusionConfig,
    roles: RoleSource | None,
    *,
    extra_routes: Sequence[BaseRoute] = (),
    checks: Mapping[str, Check] | None = None,
    observers: Sequence[Observer] = (),
    collectors: Sequence[Collector] = (),
) -> Starlette:
    """Builds the gateway.

    Args:
        config: Pool, judge, synthesizer and modes.
        roles: Where roles are served; None for a gateway without a server beside it.
        extra_routes: More routes, served before the gateway's own.
        checks: What else has to be well for `/readyz`, by name.
        observers: Told of finished traces; one that raises is logged, and no request fails because of it.
        collectors: What else `/metrics` shows.

    Raises:
        MixfuseError: The config names a role, but there is no server beside this gateway; or the trace
            database cannot be opened.
    """
    models = [*config.members, *filter(None, (config.judge, config.synthesizer))]
    role = next((model.role for model in models if model.role), None)
    if roles is None and role is not None:
        raise MixfuseError(f"role {role!r}: this gateway has no server beside it; name a base_url and model")
    gateway = _Gateway(config, Pool(roles), Database(config.trace_db), checks or {}, observers)
    for collector in collectors:
        gateway.metrics.show(collector)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with gateway.running():
            yield

    return Starlette(
        routes=[
            *extra_routes,
            Route("/v1/chat/completions", gateway.chat_completions, methods=["POST"]),
            Route("/v1/models", gateway.list_models),
            Route("/v1/traces", gateway.list_traces),
            Route("/v1/traces/{id}", gateway.get_trace),
            Route("/v1/traces/{id}/feedback", gateway.add_feedback, methods=["POST"]),
            Route("/healthz", gateway.health),
            Route("/readyz", gateway.ready),
            Route("/metrics", gateway.show_metrics),
        ],
        exception_handlers={MixfuseError: gateway.refuse, HTTPException: _on_http_error, 500: _on_bug},
        lifespan=lifespan,
    )


class _Gateway:
    """The handlers, and what they share for as long as the gateway runs."""

    def __init__(
        self,
        config: FusionConfig,
        pool: Pool,
        database: Database,
        checks: Mapping[str, Check],
        observers: Sequence[Observer],
    ) -> None:
        self.config, self.pool, self.database, self.checks = config, pool, database, checks
        self._observers = observers
        self.keys = KeyRing(database, config.api_keys)
        self.traces = TraceStore(database, config.traces, committed=self.keys.committed)
        self.metrics = Metrics(pool.guards, self.traces)
        self.spans = Spans(config.otel) if config.otel is not None else None
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._created = int(time.time())

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Everything that works beside the requests; at the end all traces are stored."""
        try:
            async with self.pool:
                await self.traces.start()
                self.keys.start()
                yield
                # Requests that the server's end cancels leave a trace too.
                async with asyncio.timeout(_LEAVE_S):
                    await self._idle.wait()
        except TimeoutError:
            logger.error("%d requests did not end in time; they leave no trace", self._under_way)
        finally:
            await self.keys.close()
            await self.traces.close()
            await asyncio.to_thread(self.database.close)
            if self.spans is not None:
                await asyncio.to_thread(self.spans.close)

    async def chat_completions(self, request: Request) -> Response:
        key = self.keys.identify(request.headers.get("authorization"))
        chat_request = chat.parse(await _json(request))
        plan = chat.plan(chat_request, self.config, self.pool.role_names())
        budgets = [self.keys.admit(key)] if key else []
        if plan.settings.max_cost is not None:
            budgets.append(Budget("max_cost", max_cost=plan.settings.max_cost))
        ledger = Ledger(deadline_ms=plan.settings.deadline_ms, budgets=budgets)
        run = Run(plan, self.pool, key=key.id if key else None, ledger=ledger)
        self._under_way += 1
        self._idle.clear()

        async def store(trace: Trace) -> None:
            self._finish(trace, ledger, request.headers)

        return _Completion(chat_request, run, store)

    async def list_models(self, request: Request) -> Response:
        self.keys.identify(request.headers.get("authorization"))
        names = [
            *MODELS,
            *self.config.presets,
            *(member.name for member in self.config.members),
            *self.pool.role_names(),
        ]
        data = [
            {"id": name, "object": "model", "created": self._created, "owned_by": "mixfuse"}
            for name in dict.fromkeys(names)
        ]
        return _Json({"object": "list", "data": data})

    async def list_traces(self, request: Request) -> Response:
        try:
            limit = int(request.query_params.get("limit", "20"))
        except ValueError:
            raise RequestError("'limit' must be a number", code="invalid_value", param="limit") from None
        traces = await self.traces.newest(limit=max(1, min(limit, 1000)), key_id=self._whose(request))
        return _Json({"object": "list", "data": [trace.model_dump(mode="json") for trace in traces]})

    async def get_trace(self, request: Request) -> Response:
        trace = await self.traces.get(request.path_params["id"], key_id=self._whose(request))
        return _trace_or_404(trace, request)

    async def add_feedback(self, request: Request) -> Response:
        key_id = self._whose(request)
        feedback = await _json(request)
        if not isinstance(feedback, dict):
            raise RequestError("feedback must be a JSON object", code="invalid_json")
        trace = await self.traces.add_feedback(request.path_params["id"], feedback, key_id=key_id)
        if trace is not None:
            self._observe(trace)
        return _trace_or_404(trace, request)

    async def health(self, _request: Request) -> Response:
        return _Json({"status": "ok"})

    async def ready(self, _request: Request) -> Response:
        """Whether requests would be served well: a load balancer sends none otherwise."""
        problems = [f"{name} is not well" for name, well in self.checks.items() if not well()]
        able = sum(
            member.samples
            for member in self.config.members
            if self.pool.guard(member, member.name).circuit is not Circuit.OPEN
        )
        if able < self.config.modes.min_responses:
            problems.append(
                f"the members whose circuit is not open give {able} answers; "
                f"modes.min_responses is {self.config.modes.min_responses}"
            )
        try:
            async with asyncio.timeout(_LEAVE_S):
                await self.database.run(probe)
        except (SQLAlchemyError, TimeoutError) as error:
            problems.append(f"the trace database cannot be written: {str(error) or 'it does not answer'}")
        return _Json({"status": "not ready" if problems else "ok", "problems": problems}, 503 if problems else 200)

    async def show_metrics(self, request: Request) -> Response:
        if not is_admin(request.headers.get("authorization")):
            raise UnauthorizedError(f"send the admin key as a bearer token ({ADMIN_KEY})")
        return Response(self.metrics.exposition(), media_type=METRICS_TYPE)

    async def refuse(self, _request: Request, error: Any) -> Response:
        """Answers a request that was refused before any model was asked."""
        self.metrics.refused(error.kind)
        return _error_response(error)

    def _whose(self, request: Request) -> str | None:
        """Whose traces a request may see: its key's; None for all of them.

        Raises:
            UnauthorizedError: A key is needed and there is none.
        """
        authorization = request.headers.get("authorization")
        if not self.keys.needed or (os.environ.get(ADMIN_KEY) and is_admin(authorization)):
            return None
        key = self.keys.identify(authorization)
        return key.id if key else None

    def _finish(self, trace: Trace, ledger: Ledger, headers: Mapping[str, str]) -> None:
        """Ends a request: its trace is safe and its budgets are settled when this returns."""
        self._under_way -= 1
        if not self._under_way:
            self._idle.set()
        ledger.settle()
        try:
            self.traces.add(trace)
        except Exception:
            # An answer that is paid for is not lost for its trace.
            logger.exception("trace %s could not be kept", trace.id)
        # Once the answer has been handed to the server: nobody waits for the counting.
        loop = asyncio.get_running_loop()
        loop.call_soon(self.metrics.observe, trace)
        if self.spans is not None:
            loop.call_soon(self.spans.send, trace, headers)
        if self._observers:
            loop.call_soon(self._observe, trace)

    def _observe(self, trace: Trace) -> None:
        for observer in self._observers:
            try:
                observer(trace)
            except Exception:
                logger.exception("an observer failed on trace %s", trace.id)


class _Json(Response):
    """A JSON response, written by orjson: Starlette's own takes several times as long."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class _Completion(Response):
    """One completion under way: runs the mode, watches for the client leaving, stores the trace, answers."""

    def __init__(self, request: ChatRequest, run: Run, store: Callable[[Trace], Awaitable[None]]) -> None:
        self._request, self._run, self._store = request, run, store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        run = self._run
        stream = _EventStream(send, self._request, run) if self._request.stream else None
        run.emit = stream.text if stream else None
        answer = ""
        failure: MixfuseError | None = None
        try:
            async with stream.kept_alive(run.plan.settings.keep_alive_ms / 1000) if stream else nullcontext():
                answer = await _unless_disconnected(receive, MODES[run.plan.mode](run))
        except ClientDisconnect:
            await self._store(run.trace(None, outcome="cancelled", error="the client went away"))
            return
        except asyncio.CancelledError:
            await self._store(run.trace(None, outcome="cancelled", error="the gateway was stopped"))
            raise
        except MixfuseError as error:
            failure = error
        except Exception:
            logger.exception("a request failed in a way it should not")
            failure = MixfuseError("internal error", kind="internal_error")
        if failure is not None:
            trace = run.trace(None, outcome=failure.kind, error=str(failure))
            await self._store(trace)
            # What was used up is owed, answer or not.
            body = {**_error_body(failure), "usage": _usage(trace.usage), "trace_id": trace.id}
            if stream and stream.begun:
                await stream.fail(body)
            else:
                await _Json(body, _status(failure), _headers(failure))(scope, receive, send)
            return
        trace = run.trace(answer)
        await self._store(trace)
        if stream:
            await stream.end(run, trace)
        else:
            await _Json(_completion(self._request, run, trace, answer))(scope, receive, send)


class _EventStream:
    """Sends a completion as server-sent events; the response begins with its first piece of text."""

    def __init__(self, send: Send, request: ChatRequest, run: Run) -> None:
        self._send = send
        self._include_usage = request.stream_options.include_usage
        self._head = {
            "id": _completion_id(run.id),
            "object": "chat.completion.chunk",
            "created": int(run.created_at),
            "model": request.model,
        }
        self.begun = False
        self._role_sent = False
        self._events = 0

    @asynccontextmanager
    async def kept_alive(self, every_s: float) -> AsyncIterator[None]:
        """While the block runs, fills each silence of that length with a comment; the first begins the response.

        From then on a failure can no longer have an HTTP status: it is the stream's last event.
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

    async def end(self, run: Run, trace: Trace) -> None:
        """Sends the tools called, why it ended, the `fusion` block, the usage if it was asked for, and the end mark."""
        await self._role()
        if run.tool_calls:
            await self._chunk({"tool_calls": [{"index": place, **call} for place, call in enumerate(run.tool_calls)]})
        await self._chunk({}, finish_reason=run.finish_reason, **_fusion_block(run, trace))
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
        """Opens the answer, as its first chunk."""
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
    """Awaits `work`, and cancels it when the client goes away.

    Raises:
        ClientDisconnect: The client went away first.
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


def _completion(request: ChatRequest, run: Run, trace: Trace, answer: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer, "refusal": None}
    if run.tool_calls:
        message |= {"content": answer or None, "tool_calls": run.tool_calls}
    return {
        "id": _completion_id(trace.id),
        "object": "chat.completion",
        "created": int(trace.created_at),
        "model": request.model,
        "choices": [
            {
                "index": 0,
                "message": message,
                "logprobs": run.logprobs,
                "finish_reason": run.finish_reason,
            }
        ],
        "usage": _usage(trace.usage),
        **_fusion_block(run, trace),
    }


def _fusion_block(run: Run, trace: Trace) -> dict[str, Any]:
    """How the answer came about, for the client: as much of it as is exposed, under the key `fusion`."""
    expose = run.plan.settings.expose
    if expose == "none":
        return {}
    block: dict[str, Any] = {
        "trace_id": trace.id,
        "mode": trace.mode,
        "reason": trace.reason,
        "error": trace.error,
        "winner": trace.winner,
        "candidates": [{"candidate": one.index, "member": one.member.name} for one in run.candidates],
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
    if run.plan.skipped:
        block["skipped"] = [{"member": name, "reason": "no_images"} for name in run.plan.skipped]
    if trace.debate is not None:
        block["debate"] = {"rounds": len(trace.debate.rounds) - 1, "stopped": trace.debate.stopped}
    if trace.citations is not None:
        block["citations"] = [citation.model_dump() for citation in trace.citations]
    if expose == "full":
        for shown, one in zip(block["candidates"], run.candidates, strict=True):
            shown |= {"text": one.text, **({"tool_calls": one.tool_calls} if one.tool_calls else {})}
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


async def _json(request: Request) -> Any:
    try:
        return orjson.loads(await request.body())
    except ValueError:
        raise RequestError("the request body is not valid JSON", code="invalid_json") from None


def _trace_or_404(trace: Trace | None, request: Request) -> Response:
    if trace is None:
        message = f"there is no trace {request.path_params['id']!r}"
        raise RequestError(message, code="trace_not_found", param="id", status=404)
    return _Json(trace.model_dump(mode="json"))


def _error_body(error: MixfuseError) -> dict[str, Any]:
    """OpenAI's error object; a quorum that was not met lists each member's reason beside it."""
    body: dict[str, Any] = {
        "message": str(error),
        "type": error.kind,
        "param": error.param if isinstance(error, RequestError) else None,
        "code": error.code if isinstance(error, RequestError) else error.kind,
    }
    if isinstance(error, TooFewAnswersError):
        body["failed"] = [vars(failure) for failure in error.failures]
    return {"error": body}


def _error_response(error: MixfuseError) -> Response:
    return _Json(_error_body(error), _status(error), _headers(error))


def _status(error: MixfuseError) -> int:
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, TooFewAnswersError) and all(failure.type in _LATER for failure in error.failures):
        return 429  # nothing is broken, there is too much to do
    return STATUS.get(error.kind, 500)


_LATER = frozenset({"rate_limited", "queue_full"})


def _headers(error: MixfuseError) -> dict[str, str]:
    """When to come again, where that is known (whole seconds); and how to identify oneself (RFC 9110)."""
    if error.kind == "unauthorized":
        return {"www-authenticate": "Bearer"}
    seconds = getattr(error, "retry_after_s", None)
    return {} if seconds is None else {"retry-after": str(max(1, math.ceil(seconds)))}


async def _on_http_error(request: Request, error: Any) -> Response:
    wrapped = RequestError(
        f"{request.method} {request.url.path}: {error.detail}",
        code=error.detail.lower().replace(" ", "_"),
        status=error.status_code,
    )
    return _error_response(wrapped)


async def _on_bug(_request: Request, _error: Exception) -> Response:
    return _error_response(MixfuseError("internal error", kind="internal_error"))
