"""`/admin/roles`: the role table over HTTP and in `/metrics`, and `mixfuse roles`, which asks for it."""

import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from rich.console import Console
from rich.table import Table
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mixfuse.app.gates import UNDER_WAY, Gates, SwapRequest
from mixfuse.app.roles_store import StoredRoles
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import validate
from mixfuse.fusion.http.keys import ADMIN_KEY, is_admin
from mixfuse.fusion.http.statuses import status_of
from mixfuse.serve.roles import BASE, RoleState, RoleTable, Swap

_POLL_S = 0.5  # how often a gate is looked at
Handler = Callable[[Request], Awaitable[Response]]


def routes(table: RoleTable, store: StoredRoles, gates: Gates) -> list[Route]:
    """The routes of a running server; all but the list want the admin key."""

    def row(state: RoleState) -> dict[str, Any]:
        gate = gates.of(state.name)
        return {**_row(state), "gate": gate and gate.report()}

    async def list_(_request: Request) -> Response:
        return JSONResponse({"roles": [row(state) for state in table.states()]})

    async def swap(request: Request) -> Response:
        try:
            body = await request.json()
        except ValueError:
            raise MixfuseError('the body must be {"directory": "…"}') from None
        asked, role = validate(body, SwapRequest, source="the body"), request.path_params["role"]
        if not asked.gated:
            return _swapped(await table.swap(role, asked.directory))
        gate = await gates.begin(role, asked)
        return JSONResponse({"role": role, "gate": gate.report()}, status_code=202)

    async def stop(request: Request) -> Response:
        role = request.path_params["role"]
        table.state(role)
        gate = await gates.stop(role)
        return JSONResponse({"role": role, "gate": gate and gate.report()})

    async def rollback(request: Request) -> Response:
        return _swapped(await table.rollback(request.path_params["role"]))

    async def history(request: Request) -> Response:
        role = request.path_params["role"]
        table.state(role)
        try:
            limit = int(request.query_params.get("limit", "20"))
        except ValueError:
            raise MixfuseError("'limit' must be a number") from None
        events = await store.history(role, max(1, min(limit, 1000)))
        return JSONResponse({"role": role, "history": [vars(event) for event in events]})

    async def pin(request: Request) -> Response:
        role = request.path_params["role"]
        await table.pin(role, request.method == "PUT")
        return JSONResponse(row(table.state(role)))

    one = "/admin/roles/{role}"
    return [
        Route("/admin/roles", _answered(list_)),
        Route(one, _answered(_admin_only(swap)), methods=["PUT"]),
        Route(f"{one}/gate", _answered(_admin_only(stop)), methods=["DELETE"]),
        Route(f"{one}/rollback", _answered(_admin_only(rollback)), methods=["POST"]),
        Route(f"{one}/history", _answered(_admin_only(history))),
        Route(f"{one}/pin", _answered(_admin_only(pin)), methods=["PUT", "DELETE"]),
    ]


def _admin_only(handler: Handler) -> Handler:
    async def guarded(request: Request) -> Response:
        if not is_admin(request.headers.get("authorization")):
            raise MixfuseError(f"send the admin key as a bearer token ({ADMIN_KEY})", kind="unauthorized")
        return await handler(request)

    return guarded


def _answered(handler: Handler) -> Handler:
    """Turns a MixfuseError into an answer of its status."""

    async def answering(request: Request) -> Response:
        try:
            return await handler(request)
        except MixfuseError as error:
            body = {"error": {"type": error.kind, "message": str(error)}}
            return JSONResponse(body, status_code=status_of(error, otherwise=400))

    return answering


def _swapped(swap: Swap) -> Response:
    return JSONResponse({"role": swap.role, "old": swap.old, "new": swap.new, "drained": swap.drained})


def _row(state: RoleState) -> dict[str, Any]:
    revision, staged = state.serving, state.staged
    return {
        "role": state.name,
        "revision": revision.revision,
        "directory": str(revision.directory) if revision.directory else None,
        "in_flight": revision.in_flight,
        "loaded": revision.loaded,
        "pinned": state.pinned,
        "since": state.since,
        "version": state.version,
        "staged": {"revision": staged.revision, "share": state.share, "in_flight": staged.in_flight}
        if staged
        else None,
        "problem": state.problem,
    }


class RoleMetrics(Collector):
    """The role table's figures, read when they are asked for."""

    def __init__(self, table: RoleTable) -> None:
        self._table = table

    def collect(self) -> Iterable[Metric]:
        """The metrics."""
        counts = self._table.counts
        serving = GaugeMetricFamily(
            "mixfuse_role_revision", "1 for the revision that serves a role", labels=["role", "revision"]
        )
        behind = GaugeMetricFamily(
            "mixfuse_role_behind", "1 where this gateway cannot serve what the role table says", labels=["role"]
        )
        for state in self._table.states():
            serving.add_metric([state.name, state.serving.revision or BASE], 1)
            behind.add_metric([state.name], float(state.problem is not None))
        yield serving
        yield behind
        yield GaugeMetricFamily("mixfuse_adapters_loaded", "Adapters in the engine", value=self._table.loaded)
        for name, words, value in (
            ("loads", "Adapters loaded into the engine", counts.loads),
            ("load_failures", "Loads that failed", counts.failures),
            ("load_seconds", "Seconds that loads took", counts.load_seconds),
            ("evictions", "Adapters that made room for another", counts.evictions),
        ):
            yield CounterMetricFamily(f"mixfuse_adapter_{name}", words, value=value)


def list_roles(url: str, *, as_json: bool = False) -> None:
    """`mixfuse roles list`: prints which revision serves each role.

    Raises:
        MixfuseError: No server answers at `url`.
    """
    rows = _ask("GET", url, "/admin/roles")["roles"]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("role", "revision", "since", "adapter", "in flight", "")
    for row in rows:
        notes = ["pinned"] if row["pinned"] else []
        notes += [] if row["loaded"] else ["not loaded"]
        if staged := row["staged"]:
            notes.append(f"{staged['revision']} staged" + (f", {staged['share']:.0%}" if staged["share"] else ""))
        notes += [row["problem"]] if row["problem"] else []
        if gate := row["gate"]:
            notes.append(_progress(gate) if gate["state"] in UNDER_WAY else f"{gate['new']} {gate['state']}")
        table.add_row(
            row["role"],
            row["revision"] or "-",
            _time(row["since"]),
            row["directory"] or "(the base)",
            str(row["in_flight"]),
            "; ".join(notes),
        )
    Console().print(table)


def swap_role(url: str, role: str, directory: Path, *, as_json: bool = False) -> None:
    """`mixfuse roles swap`: prints the old and the new revision.

    Raises:
        MixfuseError: No server answers, or the swap was refused; the old revision serves on then.
    """
    _show_swap(_ask("PUT", url, f"/admin/roles/{role}", {"directory": str(directory.resolve())}), as_json)


def swap_through_gate(url: str, role: str, directory: Path, gate: dict[str, Any], *, as_json: bool = False) -> None:
    """`mixfuse roles swap --shadow, --canary`: shows how far the gate is until it has ended; Ctrl-C ends it.

    Args:
        url: The server's.
        role: The role.
        directory: The adapter directory.
        gate: The other keys of `mixfuse.app.gates.SwapRequest`.
        as_json: The gate's last state, instead of tables.

    Raises:
        MixfuseError: No server answers, the adapter was refused, or it did not get through the gate; the old revision
            serves on then.
    """
    body = {"directory": str(directory.resolve()), **{key: value for key, value in gate.items() if value is not None}}
    found = _ask("PUT", url, f"/admin/roles/{role}", body)["gate"]
    try:
        with Console(stderr=True).status("") as status:
            while found["state"] in UNDER_WAY:
                status.update(f"{role}: {found['new']}: {_progress(found)}")
                time.sleep(_POLL_S)
                rows = _ask("GET", url, "/admin/roles")["roles"]
                found = next(row["gate"] for row in rows if row["role"] == role)
    except KeyboardInterrupt:
        found = _ask("DELETE", url, f"/admin/roles/{role}/gate")["gate"]
        print(f"{role}: {found['state']}: {found['reason']}", file=sys.stderr)
        raise
    if as_json:
        print(json.dumps(found))
    else:
        for name in ("shadow", "canary"):
            if found[name] is not None:
                Console().print(_figures(f"{role}: {name}", found[name]))
    if found["state"] != "promoted":
        raise MixfuseError(f"{role}: {found['reason']}", kind="gate")
    if not as_json:
        print(f"{role}: {found['old'] or BASE} -> {found['new']} ({found['reason']})")


def seconds(text: str) -> float:
    """Reads a length of time: `90s`, `10m`, `2h`, or a number of seconds.

    Raises:
        MixfuseError: It is none.
    """
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise MixfuseError(f"{text!r} is no length of time; write 90s, 10m or 2h") from None


def share(text: str) -> float:
    """Reads a share: `10%` or `0.1`.

    Raises:
        MixfuseError: It is none.
    """
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise MixfuseError(f"{text!r} is no share of requests; write 10% or 0.1") from None


def roll_role_back(url: str, role: str, *, as_json: bool = False) -> None:
    """`mixfuse roles rollback`: prints the old and the new revision.

    Raises:
        MixfuseError: As `swap_role`, or nothing served the role before.
    """
    _show_swap(_ask("POST", url, f"/admin/roles/{role}/rollback"), as_json)


def roll_stored_role_back(where: str, role: str, *, as_json: bool = False) -> None:
    """`mixfuse roles rollback --db`: changes the record only, where no server runs.

    Raises:
        MixfuseError: There is no such database, or nothing served the role before.
    """
    from mixfuse.app.roles_store import roll_back
    from mixfuse.contracts.database import opened

    with opened(where, create=False) as database:
        entry = roll_back(database, role, "mixfuse roles rollback")
    if as_json:
        print(json.dumps(vars(entry)))
    else:
        print(f"{role}: {entry.revision or BASE} in the role table; servers follow, or start with it")


def show_history(url: str, role: str, *, limit: int = 20, as_json: bool = False) -> None:
    """`mixfuse roles history`: prints what happened to a role, newest first.

    Raises:
        MixfuseError: No server answers, or it has no such role.
    """
    events = _ask("GET", url, f"/admin/roles/{role}/history?limit={limit}")["history"]
    if as_json:
        print(json.dumps(events))
        return
    table = Table("when", "why", "from", "to", "outcome", "by", "adapter")
    for event in events:
        outcome = event["outcome"] if event["error"] is None else f"{event['outcome']}: {event['error']}"
        table.add_row(
            _time(event["at"]),
            event["why"],
            event["old"] or BASE,
            event["new"] or ("?" if event["directory"] else BASE),
            outcome,
            event["gateway"],
            event["directory"] or "",
        )
    Console().print(table)


def pin_role(url: str, role: str, pinned: bool, *, as_json: bool = False) -> None:
    """`mixfuse roles pin` and `unpin`.

    Raises:
        MixfuseError: No server answers, it has no such role, or all places would be pinned.
    """
    row = _ask("PUT" if pinned else "DELETE", url, f"/admin/roles/{role}/pin")
    print(json.dumps(row) if as_json else f"{role}: {'stays loaded' if row['pinned'] else 'may make room for others'}")


def _show_swap(done: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(done))
    elif done["old"] == done["new"]:
        print(f"{done['role']}: revision {done['new']} is serving already")
    else:
        print(
            f"{done['role']}: {done['old'] or BASE} -> {done['new'] or BASE} "
            f"({done['drained']} requests finished on the old one)"
        )


def _progress(gate: dict[str, Any]) -> str:
    asked, figures = gate["asked"], gate.get(gate["state"])
    if figures is None:
        return "waits for the old one's last requests"
    wanted = asked.get("shadow") if gate["state"] == "shadow" else asked.get("requests")
    until = f"of {wanted} requests" if wanted else f"requests in {asked['for_s']:g} s"
    return f"{gate['state']}, {figures['new']['requests']} {until}"


def _figures(title: str, found: dict[str, Any]) -> Table:
    """What both revisions did, side by side."""
    table = Table("", "old", "new", title=title, title_justify="left")
    for name, words in (
        ("requests", "requests"),
        ("calls", "calls"),
        ("failures", "failed calls"),
        ("p50_ms", "p50, ms"),
        ("p95_ms", "p95, ms"),
        ("pairs", "pairs judged"),
        ("consistency", "alike in both orders"),
        ("parse_failures", "unreadable verdicts"),
        ("liked", "answers liked"),
        ("disliked", "answers disliked"),
        ("tokens", "tokens"),
        ("cost", "dollars"),
    ):
        values = [found[side][name] for side in ("old", "new")]
        if any(values):
            table.add_row(words, *("-" if value is None else f"{value:.4g}" for value in values))
    for name, words in (
        ("agreement", "same winner"),
        ("answer_agreement", "same answer"),
        ("preference", "new one preferred"),
    ):
        if found[name] is not None:
            table.add_row(words, "", f"{found[name]:.2f}")
    if found["spent_tokens"]:
        table.caption = f"the comparing took {found['spent_tokens']} tokens, ${found['spent_cost']:.4g}"
    return table


def _time(at: float | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at, UTC).isoformat(" ", "seconds").removesuffix("+00:00")


def _ask(method: str, url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get(ADMIN_KEY)) else {}
    try:
        response = httpx.request(method, url.rstrip("/") + path, json=body, headers=headers, timeout=600)
    except httpx.HTTPError as error:
        raise MixfuseError(
            f"no mixfuse server answers at {url} ({error}); start one with: mixfuse serve CONFIG"
        ) from None
    try:
        answer: dict[str, Any] = response.json()
    except ValueError:
        raise MixfuseError(f"{url} is no mixfuse server (it answered {response.status_code})") from None
    if response.is_error:
        failure = answer.get("error")
        message = failure.get("message") if isinstance(failure, dict) else None
        raise MixfuseError(message or f"{url} answered {response.status_code}")
    return answer
