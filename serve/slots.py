"""Which adapters are in the engine: at most so many, and the least recently used makes room for the next.

A revision's *stay* in the engine begins with the first request that needs it and ends when it has to make room, or
when its role is served by another. Whoever asks while it is being loaded waits for the same load. A stay that has to
end takes no new requests, and ends when the last one it has is done: new ones wait for the next stay, so a busy
adapter cannot keep the others out.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import Calibration

logger = logging.getLogger(__name__)


class AdapterEngine(Protocol):
    """What the role table needs of an engine (`mixfuse.serve.engine.Engine` is one)."""

    base_model_name: str

    async def load_adapter(self, name: str, path: Path) -> None:
        """Makes an adapter servable under `name`."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Forgets the adapter of that name."""
        ...

    async def probe(self, name: str) -> None:
        """Has the model of that name answer one token; raises where it does not."""
        ...

    async def prompt_logprobs(self, name: str, prompt: list[int]) -> list[float]:
        """Log-probabilities, in nats, of a prompt's token ids but the first, each given those before it."""
        ...

    async def first_token_logprobs(self, name: str, messages: list[dict[str, str]]) -> dict[str, float]:
        """Token text → log-probability, in nats, of the likeliest first tokens of the answer to chat messages."""
        ...


@dataclass(eq=False)
class Revision:
    """One adapter revision, in the engine or able to come there.

    Attributes:
        model: Its name in the engine: `ROLE@REVISION`, or the base's own.
        revision: The adapter's revision; None for the base.
        directory: Where it is loaded from; None for the base.
        calibration: How a judge's probabilities are to be read, from its manifest.
        in_flight: Requests that hold it, those that wait for its load among them.
    """

    model: str
    revision: str | None = None
    directory: Path | None = None
    calibration: Calibration | None = None
    in_flight: int = 0
    _drained: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    _stay: "_Stay | None" = field(default=None, repr=False)

    @property
    def loaded(self) -> bool:
        """Whether requests for it need not wait."""
        return self.revision is None or (self._stay is not None and self._stay.ready)

    def _enter(self) -> None:
        self.in_flight += 1
        self._drained.clear()

    def _leave(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._drained.set()

    async def drained(self) -> None:
        """Returns when no request holds the revision, or it shall stay on all the same."""
        if self.in_flight:
            await self._drained.wait()

    def stay_on(self) -> None:
        """Lets go who waits for it to be drained: it is needed again."""
        self._drained.set()
        if self.in_flight:
            self._drained.clear()


@dataclass(eq=False)
class _Stay:
    """One stay of a revision in the engine.

    Attributes:
        kept: It is staged: it takes a place of its own, beside the others', and makes no room.
        used: When it was used last, in uses of any stay.
        ready: It is loaded.
        holders: Requests that use it, or wait for it to be loaded.
        empty: There are no holders.
        gone: It is unloaded.
        loading: Its load.
    """

    revision: Revision
    kept: bool
    used: int
    ready: bool = False
    holders: int = 0
    empty: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    loading: "asyncio.Task[None] | None" = None


@dataclass
class Counts:
    """What has come and gone: `loads` (and their seconds together), `failures` to load, and `evictions`."""

    loads: int = 0
    load_seconds: float = 0.0
    failures: int = 0
    evictions: int = 0


class Slots:
    """The places for adapters in one engine.

    Args:
        engine: The running engine.
        most: How many adapters are loaded at once, staged ones aside; None for no limit.
        verify: Called with a revision before it is loaded on demand; raises where its files have changed.
        pinned: Whether a revision has to stay.
    """

    def __init__(
        self,
        engine: AdapterEngine,
        most: int | None,
        *,
        verify: Callable[[Revision], Awaitable[None]],
        pinned: Callable[[Revision], bool],
    ) -> None:
        self._engine, self.most, self._verify, self._pinned = engine, most, verify, pinned
        self.counts = Counts()
        self._stays: dict[str, _Stay] = {}
        self._uses = 0
        self._room = asyncio.Lock()  # who needs a place, in the order of asking
        self._door = asyncio.Lock()  # one comes or goes at a time
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def loaded(self) -> int:
        """How many adapters are in the engine now."""
        return len(self._stays)

    @asynccontextmanager
    async def held(self, revision: Revision) -> AsyncIterator[None]:
        """Keeps a revision loaded for as long as the block runs; loads it first where it is not.

        Raises:
            MixfuseError: It cannot be loaded.
        """
        if revision.revision is None:
            yield
            return
        stay = revision._stay or self._come(revision, kept=False)
        stay.holders += 1
        stay.empty.clear()
        try:
            if not stay.ready and stay.loading is not None:
                await asyncio.shield(stay.loading)
            yield
        finally:
            self._uses += 1
            stay.used = self._uses
            stay.holders -= 1
            if not stay.holders:
                stay.empty.set()

    async def stage(self, revision: Revision) -> None:
        """Loads a revision in a place of its own. Cancelled, it leaves nothing in the engine.

        Raises:
            MixfuseError: It cannot be loaded.
        """
        stay = self._come(revision, kept=True)
        assert stay.loading is not None  # noqa: S101 - just begun
        try:
            await asyncio.shield(stay.loading)
        except asyncio.CancelledError:
            await asyncio.wait({stay.loading})  # half a load cannot be undone
            if revision.loaded:
                await self.remove(revision)
            raise

    def settle(self, revision: Revision) -> None:
        """Makes a staged revision one of the others; where they are too many then, one of them goes."""
        if revision._stay is not None:
            revision._stay.kept = False
        if self.most is not None and self._taken() > self.most:
            self._in_background(self._trim())

    async def remove(self, revision: Revision) -> None:
        """Unloads a revision, where it is loaded; nobody may hold it."""
        stay, revision._stay = revision._stay, None
        if stay is not None:
            await self._leave(stay)

    async def close(self) -> None:
        """Waits for the loads and unloads under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _come(self, revision: Revision, *, kept: bool) -> _Stay:
        stay = revision._stay = _Stay(revision, kept, self._uses)
        stay.loading = self._in_background(self._load(stay))
        return stay

    def _in_background(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("%s", error)  # whoever waits for it is told

    async def _load(self, stay: _Stay) -> None:
        try:
            if stay.kept:
                await self._enter(stay)
            else:
                async with self._room:
                    await self._verify(stay.revision)
                    await self._make_room()
                    await self._enter(stay)
        except BaseException:
            self.counts.failures += 1
            if stay.revision._stay is stay:
                stay.revision._stay = None
            raise
        stay.ready = True

    async def _enter(self, stay: _Stay) -> None:
        revision = stay.revision
        assert revision.directory is not None  # noqa: S101 - only adapters come here
        while before := self._stays.get(revision.model):  # its last stay, about to end
            await before.gone.wait()
        async with self._door:
            began = time.monotonic()
            try:
                await self._engine.load_adapter(revision.model, revision.directory.resolve())
            except MixfuseError as error:
                if error.kind == "engine":  # it did not answer; it may have loaded it all the same, or not
                    with suppress(MixfuseError):
                        await self._engine.unload_adapter(revision.model)
                raise
            self._stays[revision.model] = stay
            self.counts.loads += 1
            self.counts.load_seconds += time.monotonic() - began

    async def _leave(self, stay: _Stay) -> None:
        async with self._door:
            if self._stays.get(stay.revision.model) is stay:
                await self._unload(stay.revision)
                del self._stays[stay.revision.model]
                stay.gone.set()

    async def _unload(self, revision: Revision) -> None:
        try:
            await self._engine.unload_adapter(revision.model)
        except MixfuseError as error:  # it is not there, or the engine is gone: either way nobody is served by it
            logger.warning("%s could not be unloaded: %s", revision.model, error)

    def _taken(self) -> int:
        return sum(not stay.kept for stay in self._stays.values())

    async def _make_room(self, wanted: int = 1) -> None:
        while self.most is not None and self._taken() + wanted > self.most:
            going = [stay for stay in self._stays.values() if not stay.kept and not self._pinned(stay.revision)]
            if not going:
                raise MixfuseError(
                    f"the engine's {self.most} places for adapters are all taken by pinned roles; unpin one "
                    "(mixfuse roles unpin) or raise engine.max_loaded",
                    kind="engine",
                )
            stay = min(going, key=lambda one: (one.holders > 0, one.used))
            if stay.revision._stay is stay:
                stay.revision._stay = None  # from here on its role waits for its next stay
            if stay.holders:
                await stay.empty.wait()
            self.counts.evictions += 1
            await self._leave(stay)

    async def _trim(self) -> None:
        async with self._room:
            await self._make_room(0)
