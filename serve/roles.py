"""The role table: which adapter revision serves each role, and the leases that requests hold on it.

A request leases the revision that serves its role when it begins, and keeps it until it ends. The revision stays loaded
that long. `serve/swap.py` changes what serves a role; `serve/slots.py` loads and unloads adapters.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from mixfuse.contracts.bounded_json import shortened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.serve.admission import Admission
from mixfuse.serve.role_record import Reason, RoleEntry, RoleRecord
from mixfuse.serve.slots import AdapterEngine, LoadCounts, Revision, Slots, Trouble

BASE = "base"
"""The role that always exists: the base model without an adapter."""


@dataclass(eq=False)
class RoleState:
    """One role in this table.

    Attributes:
        name: The role's name.
        serving: The revision that requests lease.
        staged: The revision that may replace it: loaded or being loaded, not serving.
        canary_share: The share of leases that get `staged`, as a canary.
        pinned: Whether the serving adapter stays loaded.
        version: The version of the shared record that this table has followed.
        since: When the serving revision began to serve, in seconds since 1970; None for the base from the start.
        problem: Why this table could not follow the shared record; None if it could.
        doing: What is done to `staged` now, or to what may become it; None if nothing is.
        prepared: The proposal of another gateway that `staged` was loaded for; None if it is this gateway's own.
        staged_for: Why `staged` was staged, for the history.
        expected_version: The record's version when `staged` was staged; a commit compares it.
        lock: Held while the role is changed.
    """

    name: str
    serving: Revision
    staged: Revision | None = None
    canary_share: float = 0.0
    pinned: bool = False
    version: int = 0
    since: float | None = None
    problem: str | None = None
    doing: str | None = None
    prepared: str | None = None
    staged_for: Reason = "swap"
    expected_version: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)

    def follow(self, entry: RoleEntry) -> None:
        """Takes over what the record says, apart from the revision."""
        self.version, self.pinned, self.since, self.problem = entry.version, entry.pinned, entry.since, None

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Says what is done while the block runs."""
        before, self.doing = self.doing, what
        try:
            yield
        finally:
            self.doing = before

    def unstage(self) -> None:
        """Forgets the staged revision; it gets no more leases."""
        self.staged, self.prepared, self.canary_share = None, None, 0.0


class RoleTable:
    """The roles of one engine.

    Args:
        engine: Loads the adapters; it must run when the first method is called.
        roles: Role names. The base serves each of them until an adapter is swapped in.
        admission: What an adapter must be to serve.
        max_loaded: How many adapters may be loaded at once, the least recently used making room; None: no limit.
        record: The shared record; None for a table that has no history and shares nothing.
        draw: Returns a number from 0 to 1 for each lease; below the canary's share, the canary gets the lease.

    Attributes:
        slots: The places for adapters in the engine.
        base: The base model, as a revision.
    """

    def __init__(
        self,
        engine: AdapterEngine,
        roles: list[str],
        admission: Admission,
        *,
        max_loaded: int | None = None,
        record: RoleRecord | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.engine, self.admission, self.record, self._draw = engine, admission, record, draw
        self.base = Revision(engine.base_model_name)
        self.slots = Slots(engine, max_loaded, recheck=admission.recheck, pinned=self._is_pinned)
        self._roles = {name: RoleState(name, self.base) for name in dict.fromkeys([BASE, *roles])}

    def names(self) -> list[str]:
        """Every role, the base first."""
        return list(self._roles)

    def serving(self) -> Mapping[str, Revision]:
        """The revision that serves each role now."""
        return {name: state.serving for name, state in self._roles.items()}

    def states(self) -> list[RoleState]:
        """Every role as it is now. Read it, do not change it."""
        return list(self._roles.values())

    def troubles(self) -> Mapping[str, Trouble]:
        """What keeps the engine from answering for a role: role → trouble; roles without any are left out."""
        found = {name: self.engine.trouble(state.serving.model) for name, state in self._roles.items()}
        return {name: trouble for name, trouble in found.items() if trouble is not None}

    def state(self, role: str) -> RoleState:
        """One role as it is now. Read it, do not change it.

        Raises:
            MixfuseError: The role is unknown (kind "role").
        """
        if role not in self._roles:
            known = ", ".join(self._roles)
            raise MixfuseError(f"unknown role {shortened(repr(role), 80)}; this server's roles: {known}", kind="role")
        return self._roles[role]

    def swappable(self, role: str) -> RoleState:
        """One role that an adapter can serve.

        Raises:
            MixfuseError: The role is unknown, or is the base.
        """
        state = self.state(role)
        if role == BASE:
            raise MixfuseError("the role 'base' is the model without an adapter; it cannot be swapped")
        return state

    @property
    def counts(self) -> LoadCounts:
        """How many adapters were loaded and evicted."""
        return self.slots.counts

    @property
    def loaded(self) -> int:
        """How many adapters are in the engine now."""
        return self.slots.loaded

    @asynccontextmanager
    async def lease(self, role: str) -> AsyncIterator[Revision]:
        """Leases the role's revision, or its canary. The revision stays loaded while the block runs.

        An adapter that is not loaded is loaded first.

        Raises:
            MixfuseError: The role is unknown, or its adapter cannot be loaded.
        """
        state = self.state(role)
        canary = state.staged if state.canary_share and self._draw() < state.canary_share else None
        async with self.hold(canary or state.serving) as revision:
            yield revision

    @asynccontextmanager
    async def hold(self, revision: Revision) -> AsyncIterator[Revision]:
        """Leases this revision, serving or staged. It stays loaded while the block runs.

        Raises:
            MixfuseError: It cannot be loaded.
        """
        revision.acquire()
        try:
            async with self.slots.resident(revision):
                yield revision
        finally:
            revision.release()

    def set_canary(self, role: str, revision: Revision, share: float) -> None:
        """Gives a random share of the role's leases to a staged revision.

        Args:
            role: The role.
            revision: The revision staged for it.
            share: The share of leases, from 0 to 1.

        Raises:
            MixfuseError: The revision is not staged for the role (kind "conflict").
        """
        state = self.state(role)
        check_staged(state, revision)
        state.canary_share = share

    def clear_canary(self, role: str) -> None:
        """Gives all new leases to the serving revision again. The canary stays staged."""
        self.state(role).canary_share = 0.0

    async def pin(self, role: str, pinned: bool) -> None:
        """Keeps a role's adapter loaded whatever else needs a place, or stops keeping it.

        Raises:
            MixfuseError: The role is unknown, or no place would be left for the other roles (kind "conflict").
        """
        state = self.swappable(role)
        places = self.slots.max_loaded
        others = sum(other.pinned for other in self._roles.values() if other is not state)
        if pinned and places is not None and others + 1 >= places and others + 2 < len(self._roles):
            raise MixfuseError(
                f"with {role!r} all {places} places (engine.max_loaded) would be pinned, and the other roles could not "
                "be served; unpin one or raise it",
                kind="conflict",
            )
        if self.record is not None:
            await self.record.pin(role, pinned)
        state.pinned = pinned
        if pinned:
            async with self.lease(role):
                pass  # the lease loads it

    async def has_served(self, role: str, revision: str) -> bool:
        """Whether a revision serves the role now, or did at any time."""
        if self.state(role).serving.revision == revision:
            return True
        return self.record is not None and await self.record.has_served(role, revision)

    def _is_pinned(self, revision: Revision) -> bool:
        return any(state.pinned and state.serving is revision for state in self._roles.values())


def check_staged(state: RoleState, revision: Revision) -> None:
    """Raises a MixfuseError of kind "conflict" if the revision is not staged for the role."""
    if state.staged is not revision:
        raise MixfuseError(f"{revision.model} is not staged for role {state.name!r}", kind="conflict")
