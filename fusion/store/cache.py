"""A cache of models' answers by the content of their questions: a second run of a measurement makes no calls.

Each answer is stored when it arrives, so that a run that was cut off continues where it stopped.
"""

import json
import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import disk_errors, sha256_json


class Known(NamedTuple):
    """A cached answer; its value may be None."""

    value: Any


class Cache:
    """Answers by the hash of their question, in one SQLite file; a context manager.

    Args:
        path: The file, created if missing; None keeps the answers in memory until the block ends.

    Attributes:
        hits: The number of answers found in the cache.
        added: The number of answers added.

    Raises:
        MixfuseError: The file is not a cache, or cannot be written.
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
            # To ask again for the answers lost with the machine is cheaper than a disk flush for each.
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
        """Returns the answer to a question; None if it was never asked."""
        key = (sha256_json(question),)
        row = self._database.execute("SELECT value FROM answers WHERE key = ?", key).fetchone()
        if row is None:
            return None
        self.hits += 1
        return Known(json.loads(row[0]))

    def put(self, question: dict[str, Any], value: Any) -> None:
        """Stores the answer to a question."""
        with disk_errors(self._path or Path("the cache")):
            self._database.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?)", (sha256_json(question), json.dumps(value))
            )
        self.added += 1
