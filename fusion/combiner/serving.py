"""The combiner that a gateway serves: read at the start, and again when its file changes."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.combiner.artefact import Combiner, load

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Serving:
    """A combiner and its revision, which takes milliseconds to compute."""

    combiner: Combiner
    revision: str


class ServingCombiner:
    """The combiner in a file.

    Args:
        path: The file.
        members: The names of the pool's members.

    Attributes:
        problem: Why the file as it is now is not served; empty where it is.

    Raises:
        MixfuseError: It holds no combiner, or one that knows no member of the pool.
    """

    def __init__(self, path: Path, members: Sequence[str]) -> None:
        self._path, self._members = path, members
        self.problem = ""
        self._stamp = self._stat()
        self._serving = self._load()

    async def current(self) -> Serving:
        """Returns the combiner; a changed file is read first, and one that cannot be used leaves the old one."""
        stamp = self._stat()
        if stamp != self._stamp:
            self._stamp = stamp  # before the wait: other requests go on with the old one meanwhile
            try:
                serving = await asyncio.to_thread(self._load)
                if self._stamp == stamp:  # it may have changed again, and been read again, during the wait
                    self._serving, self.problem = serving, ""
                    logger.info("the combiner is now %s", serving.revision)
            except asyncio.CancelledError:  # this client left; the next request reads the file
                if self._stamp == stamp:
                    self._stamp = None
                raise
            except (MixfuseError, OSError) as error:
                self.problem = str(error)
                logger.warning("%s; the combiner read before it keeps serving", error)
        return self._serving

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _load(self) -> Serving:
        combiner = load(self._path)
        if not set(combiner.members) & set(self._members):
            raise MixfuseError(
                f"{self._path}: the combiner knows none of the pool's members ({', '.join(self._members)}); "
                f"it knows {', '.join(combiner.members)}"
            )
        return Serving(combiner, combiner.revision)
