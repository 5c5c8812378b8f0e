"""The supervisor of one engine: restarts it when it crashes or hangs, or watches one that someone else runs.

A restarted engine has no adapters. It counts as ready again once its adapters are loaded, unchanged, and each has
answered. While it is ready, what it says it has is compared with what it should have, and mended. Requests and roles
use `serve/engine_group.py`.
"""

import asyncio
import logging
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import sha256_file
from mixfuse.serve.engine import Engine, Restart, last_error
from mixfuse.serve.vllm_api import VllmApi, engine_error

logger = logging.getLogger(__name__)

RETRY_S = 60.0
"""Seconds until an adapter that an engine refused is loaded again."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Adapter:
    """An adapter that each engine must have.

    Attributes:
        path: Its folder.
        hashes: SHA-256 of the files that vLLM reads, at the time of the first load.
    """

    path: Path
    hashes: tuple[str, ...]

    @classmethod
    def at(cls, path: Path) -> "Adapter":
        """Reads and hashes the files, which may be large.

        Raises:
            MixfuseError: A file is missing.
        """
        try:
            return cls(path, tuple(sha256_file(path / name) for name in ADAPTER_FILES))
        except OSError as error:
            raise MixfuseError(f"cannot read {error.filename}: {error.strerror}", kind="adapter") from None


@dataclass(frozen=True)
class Wanted:
    """The adapters that each engine of a group must have.

    Attributes:
        adapters: By name; the group changes them.
        lock: Held while `adapters`, or the adapters in an engine, change.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class EngineSource(Protocol):
    """How an engine is started, watched and stopped."""

    @property
    def api(self) -> VllmApi:
        """The client of the engine."""
        ...

    async def up(self) -> None:
        """Starts the engine if it is ours, and returns when it answers.

        Raises:
            MixfuseError: It does not answer.
        """
        ...

    async def gone(self, last_load: Callable[[], float]) -> str:
        """Returns the reason once the engine is gone.

        Args:
            last_load: When the engine last loaded an adapter, by the event loop's clock; now, if it is loading one.
        """
        ...

    async def down(self) -> None:
        """Stops the engine if `up` started it."""
        ...

    def gives_up(self, crashes: int) -> bool:
        """Whether this many crashes in a row are too many."""
        ...


class OwnEngine:
    """An engine that is a child process."""

    def __init__(self, engine: Engine, restart: Restart) -> None:
        self.api = self._engine = engine
        self._restart = restart

    async def up(self) -> None:
        """Starts the engine."""
        await self._engine.start()

    async def gone(self, last_load: Callable[[], float]) -> str:
        """Waits until the engine dies, or answers nothing for `hung_after_s`; then it is stopped."""
        died, hung = asyncio.create_task(self._engine.wait()), asyncio.create_task(self._wait_for_hang(last_load))
        try:
            await asyncio.wait({died, hung}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hung.cancel()
            died.cancel()
        if not self._engine.running:
            return f"the engine died: {last_error(self._engine.log_path)}; see {self._engine.log_path}"
        await self._engine.stop()
        return f"the engine answered nothing for {self._restart.hung_after_s:g} s and was ended"

    async def down(self) -> None:
        """Stops the engine."""
        await self._engine.stop()

    def gives_up(self, crashes: int) -> bool:
        """Gives up after the configured number."""
        return crashes >= self._restart.crashes

    async def _wait_for_hang(self, last_load: Callable[[], float]) -> None:
        clock = asyncio.get_running_loop().time
        last_answer = clock()
        while True:
            await asyncio.sleep(self._restart.check_s)
            if await self.api.working(timeout_s=self._restart.hung_after_s):
                last_answer = clock()
            # vLLM loads adapters between two steps; the load has a time limit of its own.
            elif clock() - max(last_answer, last_load()) >= self._restart.hung_after_s:
                return


class ExternalEngine:
    """An engine that someone else runs; it is only watched.

    Args:
        api: The client of the engine.
        restart: How often it is checked.
    """

    def __init__(self, api: VllmApi, restart: Restart) -> None:
        self.api = api
        self._restart = restart

    async def up(self) -> None:
        """Checks once that it answers."""
        await self.api.models(timeout_s=self._restart.hung_after_s)

    async def gone(self, last_load: Callable[[], float]) -> str:
        """Checks it until it does not answer."""
        while True:
            await asyncio.sleep(self._restart.check_s)
            try:
                await self.api.models(timeout_s=self._restart.hung_after_s)
            except MixfuseError as error:
                return str(error)

    async def down(self) -> None:
        """Does nothing: the engine is not ours."""

    def gives_up(self, crashes: int) -> bool:
        """Never gives up: the owner may bring it back."""
        return False


class Replica:
    """One engine, kept ready.

    Args:
        source: Starts, watches and stops it.
        wanted: The adapters it must have.
        restart: When and how often it is restarted.
        cache: How many adapters its cache holds.
        on_change: Called when `ready` or `failure` has changed.

    Attributes:
        api: The client of the engine.
        ready: Whether it takes requests: it answers and has its adapters.
        lost: Adapters that the engine should have and has not, each with the reason.
        mending: Those of them that are being loaded now.
        in_flight: Requests that it is working on.
        metrics: What it last said of itself, in Prometheus' text format.
        away: Why it is not ready.
        failure: Why it was given up; None while it was not.
    """

    def __init__(
        self,
        source: EngineSource,
        wanted: Wanted,
        restart: Restart,
        cache: int,
        on_change: Callable[[], None],
    ) -> None:
        self.api = source.api
        self.ready = False
        self.lost: dict[str, str] = {}
        self.mending: set[str] = set()
        self.in_flight = 0
        self.metrics = ""
        self.away = "the engine has not been started"
        self.failure: MixfuseError | None = None
        self._source, self._adapters, self._adapters_lock = source, wanted.adapters, wanted.lock
        self._restart, self._cache, self._on_change = restart, cache, on_change
        self._loaded_here: set[str] = set()  # adapters that this process loaded and the engine may still have
        self._loads = 0  # since the engine was started: unloaded adapters stay in its cache
        self._loading: set[asyncio.Task[None]] = set()  # in progress
        self._loaded_at = -math.inf  # when the last one ended
        self._tasks: list[asyncio.Task[None]] = []
        self._crashes = 0  # in a row
        self._ready_at = -math.inf
        self._mended_at = -math.inf

    async def start(self) -> None:
        """Brings the engine up for the first time. Call `supervise` next.

        Raises:
            MixfuseError: It does not come up.
        """
        await self._source.up()
        await self._restore()

    def supervise(self) -> None:
        """Keeps it ready from now on, in the background."""
        self._tasks = [asyncio.create_task(self._supervise()), asyncio.create_task(self._compare())]

    async def stop(self) -> None:
        """Ends the supervision, and the engine if it is ours."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._source.down()

    async def load(self, name: str, path: Path) -> None:
        """Loads an adapter. If the engine still has one of that name, it is replaced.

        Raises:
            MixfuseError: The engine refuses it, or is gone.
        """
        if name in (await self.api.models())[1]:
            await self.api.unload_adapter(name)
        await self._load(name, path)
        self.lost.pop(name, None)

    async def _load(self, name: str, path: Path) -> None:
        """Loads an adapter; vLLM's cache then drops an unloaded one, and none that is needed.

        vLLM's unload leaves the adapter in the cache of its workers, and a load drops the one that was used least
        recently (`LRUCacheWorkerLoRAManager` in vllm/lora/worker_manager.py). So those that are needed are used first.
        """
        if self._loads >= self._cache:
            needed = [other for other in self._adapters if other != name and other not in self.lost]
            for result in await asyncio.gather(
                *(rank.probe(other) for rank in await self.api.ranks() for other in needed), return_exceptions=True
            ):
                if isinstance(result, Exception):  # it may be read again from its copy, during a request
                    logger.warning("an adapter could not be used before another was loaded: %s", result)
        self._loaded_here.add(name)
        self._loads += 1
        load = asyncio.create_task(self.api.load_adapter(name, path, timeout_s=self._restart.load_timeout_s))
        self._loading.add(load)
        load.add_done_callback(self._load_ended)
        await asyncio.shield(load)  # the engine goes on with it, whatever becomes of who waits

    def _load_ended(self, load: "asyncio.Task[None]") -> None:
        self._loading.discard(load)
        self._loaded_at = load.get_loop().time()
        if not load.cancelled() and (error := load.exception()) is not None:
            logger.debug("%s", error)  # raised where the load is awaited

    async def loads_ended(self) -> None:
        """Returns once no load is in progress that this process has begun."""
        while self._loading:
            await asyncio.wait(self._loading)

    def _last_load(self) -> float:
        return asyncio.get_running_loop().time() if self._loading else self._loaded_at

    async def unload(self, name: str) -> None:
        """Unloads an adapter. An engine that is gone has none, so that is no error.

        Raises:
            MixfuseError: The engine refuses.
        """
        try:
            if self.lost.pop(name, None) is None or name in (await self.api.models())[1]:
                await self.api.unload_adapter(name)
            self._loaded_here.discard(name)
        except MixfuseError as error:
            if error.kind != "engine":
                raise
            logger.warning("%r was not unloaded: %s", name, error)

    async def mend(self, *, now: bool = False) -> None:
        """Makes the engine have the adapters that it should have, if it is ready.

        Args:
            now: Try again at once what could not be mended before; otherwise after `RETRY_S`.

        Raises:
            MixfuseError: The engine does not answer (kind "engine").
        """
        if not self.ready or (not self.lost and self._as_wanted((await self.api.models())[1])):
            return  # swaps of other engines do not wait for this one's answer
        async with self._adapters_lock:
            if not self.ready:
                return
            _, listed = await self.api.models()
            await self._unload_unwanted(listed)
            clock = asyncio.get_running_loop().time
            again = now or clock() >= self._mended_at + RETRY_S
            wrong = {name for name, adapter in self._adapters.items() if not _has(listed, name, adapter)}
            for name in self.lost.keys() - wrong:
                del self.lost[name]  # somebody else has loaded it
            new = wrong - self.lost.keys()
            for name in new:
                what = "has another adapter under the name" if name in listed else "has lost"
                self.lost[name] = f"the engine at {self.api.url} {what} {name!r}"
                logger.error("%s; it is loaded again", self.lost[name])
            self.mending = wrong if again else new
            self._on_change()
            try:
                for name in sorted(self.mending):
                    await self._mend_one(name, listed)
                    if name not in self.lost:
                        logger.warning("the engine at %s has %r again", self.api.url, name)
                if self.mending:
                    self._mended_at = clock()
            except MixfuseError:  # the engine did not answer: the next look tries again
                self._mended_at = -math.inf
                raise
            finally:
                self.mending = set()
                self._on_change()

    def _as_wanted(self, listed: Mapping[str, str | None]) -> bool:
        """Whether an engine has what it should have, and nothing that it should not."""
        wanted = all(_has(listed, name, adapter) for name, adapter in self._adapters.items())
        return wanted and not (listed.keys() & self._loaded_here) - self._adapters.keys()

    async def _mend_one(self, name: str, listed: Mapping[str, str | None]) -> None:
        """Loads an adapter again; notes it as lost if it cannot be."""
        try:
            if name in listed:
                await self.api.unload_adapter(name)
            await self._reload(name, self._adapters[name])
        except MixfuseError as error:
            if error.kind == "engine":
                raise
            if self.lost.get(name) != str(error):
                logger.error("%r is not served by %s: %s", name, self.api.url, error)
            self.lost[name] = str(error)
        else:
            del self.lost[name]

    async def _compare(self) -> None:
        while True:
            await asyncio.sleep(self._restart.check_s)
            try:
                await self.mend()
                self.metrics = await self.api.metrics(timeout_s=self._restart.hung_after_s) if self.ready else ""
            except MixfuseError as error:  # whether it is gone is decided elsewhere
                logger.debug("%s", error)
            except Exception:
                logger.exception("the adapters of the engine at %s cannot be compared, for now", self.api.url)

    async def _supervise(self) -> None:
        while True:
            if self.ready:
                why = await self._source.gone(self._last_load)
                self.ready, self.away = False, why
                self._on_change()
            else:  # the first start failed
                why = self.away
            if asyncio.get_running_loop().time() - self._ready_at >= self._restart.healthy_s:
                self._crashes = 0
            while not self.ready:
                self._crashes += 1
                if self._source.gives_up(self._crashes):
                    self.failure = engine_error(
                        f"given up after {self._crashes} crashes in a row, without {self._restart.healthy_s:g} s of "
                        f"health between them; the last: {why}"
                    )
                    logger.error("%s", self.failure)
                    self._on_change()
                    return
                pause = self._pause()
                logger.warning("%s; trying again in %.1f s", why, pause)
                await asyncio.sleep(pause)
                try:
                    await self._source.up()
                    self._loads = 0
                    await self._restore()
                except (MixfuseError, OSError) as error:  # OSError: a full disk leaves no room for the log
                    why = self.away = str(error)
                    await self._source.down()
            logger.warning("the engine at %s is ready again, with %d adapters", self.api.url, len(self._adapters))

    def _pause(self) -> float:
        """Seconds before the next start: doubled with each crash, and reduced at random by up to a half."""
        doubled = self._restart.first_delay_s * 2.0 ** min(self._crashes - 1, 30)
        return min(self._restart.max_delay_s, doubled) * random.uniform(0.5, 1)  # noqa: S311 - to spread, not to hide

    async def _restore(self) -> None:
        """Loads the adapters that the engine must have, unloads those it must not, and makes it ready."""
        async with self._adapters_lock:
            base, listed = await self.api.models()
            if base != self.api.base_model_name:
                raise engine_error(
                    f"the engine at {self.api.url} serves {base!r} where {self.api.base_model_name!r} is expected; "
                    "start it with that --served-model-name"
                )
            await self._unload_unwanted(listed)
            self.lost = {
                name: f"{name!r} is not loaded yet"
                for name, adapter in self._adapters.items()
                if not _has(listed, name, adapter)
            }
            for name in sorted(self.lost):
                await self._mend_one(name, listed)
            self.ready = True
        self._ready_at = self._mended_at = asyncio.get_running_loop().time()
        self._on_change()

    async def _unload_unwanted(self, listed: Mapping[str, str | None]) -> None:
        for name in (listed.keys() & self._loaded_here) - self._adapters.keys():
            await self.unload(name)

    async def _reload(self, name: str, adapter: Adapter) -> None:
        if await asyncio.to_thread(Adapter.at, adapter.path) != adapter:
            raise MixfuseError(f"{adapter.path} was changed after it was loaded", kind="adapter")
        await self._load(name, adapter.path)
        await self.api.probe(name)


def _has(listed: Mapping[str, str | None], name: str, adapter: Adapter) -> bool:
    """Whether an engine lists an adapter, and says that it is ours, if it says where it is from."""
    return name in listed and listed[name] in (None, str(adapter.path.resolve()))
