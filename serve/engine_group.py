"""Several engines of one base model, used as one: an adapter is loaded into all or none, a request goes to any.

One own engine, several replicas and external engines are all used alike; only `serve/supervisor.py` tells them apart.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from mixfuse.contracts.agreement import deviation
from mixfuse.contracts.errors import MixfuseError
from mixfuse.serve.engine import BASE_MODEL_NAME, MIDDLEWARE, Engine, EngineConfig, cpu_build
from mixfuse.serve.slots import OWNED_BY, Trouble
from mixfuse.serve.supervisor import Adapter, EngineSource, ExternalEngine, OwnEngine, Replica, Wanted
from mixfuse.serve.vllm_api import VllmApi, engine_error
from mixfuse.serve.vllm_arguments import split_of

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

# Nats. Engines with the same base and adapter differ by rounding, in bfloat16 by hundredths; engines with another
# adapter or base differ by whole nats.
_SAME_WITHIN = 0.3


class Address(NamedTuple):
    """The base URL of an engine's OpenAI API, and its key."""

    url: str
    api_key: str | None


class EngineGroup:
    """The engines of a serve config; an async context manager around `start` and `stop`.

    Args:
        config: The kind of engine, and how many.
        logs: The folder for their logs.
    """

    def __init__(self, config: EngineConfig, *, logs: Path) -> None:
        self.config = config
        self.base_model_name = BASE_MODEL_NAME
        self._logs = logs
        self._wanted = Wanted()
        self._adapters, self._adapters_lock = self._wanted.adapters, self._wanted.lock
        self._turn = count()
        self._replica_changed = asyncio.Event()
        self.replicas: list[Replica] = []

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def running(self) -> bool:
        """Whether an engine is ready for requests."""
        return any(replica.ready for replica in self.replicas)

    async def start(self) -> None:
        """Starts the engines, or connects to external ones. One external engine is enough; others may come later.

        Raises:
            MixfuseError: An own engine does not start, no external one answers, or their API key is not in the
                environment. Nothing is left running.
        """
        try:
            self.replicas = await self._external_replicas() if self.config.external else self._own_replicas()
            started = await asyncio.gather(*(replica.start() for replica in self.replicas), return_exceptions=True)
            for error in started:
                if error is not None and not (
                    self.config.external and self.running and isinstance(error, MixfuseError)
                ):
                    raise error
            await self._warn_of_doors()
            for replica, error in zip(self.replicas, started, strict=True):
                replica.away = str(error or "")
                replica.supervise()
        except BaseException:  # cancelled, too
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stops our own engines; others have ended the loads that were under way, and get no more."""
        await asyncio.gather(*(replica.stop() for replica in self.replicas))
        if self.config.external:
            await asyncio.gather(*(replica.loads_ended() for replica in self.replicas))

    async def failed(self) -> MixfuseError:
        """Returns the reason once every engine has been given up."""
        while True:
            self._replica_changed.clear()
            failures = [replica.failure for replica in self.replicas]
            if failures and all(failures):
                return next(failure for failure in failures if failure is not None)
            await self._replica_changed.wait()

    @asynccontextmanager
    async def at(self, model: str) -> AsyncIterator[Address]:
        """Yields the address for a request to `model`: of the ready engines, the one with the fewest requests.

        If none is ready, waits up to the config's `restart.wait_s`.

        Raises:
            MixfuseError: No engine is ready in time, or none has the adapter any more (kind "engine").
        """
        replica = await self._pick(model)
        replica.in_flight += 1
        try:
            yield Address(replica.api.url, replica.api.api_key)
        finally:
            replica.in_flight -= 1

    async def ready(self) -> None:
        """Returns once an engine is ready for requests; waits for one up to the config's `restart.wait_s`.

        Raises:
            MixfuseError: None is in time, or all were given up (kind "engine").
        """
        await self._once(lambda: self.running or None)

    async def load_adapter(self, name: str, path: Path) -> None:
        """Loads an adapter into every ready engine, or into none. Other engines load it before they are ready again.

        Raises:
            MixfuseError: An engine refuses it or is gone, or no engine is ready.
        """
        async with self._adapters_lock:
            adapter = await asyncio.to_thread(Adapter.at, path)
            ready = self._ready()
            loading = [replica.load(name, path) for replica in ready]
            if failures := await _all(loading):
                # An engine that failed may have loaded it: only its answer may have been lost.
                await _all(replica.unload(name) for replica in ready)
                raise failures[0]
            self._adapters[name] = adapter

    async def unload_adapter(self, name: str) -> None:
        """Unloads an adapter everywhere. Engines that are away do not load it when they return.

        Raises:
            MixfuseError: No adapter of that name is loaded, or an engine refuses.
        """
        async with self._adapters_lock:
            if self._adapters.pop(name, None) is None:
                raise MixfuseError(f"no adapter {name!r} is loaded", kind="adapter")
            if failures := await _all(replica.unload(name) for replica in self.replicas if replica.ready):
                raise failures[0]

    def trouble(self, name: str) -> Trouble | None:
        """What keeps engines from answering as a model; None if each is ready and has it."""
        problems = [
            f"the engine is away: {replica.failure or replica.away}" if not replica.ready else replica.lost.get(name)
            for replica in self.replicas
        ]
        found = list(dict.fromkeys(problem for problem in problems if problem))
        return Trouble("; ".join(found), dead=None not in problems) if found else None

    async def repair(self, name: str) -> None:
        """Makes every ready engine have an adapter again that it has lost.

        Raises:
            MixfuseError: An engine refuses it, or does not answer.
        """
        if failures := await _all(replica.mend(now=True) for replica in self._ready()):
            raise failures[0]
        if lost := [replica.lost[name] for replica in self.replicas if replica.ready and name in replica.lost]:
            raise MixfuseError(lost[0], kind="engine")

    async def unload_of(self, owner: str) -> bool:
        """Unloads all adapters of a gateway, this one or another; says whether no engine has any left."""
        clean = True
        for replica in self.replicas:
            try:
                _, listed = await replica.api.models()
                for name in listed:
                    if name.endswith(f"{OWNED_BY}{owner}"):
                        await replica.api.unload_adapter(name)
                        logger.info("%r was unloaded from %s: its gateway is gone", name, replica.api.url)
            except MixfuseError as error:
                logger.debug("%s", error)
                clean = False
        return clean

    async def regain(self, name: str) -> bool:
        """Makes every ready engine have an adapter again that one of them said it has not; says whether they have."""
        if name not in self._adapters:
            return False
        try:
            await self.repair(name)
        except MixfuseError as error:
            logger.warning("%r is not served again: %s", name, error)
            return False
        return True

    async def probe(self, name: str) -> None:
        """Asks a model for one token in every ready engine.

        Raises:
            MixfuseError: An engine does not answer, or none is ready.
        """
        if failures := await _all(replica.api.probe(name) for replica in self._ready()):
            raise failures[0]

    def each(self) -> list[VllmApi]:
        """The ready engines, one by one.

        Raises:
            MixfuseError: None is ready.
        """
        return [replica.api for replica in self._ready()]

    async def prompt_logprobs(self, name: str, prompt: list[int]) -> list[float]:
        """As `VllmApi.prompt_logprobs`, from every ready engine; they must agree.

        Raises:
            MixfuseError: An engine does not answer, none is ready, or two engines disagree: they have not loaded the
                same.
        """
        ready = self._ready()
        answers = await asyncio.gather(*(replica.api.prompt_logprobs(name, prompt) for replica in ready))
        for replica, answer in zip(ready[1:], answers[1:], strict=True):
            apart = deviation([answers[0]], [answer]).median  # one unlikely token may be far off
            if apart > _SAME_WITHIN:
                raise engine_error(
                    f"{name!r} is not the same at {ready[0].api.url} and {replica.api.url}: log-probabilities are "
                    f"{apart:.2g} nats apart; do both serve the same base?"
                )
        return answers[0]

    def _ready(self) -> list[Replica]:
        ready = [replica for replica in self.replicas if replica.ready]
        if not ready:
            raise engine_error(f"no engine is ready ({self._why_away()}); try again")
        return ready

    async def _pick(self, model: str) -> Replica:
        def able() -> Replica | None:
            ready = [replica for replica in self.replicas if replica.ready]
            able = [replica for replica in ready if model not in replica.lost]
            if able:
                turn = next(self._turn)
                order = [able[(turn + place) % len(able)] for place in range(len(able))]
                return min(order, key=lambda replica: replica.in_flight)
            if ready and not any(model in replica.mending for replica in ready):
                raise engine_error(ready[0].lost[model])
            return None

        return await self._once(able)

    async def _once(self, found: Callable[[], Result | None]) -> Result:
        """What a look at the engines finds, as soon as it finds something."""
        clock = asyncio.get_running_loop().time
        end = clock() + self.config.restart.wait_s
        while True:
            self._replica_changed.clear()
            if (result := found()) is not None:
                return result
            if self.replicas and all(replica.failure for replica in self.replicas):
                raise engine_error(self._why_away())
            try:
                async with asyncio.timeout(max(0.0, end - clock())):
                    await self._replica_changed.wait()
            except TimeoutError:
                raise engine_error(
                    f"no engine was ready within {self.config.restart.wait_s:g} s ({self._why_away()})"
                ) from None

    def _why_away(self) -> str:
        return next((str(replica.failure or replica.away) for replica in self.replicas if not replica.ready), "stopped")

    def _own_replicas(self) -> list[Replica]:
        several = self.config.replicas > 1
        engines = [
            Engine(config, log_path=self._logs / (f"engine-{number}.log" if several else "engine.log"))
            for number, config in enumerate(per_replica(self.config, cpu=cpu_build()))
        ]
        return [self._replica(OwnEngine(engine, self.config.restart)) for engine in engines]

    async def _external_replicas(self) -> list[Replica]:
        key = _api_key(self.config)
        apis = [
            VllmApi(url, key, base_model_name="", hint="is it running, and reachable from here?")
            for url in self.config.external
        ]
        answers = await asyncio.gather(*(api.models() for api in apis), return_exceptions=True)
        names = [answer[0] for answer in answers if not isinstance(answer, BaseException)]
        if not names:
            raise next(answer for answer in answers if isinstance(answer, BaseException))
        self.base_model_name = names[0]
        for api in apis:
            api.base_model_name = names[0]
        return [self._replica(ExternalEngine(api, self.config.restart)) for api in apis]

    async def _warn_of_doors(self) -> None:
        """Logs which external engines let anybody in who reaches them."""
        for replica in self._ready() if self.config.external else []:
            try:
                doors = await replica.api.open_doors()
            except MixfuseError as error:
                logger.warning("whether %s needs a key could not be asked: %s", replica.api.url, error)
                continue
            if doors:
                logger.warning(
                    "the engine at %s answers without a key (%s): whoever reaches it can use it, and change adapters; "
                    "start it with VLLM_API_KEY and --middleware %s, or let only this host reach it",
                    replica.api.url,
                    ", ".join(doors),
                    MIDDLEWARE,
                )

    def _replica(self, source: EngineSource) -> Replica:
        config = self.config
        return Replica(source, self._wanted, config.restart, config.cpu_loras, self._replica_changed.set)


def per_replica(config: EngineConfig, *, cpu: bool) -> list[EngineConfig]:
    """The config of each own engine. On GPUs each gets its share of the devices.

    Raises:
        MixfuseError: `CUDA_VISIBLE_DEVICES` names too few GPUs.
    """
    if config.replicas == 1 or cpu or "CUDA_VISIBLE_DEVICES" in config.env:
        return [config] * config.replicas
    split = split_of(config.extra_args)
    needed = config.replicas * split.gpus
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(needed)]
    if len(devices) < needed:
        raise engine_error(
            f"{config.replicas} replicas of {split} need {needed} GPUs; CUDA_VISIBLE_DEVICES has {len(devices)}"
        )
    shares = [devices[start : start + split.gpus] for start in range(0, needed, split.gpus)]
    return [
        config.model_copy(update={"env": {**config.env, "CUDA_VISIBLE_DEVICES": ",".join(share)}}) for share in shares
    ]


def _api_key(config: EngineConfig) -> str | None:
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env)
    if not key:
        raise engine_error(f"engine.api_key_env: {config.api_key_env} is not set in the environment")
    return key


async def _all(calls: Iterable[Awaitable[None]]) -> list[MixfuseError]:
    """Makes the calls at once and waits for all; returns the errors of those that failed."""
    failures = []
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, MixfuseError):
            failures.append(result)
        elif result is not None:
            raise result
    return failures
