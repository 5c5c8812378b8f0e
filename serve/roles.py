"""The role table: which adapter revision serves each role, and how one takes another's place under load.

A swap is verify → load under a revision-qualified name → probe → flip → drain → unload. Requests hold a lease on the
revision they began with, so none fails because of a swap; any failure before the flip leaves the old one serving.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mixfuse import adapter, judge_protocol
from mixfuse.adapter import Fingerprint, Manifest
from mixfuse.errors import MixfuseError
from mixfuse.judge_protocol import Calibration

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
        calibration: How a judge's probabilities are to be read, from its manifest.
        in_flight: Requests that hold it.
    """

    model: str
    revision: str | None = None
    directory: Path | None = None
    calibration: Calibration | None = None
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
        draw: Numbers from 0 to 1 that say which lease is the canary's.
    """

    def __init__(
        self,
        engine: AdapterEngine,
        base: Fingerprint,
        roles: list[str],
        *,
        max_rank: int,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._engine, self._base, self._max_rank, self._random = engine, base, max_rank, draw
        plain = Revision(engine.base_model_name)
        self._serving: dict[str, Revision] = dict.fromkeys([BASE, *roles], plain)
        self._staged: dict[str, Revision] = {}
        self._canaries: dict[str, tuple[Revision, float]] = {}
        self._turns = {role: asyncio.Lock() for role in self._serving}
        self._retiring: set[asyncio.Task[None]] = set()

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
        async with self.hold(self._choose(role)) as revision:
            yield revision

    @asynccontextmanager
    async def hold(self, revision: Revision) -> AsyncIterator[Revision]:
        """Pins this revision, a staged one too: it stays loaded for as long as the block runs."""
        revision._enter()
        try:
            yield revision
        finally:
            revision._leave()

    async def swap(self, role: str, directory: Path) -> Swap:
        """Serves `role` by the adapter in `directory` from now on; `stage` and `commit` in one.

        Raises:
            MixfuseError: As `stage`. The old revision is still serving then.
        """
        async with self._turns[self._swappable(role)]:
            manifest = await self._verified(role, directory)
            old = self._serving[role]
            if old.revision == manifest.revision:
                return Swap(role, old.revision, old.revision, 0)
            revision = await self.stage(role, directory)
            flipped = self._flip(role, revision)
        return await self._retired(flipped)

    async def stage(self, role: str, directory: Path) -> Revision:
        """Verifies an adapter, loads it beside what serves the role, and probes it. It does not serve yet.

        `commit` or `discard` has to follow; until then no other adapter can be staged for the role. Cancelled, it
        leaves nothing in the engine.

        Raises:
            MixfuseError: The role is unknown or is the base, another adapter is staged for it (`kind` "conflict"), or
                the adapter is tampered with, of another base, of too high a rank, serving already, without the judge
                protocol of this version where the role is the judge, or refused by the engine.
        """
        self._swappable(role)
        if staged := self._staged.get(role):
            raise MixfuseError(
                f"a swap of role {role!r} to {staged.model} is under way; wait for its end", kind="conflict"
            )
        revision = Revision(f"{role}@?", directory=directory)
        self._staged[role] = revision
        try:
            manifest = await self._verified(role, directory)
            if manifest.revision == self._serving[role].revision:
                raise MixfuseError(f"{directory}: revision {manifest.revision} is serving {role!r} already")
            revision.model, revision.revision = f"{role}@{manifest.revision}", manifest.revision
            revision.calibration = manifest.calibration
            await self._load(revision)
        except BaseException:
            self._staged.pop(role, None)
            raise
        return revision

    async def commit(self, role: str, revision: Revision) -> Swap:
        """Serves `role` by a staged revision; returns when the old one has been drained and unloaded.

        Cancelled, it leaves the new one serving, and the old one is unloaded as soon as it is drained.

        Raises:
            MixfuseError: The revision is not staged for the role (`kind` "conflict").
        """
        return await self._retired(self._flip(role, revision))

    async def discard(self, revision: Revision) -> None:
        """Gives a staged revision up: it gets no more requests, and is unloaded when the last one is done."""
        role = next((role for role, staged in self._staged.items() if staged is revision), None)
        if role is None:
            return
        del self._staged[role]
        self.clear_canary(role)
        await asyncio.shield(self._retire(revision))

    def set_canary(self, role: str, revision: Revision, share: float) -> None:
        """Has a share of the role's leases, taken at random, be given a staged revision.

        Args:
            role: The role.
            revision: Staged for it.
            share: 0 to 1.

        Raises:
            MixfuseError: The revision is not staged for the role (`kind` "conflict").
        """
        self._check_staged(role, revision)
        self._canaries[role] = (revision, share)

    def clear_canary(self, role: str) -> None:
        """Gives all new leases the serving revision again; the canary stays staged."""
        self._canaries.pop(role, None)

    def _choose(self, role: str) -> Revision:
        serving = self._known(role)
        canary, share = self._canaries.get(role, (serving, 0.0))
        return canary if share and self._random() < share else serving

    def _flip(self, role: str, revision: Revision) -> tuple[Swap, Revision]:
        """Makes a staged revision the serving one; returns what was done, and the old one."""
        self._check_staged(role, revision)
        del self._staged[role]
        self.clear_canary(role)
        old, self._serving[role] = self._serving[role], revision
        logger.info("role %s: %s -> %s", role, old.revision or BASE, revision.revision)
        return Swap(role, old.revision, revision.revision, old.in_flight if old.revision else 0), old

    async def _retired(self, flipped: tuple[Swap, Revision]) -> Swap:
        swap, old = flipped
        if old.revision:
            await asyncio.shield(self._retire(old))
        return swap

    def _retire(self, revision: Revision) -> "asyncio.Task[None]":
        """Unloads a revision as soon as no request holds it."""

        async def retire() -> None:
            await revision.drained()
            await self._engine.unload_adapter(revision.model)

        task = asyncio.create_task(retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return task

    async def _load(self, revision: Revision) -> None:
        """Loads and probes; whatever goes wrong, cancelling too, nothing is left in the engine."""
        assert revision.directory is not None  # noqa: S101 - only adapters are loaded
        loading = asyncio.create_task(self._engine.load_adapter(revision.model, revision.directory.resolve()))
        try:
            await asyncio.shield(loading)
            await self._engine.probe(revision.model)
        except BaseException:
            await asyncio.wait({loading})  # half a load cannot be undone
            if not loading.cancelled() and loading.exception() is None:
                await self._engine.unload_adapter(revision.model)
            raise

    async def _verified(self, role: str, directory: Path) -> Manifest:
        manifest = await asyncio.to_thread(adapter.verify, directory, base=self._base)
        self._check(role, manifest, directory)
        return manifest

    def _check_staged(self, role: str, revision: Revision) -> None:
        if self._staged.get(role) is not revision or revision.revision is None:
            raise MixfuseError(f"{revision.model} is not staged for role {role!r}", kind="conflict")

    def _swappable(self, role: str) -> str:
        self._known(role)
        if role == BASE:
            raise MixfuseError("the role 'base' is the model without an adapter; it cannot be swapped")
        return role

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
