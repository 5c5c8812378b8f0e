"""`mixfuse data prepare`: rows a second with one and two processes, and memory by the number of rows.

    python benchmarks/data_prepare.py [--rows 10000 100000] [--pairs-of-runs 5] [--speed-rows 20000]

Each row is a short made-up chat, each run a process of its own with an empty cache. Memory is the anonymous memory of
the process and its children at its highest: the pages of mapped files are the kernel's cache. Speed is measured in
pairs of runs, one process and then two, from the first row to the last, with the start of the processes. Printed is the
ratio with a 95 % interval (bootstrap over the pairs), and what every process of a run spends again: the digest of the
files, by which it finds the entry, as a share of tokenising them once.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from anonymous_memory import AnonymousMemory

WORDS = ["river", "stone", "apple", "cloud", "tiger", "lamp", "green", "winter", "seven", "bridge", "paper", "music"]


def main() -> None:
    """Runs the benchmark, or with `--probe` one run of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--pairs-of-runs", type=int, default=5)
    parser.add_argument("--speed-rows", type=int, default=20_000)
    parser.add_argument("--probe", nargs=3, metavar=("FOLDER", "DATA", "PROCESSES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        _probe(Path(arguments.probe[0]), Path(arguments.probe[1]), int(arguments.probe[2]))
        return
    from mixfuse.train.model.embedded_base import build

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder / "base", tiny=True)
        for rows in arguments.rows:
            run = _run(folder, _write(folder, rows), 1)
            print(
                f"{rows} rows, 1 process: {run['peak'] / 2**20:.0f} MiB above {run['before'] / 2**20:.0f} MiB, "
                f"{run['rows'] / run['seconds']:.0f} rows/s, {run['bytes'] / rows:.0f} bytes a row on disk",
                flush=True,
            )
        data = _write(folder, arguments.speed_rows)
        pairs = [tuple(_run(folder, data, count) for count in (1, 2)) for _ in range(arguments.pairs_of_runs)]
        ratios = [one["seconds"] / two["seconds"] for one, two in pairs]
        if ratios:
            low, high = _interval(ratios)
            print(
                f"{arguments.speed_rows} rows: two processes make {statistics.mean(ratios):.2f} "
                f"[{low:.2f}, {high:.2f}] times the rows/s of one ({len(ratios)} pairs of runs)"
            )
            for count, runs in enumerate(zip(*pairs, strict=True), 1):
                speeds = [run["rows"] / run["seconds"] for run in runs]
                print(
                    f"{count} processes: {statistics.mean(speeds):.0f} rows/s ({min(speeds):.0f} to {max(speeds):.0f})"
                )
            shares = [one["digest"] / one["seconds"] for one, _ in pairs]
            low, high = _interval(shares)
            print(f"the digest takes {statistics.mean(shares):.5f} [{low:.5f}, {high:.5f}] of the time of one process")


def _write(folder: Path, rows: int) -> Path:
    path = folder / f"chats-{rows}.jsonl"
    draw = random.Random(0)
    with path.open("w") as stream:
        for number in range(rows):
            said = [" ".join(draw.choices(WORDS, k=count)) for count in (20, 30)]
            messages = [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]
            stream.write(json.dumps({"id": str(number), "messages": messages}) + "\n")
    return path


def _run(folder: Path, data: Path, processes: int) -> dict[str, Any]:
    import shutil
    import subprocess

    shutil.rmtree(folder / "data-cache", ignore_errors=True)
    command = [sys.executable, __file__, "--probe", str(folder), str(data), str(processes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _probe(folder: Path, data: Path, processes: int) -> None:
    from mixfuse.train.data.chat_data import CHATS
    from mixfuse.train.data.prepared import facts, prepare
    from mixfuse.train.data.sources import digest
    from mixfuse.train.model.tokenizer import load_tokenizer
    from mixfuse.train.recipe import SftRecipe

    recipe = SftRecipe(
        base=folder / "base",
        out=folder / "run",
        data=data,
        deepspeed=Path("configs/deepspeed/zero3.json"),
        optimizer={"steps": 1},
        data_processes=processes,
    )
    tokenizer = load_tokenizer(recipe.base)
    with AnonymousMemory(every_s=0.02, children=True) as memory:
        began = time.monotonic()
        (entry,) = prepare(CHATS, recipe, tokenizer).train
        seconds = time.monotonic() - began
    began = time.monotonic()
    digest(recipe.data[0])
    hashed = time.monotonic() - began
    found = facts(entry)
    sizes = sum(found["sizes"].values())
    used = {"before": memory.before, "peak": memory.peak, "seconds": seconds, "digest": hashed}
    print(json.dumps({**used, "rows": found["train"], "bytes": sizes}))


def _interval(ratios: list[float]) -> tuple[float, float]:
    draw = random.Random(0)
    means = sorted(statistics.mean(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return means[49], means[1949]


if __name__ == "__main__":
    main()
