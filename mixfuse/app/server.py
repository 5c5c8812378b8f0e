"""`mixfuse serve`: composes the engine, its role table and the gateway, and ends them together.

And `mixfuse gateway`: the gateway without an engine.

Here the rooms `serve` and `fusion` meet. The gateway asks for a role, and the role table leases it the model that
serves the role at that moment.
"""

import asyncio
import errno
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
from typing import Annotated, Any, Literal, Self, TypeVar

import uvicorn
import uvloop
from pydantic import Field, field_validator, model_validator
from rich.console import Console
from starlette.applications import Starlette
from starlette.types import ASGIApp

from mixfuse.app import workers
from mixfuse.app.admin_api import GateRequest, SwapRequest
from mixfuse.app.engine_lease import EngineLease
from mixfuse.app.engine_metrics import EngineMetrics
from mixfuse.app.gates import GateConfig, Gates, limits_of
from mixfuse.app.roles_routes import RoleMetrics, routes
from mixfuse.app.roles_store import StoredRoles
from mixfuse.contracts.adapter import TrustedKey, check_role_name, fingerprint, verify
from mixfuse.contracts.bounded_json import shortened
from mixfuse.contracts.database import opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.model_card import is_hub_id
from mixfuse.contracts.paths import FilePath
from mixfuse.contracts.signing import public_key
from mixfuse.contracts.strict_yaml import Strict, load
from mixfuse.fusion.calls.board import SharedBoard
from mixfuse.fusion.calls.upstream import Endpoint
from mixfuse.fusion.config import FusionConfig, ModelConfig
from mixfuse.fusion.http.gateway import create_app
from mixfuse.fusion.http.inside import Inside
from mixfuse.fusion.http.keys import ADMIN_KEY, has_keys
from mixfuse.fusion.http.team import Team
from mixfuse.fusion.ui.mount import ui
from mixfuse.serve.admission import Admission
from mixfuse.serve.copies import AdapterCopies
from mixfuse.serve.engine import EngineConfig, served_template
from mixfuse.serve.engine_group import EngineGroup
from mixfuse.serve.following import RecordFollower
from mixfuse.serve.precision import precision
from mixfuse.serve.probes import Terms
from mixfuse.serve.roles import BASE, RoleTable
from mixfuse.serve.slots import Revision
from mixfuse.serve.swap import Swapper
from mixfuse.serve.watch import Candidate, Folder, Watcher

logger = logging.getLogger(__name__)
UI_PAGES = "mixfuse.app.pages"
"""The package of the pages at `/ui` in which rooms meet."""

AnyModel = TypeVar("AnyModel", bound=ModelConfig)

_LOOK_S = 0.02
_KEPT = 3  # fetched adapters that served a role last; a rollback goes back to them
_BURY_S = 5.0
_SAY_S = 0.2
_HUB_POLL_S = 60.0  # the Hub limits the rate of requests


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
            Of the fetched ones, those that served the role last are kept, for a rollback.
        watch_gate: The gate that a watched adapter has to pass, as the options of `mixfuse roles swap`: `shadow`,
            `canary`, `for_s`, `requests`, `timeout_s`, `limits`. By default it serves at once.
        trusted_keys: Public keys (PEM files), or `{key: FILE, until: DAY}`. If there are any, only adapters signed with
            one of them are loaded.
        revoked_keys: Public keys whose adapters are not loaded, whoever trusts them. The files are read at each check.
        probe_tolerance: How far an adapter's log-probabilities may always be from those stored with it, in nats, as
            median and quantiles; twice what the base itself is off by is always allowed. By default 0.001 for a float32
            engine, else 0.02, or 0.5 for probes of earlier versions, which do not hold the base's. A judge's verdict
            may be off by half of what the 99 % quantile may; where it was measured in an engine of this format, by 0.05
            at least.
        adapters_without_probes: `refuse` serves only adapters that have `probes.json`. Every adapter that is exported
            from a run has, and every one that passed `adapter verify --base`.
        gate: The limits that an adapter must keep in a swap with `--shadow` or `--canary`.
        fusion: The pool, the judge and the modes: here, or the path of a fusion config.
        logs: Folder for the engine's log.
        state: Folder for what the server needs while it runs: the copies of adapters that the engine reads. Where
            engines run on other hosts, it must be on a file system that they share, under the same path.
    """

    engine: EngineConfig
    gateway: GatewayConfig = GatewayConfig()
    roles: dict[str, FilePath | None] = {}
    roles_from: Literal["table", "config"] = "table"
    roles_poll_s: Annotated[float, Field(ge=0.01)] = 2.0
    watch: FilePath | dict[str, str] | None = None
    watch_gate: GateRequest | None = None
    trusted_keys: list[TrustedKey | FilePath] = []
    revoked_keys: list[FilePath] = []
    probe_tolerance: Annotated[float, Field(gt=0)] | None = None
    adapters_without_probes: Literal["serve", "refuse"] = "serve"
    gate: GateConfig = GateConfig()
    fusion: FusionConfig | FilePath
    logs: FilePath = Path("runs/logs")
    state: FilePath = Path("runs/state")

    @field_validator("roles")
    @classmethod
    def _names(cls, roles: dict[str, FilePath | None]) -> dict[str, Path | None]:
        for name in roles:
            check_role_name(name)
        return roles

    @model_validator(mode="after")
    def _check_watch(self) -> Self:
        if self.watch_gate is not None and self.watch is None:
            raise ValueError("`watch_gate` goes with `watch`")
        if self.watch_gate is not None and not self.watch_gate.gated:
            raise ValueError("`watch_gate` needs `shadow` or `canary`")
        if self.watch_gate is not None:
            try:
                limits_of(self.gate, self.watch_gate)
            except MixfuseError as error:
                raise ValueError(f"`watch_gate`: {error}") from None
        for role, source in self.watch.items() if isinstance(self.watch, dict) else ():
            name, at, branch = source.partition("@")
            if not is_hub_id(name) or (at and not branch):
                raise ValueError(
                    f"`watch`: {role}: {shortened(repr(source), 120)} is no adapter on the Hub; write org/name or "
                    "org/name@branch"
                )
        return self

    @property
    def sized_engine(self) -> EngineConfig:
        """The engine, with a cache of adapters that fits the roles."""
        return self.engine.for_roles(len(self.roles))


class LeasedRoles:
    """The role table as the gateway uses it: each lease is an endpoint of an engine.

    Args:
        table: The role table.
        engines: The engines.
        valid: Whether this gateway may answer, where others use the engines too.
    """

    def __init__(self, table: RoleTable, engines: EngineGroup, valid: Callable[[], bool] = lambda: True) -> None:
        self._table, self._engines, self._valid = table, engines, valid

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

    async def _regain(self, model: str) -> bool:
        return self._valid() and await self._engines.regain(model)

    @asynccontextmanager
    async def _at(self, revision: Revision) -> AsyncIterator[Endpoint]:
        if not self._valid():
            raise MixfuseError(
                "this gateway cannot reach the database by which it shares its engines; until then others may swap "
                "roles without it, so it does not answer",
                kind="engine",
            )
        async with self._engines.at(revision.model) as address:
            yield Endpoint(
                address.url,
                revision.model,
                address.api_key,
                revision.revision,
                calibration=revision.calibration,
                regain=partial(self._regain, revision.model),
            )


def run(config_path: Path, overrides: list[str]) -> None:
    """Serves until Ctrl-C or SIGTERM; both end the engine too.

    Raises:
        MixfuseError: The config is invalid, a port is in use, an adapter is refused, or the engine did not start or
            died.
    """
    config, fusion = configs(config_path, overrides)
    _check_files(config)
    try:
        _run_event_loop(_serve(config, fusion))
    except (KeyboardInterrupt, asyncio.CancelledError):  # Ctrl-C, SIGTERM: how a server ends
        print("stopped", file=sys.stderr)


def _check_files(config: ServeConfig) -> None:
    """Refuses keys that cannot be read, with which every adapter would be, and a file that stands as watched folder.

    Raises:
        MixfuseError: There is one.
    """
    for key in config.trusted_keys:
        public_key(key.key if isinstance(key, TrustedKey) else key)
    for key in config.revoked_keys:
        public_key(key)
    if isinstance(config.watch, Path) and os.path.lexists(config.watch) and not config.watch.is_dir():
        raise MixfuseError(f"watch: {config.watch} is no folder; name one with adapter directories in ROLE/")


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
    return config, _with_tokenizer(fusion, config.engine.base / "tokenizer.json")


def _with_tokenizer(fusion: FusionConfig, tokenizer: Path) -> FusionConfig:
    """Names the base's tokenizer for every role: its prompts are counted by it, and its control tokens are known."""
    if not tokenizer.is_file():
        return fusion

    def named(model: AnyModel) -> AnyModel:
        return model if model.role is None or model.tokenizer else model.model_copy(update={"tokenizer": tokenizer})

    return fusion.model_copy(
        update={
            "members": tuple(map(named, fusion.members)),
            "judge": fusion.judge and named(fusion.judge),
            "synthesizer": fusion.synthesizer and named(fusion.synthesizer),
        }
    )


async def _serve(config: ServeConfig, fusion: FusionConfig) -> None:
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - this coroutine is run by asyncio.Runner
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    console = Console(stderr=True)
    listener = listen(config.gateway, fusion)
    with listener, opened(fusion.trace_db) as database:
        base = await asyncio.to_thread(fingerprint, config.engine.base)
        engine = EngineGroup(config.sized_engine, logs=config.logs)
        where = ", ".join(config.engine.external) or f"log in {config.logs}"
        copies = await asyncio.to_thread(
            AdapterCopies, config.state / "adapters", others_read=bool(config.engine.external)
        )
        gateway = f"{socket.gethostname()}:{listener.getsockname()[1]}"
        lease = EngineLease(database, gateway, config.engine.external)
        store = StoredRoles(database, gateway, lease)
        admission = Admission(
            base,
            config.engine.max_lora_rank,
            verify=partial(verify, trusted=config.trusted_keys, revoked=config.revoked_keys),
            terms=_terms(config),
            unprobed=config.adapters_without_probes == "serve",
            copies=copies,
            base_folder=config.engine.base,
            dtype=None if config.engine.served_dtype == "auto" else config.engine.served_dtype,
            chat_template=await asyncio.to_thread(served_template, config.engine),
            owner=lease.owner,
        )
        table = RoleTable(engine, list(config.roles), admission, max_loaded=config.engine.max_loaded, record=store)
        swapper = Swapper(table)
        follower = RecordFollower(swapper)
        roles = LeasedRoles(table, engine, lambda: lease.valid)
        gates = Gates(swapper, roles, fusion, config.gate)
        background: list[asyncio.Task[None]] = []
        try:
            await lease.take()
            with console.status(f"waiting for the engine on {config.engine.base} ({where})"):
                await engine.start()
                await lease.bury(engine.unload_of)
                sources = await follower.start(config.roles, from_config=config.roles_from == "config")
                await lease.say(follower.versions(), follower.answers())
                await follower.follow()  # what was swapped before the others knew of this gateway
            app = create_app(
                fusion,
                roles,
                extra_routes=routes(swapper, store, gates),
                checks={"engine": lambda: engine.running},
                troubles=table.troubles,
                observers=[gates.observe],
                collectors=[RoleMetrics(table), EngineMetrics(engine, table)],
                ui=_ui(fusion, config.gateway),
            )
            server = uvicorn.Server(_uvicorn(app, config.gateway))
            background = _background(config, swapper, partial(lease.catch_up, follower.follow), gates, store)
            if lease.owner:
                background += [
                    asyncio.create_task(_repeat(partial(lease.bury, engine.unload_of), _BURY_S)),
                    asyncio.create_task(_repeat(lambda: lease.say(follower.versions(), follower.answers()), _SAY_S)),
                ]
            _print_ready(console, listener, _serving(table, sources), page=_ui(fusion, config.gateway) is not None)
            await _run_gateway(server, listener, engine, lease)
        finally:
            for task in background:
                task.cancel()
            if background:
                await asyncio.wait(background)
            await gates.close()
            await swapper.close()
            await engine.stop()  # nothing loads an adapter again
            await lease.release(engine.unload_of)
            copies.close()


async def _run_gateway(
    server: uvicorn.Server, listener: socket.socket, engine: EngineGroup, lease: EngineLease
) -> None:
    """Runs the gateway until it is stopped; or every engine is given up, or a lease is lost: that error is raised."""
    gateway = asyncio.create_task(server.serve(sockets=[listener]))
    ends = [asyncio.create_task(engine.failed()), asyncio.create_task(lease.lost())]
    await asyncio.wait({gateway, *ends}, return_when=asyncio.FIRST_COMPLETED)
    if not gateway.done():
        server.should_exit = True
        await gateway
        raise next(end.result() for end in ends if end.done())
    for end in ends:
        end.cancel()
    await gateway


def _terms(config: ServeConfig) -> Terms:
    """By what an adapter's answers to its probes are judged."""
    return Terms(config.probe_tolerance, precision(config.engine))


def _background(
    config: ServeConfig, swapper: Swapper, follow: Callable[[], Awaitable[None]], gates: Gates, store: StoredRoles
) -> list["asyncio.Task[None]"]:
    """Starts the background tasks: following the shared record, and watching for new adapters."""
    asked = config.watch_gate.model_dump() if config.watch_gate is not None else None

    async def through_gate(role: str, directory: Path) -> None:
        await gates.through(role, SwapRequest(directory=directory, **(asked or {})))

    swap = through_gate if asked is not None else None
    tasks = [_repeat(follow, config.roles_poll_s)]
    if isinstance(config.watch, dict):
        hub = HubSource(config.watch, config.engine.base, store)
        tasks += [_repeat(Watcher(swapper, hub, role, swap).poll, _HUB_POLL_S) for role in config.watch]
    elif config.watch is not None:
        folder = Folder(config.watch)
        tasks += [_repeat(Watcher(swapper, folder, role, swap).poll, config.roles_poll_s) for role in config.roles]
    return [asyncio.create_task(task) for task in tasks]


class HubSource:
    """A `mixfuse.serve.watch.Source`: adapters on branches of the Hugging Face Hub, fetched and verified.

    Args:
        names: Role → `org/name[@branch]`.
        base: The base model of the adapters.
        store: Knows which of them served.
        folder: Adapters are fetched into `FOLDER/ROLE/`.
    """

    def __init__(self, names: dict[str, str], base: Path, store: StoredRoles, folder: Path = Path("runs/hub")) -> None:
        self._names, self._base, self._store, self._folder = names, base, store, folder

    async def newest(self, role: str) -> Candidate | None:
        """Returns the adapter at the head of the role's branch."""
        from mixfuse.app import hub

        name, folder = self._names[role], self._folder / role
        candidate = Candidate(*await asyncio.to_thread(hub.newest, name, folder, base=self._base))
        await asyncio.to_thread(hub.prune, folder, candidate.directory, await self._store.served(role, _KEPT))
        return candidate


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


def run_gateway(config_path: Path, overrides: list[str], address: GatewayConfig, count: int = 1) -> None:
    """`mixfuse gateway`: runs the gateway without an engine, for a pool served elsewhere, until Ctrl-C or SIGTERM.

    Args:
        config_path: The fusion config.
        overrides: Changes to it.
        address: Where it listens.
        count: The number of worker processes.

    Raises:
        MixfuseError: The config is invalid, the port is in use, or the workers cannot share a limit.
    """
    config = load(config_path, FusionConfig, overrides)
    names = ", ".join(member.name for member in config.members)
    if count > 1:
        _run_workers(config, address, count, names)
        return
    with listen(address, config, host="--host", port="--port") as listener:
        page = _ui(config, address)
        server = uvicorn.Server(_uvicorn(create_app(config, None, ui=page), address))
        _print_ready(Console(stderr=True), listener, names, page=page is not None)
        try:
            _run_event_loop(server.serve(sockets=[listener]))
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)


def _run_workers(config: FusionConfig, address: GatewayConfig, count: int, names: str) -> None:
    models = [*config.members, *config.embeddings, *filter(None, (config.judge, config.synthesizer))]
    workers.check(count, [(str(model.model), model.max_concurrency) for model in models])
    sockets = workers.listeners(listen(address, config, host="--host", port="--port"), count)
    with opened(config.trace_db):
        pass  # brought up to date once, before all workers open it
    board, folder = SharedBoard.create(count), workers.folder()

    def work(number: int, ready: Callable[[], None], parent: int) -> None:
        team = Team(SharedBoard(board, number, count), folder)
        app = create_app(config, None, team=team, ui=_ui(config, address))
        server = uvicorn.Server(_uvicorn(app, address))
        _run_event_loop(_work(server, sockets[number], ready, parent))

    def ready() -> None:
        page = _ui(config, address) is not None
        _print_ready(Console(stderr=True), sockets[0], f"{names}; {count} workers", page=page)

    gc.collect()
    gc.freeze()  # the workers share what is loaded now
    try:
        how = workers.run(count, work, drain_s=address.drain_s, ready=ready)
    finally:
        workers.close(sockets)
        workers.remove(folder)
    if how == signal.SIGINT:
        print("stopped", file=sys.stderr)
    else:  # ends as one process does
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)


async def _work(server: uvicorn.Server, listener: socket.socket, ready: Callable[[], None], parent: int) -> None:
    """Serves as one of several workers; ends when the parent does, however that ends."""
    loop = asyncio.get_running_loop()

    def orphaned() -> None:
        loop.remove_reader(parent)
        server.should_exit = True

    loop.add_reader(parent, orphaned)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(_LOOK_S)
    if server.started:
        ready()
    await serving


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
        http=app.state.connections.protocol,
        ws="none",
        timeout_graceful_shutdown=gateway.drain_s,
        lifespan="on",
    )


def _ui(fusion: FusionConfig, gateway: GatewayConfig) -> Callable[[Inside], ASGIApp] | None:
    """The page at `/ui`, where the config wants it."""
    wanted = _loopback(gateway.host) if fusion.ui is None else fusion.ui
    return ui(UI_PAGES) if wanted else None


def _print_ready(console: Console, listener: socket.socket, what: str, *, page: bool) -> None:
    host, port = listener.getsockname()[:2]
    console.print(f"ready: http://{host}:{port}/v1 ({what})", markup=False, highlight=False, soft_wrap=True)
    if page:
        console.print(f"page: http://{host}:{port}/ui", markup=False, highlight=False, soft_wrap=True)


def listen(
    gateway: GatewayConfig, fusion: FusionConfig, *, host: str = "gateway.host", port: str = "gateway.port"
) -> socket.socket:
    """Opens the gateway's socket; `host` and `port` are what the user calls the two.

    Raises:
        MixfuseError: The address cannot be used, or is open to all.
    """
    if not _loopback(gateway.host) and not os.environ.get(ADMIN_KEY):
        raise MixfuseError(
            f"{host} {gateway.host} is reachable from outside: set {ADMIN_KEY} first, or anybody could swap adapters"
        )
    if not _loopback(gateway.host) and fusion.api_keys == "auto" and not has_keys(fusion.trace_db):
        raise MixfuseError(
            f"{host} {gateway.host} is reachable from outside, and there is no API key: add one "
            "(mixfuse keys add), or open it to everybody with `api_keys: off` in the fusion config"
        )
    listener = workers.tcp_socket(socket.AF_INET6 if ":" in gateway.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((gateway.host, gateway.port))
        listener.listen(2048)  # so that a client that reads "ready" can connect
    except (OSError, UnicodeError) as error:  # a name with an empty or too long part is no UTF-8 error, but IDNA's
        listener.close()
        of_host = not isinstance(error, OSError) or isinstance(error, socket.gaierror)
        of_host = of_host or error.errno == errno.EADDRNOTAVAIL  # type: ignore[union-attr]
        reason = error.strerror if isinstance(error, OSError) else "no host has such a name"
        at = f"{gateway.host[:200]}:{gateway.port}"
        raise MixfuseError(f"cannot listen on {at}: {reason}; choose another {host if of_host else port}") from None
    return listener


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
