"""An engine on which adapters are tried, for `adapter verify` and `eval judge`: one that is started, or running ones.

It is started as a serve config says, so that what is measured is what will serve.
"""

import asyncio
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console

from mixfuse.app.server import ServeConfig
from mixfuse.contracts.adapter import LORA_RANKS, LoraRank, Manifest
from mixfuse.contracts.agreement import LENGTHS
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import config_of
from mixfuse.contracts.strict_yaml import load
from mixfuse.serve.engine import Engine, EngineConfig, cpu_build
from mixfuse.serve.precision import precision
from mixfuse.serve.vllm_api import VllmApi

ENGINE_KEY = "VLLM_API_KEY"
"""The environment variable with the key of a running engine (`--engine-url`)."""
_LENGTH = 2048  # of the engine that is started without a config on a CPU, where long probes take minutes
_ROOM = 16  # for what an engine writes after a probe


@dataclass(frozen=True)
class EngineChoice:
    """Which engine adapters are tried on.

    Attributes:
        config: A serve config, whose `engine` says how it is started, or where the running ones are.
        dtype: The type of weights and activations; None: the config's, else float32 on a CPU and the base's on a GPU.
        tensor_parallel_size: Over how many GPUs each layer is divided; None: the config's.
        url: A running vLLM, instead of a config. Its key is in the environment, `VLLM_API_KEY`.
        chat_template: What an engine that is started without a config writes chats with; None: the base's own template.
    """

    config: Path | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    tensor_parallel_size: int | None = None
    url: str | None = None
    chat_template: str | None = None

    def engine(self, base: Path | None, *, rank: int) -> EngineConfig:
        """The config of the engine.

        Args:
            base: The base model; None: the serve config's.
            rank: The largest rank of an adapter.

        Raises:
            MixfuseError: The options contradict each other, there is no base, or the rank is above the engine's.
        """
        fitting = next((known for known in LORA_RANKS if known >= rank), None)
        if fitting is None:
            raise MixfuseError(f"rank {rank} is above the largest that vLLM serves, {LORA_RANKS[-1]}")
        if self.url is not None and (self.config is not None or self.tensor_parallel_size is not None):
            raise MixfuseError("--engine-url names an engine that runs: leave --config and --tensor-parallel-size out")
        if self.config is not None:
            return self._configured(base, rank)
        if base is None:
            raise MixfuseError("name the base model with --base, or a serve config with --config")
        return self._plain(base, fitting)

    def probe_length(self, config: EngineConfig) -> int:
        """The most tokens of a probe. On a CPU a long one takes minutes, so only a config's length asks for it."""
        if self.config is None and self.url is None and cpu_build():
            return LENGTHS[1]
        stored = config_of(config.base).get("max_position_embeddings")
        longest = stored if isinstance(stored, int) and stored > _ROOM else LENGTHS[-1] + _ROOM
        return min(longest if config.external else min(longest, config.max_model_len), LENGTHS[-1] + _ROOM) - _ROOM

    def _plain(self, base: Path, rank: LoraRank) -> EngineConfig:
        dtype = self.dtype or "auto"
        if self.url is not None:
            key = ENGINE_KEY if os.environ.get(ENGINE_KEY) else None
            return EngineConfig(base=base, dtype=dtype, url=self.url, api_key_env=key, max_lora_rank=rank)
        return EngineConfig(
            base=base,
            dtype=dtype,
            chat_template=self.chat_template,
            max_lora_rank=rank,
            max_loras=1,
            max_model_len=_LENGTH if cpu_build() else LENGTHS[-1] + _ROOM,
            extra_args=self._parallel(),
        )

    def _configured(self, base: Path | None, rank: int) -> EngineConfig:
        assert self.config is not None  # noqa: S101 - the caller has looked
        engine = load(self.config, ServeConfig).engine
        if rank > engine.max_lora_rank:
            raise MixfuseError(
                f"{self.config}: engine.max_lora_rank is {engine.max_lora_rank}, and the adapter's rank {rank}: the "
                "server would refuse it; raise it there"
            )
        if engine.external and self.tensor_parallel_size:
            raise MixfuseError(f"{self.config}: its engines run already, so --tensor-parallel-size cannot change them")
        if engine.external and self.dtype not in (None, engine.dtype):
            raise MixfuseError(
                f"{self.config}: its engines run already, so --dtype cannot change them; say in engine.dtype how they "
                "were started"
            )
        changes = {
            "base": base or engine.base,
            "dtype": self.dtype or engine.dtype,
            "extra_args": [*engine.extra_args, *self._parallel()],
            "replicas": 1,
            "port": None,  # a server of this config may run
        }
        return engine.model_copy(update=changes)

    def _parallel(self) -> list[str]:
        return [f"--tensor-parallel-size={self.tensor_parallel_size}"] if self.tensor_parallel_size else []


class Trial(NamedTuple):
    """Engines with adapters loaded.

    Attributes:
        engines: One that was started for this, or all running ones; each data-parallel copy of the model by itself.
        names: Adapter directory → its name in them.
        precision: The number format of their weights and activations.
        length: The longest prompt and completion together, in tokens.
        external: Whether they run already.
    """

    engines: Sequence[VllmApi]
    names: Mapping[Path, str]
    precision: str
    length: int
    external: bool

    @property
    def probe_length(self) -> int:
        """The most tokens of a probe."""
        return self.length - min(_ROOM, self.length // 2)


@asynccontextmanager
async def trial(choice: EngineChoice, base: Path | None, adapters: Mapping[Path, Manifest]) -> AsyncIterator[Trial]:
    """Engines with adapters loaded, for as long as the block runs; then they are unloaded, and an own engine ends.

    Raises:
        MixfuseError: As for `EngineChoice.engine`; the engine does not start or answer, or refuses an adapter.
    """
    config = choice.engine(base, rank=max(manifest.rank for manifest in adapters.values()))
    async with AsyncExitStack() as stack:
        if config.external:
            engines: list[VllmApi] = await _running(config)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mixfuse-"))
            engine = Engine(config, log_path=Path(folder) / "engine.log")
            with Console(stderr=True).status("starting vLLM"):
                await engine.start()
            stack.push_async_callback(engine.stop)
            engines = [engine]
        names = {
            # Another name each time: the same revision may serve in a running engine.
            directory: f"trial-{manifest.revision}-{secrets.token_hex(4)}"
            for directory, manifest in adapters.items()
        }
        for engine_api in engines:
            for directory, name in names.items():
                await engine_api.load_adapter(name, directory)
                if config.external:
                    stack.push_async_callback(engine_api.unload_adapter, name)
        lengths = await asyncio.gather(*(engine_api.max_model_len() for engine_api in engines))
        length = min((known for known in lengths if known is not None), default=config.max_model_len)
        copies = [copy for engine_api in engines for copy in await engine_api.ranks()]
        yield Trial(copies, names, precision(config), length, bool(config.external))


async def _running(config: EngineConfig) -> list[VllmApi]:
    key = os.environ.get(config.api_key_env) if config.api_key_env else None
    if config.api_key_env and not key:
        raise MixfuseError(f"engine.api_key_env: {config.api_key_env} is not set in the environment", kind="engine")
    engines = [
        VllmApi(url, key, base_model_name="", hint="is it running, and reachable from here?") for url in config.external
    ]
    for engine in engines:
        engine.base_model_name = (await engine.models())[0]
    return engines
