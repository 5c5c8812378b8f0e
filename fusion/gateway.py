"""The gateway: the fusion runtime behind OpenAI's HTTP API."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from fusion import chat
from fusion.best_of import best_of
from fusion.chat import MODELS, ChatRequest, RequestError
from fusion.config import FusionConfig
from fusion.debate import debate
from fusion.merge import merge
from fusion.pool import Pool, RoleSource
from fusion.run import Mode, Run, TooFewAnswersError
from fusion.traces import TraceStore
from mixfuse.errors import MixfuseError
from mixfuse.trace import Trace, Usage

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

# What a failure means to the client. OpenAI's own clients retry 429 and 5xx.
_STATUS = {
    "invalid_request_error": 400,
    "context_length": 400,
    "rate_limited": 429,
    "upstream_error": 502,
    "invalid_response": 502,
    "unreachable": 502,
    "too_few_answers": 503,
    "timeout": 504,
}


async def pass_through(run: Run) -> str:
    """Answers with one model's own completion.

    Raises:
        CallError: The model gave no usable answer.
    """
    member = run.plan.members[0]
    reply = await run.pool.ask(
        member,
        run.plan.messages,
        run.plan.parameters,
        stage="answer",
        name=member.name,
        ledger=run.ledger,
        candidate=0,
        emit=run.emit,
    )
    run.winner, run.reason, run.finish_reason = 0, "pass_through", reply.finish_reason
    run.logprobs = reply.logprobs
    return reply.text


MODES: dict[Mode, Callable[[Run], Awaitable[str]]] = {
    "best_of": best_of,
    "merge": merge,
    "debate": debate,
    "pass_through": pass_through,
}


def create_app(config: FusionConfig, roles: RoleSource | None, *, extra_routes: Sequence[BaseRoute] = ()) -> Starlette:
    """Builds the gateway.

    Args:
        config: Pool, judge, synthesizer and modes.
        roles: Where roles are served; None for a gateway without a server beside it.
        extra_routes: More routes, served before the gateway's own.

    Raises:
        MixfuseError: The config names a role, but there is no server beside this gateway; or the trace
            database cannot be opened.
    """
    models = [*config.members, *filter(None, (config.judge, config.synthesizer))]
    role = next((model.role for model in models if model.role), None)
    if roles is None and role is not None:
        raise MixfuseError(f"role {role!r}: this gateway has no server beside it; name a base_url and model")
    gateway = _Gateway(config, Pool(roles), TraceStore(config.trace_db))

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        try:
            async with gateway.pool:
                yield
        finally:
            gateway.traces.close()

    return Starlette(
        routes=[
            *extra_routes,
            Route("/v1/chat/completions", gateway.chat_completions, methods=["POST"]),
            Route("/v1/models", gateway.list_models),
            Route("/v1/traces", gateway.list_traces),
            Route("/v1/traces/{id}", gateway.get_trace),
            Route("/v1/traces/{id}/feedback", gateway.add_feedback, methods=["POST"]),
            Route("/healthz", gateway.health),
        ],
        exception_handlers={MixfuseError: _on_mixfuse_error, HTTPException: _on_http_error, 500: _on_bug},
        lifespan=lifespan,
    )


class _Gateway:
    """The handlers, and what they share for as long as the gateway runs."""

    def __init__(self, config: FusionConfig, pool: Pool, traces: TraceStore) -> None:
        self.config, self.pool, self.traces = config, pool, traces
        self._created = int(time.time())

    async def chat_completions(self, request: Request) -> Response:
        chat_request = chat.parse(await _json(request))
        plan = chat.plan(chat_request, self.config, self.pool.role_names())
        return _Completion(chat_request, Run(plan, self.pool), self._store)

    async def list_models(self, _request: Request) -> Response:
        names = [*MODELS, *(member.name for member in self.config.members), *self.pool.role_names()]
        data = [
            {"id": name, "object": "model", "created": self._created, "owned_by": "mixfuse"}
            for name in dict.fromkeys(names)
        ]
        return JSONResponse({"object": "list", "data": data})

    async def list_traces(self, request: Request) -> Response:
        try:
            limit = int(request.query_params.get("limit", "20"))
        except ValueError:
            raise RequestError("'limit' must be a number", code="invalid_value", param="limit") from None
        traces = await self.traces.newest(limit=max(1, min(limit, 1000)))
        return JSONResponse({"object": "list", "data": [trace.model_dump(mode="json") for trace in traces]})

    async def get_trace(self, request: Request) -> Response:
        return _trace_or_404(await self.traces.get(request.path_params["id"]), request)

    async def add_feedback(self, request: Request) -> Response:
        feedback = await _json(request)
        if not isinstance(feedback, dict):
            raise RequestError("feedback must be a JSON object", code="invalid_json")
        return _trace_or_404(await self.traces.add_feedback(request.path_params["id"], feedback), request)

    async def health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _store(self, trace: Trace) -> None:
        try:
            await self.traces.add(trace)
        except Exception:
            # A full disk must not cost the client an answer that is already paid for.
            logger.exception("trace %s could not be stored", trace.id)


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
            answer = await _unless_disconnected(receive, MODES[run.plan.mode](run))
        except ClientDisconnect:
            await self._store(run.trace(None, outcome="cancelled", error="the client went away"))
            return
        except MixfuseError as error:
            failure = error
        except Exception:
            logger.exception("a request failed in a way it should not")
            failure = MixfuseError("internal error", kind="internal_error")
        if failure is not None:
            await self._store(run.trace(None, outcome=failure.kind, error=str(failure)))
            if stream and stream.begun:
                await stream.fail(_error_body(failure))
            else:
                await _error_response(failure)(scope, receive, send)
            return
        trace = run.trace(answer)
        await self._store(trace)
        if stream:
            await stream.end(run, trace)
        else:
            await JSONResponse(_completion(self._request, run, trace, answer))(scope, receive, send)


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

    async def text(self, text: str) -> None:
        """Sends a piece of the answer."""
        if not self.begun:
            await self._begin()
        await self._chunk({"content": text})

    async def end(self, run: Run, trace: Trace) -> None:
        """Sends why it ended, the `fusion` block, the usage if it was asked for, and the end mark."""
        if not self.begun:
            await self._begin()
        await self._chunk({}, finish_reason=run.finish_reason, fusion=_fusion_block(run, trace))
        if self._include_usage:
            await self._event({**self._head, "choices": [], "usage": _usage(trace.usage)})
        await self._data("[DONE]", more=False)

    async def fail(self, error: dict[str, Any]) -> None:
        """Ends the stream with an error event."""
        await self._data(json.dumps(error, ensure_ascii=False), more=False)

    async def _begin(self) -> None:
        self.begun = True
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._chunk({"role": "assistant", "content": ""})

    async def _chunk(self, delta: dict[str, Any], *, finish_reason: str | None = None, **extra: Any) -> None:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        await self._event({**self._head, "choices": [choice], **usage, **extra})

    async def _event(self, event: dict[str, Any]) -> None:
        await self._data(json.dumps(event, ensure_ascii=False))

    async def _data(self, data: str, *, more: bool = True) -> None:
        body = f"data: {data}\n\n".encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


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
    return {
        "id": _completion_id(trace.id),
        "object": "chat.completion",
        "created": int(trace.created_at),
        "model": request.model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answer, "refusal": None},
                "logprobs": run.logprobs,
                "finish_reason": run.finish_reason,
            }
        ],
        "usage": _usage(trace.usage),
        "fusion": _fusion_block(run, trace),
    }


def _fusion_block(run: Run, trace: Trace) -> dict[str, Any]:
    """How the answer came about, for the client."""
    return {
        "trace_id": trace.id,
        "mode": trace.mode,
        "reason": trace.reason,
        "error": trace.error,
        "winner": trace.winner,
        "candidates": [
            {"candidate": candidate.index, "member": candidate.member.name, "text": candidate.text}
            for candidate in run.candidates
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
    }


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
        return json.loads(await request.body())
    except ValueError:
        raise RequestError("the request body is not valid JSON", code="invalid_json") from None


def _trace_or_404(trace: Trace | None, request: Request) -> Response:
    if trace is None:
        message = f"there is no trace {request.path_params['id']!r}"
        raise RequestError(message, code="trace_not_found", param="id", status=404)
    return JSONResponse(trace.model_dump(mode="json"))


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
    status = error.status if isinstance(error, RequestError) else _STATUS.get(error.kind, 500)
    return JSONResponse(_error_body(error), status_code=status)


async def _on_mixfuse_error(_request: Request, error: Any) -> Response:
    return _error_response(error)


async def _on_http_error(request: Request, error: Any) -> Response:
    wrapped = RequestError(
        f"{request.method} {request.url.path}: {error.detail}",
        code=error.detail.lower().replace(" ", "_"),
        status=error.status_code,
    )
    return _error_response(wrapped)


async def _on_bug(_request: Request, _error: Exception) -> Response:
    return _error_response(MixfuseError("internal error", kind="internal_error"))
