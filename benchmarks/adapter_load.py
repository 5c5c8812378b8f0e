"""Loading an adapter as large as Mixtral 8x22B's (0.95 GB): how long it takes, and how long requests stall meanwhile.

    nice python benchmarks/adapter_load.py [--layers 4] [--rounds 3] [--json]

vLLM loads adapters between two steps, so every request waits. The base has random weights (`--load-format=dummy`) and
few layers; the adapter has a high rank, so that it is as large as one of rank 16 for all layers of 8x22B. A client asks
for one token after another. The copy that the engine reads is made and hashed first, as in a swap.
"""

import argparse
import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from harness import ROOT, note, table

from mixfuse.contracts.adapter import file_hashes
from mixfuse.serve.copies import AdapterCopies
from mixfuse.serve.engine import Engine, EngineConfig

RANK, HIDDEN, INNER, EXPERTS = 512, 1024, 4096, 8


def make_base(folder: Path, layers: int) -> Path:
    """A base without weights: its config, and the tokenizer of a tiny one."""
    base = folder / "base"
    subprocess.run([sys.executable, "-m", "mixfuse", "base", "build", str(base), "--tiny"], cwd=ROOT, check=True)
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS}
    config |= {"num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    (base / "config.json").write_text(json.dumps(config))
    return base


def make_adapter(folder: Path, layers: int) -> Path:
    """Random factors for every expert, as vLLM names them."""
    import numpy
    from safetensors.numpy import save_file

    draw = numpy.random.default_rng(0)
    weights = {}
    for layer in range(layers):
        for expert in range(EXPERTS):
            for name, wide, out in (("w1", HIDDEN, INNER), ("w2", INNER, HIDDEN), ("w3", HIDDEN, INNER)):
                stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                weights[f"{stem}.lora_A.weight"] = draw.standard_normal((RANK, wide), numpy.float32) / 100
                weights[f"{stem}.lora_B.weight"] = draw.standard_normal((out, RANK), numpy.float32) / 100
    path = folder / "adapter"
    path.mkdir()
    save_file(weights, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["w1", "w2", "w3"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


async def measure(base: Path, adapter: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Loads the adapter `rounds` times while a client asks."""
    config = EngineConfig(
        base=base,
        max_model_len=256,
        max_lora_rank=RANK,
        max_loras=1,
        max_cpu_loras=2,
        threads=1,
        start_timeout_s=600,
        extra_args=["--load-format=dummy"],
    )
    steps: list[tuple[float, float]] = []
    figures: dict[str, Any] = {"megabytes": (adapter / "adapter_model.safetensors").stat().st_size / 1e6}
    began = time.monotonic()
    hashes = file_hashes(adapter)
    copies = AdapterCopies(folder / "state")
    copy = copies.keep(adapter, hashes)
    figures["hash_and_copy_s"] = time.monotonic() - began
    note("starting the engine")
    async with Engine(config, log_path=folder / "engine.log") as engine:
        body = {"model": engine.base_model_name, "prompt": [5], "max_tokens": 1}
        headers = {"Authorization": f"Bearer {engine.api_key}"}

        async def ask() -> None:
            async with httpx.AsyncClient(timeout=600, trust_env=False, headers=headers) as client:
                while True:
                    begun = time.monotonic()
                    (await client.post(f"{engine.url}/completions", json=body)).raise_for_status()
                    steps.append((begun, time.monotonic()))

        asking = asyncio.create_task(ask())
        await asyncio.sleep(10)
        figures["usual_s"] = statistics.median(ended - begun for begun, ended in steps)
        loads, stalls = [], []
        for number in range(rounds):
            begun = time.monotonic()
            await engine.load_adapter(f"adapter-{number}", copy, timeout_s=600)
            ended = time.monotonic()
            await asyncio.sleep(2)
            loads.append(ended - begun)
            stalls.append(max(end - start for start, end in steps if start < ended and end > begun))
            note(f"loaded in {loads[-1]:.1f} s; the longest request took {stalls[-1]:.1f} s")
            await engine.unload_adapter(f"adapter-{number}")
        asking.cancel()
        await asyncio.wait({asking})
    copies.close()
    return {**figures, "load_s": loads, "stall_s": stalls}


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="mixfuse-bench-") as name:
        folder = Path(name)
        base, adapter = make_base(folder, arguments.layers), make_adapter(folder, arguments.layers)
        try:
            return asyncio.run(measure(base, adapter, folder, arguments.rounds))
        except Exception:
            log = folder / "engine.log"
            print(log.read_text(errors="replace")[-3000:] if log.exists() else "", file=sys.stderr)
            raise
        finally:
            shutil.rmtree(folder / "state", ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=4, help="of the base; 4 make 1.0 GB (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="loads (default 3)")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    options = parser.parse_args()
    found = main(options)
    rows = [
        ["size of the adapter", f"{found['megabytes']:.0f} MB"],
        ["hash and copy, before the load", f"{found['hash_and_copy_s']:.1f} s"],
        ["load", f"{statistics.median(found['load_s']):.1f} s (median of {len(found['load_s'])})"],
        ["longest request during a load", f"{max(found['stall_s']):.1f} s; usually {found['usual_s'] * 1000:.0f} ms"],
    ]
    table("Load of an adapter of full size", ["", "measured"], rows)
    if options.json:
        print(json.dumps(found))
