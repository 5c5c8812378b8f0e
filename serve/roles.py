"""The role table: which adapter revision serves each role, and how one takes another's place under load.

A swap is verify → load under a revision-qualified name → probe → flip → drain → unload. Requests hold a lease on the
revision they began with, so none fails because of a swap; any failure before the flip leaves the old one serving.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mixfuse import adapter, judge_protocol
from mixfuse.adapter import Fingerprint, Manifest
from mixfuse.errors import MixfuseError

logger = logging.getLogger(__name__)

BASE = "base"
"""The role that is always there: the base model without an adapter."""

JUDGE = "judge"


class AdapterEngine(Protocol):
    """What the table needs of an engine (`serve.engine.Engine` is one)."""

    base_model_name: str

    async def load_adapter(self, name: str, path: Path) -> None:
        """Makes an adapter servable under `name`."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Forgets the adapter of that name."""
        ...

    async def probe(self, name: str) -> None:
        """Has the model of that name answer one token; raises where it does not."""
        ...


@dataclass(eq=False)
class Revision:
    """One adapter revision in the engine.

    Attributes:
        model: Its name in the engine: `ROLE@REVISION`, or the base's own.
        revision: The adapter's revision; None for the base.
        directory: Where it was loaded from; None for the base.
        in_flight: Requests that hold it.
    """

    model: str
    revision: str | None = None
    directory: Path | None = None
    in_flight: int = 0
    _drained: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def _enter(self) -> None:
        self.in_flight += 1
        self._drained.clear()

    def _leave(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._drained.set()

    async def drained(self) -> None:
        """Returns when no request holds the revision."""
        if self.in_flight:
            await self._drained.wait()


@dataclass(frozen=True)
class Swap:
    """What a swap did; `old` and `new` are revisions, None for the base."""

    role: str
    old: str | None
    new: str | None
    drained: int


class RoleTable:
    """The roles of one engine.

    Args:
        engine: The running engine.
        base: Fingerprint of the model it serves; adapters of another are refused.
        roles: Role names; each is served by the base until an adapter is swapped in.
        max_rank: The engine's largest LoRA rank.
    """

    def __init__(self, engine: AdapterEngine, base: Fingerprint, roles: list[str], *, max_rank: int) -> None:
        self._engine, self._base, self._max_rank = engine, base, max_rank
        plain = Revision(engine.base_model_name)
        self._serving: dict[str, Revision] = dict.fromkeys([BASE, *roles], plain)
        self._swapping = asyncio.Lock()

    def names(self) -> list[str]:
        """Every role, the base first."""
        return list(self._serving)

    def serving(self) -> Mapping[str, Revision]:
        """Which revision serves each role now."""
        return dict(self._serving)

    @asynccontextmanager
    async def lease(self, role: str) -> AsyncIterator[Revision]:
        """Pins the role's revision: it stays loaded for as long as the block runs.

        Raises:
            MixfuseError: The role is unknown.
        """
        revision = self._known(role)
        revision._enter()
        try:
            yield revision
        finally:
            revision._leave()

    async def swap(self, role: str, directory: Path) -> Swap:
        """Serves `role` by the adapter in `directory` from now on. One swap runs at a time.

        Raises:
            MixfuseError: The role is unknown or is the base, or the adapter is tampered with, of another base, of too
                high a rank, without the judge protocol of this version where the role is the judge, or refused by the
                engine. The old revision is still serving then.
        """
        async with self._swapping:
            old = self._known(role)
            if role == BASE:
                raise MixfuseError("the role 'base' is the model without an adapter; it cannot be swapped")
            manifest = await asyncio.to_thread(adapter.verify, directory, base=self._base)
            self._check(role, manifest, directory)
            if old.revision == manifest.revision:
                return Swap(role, old.revision, old.revision, 0)
            new = Revision(f"{role}@{manifest.revision}", manifest.revision, directory)
            await self._engine.load_adapter(new.model, directory.resolve())
            try:
                await self._engine.probe(new.model)
            except BaseException:
                await self._engine.unload_adapter(new.model)
                raise
            self._serving[role] = new
            drained = old.in_flight if old.revision else 0
            logger.info("role %s: %s -> %s", role, old.revision or BASE, new.revision)
            if old.revision:
                await old.drained()
                await self._engine.unload_adapter(old.model)
            return Swap(role, old.revision, new.revision, drained)

    def _known(self, role: str) -> Revision:
        if role not in self._serving:
            raise MixfuseError(f"unknown role {role!r}; this server's roles: {', '.join(self._serving)}", kind="role")
        return self._serving[role]

    def _check(self, role: str, manifest: Manifest, directory: Path) -> None:
        if manifest.rank > self._max_rank:
            raise MixfuseError(
                f"{directory}: rank {manifest.rank} is above the engine's max_lora_rank {self._max_rank}; "
                "raise it in the serve config or train with a smaller rank",
                kind="adapter",
            )
        if role == JUDGE and manifest.judge_protocol != judge_protocol.describe():
            found = (manifest.judge_protocol or {}).get("version", "none")
            raise MixfuseError(
                f"{directory}: its judge protocol (version {found}) is not this runtime's (version "
                f"{judge_protocol.VERSION}); train the judge again with pairs of this version",
                kind="adapter",
            )
