"""What LoRA costs in vLLM on a CPU: its own experts without LoRA support, and `serve/vllm_cpu_moe_lora.py`.

    .venv/bin/python benchmarks/plugin.py [--base DIR] [--tiny] [--layers N] [--rounds N] [--kernel] [--json]

Two engines are up at once, with the same flags but for LoRA, and take turns within each round:

- `vllm`: without `--enable-lora`, so vLLM's own kernel for experts; the baseline;
- `no adapter`, `one adapter`, `three adapters`: with the plugin, asked by the base's name, by one adapter's, or by
  three adapters' in turn. Adapters are random, of rank 16, on attention and all experts, in three of four slots.

Each is measured twice: `decode`, answers of some tokens to short prompts, and `prefill`, one token after long prompts
that share no prefix. All requests of a measurement are sent at once. Ratios are of tokens per CPU second of the
engine's processes, with one computing thread: other programs on the machine disturb it less than wall time, which is
printed beside it. They are medians over rounds of ratios within a round, with the least and the greatest.

With --layers N only the first N layers of the base are served, to need less memory. The output layer is whole, and no
adapter works on it: it flatters `decode` a little, and more with fewer layers.

`--kernel` starts no engine: it times one layer's experts at the embedded base's sizes in this process, by CPU time:
vLLM's kernel (which batches without an adapter go through), and the plugin's path with no, one and three adapters.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoTokenizer, MixtralForCausalLM

from mixfuse.contracts.families.mixtral import FAMILY as MIXTRAL
from mixfuse.serve.cpu_lora_products import ExpertLora, routed_experts
from mixfuse.serve.engine import Engine, EngineConfig
from mixfuse.train.adapters.export import export
from mixfuse.train.adapters.saving import save_peft
from mixfuse.train.model.embedded_base import build
from mixfuse.train.model.load import load_base, lora_config
from mixfuse.train.recipe import Lora

ROOT = Path(__file__).resolve().parent.parent
GOALS = {"no adapter": 0.9, "one adapter": 0.75}
ADAPTERS = ("first", "second", "third")
KINDS = {"vllm": ["base"], "no adapter": ["base"], "one adapter": ["first"], "three adapters": list(ADAPTERS)}
WITHOUT_LORA = "--no-enable-lora"  # the last of the two wins


class Load(NamedTuple):
    """Requests that are sent at once."""

    requests: int
    prompt: int
    answer: int

    @property
    def tokens(self) -> int:
        """What is counted: the prompts' where next to nothing is written, else what is written."""
        return self.requests * (self.prompt if self.answer == 1 else self.answer)


def main() -> None:
    arguments = _arguments()
    if arguments.kernel:
        _kernel(arguments.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        base = arguments.base or Path(folder) / "base"
        if not (base / "config.json").is_file():
            build(base, tiny=arguments.tiny)
        if arguments.layers:
            base = _cut(base, Path(folder) / "cut", arguments.layers)
        adapters = {name: _adapter(base, Path(folder) / name, seed) for seed, name in enumerate(ADAPTERS)}
        loads = {"decode": Load(arguments.requests, 16, arguments.answer), "prefill": Load(2, arguments.prompt, 1)}
        rows = asyncio.run(_measure(base, adapters, loads, arguments.rounds, Path(folder)))
    report = _report(rows)
    _print(report, loads, base, arguments.rounds)
    if arguments.json:
        print(json.dumps(report))


async def _measure(
    base: Path, adapters: dict[str, Path], loads: dict[str, Load], rounds: int, logs: Path
) -> list[dict[str, dict[str, tuple[float, float]]]]:
    """For each round, load and kind: tokens per CPU second and per second."""
    shared = {
        "base": base,
        "dtype": "float32",
        "threads": 1,
        "max_loras": 4,
        "max_num_seqs": 64,
        "start_timeout_s": 900,
    }
    plain = EngineConfig(**shared, extra_args=[WITHOUT_LORA])
    lora = EngineConfig(**shared)
    async with AsyncExitStack() as stack:
        own, with_lora = await asyncio.gather(
            stack.enter_async_context(Engine(plain, log_path=logs / "plain.log")),
            stack.enter_async_context(Engine(lora, log_path=logs / "lora.log")),
        )
        engines = {"vllm": own}
        for name, path in adapters.items():
            await with_lora.load_adapter(name, path)
        engines |= dict.fromkeys([kind for kind in KINDS if kind != "vllm"], with_lora)
        draw = random.Random(0)
        for kind, engine in engines.items():  # warm
            for load in loads.values():
                await _run(engine, KINDS[kind], load._replace(answer=min(load.answer, 4)), draw)
        rows = []
        for number in range(rounds):
            order = list(KINDS)[number % len(KINDS) :] + list(KINDS)[: number % len(KINDS)]
            row: dict[str, dict[str, tuple[float, float]]] = {}
            for name, load in loads.items():
                row[name] = {kind: await _run(engines[kind], KINDS[kind], load, draw) for kind in order}
            rows.append(row)
            print(f"round {number + 1} of {rounds}: {json.dumps(row)}", file=sys.stderr)
        return rows


async def _run(engine: Engine, models: Sequence[str], load: Load, draw: random.Random) -> tuple[float, float]:
    words = [[draw.randrange(2, 200) for _ in range(load.prompt)] for _ in range(load.requests)]
    headers = {"Authorization": f"Bearer {engine.api_key}"}
    async with httpx.AsyncClient(timeout=1800, trust_env=False, headers=headers) as client:

        async def ask(number: int) -> None:
            body = {
                "model": models[number % len(models)],
                "prompt": words[number],
                "max_tokens": load.answer,
                "ignore_eos": True,
                "temperature": 0,
            }
            (await client.post(f"{engine.url}/completions", json=body)).raise_for_status()

        cpu, wall = _cpu_seconds(engine), time.perf_counter()
        await asyncio.gather(*(ask(number) for number in range(load.requests)))
        return load.tokens / (_cpu_seconds(engine) - cpu), load.tokens / (time.perf_counter() - wall)


def _cpu_seconds(engine: Engine) -> float:
    """CPU time of all processes of the engine."""
    assert engine._process is not None
    times = [process.cpu_times() for process in psutil.Process(engine._process.pid).children(recursive=True)]
    return sum(each.user + each.system for each in times)


def _report(rows: list[dict[str, dict[str, tuple[float, float]]]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    report: dict[str, dict[str, dict[str, list[float]]]] = {}
    for load in rows[0]:
        report[load] = {}
        for kind in KINDS:
            ratios = [row[load][kind][0] / row[load]["vllm"][0] for row in rows]
            walls = [row[load][kind][1] / row[load]["vllm"][1] for row in rows]
            report[load][kind] = {
                "per_cpu_second": _spread([row[load][kind][0] for row in rows]),
                "ratio": _spread(ratios),
                "ratio_of_wall": _spread(walls),
            }
    return report


def _spread(values: list[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def _print(
    report: dict[str, dict[str, dict[str, list[float]]]], loads: dict[str, Load], base: Path, rounds: int
) -> None:
    def shown(values: list[float], digits: int) -> str:
        return "{:.{d}f} [{:.{d}f}..{:.{d}f}]".format(*values, d=digits)

    print(
        f"{base}, float32, one thread, {rounds} rounds: "
        + "; ".join(
            f"{name}: {load.requests} requests of {load.prompt} + {load.answer} tokens" for name, load in loads.items()
        )
    )
    print("| load | engine | tokens per CPU second | / vllm | / vllm, wall time | goal |")
    print("| --- | --- | --- | --- | --- | --- |")
    for load, kinds in report.items():
        for kind, figures in kinds.items():
            goal = GOALS.get(kind)
            verdict = f"≥ {goal}: {'met' if figures['ratio'][0] >= goal else 'MISSED'}" if goal else ""
            print(
                f"| {load} | {kind} | {shown(figures['per_cpu_second'], 1)} | {shown(figures['ratio'], 2)} | "
                f"{shown(figures['ratio_of_wall'], 2)} | {verdict} |"
            )


def _kernel(rounds: int) -> None:
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    experts, hidden, inner, rank, slots, layers = 4, 576, 1536, 16, 4, 4  # so many layers that no cache holds them

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(*shape) / shape[-1] ** 0.5

    def packed(matrices: torch.Tensor) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        return [partial(ops.onednn_mm, ops.create_onednn_mm(matrix.t(), 32), bias=None) for matrix in matrices]

    def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        torch.ops._C.silu_and_mul(out, gate_up)
        return out

    made = []
    for _ in range(layers):
        w13, w2 = weights(experts, 2 * inner, hidden), weights(experts, hidden, inner)
        a13 = tuple(weights(slots, experts, rank, hidden) for _ in range(2))
        b13 = tuple(weights(slots, experts, inner, rank) for _ in range(2))
        lora = (a13, b13, weights(slots, experts, rank, inner), weights(slots, experts, hidden, rank))
        theirs = [ops.cpu_prepack_moe_weight(each, "vec") for each in (w13, w2)]
        made.append((theirs, packed(w13), packed(w2), lora))
    print(f"experts of one layer, float32, one thread, CPU ms, median of {rounds} rounds, and vllm's over it")
    print("| tokens | vllm | plugin, no adapter | one adapter | three adapters |")
    print("| --- | --- | --- | --- | --- |")
    for tokens in (4, 16, 64, 256):
        x, shares = torch.randn(tokens, hidden), torch.rand(tokens, 2)
        chosen = torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)]).int()
        batches = {
            "no adapter": torch.full((tokens,), -1),
            "one adapter": torch.zeros(tokens, dtype=torch.long),
            "three adapters": torch.arange(tokens) % 3,
        }
        times: dict[str, list[float]] = {name: [] for name in ("vllm", *batches)}
        for _ in range(rounds + 1):
            begun = time.process_time()
            for theirs, *_rest in made:
                out = torch.empty_like(x)
                ops.cpu_fused_moe(out, x, *theirs, None, None, shares, chosen, "silu", "vec", False)
            times["vllm"].append(time.process_time() - begun)
            for name, batch in batches.items():
                begun = time.process_time()
                for _, first, second, lora in made:
                    routed_experts(x, first, second, chosen, shares, swiglu, ExpertLora(batch, *lora))
                times[name].append(time.process_time() - begun)
        median = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}  # the first one warms
        cells = [f"{seconds / layers * 1e3:.2f} ({median['vllm'] / seconds:.2f})" for seconds in median.values()]
        print(f"| {tokens} | {' | '.join(cells)} |", flush=True)


def _cut(base: Path, folder: Path, layers: int) -> Path:
    """The base's first layers."""
    config = AutoConfig.from_pretrained(base)
    config.num_hidden_layers = layers
    MixtralForCausalLM.from_pretrained(base, config=config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def _adapter(base: Path, folder: Path, seed: int) -> Path:
    """A random adapter of rank 16, exported."""
    model = get_peft_model(load_base(base, torch.float32), lora_config(MIXTRAL, Lora(r=16, alpha=16, experts="all")))
    torch.manual_seed(seed)
    weights = {}
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weights[name.replace(".default.", ".")] = torch.randn_like(weight) * 0.01
    saved = folder.with_name(f"{folder.name}-saved")
    saved.mkdir()
    save_peft(model, weights, saved)
    export(saved, folder, base=base, role="domain")
    return folder


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="default: built anew")
    parser.add_argument("--tiny", action="store_true", help="a random two-layer base")
    parser.add_argument("--layers", type=int, metavar="N", help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16, help="at once, of the decode load")
    parser.add_argument("--answer", type=int, default=16, help="tokens written, of the decode load")
    parser.add_argument("--prompt", type=int, default=256, help="tokens read, of the prefill load")
    parser.add_argument("--kernel", action="store_true", help="the experts alone, without an engine")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    return parser.parse_args()


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
