"""`mixfuse serve`: composes the engine, its role table and the gateway, and ends them together.

And `mixfuse gateway`: the gateway without an engine.

Here the rooms `serve` and `fusion` meet. The gateway asks for a role, and the role table leases it the model that
serves the role at that moment.
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
from mixfuse.app.roles_routes import RoleMetrics, routes
from mixfuse.app.roles_store import StoredRoles
from mixfuse.contracts.adapter import fingerprint, verify
from mixfuse.contracts.database import opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import Strict, load
from mixfuse.fusion.calls.upstream import Endpoint
from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.http.gateway import create_app
from mixfuse.fusion.http.keys import ADMIN_KEY, has_keys
from mixfuse.serve.admission import Admission
from mixfuse.serve.engine import EngineConfig
from mixfuse.serve.engine_group import EngineGroup
from mixfuse.serve.following import RecordFollower
from mixfuse.serve.roles import BASE, RoleTable
from mixfuse.serve.slots import Revision
from mixfuse.serve.swap import Swapper
from mixfuse.serve.watch import Candidate, Folder, Watcher

logger = logging.getLogger(__name__)

# Longer than clients and load balancers keep an idle connection (5 to 60 s), so that none sends a request into a
# connection that this server is closing.
_KEEP_ALIVE_S = 75
_HUB_POLL_S = 60.0  # the Hub limits the rate of requests
# In nats. An unlikely token's log-probability easily differs by a few tenths between bfloat16 and float32.
_TOLERANCE_BELOW_FLOAT32 = 0.5


class GatewayConfig(Strict):
    """Where the gateway listens.

    Attributes:
        host: The address. Beyond loopback, an admin key is required to change roles.
        port: The port; 0 for any free one.
        drain_s: How long requests may continue after SIGTERM, in seconds; then they are cancelled.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    drain_s: Annotated[int, Field(ge=0)] = 10


class ServeConfig(Strict):
    """A serve config.

    Attributes:
        engine: The vLLM engine.
        gateway: The gateway in front of it.
        roles: Role → adapter directory; nothing for a role that the base serves until an adapter is swapped in. Used
            only for roles that the role table in the trace database does not know yet.
        roles_from: `config` takes all roles from this config, and writes them to the role table.
        roles_poll_s: Seconds between two reads of the role table, for changes by other gateways.
        watch: A folder: the newest adapter directory in `WATCH/ROLE/` is swapped in without a command. Or role → an
            adapter on the Hugging Face Hub, `org/name[@branch]`: fetched into `runs/hub/ROLE/` and swapped in when new.
        trusted_keys: Public keys. If there are any, only adapters signed with one of them are served.
        probe_tolerance: How far an adapter's log-probabilities may be from those stored with it, in nats. By default
            the stored tolerance for a float32 engine, else half a nat.
        gate: The limits that an adapter must keep in a swap with `--shadow` or `--canary`.
        fusion: The pool, the judge and the modes: here, or the path of a fusion config.
        logs: Folder for the engine's log.
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
    """The role table as the gateway uses it: each lease is an endpoint of an engine."""

    def __init__(self, table: RoleTable, engines: EngineGroup) -> None:
        self._table, self._engines = table, engines

    def names(self) -> list[str]:
        """The roles."""
        return self._table.names()

    @asynccontextmanager
    async def lease(self, role: str) -> AsyncIterator[Endpoint]:
        """Leases the role's revision and yields an engine's endpoint for it; waits for an engine that restarts."""
        async with self._table.lease(role) as revision, self._at(revision) as endpoint:
            yield endpoint

    @asynccontextmanager
    async def hold(self, revision: Revision) -> AsyncIterator[Endpoint]:
        """Leases this revision, serving or staged, and yields an engine's endpoint for it."""
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
        MixfuseError: The config is invalid, a port is in use, an adapter is refused, or the engine did not start or
            died.
    """
    config, fusion = configs(config_path, overrides)
    try:
        _run_event_loop(_serve(config, fusion))
    except (KeyboardInterrupt, asyncio.CancelledError):  # Ctrl-C, SIGTERM: how a server ends
        print("stopped", file=sys.stderr)


def configs(config_path: Path, overrides: list[str]) -> tuple[ServeConfig, FusionConfig]:
    """Loads a serve config and the fusion config it names, and checks that they agree.

    Raises:
        MixfuseError: One is invalid, or names a role that does not exist.
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
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - this coroutine is run by asyncio.Runner
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    console = Console(stderr=True)
    listener = _listen(config.gateway, fusion)
    with listener, opened(fusion.trace_db) as database:
        base = await asyncio.to_thread(fingerprint, config.engine.base)
        engine = EngineGroup(config.engine, logs=config.logs)
        where = ", ".join(config.engine.external) or f"log in {config.logs}"
        store = StoredRoles(database, f"{socket.gethostname()}:{listener.getsockname()[1]}")
        admission = Admission(
            base,
            config.engine.max_lora_rank,
            verify=partial(verify, trusted=config.trusted_keys),
            probe_tolerance=_probe_tolerance(config),
        )
        table = RoleTable(engine, list(config.roles), admission, max_loaded=config.engine.max_loaded, record=store)
        swapper = Swapper(table)
        follower = RecordFollower(swapper)
        roles = LeasedRoles(table, engine)
        gates = Gates(swapper, roles, fusion, config.gate)
        background: list[asyncio.Task[None]] = []
        try:
            with console.status(f"waiting for the engine on {config.engine.base} ({where})"):
                await engine.start()
                sources = await follower.start(config.roles, from_config=config.roles_from == "config")
            app = create_app(
                fusion,
                roles,
                extra_routes=routes(swapper, store, gates),
                checks={"engine": lambda: engine.running},
                observers=[gates.observe],
                collectors=[RoleMetrics(table)],
            )
            server = uvicorn.Server(_uvicorn(app, config.gateway))
            background = _background(config, swapper, follower)
            _print_ready(console, listener, _serving(table, sources))
            await _run_gateway(server, listener, engine)
        finally:
            for task in background:
                task.cancel()
            if background:
                await asyncio.wait(background)
            await gates.close()
            await swapper.close()
            await engine.stop()


async def _run_gateway(server: uvicorn.Server, listener: socket.socket, engine: EngineGroup) -> None:
    """Runs the gateway until it is stopped, or every engine is given up; that error is raised."""
    gateway = asyncio.create_task(server.serve(sockets=[listener]))
    failed = asyncio.create_task(engine.failed())
    await asyncio.wait({gateway, failed}, return_when=asyncio.FIRST_COMPLETED)
    if failed.done() and not gateway.done():
        server.should_exit = True
        await gateway
        raise failed.result()
    failed.cancel()
    await gateway


def _probe_tolerance(config: ServeConfig) -> float | None:
    """The tolerance for `Admission`; None for the one stored with each adapter, which holds for float32."""
    if config.probe_tolerance is None and config.engine.dtype != "float32":
        return _TOLERANCE_BELOW_FLOAT32
    return config.probe_tolerance


def _background(config: ServeConfig, swapper: Swapper, follower: RecordFollower) -> list["asyncio.Task[None]"]:
    """Starts the background tasks: following the shared record, and watching for new adapters."""
    tasks = [_repeat(follower.follow, config.roles_poll_s)]
    if isinstance(config.watch, dict):
        hub = HubSource(config.watch, config.engine.base)
        tasks += [_repeat(Watcher(swapper, hub, role).poll, _HUB_POLL_S) for role in config.watch]
    elif config.watch is not None:
        folder = Folder(config.watch)
        tasks += [_repeat(Watcher(swapper, folder, role).poll, config.roles_poll_s) for role in config.roles]
    return [asyncio.create_task(task) for task in tasks]


class HubSource:
    """A `mixfuse.serve.watch.Source`: adapters on branches of the Hugging Face Hub, fetched and verified.

    Args:
        names: Role → `org/name[@branch]`.
        base: The base model of the adapters.
        folder: Adapters are fetched into `FOLDER/ROLE/`.
    """

    def __init__(self, names: dict[str, str], base: Path, folder: Path = Path("runs/hub")) -> None:
        self._names, self._base, self._folder = names, base, folder

    async def newest(self, role: str) -> Candidate | None:
        """Returns the adapter at the head of the role's branch."""
        from mixfuse.app import hub

        name, folder = self._names[role], self._folder / role
        return Candidate(*await asyncio.to_thread(hub.newest, name, folder, base=self._base))


async def _repeat(work: Callable[[], Awaitable[None]], every_s: float) -> None:
    failure = ""
    while True:
        await asyncio.sleep(every_s)
        try:
            await work()
            failure = ""
        except MixfuseError as error:
            if str(error) != failure:  # log it once, not every two seconds
                failure = str(error)
                logger.warning("%s", error)
        except Exception:
            logger.exception("the role table cannot be followed, or a folder not be watched, for now")


def _serving(table: RoleTable, sources: dict[str, str]) -> str:
    """The part of the "ready" line with each role's revision, and its source."""
    return ", ".join(
        f"{role}={revision.revision or BASE}" + (f" from the {sources[role]}" if role in sources else "")
        for role, revision in table.serving().items()
    )


def run_gateway(config_path: Path, overrides: list[str], address: GatewayConfig) -> None:
    """`mixfuse gateway`: runs the gateway without an engine, for a pool served elsewhere, until Ctrl-C or SIGTERM.

    Raises:
        MixfuseError: The config is invalid, or the port is in use.
    """
    config = load(config_path, FusionConfig, overrides)
    with _listen(address, config) as listener:
        server = uvicorn.Server(_uvicorn(create_app(config, None), address))
        names = ", ".join(member.name for member in config.members)
        _print_ready(Console(stderr=True), listener, names)
        try:
            _run_event_loop(server.serve(sockets=[listener]))
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)


def _run_event_loop(main: Coroutine[Any, Any, None]) -> None:
    """As `asyncio.run`, on uvloop's event loop, with the garbage collector set for a server."""
    # What is loaded now lives until the end. Not scanning it again takes a tenth off the CPU time of a best_of.
    gc.collect()
    gc.freeze()
    # A fused request holds a connection for each of its calls: 500 requests at once exceed the usual limit of 1024.
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
        proxy_headers=False,  # no code here needs the client's address
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=gateway.drain_s,
        lifespan="on",
    )


def _print_ready(console: Console, listener: socket.socket, what: str) -> None:
    host, port = listener.getsockname()[:2]
    console.print(f"ready: http://{host}:{port}/v1 ({what})", markup=False, highlight=False, soft_wrap=True)


def _listen(gateway: GatewayConfig, fusion: FusionConfig) -> socket.socket:
    if not _loopback(gateway.host) and not os.environ.get(ADMIN_KEY):
        raise MixfuseError(
            f"gateway.host {gateway.host} is reachable from outside: set {ADMIN_KEY} first, or anybody could swap "
            "adapters"
        )
    if not _loopback(gateway.host) and fusion.api_keys == "auto" and not has_keys(fusion.trace_db):
        raise MixfuseError(
            f"gateway.host {gateway.host} is reachable from outside, and there is no API key: add one "
            "(mixfuse keys add), or open it to everybody with `api_keys: off` in the fusion config"
        )
    listener = socket.socket(socket.AF_INET6 if ":" in gateway.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((gateway.host, gateway.port))
        listener.listen(2048)  # so that a client that reads "ready" can connect
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
