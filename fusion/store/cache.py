"""What models answered, kept by the content of what they were asked: a second run of a measurement costs nothing.

Each answer is stored as it comes, so a run that is cut off goes on where it was.
"""

import json
import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import disk_errors, sha256_json


class Known(NamedTuple):
    """An answer there is already; a value may be None."""

    value: Any


class Cache:
    """Answers by the hash of their question, in one SQLite file; a context manager.

    Args:
        path: The file, made where there is none; None keeps the answers for as long as the block runs.

    Attributes:
        hits: How many answers were there already.
        added: How many were new.

    Raises:
        MixfuseError: The file is no cache, or cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.hits = self.added = 0

    def __enter__(self) -> Self:
        if self._path is not None:
            with disk_errors(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(":memory:" if self._path is None else self._path, isolation_level=None)
        try:
            # An answer lost with the machine is asked for again; that is cheaper than a disk flush for each.
            self._database.execute("PRAGMA synchronous = OFF")
            self._database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        except sqlite3.Error as error:
            self._database.close()
            raise MixfuseError(f"{self._path}: cannot be used as a cache ({error}); name another file") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._database.close()

    def holds(self, question: dict[str, Any]) -> bool:
        """Whether there is an answer; does not count as a hit."""
        key = (sha256_json(question),)
        return self._database.execute("SELECT 1 FROM answers WHERE key = ?", key).fetchone() is not None

    def get(self, question: dict[str, Any]) -> Known | None:
        """What came of the same question before; None where it was never asked."""
        key = (sha256_json(question),)
        row = self._database.execute("SELECT value FROM answers WHERE key = ?", key).fetchone()
        if row is None:
            return None
        self.hits += 1
        return Known(json.loads(row[0]))

    def put(self, question: dict[str, Any], value: Any) -> None:
        """Keeps what came of a question."""
        with disk_errors(self._path or Path("the cache")):
            self._database.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?)", (sha256_json(question), json.dumps(value))
            )
        self.added += 1
