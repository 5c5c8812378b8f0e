"""What the checks share: a report with its comparisons, times, and the memory of a computation."""

import gc
import statistics
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch


class Skipped(Exception):  # noqa: N818 - it is not a failure
    """The check cannot run here; the message says why."""


class Report:
    """What one check found.

    Attributes:
        device: Where the check runs.
        small: Whether it runs on small sizes.
        rows: The figures, one row for each case.
        failures: One sentence for each comparison that failed.
        skipped: Parts that could not run, with why.
    """

    def __init__(self, device: torch.device, *, small: bool) -> None:
        self.device, self.small = device, small
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.skipped: dict[str, str] = {}

    def row(self, **figures: Any) -> dict[str, Any]:
        """Adds a row; floats are rounded to five digits."""
        self.rows.append({key: _rounded(value) for key, value in figures.items()})
        return self.rows[-1]

    def expect(self, holds: bool, sentence: str) -> None:
        """Notes the sentence as a failure unless the condition holds."""
        if not holds:
            self.failures.append(sentence)

    def at_most(self, what: str, measured: float, limit: float) -> None:
        """Notes a failure if a figure is above its limit or is no number."""
        self.expect(measured <= limit, f"{what} is {measured:.3g}; the limit is {limit:.3g}")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The norm of the difference over the norm of the reference; 0 where both are zero."""
    difference, size = (ours.double() - reference.double()).norm().item(), reference.double().norm().item()
    return difference / size if size else difference


def wait(device: torch.device) -> None:
    """Waits until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(compute: Callable[[], object], device: torch.device, *, rounds: int) -> float:
    """The median time of `rounds` calls, after one call that is not counted."""
    times = []
    for _ in range(rounds + 1):
        wait(device)
        began = time.perf_counter()
        compute()
        wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def peak_bytes(compute: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call holds beyond what was held before it.

    On a GPU this is what torch's allocator handed out; on a CPU the storages that operators made (`memory_tracker`).
    """
    if device.type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        compute()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _alive() as tracker:
        compute()
    return int(tracker.peak)


def _alive() -> Any:
    """A tracker that does not count storages which were there before: it meets those as inputs first."""
    from memory_tracker import Tracker
    from torch.utils._pytree import tree_leaves

    class Alive(Tracker):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                    storage = tensor.untyped_storage()
                    if storage._cdata not in self.sizes:
                        self.sizes[storage._cdata] = 0, "before"
                        weakref.finalize(storage, self.forget, storage._cdata)
            return super().__torch_dispatch__(func, types, args, kwargs)

    return Alive()


def free(device: torch.device) -> None:
    """Gives unused memory back between cases."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def about(device: torch.device) -> dict[str, Any]:
    """The device by name, with its memory and the versions that decide what runs on it."""
    facts: dict[str, Any] = {"kind": device.type, "torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
        with suppress(Exception):  # a build without NCCL has no version of it
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return facts
