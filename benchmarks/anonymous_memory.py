"""The most memory that a part of a benchmark takes, as the kernel sees it, from a thread that looks again and again.

It counts anonymous pages: those of a mapped file are the kernel's cache, which it can drop.
"""

import threading
from pathlib import Path

import psutil


class AnonymousMemory:
    """Looks at the anonymous memory of this process while the block runs.

    Args:
        every_s: Seconds between two looks.
        children: Count the processes that this one started, too.

    Attributes:
        before: Bytes at the beginning.
        peak: The most bytes above that, until now.
    """

    def __init__(self, *, every_s: float, children: bool) -> None:
        self._every_s, self._children = every_s, children

    def __enter__(self) -> "AnonymousMemory":
        self.before, self.peak = self._now(), 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(self._every_s):
            self.peak = max(self.peak, self._now() - self.before)

    def _now(self) -> int:
        total = _of("self")
        if self._children:
            for child in psutil.Process().children(recursive=True):
                try:
                    total += _of(str(child.pid))
                except OSError:  # it has ended
                    continue
        return total


def _of(process: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    # A process that has ended, but that its parent has not asked about, has no such line.
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
