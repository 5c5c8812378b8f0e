"""Counts what tensors hold: every operator's outputs are seen, each storage is counted from its birth to its death.

What `benchmarks/plan.py` and the planner's tests hold against the formulas. Storages that no operator makes in sight
are not counted, nor is what an operator takes and frees within.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tracker(TorchDispatchMode):
    """Counts the bytes of live storages, by what was going on when each was made.

    Attributes:
        live: Bytes now, by what was going on.
        peaks: The most of each since `reset_peaks`.
        total: Bytes now.
        peak: The most at once since `reset_peaks`.
        at_peak: `live` at that time.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.sizes: dict[int, tuple[int, str]] = {}
        self.live: Counter[str] = Counter()
        self.peaks: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self.total = self.peak = 0
        self.doing = ["start"]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.see(result)
        return result

    def see(self, tensors: Any) -> None:
        """Counts what is new among `tensors`."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != self.device:
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if size == 0 or key in self.sizes:
                continue
            self.sizes[key] = size, self.doing[-1]
            weakref.finalize(storage, self.forget, key)
            self._count(self.doing[-1], size)

    def forget(self, key: int) -> None:
        """A storage has died."""
        size, doing = self.sizes.pop(key)
        self._count(doing, -size)

    def _count(self, doing: str, size: int) -> None:
        self.live[doing] += size
        self.total += size
        self.peaks[doing] = max(self.peaks[doing], self.live[doing])
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.live)

    def reset_peaks(self) -> None:
        """Begins anew from what is live."""
        self.peak, self.peaks, self.at_peak = self.total, Counter(self.live), dict(self.live)

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Counts what is made within as `what`."""
        self.doing.append(what)
        try:
            yield
        finally:
            self.doing.pop()

    def wrap(self, owner: Any, name: str, what: str) -> None:
        """Counts what `owner.name` makes as `what`."""
        inner: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.during(what):
                return inner(*args, **kwargs)

        setattr(owner, name, wrapped)
