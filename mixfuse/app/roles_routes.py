"""`/admin/roles`: the routes of a running server's role table, and its metrics. `client.py` calls them."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mixfuse.app.admin_api import RoleRow, StagedRow, SwapRequest
from mixfuse.app.gates import Gate, Gates
from mixfuse.app.roles_store import StoredRoles
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import validate
from mixfuse.fusion.http.bodies import read_json
from mixfuse.fusion.http.keys import ADMIN_KEY, is_admin
from mixfuse.fusion.http.statuses import status_of
from mixfuse.serve.roles import BASE, RoleState, RoleTable
from mixfuse.serve.slots import Trouble
from mixfuse.serve.swap import Swapper

Handler = Callable[[Request], Awaitable[Response]]


def routes(swapper: Swapper, store: StoredRoles, gates: Gates) -> list[Route]:
    """The routes of a running server. Only the list of roles is open without the admin key.

    Args:
        swapper: Swaps the server's roles.
        store: Their history.
        gates: Their gates.
    """
    table = swapper.table

    def row(state: RoleState) -> RoleRow:
        return _row(state, gates.of(state.name), table.troubles().get(state.name))

    async def list_(_request: Request) -> Response:
        return JSONResponse({"roles": [asdict(row(state)) for state in table.states()]})

    async def swap(request: Request) -> Response:
        body = await read_json(request)
        swap_request, role = validate(body, SwapRequest, source="the body"), request.path_params["role"]
        if not swap_request.gated:
            return JSONResponse(asdict(await swapper.swap(role, swap_request.directory)))
        gate = await gates.begin(role, swap_request)
        return JSONResponse({"role": role, "gate": asdict(gate.report())}, status_code=202)

    async def stop(request: Request) -> Response:
        role = request.path_params["role"]
        table.state(role)
        gate = await gates.stop(role)
        return JSONResponse({"role": role, "gate": gate and asdict(gate.report())})

    async def rollback(request: Request) -> Response:
        return JSONResponse(asdict(await swapper.rollback(request.path_params["role"])))

    async def history(request: Request) -> Response:
        role = request.path_params["role"]
        table.state(role)
        try:
            limit = int(request.query_params.get("limit", "20"))
        except ValueError:
            raise MixfuseError("'limit' must be a number") from None
        events = await store.history(role, max(1, min(limit, 1000)))
        return JSONResponse({"role": role, "history": [asdict(event) for event in events]})

    async def pin(request: Request) -> Response:
        role = request.path_params["role"]
        await table.pin(role, request.method == "PUT")
        return JSONResponse(asdict(row(table.state(role))))

    path = "/admin/roles/{role}"
    return [
        Route("/admin/roles", _with_errors(list_)),
        Route(path, _with_errors(_admin_only(swap)), methods=["PUT"]),
        Route(f"{path}/gate", _with_errors(_admin_only(stop)), methods=["DELETE"]),
        Route(f"{path}/rollback", _with_errors(_admin_only(rollback)), methods=["POST"]),
        Route(f"{path}/history", _with_errors(_admin_only(history))),
        Route(f"{path}/pin", _with_errors(_admin_only(pin)), methods=["PUT", "DELETE"]),
    ]


def _admin_only(handler: Handler) -> Handler:
    async def guarded(request: Request) -> Response:
        if not is_admin(request.headers.get("authorization")):
            raise MixfuseError(f"send the admin key as a bearer token ({ADMIN_KEY})", kind="unauthorized")
        return await handler(request)

    return guarded


def _with_errors(handler: Handler) -> Handler:
    """Answers a MixfuseError with the status of its kind."""

    async def answering(request: Request) -> Response:
        try:
            return await handler(request)
        except MixfuseError as error:
            body = {"error": {"type": error.kind, "message": str(error)}}
            return JSONResponse(body, status_code=status_of(error, otherwise=400))

    return answering


def _row(state: RoleState, gate: Gate | None, trouble: Trouble | None) -> RoleRow:
    serving, staged = state.serving, state.staged
    return RoleRow(
        role=state.name,
        revision=serving.revision,
        directory=str(serving.directory) if serving.directory else None,
        in_flight=serving.in_flight,
        loaded=serving.loaded and trouble is None,
        pinned=state.pinned,
        since=state.since,
        version=state.version,
        staged=StagedRow(staged.revision, state.canary_share, staged.in_flight) if staged else None,
        problem="; ".join(filter(None, (state.problem, trouble and trouble.why))) or None,
        doing=state.doing,
        gate=gate.report() if gate else None,
    )


class RoleMetrics(Collector):
    """The role table's metrics, read at each scrape."""

    def __init__(self, table: RoleTable) -> None:
        self._table = table

    def collect(self) -> Iterable[Metric]:
        """Reads the metrics."""
        counts = self._table.counts
        serving = GaugeMetricFamily(
            "mixfuse_role_revision", "1 for the revision that serves a role", labels=["role", "revision"]
        )
        behind = GaugeMetricFamily(
            "mixfuse_role_behind", "1 where this gateway cannot serve what the role table says", labels=["role"]
        )
        unserved = GaugeMetricFamily(
            "mixfuse_role_unserved", "1 where no engine can answer for a role now", labels=["role"]
        )
        in_flight = GaugeMetricFamily(
            "mixfuse_role_in_flight", "Requests that hold a revision of a role now", labels=["role", "revision"]
        )
        troubles = self._table.troubles()
        for state in self._table.states():
            unserved.add_metric([state.name], float(state.name in troubles and troubles[state.name].dead))
            serving.add_metric([state.name, state.serving.revision or BASE], 1)
            for revision in filter(None, (state.serving, state.staged)):
                # The base's count is that of all roles that it serves.
                in_flight.add_metric([state.name, revision.revision or BASE], revision.in_flight)
            behind.add_metric([state.name], float(state.problem is not None))
        yield serving
        yield behind
        yield unserved
        yield in_flight
        yield GaugeMetricFamily("mixfuse_adapters_loaded", "Adapters in the engine", value=self._table.loaded)
        for name, words, value in (
            ("loads", "Adapters loaded into the engine", counts.loads),
            ("load_failures", "Loads that failed", counts.failures),
            ("load_seconds", "Seconds that loads took", counts.load_seconds),
            ("evictions", "Adapters that made room for another", counts.evictions),
        ):
            yield CounterMetricFamily(f"mixfuse_adapter_{name}", words, value=value)
