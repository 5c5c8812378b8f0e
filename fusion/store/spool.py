"""The spool: files that hold traces until they are in the database.

A trace is appended to a file with one `write` before its answer ends. A process that is killed afterwards loses
nothing; a machine that loses power may lose the last seconds. Traces that are in the database leave the spool. Each
gateway process writes its own files and holds a lock on them. A file without a lock belongs to a process that was
killed; the next gateway to start takes it over.

A line that no database takes is set aside, in `SET_ASIDE`: renamed to any other name that ends in .jsonl, that file is
taken over like those of a killed process.
"""

import fcntl
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

SET_ASIDE = "set-aside.jsonl"

_TRIAL = b"0" * (64 << 10)

SEGMENT_BYTES = 8 << 20
"""A file of this size is closed, and removed once all its traces are in the database."""


@dataclass(eq=False)
class Segment:
    """One file of the spool.

    Attributes:
        path: Its path.
        handle: Its open file descriptor, which holds the lock.
        size: Its bytes.
        waiting: Its traces that are not in the database yet.
        full: Whether it takes no more traces.
    """

    path: Path
    handle: int
    size: int = 0
    waiting: int = 0
    full: bool = field(default=False)


class Spool:
    """The files of this process in a spool folder.

    Args:
        folder: The folder, created if missing.

    Raises:
        OSError: The folder cannot be created or written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._open_segments: set[Segment] = set()
        self._segment = self._open()

    def append(self, line: bytes) -> Segment:
        """Appends one line, which ends with its only newline; returns its file.

        Raises:
            OSError: The line could not be written completely (the disk is full).
        """
        segment = self._segment
        if segment.size >= SEGMENT_BYTES:
            segment.full = True
            self._release(segment)
            segment = self._segment = self._open()
        written = os.write(segment.handle, line)
        if written != len(line):  # or the next line would be appended to half of this one
            os.ftruncate(segment.handle, segment.size)
            raise OSError(f"{segment.path}: only {written} of {len(line)} bytes could be written")
        segment.size += written
        segment.waiting += 1
        return segment

    def done(self, segment: Segment) -> None:
        """Notes that one trace of this file is in the database."""
        segment.waiting -= 1
        self._release(segment)

    def set_aside(self, line: bytes) -> None:
        """Keeps a line that cannot be written to the database.

        Raises:
            OSError: It could not be written completely (the disk is full).
        """
        handle = os.open(self._folder / SET_ASIDE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            if os.write(handle, line) != len(line):
                raise OSError(f"{self._folder / SET_ASIDE}: the line could not be written completely")
        finally:
            os.close(handle)

    def try_disk(self) -> None:
        """Checks that the folder takes a trace of 64 KiB.

        Raises:
            OSError: It does not: the disk or the quota is used up, or the folder was made read-only.
        """
        path = self._folder / f"{uuid.uuid4().hex}.trial"
        try:
            path.write_bytes(_TRIAL)
        finally:
            path.unlink(missing_ok=True)

    def left_behind(self) -> Iterator[tuple[Segment, list[bytes]]]:
        """Takes over the files of killed processes; yields each file with its complete lines."""
        for path in sorted(self._folder.glob("*.jsonl")):
            if path == self._segment.path or path.name == SET_ASIDE:
                continue
            try:
                handle = os.open(path, os.O_RDWR | os.O_APPEND)
            except FileNotFoundError:
                continue
            except OSError as error:
                logger.error("%s cannot be read (%s); its traces wait for the next start", path, error.strerror)
                continue
            if not _lock(handle) or not path.exists():  # it belongs to a running process, or was removed just now
                os.close(handle)
                continue
            lines = path.read_bytes().split(b"\n")[:-1]  # the last line of a killed process may be incomplete
            segment = Segment(path, handle, waiting=len(lines), full=True)
            self._open_segments.add(segment)
            if lines:
                yield segment, lines
            else:
                self._release(segment)

    def close(self) -> None:
        """Stops writing; removes files whose traces are all in the database and keeps the others for the next start."""
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
