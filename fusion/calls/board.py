"""Numbers that the worker processes of one gateway share: what is spent of budgets, rates, circuits of models.

A row has a few shared numbers and some of each worker's own. Whoever changes a number because of another one holds the
lock meanwhile, for microseconds. A worker that is killed leaves the lock open and its own numbers behind; the worker
that takes its place clears them (`Board.clear_own`).
"""

import fcntl
import hashlib
import mmap
import os
from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

SHARED = 3
"""Shared numbers of a row."""
OWN = 3
"""Numbers of each worker in a row."""
MOST_ROWS = 1 << 18
_DIGEST = 32
_COUNT = 8


class Row:
    """A few numbers, each a double.

    Args:
        numbers: The shared numbers, then those of each worker.
        worker: Whose numbers `own` are.
    """

    def __init__(self, numbers: "array[float] | memoryview[float]", worker: int) -> None:
        self._numbers, self._first = numbers, SHARED + OWN * worker

    def __getitem__(self, place: int) -> float:
        return self._numbers[place]

    def __setitem__(self, place: int, value: float) -> None:
        self._numbers[place] = value

    def own(self, place: int) -> float:
        """Returns one of this worker's numbers."""
        return self._numbers[self._first + place]

    def set_own(self, place: int, value: float) -> None:
        """Sets one of this worker's numbers."""
        self._numbers[self._first + place] = value

    def of_all(self, place: int) -> list[float]:
        """Returns this number of each worker."""
        return list(self._numbers[SHARED + place :: OWN])

    def clear(self) -> None:
        """Sets all numbers to 0, those of all workers."""
        for place in range(len(self._numbers)):
            self._numbers[place] = 0.0

    def clear_own(self) -> None:
        """Sets this worker's numbers to 0."""
        for place in range(OWN):
            self.set_own(place, 0.0)


class Board:
    """The rows of a gateway with one process: nothing is shared, and nothing is locked.

    Attributes:
        worker: The number of this process, from 0.
        workers: The number of processes.
    """

    worker, workers = 0, 1

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}

    def row(self, name: str) -> Row:
        """Returns the row of that name, at first all 0."""
        row = self._rows.get(name)
        if row is None:
            row = self._rows[name] = self._new(name)
        return row

    def part(self, most: int) -> int:
        """Returns this worker's part of a limit that holds for all together."""
        return most // self.workers + (self.worker < most % self.workers)

    def locked(self) -> AbstractContextManager[None]:
        """Keeps the other processes from changing anything until the block ends; no block inside another."""
        return nullcontext()

    def clear_own(self) -> None:
        """Clears what a killed process left in this worker's place; called within `locked`."""

    def _new(self, _name: str) -> Row:
        return Row(array("d", bytes(8 * (SHARED + OWN))), 0)


class SharedBoard(Board):
    """The rows of several processes, in memory that `create` made before they were forked.

    Args:
        file: The memory's file descriptor.
        worker: The number of this process, from 0.
        workers: The number of processes.
    """

    def __init__(self, file: int, worker: int, workers: int) -> None:
        super().__init__()
        self.worker, self.workers = worker, workers
        self._file = file
        self._memory = memoryview(mmap.mmap(file, _size(workers)))
        self._width = _DIGEST + 8 * (SHARED + OWN * workers)
        self._places: dict[bytes, int] = {}

    @staticmethod
    def create(workers: int) -> int:
        """Makes the memory for so many processes; returns its file descriptor."""
        file = os.memfd_create("mixfuse-board")
        os.ftruncate(file, _size(workers))  # pages that are never written take no memory
        return file

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps the other processes from changing anything until the block ends; no block inside another."""
        # Such a lock belongs to the process, though the descriptor is inherited, and ends with it.
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def clear_own(self) -> None:
        """Clears what a killed process left in this worker's place; called within `locked`."""
        self._find_new()
        for place in self._places.values():
            self._at(place).clear_own()

    def _new(self, name: str) -> Row:
        digest = hashlib.sha256(name.encode()).digest()
        if digest not in self._places:
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                self._find_new()
                if digest not in self._places:
                    self._append(digest)
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)
        return self._at(self._places[digest])

    def _find_new(self) -> None:
        """Reads where the rows are that other processes have appended."""
        for place in range(len(self._places), int.from_bytes(self._memory[:_COUNT], "little")):
            start = _COUNT + place * self._width
            self._places[bytes(self._memory[start : start + _DIGEST])] = place

    def _append(self, digest: bytes) -> None:
        place = len(self._places)
        if place == MOST_ROWS:
            raise MemoryError(f"more than {MOST_ROWS} API keys and models")
        start = _COUNT + place * self._width
        self._memory[start : start + _DIGEST] = digest
        self._memory[:_COUNT] = (place + 1).to_bytes(_COUNT, "little")  # last: a killed process leaves no half of a row
        self._places[digest] = place

    def _at(self, place: int) -> Row:
        start = _COUNT + place * self._width
        return Row(self._memory[start + _DIGEST : start + self._width].cast("d"), self.worker)


def _size(workers: int) -> int:
    return _COUNT + MOST_ROWS * (_DIGEST + 8 * (SHARED + OWN * workers))
