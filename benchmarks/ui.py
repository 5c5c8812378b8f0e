"""The page at `/ui`: what it costs unused, how long its lists take over many traces, and whether requests notice it.

    nice python benchmarks/ui.py [--traces 100000] [--json] [--smoke]

- **Start**: seconds until ready, and resident memory, with the page and without it (`ui: false`), in turns. The page is
  not opened meanwhile.
- **Lists**: the 95th percentile of the time that each list and each filter takes over HTTP.
- **First view**: the bytes of the list and of the sheet with style sheet and scripts, and of one trace.
- **Requests**: the median latency of a `best_of` while ten pages follow the list, as a ratio to the same without them,
  in alternating blocks of one run.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from harness import MEMBERS, BenchmarkError, gateway, mock_upstream, note, rss_mib

from mixfuse.contracts.database import opened
from mixfuse.contracts.trace import Trace
from mixfuse.fusion.store.traces import insert, row_of

WORDS = ("what", "why", "how", "many", "rivers", "lead", "from", "the", "north", "of", "country", "to", "border", "and")
REASONS = ("judged", "judged", "judged", "agreement", "lone_survivor", "judge_failed", "weighed", "synthesis")
FILTERS = {
    "newest": "",
    "mode": "mode=merge",
    "member": "member=m1",
    "member, none": "member=nobody",
    "reason": "reason=judge_failed",
    "reason, none": "reason=nothing",
    "outcome": "outcome=timeout",
    "failed": "failed=1",
    "disagreement": "disagreement=1",
    "judge flipped": "flipped=1",
    "low confidence": "unsure=1",
    "low confidence in merge, none": "unsure=1&mode=merge",
    "feedback": "feedback=1",
    "no feedback": "no_feedback=1",
    "cost": "min_cost=0.0099",
    "latency": "min_s=4.99",
    "since": "since=2026-01-01T00:00",
    "until": "until=2026-01-01T12:00",
    "words": "words=rivers",
    "words, rare": "words=needle",
    "words, none": "words=haystack",
    "all at once": "mode=best_of&member=m0&reason=judged&failed=1&disagreement=1&flipped=1&min_cost=0.009&min_s=4",
}
START = 1767225600.0  # 2026-01-01


def made(count: int) -> Iterator[Trace]:
    """Traces of three members, with answers of some kilobytes, verdicts and some failures; always the same."""
    chance = random.Random(0)
    for number in range(count):
        mode = chance.choice(("best_of", "best_of", "merge", "auto", "debate"))
        asked = " ".join(chance.choices(WORDS, k=30)) + (" needle" if number % 20_000 == 7 else "")
        ok = chance.random() > 0.02
        calls = [
            {
                "stage": "answer", "member": member, "model": member, "candidate": index,
                "text": " ".join(chance.choices(WORDS, k=150)), "cost": chance.random() / 300,
                "usage": {"prompt_tokens": 50, "completion_tokens": 200},
                "duration_ms": chance.random() * 5000, "outcome": "ok" if ok or index else "timeout",
            }
            for index, member in enumerate(MEMBERS)
        ]  # fmt: skip
        score = chance.random()
        verdict = {"first": 0, "second": 1, "winner": "tie", "score": score, "consistent": chance.random() > 0.1}
        confidence = chance.random()
        weighing = {
            "target": 0.9, "confidence": confidence, "stopped": "all_asked", "asked": list(MEMBERS),
            "classes": [{"candidates": [0, 1], "score": 1.0, "probability": confidence}],
        }  # fmt: skip
        yield Trace.model_validate(
            {
                "id": f"trace-{number:08}", "created_at": START + number, "model": f"fusion/{mode}", "mode": mode,
                "messages": [{"role": "user", "content": asked}], "candidates": list(MEMBERS), "calls": calls,
                "verdicts": [verdict], "winner": 0, "reason": chance.choice(REASONS),
                "answer": calls[0]["text"], "outcome": "ok" if ok else "timeout",
                "duration_ms": chance.random() * 5000, "weighing": weighing if mode == "auto" else None,
                "feedback": [{"score": 1.0}] if number % 500 == 0 else [],
            }
        )  # fmt: skip


def fill(path: Path, count: int) -> None:
    """Writes traces and their facts as the gateway does."""
    with opened(path) as database:
        batch: list[Trace] = []
        for trace in made(count):
            batch.append(trace)
            if len(batch) == 1000 or int(trace.id[-8:]) == count - 1:
                database.run_now(partial(insert, rows=[row_of(one, one.model_dump_json()) for one in batch]))
                batch = []


def start(folder: Path, upstream: str, rounds: int) -> dict[str, Any]:
    """What the unused page costs at start."""
    took: dict[bool, list[float]] = {False: [], True: []}
    memory: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(rounds):
        for with_page in (False, True):
            began = time.monotonic()
            name = f"start-{turn}-{with_page}"
            with gateway(folder, name, upstream, config={"ui": with_page}) as (_, process):
                took[with_page].append(time.monotonic() - began)
                memory[with_page].append(rss_mib(process))
    seconds = {with_page: statistics.median(times) for with_page, times in took.items()}
    mib = {with_page: statistics.median(sizes) for with_page, sizes in memory.items()}
    return {
        "s more": round(seconds[True] - seconds[False], 3),
        "s ratio": round(seconds[True] / seconds[False], 3),
        "MiB more": round(mib[True] - mib[False], 1),
    }


def p95(times: list[float]) -> float:
    """The 95th percentile, in milliseconds."""
    return round(1000 * sorted(times)[min(len(times) - 1, round(0.95 * len(times)))], 1)


def lists(client: httpx.Client, rounds: int) -> dict[str, float]:
    """The p95 of each list, in milliseconds; rounds go through all of them in turn."""
    addresses = {name: f"/ui/traces?{query}" for name, query in FILTERS.items()}
    page = client.get("/ui/traces").text
    with suppress(IndexError):
        addresses["second page"] = page.split('id="older" rel="next" href="')[1].split('"')[0].replace("&amp;", "&")
        addresses["second page"] = f"/ui/traces{addresses['second page']}"
    addresses["sheet"] = "/ui/sheet"
    addresses["sheet, no feedback"] = "/ui/sheet?no_feedback=1&disagreement=1"
    addresses["spending"] = "/ui/spend?since=2026-01-01"
    addresses["one trace"] = "/ui/traces/trace-00000007"
    times: dict[str, list[float]] = {name: [] for name in addresses}
    for _ in range(rounds):
        for name, address in addresses.items():
            began = time.monotonic()
            answer = client.get(address)
            times[name].append(time.monotonic() - began)
            if answer.status_code != 200:
                raise BenchmarkError(f"{address}: HTTP {answer.status_code}")
    return {name: p95(found) for name, found in times.items()}


def sizes(client: httpx.Client) -> dict[str, int]:
    """Bytes over the wire of the first view, of the list and of the sheet, and of one trace."""

    def whole(address: str) -> int:
        page = client.get(address)
        assets = [part.split('"')[0] for part in page.text.split('"/ui/assets/')[1:]]
        return len(page.content) + sum(len(client.get(f"/ui/assets/{name}").content) for name in assets)

    return {
        "list, styles, script": whole("/ui/traces"),
        "sheet, styles, scripts": whole("/ui/sheet"),
        "one trace": len(client.get("/ui/traces/trace-00000007").content),
    }


async def requests(url: str, blocks: int, each: int) -> dict[str, float]:
    """The median latency of a request with ten pages open, and without, in alternating blocks."""
    body = {"model": "fusion/best-of", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    times: dict[bool, list[float]] = {False: [], True: []}

    async def follow(client: httpx.AsyncClient, delay: float) -> None:
        await asyncio.sleep(delay)
        while True:  # as `data-refresh` of the list does
            (await client.get("/ui/traces")).raise_for_status()
            await asyncio.sleep(5)

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        (await client.get("/ui/traces")).raise_for_status()
        for block in range(2 * blocks):
            watched = block % 2 == 1
            pages = [asyncio.create_task(follow(client, 0.5 * page)) for page in range(10)] if watched else []
            for _ in range(each):
                began = time.monotonic()
                (await client.post("/v1/chat/completions", json=body)).raise_for_status()
                times[watched].append(time.monotonic() - began)
            for page in pages:
                page.cancel()
            await asyncio.gather(*pages, return_exceptions=True)
    medians = {watched: statistics.median(found) for watched, found in times.items()}
    halves = [statistics.median(times[False][place::2]) for place in (0, 1)]
    return {
        "p50 with ten pages / without": round(medians[True] / medians[False], 3),
        "noise: every other request / the rest, without": round(halves[0] / halves[1], 3),
    }


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs everything; returns the figures."""
    report: dict[str, Any] = {"traces": arguments.traces}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with mock_upstream(folder) as upstream:
            note("start")
            report["start"] = start(folder, upstream, 1 if arguments.smoke else 7)
            note("writing traces")
            fill(folder / "full.sqlite3", arguments.traces)
            with gateway(folder, "full", upstream, config={"ui": True}) as (api, _):
                url = api.removesuffix("/v1")
                with httpx.Client(base_url=url, timeout=60) as client:
                    note("lists")
                    report["p95 ms"] = lists(client, 2 if arguments.smoke else 40)
                    report["bytes"] = sizes(client)
                note("requests")
                report["requests"] = asyncio.run(
                    requests(url, 1 if arguments.smoke else 6, 5 if arguments.smoke else 300)
                )
    report["goals"] = {
        "start at most 0.3 s more": report["start"]["s more"] <= 0.3,
        "start at most 30 MB more": report["start"]["MiB more"] <= 30,
        "every list within 300 ms": max(report["p95 ms"].values()) <= 300,
        "first view at most 100 KB": max(
            report["bytes"][name] for name in ("list, styles, script", "sheet, styles, scripts")
        )
        <= 100_000,
    }
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=100_000, help="traces in the database (default: 100000)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--smoke", action="store_true", help="a small run that only shows that it works")
    chosen = parser.parse_args()
    if chosen.smoke:
        chosen.traces = min(chosen.traces, 500)
    found = main(chosen)
    print(json.dumps(found) if chosen.json else json.dumps(found, indent=2))
    sys.exit(0 if chosen.smoke or all(found["goals"].values()) else 1)
