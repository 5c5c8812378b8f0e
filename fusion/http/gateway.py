"""The gateway's application: its routes and what they share. Completions are in `completion`, requests in `chat`."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
from prometheus_client import CONTENT_TYPE_LATEST as METRICS_TYPE
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mixfuse.contracts.database import Database, probe
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.mode_names import MODE_OF_MODEL
from mixfuse.contracts.trace import Trace
from mixfuse.fusion.answering.request import FusionRequest
from mixfuse.fusion.calls.ledger import Budget, Ledger
from mixfuse.fusion.calls.model_limits import Circuit
from mixfuse.fusion.calls.pool import Pool, RoleSource
from mixfuse.fusion.combiner.serving import ServingCombiner
from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.http import chat
from mixfuse.fusion.http.chat_completion import Completion, JsonResponse
from mixfuse.fusion.http.gateway_metrics import Metrics
from mixfuse.fusion.http.keys import ADMIN_KEY, KeyRing, UnauthorizedError, is_admin
from mixfuse.fusion.http.spans import Spans
from mixfuse.fusion.http.statuses import RequestError, error_body, error_headers, status_of
from mixfuse.fusion.modes.registry import check_modes
from mixfuse.fusion.store.traces import TraceStore

logger = logging.getLogger(__name__)

# When the gateway ends, cancelled requests get this long to store their traces.
_LEAVE_S = 5.0


Check = Callable[[], bool]
"""Returns whether a part that the gateway needs works; called by `/readyz`."""

Observer = Callable[[Trace], None]
"""Gets each finished trace, with its texts even if they are not stored, and again for each later feedback
(`Trace.feedback` is then not empty). It is called on the event loop and must return at once.
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
        roles: Knows where roles are served; None for a gateway without an engine.
        extra_routes: More routes, which come before the gateway's own.
        checks: More checks for `/readyz`, by name.
        observers: Get finished traces; one that raises is logged and fails no request.
        collectors: More metrics for `/metrics`.

    Raises:
        MixfuseError: The config names a role, but this gateway serves none; no debate can end as configured; or the
            trace database cannot be opened.
    """
    models = [*config.members, *filter(None, (config.judge, config.synthesizer))]
    role = next((model.role for model in models if model.role), None)
    if roles is None and role is not None:
        raise MixfuseError(f"role {role!r}: this gateway has no server beside it; name a base_url and model")
    check_modes(config.modes)
    gateway = _Gateway(config, Pool(roles), Database(config.trace_db), checks or {}, observers)
    for collector in collectors:
        gateway.metrics.register(collector)

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
    """The handlers and their shared state."""

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
        names = [member.name for member in config.members]
        self.combiner = ServingCombiner(config.combiner, names) if config.combiner is not None else None
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
        """Runs the background tasks until the block ends; then stores all traces."""
        try:
            async with self.pool:
                await self.traces.start()
                self.keys.start()
                yield
                # Requests that are cancelled by the server's end leave a trace too.
                async with asyncio.timeout(_LEAVE_S):
                    await self._idle.wait()
        except TimeoutError:
            logger.error("%d requests did not end in time; their traces are lost", self._under_way)
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
        fusion_request = FusionRequest(plan, self.pool, key=key.id if key else None, ledger=ledger)
        if plan.mode == "auto" and self.combiner is not None:
            fusion_request.combiner = await self.combiner.current()
        self._under_way += 1
        self._idle.clear()

        async def store(trace: Trace) -> None:
            self._finish(trace, ledger, request.headers)

        return Completion(chat_request, fusion_request, store)

    async def list_models(self, request: Request) -> Response:
        self.keys.identify(request.headers.get("authorization"))
        names = [
            *MODE_OF_MODEL,
            *self.config.presets,
            *(member.name for member in self.config.members),
            *self.pool.role_names(),
        ]
        data = [
            {"id": name, "object": "model", "created": self._created, "owned_by": "mixfuse"}
            for name in dict.fromkeys(names)
        ]
        return JsonResponse({"object": "list", "data": data})

    async def list_traces(self, request: Request) -> Response:
        try:
            limit = int(request.query_params.get("limit", "20"))
        except ValueError:
            raise RequestError("'limit' must be a number", code="invalid_value", param="limit") from None
        traces = await self.traces.newest(limit=max(1, min(limit, 1000)), key_id=self._trace_owner(request))
        return JsonResponse({"object": "list", "data": [trace.model_dump(mode="json") for trace in traces]})

    async def get_trace(self, request: Request) -> Response:
        trace = await self.traces.get(request.path_params["id"], key_id=self._trace_owner(request))
        return _trace_or_404(trace, request)

    async def add_feedback(self, request: Request) -> Response:
        key_id = self._trace_owner(request)
        feedback = await _json(request)
        if not isinstance(feedback, dict):
            raise RequestError("feedback must be a JSON object", code="invalid_json")
        trace = await self.traces.add_feedback(request.path_params["id"], feedback, key_id=key_id)
        if trace is not None:
            self._observe(trace)
        return _trace_or_404(trace, request)

    async def health(self, _request: Request) -> Response:
        return JsonResponse({"status": "ok"})

    async def ready(self, _request: Request) -> Response:
        """Says whether the gateway can answer requests; a load balancer sends it none otherwise."""
        problems = [f"{name} does not work" for name, works in self.checks.items() if not works()]
        answers = sum(
            member.samples
            for member in self.config.members
            if self.pool.guard(member, member.name).circuit is not Circuit.OPEN
        )
        if answers < self.config.modes.min_responses:
            problems.append(
                f"the members whose circuit is not open give {answers} answers; "
                f"modes.min_responses is {self.config.modes.min_responses}"
            )
        try:
            async with asyncio.timeout(_LEAVE_S):
                await self.database.run(probe)
        except (SQLAlchemyError, TimeoutError) as error:
            problems.append(f"the trace database cannot be written: {str(error) or 'it does not answer'}")
        status, code = ("not ready", 503) if problems else ("ok", 200)
        if self.combiner is not None:
            await self.combiner.current()
            if self.combiner.problem:  # the gateway serves all the same
                problems.append(f"{self.combiner.problem}; the combiner read before it keeps serving")
        return JsonResponse({"status": status, "problems": problems}, code)

    async def show_metrics(self, request: Request) -> Response:
        if not is_admin(request.headers.get("authorization")):
            raise UnauthorizedError(f"send the admin key as a bearer token ({ADMIN_KEY})")
        return Response(self.metrics.exposition(), media_type=METRICS_TYPE)

    async def refuse(self, _request: Request, error: Any) -> Response:
        """Answers a request that is refused before any call is made."""
        self.metrics.refused(error.kind)
        return _error_response(error)

    def _trace_owner(self, request: Request) -> str | None:
        """Returns the id of the API key whose traces a request may see; None if it may see all.

        Raises:
            UnauthorizedError: A key is needed, and the request has no valid one.
        """
        authorization = request.headers.get("authorization")
        if not self.keys.needed or (os.environ.get(ADMIN_KEY) and is_admin(authorization)):
            return None
        key = self.keys.identify(authorization)
        return key.id if key else None

    def _finish(self, trace: Trace, ledger: Ledger, headers: Mapping[str, str]) -> None:
        """Ends a request: settles its budgets and stores its trace safely."""
        self._under_way -= 1
        if not self._under_way:
            self._idle.set()
        ledger.settle()
        try:
            self.traces.add(trace)
        except Exception:
            # The client has paid for the answer and gets it without a trace.
            logger.exception("trace %s could not be stored", trace.id)
        # After the answer has been sent, so that the client does not wait for this.
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


async def _json(request: Request) -> Any:
    try:
        return orjson.loads(await request.body())
    except ValueError:
        raise RequestError("the request body is not valid JSON", code="invalid_json") from None


def _trace_or_404(trace: Trace | None, request: Request) -> Response:
    if trace is None:
        message = f"there is no trace {request.path_params['id']!r}"
        raise RequestError(message, code="trace_not_found", param="id", status=404)
    return JsonResponse(trace.model_dump(mode="json"))


def _error_response(error: MixfuseError) -> Response:
    return JsonResponse(error_body(error), status_of(error), error_headers(error))


async def _on_http_error(request: Request, error: Any) -> Response:
    wrapped = RequestError(
        f"{request.method} {request.url.path}: {error.detail}",
        code=error.detail.lower().replace(" ", "_"),
        status=error.status_code,
    )
    return _error_response(wrapped)


async def _on_bug(_request: Request, _error: Exception) -> Response:
    return _error_response(MixfuseError("internal error", kind="internal_error"))
