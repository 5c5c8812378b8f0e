"""The trace store: one SQLite file, one JSON record a trace, with the columns one looks traces up by."""

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mixfuse.errors import MixfuseError
from mixfuse.trace import Trace

Result = TypeVar("Result")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS traces (
    id TEXT PRIMARY KEY,
    created_at REAL NOT NULL,
    model TEXT NOT NULL,
    mode TEXT NOT NULL,
    outcome TEXT NOT NULL,
    reason TEXT NOT NULL,
    total_tokens INTEGER NOT NULL,
    duration_ms REAL NOT NULL,
    record TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS traces_by_time ON traces (created_at);
CREATE INDEX IF NOT EXISTS traces_by_mode ON traces (mode, created_at);
"""


class TraceStore:
    """Traces in a SQLite file, read and written in worker threads: the event loop never waits for the disk.

    Args:
        path: The file; made, with its folder, where there is none.

    Raises:
        MixfuseError: The file cannot be opened or is no SQLite database.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # One connection for whichever worker thread comes, one at a time.
            self._database = sqlite3.connect(path, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")  # readers beside the writer
            self._database.execute("PRAGMA synchronous=NORMAL")  # safe with WAL; a power cut loses the last few
            self._database.executescript(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise MixfuseError(f"cannot open the trace database {path}: {error}", kind="trace_db") from error
        self._lock = threading.Lock()

    async def add(self, trace: Trace) -> None:
        """Stores a trace."""
        await self._locked(lambda: self._write(trace))

    async def get(self, trace_id: str) -> Trace | None:
        """Returns the trace of that id, or None."""
        return await self._locked(lambda: self._read(trace_id))

    async def newest(self, *, limit: int = 100, mode: str | None = None) -> list[Trace]:
        """Returns the newest traces, newest first."""
        query = "SELECT record FROM traces WHERE ? IS NULL OR mode = ? ORDER BY created_at DESC LIMIT ?"
        rows = await self._locked(lambda: self._database.execute(query, (mode, mode, limit)).fetchall())
        return [Trace.model_validate_json(row[0]) for row in rows]

    async def add_feedback(self, trace_id: str, feedback: dict[str, Any]) -> Trace | None:
        """Appends what a user said of the answer; returns the trace with it, or None where there is none."""

        def append() -> Trace | None:
            trace = self._read(trace_id)
            if trace is None:
                return None
            trace = trace.model_copy(update={"feedback": [*trace.feedback, feedback]})
            self._write(trace)
            return trace

        return await self._locked(append)

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._database.close()

    async def _locked(self, work: Callable[[], Result]) -> Result:
        def run() -> Result:
            with self._lock:
                return work()

        return await asyncio.to_thread(run)

    def _write(self, trace: Trace) -> None:
        with self._database:  # commits, or rolls back on an error
            self._database.execute(
                "INSERT OR REPLACE INTO traces VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    trace.id,
                    trace.created_at,
                    trace.model,
                    trace.mode,
                    trace.outcome,
                    trace.reason,
                    trace.usage.total_tokens,
                    trace.duration_ms,
                    trace.model_dump_json(),
                ),
            )

    def _read(self, trace_id: str) -> Trace | None:
        row = self._database.execute("SELECT record FROM traces WHERE id = ?", (trace_id,)).fetchone()
        return Trace.model_validate_json(row[0]) if row else None
