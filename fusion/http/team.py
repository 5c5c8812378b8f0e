"""The worker processes of one gateway: what each tells the others, for `/readyz` and `/metrics`.

Each worker writes its state to a file in a folder of their own, once a second. Whoever is asked reads the files of the
others; the age of a file tells that its worker is silent. Counters are in files that `prometheus_client` keeps for
several processes, so that those of a killed worker still count.
"""

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from mixfuse.fusion.calls.board import Board

logger = logging.getLogger(__name__)

_WRITE_S = 1.0
_SILENT_S = 5.0


class Family(NamedTuple):
    """A metric that is read at each scrape.

    Attributes:
        name: Its name.
        kind: Its Prometheus type.
        says: What it means.
        samples: The name, labels and value of each.
    """

    name: str
    kind: str
    says: str
    samples: list[tuple[str, dict[str, str], float]]


@dataclass
class State:
    """What a worker says of itself.

    Attributes:
        problems: Why it cannot answer requests.
        notes: What an operator should know, though it answers.
        metrics: Its part of the metrics that are read at each scrape.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metrics: list[Family] = field(default_factory=list)


class Team:
    """The workers as one of them sees them.

    Args:
        board: The numbers that they share.
        folder: Takes their files.
    """

    def __init__(self, board: Board, folder: Path) -> None:
        self.board, self.folder = board, folder
        self._silent = False

    def others(self) -> list[State]:
        """Returns what each of the others last said; of one that is silent, that it is."""
        return [self._read(number) for number in range(self.board.workers) if number != self.board.worker]

    def _read(self, number: int) -> State:
        try:
            path = self._path(number)
            quiet_s = time.time() - path.stat().st_mtime
            state = State(**json.loads(path.read_bytes()))
            state.metrics = [Family(*family) for family in state.metrics]
        except (OSError, ValueError):
            return State(notes=[f"worker {number + 1} does not run; its place is being filled"])
        if quiet_s > _SILENT_S:
            return State(
                notes=[f"worker {number + 1} has said nothing for {quiet_s:.0f} s"],
                metrics=[family for family in state.metrics if family.kind == "counter"],
            )
        return state

    async def report(self, state: Callable[[], State]) -> None:
        """Writes what this worker says of itself, until it is cancelled."""
        path = self._path(self.board.worker)
        written = path.with_suffix(".new")
        while True:
            try:
                written.write_text(json.dumps(asdict(state())), encoding="utf-8")
                os.replace(written, path)
                self._silent = False
            except OSError as error:
                if not self._silent:
                    logger.error("%s cannot be written: %s", path, error.strerror)
                self._silent = True
            await asyncio.sleep(_WRITE_S)

    def _path(self, number: int) -> Path:
        return self.folder / f"worker-{number}.json"
