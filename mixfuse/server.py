"""`mixfuse serve`: the engine, its role table, and the gateway in front, composed and ended together.

And `mixfuse gateway`, the gateway by itself.

The only place where the rooms `serve` and `fusion` meet: the gateway asks for a role, the role table leases it the
engine's model of that moment.
"""

import asyncio
import gc
import ipaddress
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import uvicorn
import uvloop
from pydantic import Field
from rich.console import Console
from rich.table import Table
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fusion.config import FusionConfig
from fusion.gateway import create_app
from fusion.keys import ADMIN_KEY, has_keys, is_admin
from fusion.pool import Endpoint
from mixfuse.adapter import fingerprint
from mixfuse.errors import MixfuseError
from mixfuse.recipe import Strict, load
from serve.engine import EngineConfig
from serve.engine_group import EngineGroup
from serve.roles import BASE, RoleTable

# Longer than clients and load balancers keep an idle connection (5 to 60 s): a request must not be sent into one that
# is being closed at this end.
_KEEP_ALIVE_S = 75


class GatewayConfig(Strict):
    """Where the gateway listens.

    Attributes:
        host: An address; beyond loopback the roles can be changed only with the admin key.
        port: 0 takes any free one.
        drain_s: How long requests under way may go on after SIGTERM, in seconds; then they are cancelled.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    drain_s: Annotated[int, Field(ge=0)] = 10


class ServeConfig(Strict):
    """A serve config.

    Attributes:
        engine: The vLLM engine.
        gateway: The gateway in front of it.
        roles: Role → adapter directory, or nothing for a role served by the base until one is swapped in.
        fusion: The pool, the judge and the modes: in place, or the path of a fusion config.
        logs: Folder of the engine's log.
    """

    engine: EngineConfig
    gateway: GatewayConfig = GatewayConfig()
    roles: dict[str, Path | None] = {}
    fusion: FusionConfig | Path
    logs: Path = Path("runs/logs")


class LeasedRoles:
    """The role table as the gateway sees it: endpoints of the engines."""

    def __init__(self, table: RoleTable, engines: EngineGroup) -> None:
        self._table, self._engines = table, engines

    def names(self) -> list[str]:
        """The roles."""
        return self._table.names()

    @asynccontextmanager
    async def lease(self, role: str) -> AsyncIterator[Endpoint]:
        """Yields an engine's endpoint for the role, its revision pinned; waits for one that is being restarted."""
        async with self._table.lease(role) as revision, self._engines.at(revision.model) as address:
            yield Endpoint(address.url, revision.model, address.api_key, revision.revision)


def run(config_path: Path, overrides: list[str]) -> None:
    """Serves until Ctrl-C or SIGTERM; both end the engine too.

    Raises:
        MixfuseError: The config is bad, a port is in use, an adapter is refused, or the engine did not start or died.
    """
    config, fusion = configs(config_path, overrides)
    try:
        _run(_serve(config, fusion))
    except (KeyboardInterrupt, asyncio.CancelledError):  # Ctrl-C, SIGTERM: how a server ends
        print("stopped", file=sys.stderr)


def configs(config_path: Path, overrides: list[str]) -> tuple[ServeConfig, FusionConfig]:
    """Loads a serve config and the fusion config it names, and holds one against the other.

    Raises:
        MixfuseError: One is bad, or a role is named that is not there.
    """
    config = load(config_path, ServeConfig, overrides)
    fusion = config.fusion if isinstance(config.fusion, FusionConfig) else load(config.fusion, FusionConfig)
    if BASE in config.roles:
        raise MixfuseError(f"{config_path}: the role {BASE!r} is always there; take it out of `roles`")
    named = [model.role for model in (*fusion.members, fusion.judge, fusion.synthesizer) if model and model.role]
    if missing := [role for role in named if role not in (BASE, *config.roles)]:
        raise MixfuseError(f"{config_path}: the fusion config names the role {missing[0]!r}; add it to `roles`")
    return config, fusion


async def _serve(config: ServeConfig, fusion: FusionConfig) -> None:
    this = asyncio.current_task()
    assert this is not None  # noqa: S101 - we are a coroutine of asyncio.run
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    console = Console(stderr=True)
    listener = _listen(config.gateway, fusion)
    with listener:
        base = await asyncio.to_thread(fingerprint, config.engine.base)
        engine = EngineGroup(config.engine, logs=config.logs)
        where = ", ".join(config.engine.external) or f"log in {config.logs}"
        try:
            with console.status(f"waiting for the engine on {config.engine.base} ({where})"):
                await engine.start()
            table = RoleTable(engine, base, list(config.roles), max_rank=config.engine.max_lora_rank)
            for role, directory in config.roles.items():
                if directory is not None:
                    await table.swap(role, directory)
            routes = [
                Route("/admin/roles", _list_roles(table)),
                Route("/admin/roles/{role}", _swap_role(table), methods=["PUT"]),
            ]
            app = create_app(
                fusion, LeasedRoles(table, engine), extra_routes=routes, checks={"engine": lambda: engine.running}
            )
            server = uvicorn.Server(_uvicorn(app, config.gateway))
            roles = ", ".join(f"{role}={r.revision or BASE}" for role, r in table.serving().items())
            _say_ready(console, listener, roles)
            gateway = asyncio.create_task(server.serve(sockets=[listener]))
            died = asyncio.create_task(engine.failed())
            await asyncio.wait({gateway, died}, return_when=asyncio.FIRST_COMPLETED)
            if died.done() and not gateway.done():
                server.should_exit = True
                await gateway
                raise died.result()
            died.cancel()
            await gateway
        finally:
            await engine.stop()


def run_gateway(config_path: Path, overrides: list[str], address: GatewayConfig) -> None:
    """`mixfuse gateway`: the fusion gateway by itself, for a pool that is served elsewhere; until Ctrl-C or SIGTERM.

    Raises:
        MixfuseError: The config is bad, or the port is in use.
    """
    config = load(config_path, FusionConfig, overrides)
    with _listen(address, config) as listener:
        server = uvicorn.Server(_uvicorn(create_app(config, None), address))
        names = ", ".join(member.name for member in config.members)
        _say_ready(Console(stderr=True), listener, names)
        try:
            _run(server.serve(sockets=[listener]))
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)


def _run(main: Coroutine[Any, Any, None]) -> None:
    """As `asyncio.run`, on uvloop's event loop, and with a garbage collector that knows it is in a server."""
    # What is loaded now stays until the end: not looked through again, a best_of takes a tenth less CPU time.
    gc.collect()
    gc.freeze()
    # A fused request holds a connection for each of its calls: 500 at once are more than the usual 1024 files.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.set_threshold(20_000, 20, 20)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


def _uvicorn(app: Starlette, gateway: GatewayConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # nobody here asks where a client is
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=gateway.drain_s,
        lifespan="on",
    )


def _say_ready(console: Console, listener: socket.socket, what: str) -> None:
    host, port = listener.getsockname()[:2]
    console.print(f"ready: http://{host}:{port}/v1 ({what})", markup=False, highlight=False, soft_wrap=True)


def _listen(gateway: GatewayConfig, fusion: FusionConfig) -> socket.socket:
    if not _loopback(gateway.host) and not os.environ.get(ADMIN_KEY):
        raise MixfuseError(
            f"gateway.host {gateway.host} is reachable from outside: set {ADMIN_KEY} first, so that not everybody can "
            "swap adapters"
        )
    if not _loopback(gateway.host) and fusion.api_keys == "auto" and not has_keys(fusion.trace_db):
        raise MixfuseError(
            f"gateway.host {gateway.host} is reachable from outside, and there is no API key: add one "
            "(mixfuse keys add), or let everybody ask with `api_keys: off` in the fusion config"
        )
    listener = socket.socket(socket.AF_INET6 if ":" in gateway.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((gateway.host, gateway.port))
        listener.listen(2048)  # so that who reads "ready" can connect
    except OSError as error:
        listener.close()
        raise MixfuseError(
            f"cannot listen on {gateway.host}:{gateway.port}: {error.strerror}; choose another gateway.port"
        ) from None
    return listener


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _list_roles(table: RoleTable) -> Callable[[Request], Response]:
    def handler(_request: Request) -> Response:
        return JSONResponse(
            {
                "roles": [
                    {
                        "role": role,
                        "revision": revision.revision,
                        "directory": str(revision.directory) if revision.directory else None,
                        "in_flight": revision.in_flight,
                    }
                    for role, revision in table.serving().items()
                ]
            }
        )

    return handler


def _swap_role(table: RoleTable) -> Callable[[Request], Awaitable[Response]]:
    async def handler(request: Request) -> Response:
        if not is_admin(request.headers.get("authorization")):
            return _error(401, "unauthorized", f"send the admin key as a bearer token ({ADMIN_KEY})")
        try:
            directory = Path((await request.json())["directory"])
        except (ValueError, KeyError, TypeError):
            return _error(400, "invalid_request", 'the body must be {"directory": "…"}')
        try:
            swap = await table.swap(request.path_params["role"], directory)
        except MixfuseError as error:
            status = {"role": 404, "engine": 503}.get(error.kind, 400)
            return _error(status, error.kind, str(error))
        return JSONResponse({"role": swap.role, "old": swap.old, "new": swap.new, "drained": swap.drained})

    return handler


def _error(status: int, kind: str, message: str) -> Response:
    return JSONResponse({"error": {"type": kind, "message": message}}, status_code=status)


def list_roles(url: str) -> None:
    """`mixfuse roles list`: prints which revision serves each role.

    Raises:
        MixfuseError: No server answers at `url`.
    """
    table = Table("role", "revision", "adapter", "in flight")
    for row in _admin("GET", url, "/admin/roles")["roles"]:
        table.add_row(row["role"], row["revision"] or "-", row["directory"] or "(the base)", str(row["in_flight"]))
    Console().print(table)


def swap_role(url: str, role: str, directory: Path) -> None:
    """`mixfuse roles swap`: prints the old and the new revision.

    Raises:
        MixfuseError: No server answers, or the swap was refused; the old revision serves on then.
    """
    done = _admin("PUT", url, f"/admin/roles/{role}", {"directory": str(directory.resolve())})
    if done["old"] == done["new"]:
        print(f"{role}: revision {done['new']} is serving already")
    else:
        print(f"{role}: {done['old'] or BASE} -> {done['new']} ({done['drained']} requests finished on the old one)")


def _admin(method: str, url: str, path: str, body: dict[str, str] | None = None) -> dict[str, Any]:
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
