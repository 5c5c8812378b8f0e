"""New adapters are swapped in by themselves: a role's newest revision in a folder, or wherever a source finds one."""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mixfuse.contracts.adapter import MANIFEST, read_manifest
from mixfuse.contracts.errors import MixfuseError
from mixfuse.serve.swap import Swapper

logger = logging.getLogger(__name__)

# What passes by itself: somebody else is swapping, or the engine or the database is away.
_LATER = ("conflict", "engine", "trace_db")
# But an adapter that an engine dies of must not be given to it for ever.
_MOST_TRIES = 3


@dataclass(frozen=True)
class Found:
    """An adapter directory that a source holds out.

    Attributes:
        directory: The adapter directory.
        state: Changes when its files do.
    """

    directory: Path
    state: str


class Source(Protocol):
    """Where new adapters come from."""

    async def newest(self, role: str) -> Found | None:
        """The newest adapter for a role; None where there is none.

        Raises:
            MixfuseError: The source cannot be read.
        """
        ...


class Folder:
    """Adapter directories in `ROOT/ROLE/`; the newest is the one whose manifest was written last.

    An adapter directory without a manifest is not complete: `mixfuse adapter export` writes it elsewhere and renames.
    Names that begin with a dot are left alone.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    async def newest(self, role: str) -> Found | None:
        """The newest adapter directory of a role."""
        return await asyncio.to_thread(self._newest, role)

    def _newest(self, role: str) -> Found | None:
        manifests = [path for path in (self._root / role).glob(f"*/{MANIFEST}") if not path.parent.name.startswith(".")]
        try:
            manifest = max(manifests, key=lambda path: (path.stat().st_mtime_ns, path), default=None)
            if manifest is None:
                return None
            files = sorted(path for path in manifest.parent.rglob("*") if path.is_file())
            state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        except OSError as error:  # removed in this moment
            raise MixfuseError(f"{self._root / role}: {error}", kind="adapter") from None
        return Found(manifest.parent, str(state))


class Watcher:
    """Swaps a role to what a source holds out, once it has stayed the same from one look to the next.

    A revision that has served the role before is left alone, or a rollback would not last. One that is refused is
    reported, and tried again when its files have changed; where the engine or the database is away, it is tried again.

    Args:
        swapper: Swaps the role.
        source: Where new adapters come from.
        role: The role.
    """

    def __init__(self, swapper: Swapper, source: Source, role: str) -> None:
        self._swapper, self._source, self._role = swapper, source, role
        self._seen: Found | None = None
        self._settled: Found | None = None
        self._failure: str | None = None
        self._tries = 0

    async def look(self) -> None:
        """Looks once."""
        try:
            found = await self._source.newest(self._role)
            if found is None or found == self._settled:
                return
            if found != self._seen:  # perhaps still being copied
                self._seen, self._tries = found, 0
                return
            manifest = await asyncio.to_thread(read_manifest, found.directory)
            if not await self._swapper.table.has_served(self._role, manifest.revision):
                await self._swapper.swap(self._role, found.directory, why="watch")
            self._settled, self._failure = found, None
        except MixfuseError as error:
            self._tries += error.kind == "engine"
            if error.kind not in _LATER or self._tries == _MOST_TRIES:
                self._settled = self._seen
            if str(error) != self._failure:
                self._failure = str(error)
                logger.warning("watch: role %s: %s", self._role, error)
