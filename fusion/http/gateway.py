"""The gateway's application: its routes and what they share. Completions are in `completion`, requests in `chat`."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import orjson
from prometheus_client import CONTENT_TYPE_LATEST as METRICS_TYPE
from prometheus_client.registry import Collector
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp

from mixfuse.contracts import strict_yaml
from mixfuse.contracts.database import Database, probe
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import special_tokens
from mixfuse.contracts.mode_names import FUSED_MODES, MODE_OF_MODEL, SINGLE_MODEL_MODE, model_name
from mixfuse.contracts.trace import Feedback, Trace
from mixfuse.fusion.answering.request import FusionRequest, Plan
from mixfuse.fusion.calls.board import Board
from mixfuse.fusion.calls.ledger import Budget, Ledger
from mixfuse.fusion.calls.model_limits import Circuit
from mixfuse.fusion.calls.pool import Pool, RoleSource
from mixfuse.fusion.calls.token_counts import check_tokenizer
from mixfuse.fusion.combiner.serving import ServingCombiner
from mixfuse.fusion.config import FusionConfig, FusionOptions
from mixfuse.fusion.http import chat, messages_api, passed, responses_api
from mixfuse.fusion.http.bodies import LARGE, read_json
from mixfuse.fusion.http.browsers import BrowserGuard
from mixfuse.fusion.http.chat_completion import ChatWire
from mixfuse.fusion.http.completion import Completion, JsonResponse, Wire
from mixfuse.fusion.http.connections import Connections
from mixfuse.fusion.http.gateway_metrics import Metrics
from mixfuse.fusion.http.inside import WATCH, Inside
from mixfuse.fusion.http.keys import ADMIN_KEY, ApiKey, KeyRing, UnauthorizedError, is_admin
from mixfuse.fusion.http.messages_api import MessagesWire
from mixfuse.fusion.http.quote import quote
from mixfuse.fusion.http.responses_api import ResponsesWire
from mixfuse.fusion.http.spans import Spans
from mixfuse.fusion.http.statuses import RequestError, error_body, error_headers, status_of
from mixfuse.fusion.http.team import State, Team
from mixfuse.fusion.modes.registry import Answer, check_modes
from mixfuse.fusion.modes.registry import answer as answer_in_mode
from mixfuse.fusion.store.response_cache import ResponseCache
from mixfuse.fusion.store.traces import TraceStore

logger = logging.getLogger(__name__)

# When the gateway ends, cancelled requests get this long to store their traces.
_LEAVE_S = 5.0
_MESSAGES = "/v1/messages"
# A quote reads this many traces of each mode.
_QUOTED = 200


Check = Callable[[], bool]
Troubles = Callable[[], Mapping[str, tuple[str, bool]]]
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
    troubles: Troubles = dict,
    observers: Sequence[Observer] = (),
    collectors: Sequence[Collector] = (),
    team: Team | None = None,
    ui: Callable[[Inside], ASGIApp] | None = None,
) -> Starlette:
    """Builds the gateway; `app.state.connections` has the protocol by which uvicorn keeps `limits`.

    Args:
        config: Pool, judge, synthesizer and modes.
        roles: Knows where roles are served; None for a gateway without an engine.
        extra_routes: More routes, which come before the gateway's own.
        checks: More checks for `/readyz`, by name.
        troubles: Returns what keeps roles from answering: role → why, and whether nothing answers for it.
        observers: Get finished traces; one that raises is logged and fails no request.
        collectors: More metrics for `/metrics`.
        team: The worker processes, of which this is one.
        ui: Makes the page at `/ui`, if there is to be one; whether the config wants it is for the caller to heed.

    Raises:
        MixfuseError: The config names a role, but this gateway serves none; no debate can end as configured; a
            tokenizer cannot be read; or the trace database cannot be opened.
    """
    models = [*config.members, *config.embeddings, *filter(None, (config.judge, config.synthesizer))]
    role = next((model.role for model in models if model.role), None)
    if roles is None and role is not None:
        raise MixfuseError(f"role {role!r}: this gateway has no server beside it; name a base_url and model")
    check_modes(config.modes)
    for tokenizer in {model.tokenizer for model in models if model.tokenizer is not None}:
        check_tokenizer(tokenizer)
        special_tokens(tokenizer)
    pool = Pool(roles, team.board if team is not None else None)
    gateway = _Gateway(config, pool, Database(config.trace_db), checks or {}, observers, team=team)
    gateway.troubles = troubles
    for collector in collectors:
        gateway.metrics.register(collector)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with gateway.running():
            yield

    app = Starlette(
        routes=[
            *extra_routes,
            Route("/v1/chat/completions", gateway.chat_completions, methods=["POST"]),
            Route("/v1/responses", gateway.responses, methods=["POST"]),
            Route("/v1/completions", gateway.completions, methods=["POST"]),
            Route("/v1/embeddings", gateway.embeddings, methods=["POST"]),
            Route("/v1/fusion/quote", gateway.quote, methods=["POST"]),
            Route(_MESSAGES, gateway.messages, methods=["POST"]),
            Route("/v1/models", gateway.list_models),
            Route("/v1/models/{name:path}", gateway.get_model),
            Route("/v1/traces", gateway.list_traces),
            Route("/v1/traces/{id}", gateway.get_trace),
            Route("/v1/traces/{id}/feedback", gateway.add_feedback, methods=["POST"]),
            Route("/healthz", gateway.health),
            Route("/readyz", gateway.ready),
            Route("/metrics", gateway.show_metrics),
            *([Mount("/ui", ui(gateway.inside()))] if ui is not None else []),
        ],
        middleware=[
            Middleware(
                CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
            ),
            Middleware(
                BrowserGuard,
                allowed_hosts=config.allowed_hosts,
                cors_origins=config.cors_origins,
                protected=gateway.protected,
            ),
        ],
        exception_handlers={MixfuseError: gateway.refuse, HTTPException: _on_http_error, 500: _on_bug},
        lifespan=lifespan,
    )
    limits, board = config.limits, gateway.board
    app.state.connections = Connections(
        limits.model_copy(update={"connections": max(1, board.part(limits.connections))})
    )
    gateway.metrics.register(app.state.connections)
    return app


class _Gateway:
    """The handlers and their shared state."""

    def __init__(
        self,
        config: FusionConfig,
        pool: Pool,
        database: Database,
        checks: Mapping[str, Check],
        observers: Sequence[Observer],
        *,
        team: Team | None,
    ) -> None:
        self.config, self.pool, self.database, self.checks = config, pool, database, checks
        self.troubles: Troubles = dict
        self._observers, self._team = observers, team
        names = [member.name for member in config.members]
        self.combiner = ServingCombiner(config.combiner, names) if config.combiner is not None else None
        self.board = board = team.board if team is not None else Board()
        self.keys = KeyRing(database, config.api_keys, priced=config.priced, unpriced=config.unpriced, board=board)
        self.traces = TraceStore(database, config.traces, spending=self.keys, board=board)
        self.cache = ResponseCache(database, self.traces.stores_whole)
        self.metrics = Metrics(pool.guards, self.traces, team)
        self.spans = Spans(config.otel) if config.otel is not None else None
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._created = int(time.time())

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs the background tasks until the block ends; then stores all traces."""
        reporting: asyncio.Task[None] | None = None
        try:
            async with self.pool:
                await self.traces.start()
                self.keys.start()
                if self._team is not None:
                    reporting = asyncio.create_task(self._team.report(self._state))
                yield
                # Requests that are cancelled by the server's end leave a trace too.
                async with asyncio.timeout(_LEAVE_S):
                    await self._idle.wait()
        except TimeoutError:
            logger.error("%d requests did not end in time; their traces are lost", self._under_way)
        finally:
            if reporting is not None:
                reporting.cancel()
                await asyncio.wait({reporting})
            await self.cache.close()
            await self.keys.close()
            await self.traces.close()
            await asyncio.to_thread(self.database.close)
            if self.spans is not None:
                await asyncio.to_thread(self.spans.close)

    def inside(self) -> Inside:
        """Returns what the page at `/ui` reads."""
        parts = (self.config, self.database, self.keys, self.traces, self._trace_owner, self._model_names)
        return Inside(*parts, roles=bool(self.pool.role_names()))

    def protected(self, path: str) -> bool:
        """Whether requests to this path need an API key or the admin key."""
        if path.startswith(("/v1/", "/ui/")):
            return self.keys.needed
        # The list of roles is open to all.
        return bool(os.environ.get(ADMIN_KEY)) and path != "/admin/roles"

    async def chat_completions(self, request: Request) -> Response:
        key = self.keys.identify(_authorization(request))
        chat_request = await _parsed(await read_json(request), request)
        return await self._completion(request, key, chat_request, ChatWire(chat_request))

    async def responses(self, request: Request) -> Response:
        key = self.keys.identify(_authorization(request))
        asked = responses_api.read(await read_json(request))
        body = asked.chat
        if asked.previous is not None:
            trace = await self.traces.get(asked.previous, key_id=self._owner(_authorization(request)))
            body = responses_api.continued(asked, trace)
        return await self._completion(request, key, await _parsed(body, request), ResponsesWire(asked))

    async def messages(self, request: Request) -> Response:
        key = self.keys.identify(_authorization(request))
        asked = messages_api.read(await read_json(request))
        return await self._completion(request, key, await _parsed(asked.chat, request), MessagesWire(asked))

    async def completions(self, request: Request) -> Response:
        return await self._passed("completions", request)

    async def embeddings(self, request: Request) -> Response:
        return await self._passed("embeddings", request)

    async def _passed(self, api: passed.Api, request: Request) -> Response:
        key = self.keys.identify(_authorization(request))
        body, plan = passed.plan(api, await read_json(request), self.config, self.pool.role_names())
        wire = passed.PassedWire(body)
        return await self._run(request, key, plan, wire, passed.forward(api, wire))

    async def _completion(
        self, request: Request, key: ApiKey | None, chat_request: chat.ChatRequest, wire: Wire
    ) -> Response:
        """Plans a chat completion, in whatever API it came."""
        planned = partial(chat.plan, chat_request, self.config, self.pool.role_names())
        # To check a long schema takes half a second.
        plan = await asyncio.to_thread(planned) if chat_request.response_format else planned()
        if plan.settings.cache and not self.config.traces.store_text:
            raise RequestError(
                "'fusion.cache' keeps answers, and this gateway stores no texts (traces.store_text)",
                code="unsupported_parameter",
                param="fusion.cache",
            )
        work_out = partial(self.cache.answer, work_out=answer_in_mode) if plan.settings.cache else answer_in_mode
        return await self._run(request, key, plan, wire, work_out)

    async def _run(
        self,
        request: Request,
        key: ApiKey | None,
        plan: Plan,
        wire: Wire,
        work_out: Answer,
    ) -> Response:
        """Admits a request; returns its answer, which is worked out as it is sent."""
        budgets = [self.keys.admit(key)] if key else []
        if plan.settings.max_cost is not None:
            budgets.append(Budget("max_cost", max_cost=plan.settings.max_cost))
        watch = request.scope.get(WATCH)
        ledger = Ledger(deadline_ms=plan.settings.deadline_ms, budgets=budgets, watch=watch)
        fusion_request = FusionRequest(plan, self.pool, key=key.id if key else None, ledger=ledger)
        if plan.mode != SINGLE_MODEL_MODE and self.combiner is not None:
            fusion_request.combiner = await self.combiner.current()
        self._under_way += 1
        self._idle.clear()

        async def store(trace: Trace) -> None:
            await self._finish(trace, ledger, request.headers)

        return Completion(wire, fusion_request, store, work_out)

    async def quote(self, request: Request) -> Response:
        self.keys.identify(_authorization(request))
        if self._silent(_authorization(request)):
            message = "this gateway does not show what its answers cost (modes.expose: none)"
            raise RequestError(message, code="not_exposed", status=403)
        asked = await _parsed(await read_json(request), request)
        first = chat.plan(asked, self.config, self.pool.role_names())  # refuses what no mode could answer
        modes = dict.fromkeys([first.mode, *FUSED_MODES])
        owner = self._owner(_authorization(request))
        traces = {mode: (await self.traces.newest(limit=_QUOTED, mode=mode, key_id=owner)).traces for mode in modes}

        def plan_in(mode: str) -> Plan:
            if mode == first.mode:
                return first
            alone = first.mode == SINGLE_MODEL_MODE
            of_auto = dict.fromkeys(("target", "prefer", "width", "domain"))
            options = (asked.fusion or FusionOptions()).model_copy(update={**of_auto, "mode": mode})
            changed = {"model": model_name(mode) if alone else asked.model, "models": None, "fusion": options}
            return chat.plan(asked.model_copy(update=changed), self.config, self.pool.role_names())

        return JsonResponse(await asyncio.to_thread(quote, plan_in, list(modes), traces))

    async def list_models(self, request: Request) -> Response:
        self.keys.identify(_authorization(request))
        return JsonResponse({"object": "list", "data": [self._model(name) for name in self._model_names()]})

    async def get_model(self, request: Request) -> Response:
        self.keys.identify(_authorization(request))
        name = request.path_params["name"]
        if name not in self._model_names():
            raise RequestError(f"there is no model {name!r}", code="model_not_found", param="model", status=404)
        return JsonResponse(self._model(name))

    def _model_names(self) -> list[str]:
        """The names that a request can be sent to; modes and presets only where what they need is configured."""
        config = self.config
        modes = (name for name, mode in MODE_OF_MODEL.items() if chat.missing(FusionOptions(mode=mode), config) is None)
        presets = (name for name, options in config.presets.items() if chat.missing(options, config) is None)
        members = (member.name for member in (*config.members, *config.embeddings))
        return list(dict.fromkeys([*modes, *presets, *members, *self.pool.role_names()]))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "mixfuse"}

    async def list_traces(self, request: Request) -> Response:
        try:
            limit = int(request.query_params.get("limit", "20"))
        except ValueError:
            raise RequestError("'limit' must be a number", code="invalid_value", param="limit") from None
        listing = await self.traces.newest(
            limit=max(1, min(limit, 1000)), key_id=self._trace_owner(_authorization(request))
        )
        data = await asyncio.to_thread(lambda: [_as_json(trace) for trace in listing.traces])
        body: dict[str, Any] = {"object": "list", "data": data, "has_more": listing.has_more}
        return JsonResponse(body | ({"unreadable": listing.unreadable} if listing.unreadable else {}))

    async def get_trace(self, request: Request) -> Response:
        trace = await self.traces.get(request.path_params["id"], key_id=self._trace_owner(_authorization(request)))
        return _trace_or_404(trace, request)

    async def add_feedback(self, request: Request) -> Response:
        authorization = _authorization(request)
        silent = self._silent(authorization)
        key_id = self._owner(authorization) if silent else self._trace_owner(authorization)
        feedback = await read_json(request)
        said = _feedback(feedback)
        trace_id = request.path_params["id"]
        if said.most >= 0 and not silent:
            trace = await self.traces.get(trace_id, key_id=key_id)
            if trace is not None and said.most >= len(trace.candidates):
                raise RequestError(
                    f"there is no candidate {said.most}; this answer's are counted from 0", code="invalid_value"
                )
        trace = await self.traces.add_feedback(trace_id, feedback, key_id=key_id)
        if trace is not None:
            self._observe(trace)
            if silent:
                return JsonResponse({"id": trace.id, "feedback": trace.feedback})
        return _trace_or_404(trace, request)

    async def health(self, _request: Request) -> Response:
        return JsonResponse({"status": "ok"})

    async def ready(self, _request: Request) -> Response:
        """Says whether the gateway can answer requests; a load balancer sends it none otherwise."""
        problems = [f"{name} does not work" for name, works in self.checks.items() if not works()]
        troubles = self.troubles()
        unserved = {role for role, (_, dead) in troubles.items() if dead}
        answers = sum(
            member.samples
            for member in self.config.members
            if member.role not in unserved and self.pool.guard(member, member.name).circuit is not Circuit.OPEN
        )
        if answers < self.config.modes.min_responses:
            problems.append(
                f"the members whose circuit is not open and whose role is served give {answers} answers; "
                f"modes.min_responses is {self.config.modes.min_responses}"
            )
        try:
            async with asyncio.timeout(_LEAVE_S):
                problems += await self.traces.problems()
                await self.database.run(probe)
        except Exception as error:
            problems.append(f"the trace database cannot be written: {str(error) or 'it does not answer'}")
        others = self._team.others() if self._team is not None else []
        problems += [problem for other in others for problem in other.problems]
        status, code = ("not ready", 503) if problems else ("ok", 200)
        # Of these an operator should know, but the gateway serves all the same.
        if self.combiner is not None:
            await self.combiner.current()
        problems += [f"role {role}: {why}" for role, (why, _) in troubles.items()]
        problems += self._state().notes
        problems += [note for other in others for note in other.notes]
        return JsonResponse({"status": status, "problems": list(dict.fromkeys(problems))}, code)

    def _state(self) -> State:
        """Returns what this process says of itself to the other workers."""
        notes = []
        if self.traces.set_aside:
            notes.append(f"{self.traces.set_aside} traces could not be written and are set aside (see the log)")
        notes += [
            f"{name} cannot judge: {guard.dialect.problem}"
            for name, guard in self.pool.guards.items()
            if guard.dialect.problem is not None
        ]
        if self.keys.unlimited:
            number = len(self.keys.unlimited)
            notes.append(f"{number} API keys have a budget in dollars, and no model has a price: it limits nothing")
        if self.combiner is not None and self.combiner.problem:
            notes.append(f"{self.combiner.problem}; the combiner read before it keeps serving")
        return State(self.traces.failures(), notes, self.metrics.states())

    async def show_metrics(self, request: Request) -> Response:
        if not is_admin(request.headers.get("authorization")):
            raise UnauthorizedError(f"send the admin key as a bearer token ({ADMIN_KEY})")
        return Response(self.metrics.exposition(), media_type=METRICS_TYPE)

    async def refuse(self, request: Request, error: Any) -> Response:
        """Answers a request that is refused before any call is made."""
        self.metrics.refused(error.kind)
        return _error_response(error, request)

    def _trace_owner(self, authorization: str | None) -> str | None:
        """Returns the id of the API key whose traces a request may see; None if it may see all.

        Raises:
            UnauthorizedError: A key is needed, and the request has no valid one.
            RequestError: The config exposes nothing, and the request has not the admin key.
        """
        if self._silent(authorization):
            self.keys.identify(authorization)
            raise RequestError(
                f"traces are not shown here (modes.expose is none); with the admin key they are ({ADMIN_KEY})",
                code="not_exposed",
                status=403,
            )
        return self._owner(authorization)

    def _silent(self, authorization: str | None) -> bool:
        """Whether traces are kept from a request: nothing is exposed, and it comes from a client, not the operator.

        A gateway with neither API keys nor an admin key cannot tell the two apart.
        """
        admin_key = os.environ.get(ADMIN_KEY)
        apart = self.keys.needed or bool(admin_key)
        return self.config.modes.expose == "none" and apart and not (admin_key and is_admin(authorization))

    def _owner(self, authorization: str | None) -> str | None:
        """Returns the id of the API key to whose traces a request may add feedback; None for all."""
        if not self.keys.needed or (os.environ.get(ADMIN_KEY) and is_admin(authorization)):
            return None
        key = self.keys.identify(authorization)
        return key.id if key else None

    async def _finish(self, trace: Trace, ledger: Ledger, headers: Mapping[str, str]) -> None:
        """Ends a request: settles its budgets and stores its trace safely, also if it is cancelled meanwhile."""
        ledger.settle()
        await asyncio.shield(asyncio.ensure_future(self._store(trace)))
        # After the answer has been sent, so that the client does not wait for this.
        loop = asyncio.get_running_loop()
        loop.call_soon(self.metrics.observe, trace)
        if self.spans is not None:
            loop.call_soon(self.spans.send, trace, headers)
        if self._observers:
            loop.call_soon(self._observe, trace)

    async def _store(self, trace: Trace) -> None:
        try:
            await self.traces.add(trace)
        except Exception:
            # The client has paid for the answer and gets it without a trace.
            logger.exception("trace %s could not be stored", trace.id)
        self._under_way -= 1
        if not self._under_way:
            self._idle.set()

    def _observe(self, trace: Trace) -> None:
        for observer in self._observers:
            try:
                observer(trace)
            except Exception:
                logger.exception("an observer failed on trace %s", trace.id)


async def _parsed(body: Any, request: Request) -> chat.ChatRequest:
    """Returns a request of chat completions; reads a large one in a thread."""
    small = len(request.headers.get("content-length", "")) in range(1, len(str(LARGE)))
    return chat.parse(body) if small else await asyncio.to_thread(chat.parse, body)


def _feedback(body: object) -> Feedback:
    """Reads feedback.

    Raises:
        RequestError: It is no object, or a field is unknown or has no such value: it would have no effect.
    """
    if not isinstance(body, dict):
        raise RequestError("feedback must be a JSON object", code="invalid_json")
    try:
        return Feedback.model_validate({key: value for key, value in body.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
        message = strict_yaml.describe(error, Feedback)[: chat.LONGEST_MESSAGE]
        raise RequestError(message, code=code, param=".".join(map(str, first["loc"])) or None) from None


def _trace_or_404(trace: Trace | None, request: Request) -> Response:
    if trace is None:
        message = f"there is no trace {request.path_params['id']!r}"
        raise RequestError(message, code="trace_not_found", param="id", status=404)
    return JsonResponse(_as_json(trace))


def _as_json(trace: Trace) -> orjson.Fragment:
    """Returns a trace for `JsonResponse`; pydantic writes all that it has read, where orjson has limits of its own."""
    return orjson.Fragment(trace.model_dump_json())


def _authorization(request: Request) -> str | None:
    """Returns the `Authorization` header, or what stands for it in Anthropic's API."""
    authorization = request.headers.get("authorization")
    if authorization is None and (key := request.headers.get("x-api-key")) is not None:
        return f"Bearer {key}"
    return authorization


def _error_response(error: MixfuseError, request: Request) -> Response:
    body = messages_api.failure(error) if request.url.path == _MESSAGES else error_body(error)
    return JsonResponse(body, status_of(error), error_headers(error))


async def _on_http_error(request: Request, error: Any) -> Response:
    wrapped = RequestError(
        f"{request.method} {request.url.path}: {error.detail}",
        code=error.detail.lower().replace(" ", "_"),
        status=error.status_code,
    )
    return _error_response(wrapped, request)


async def _on_bug(request: Request, _error: Exception) -> Response:
    return _error_response(MixfuseError("internal error", kind="internal_error"), request)
