"""What each part of a swap costs the requests beside it, and what it leaves in the memory of vLLM's processes.

    nice python benchmarks/swap_phases.py [--rounds 8] [--minutes 9] [--engine "NAME [--ARGUMENT=…] [VARIABLE=…]"]…

Starts an engine as `mixfuse serve` does, on a tiny base, for each `--engine`, with vLLM's arguments and environment
variables (`PYTHONSAFEPATH=1 PYTHONPATH=DIR` takes the plugin from another checkout). They take turns, so that a busy
machine is as busy for each. Five clients ask one of them for answers of eight tokens, without pause. Meanwhile an
adapter is loaded, asked for the log-probabilities of short prompts, of long ones, of all at once beside the base, and
unloaded; then another is loaded, probed as in a swap, and unloaded. Before and after, the same clients ask with nothing
beside them. The ratio is the p95 of requests during a part over theirs.

`used` and `free` are what glibc's allocator has given out in the worker, and what it holds free, in MiB; `rss` is each
process's. They are read by a thread in the worker, which `sitecustomize` starts there.
"""

import argparse
import asyncio
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import psutil
from harness import ROOT, note, table
from hot_swap import make_adapters, percentile

from mixfuse.contracts.agreement import fixed_prompts
from mixfuse.serve.engine import Engine, EngineConfig
from mixfuse.serve.probes import Prober, Terms

LENGTH = 1024
CLIENTS = ("base", "live", "live", "base", "live")
PROMPTS = fixed_prompts(LENGTH - 9)
WATCH = """
import ctypes, os, threading, time
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c d e f used free g".split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
def watch():
    while True:
        info = libc.mallinfo2()
        with open(f"{os.environ['SWAP_PHASES']}/{os.getpid()}", "w") as file:
            file.write(f"{info.used / 2**20:.0f} {info.free / 2**20:.0f}")
        time.sleep(0.5)
if "SWAP_PHASES" in os.environ:
    threading.Thread(target=watch, daemon=True).start()
"""


@dataclass
class Part:
    """The windows of one part of a swap: (its seconds, its requests' latencies, those with nothing beside them)."""

    windows: list[tuple[float, list[float], list[float]]] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Figures over all windows."""
        during, quiet = ([latency for window in self.windows for latency in window[side]] for side in (1, 2))
        return {
            "seconds": statistics.median(window[0] for window in self.windows),
            "requests": len(during),
            "p50_ms": percentile(during, 50) * 1000 if during else None,
            "p95_ms": percentile(during, 95) * 1000 if during else None,
            "ratio": percentile(during, 95) / percentile(quiet, 95) if during and quiet else None,
        }


class Swapped:
    """One engine, its figures, and the clients that ask it."""

    def __init__(self, name: str, engine: Engine, adapters: Sequence[Path], quiet_s: float) -> None:
        self.name, self.engine, self.adapters, self.quiet_s = name, engine, adapters, quiet_s
        self.base_model_name = engine.base_model_name
        self.parts: dict[str, Part] = {}
        self.memory: list[dict[str, str]] = []
        self._numbers = itertools.count()
        self._prober = Prober()

    def each(self) -> list[Engine]:
        """As a group of engines has it."""
        return [self.engine]

    async def round(self, number: int, watched: Path) -> None:
        """One turn: all parts of a swap, once."""
        engine, adapter = self.engine, self.adapters[number % len(self.adapters)]
        name, asked = f"adapter-{number}", []
        windows: dict[str, list[tuple[float, float]]] = {}

        async def window(part: str, work: Awaitable[Any]) -> None:
            await asyncio.sleep(0.3)
            began = time.monotonic()
            await work
            windows.setdefault(part, []).append((began, time.monotonic()))
            await asyncio.sleep(0.3)

        async def in_turn(prompts: Sequence[list[int]]) -> None:
            for prompt in prompts:
                await engine.prompt_logprobs(name, prompt)

        async def swap() -> None:
            await engine.load_adapter(f"{name}-swapped", adapter)
            await self._prober.check(self, f"{name}-swapped", adapter, Terms(), verdicts=False)  # type: ignore[arg-type]
            await engine.unload_adapter(f"{name}-swapped")

        headers = {"Authorization": f"Bearer {engine.api_key}"}
        async with httpx.AsyncClient(timeout=600, trust_env=False, headers=headers) as client:
            clients = [asyncio.create_task(self._ask(client, model, asked)) for model in CLIENTS]
            await asyncio.sleep(1.5)
            await window("quiet", asyncio.sleep(self.quiet_s))
            await window("load", engine.load_adapter(name, adapter))
            await window("short prompts", in_turn([prompt for prompt in PROMPTS if len(prompt) < 100]))
            await window("long prompts", in_turn([prompt for prompt in PROMPTS if len(prompt) >= 100]))
            together = [engine.prompt_logprobs(model, prompt) for model in (name, "base") for prompt in PROMPTS]
            await window("all at once", asyncio.gather(*together))
            await window("unload", engine.unload_adapter(name))
            await window("whole swap", swap())
            await window("quiet", asyncio.sleep(self.quiet_s))
            for task in clients:
                task.cancel()
            for ended in await asyncio.gather(*clients, return_exceptions=True):
                if isinstance(ended, Exception):
                    raise ended

        def within(part: str) -> list[float]:
            return [end - start for start, end in asked if any(start < b and end > a for a, b in windows[part])]

        for part, spans in windows.items():
            took = statistics.fmean(ended - began for began, ended in spans)
            self.parts.setdefault(part, Part()).windows.append((took, within(part), within("quiet")))
        self.memory.append(self._memory(watched))

    async def _ask(self, client: httpx.AsyncClient, model: str, asked: list[tuple[float, float]]) -> None:
        while True:
            began = time.monotonic()
            text = f"Question {next(self._numbers)}: what comes next, and why?"
            body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 8}
            (await client.post(f"{self.engine.url}/chat/completions", json=body)).raise_for_status()
            asked.append((began, time.monotonic()))

    def _memory(self, watched: Path) -> dict[str, str]:
        found = {}
        process = self.engine._process
        assert process is not None
        for child in psutil.Process(process.pid).children(recursive=True):
            kind = {"VLLM::EngineCore": "core", "VLLM::Worker": "worker"}.get(child.name())
            if kind is None and "vllm.entrypoints.openai.api_server" in child.cmdline():
                kind = "api"
            if kind is not None:
                found[f"{kind} rss"] = f"{child.memory_info().rss / 2**20:.0f}"
            if kind == "worker":
                found["used"], found["free"] = (watched / str(child.pid)).read_text().split()
        return found


async def measure(base: Path, adapters: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts the engines; they take turns."""
    hook = folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(WATCH)
    directories = sorted(path for path in adapters.iterdir() if path.name[-1].isdigit())
    started, watched, end = [], {}, time.monotonic() + arguments.minutes * 60
    async with AsyncExitStack() as stack:
        for text in arguments.engine or ["engine"]:
            name, *words = shlex.split(text)
            watched[name] = folder / f"watched-{name}"
            watched[name].mkdir()
            environment = dict(word.split("=", 1) for word in words if not word.startswith("-"))
            python_path = environment.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(hook), python_path)))
            environment["SWAP_PHASES"] = str(watched[name])
            config = EngineConfig(
                base=base,
                max_model_len=LENGTH,
                max_loras=2,
                max_loaded=2,
                threads=1,
                start_timeout_s=900,
                env=environment,
                extra_args=[word for word in words if word.startswith("-")],
            )
            note(f"starting {text}")
            engine = await stack.enter_async_context(Engine(config, log_path=folder / f"{name}.log"))
            await engine.load_adapter("live", directories[0])
            started.append(Swapped(name, engine, directories, arguments.quiet))
        for number in range(arguments.rounds):
            if number and time.monotonic() > end:
                break
            for swapped in started:
                await swapped.round(number, watched[swapped.name])
                note(f"{number + 1} of {arguments.rounds}, {swapped.name}: {swapped.memory[-1]}")
    return {
        swapped.name: {
            "parts": {name: part.row() for name, part in swapped.parts.items()},
            "memory": swapped.memory,
        }
        for swapped in started
    }


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Builds a base and adapters, and measures."""
    with tempfile.TemporaryDirectory(prefix="mixfuse-bench-") as name:
        folder = Path(name)
        base, adapters = folder / "base", folder / "adapters"
        subprocess.run([sys.executable, "-m", "mixfuse", "base", "build", str(base), "--tiny"], cwd=ROOT, check=True)
        note("making adapters")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(make_adapters, base, adapters, 4, 8).result()
        return asyncio.run(measure(base, adapters, folder, arguments))


def show(figures: dict[str, Any]) -> None:
    """Prints two tables for each engine."""
    for name, found in figures.items():
        rows = [
            [part, *("-" if value is None else f"{value:.{0 if value >= 100 else 2}f}" for value in row.values())]
            for part, row in found["parts"].items()
        ]
        table(f"{name}: requests", ["beside", "s", "requests", "p50 ms", "p95 ms", "p95 / quiet"], rows)
        memory = found["memory"]
        turns = [[number + 1, *row.values()] for number, row in enumerate(memory)]
        table(f"{name}: memory after each turn, MiB", ["turn", *memory[0]], turns)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9, help="no further turn after so long (default 9)")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each engine (default 8)")
    parser.add_argument(
        "--quiet", type=float, default=2.5, help="seconds with requests alone, twice a turn (default 2.5)"
    )
    parser.add_argument("--engine", action="append", help="a name, vLLM's arguments, and environment variables")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    options = parser.parse_args()
    result = main(options)
    show(result)
    if options.json:
        print(json.dumps(result))
