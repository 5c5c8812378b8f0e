"""The swap: how one adapter revision takes another's place while requests run, and how long the old one drains.

A swap has two phases where gateways share engines. In the first, this gateway verifies the adapter, loads it as
`ROLE@REVISION` and probes it, and then each of the others does. Only if all have it ready, the change is recorded and
the roles flip. The old revision drains and is unloaded, and the swap waits until the others serve the same. If anything
fails before the change, the old revision serves on at all of them, and nothing of the new one is left in the engines.

The drain has no time limit of its own. The old revision stays loaded until the last request that leases it has ended,
and each request ends by its own deadline (a member's `timeout_s`, the modes' `deadline_ms`). `swap` and `commit` return
when the old revision is unloaded. Only the server's end cuts a drain short (`close`).
"""

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mixfuse.contracts.errors import MixfuseError
from mixfuse.serve.admission import JUDGE
from mixfuse.serve.probes import Prober
from mixfuse.serve.role_record import Proposal, Reason, RoleEntry
from mixfuse.serve.roles import BASE, RoleState, RoleTable, check_staged
from mixfuse.serve.slots import Revision

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Swap:
    """What a swap did.

    Attributes:
        role: The role.
        old: The revision that served before; None for the base.
        new: The revision that serves now; None for the base.
        drained: How many requests were still on the old revision at the flip.
    """

    role: str
    old: str | None
    new: str | None
    drained: int


class Swapper:
    """Swaps the roles of one table.

    Args:
        table: The role table.
    """

    def __init__(self, table: RoleTable) -> None:
        self.table = table
        self._prober = Prober()
        self._draining: dict[str, tuple[Revision, asyncio.Task[None]]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def swap(self, role: str, directory: Path, *, why: Reason = "swap") -> Swap:
        """Serves `role` by the adapter in `directory` from now on: `stage` and `commit` in one call.

        Raises:
            MixfuseError: As for `stage` and `commit`; the old revision serves on.
        """
        state = self.table.swappable(role)
        async with state.lock:
            revision = await self._stage(state, directory, why)
            if revision is None:
                return await self._record_serving(state, directory, why)
            swap, drain = await self._uninterrupted(self._commit(state, revision))
            version = state.version
        await asyncio.shield(drain)
        await self._followed(role, version)
        return swap

    async def stage(self, role: str, directory: Path, *, why: Reason = "swap") -> Revision:
        """Verifies an adapter, loads it beside the serving one, and probes it. It does not serve yet.

        Call `commit` or `discard` next; until then no other adapter can be staged for the role. A cancelled call leaves
        nothing in the engine.

        Args:
            role: The role.
            directory: The adapter directory.
            why: The reason, for the role's history.

        Raises:
            MixfuseError: The role is unknown or is the base; another adapter is staged for it or this one serves it
                already (kind "conflict"); the adapter was tampered with, has another base, too high a rank, or (for the
                judge) another judge protocol; the engine refuses or ignores it; or its answers differ from those stored
                with it.
        """
        state = self.table.swappable(role)
        async with state.lock:
            revision = await self._stage(state, directory, why)
        if revision is None:
            raise MixfuseError(
                f"{directory}: revision {state.serving.revision} is serving {role!r} already", kind="conflict"
            )
        return revision

    async def commit(self, role: str, revision: Revision) -> Swap:
        """Serves `role` by a staged revision. Returns when the old one is drained and unloaded.

        A cancelled call completes in the background.

        Raises:
            MixfuseError: The revision is not staged for the role, another gateway has changed the role since it was
                staged (kind "conflict"), one that shares the engines cannot serve it, or the change could not be
                recorded. The revision is discarded in all but the first case.
        """
        state = self.table.swappable(role)
        async with state.lock:
            swap, drain = await self._uninterrupted(self._commit(state, revision))
            version = state.version
        await asyncio.shield(drain)
        await self._followed(role, version)
        return swap

    async def discard(self, revision: Revision, *, why: Reason = "canary-rollback", reason: str | None = None) -> None:
        """Gives up a staged revision. It gets no more leases, and is unloaded when its last request has ended.

        Args:
            revision: The revision; nothing happens if it is not staged.
            why: The kind of line in the role's history.
            reason: The text of that line; None writes no line.
        """
        state = next((state for state in self.table.states() if state.staged is revision), None)
        if state is None:
            return
        state.canary_share = 0.0
        async with state.lock:
            if state.staged is not revision:
                return
            drain = self._discard(state, revision)
            if reason is not None:
                await self._note_refusal(state, revision, why, reason)
        await asyncio.shield(drain)

    async def rollback(self, role: str) -> Swap:
        """Serves `role` by the revision before the last swap. Each further call goes one revision further back.

        The adapter is verified, loaded and probed as in any swap.

        Raises:
            MixfuseError: Nothing served the role before, or as for `swap`.
        """
        state, record = self.table.swappable(role), self.table.record
        if record is None:
            raise MixfuseError("this server keeps no record of its roles: there is nothing to go back to")
        async with state.lock:
            await self.drop_withdrawn(state)
            _check_unstaged(state)
            target = await record.rollback_target(role)
            if target.revision is None or target.directory is None:
                revision: Revision | None = self.table.base
                state.staged, state.staged_for, state.expected_version = self.table.base, "rollback", target.version
            else:
                revision = await self._stage(state, Path(target.directory), "rollback", target=target)
            if revision is None:  # this table could not follow the last swap, so it serves the target still
                return await self._record_serving(state, Path(target.directory or ""), "rollback")
            swap, drain = await self._uninterrupted(self._commit(state, revision))
            version = state.version
        await asyncio.shield(drain)
        await self._followed(role, version)
        return swap

    async def adopt(self, state: RoleState, entry: RoleEntry) -> None:
        """Serves what the shared record says. The caller holds the role's lock, or nothing else runs yet.

        Raises:
            MixfuseError: The adapter cannot be served here.
        """
        if state.prepared is not None and state.staged is not None:
            if state.staged.revision == entry.revision:
                state.follow(entry)
                self._flip(state, state.staged)
                return
            self._discard(state, state.staged)
        if entry.revision == state.serving.revision:
            state.follow(entry)
            return
        revision = self.table.base
        if entry.revision is not None and entry.directory is not None:
            directory = Path(entry.directory)
            revision = await self.table.admission.admit(state.name, directory, expected_revision=entry.revision)
            if state.staged is not None and state.staged.model == revision.model:
                self.table.admission.forget(revision)
                return  # a swap or a canary is loading it; the next call follows
            revision = await self._load(state, revision)
        state.follow(entry)
        self._flip(state, revision)

    async def prepare(self, state: RoleState, proposal: Proposal) -> None:
        """Loads and probes what another gateway is about to swap in. The caller holds the role's lock.

        Raises:
            MixfuseError: It cannot be served here; nothing is left in the engine.
        """
        _check_unstaged(state)
        await self._admit_and_load(state, Path(proposal.directory), proposal.revision)
        if state.staged is not None:  # otherwise it serves already
            state.prepared = proposal.id

    async def drop_withdrawn(self, state: RoleState) -> None:
        """Gives up what was prepared for another gateway that did not swap it in. The caller holds the role's lock."""
        record = self.table.record
        if state.prepared is None or state.staged is None or record is None:
            return
        proposed = (await record.proposals()).get(state.name)
        entry = (await record.read()).get(state.name)
        if entry is not None and entry.version != state.version:
            await self.adopt(state, entry)
        elif proposed is None or proposed.id != state.prepared:
            self._discard(state, state.staged)

    async def close(self) -> None:
        """Ends what is in progress: no load or unload is cut in half. Drains that still wait are given up."""
        for revision, drain in list(self._draining.values()):
            if revision.in_flight:
                drain.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self.table.slots.close()

    async def _stage(
        self, state: RoleState, directory: Path, why: Reason, *, target: RoleEntry | None = None
    ) -> Revision | None:
        """Stages the adapter in `directory`, which must hold `target`'s revision if one is passed.

        Returns:
            The staged revision; None if it serves the role already.
        """
        await self.drop_withdrawn(state)
        _check_unstaged(state)
        name = target.revision if target is not None else None
        try:
            version = target.version if target is not None else await self._record_version(state)
            revision = await self._admit_and_load(state, directory, name, urgent=why == "rollback")
        except MixfuseError as error:
            await self._note_refusal(state, Revision(state.name, name, directory), why, str(error))
            raise
        if revision is not None:
            state.staged_for, state.expected_version = why, version
        return revision

    async def _admit_and_load(
        self, state: RoleState, directory: Path, name: str | None, *, urgent: bool = False
    ) -> Revision | None:
        """Stages the adapter in `directory`, which must hold revision `name` if one is passed; None if it serves."""
        with state.during("verifying and copying"):
            revision = await self.table.admission.admit(state.name, directory, expected_revision=name)
        if revision.revision == state.serving.revision:
            self.table.admission.forget(revision)
            return None
        state.staged = revision
        try:
            state.staged = await self._load(state, revision, urgent=urgent)
        except BaseException:
            state.staged = None
            raise
        return state.staged

    async def _load(self, state: RoleState, revision: Revision, *, urgent: bool = False) -> Revision:
        """Loads and probes a revision. If that fails or is cancelled, nothing is left in the engine.

        Args:
            state: The role.
            revision: The revision.
            urgent: Whether requests may wait for the probes.

        Returns:
            The revision; the draining one if the same revision still drains, which then stays loaded.
        """
        directory = revision.directory
        assert directory is not None  # noqa: S101 - the base is never loaded
        draining, _ = self._draining.get(revision.model, (None, None))
        if draining is not None and draining.directory == directory and draining.loaded:
            del self._draining[revision.model]
            draining.cancel_drain()
            self.table.admission.forget(revision)
            revision = draining
        else:
            try:
                with state.during("loading"):
                    await self.table.slots.stage(revision)
            except BaseException:  # cancelled, too: nothing is left in the engine
                self.table.admission.forget(revision)
                raise
        try:
            with state.during("probing"):
                async with self.table.slots.resident(revision):
                    await self._prober.check(
                        self.table.engine,
                        revision.model,
                        directory,
                        self.table.admission.terms,
                        verdicts=state.name == JUDGE,
                        urgent=urgent,
                    )
        except BaseException:
            await asyncio.shield(self._drain(revision))
            raise
        return revision

    async def _commit(self, state: RoleState, revision: Revision) -> tuple[Swap, "asyncio.Task[None]"]:
        """Records the change, then flips. Returns the swap and the drain of the old revision."""
        check_staged(state, revision)
        if self.table.record is not None:
            try:
                entry = await self._change(state, revision)
            except MixfuseError as error:
                await self._discard(state, revision)
                if error.kind == "adapter":
                    await self._note_refusal(state, revision, state.staged_for, str(error))
                raise
            except BaseException:
                await self._discard(state, revision)
                raise
            state.follow(entry)
        old = state.serving
        swap = Swap(state.name, old.revision, revision.revision, old.in_flight if old.revision else 0)
        return swap, self._flip(state, revision)

    async def _change(self, state: RoleState, revision: Revision) -> RoleEntry:
        """Records the change, once the gateways that share the engines have an adapter ready."""
        record = self.table.record
        assert record is not None  # noqa: S101 - the caller has one
        change = partial(record.change, state.name, state.expected_version, revision.revision, revision.directory)
        if revision.revision is None or revision.directory is None:
            return await change(state.staged_for)
        with state.during("waiting for the gateways that share the engines"):
            async with record.agreed(state.name, revision.revision, revision.directory):
                return await change(state.staged_for)

    def _flip(self, state: RoleState, new: Revision) -> "asyncio.Task[None]":
        """Gives all new leases to `new`. Returns the drain of the old revision."""
        if state.staged is new:
            state.unstage()
        old, state.serving = state.serving, new
        self.table.slots.settle(new)
        logger.info("role %s: %s -> %s", state.name, old.revision or BASE, new.revision or BASE)
        return self._drain(old)

    def _drain(self, revision: Revision) -> "asyncio.Task[None]":
        """Unloads a revision as soon as no request leases it."""

        async def drain() -> None:
            await revision.drained()
            if self._draining.get(revision.model) == draining:  # unless the revision serves again
                del self._draining[revision.model]
                await self.table.slots.remove(revision)
                self.table.admission.forget(revision)

        if revision.revision is None:
            return self._background(asyncio.sleep(0))
        task = self._background(drain())
        self._draining[revision.model] = draining = (revision, task)
        return task

    def _discard(self, state: RoleState, revision: Revision) -> "asyncio.Task[None]":
        state.unstage()
        return self._drain(revision)

    async def _record_serving(self, state: RoleState, directory: Path, why: Reason) -> Swap:
        """Makes the record say what serves the role here already, and the engine have it."""
        serving, record = state.serving, self.table.record
        if serving.loaded and serving.revision is not None:
            await self.table.engine.repair(serving.model)
        if record is not None:
            entry = (await record.read()).get(state.name)
            if entry is None or entry.revision != serving.revision:
                expected = entry.version if entry is not None else 0
                entry = await record.change(state.name, expected, serving.revision, directory, why)
            state.follow(entry)
        return Swap(state.name, serving.revision, serving.revision, 0)

    async def _followed(self, role: str, version: int) -> None:
        """Waits until the gateways that share the engines serve what this one does; the swap is done in any case."""
        if self.table.record is None:
            return
        try:
            await self.table.record.followed(role, version)
        except MixfuseError as error:
            logger.warning("role %s: whether all gateways serve version %d is not known: %s", role, version, error)

    async def _record_version(self, state: RoleState) -> int:
        entry = (await self.table.record.read()).get(state.name) if self.table.record is not None else None
        return entry.version if entry is not None else 0

    async def _note_refusal(self, state: RoleState, revision: Revision, why: Reason, error: str) -> None:
        """Writes a refusal into the history. A record that cannot be reached must not hide the refusal itself."""
        if self.table.record is None:
            return
        try:
            await self.table.record.note_refusal(state.name, revision.revision, revision.directory, why, error)
        except MixfuseError as failure:
            logger.warning("role %s: the history does not have this refusal: %s; %s", state.name, error, failure)

    def _background(self, work: Coroutine[Any, Any, Result]) -> "asyncio.Task[Result]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._background_done)
        return task

    def _background_done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("%s", error)  # raised where the task is awaited

    async def _uninterrupted(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Awaits `work`, which runs to its end even if the caller is cancelled."""
        return await asyncio.shield(self._background(work))


def _check_unstaged(state: RoleState) -> None:
    if state.staged is not None:
        raise MixfuseError(
            f"a swap of role {state.name!r} to {state.staged.model} is under way; wait for its end", kind="conflict"
        )
