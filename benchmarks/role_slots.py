"""More adapters than places in the engine: how long a request waits for its role's adapter to be loaded.

    python benchmarks/role_slots.py [--base DIR] [--rounds 20] [--json]

Three roles on one real vLLM are asked in turn for one token. `all loaded` has a place for each. `two places` is the
worst case of "least recently used": the next role has always just been evicted, so every request loads its adapter
first. `two places, asked twice` asks each role twice before the next, so half of the requests load. `pinned` measures a
role that stays loaded while two others take turns in the second place. Rounds are interleaved; ratios are to `all
loaded` of the same round. The loads, the evictions, and the share of time that hashes the adapter's files again are
printed too.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from harness import note, ratios, spread, table
from hot_swap import make_adapters, revision

from mixfuse.contracts.adapter import fingerprint
from mixfuse.serve.admission import Admission
from mixfuse.serve.copies import AdapterCopies
from mixfuse.serve.engine import EngineConfig
from mixfuse.serve.engine_group import EngineGroup
from mixfuse.serve.roles import RoleTable
from mixfuse.serve.swap import Swapper

ROLES = ("domain", "judge", "synthesizer")
PROMPT = [1, *range(5, 20)]
CASES = {
    "all loaded": (None, ROLES * 2),
    "two places": (2, ROLES * 2),
    "two places, asked twice": (2, [role for role in ROLES for _ in range(2)]),
    "pinned": (2, ["domain", "judge", "domain", "synthesizer"]),
}


async def measure(base: Path, adapters: Path, rounds: int) -> dict[str, Any]:
    """Asks in every case, round by round; returns seconds a request, loads and evictions by case."""
    engine = EngineGroup(EngineConfig(base=base, max_lora_rank=8, max_loras=4), logs=adapters / "logs")
    note("starting vLLM")
    await engine.start()
    hashing: list[float] = []

    class TimedCopies(AdapterCopies):
        def check(self, path: Path, hashes: Mapping[str, str]) -> None:
            began = time.perf_counter()
            try:
                super().check(path, hashes)
            finally:
                hashing.append(time.perf_counter() - began)

    try:
        counts: dict[str, dict[str, Any]] = {}
        seconds: dict[str, list[float]] = {name: [] for name in CASES}
        for number in range(rounds + 1):
            for name, (places, order) in CASES.items():
                # A table of its own for each, one after the other: their adapters have the same names in the engine.
                admission = Admission(fingerprint(base), max_rank=8, copies=TimedCopies())
                roles = RoleTable(engine, list(ROLES), admission, max_loaded=places)
                swapper = Swapper(roles)
                for role in ROLES:
                    await swapper.swap(role, adapters / f"{role}-0")
                if name == "pinned":
                    await roles.pin("domain", True)
                before, hashed = (roles.counts.loads, roles.counts.evictions), len(hashing)
                spent = []
                for role in order:
                    began = time.perf_counter()
                    async with roles.lease(role) as leased:
                        await engine.prompt_logprobs(leased.model, PROMPT)
                    if name != "pinned" or role == "domain":
                        spent.append(time.perf_counter() - began)
                if number:  # the first round warms up
                    seconds[name].append(statistics.fmean(spent))
                    counts[name] = {
                        "requests": len(order),
                        "loads": roles.counts.loads - before[0],
                        "evictions": roles.counts.evictions - before[1],
                        "hashing_share": sum(hashing[hashed:]) / sum(spent),
                    }
                await swapper.close()
                for revision_ in roles.serving().values():
                    if revision_.loaded and revision_.revision:
                        await engine.unload_adapter(revision_.model)
        return {
            name: {**counts[name], "ms": [1000 * s for s in spent], "ratio": ratios(spent, seconds["all loaded"])}
            for name, spent in seconds.items()
        }
    finally:
        await engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", type=Path, help="default: a tiny random Mixtral")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mixfuse-bench-") as folder:
        base = arguments.base or Path(folder) / "base"
        if arguments.base is None:
            from mixfuse.train.model.embedded_base import build

            build(base, tiny=True)
        making = get_context("spawn").Process(target=make_adapters, args=(base, Path(folder), 2))
        making.start()
        making.join()
        cases = asyncio.run(measure(base, Path(folder), arguments.rounds))
        size = sum(file.stat().st_size for file in (Path(folder) / "domain-0").rglob("*")) / 1e6
        note(f"adapter {revision(Path(folder) / 'domain-0')}: {size:.1f} MB")
    table(
        "A request of one token, milliseconds; medians [least..greatest] over rounds",
        ("case", "ms", "/ all loaded", "loads of requests", "evictions", "of it hashing"),
        [
            (
                name,
                spread(case["ms"], 1),
                spread(case["ratio"]),
                f"{case['loads']} of {case['requests']}",
                case["evictions"],
                f"{case['hashing_share']:.2f}",
            )
            for name, case in cases.items()
        ],
    )
    if arguments.json:
        print(json.dumps(cases))


if __name__ == "__main__":
    main()
