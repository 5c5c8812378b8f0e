"""The watcher: swaps in the newest adapter of a folder, or of another source, without a command."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

from mixfuse.contracts.adapter import MANIFEST, read_manifest
from mixfuse.contracts.errors import MixfuseError
from mixfuse.serve.swap import Swapper

logger = logging.getLogger(__name__)

# Failures that pass without a change to the adapter: another swap is under way, or the engine or the database is away.
_TRANSIENT = ("conflict", "engine", "trace_db")
# An adapter that kills the engine must not be loaded for ever.
_MAX_TRIES = 3
_MOST_FILES = 20_000  # no adapter has as many; the check of the directory says so


@dataclass(frozen=True)
class Candidate:
    """The adapter directory that a source offers for a role.

    Attributes:
        directory: The adapter directory.
        state: A text that changes whenever the directory's files change.
    """

    directory: Path
    state: str


class Source(Protocol):
    """Where new adapters come from."""

    async def newest(self, role: str) -> Candidate | None:
        """Returns the newest adapter for a role; None if there is none.

        Raises:
            MixfuseError: The source cannot be read.
        """
        ...


class Folder:
    """Adapter directories in `ROOT/ROLE/`. The newest is the one whose manifest was written last.

    Directories without a manifest are skipped: they are incomplete, since `mixfuse adapter export` writes the directory
    elsewhere and renames it. Names that begin with a dot are skipped too.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    async def newest(self, role: str) -> Candidate | None:
        """Returns the newest adapter directory of a role."""
        return await asyncio.to_thread(self._newest, role)

    def _newest(self, role: str) -> Candidate | None:
        folder = self._root / role
        try:
            if not os.path.lexists(folder):
                return None
            written, unreadable = {}, None
            for path in folder.iterdir():  # `glob` passes over what cannot be read in silence
                try:
                    if not path.name.startswith("."):
                        written[path / MANIFEST] = (path / MANIFEST).stat().st_mtime_ns
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except OSError as error:
                    unreadable = error
            if not written and unreadable is not None:
                raise unreadable
            manifest = max(written, key=lambda path: (written[path], path), default=None)
            if manifest is None:
                return None
            files = sorted(path for path in islice(manifest.parent.rglob("*"), _MOST_FILES) if path.is_file())
            state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        except OSError as error:  # removed meanwhile, or not for this user
            raise MixfuseError(f"{folder}: {error}", kind="adapter") from None
        return Candidate(manifest.parent, str(state))


class Watcher:
    """Swaps a role to the candidate of a source, once the candidate is unchanged between two polls.

    A revision that has served the role before is skipped, or a rollback would not last. A refused candidate is logged
    once, and tried again when its files change. After a transient failure it is tried again at the next poll.

    Args:
        swapper: Swaps the role.
        source: Where new adapters come from.
        role: The role.
        swap: Swaps the role to a directory in another way than at once, as through a gate.
    """

    def __init__(
        self,
        swapper: Swapper,
        source: Source,
        role: str,
        swap: Callable[[str, Path], Awaitable[object]] | None = None,
    ) -> None:
        self._swapper, self._source, self._role = swapper, source, role
        self._swap = swap or partial(swapper.swap, why="watch")
        self._last_seen: Candidate | None = None
        self._done_with: Candidate | None = None
        self._failure: str | None = None
        self._tries = 0

    async def poll(self) -> None:
        """Asks the source once, and swaps if its candidate is new and complete."""
        try:
            candidate = await self._source.newest(self._role)
            if candidate is None or candidate == self._done_with:
                return
            if candidate != self._last_seen:  # it may still be being copied
                self._last_seen, self._tries = candidate, 0
                return
            manifest = await asyncio.to_thread(read_manifest, candidate.directory)
            if not await self._swapper.table.has_served(self._role, manifest.revision):
                await self._swap(self._role, candidate.directory)
            self._done_with, self._failure = candidate, None
        except MixfuseError as error:
            self._tries += error.kind == "engine"
            if error.kind not in _TRANSIENT or self._tries == _MAX_TRIES:
                self._done_with = self._last_seen
            if str(error) != self._failure:
                self._failure = str(error)
                logger.warning("watch: role %s: %s", self._role, error)
