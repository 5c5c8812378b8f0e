"""What needs an engine for a moment: the parity gate of `adapter verify`, and `eval judge` on an adapter directory.

Composes `train` (PEFT's side), `serve` (the engine) and `fusion` (the judging).
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import get_args

from rich.console import Console

from fusion import eval_judge as judging
from fusion.eval_judge import JudgeReport
from fusion.pool import Endpoint
from mixfuse import adapter, judge_protocol
from mixfuse.adapter import Fingerprint, Manifest, Parity
from mixfuse.errors import MixfuseError
from serve.engine import Engine, EngineConfig, LoraRank

_NAME = "verified"


def verify_parity(directory: Path, base: Path) -> Parity:
    """Checks an adapter directory, then compares vLLM with PEFT on it; the figure goes into its manifest.

    Raises:
        MixfuseError: The directory or the base is wrong, the engine does not start, or the parity gate fails.
    """
    manifest = adapter.verify(directory, base=_fingerprint(base))
    from train import parity

    wanted = parity.reference(directory, base)

    async def compare() -> Parity:
        async with _engine(directory, manifest, base) as engine:
            return await parity.compare(
                wanted, lambda prompt: engine.prompt_logprobs(_NAME, prompt), engine_name=_vllm()
            )

    measured = asyncio.run(compare())
    parity.check(directory, measured, wanted)
    return measured


def eval_judge(
    judge: str, data: Path, *, base: Path | None, url: str, limit: int | None, concurrency: int
) -> JudgeReport:
    """Evaluates an adapter directory (on an engine started for it) or a role of the server at `url`; prints a table.

    Raises:
        MixfuseError: The reference or the data is wrong, or the judge cannot be reached.
    """
    rows = judging.load(data, limit=limit)

    async def with_role() -> JudgeReport:
        endpoint = Endpoint(f"{url.rstrip('/')}/v1", judge)
        return await judging.evaluate(endpoint, rows, concurrency=concurrency)

    async def with_adapter(directory: Path) -> JudgeReport:
        manifest = adapter.read_manifest(directory)
        if manifest.judge_protocol != judge_protocol.describe():
            raise MixfuseError(f"{directory} is no judge of this version's judge protocol (role {manifest.role!r})")
        model = base or Path(manifest.base_path)
        adapter.verify(directory, base=_fingerprint(model))
        async with _engine(directory, manifest, model) as engine:
            endpoint = Endpoint(engine.url, _NAME, engine.api_key)
            return await judging.evaluate(endpoint, rows, concurrency=concurrency)

    is_directory = "/" in judge or Path(judge).is_dir()
    report = asyncio.run(with_adapter(Path(judge)) if is_directory else with_role())
    Console().print(report.table())
    return report


@asynccontextmanager
async def _engine(directory: Path, manifest: Manifest, base: Path) -> AsyncIterator[Engine]:
    """An engine on `base` with one adapter, float32, for as long as the block runs."""
    ranks: tuple[LoraRank, ...] = get_args(LoraRank)
    fitting = next((rank for rank in ranks if rank >= manifest.rank), None)
    if fitting is None:
        raise MixfuseError(f"{directory}: rank {manifest.rank} is above the largest that vLLM serves, {ranks[-1]}")
    with tempfile.TemporaryDirectory(prefix="mixfuse-") as folder:
        config = EngineConfig(base=base, dtype="float32", max_lora_rank=fitting, max_loras=1, max_model_len=2048)
        engine = Engine(config, log_path=Path(folder) / "engine.log")
        with Console(stderr=True).status("starting vLLM"):
            await engine.start()
        try:
            await engine.load_adapter(_NAME, directory)
            yield engine
        finally:
            await engine.stop()


def _fingerprint(base: Path) -> Fingerprint:
    if not (base / "config.json").is_file():
        raise MixfuseError(f"{base} is no model folder (no config.json); name the base with --base")
    return adapter.fingerprint(base)


def _vllm() -> str:
    import vllm

    return f"vllm {vllm.__version__}"
