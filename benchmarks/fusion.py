"""How much the gateway adds to the calls it makes, and what it does when a member is slow, hangs or fails.

    python benchmarks/fusion.py [--json] [--peers] [--target 'NAME=URL;model=M'] [--only latency,hang] [--smoke]

Starts its own mock upstream, the floor (`floor.py`: the same calls behind one HTTP hop, nothing else) and the real
gateway, each a process of its own, and measures them in one run, interleaved in an order that rotates. Times are given
as ratios to `direct`, the same calls made by the benchmark itself, median [min..max] over rounds; `merge` is three
members and one synthesis, `best_of` three members and six verdicts. The last table sets each goal beside its figure.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import uvloop
from harness import (
    BenchmarkError,
    Control,
    Target,
    floor,
    gateway,
    load,
    mock_upstream,
    note,
    open_session,
    ratios,
    rotated,
    rss_mib,
    spread,
    table,
)

GRACE_S = 0.05


@dataclass
class Sizes:
    """How much is measured.

    Attributes:
        rounds: Of everything that is interleaved.
        block: Requests of one target in a row, at concurrency 1.
        burst: Requests of one target at concurrency 32 and 0 ms.
        slow_burst: The same with 200 ms members.
        once: Requests of one target a round where each takes some tenths of a second.
        streams: Streams at once.
        many: Requests over which memory is watched.
        member_s: How long "200 ms" members take.
        patience_s: How long a client waits where a member hangs.
    """

    rounds: int = 15
    block: int = 20
    burst: int = 192
    slow_burst: int = 128
    once: int = 2
    streams: int = 500
    many: int = 20_000
    member_s: float = 0.2
    patience_s: float = 8.0


SMOKE = Sizes(rounds=2, block=3, burst=32, slow_burst=32, once=1, streams=20, many=60, member_s=0.05, patience_s=0.5)


@dataclass
class Bench:
    """What the phases share.

    Attributes:
        control: Of the mock.
        targets: Everything that is measured; `direct` first of each shape.
        quorum: The gateway that goes on with two answers and a grace, one target for each mode.
        workers: The gateway with two worker processes.
        running: The process of the gateway whose memory is watched.
        sizes: How much is measured.
        figures: Phase → target → what was measured.
        goals: Goal → (figure, met).
        silent: Targets that did not answer at all.
    """

    control: Control
    targets: list[Target]
    quorum: list[Target]
    workers: Target
    running: psutil.Process
    sizes: Sizes
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    goals: list[tuple[str, str, str]] = field(default_factory=list)

    def goal(self, what: str, wanted: str, value: str, met: bool) -> None:
        """Notes a goal with its figure."""
        self.goals.append((what, wanted, f"{value} — {'met' if met else 'MISSED'}"))

    def named(self, name: str) -> Target:
        """The target of that name."""
        return next(target for target in (*self.targets, *self.quorum) if target.name == name)

    def base(self, values: dict[str, list[float]], target: Target) -> list[float]:
        """What `direct` measured for the calls that `target` makes."""
        return values[f"direct {target.shape}"]


async def latency(bench: Bench) -> None:
    """One request at a time, models that take no time: what a fused request costs beside its calls."""
    await bench.control.set()
    p50: dict[str, list[float]] = {target.name: [] for target in bench.targets}
    p95: dict[str, list[float]] = {target.name: [] for target in bench.targets}
    cpu: dict[str, list[float]] = {target.name: [] for target in bench.targets if target.process}
    for turn in range(bench.sizes.rounds):
        for target in rotated(bench.targets, turn):
            used = target.cpu_s()
            times = sorted([(await target.ask()).total_s * 1000 for _ in range(bench.sizes.block)])
            if target.process:
                cpu[target.name].append((target.cpu_s() - used) * 1000 / bench.sizes.block)
            p50[target.name].append(statistics.median(times))
            p95[target.name].append(times[int(0.95 * (len(times) - 1))])
    rows, added = [], {}
    for target in bench.targets:
        own, base = p50[target.name], bench.base(p50, target)
        added[target.name] = [mine - under for mine, under in zip(own, base, strict=True)]
        rows.append(
            [
                target.name,
                spread(own),
                spread(ratios(own, base)),
                spread(added[target.name]),
                spread(ratios(p95[target.name], bench.base(p95, target))),
                f"{statistics.mean(cpu[target.name]):.2f}" if target.process else "",
            ]
        )
    head = ["target", "p50, ms", "p50 / direct", "added p50, ms", "p95 / direct", "CPU a request, ms"]
    table("Latency: concurrency 1, 0 ms models", head, rows)
    bench.figures["latency"] = {"p50_ms": p50, "p95_ms": p95, "added_ms": added, "cpu_ms": cpu}
    for shape in ("merge", "best_of"):
        ours, floors = (statistics.median(added[f"{who} {shape}"]) for who in ("mixfuse", "floor"))
        value = f"{ours:.2f} ms / {floors:.2f} ms = {ours / floors:.2f}"
        bench.goal(f"added p50, {shape}, over the floor's", "≤ 3", value, ours <= 3 * floors)
    # What a request takes beside the nine calls, where the six verdicts are one call.
    ours, floors = (statistics.median(added[name]) for name in ("mixfuse best_of, batching", "floor best_of"))
    value = f"{ours:.2f} ms / {floors:.2f} ms = {ours / floors:.2f}"
    bench.goal("added p50, best_of with batching, over the floor's", "≤ 1", value, ours <= floors)


async def throughput(bench: Bench) -> None:
    """32 requests at a time: models that take no time, then members of 200 ms and a judge of 5 %."""
    member_s = bench.sizes.member_s
    slow = {"*": member_s, "judge": member_s / 20, "synth": member_s / 20}
    for name, latencies, count in (("0 ms", {}, bench.sizes.burst), ("200 ms", slow, bench.sizes.slow_burst)):
        await bench.control.set(latency=latencies)
        rates: dict[str, list[float]] = {target.name: [] for target in bench.targets}
        errors: dict[str, int] = {target.name: 0 for target in bench.targets}
        for turn in range(max(2, bench.sizes.rounds // 3)):
            for target in rotated(bench.targets, turn):
                rate, failed = await _burst(target, count, 32)
                rates[target.name].append(rate)
                errors[target.name] += failed
        rows = [
            [
                target.name,
                spread(rates[target.name], 0),
                spread(ratios(rates[target.name], bench.base(rates, target))),
                errors[target.name],
            ]
            for target in bench.targets
        ]
        head = ["target", "fused requests/s", "/ direct", "errors"]
        table(f"Throughput: concurrency 32, {name} members", head, rows)
        bench.figures[f"throughput {name}"] = {"per_s": rates, "errors": errors}
        for shape in ("merge", "best_of"):
            ours = ratios(rates[f"mixfuse {shape}"], rates[f"floor {shape}"])
            if name == "200 ms":
                met = statistics.median(ours) >= 0.95
                bench.goal(f"requests/s at 32, 200 ms, {shape}, over the floor's", "≥ 0.95", spread(ours), met)
        peers = [target.name for target in bench.targets if target.name.startswith("optillm")]
        if name == "0 ms" and peers:
            best = max(statistics.median(rates[peer]) for peer in peers)
            ours_0 = min(statistics.median(rates[f"mixfuse {shape}"]) for shape in ("merge", "best_of"))
            value = f"{ours_0:.0f} / {best:.0f} = {ours_0 / best:.1f}"
            bench.goal("requests/s at 32, 0 ms, over the best Python peer's", "> 1", value, ours_0 > best)


async def scaling(bench: Bench) -> None:
    """best_of at concurrency 32 and 0 ms from one worker process and from two, in turn; the mock needs CPU, too."""
    await bench.control.set()
    targets = [bench.named("mixfuse best_of"), bench.workers]
    rates: dict[str, list[float]] = {target.name: [] for target in targets}
    cpu: dict[str, list[float]] = {target.name: [] for target in targets}
    for turn in range(bench.sizes.rounds):
        for target in rotated(targets, turn):
            used = target.cpu_s()
            rate, failed = await _burst(target, bench.sizes.burst, 32)
            rates[target.name].append(rate)
            cpu[target.name].append((target.cpu_s() - used) * 1000 / max(1, bench.sizes.burst - failed))
    one, two = (target.name for target in targets)
    grown = ratios(rates[two], rates[one])
    rows = [
        [name, spread(rates[name], 0), spread(ratios(rates[name], rates[one])), spread(cpu[name])]
        for name in (one, two)
    ]
    head = ["target", "fused requests/s", "/ one worker", "CPU a request, ms"]
    table("Workers: best_of, concurrency 32, 0 ms members", head, rows)
    bench.figures["scaling"] = {"per_s": rates, "cpu_ms": cpu}
    met = statistics.median(grown) >= 1.7
    bench.goal("requests/s at 0 ms, two workers over one, on two free cores", "≥ 1.7", spread(grown), met)


async def _burst(target: Target, count: int, concurrency: int) -> tuple[float, int]:
    """(answered requests a second, failed requests)."""
    left, failed = iter(range(count)), 0

    async def worker() -> None:
        nonlocal failed
        for _ in left:
            try:
                await target.ask()
            except BenchmarkError as error:
                failed += 1
                note(f"{target.name}: {error}")

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return (count - failed) / (time.perf_counter() - began), failed


async def hang(bench: Bench) -> None:
    """One of three members never answers: the answer comes at quorum + grace, and the hung call is aborted."""
    member_s = bench.sizes.member_s
    rows, seen = [], {}
    ours_too = [(target, max(2, bench.sizes.rounds // 3)) for target in bench.quorum]
    for target, times in [*ours_too, *((target, 1) for target in _others(bench))]:
        results, took, aborted = set(), [], 0
        for _ in range(times):
            await bench.control.set(latency={"*": member_s, "judge": 0, "synth": 0}, hang=["m1"])
            result, seconds = await _patiently(target, bench.sizes.patience_s)
            results.add(result)
            took.append(seconds)
            await asyncio.sleep(0.1)
            aborted += (await bench.control.stats()).get("aborted", {}).get("m1", 0)
        result = "; ".join(sorted(results))
        seen[target.name] = {"result": result, "s": took, "aborted": aborted, "asked": times}
        over = spread([seconds / (member_s + GRACE_S) for seconds in took])
        rows.append([target.name, result, spread(took, 3), over, f"{aborted} of {times}"])
    head = ["target", "result", "s", "/ (member + grace)", "hung calls aborted"]
    table(f"One of three members hangs (the others {member_s:g} s, quorum 2, grace {GRACE_S:g} s)", head, rows)
    bench.figures["hang"] = seen
    for target in bench.quorum:
        ours = seen[target.name]
        over = statistics.median(ours["s"]) / (member_s + GRACE_S)
        met = ours["result"] == "answered" and ours["aborted"] == ours["asked"] and over <= 1.1
        value = f"{over:.2f} of it, {ours['aborted']} of {ours['asked']} aborted"
        bench.goal(f"a member hangs, {target.shape}: answer at quorum + grace, call aborted", "≈ 1, all", value, met)


async def failure(bench: Bench) -> None:
    """One of three members fails at once with 500: nothing is added to the others' own time."""
    member_s = bench.sizes.member_s
    bad: dict[str, list[float]] = {}
    good: dict[str, list[float]] = {}
    results: dict[str, str] = {}
    calls: dict[str, int] = {}
    targets = [*bench.quorum, *_others(bench)]
    for turn in range(max(2, bench.sizes.rounds // 3)):
        for target in rotated(targets, turn):
            for times, fail in ((good, {}), (bad, {"m1": 500})):
                await bench.control.set(latency={"*": member_s, "judge": 0, "synth": 0}, fail=fail)
                results[target.name], took = await _patiently(target, bench.sizes.patience_s)
                times.setdefault(target.name, []).append(took)
            calls[target.name] = (await bench.control.stats())["calls"].get("m1", 0)
    rows = [
        [target.name, results[target.name], spread(ratios(bad[target.name], good[target.name])), calls[target.name]]
        for target in targets
    ]
    table("One of three members answers 500", ["target", "result", "total / all well", "calls to it"], rows)
    bench.figures["failure"] = {"well_s": good, "failing_s": bad, "result": results}
    for target in bench.quorum:
        value = ratios(bad[target.name], good[target.name])
        met = statistics.median(value) <= 1.02 and results[target.name] == "answered"
        bench.goal(f"a member fails with 500, {target.shape}: total over all well", "≈ 1", spread(value), met)


async def judging(bench: Bench) -> None:
    """best_of with a judge that takes 5 % of a member: the total over the slowest member."""
    slowest = bench.sizes.member_s
    latencies = {"m0": slowest * 0.9, "m1": slowest, "m2": slowest * 0.95, "judge": slowest / 20}
    targets = [target for target in bench.targets if target.shape == "best_of"]
    over = await _over(bench, targets, slowest, latency=latencies)
    bench.figures["judging"] = over
    rows = [[target.name, spread(over[target.name])] for target in targets]
    table("best_of, judge 5 % of a member", ["target", "total / slowest accepted member"], rows)
    ours = over["mixfuse best_of"]
    bench.goal(
        "best_of's total over the slowest accepted member", "≤ 1.10", spread(ours), statistics.median(ours) <= 1.1
    )


async def straggler(bench: Bench) -> None:
    """Members of 200, 200 and 600 ms, quorum 2, grace 50 ms: the total over the second-slowest."""
    second = bench.sizes.member_s
    bench.figures["straggler"] = {}
    for name, judge_s in (("0 ms", 0.0), ("5 % of a member", second / 20)):
        latencies = {"*": second, "m2": 3 * second, "judge": judge_s, "synth": judge_s}
        targets = [*bench.quorum, *bench.targets]
        over = await _over(bench, targets, second, latency=latencies)
        bench.figures["straggler"][name] = over
        rows = [[target.name, spread(over[target.name])] for target in targets]
        table(
            f"Members of {second:g}, {second:g} and {3 * second:g} s; judge {name}",
            ["target", "total / second-slowest"],
            rows,
        )
        for target in bench.quorum:
            ours = over[target.name]
            met = statistics.median(ours) <= 1.3
            bench.goal(
                f"a straggler, {target.shape}, judge {name}: total over second-slowest", "≤ 1.3", spread(ours), met
            )


async def _over(bench: Bench, targets: list[Target], unit_s: float, **behaviour: Any) -> dict[str, list[float]]:
    """Each target's total, in units of `unit_s`, round by round."""
    await bench.control.set(**behaviour)
    over: dict[str, list[float]] = {target.name: [] for target in targets}
    for turn in range(max(2, bench.sizes.rounds // 3)):
        for target in rotated(targets, turn):
            times = [(await target.ask()).total_s for _ in range(bench.sizes.once)]
            over[target.name].append(statistics.median(times) / unit_s)
    return over


async def streaming(bench: Bench) -> None:
    """20 chunks 10 ms apart from the synthesizer: the first one's time over the floor's, and whether it streams."""
    await bench.control.set(chunks=20, chunk_delay=0.01)
    first: dict[str, list[float]] = {}
    total: dict[str, list[float]] = {}
    pieces: dict[str, int] = {}
    targets = [target for target in bench.targets if not (target.shape == "best_of" and not target.model)]
    rows = []
    for turn in range(bench.sizes.rounds):
        for target in rotated(list(targets), turn):
            try:
                answers = [await target.ask(stream=True) for _ in range(bench.sizes.once * 2)]
            except BenchmarkError as error:
                if target.name.startswith(("direct", "floor", "mixfuse")):
                    raise
                targets.remove(target)  # some peers cannot stream the last call
                rows.append([target.name, str(error)[:80], "", "", ""])
                continue
            first.setdefault(target.name, []).append(statistics.median(answer.first_s for answer in answers) * 1000)
            total.setdefault(target.name, []).append(statistics.median(answer.total_s for answer in answers) * 1000)
            pieces[target.name] = answers[0].pieces
    rows += [
        [
            target.name,
            pieces[target.name] or "not streamed",
            spread(first[target.name]),
            spread(ratios(first[target.name], first["floor merge"])),
            spread(ratios(first[target.name], total[target.name])),
        ]
        for target in targets
    ]
    head = ["target", "chunks", "first text, ms", "/ floor merge", "first / own total"]
    table("Streaming: the synthesizer's 20 chunks, 10 ms apart", head, rows)
    bench.figures["streaming"] = {"first_ms": first, "total_ms": total, "pieces": pieces}
    ours = ratios(first["mixfuse merge"], first["floor merge"])
    bench.goal("merge's first text over the floor's", "≤ 1.2", spread(ours), statistics.median(ours) <= 1.2)
    both = {shape: pieces[f"mixfuse {shape}"] for shape in ("best_of", "merge")}
    bench.goal("best_of and merge stream", "> 1 chunk", str(both), min(both.values()) > 1)


async def crowd(bench: Bench) -> None:
    """500 streams at once, half of each mode: how many fail."""
    await bench.control.set(latency={"*": bench.sizes.member_s}, chunks=20, chunk_delay=0.01)
    targets = [bench.named("mixfuse merge"), bench.named("mixfuse best_of")]
    began = time.perf_counter()
    asked = [targets[number % 2].ask(stream=True) for number in range(bench.sizes.streams)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    errors = [result for result in results if not hasattr(result, "pieces")]
    took = time.perf_counter() - began
    if errors:
        note(f"one of the errors: {errors[0]!r}")
    table(
        "Streams at once", ["streams", "errors", "s until the last ended"], [[len(results), len(errors), f"{took:.1f}"]]
    )
    bench.figures["crowd"] = {"streams": len(results), "errors": len(errors), "s": took}
    bench.goal(f"{len(results)} concurrent streams", "0 errors", f"{len(errors)} errors", not errors)


async def memory(bench: Bench) -> None:
    """Many requests at concurrency 16, a third of them streamed: the gateway's resident memory as they go by."""
    await bench.control.set()
    targets = [bench.named("mixfuse merge"), bench.named("mixfuse best_of")]
    count = bench.sizes.many
    left = iter(range(count))
    samples: list[tuple[int, float]] = []
    failed = 0

    async def worker() -> None:
        nonlocal failed
        for number in left:
            if number % max(1, count // 20) == 0:
                samples.append((number, rss_mib(bench.running)))
                await bench.control.set()  # the mock forgets, so that it does not slow down
            try:
                await targets[number % 2].ask(stream=number % 3 == 0)
            except BenchmarkError as error:
                failed += 1
                note(str(error))

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(16)))
    took = time.perf_counter() - began
    samples.append((count, rss_mib(bench.running)))
    # The first tenth fills caches and pools; a leak goes on.
    settled = samples[2:]
    slope = statistics.linear_regression(*zip(*settled, strict=True)).slope * 1000
    growth = statistics.median(rss for _, rss in settled[-5:]) / statistics.median(rss for _, rss in settled[:5])
    rows = [[number, f"{rss:.1f}"] for number, rss in samples]
    table("Memory of the gateway", ["requests so far", "resident, MiB"], rows)
    bench.figures["memory"] = {"samples": samples, "mib_per_1000": slope, "errors": failed, "s": took}
    value = f"last quarter / second tenth {growth:.3f}, {slope:+.3f} MiB per 1000, {failed} errors"
    bench.goal(f"memory over {count} requests", "flat", value, growth <= 1.05 and not failed)


def _others(bench: Bench) -> list[Target]:
    """Floor and peers: what stands beside the gateway when a member misbehaves."""
    return [target for target in bench.targets if not target.name.startswith(("mixfuse", "direct"))]


async def _patiently(target: Target, patience_s: float) -> tuple[str, float]:
    """(how it ended, seconds)."""
    began = time.perf_counter()
    try:
        await asyncio.wait_for(target.ask(), patience_s)
        told = "answered"
    except TimeoutError:
        told = f"no answer in {patience_s:g} s"
    except BenchmarkError as error:
        told = str(error)[:80]
    return told, time.perf_counter() - began


PHASES: dict[str, Callable[[Bench], Awaitable[None]]] = {
    phase.__name__: phase
    for phase in (latency, throughput, scaling, hang, failure, judging, straggler, streaming, crowd, memory)
}


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the phases and prints their tables; returns all figures."""
    sizes = SMOKE if arguments.smoke else Sizes()
    if arguments.rounds:
        sizes.rounds = arguments.rounds
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mixfuse-bench-")))
        upstream = stack.enter_context(mock_upstream(folder, arguments.mock_port))
        floor_url, floor_running = stack.enter_context(floor(folder, upstream))
        url, running = stack.enter_context(gateway(folder, "all", upstream, min_responses=3))
        patient = {"min_responses": 2, "grace_ms": GRACE_S * 1000}
        batching = {"judge": {"model": "batching-judge"}}
        batch_url, batch_running = stack.enter_context(
            gateway(folder, "batch", upstream, models=batching, min_responses=3)
        )
        quorum_url, _ = stack.enter_context(gateway(folder, "quorum", upstream, **patient))
        two_url, two_running = stack.enter_context(gateway(folder, "two", upstream, workers=2, min_responses=3))
        two = Target("mixfuse best_of, 2 workers", two_url, "fusion/best-of", "best_of", process=two_running)
        targets = [
            Target("direct merge", upstream, "", "merge"),
            Target("direct best_of", upstream, "", "best_of"),
            Target("floor merge", floor_url, "merge", "merge", process=floor_running),
            Target("floor best_of", floor_url, "best_of", "best_of", process=floor_running),
            Target("mixfuse merge", url, "fusion/merge", "merge", process=running),
            Target("mixfuse best_of", url, "fusion/best-of", "best_of", process=running),
            Target("mixfuse best_of, batching", batch_url, "fusion/best-of", "best_of", process=batch_running),
        ]
        specs = list(arguments.target)
        if arguments.peers:
            from peers import peers

            specs += stack.enter_context(peers(arguments.peers, upstream))
        quorum = [
            Target("mixfuse merge, quorum 2", quorum_url, "fusion/merge", "merge"),
            Target("mixfuse best_of, quorum 2", quorum_url, "fusion/best-of", "best_of"),
        ]
        session = open_session()
        targets += [Target.parse(spec) for spec in specs]
        try:
            bench = Bench(Control(session, upstream), targets, quorum, two, running, sizes)
            await _warm_up(bench)
            for name in arguments.only:
                note(f"{name} (load average {load():.1f})")
                await PHASES[name](bench)
        finally:
            for target in (*targets, *quorum, two):
                await target.session.close()
            await session.close()
    table("Goals", ["goal", "wanted", "measured"], bench.goals)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "load": load()}
    goals = [dict(zip(("goal", "wanted", "measured"), goal, strict=True)) for goal in bench.goals]
    return {"machine": machine, "sizes": vars(sizes), "goals": goals, **bench.figures}


async def _warm_up(bench: Bench) -> None:
    """A few requests each, and the calls that each makes; a peer that does not answer is left out and named."""
    rows = []
    for target in [*bench.targets, *bench.quorum, bench.workers]:
        await bench.control.set()
        try:
            await target.ask()
            calls = (await bench.control.stats())["calls"]
            await asyncio.gather(*(target.ask() for _ in range(bench.sizes.block)))
        except BenchmarkError as error:
            if target.name.startswith(("direct", "floor", "mixfuse")):
                raise
            note(f"{target.name} is left out: {error}")
            bench.targets.remove(target)
            continue
        rows.append([target.name, sum(calls.values()), " ".join(f"{name}:{calls[name]}" for name in sorted(calls))])
    table("What one fused request calls", ["target", "calls", "by model"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--target", action="append", default=[], metavar="NAME=URL[;model=M][;shape=S][;h.HEADER=V]")
    parser.add_argument(
        "--peers",
        nargs="?",
        const=Path(tempfile.gettempdir()) / "mixfuse-peers",
        type=Path,
        metavar="DIR",
        help="install other gateways in DIR and measure them too",
    )
    parser.add_argument("--only", type=lambda names: names.split(","), default=list(PHASES), metavar="PHASE,…")
    parser.add_argument("--rounds", type=int, help="of everything that is interleaved (default 15)")
    parser.add_argument("--mock-port", type=int, default=0, help="where peers started by hand expect the upstream")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args()
    if unknown := [name for name in options.only if name not in PHASES]:
        parser.error(f"no phase {unknown[0]!r}; there are {', '.join(PHASES)}")
    try:
        report = uvloop.run(main(options))
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps(report))
