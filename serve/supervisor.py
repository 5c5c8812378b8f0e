"""One engine that is kept ready: started again when it crashes or hangs, or watched where someone else runs it.

An engine that comes back has no adapters. It counts as ready once it has them again, each as it was when it was
loaded, and has answered with each. `serve/engine_group.py` is what requests and roles meet.
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
    """An adapter that engines are to have.

    Attributes:
        path: Its folder.
        hashes: SHA-256 of the files that vLLM reads there, as they were when they were loaded.
    """

    path: Path
    hashes: tuple[str, ...]

    @classmethod
    def at(cls, path: Path) -> "Adapter":
        """Reads the files; they may be large.

        Raises:
            MixfuseError: One is missing.
        """
        try:
            return cls(path, tuple(sha256_file(path / name) for name in ADAPTER_FILES))
        except OSError as error:
            raise MixfuseError(f"cannot read {error.filename}: {error.strerror}", kind="adapter") from None


class Source(Protocol):
    """Where an engine comes from."""

    @property
    def api(self) -> VllmApi:
        """How it is asked."""
        ...

    async def up(self) -> None:
        """Returns when the engine answers.

        Raises:
            MixfuseError: It does not.
        """
        ...

    async def gone(self, expected: Callable[[], set[str]]) -> str:
        """Returns when the engine is gone or lacks an adapter that is expected of it, with the reason."""
        ...

    async def down(self) -> None:
        """Ends what `up` began."""
        ...

    def gave_up(self, crashes: int) -> bool:
        """Whether so many crashes within the window are too many."""
        ...


class Started:
    """An engine that is a child of this process."""

    def __init__(self, engine: Engine, restart: Restart) -> None:
        self.api = self._engine = engine
        self._restart = restart

    async def up(self) -> None:
        """Starts the engine."""
        await self._engine.start()

    async def gone(self, expected: Callable[[], set[str]]) -> str:
        """Waits for its end, or until it has answered nothing for `hung_after_s`; it is ended then."""
        died, silent = asyncio.create_task(self._engine.wait()), asyncio.create_task(self._silence())
        try:
            await asyncio.wait({died, silent}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            silent.cancel()
            died.cancel()
        if not self._engine.running:
            return f"the engine died: {last_error(self._engine.log_path)}; see {self._engine.log_path}"
        await self._engine.stop()
        return f"the engine answered nothing for {self._restart.hung_after_s:g} s and was ended"

    async def down(self) -> None:
        """Stops the engine."""
        await self._engine.stop()

    def gave_up(self, crashes: int) -> bool:
        """After the configured number."""
        return crashes >= self._restart.crashes

    async def _silence(self) -> None:
        clock = asyncio.get_running_loop().time
        heard = clock()
        while True:
            await asyncio.sleep(self._restart.check_s)
            if await self.api.working(timeout_s=self._restart.hung_after_s):
                heard = clock()
            elif clock() - heard >= self._restart.hung_after_s:
                return


class Elsewhere:
    """An engine that someone else runs: it is only watched.

    Args:
        api: How it is reached.
        restart: How often it is looked at.
    """

    def __init__(self, api: VllmApi, restart: Restart) -> None:
        self.api = api
        self._restart = restart

    async def up(self) -> None:
        """Asks it once."""
        await self.api.models(timeout_s=self._restart.hung_after_s)

    async def gone(self, expected: Callable[[], set[str]]) -> str:
        """Looks at it until it does not answer, or lacks an adapter: its owner has started it anew."""
        while True:
            await asyncio.sleep(self._restart.check_s)
            before = expected()
            try:
                _, listed = await self.api.models(timeout_s=self._restart.hung_after_s)
            except MixfuseError as error:
                return str(error)
            if missing := (before & expected()) - listed:  # one loaded in this moment is not missing
                return f"the engine at {self.api.url} has lost {min(missing)!r}"

    async def down(self) -> None:
        """Nothing of ours to end."""

    def gave_up(self, crashes: int) -> bool:
        """Never: its owner may bring it back."""
        return False


class Replica:
    """One engine, kept ready.

    Args:
        source: Where it comes from.
        adapters: What it is to have; the group changes it.
        changing: Held by who changes `adapters` or what engines have.
        restart: When and how often it is brought back.
        changed: Called when `ready` or `failure` has changed.

    Attributes:
        api: How it is asked.
        ready: Whether it takes requests: it answers, and has its adapters.
        lost: Adapters that could not be given back to it, and why.
        in_flight: Requests that it is working on.
        away: Why it is not ready.
        failure: Why it was given up, once it was.
    """

    def __init__(
        self,
        source: Source,
        adapters: Mapping[str, Adapter],
        changing: asyncio.Lock,
        restart: Restart,
        changed: Callable[[], None],
    ) -> None:
        self.api = source.api
        self.ready = False
        self.lost: dict[str, str] = {}
        self.in_flight = 0
        self.away = "the engine has not been started"
        self.failure: MixfuseError | None = None
        self._source, self._adapters, self._changing = source, adapters, changing
        self._restart, self._changed = restart, changed
        self._given: set[str] = set()  # adapters that this engine was given by us and may still have
        self._keeping: asyncio.Task[None] | None = None
        self._crashes: deque[float] = deque()

    async def start(self) -> None:
        """Brings the engine up for the first time; `keep` has to follow.

        Raises:
            MixfuseError: It does not come up.
        """
        await self._source.up()
        await self._restore()

    def keep(self) -> None:
        """Keeps it ready from now on, in the background."""
        self._keeping = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Stops keeping it, and the engine where it was started here."""
        if self._keeping is not None:
            self._keeping.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeping
        await self._source.down()

    async def load(self, name: str, path: Path) -> None:
        """Loads an adapter. One of that name that the engine still has from before is replaced.

        Raises:
            MixfuseError: It is refused, or the engine is gone.
        """
        if name in (await self.api.models())[1]:
            await self.api.unload_adapter(name)
        self._given.add(name)
        await self.api.load_adapter(name, path)
        self.lost.pop(name, None)

    async def unload(self, name: str) -> None:
        """Unloads an adapter; an engine that is gone has none.

        Raises:
            MixfuseError: It is refused.
        """
        if name in self.lost:
            del self.lost[name]
            return
        try:
            await self.api.unload_adapter(name)
            self._given.discard(name)
        except MixfuseError as error:
            if error.kind != "engine":
                raise
            logger.warning("%r was not unloaded: %s", name, error)

    async def _keep(self) -> None:
        while True:
            if self.ready:
                why = await self._source.gone(lambda: set(self._adapters) - set(self.lost))
                self.ready, self.away = False, why
                self._changed()
            else:  # the first try failed
                why = self.away
            while not self.ready:
                if self._one_more_crash():
                    times, window = len(self._crashes), self._restart.window_s
                    self.failure = engine_error(f"given up after {times} crashes within {window:g} s; the last: {why}")
                    logger.error("%s", self.failure)
                    self._changed()
                    return
                pause = self._pause()
                logger.warning("%s; trying again in %.1f s", why, pause)
                await asyncio.sleep(pause)
                try:
                    await self._source.up()
                    await self._restore()
                except (MixfuseError, OSError) as error:  # a full disk can leave no place for the log
                    why = self.away = str(error)
                    await self._source.down()
            logger.warning("the engine at %s is ready again, with %d adapters", self.api.url, len(self._adapters))

    def _one_more_crash(self) -> bool:
        now = asyncio.get_running_loop().time()
        self._crashes.append(now)
        while now - self._crashes[0] > self._restart.window_s:
            self._crashes.popleft()
        return self._source.gave_up(len(self._crashes))

    def _pause(self) -> float:
        doubled = self._restart.first_delay_s * 2.0 ** min(len(self._crashes) - 1, 30)
        return min(self._restart.max_delay_s, doubled) * random.uniform(0.5, 1)  # noqa: S311 - to spread, not to hide

    async def _restore(self) -> None:
        """Gives the engine the adapters that it should have, takes those of ours that it should not, and is ready."""
        async with self._changing:
            base, listed = await self.api.models()
            if base != self.api.base_model_name:
                raise engine_error(
                    f"the engine at {self.api.url} serves {base!r} where {self.api.base_model_name!r} is expected; "
                    "start it with that --served-model-name"
                )
            for name in (listed & self._given) - set(self._adapters):
                await self.unload(name)
            self.lost.clear()
            for name, adapter in self._adapters.items():
                if name in listed:
                    continue
                try:
                    await self._give_back(name, adapter)
                except MixfuseError as error:
                    if error.kind == "engine":
                        raise
                    self.lost[name] = str(error)
                    logger.error("%r is not served any more: %s", name, error)
            self.ready = True
        self._changed()

    async def _give_back(self, name: str, adapter: Adapter) -> None:
        if await asyncio.to_thread(Adapter.at, adapter.path) != adapter:
            raise MixfuseError(f"{adapter.path} was changed after it was loaded", kind="adapter")
        self._given.add(name)
        await self.api.load_adapter(name, adapter.path)
        await self.api.probe(name)
