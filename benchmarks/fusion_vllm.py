"""What judging costs on the real engine: best_of's latency over its slowest member's, and the judge's share of it.

    nice python benchmarks/fusion_vllm.py [--base DIR] [--judge ADAPTER] [--requests 10] [--json] [--smoke]

Runs `mixfuse serve` (vLLM and the gateway) with the embedded base, members and judge all on the one engine, and asks
alternately for best_of and for the same three members without fusion, all at once, as a client could. "Slowest member"
is when the last answer that best_of used was there, from its trace; the judge's share is the time from then to the
last verdict. `--smoke` takes a random two-layer base.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop
from aiohttp import ClientSession
from harness import ROOT, BenchmarkError, note, open_session, process, spread, table

MEMBERS = ("calm", "lively", "wild")
QUESTIONS = (
    "What is the capital of France, and why did it become the capital?",
    "Explain in three sentences how a bicycle stays upright.",
    "Which is heavier, a kilogram of iron or a kilogram of feathers? Explain.",
    "Write a short note to a colleague who is ill.",
    "List the planets of the solar system and one fact about each.",
    "How do I find out which process listens on a port on Linux?",
    "A train leaves at 9:40 and arrives at 13:05. How long does it take?",
    "What is the difference between weather and climate?",
    "Suggest a name for a bakery and say why it fits.",
    "Translate into French: I would like a room with a view of the sea.",
)


@contextmanager
def serving(base: Path, judge: Path | None, folder: Path, max_tokens: int) -> Iterator[str]:
    """Runs `mixfuse serve`; yields the gateway's base URL.

    Raises:
        BenchmarkError: It did not start.
    """
    config = {
        "engine": {"base": str(base), "dtype": "float32", "max_model_len": 1024, "max_lora_rank": 16, "max_loras": 2},
        "gateway": {"port": 0},
        "roles": {"judge": str(judge) if judge else None},
        "fusion": {
            "members": [
                {"name": name, "role": "base", "temperature": 0.6 + 0.2 * step, "max_tokens": max_tokens}
                for step, name in enumerate(MEMBERS)
            ],
            "judge": {"role": "judge"},
            "modes": {"min_responses": 3},
            "trace_db": str(folder / "traces.sqlite3"),
        },
        "logs": str(folder),
    }
    path = folder / "serve.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "mixfuse", "serve", str(path)]
    with process(command, folder / "serve.log", wait_s=600) as (url, _):  # the engine loads and compiles
        yield url


async def ask(session: ClientSession, url: str, model: str, question: str) -> tuple[dict[str, Any], float]:
    """(completion, seconds).

    Raises:
        BenchmarkError: It was refused or failed.
    """
    began = time.perf_counter()
    body = {"model": model, "messages": [{"role": "user", "content": question}]}
    async with session.post(f"{url}/chat/completions", json=body) as response:
        if response.status != 200:
            raise BenchmarkError(f"{model}: HTTP {response.status}: {(await response.text())[:300]}")
        return await response.json(), time.perf_counter() - began


async def measure(url: str, requests: int) -> dict[str, Any]:
    """Asks, alternately with and without fusion; prints the table; returns all figures."""
    fused: list[float] = []
    alone: list[float] = []
    slowest: list[float] = []
    judging: list[float] = []
    sums: list[float] = []
    reasons: list[str] = []
    async with open_session() as session:
        for model in ("fusion/best-of", *MEMBERS):  # the engine compiles and caches on its first requests
            await ask(session, url, model, "Say hello.")
        for number in range(requests):
            question = QUESTIONS[number % len(QUESTIONS)]

            async def members(question: str = question) -> None:
                began = time.perf_counter()
                await asyncio.gather(*(ask(session, url, member, question) for member in MEMBERS))
                alone.append(time.perf_counter() - began)

            async def best_of(question: str = question) -> None:
                answer, took = await ask(session, url, "fusion/best-of", question)
                trace_url = f"{url}/traces/{answer['fusion']['trace_id']}"
                async with session.get(trace_url) as response:
                    trace = await response.json()
                ends = {
                    stage: [
                        call["started_ms"] + call["duration_ms"] for call in trace["calls"] if call["stage"] == stage
                    ]
                    for stage in ("answer", "verdict")
                }
                reasons.append(trace["reason"])
                if not ends["verdict"]:  # the members agreed
                    return
                fused.append(took)
                slowest.append(max(ends["answer"]) / 1000)
                judging.append((max(ends["verdict"]) - max(ends["answer"])) / 1000)
                sums.append(sum(call["duration_ms"] for call in trace["calls"] if call["stage"] == "verdict") / 1000)

            for step in (members, best_of) if number % 2 else (best_of, members):
                await step()
            note(f"{number + 1} of {requests}")
    if not fused:
        raise BenchmarkError(f"the judge was never asked: {reasons}")
    over = [total / member for total, member in zip(fused, slowest, strict=True)]
    share = [judged / total for judged, total in zip(judging, fused, strict=True)]
    rows = [
        ["best_of, s", spread(fused)],
        ["its slowest member, s", spread(slowest)],
        ["best_of / its slowest member", spread(over)],
        ["of it judging (six verdicts at once), s", spread(judging)],
        ["judging's share of best_of", spread(share)],
        ["judging / members' answers", spread([one / other for one, other in zip(judging, slowest, strict=True)])],
        [
            "best_of / the same three members asked without fusion",
            f"{statistics.median(fused) / statistics.median(alone):.2f}",
        ],
    ]
    table(f"best_of on vLLM: {len(fused)} of {requests} requests went to the judge", ["", "median [min..max]"], rows)
    return {
        "best_of_s": fused,
        "members_alone_s": alone,
        "slowest_member_s": slowest,
        "judging_s": judging,
        "verdict_call_s": sums,
        "reasons": reasons,
        "over_slowest": statistics.median(over),
        "judging_share": statistics.median(share),
    }


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Builds a base where none is given, serves, measures."""
    with tempfile.TemporaryDirectory(prefix="mixfuse-bench-") as name:
        folder = Path(name)
        base: Path | None = arguments.base
        if base is None:
            base = folder / "base"
            command = [sys.executable, "-m", "mixfuse", "base", "build", str(base)]
            subprocess.run([*command, *(["--tiny"] if arguments.smoke else [])], cwd=ROOT, check=True)
        with serving(base, arguments.judge, folder, 8 if arguments.smoke else arguments.max_tokens) as url:
            return uvloop.run(measure(url, 2 if arguments.smoke else arguments.requests))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, help="the base model (default: the embedded one, built anew)")
    parser.add_argument("--judge", type=Path, metavar="ADAPTER", help="a judge's adapter directory (default: the base)")
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=64, help="of a member's answer (default 64)")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--smoke", action="store_true", help="a random two-layer base: to see that it runs")
    options = parser.parse_args()
    try:
        report = main(options)
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps(report))
