"""Qwen3-MoE from training to serving: trained under ZeRO-3, exported, and applied by vLLM as PEFT applies it.

Mixtral is in `test_engine.py`. One training run and one engine serve all tests here.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file

from mixfuse.contracts.adapter import PARITY_TOLERANCE, WEIGHTS, verify
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import family_named
from mixfuse.serve.engine import Engine, EngineConfig
from mixfuse.train.adapters import parity
from mixfuse.train.adapters.export import export
from mixfuse.train.model.embedded_base import build

FAMILY = family_named("qwen3_moe")
PROJECT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.zero3, pytest.mark.asyncio(loop_scope="module")]


@dataclass(frozen=True)
class Served:
    """A trained adapter in a running engine, under the name "trained".

    Attributes:
        engine: The engine.
        run: The training run's folder.
        directory: The adapter directory exported from it.
        reference: What PEFT computes for the probes.
    """

    engine: Engine
    run: Path
    directory: Path
    reference: parity.Reference

    async def load_unchecked(self, name: str, folder: Path) -> int:
        """Loads a folder without this project's checks; returns vLLM's HTTP status."""
        headers = {"Authorization": f"Bearer {self.engine.api_key}"}
        body = {"lora_name": name, "lora_path": str(folder)}
        async with httpx.AsyncClient(timeout=600, trust_env=False) as client:
            return (await client.post(f"{self.engine.url}/load_lora_adapter", json=body, headers=headers)).status_code

    async def difference(self, name: str) -> float:
        """The worst difference of an adapter in the engine to the trained one in PEFT, in nats."""
        measured = await parity.compare(
            self.reference, lambda prompt: self.engine.prompt_logprobs(name, prompt), engine_name="vllm"
        )
        return measured.max_abs_logprob_difference


def train(base: Path, folder: Path) -> Path:
    """Trains attention and experts for a few steps on two ZeRO-3 processes, as a user does; returns the run folder."""
    chats = [
        [{"role": "user", "content": f"Repeat: {word}"}, {"role": "assistant", "content": word}]
        for word in ("river", "stone", "apple", "cloud")
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    recipe = {
        "base": str(base),
        "out": str(folder / "run"),
        "data": str(folder / "chats.jsonl"),
        "max_length": 64,
        "lora": {"r": 4, "alpha": 16},
        "deepspeed": str(PROJECT / "configs" / "deepspeed" / "zero3.json"),
        "optimizer": {"steps": 6, "batch_size": 4, "micro_batch": 2, "learning_rate": 1e-2, "warmup_steps": 0},
        "processes": 2,
        "threads": 1,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "mixfuse", "train", "sft", str(folder / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-20000:]
    return folder / "run"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("qwen3")
    base, directory = root / "base", root / "adapter"
    build(base, tiny=True, family=FAMILY.model_type)
    run = train(base, root)
    export(run, directory)
    reference = parity.reference(directory, base)
    config = EngineConfig(base=base, max_model_len=1024, max_loras=2, max_num_seqs=8, threads=1)
    async with Engine(config, log_path=root / "engine.log") as engine:
        await engine.load_adapter("trained", directory)
        yield Served(engine, run, directory, reference)


async def test_training_lowers_the_loss(served: Served):
    rows = [json.loads(line) for line in (served.run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]


async def test_the_parity_gate_passes_and_sees_the_experts(served: Served):
    measured = await parity.compare(
        served.reference, lambda prompt: served.engine.prompt_logprobs("trained", prompt), engine_name="vllm"
    )
    parity.check(served.directory, measured)
    manifest = verify(served.directory)
    assert manifest.model_type == FAMILY.model_type
    assert manifest.parity == measured
    assert measured.max_abs_logprob_difference <= PARITY_TOLERANCE
    assert measured.expert_effect is not None
    assert measured.expert_effect > 10 * PARITY_TOLERANCE


async def test_fused_experts_are_refused_by_the_engine_and_by_vllm(served: Served):
    """For Mixtral, vLLM ignores them: PEFT's `mlp.experts` is no module there. For Qwen3 it is, and vLLM refuses."""
    with pytest.raises(MixfuseError, match=r"silently ignore .*mlp\.experts"):
        await served.engine.load_adapter("fused", served.directory / "peft")
    assert await served.load_unchecked("fused", served.directory / "peft") == 500


async def test_experts_of_another_familys_block_are_refused(served: Served, tmp_path: Path):
    """vLLM compares `experts.0.gate_proj` alone, and finds no module of the whole name: it would ignore them."""
    for file in served.directory.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(served.directory / WEIGHTS)
    renamed = {name.replace(".mlp.experts.", ".block_sparse_moe.experts."): w for name, w in weights.items()}
    save_file(renamed, tmp_path / WEIGHTS)
    with pytest.raises(MixfuseError, match=r"silently ignore .*block_sparse_moe\.experts\.0"):
        await served.engine.load_adapter("renamed", tmp_path)
    assert await served.load_unchecked("renamed", tmp_path) == 200, "vLLM refuses other blocks now"
    try:
        assert await served.difference("renamed") == pytest.approx(served.reference.expert_effect, rel=0.01)
    finally:
        await served.engine.unload_adapter("renamed")
