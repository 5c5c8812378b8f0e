"""The supervisor of one engine: restarts it when it crashes or hangs, or watches one that someone else runs.

A restarted engine has no adapters. It counts as ready again once its adapters are loaded, unchanged, and each has
answered. Requests and roles use `serve/engine_group.py`.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import sha256_file
from mixfuse.serve.engine import Engine, Restart, last_error
from mixfuse.serve.vllm_api import VllmApi, engine_error

logger = logging.getLogger(__name__)

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

    async def gone(self, expected: Callable[[], set[str]]) -> str:
        """Returns the reason once the engine is gone or lacks an adapter of `expected`."""
        ...

    async def down(self) -> None:
        """Stops the engine if `up` started it."""
        ...

    def gives_up(self, crashes: int) -> bool:
        """Whether this many crashes within the window are too many."""
        ...


class OwnEngine:
    """An engine that is a child process."""

    def __init__(self, engine: Engine, restart: Restart) -> None:
        self.api = self._engine = engine
        self._restart = restart

    async def up(self) -> None:
        """Starts the engine."""
        await self._engine.start()

    async def gone(self, expected: Callable[[], set[str]]) -> str:
        """Waits until the engine dies, or answers nothing for `hung_after_s`; then it is stopped."""
        died, hung = asyncio.create_task(self._engine.wait()), asyncio.create_task(self._wait_for_hang())
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

    async def _wait_for_hang(self) -> None:
        clock = asyncio.get_running_loop().time
        last_answer = clock()
        while True:
            await asyncio.sleep(self._restart.check_s)
            if await self.api.working(timeout_s=self._restart.hung_after_s):
                last_answer = clock()
            elif clock() - last_answer >= self._restart.hung_after_s:
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

    async def gone(self, expected: Callable[[], set[str]]) -> str:
        """Checks it until it does not answer, or lacks an adapter because its owner has restarted it."""
        while True:
            await asyncio.sleep(self._restart.check_s)
            before = expected()
            try:
                _, listed = await self.api.models(timeout_s=self._restart.hung_after_s)
            except MixfuseError as error:
                return str(error)
            if missing := (before & expected()) - listed:  # an adapter loaded meanwhile is not missing
                return f"the engine at {self.api.url} has lost {min(missing)!r}"

    async def down(self) -> None:
        """Does nothing: the engine is not ours."""

    def gives_up(self, crashes: int) -> bool:
        """Never gives up: the owner may bring it back."""
        return False


class Replica:
    """One engine, kept ready.

    Args:
        source: Starts, watches and stops it.
        adapters: The adapters it must have, by name; the group changes them.
        adapters_lock: Held while `adapters`, or the adapters in an engine, change.
        restart: When and how often it is restarted.
        on_change: Called when `ready` or `failure` has changed.

    Attributes:
        api: The client of the engine.
        ready: Whether it takes requests: it answers and has its adapters.
        lost: Adapters that could not be loaded again after a restart, each with the reason.
        in_flight: Requests that it is working on.
        away: Why it is not ready.
        failure: Why it was given up; None while it was not.
    """

    def __init__(
        self,
        source: EngineSource,
        adapters: Mapping[str, Adapter],
        adapters_lock: asyncio.Lock,
        restart: Restart,
        on_change: Callable[[], None],
    ) -> None:
        self.api = source.api
        self.ready = False
        self.lost: dict[str, str] = {}
        self.in_flight = 0
        self.away = "the engine has not been started"
        self.failure: MixfuseError | None = None
        self._source, self._adapters, self._adapters_lock = source, adapters, adapters_lock
        self._restart, self._on_change = restart, on_change
        self._loaded_here: set[str] = set()  # adapters that this process loaded and the engine may still have
        self._supervision: asyncio.Task[None] | None = None
        self._crash_times: deque[float] = deque()

    async def start(self) -> None:
        """Brings the engine up for the first time. Call `supervise` next.

        Raises:
            MixfuseError: It does not come up.
        """
        await self._source.up()
        await self._restore()

    def supervise(self) -> None:
        """Keeps it ready from now on, in the background."""
        self._supervision = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """Ends the supervision, and the engine if it is ours."""
        if self._supervision is not None:
            self._supervision.cancel()
            with suppress(asyncio.CancelledError):
                await self._supervision
        await self._source.down()

    async def load(self, name: str, path: Path) -> None:
        """Loads an adapter. If the engine still has one of that name, it is replaced.

        Raises:
            MixfuseError: The engine refuses it, or is gone.
        """
        if name in (await self.api.models())[1]:
            await self.api.unload_adapter(name)
        self._loaded_here.add(name)
        await self.api.load_adapter(name, path)
        self.lost.pop(name, None)

    async def unload(self, name: str) -> None:
        """Unloads an adapter. An engine that is gone has none, so that is no error.

        Raises:
            MixfuseError: The engine refuses.
        """
        if name in self.lost:
            del self.lost[name]
            return
        try:
            await self.api.unload_adapter(name)
            self._loaded_here.discard(name)
        except MixfuseError as error:
            if error.kind != "engine":
                raise
            logger.warning("%r was not unloaded: %s", name, error)

    async def _supervise(self) -> None:
        while True:
            if self.ready:
                why = await self._source.gone(lambda: set(self._adapters) - set(self.lost))
                self.ready, self.away = False, why
                self._on_change()
            else:  # the first start failed
                why = self.away
            while not self.ready:
                if self._count_crash_and_give_up():
                    times, window = len(self._crash_times), self._restart.window_s
                    self.failure = engine_error(f"given up after {times} crashes within {window:g} s; the last: {why}")
                    logger.error("%s", self.failure)
                    self._on_change()
                    return
                pause = self._pause()
                logger.warning("%s; trying again in %.1f s", why, pause)
                await asyncio.sleep(pause)
                try:
                    await self._source.up()
                    await self._restore()
                except (MixfuseError, OSError) as error:  # OSError: a full disk leaves no room for the log
                    why = self.away = str(error)
                    await self._source.down()
            logger.warning("the engine at %s is ready again, with %d adapters", self.api.url, len(self._adapters))

    def _count_crash_and_give_up(self) -> bool:
        """Counts a crash now; returns whether there were too many within the window."""
        now = asyncio.get_running_loop().time()
        self._crash_times.append(now)
        while now - self._crash_times[0] > self._restart.window_s:
            self._crash_times.popleft()
        return self._source.gives_up(len(self._crash_times))

    def _pause(self) -> float:
        """Seconds before the next start: doubled with each crash, and reduced at random by up to a half."""
        doubled = self._restart.first_delay_s * 2.0 ** min(len(self._crash_times) - 1, 30)
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
            for name in (listed & self._loaded_here) - set(self._adapters):
                await self.unload(name)
            self.lost.clear()
            for name, adapter in self._adapters.items():
                if name in listed:
                    continue
                try:
                    await self._reload(name, adapter)
                except MixfuseError as error:
                    if error.kind == "engine":
                        raise
                    self.lost[name] = str(error)
                    logger.error("%r is not served any more: %s", name, error)
            self.ready = True
        self._on_change()

    async def _reload(self, name: str, adapter: Adapter) -> None:
        if await asyncio.to_thread(Adapter.at, adapter.path) != adapter:
            raise MixfuseError(f"{adapter.path} was changed after it was loaded", kind="adapter")
        self._loaded_here.add(name)
        await self.api.load_adapter(name, adapter.path)
        await self.api.probe(name)
