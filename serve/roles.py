"""The role table: which adapter revision serves each role, and how one takes another's place under load.

A swap is verify → load under a revision-qualified name → probe → record → flip → drain → unload. Requests hold a lease
on the revision they began with, so none fails because of a swap; any failure before the flip leaves the old one
serving, and nothing of the new one in the engine.

Several tables, each before an engine of its own, agree by a shared record (`RoleStore`): who swaps writes there before
it flips, and only if nobody else has written meanwhile; the others follow by themselves.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from mixfuse.contracts import adapter, judge_protocol
from mixfuse.contracts.adapter import Fingerprint, Manifest
from mixfuse.contracts.errors import MixfuseError
from mixfuse.serve import probes
from mixfuse.serve.slots import AdapterEngine, Counts, Revision, Slots

__all__ = [
    "BASE",
    "JUDGE",
    "AdapterEngine",
    "Entry",
    "Revision",
    "RoleState",
    "RoleStore",
    "RoleTable",
    "Swap",
    "Why",
]

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

BASE = "base"
"""The role that is always there: the base model without an adapter."""

JUDGE = "judge"

Why = Literal[
    "config",
    "swap",
    "rollback",
    "watch",
    "shadow",
    "shadow-rollback",
    "canary",
    "canary-rollback",
    "pin",
    "unpin",
]
"""What a line of a role's history is for."""

# A revision that another gateway has swapped to and this one cannot load is tried again: its files may be on their way.
_RETRY_S = 60.0


@dataclass(frozen=True)
class Entry:
    """What the shared record says of a role.

    Attributes:
        role: The role.
        version: Counts the changes of what serves it.
        revision: The adapter revision that serves it; None for the base.
        directory: Where that lies; None for the base.
        pinned: It stays loaded.
        since: When it began to serve, in seconds since 1970.
        gateway: Which gateway had it changed.
    """

    role: str
    version: int
    revision: str | None
    directory: str | None
    pinned: bool
    since: float
    gateway: str


class RoleStore(Protocol):
    """The record that several tables share (`mixfuse.app.roles_store.StoredRoles` is one).

    Each method raises MixfuseError of kind "trace_db" where it cannot be reached.

    Attributes:
        name: Where it is, as `--db` takes it.
    """

    name: str

    async def read(self) -> Mapping[str, Entry]:
        """All roles it knows."""
        ...

    async def change(self, role: str, expected: int, revision: str | None, directory: Path | None, why: Why) -> Entry:
        """Records what serves a role from now on.

        Raises:
            MixfuseError: The role's version is not `expected` (0: not known yet) any more (kind "conflict").
        """
        ...

    async def refused(self, role: str, revision: str | None, directory: Path | None, why: Why, error: str) -> None:
        """Notes in the history that something was not done."""
        ...

    async def before(self, role: str) -> Entry:
        """What a rollback leads to, with the version the role has now.

        Raises:
            MixfuseError: Nothing served the role before (kind "conflict").
        """
        ...

    async def had(self, role: str, revision: str) -> bool:
        """Whether a revision ever served the role."""
        ...

    async def pin(self, role: str, pinned: bool) -> Entry:
        """Records whether a role's adapter has to stay loaded."""
        ...


@dataclass(frozen=True)
class Swap:
    """What a swap did; `old` and `new` are revisions, None for the base."""

    role: str
    old: str | None
    new: str | None
    drained: int


@dataclass(eq=False)
class RoleState:
    """A role as this table has it.

    Attributes:
        name: Of the role.
        serving: What its requests are given.
        staged: What may take its place: loaded or being loaded, not serving.
        share: The share of requests that `staged` is given as a canary.
        pinned: What serves it stays loaded.
        version: Of the shared record, as far as this table has followed.
        since: When it began to serve, in seconds since 1970; None for the base from the start.
        problem: Why this table could not follow the record, where it could not.
    """

    name: str
    serving: Revision
    staged: Revision | None = None
    share: float = 0.0
    pinned: bool = False
    version: int = 0
    since: float | None = None
    problem: str | None = None
    _why: Why = "swap"
    _expected: int = 0
    _tried: tuple[int, float] = (0, 0.0)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)


class RoleTable:
    """The roles of one engine.

    Args:
        engine: Where the adapters are loaded; it has to run when the first method is called.
        base: Fingerprint of the model it serves; adapters of another are refused.
        roles: Role names; each is served by the base until an adapter is swapped in.
        max_rank: The engine's largest LoRA rank.
        max_loaded: How many adapters are loaded at once, the least recently used making room; None: all of them.
        store: The shared record; None for a table by itself, which has no history.
        verify: Checks an adapter directory and returns its manifest; `adapter.verify`, in full or in part.
        probe_tolerance: How far stored log-probabilities may be off, in nats; None: as stored, which is for float32.
        draw: Numbers from 0 to 1 that say which lease is the canary's.
    """

    def __init__(
        self,
        engine: AdapterEngine,
        base: Fingerprint,
        roles: list[str],
        *,
        max_rank: int,
        max_loaded: int | None = None,
        store: RoleStore | None = None,
        verify: Callable[..., Manifest] = adapter.verify,
        probe_tolerance: float | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._engine, self._base, self._max_rank, self._store = engine, base, max_rank, store
        self._verify, self._probe_tolerance, self._draw = verify, probe_tolerance, draw
        self._plain = Revision(engine.base_model_name)
        self._roles = {name: RoleState(name, self._plain) for name in dict.fromkeys([BASE, *roles])}
        self._slots = Slots(engine, max_loaded, verify=self._unchanged, pinned=self._is_pinned)
        self._leaving: dict[str, tuple[Revision, asyncio.Task[None]]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def names(self) -> list[str]:
        """Every role, the base first."""
        return list(self._roles)

    def serving(self) -> Mapping[str, Revision]:
        """Which revision serves each role now."""
        return {name: state.serving for name, state in self._roles.items()}

    def states(self) -> list[RoleState]:
        """Every role as it is now; to be read, not changed."""
        return list(self._roles.values())

    def state(self, role: str) -> RoleState:
        """One role as it is now; to be read, not changed.

        Raises:
            MixfuseError: The role is unknown.
        """
        return self._known(role)

    @property
    def counts(self) -> Counts:
        """Adapters that came and went."""
        return self._slots.counts

    @property
    def loaded(self) -> int:
        """How many adapters are in the engine now."""
        return self._slots.loaded

    @asynccontextmanager
    async def lease(self, role: str) -> AsyncIterator[Revision]:
        """Pins the role's revision: it stays loaded for as long as the block runs. Loads it first where it is not.

        Raises:
            MixfuseError: The role is unknown, or its adapter cannot be loaded.
        """
        state = self._known(role)
        canary = state.staged if state.share and self._draw() < state.share else None
        async with self.hold(canary or state.serving) as revision:
            yield revision

    @asynccontextmanager
    async def hold(self, revision: Revision) -> AsyncIterator[Revision]:
        """Pins this revision, a staged one too: it stays loaded for as long as the block runs.

        Raises:
            MixfuseError: It cannot be loaded.
        """
        revision._enter()
        try:
            async with self._slots.held(revision):
                yield revision
        finally:
            revision._leave()

    async def swap(self, role: str, directory: Path, *, why: Why = "swap") -> Swap:
        """Serves `role` by the adapter in `directory` from now on; `stage` and `commit` in one.

        Raises:
            MixfuseError: As `stage` and `commit`. The old revision is still serving then.
        """
        state = self._swappable(role)
        async with state._turn:
            revision = await self._stage(state, directory, why)
            if revision is None:
                return await self._agree(state, directory, why)
            swap, retiring = await self._to_the_end(self._commit(state, revision))
        await asyncio.shield(retiring)
        return swap

    async def stage(self, role: str, directory: Path, *, why: Why = "swap") -> Revision:
        """Verifies an adapter, loads it beside what serves the role, and probes it. It does not serve yet.

        `commit` or `discard` has to follow; until then no other adapter can be staged for the role. Cancelled, it
        leaves nothing in the engine.

        Args:
            role: The role.
            directory: The adapter directory.
            why: What the role's history shall say.

        Raises:
            MixfuseError: The role is unknown or is the base, another adapter is staged for it or this one is serving
                (`kind` "conflict"), or the adapter is tampered with, of another base, of too high a rank, without the
                judge protocol of this version where the role is the judge, refused or ignored by the engine, or does
                not answer there as it was stored.
        """
        state = self._swappable(role)
        async with state._turn:
            revision = await self._stage(state, directory, why)
        if revision is None:
            raise MixfuseError(
                f"{directory}: revision {state.serving.revision} is serving {role!r} already", kind="conflict"
            )
        return revision

    async def commit(self, role: str, revision: Revision) -> Swap:
        """Serves `role` by a staged revision; returns when the old one has been drained and unloaded.

        Cancelled, it comes to its end all the same.

        Raises:
            MixfuseError: The revision is not staged for the role, or somebody else changed the role since it was
                (`kind` "conflict"), or that could not be recorded. The revision is discarded then.
        """
        state = self._swappable(role)
        async with state._turn:
            swap, retiring = await self._to_the_end(self._commit(state, revision))
        await asyncio.shield(retiring)
        return swap

    async def discard(self, revision: Revision, *, why: Why = "canary-rollback", reason: str | None = None) -> None:
        """Gives a staged revision up: it gets no more requests, and is unloaded when the last one is done.

        Args:
            revision: Staged; where it is not, nothing is done.
            why: What the role's history shall say, with
            reason: why it was given up; None: nothing is written there.
        """
        state = next((state for state in self._roles.values() if state.staged is revision), None)
        if state is None:
            return
        state.share = 0.0
        async with state._turn:
            if state.staged is not revision:
                return
            retiring = self._give_up(state, revision)
            if reason is not None:
                await self._note(state, revision, why, reason)
        await asyncio.shield(retiring)

    def set_canary(self, role: str, revision: Revision, share: float) -> None:
        """Has a share of the role's leases, taken at random, be given a staged revision.

        Args:
            role: The role.
            revision: Staged for it.
            share: 0 to 1.

        Raises:
            MixfuseError: The revision is not staged for the role (`kind` "conflict").
        """
        state = self._known(role)
        self._check_staged(state, revision)
        state.share = share

    def clear_canary(self, role: str) -> None:
        """Gives all new leases the serving revision again; the canary stays staged."""
        self._known(role).share = 0.0

    async def rollback(self, role: str) -> Swap:
        """Serves `role` by what served it before the last swap; again and again walks further back.

        It is verified, loaded and probed as in any swap.

        Raises:
            MixfuseError: Nothing served it before, or as `swap`.
        """
        state = self._swappable(role)
        if self._store is None:
            raise MixfuseError("this server keeps no record of its roles: there is nothing to go back to")
        async with state._turn:
            self._check_unstaged(state)
            target = await self._store.before(role)
            if target.revision is None or target.directory is None:
                revision: Revision | None = self._plain
                state.staged, state._why, state._expected = self._plain, "rollback", target.version
            else:
                revision = await self._stage(state, Path(target.directory), "rollback", target=target)
            if revision is None:  # a table that could not follow the last swap
                return await self._agree(state, Path(target.directory or ""), "rollback")
            swap, retiring = await self._to_the_end(self._commit(state, revision))
        await asyncio.shield(retiring)
        return swap

    async def pin(self, role: str, pinned: bool) -> None:
        """Has a role's adapter stay loaded, whatever needs a place; or not any more.

        Raises:
            MixfuseError: The role is unknown, or no place would be left for the others (`kind` "conflict").
        """
        state = self._swappable(role)
        most = self._slots.most
        others = sum(one.pinned for one in self._roles.values() if one is not state)
        if pinned and most is not None and others + 1 >= most and others + 2 < len(self._roles):
            raise MixfuseError(
                f"with {role!r} all {most} places (engine.max_loaded) would be pinned, and the other roles could not "
                "be served; unpin one or raise it",
                kind="conflict",
            )
        if self._store is not None:
            await self._store.pin(role, pinned)
        state.pinned = pinned
        if pinned:
            async with self.lease(role):
                pass  # it is loaded now

    async def had(self, role: str, revision: str) -> bool:
        """Whether a revision serves the role, or did at any time."""
        if self._known(role).serving.revision == revision:
            return True
        return self._store is not None and await self._store.had(role, revision)

    async def start(self, seeds: Mapping[str, Path | None], *, anew: bool = False) -> dict[str, str]:
        """Serves every role by what the shared record says, or by the config where it does not know the role yet.

        Args:
            seeds: Role → adapter directory, or None for the base.
            anew: Take all of them from the config, and have the record say so.

        Returns:
            Where each role's revision was taken from: "config" or "role table".

        Raises:
            MixfuseError: An adapter cannot be served; the first one, with how to mend it.
        """
        self._plain.model = self._engine.base_model_name  # someone else's engine says it once it is reached
        known = dict(await self._store.read()) if self._store is not None else {}
        where = self._store.name if self._store is not None else ""
        taken = {}
        for role, directory in seeds.items():
            state = self._swappable(role)
            if anew or role not in known:
                try:
                    await self._seed(state, directory)
                    taken[role] = "config"
                    continue
                except MixfuseError as error:
                    if error.kind != "conflict" or self._store is None:
                        raise
                    known = dict(await self._store.read())  # another gateway that starts was first
            try:
                await self._adopt(state, known[role])
            except MixfuseError as error:
                raise MixfuseError(
                    f"role {role!r} cannot be served as the role table says: {error}. Put that right, or go back to "
                    f"the revision before (mixfuse roles rollback {role} --db {where}), or start from the config "
                    "(roles_from=config)",
                    kind=error.kind,
                ) from None
            taken[role] = "role table"
        return taken

    async def follow(self) -> None:
        """Brings the roles to where the shared record has them, where another table has changed it.

        What cannot be followed is `RoleState.problem`; the role is served as before then.

        Raises:
            MixfuseError: The record cannot be read.
        """
        if self._store is None:
            return
        for role, entry in (await self._store.read()).items():
            state = self._roles.get(role)
            if state is None or role == BASE:
                continue
            state.pinned = entry.pinned
            if entry.version == state.version or state._turn.locked():
                continue
            now = asyncio.get_running_loop().time()
            version, at = state._tried
            if version == entry.version and now < at + _RETRY_S:
                continue
            try:
                async with state._turn:
                    await self._adopt(state, entry)
            except MixfuseError as error:
                state._tried = (entry.version, now)
                state.problem = f"{entry.gateway} swapped to {entry.revision or BASE}, which cannot serve here: {error}"
                logger.warning("role %s: %s", role, state.problem)

    async def close(self) -> None:
        """Ends what is under way: nothing is half loaded afterwards."""
        for revision, retiring in list(self._leaving.values()):
            if revision.in_flight:  # by requests that the end does not wait for
                retiring.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._slots.close()

    async def _seed(self, state: RoleState, directory: Path | None) -> None:
        if directory is not None:
            revision = await self._stage(state, directory, "config")
            if revision is not None:
                await self._to_the_end(self._commit(state, revision))
        elif self._store is not None:
            version = await self._version(state)
            self._followed(state, await self._store.change(state.name, version, None, None, "config"))

    async def _adopt(self, state: RoleState, entry: Entry) -> None:
        """Serves what the record says, which somebody else has written there."""
        if entry.revision == state.serving.revision:
            self._followed(state, entry)
            return
        new = self._plain
        if entry.revision is not None and entry.directory is not None:
            directory = Path(entry.directory)
            manifest = await self._verified(state.name, directory, expect=entry.revision)
            new = _revision(state.name, manifest, directory)
            if state.staged is not None and state.staged.model == new.model:
                return  # being loaded for a swap or as a canary; the next time
            new = await self._load(state, new)
        self._followed(state, entry)
        self._flip(state, new)

    def _followed(self, state: RoleState, entry: Entry) -> None:
        state.version, state.pinned, state.since, state.problem = entry.version, entry.pinned, entry.since, None

    async def _stage(
        self, state: RoleState, directory: Path, why: Why, *, target: Entry | None = None
    ) -> Revision | None:
        """Stages an adapter, the one of that entry where one is given; None where it is what serves the role."""
        self._check_unstaged(state)
        found = target.revision if target is not None else None
        try:
            version = target.version if target is not None else await self._version(state)
            manifest = await self._verified(state.name, directory, expect=found)
            found = manifest.revision
            if manifest.revision == state.serving.revision:
                return None
            state.staged = new = _revision(state.name, manifest, directory)
            try:
                new = await self._load(state, new)
            except BaseException:
                state.staged = None
                raise
        except MixfuseError as error:
            await self._note(state, Revision(state.name, found, directory), why, str(error))
            raise
        state.staged, state._why, state._expected = new, why, version
        return new

    async def _load(self, state: RoleState, new: Revision) -> Revision:
        """Loads and probes a revision; whatever goes wrong, cancelling too, nothing is left in the engine."""
        directory = new.directory
        assert directory is not None  # noqa: S101 - only adapters are loaded
        leaving, _ = self._leaving.get(new.model, (None, None))
        if leaving is not None and leaving.directory == directory and leaving.loaded:
            del self._leaving[new.model]  # it is still there, for its last requests: it stays
            leaving.stay_on()
            new = leaving
        else:
            await self._slots.stage(new)
        try:
            async with self._slots.held(new):
                await probes.check(
                    self._engine,
                    new.model,
                    directory,
                    tolerance=self._probe_tolerance,
                    verdicts=state.name == JUDGE,
                )
        except BaseException:
            await asyncio.shield(self._retire(new))
            raise
        return new

    async def _commit(self, state: RoleState, revision: Revision) -> tuple[Swap, "asyncio.Task[None]"]:
        self._check_staged(state, revision)
        if self._store is not None:
            try:
                entry = await self._store.change(
                    state.name, state._expected, revision.revision, revision.directory, state._why
                )
            except BaseException:
                await self._give_up(state, revision)
                raise
            self._followed(state, entry)
        old = state.serving
        swap = Swap(state.name, old.revision, revision.revision, old.in_flight if old.revision else 0)
        return swap, self._flip(state, revision)

    def _flip(self, state: RoleState, new: Revision) -> "asyncio.Task[None]":
        """Makes a revision the serving one; returns the unloading of the old one."""
        if state.staged is new:
            state.staged, state.share = None, 0.0
        old, state.serving = state.serving, new
        self._slots.settle(new)
        logger.info("role %s: %s -> %s", state.name, old.revision or BASE, new.revision or BASE)
        return self._retire(old)

    def _retire(self, revision: Revision) -> "asyncio.Task[None]":
        """Unloads a revision as soon as no request holds it."""

        async def retire() -> None:
            await revision.drained()
            if self._leaving.get(revision.model) == leaving:
                del self._leaving[revision.model]
                await self._slots.remove(revision)

        if revision.revision is None:
            return self._task(asyncio.sleep(0))
        task = self._task(retire())
        self._leaving[revision.model] = leaving = (revision, task)
        return task

    def _give_up(self, state: RoleState, revision: Revision) -> "asyncio.Task[None]":
        state.staged, state.share = None, 0.0
        return self._retire(revision)

    async def _agree(self, state: RoleState, directory: Path, why: Why) -> Swap:
        """Has the record say what serves the role here already."""
        serving = state.serving
        if self._store is not None:
            entry = (await self._store.read()).get(state.name)
            if entry is None or entry.revision != serving.revision:
                expected = entry.version if entry is not None else 0
                entry = await self._store.change(state.name, expected, serving.revision, directory, why)
            self._followed(state, entry)
        return Swap(state.name, serving.revision, serving.revision, 0)

    async def _version(self, state: RoleState) -> int:
        entry = (await self._store.read()).get(state.name) if self._store is not None else None
        return entry.version if entry is not None else 0

    async def _note(self, state: RoleState, revision: Revision, why: Why, error: str) -> None:
        """Writes into the history that something was not done; that is not worth another failure."""
        if self._store is None:
            return
        try:
            await self._store.refused(state.name, revision.revision, revision.directory, why, error)
        except MixfuseError as unwritten:
            logger.warning("role %s: the history does not say that %s; %s", state.name, error, unwritten)

    async def _verified(self, role: str, directory: Path, *, expect: str | None = None) -> Manifest:
        manifest = await self._read(role, directory, expect)
        await asyncio.to_thread(adapter.check_finite, directory)
        return manifest

    async def _read(self, role: str, directory: Path, expect: str | None) -> Manifest:
        manifest = await asyncio.to_thread(self._verify, directory, base=self._base)
        if expect is not None and manifest.revision != expect:
            raise MixfuseError(f"{directory} holds revision {manifest.revision} now, not {expect}", kind="adapter")
        self._check(role, manifest, directory)
        return manifest

    async def _unchanged(self, revision: Revision) -> None:
        """Checks the files of a revision that comes back into the engine; equal weights are finite still."""
        assert revision.directory is not None  # noqa: S101 - only adapters are loaded
        await self._read(revision.model.rpartition("@")[0], revision.directory, revision.revision)

    def _is_pinned(self, revision: Revision) -> bool:
        return any(state.pinned and state.serving is revision for state in self._roles.values())

    def _task(self, work: Coroutine[Any, Any, Result]) -> "asyncio.Task[Result]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("%s", error)  # whoever still waits for it is told

    async def _to_the_end(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Awaits `work`; it comes to its end even where who waits for it is cancelled."""
        return await asyncio.shield(self._task(work))

    def _known(self, role: str) -> RoleState:
        if role not in self._roles:
            raise MixfuseError(f"unknown role {role!r}; this server's roles: {', '.join(self._roles)}", kind="role")
        return self._roles[role]

    def _swappable(self, role: str) -> RoleState:
        state = self._known(role)
        if role == BASE:
            raise MixfuseError("the role 'base' is the model without an adapter; it cannot be swapped")
        return state

    def _check_unstaged(self, state: RoleState) -> None:
        if state.staged is not None:
            raise MixfuseError(
                f"a swap of role {state.name!r} to {state.staged.model} is under way; wait for its end", kind="conflict"
            )

    def _check_staged(self, state: RoleState, revision: Revision) -> None:
        if state.staged is not revision:
            raise MixfuseError(f"{revision.model} is not staged for role {state.name!r}", kind="conflict")

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


def _revision(role: str, manifest: Manifest, directory: Path) -> Revision:
    return Revision(f"{role}@{manifest.revision}", manifest.revision, directory, manifest.calibration)
