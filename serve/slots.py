"""The places for adapters in the engine: at most `max_loaded`, and the least recently used makes room for the next.

A revision's *residency* is one period during which the engine has it loaded. It begins with the first request that
needs the revision, and ends when the revision has to make room or its role is served by another. Requests that arrive
during the load wait for that load. A residency that has to end takes no new requests and ends with its last one; new
requests wait for the next residency, so a busy adapter cannot keep the others out.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mixfuse.contracts.adapter import Manifest
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import Calibration

logger = logging.getLogger(__name__)

OWNED_BY = "~"
"""Before the gateway's token, in the name of an adapter in an engine that several gateways use."""


class Trouble(NamedTuple):
    """What keeps engines from answering as a model.

    Attributes:
        why: The reason.
        dead: Whether no engine can answer; otherwise some can.
    """

    why: str
    dead: bool


class AdapterEngine(Protocol):
    """What the role table needs of an engine (`mixfuse.serve.engine_group.EngineGroup` is one)."""

    base_model_name: str

    async def ready(self) -> None:
        """Returns once an engine is ready; raises if it has waited for one in vain."""
        ...

    async def load_adapter(self, name: str, path: Path) -> None:
        """Loads an adapter, which then answers as model `name`."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Unloads the adapter of that name."""
        ...

    def trouble(self, name: str) -> Trouble | None:
        """What keeps engines from answering as a model; None if nothing does."""
        ...

    async def repair(self, name: str) -> None:
        """Loads an adapter again where an engine has lost it."""
        ...

    async def probe(self, name: str) -> None:
        """Asks the model of that name for one token; raises if it does not answer."""
        ...

    def each(self) -> "Sequence[ProbedEngine]":
        """The engines, one by one: a swap probes every one."""
        ...


class ProbedEngine(Protocol):
    """What probes need of one engine (`mixfuse.serve.vllm_api.VllmApi` is one)."""

    base_model_name: str

    @property
    def started(self) -> str | None:
        """A text that each start of the engine has for itself; None if starts cannot be told apart."""
        ...

    async def busy(self) -> bool:
        """Whether it works on a request, or has one waiting."""
        ...

    async def ranks(self) -> "Sequence[ProbedEngine]":
        """Its data-parallel copies of the model, each to be asked alone; itself if it has one."""
        ...

    async def max_model_len(self) -> int | None:
        """The longest prompt and completion together, in tokens; None if it does not say."""
        ...

    async def probe(self, name: str) -> None:
        """Asks the model of that name for one token; raises if it does not answer."""
        ...

    async def prompt_logprobs(self, name: str, prompt: list[int]) -> list[float]:
        """Log-probabilities, in nats, of each prompt token but the first, given the tokens before it."""
        ...

    async def decode(self, name: str, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
        """Writes on greedily; returns the tokens' ids and their log-probabilities, in nats."""
        ...

    async def first_token_logprobs(self, name: str, messages: list[dict[str, str]]) -> dict[str, float]:
        """Token text → log-probability, in nats, of the likeliest first tokens of the answer to chat messages."""
        ...


@dataclass(eq=False)
class Revision:
    """One adapter revision, loaded or not.

    Attributes:
        model: Its name in the engine: `ROLE@REVISION`, or the base's own name. `~` and the gateway's token follow where
            several gateways use the engine.
        revision: The adapter's revision; None for the base.
        directory: The adapter directory; None for the base.
        copy: The copy of it that the engine reads; None for the base, and once the revision is given up.
        files: File → SHA-256, from its manifest.
        calibration: How to read a judge's probabilities, from its manifest.
        in_flight: Requests that lease it, those that wait for its load included.
    """

    model: str
    revision: str | None = None
    directory: Path | None = None
    copy: Path | None = None
    files: Mapping[str, str] = field(default_factory=dict, repr=False)
    calibration: Calibration | None = None
    in_flight: int = 0
    _drained: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    _residency: "_Residency | None" = field(default=None, repr=False)

    @classmethod
    def of(cls, role: str, manifest: Manifest, directory: Path, copy: Path, *, owner: str = "") -> "Revision":
        """The revision in an adapter directory, named for a role, and for the gateway where the engine has several."""
        name = f"{role}@{manifest.revision}" + (f"{OWNED_BY}{owner}" if owner else "")
        return cls(name, manifest.revision, directory, copy, manifest.files, manifest.calibration)

    @property
    def loaded(self) -> bool:
        """Whether requests can use it at once."""
        return self.revision is None or (self._residency is not None and self._residency.ready)

    def acquire(self) -> None:
        """Counts a request that leases it."""
        self.in_flight += 1
        self._drained.clear()

    def release(self) -> None:
        """Counts a request that has ended."""
        self.in_flight -= 1
        if not self.in_flight:
            self._drained.set()

    async def drained(self) -> None:
        """Returns when no request leases the revision, or its drain is cancelled."""
        if self.in_flight:
            await self._drained.wait()

    def cancel_drain(self) -> None:
        """Makes `drained` return now, because the revision serves again; later calls wait as before."""
        self._drained.set()
        if self.in_flight:
            self._drained.clear()


@dataclass(eq=False)
class _Residency:
    """One period during which the engine has a revision loaded.

    Attributes:
        staged: Whether it is beside the places: it needs no room, and is never evicted.
        last_used: When it was used last, counted in uses of all residencies.
        ready: Whether the load is done.
        users: Requests that use it or wait for its load.
        idle: Set while there are no users.
        unloaded: Set once it is unloaded.
        loading: The load.
    """

    revision: Revision
    staged: bool
    last_used: int
    ready: bool = False
    users: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    unloaded: asyncio.Event = field(default_factory=asyncio.Event)
    loading: "asyncio.Task[None] | None" = None


@dataclass
class LoadCounts:
    """How many adapters were loaded (`loads`, `load_seconds` in all), failed to load, and were evicted."""

    loads: int = 0
    load_seconds: float = 0.0
    failures: int = 0
    evictions: int = 0


class Slots:
    """The places for adapters in one engine.

    Args:
        engine: The running engine.
        max_loaded: How many adapters may be loaded at once, staged ones not counted; None for no limit.
        recheck: Called with a revision before it is loaded again; raises if its copy has changed.
        pinned: Whether a revision must stay loaded.
    """

    def __init__(
        self,
        engine: AdapterEngine,
        max_loaded: int | None,
        *,
        recheck: Callable[[Revision], Awaitable[None]],
        pinned: Callable[[Revision], bool],
    ) -> None:
        self._engine, self.max_loaded, self._recheck, self._pinned = engine, max_loaded, recheck, pinned
        self.counts = LoadCounts()
        self._residencies: dict[str, _Residency] = {}
        self._uses = 0
        self._room = asyncio.Lock()  # residencies that need a place take turns, in the order of asking
        self._engine_turn = asyncio.Lock()  # the engine loads or unloads one adapter at a time
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: set[asyncio.Future[None]] = set()  # loads that have not begun, as no engine is ready

    @property
    def loaded(self) -> int:
        """How many adapters are in the engine now."""
        return len(self._residencies)

    @asynccontextmanager
    async def resident(self, revision: Revision) -> AsyncIterator[None]:
        """Keeps a revision loaded while the block runs; loads it first if it is not.

        Raises:
            MixfuseError: It cannot be loaded.
        """
        if revision.revision is None:
            yield
            return
        residency = revision._residency or self._begin(revision, staged=False)
        residency.users += 1
        residency.idle.clear()
        try:
            if not residency.ready and residency.loading is not None:
                await asyncio.shield(residency.loading)
            yield
        finally:
            self._uses += 1
            residency.last_used = self._uses
            residency.users -= 1
            if not residency.users:
                residency.idle.set()

    async def stage(self, revision: Revision) -> None:
        """Loads a revision beside the places. A cancelled call leaves nothing in the engine.

        Raises:
            MixfuseError: It cannot be loaded.
        """
        residency = self._begin(revision, staged=True)
        assert residency.loading is not None  # noqa: S101 - begun in the line above
        try:
            await asyncio.shield(residency.loading)
        except asyncio.CancelledError:
            await asyncio.wait({residency.loading})  # vLLM cannot stop a load half-way
            if revision.loaded:
                await self.remove(revision)
            raise

    def settle(self, revision: Revision) -> None:
        """Moves a staged revision into the places. If that is one too many, another is evicted."""
        if revision._residency is not None:
            revision._residency.staged = False
        if self.max_loaded is not None and self._taken() > self.max_loaded:
            self._background(self._evict_surplus())

    async def remove(self, revision: Revision) -> None:
        """Unloads a revision, if it is loaded. No request may lease it."""
        residency, revision._residency = revision._residency, None
        if residency is not None:
            await self._end(residency)

    async def close(self) -> None:
        """Waits for the loads and unloads in progress. Loads that wait for an engine are given up."""
        for waiting in self._waiting:
            waiting.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _begin(self, revision: Revision, *, staged: bool) -> _Residency:
        residency = revision._residency = _Residency(revision, staged, self._uses)
        residency.loading = self._background(self._load(residency))
        return residency

    def _background(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._background_done)
        return task

    def _background_done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("%s", error)  # raised where the task is awaited

    async def _load(self, residency: _Residency) -> None:
        try:
            if residency.staged:
                await self._load_into_engine(residency)
            else:
                async with self._room:
                    await self._recheck(residency.revision)
                    await self._make_room()
                    await self._load_into_engine(residency)
        except BaseException:
            self.counts.failures += 1
            if residency.revision._residency is residency:
                residency.revision._residency = None
            raise
        residency.ready = True

    async def _load_into_engine(self, residency: _Residency) -> None:
        revision = residency.revision
        assert revision.copy is not None  # noqa: S101 - the base is never loaded
        while previous := self._residencies.get(revision.model):  # the revision's last residency is about to end
            await previous.unloaded.wait()
        waiting = asyncio.ensure_future(self._engine.ready())
        self._waiting.add(waiting)
        try:
            await waiting
        finally:
            self._waiting.discard(waiting)
        async with self._engine_turn:
            began = time.monotonic()
            try:
                await self._engine.load_adapter(revision.model, revision.copy)
            except MixfuseError as error:
                if error.kind == "engine":  # the engine did not answer, but may have loaded the adapter
                    with suppress(MixfuseError):
                        await self._engine.unload_adapter(revision.model)
                raise
            self._residencies[revision.model] = residency
            self.counts.loads += 1
            self.counts.load_seconds += time.monotonic() - began

    async def _end(self, residency: _Residency) -> None:
        model = residency.revision.model
        async with self._engine_turn:
            if self._residencies.get(model) is not residency:
                return
            try:
                await self._engine.unload_adapter(model)
            except MixfuseError as error:  # it is not there, or the engine is gone: nothing answers under the name
                logger.warning("%s could not be unloaded: %s", model, error)
            del self._residencies[model]
            residency.unloaded.set()

    def _taken(self) -> int:
        return sum(not residency.staged for residency in self._residencies.values())

    async def _make_room(self, wanted: int = 1) -> None:
        """Evicts adapters until `wanted` places are free: idle ones before busy ones, then the least recently used."""
        while self.max_loaded is not None and self._taken() + wanted > self.max_loaded:
            evictable = [
                residency
                for residency in self._residencies.values()
                if not residency.staged and not self._pinned(residency.revision)
            ]
            if not evictable:
                raise MixfuseError(
                    f"the engine's {self.max_loaded} places for adapters are all taken by pinned roles; unpin one "
                    "(mixfuse roles unpin) or raise engine.max_loaded",
                    kind="engine",
                )
            victim = min(evictable, key=lambda residency: (residency.users > 0, residency.last_used))
            if victim.revision._residency is victim:
                victim.revision._residency = None  # new requests of its role wait for its next residency
            if victim.users:
                await victim.idle.wait()
            self.counts.evictions += 1
            await self._end(victim)

    async def _evict_surplus(self) -> None:
        async with self._room:
            await self._make_room(0)
