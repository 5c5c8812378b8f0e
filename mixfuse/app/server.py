"""`mixfuse serve`: the engine, its role table, and the gateway in front, composed and ended together.

And `mixfuse gateway`, the gateway by itself.

The only place where the rooms `serve` and `fusion` meet: the gateway asks for a role, the role table leases it the
engine's model of that moment.
"""

import asyncio
import gc
import ipaddress
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
import uvloop
from pydantic import Field
from rich.console import Console
from starlette.applications import Starlette

from mixfuse.app.gates import GateConfig, Gates
from mixfuse.app.roles_admin import RoleMetrics, routes
from mixfuse.app.roles_store import StoredRoles
from mixfuse.contracts.adapter import fingerprint, verify
from mixfuse.contracts.database import opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import Strict, load
from mixfuse.fusion.calls.upstream import Endpoint
from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.http.gateway import create_app
from mixfuse.fusion.http.keys import ADMIN_KEY, has_keys
from mixfuse.serve.engine import EngineConfig
from mixfuse.serve.engine_group import EngineGroup
from mixfuse.serve.roles import BASE, Revision, RoleTable
from mixfuse.serve.watch import Folder, Found, Watcher

logger = logging.getLogger(__name__)

# Longer than clients and load balancers keep an idle connection (5 to 60 s): a request must not be sent into one that
# is being closed at this end.
_KEEP_ALIVE_S = 75
_HUB_POLL_S = 60.0  # the Hub limits how often it may be asked
# In nats: between bfloat16 and float32, an unlikely token's log-probability is easily a few tenths apart.
_TOLERANCE_BELOW_FLOAT32 = 0.5


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
        roles: Role → adapter directory, or nothing for a role served by the base until one is swapped in. It counts
            only where the role table in the trace database does not know the role yet.
        roles_from: `config` takes all roles as they stand here, and has the role table say so.
        roles_poll_s: How often the role table is looked at for what other gateways changed, in seconds.
        watch: A folder: the newest adapter directory in `WATCH/ROLE/` is swapped in by itself. Or role → an adapter on
            the Hugging Face Hub, `org/name[@branch]`: fetched into `runs/hub/ROLE/` and swapped in when it is new.
        trusted_keys: Public keys: where there are any, an adapter is served only if one of them signed it.
        probe_tolerance: How far an adapter's log-probabilities may be off from those stored with it, in nats. By
            default as stored with it where the engine's dtype is float32, else half a nat.
        gate: What an adapter has to keep to in a swap with `--shadow` or `--canary`.
        fusion: The pool, the judge and the modes: in place, or the path of a fusion config.
        logs: Folder of the engine's log.
    """

    engine: EngineConfig
    gateway: GatewayConfig = GatewayConfig()
    roles: dict[str, Path | None] = {}
    roles_from: Literal["table", "config"] = "table"
    roles_poll_s: Annotated[float, Field(gt=0)] = 2.0
    watch: Path | dict[str, str] | None = None
    trusted_keys: list[Path] = []
    probe_tolerance: Annotated[float, Field(gt=0)] | None = None
    gate: GateConfig = GateConfig()
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
        async with self._table.lease(role) as revision, self._at(revision) as endpoint:
            yield endpoint

    @asynccontextmanager
    async def hold(self, revision: Revision) -> AsyncIterator[Endpoint]:
        """Yields an endpoint for this revision, whichever serves its role."""
        async with self._table.hold(revision), self._at(revision) as endpoint:
            yield endpoint

    @asynccontextmanager
    async def _at(self, revision: Revision) -> AsyncIterator[Endpoint]:
        async with self._engines.at(revision.model) as address:
            yield Endpoint(
                address.url,
                revision.model,
                address.api_key,
                revision.revision,
                calibration=revision.calibration,
            )


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
    watched = config.watch if isinstance(config.watch, dict) else {}
    if unknown := [role for role in watched if role not in config.roles]:
        raise MixfuseError(f"{config_path}: `watch` names the role {unknown[0]!r}; add it to `roles`")
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
    with listener, opened(fusion.trace_db) as database:
        base = await asyncio.to_thread(fingerprint, config.engine.base)
        engine = EngineGroup(config.engine, logs=config.logs)
        where = ", ".join(config.engine.external) or f"log in {config.logs}"
        store = StoredRoles(database, f"{socket.gethostname()}:{listener.getsockname()[1]}")
        table = RoleTable(
            engine,
            base,
            list(config.roles),
            max_rank=config.engine.max_lora_rank,
            max_loaded=config.engine.max_loaded,
            store=store,
            verify=partial(verify, trusted=config.trusted_keys),
            probe_tolerance=_probe_tolerance(config),
        )
        roles = LeasedRoles(table, engine)
        gates = Gates(table, roles, fusion, config.gate)
        beside: list[asyncio.Task[None]] = []
        try:
            with console.status(f"waiting for the engine on {config.engine.base} ({where})"):
                await engine.start()
                taken = await table.start(config.roles, anew=config.roles_from == "config")
            app = create_app(
                fusion,
                roles,
                extra_routes=routes(table, store, gates),
                checks={"engine": lambda: engine.running},
                observers=[gates.observe],
                collectors=[RoleMetrics(table)],
            )
            server = uvicorn.Server(_uvicorn(app, config.gateway))
            beside = _beside(config, table)
            _say_ready(console, listener, _serving(table, taken))
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
            for task in beside:
                task.cancel()
            if beside:
                await asyncio.wait(beside)
            await gates.close()
            await table.close()
            await engine.stop()


def _probe_tolerance(config: ServeConfig) -> float | None:
    """What `RoleTable` is told: None for what the adapters say, which is for float32."""
    if config.probe_tolerance is None and config.engine.dtype != "float32":
        return _TOLERANCE_BELOW_FLOAT32
    return config.probe_tolerance


def _beside(config: ServeConfig, table: RoleTable) -> list["asyncio.Task[None]"]:
    """What goes on beside the requests: following the role table, and watching for new adapters."""
    tasks = [_again_and_again(table.follow, config.roles_poll_s)]
    if isinstance(config.watch, dict):
        published = OnHub(config.watch, config.engine.base)
        tasks += [_again_and_again(Watcher(table, published, role).look, _HUB_POLL_S) for role in config.watch]
    elif config.watch is not None:
        folder = Folder(config.watch)
        tasks += [_again_and_again(Watcher(table, folder, role).look, config.roles_poll_s) for role in config.roles]
    return [asyncio.create_task(task) for task in tasks]


class OnHub:
    """A `mixfuse.serve.watch.Source`: what branches on the Hugging Face Hub hold, fetched and verified.

    Args:
        names: Role → `org/name[@branch]`.
        base: The base model the adapters are for.
        folder: What is fetched goes into `FOLDER/ROLE/`.
    """

    def __init__(self, names: dict[str, str], base: Path, folder: Path = Path("runs/hub")) -> None:
        self._names, self._base, self._folder = names, base, folder

    async def newest(self, role: str) -> Found | None:
        """The adapter that a role's branch holds now."""
        from mixfuse.app import hub

        name, folder = self._names[role], self._folder / role
        return Found(*await asyncio.to_thread(hub.newest, name, folder, base=self._base))


async def _again_and_again(work: Callable[[], Awaitable[None]], every_s: float) -> None:
    failure = ""
    while True:
        await asyncio.sleep(every_s)
        try:
            await work()
            failure = ""
        except MixfuseError as error:
            if str(error) != failure:  # once, not every two seconds
                failure = str(error)
                logger.warning("%s", error)
        except Exception:
            logger.exception("roles are not followed for now")


def _serving(table: RoleTable, taken: dict[str, str]) -> str:
    """Which revision serves each role, and where that was taken from."""
    return ", ".join(
        f"{role}={revision.revision or BASE}" + (f" from the {taken[role]}" if role in taken else "")
        for role, revision in table.serving().items()
    )


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
