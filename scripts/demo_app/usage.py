"""What the demo takes: CPU time and the peak of memory, over all processes that it starts, step by step."""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from mixfuse.contracts.files import read_json, write_json

SAMPLE_EVERY_S = 3.0  # reading the memory of a 5 GB process takes some 30 ms of CPU time


class Usage:
    """Measures steps and keeps the figures in a file, so that an interrupted demo adds to them when it resumes.

    Memory is the proportional set size (PSS) of this process and its descendants: pages that processes share count
    once. It is sampled, so a peak shorter than `SAMPLE_EVERY_S` may be missed.

    Args:
        path: The JSON file that keeps the figures.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._steps: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Adds what happens in the block to the step's figures."""
        began, cpu_before = time.monotonic(), cpu_seconds()
        stop, peak = threading.Event(), [memory_bytes()]

        def sample() -> None:
            while not stop.wait(SAMPLE_EVERY_S):
                peak[0] = max(peak[0], memory_bytes())

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        figures = self._steps.setdefault(name, {"wall_s": 0.0, "cpu_s": 0.0, "peak_bytes": 0.0, "finished": False})
        try:
            yield
            figures["finished"] = True
        finally:
            stop.set()
            sampler.join()
            figures["wall_s"] += time.monotonic() - began
            figures["cpu_s"] += cpu_seconds() - cpu_before
            figures["peak_bytes"] = max(figures["peak_bytes"], peak[0])
            write_json(self._path, self._steps)

    def finished(self, name: str) -> bool:
        """Whether the step has come to its end, in this run of the demo or an earlier one."""
        return bool(self._steps.get(name, {}).get("finished"))

    def wall_s(self, names: Iterable[str]) -> float:
        """Seconds that these steps have taken so far."""
        return sum(self._steps[name]["wall_s"] for name in names if name in self._steps)

    def to_json(self) -> dict[str, Any]:
        """Minutes and gigabytes, in all and by step."""
        steps = self._steps.values()
        return {
            "cpu_minutes": sum(step["cpu_s"] for step in steps) / 60,
            "wall_minutes": sum(step["wall_s"] for step in steps) / 60,
            "peak_memory_gb": max((step["peak_bytes"] for step in steps), default=0.0) / 1e9,
            "cpu_minutes_by_step": {name: step["cpu_s"] / 60 for name, step in self._steps.items()},
        }


def cpu_seconds() -> float:
    """User and system time of this process and of its descendants, the finished ones included."""
    total = 0.0
    for process in _family():
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue  # it has ended; its parent counts it from now on
        total += times.user + times.system + times.children_user + times.children_system
    return total


def memory_bytes() -> float:
    """The memory of this process and of its descendants (PSS)."""
    total = 0.0
    for process in _family():
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # it has ended
    return total


def _family() -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True)]
