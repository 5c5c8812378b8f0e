"""The spool: traces on their way to the database, in files that outlive the process.

A trace is appended to a file before its answer is finished, with one `write`, which puts it into the kernel's hands:
a process that is killed afterwards loses nothing (a machine that loses power may lose the last seconds). What is in
the database is taken out of the spool. Each gateway process writes files of its own and holds a lock on them; files
that nobody holds are left by a process that was killed, and the next gateway to start takes them over.
"""

import fcntl
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SEGMENT_BYTES = 8 << 20
"""A file of this size is closed, and removed as soon as the database has all of it."""


@dataclass(eq=False)
class Segment:
    """One file of the spool.

    Attributes:
        path: Where it lies.
        handle: Its open file descriptor; holds the lock.
        size: Bytes in it.
        waiting: Traces in it that the database has not got yet.
        full: Nothing more is written to it.
    """

    path: Path
    handle: int
    size: int = 0
    waiting: int = 0
    full: bool = field(default=False)


class Spool:
    """The files of this process in a spool folder.

    Args:
        folder: Made where there is none.

    Raises:
        OSError: The folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._open_segments: set[Segment] = set()
        self._segment = self._open()

    def append(self, line: bytes) -> Segment:
        """Writes one line, which ends with its only newline, and returns the file it is in.

        Raises:
            OSError: It cannot be written whole (the disk is full).
        """
        segment = self._segment
        if segment.size >= SEGMENT_BYTES:
            segment.full = True
            self._release(segment)
            segment = self._segment = self._open()
        written = os.write(segment.handle, line)
        if written != len(line):  # so that the next line does not hang on to half of this one
            os.ftruncate(segment.handle, segment.size)
            raise OSError(f"{segment.path}: only {written} of {len(line)} bytes could be written")
        segment.size += written
        segment.waiting += 1
        return segment

    def done(self, segment: Segment) -> None:
        """Notes that the database has got a trace of this file."""
        segment.waiting -= 1
        self._release(segment)

    def left_behind(self) -> Iterator[tuple[Segment, list[bytes]]]:
        """Takes over the files of processes that are gone; yields each with its lines, whole ones only."""
        for path in sorted(self._folder.glob("*.jsonl")):
            if path == self._segment.path:
                continue
            try:
                handle = os.open(path, os.O_RDWR | os.O_APPEND)
            except FileNotFoundError:
                continue
            if not _lock(handle) or not path.exists():  # a living process's, or one removed in this moment
                os.close(handle)
                continue
            lines = path.read_bytes().split(b"\n")[:-1]  # a killed process may have left half a line
            segment = Segment(path, handle, waiting=len(lines), full=True)
            self._open_segments.add(segment)
            if lines:
                yield segment, lines
            else:
                self._release(segment)

    def close(self) -> None:
        """Ends writing; a file that the database has all of is removed, any other waits for the next start."""
        self._segment.full = True
        self._release(self._segment)
        for segment in self._open_segments:
            os.close(segment.handle)
        self._open_segments.clear()

    def _open(self) -> Segment:
        path = self._folder / f"{uuid.uuid4().hex}.jsonl"
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        _lock(handle)
        segment = Segment(path, handle)
        self._open_segments.add(segment)
        return segment

    def _release(self, segment: Segment) -> None:
        if segment.waiting > 0:
            return
        if segment.full:
            segment.path.unlink(missing_ok=True)
            os.close(segment.handle)
            self._open_segments.discard(segment)
        elif segment.size:
            os.ftruncate(segment.handle, 0)
            segment.size = 0


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
