"""Following the shared record: what serves each role at the start, and after another gateway has changed it."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from mixfuse.contracts.errors import MixfuseError
from mixfuse.serve.role_record import Proposal, RoleEntry
from mixfuse.serve.roles import BASE, RoleState
from mixfuse.serve.swap import Swapper

logger = logging.getLogger(__name__)

RETRY_S = 60.0
"""Seconds until a revision that could not be served here is tried again; its files may still be on their way."""


class RecordFollower:
    """Keeps a role table where the shared record has it.

    Args:
        swapper: Swaps the roles of the table.
        clock: Returns seconds; a test passes its own.
    """

    def __init__(self, swapper: Swapper, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._swapper, self._table, self._clock = swapper, swapper.table, clock
        self._failed: dict[str, tuple[int, float]] = {}  # role → the version that failed, and when
        self._answered: dict[str, tuple[str, str | None]] = {}  # role → the last proposal, and why it was refused

    async def start(self, seeds: Mapping[str, Path | None], *, from_config: bool = False) -> dict[str, str]:
        """Serves every role as the record says, or as the config says if the record does not know the role.

        Args:
            seeds: Role → adapter directory, or None for the base, from the config.
            from_config: Take every role from the config, and write that to the record.

        Returns:
            The source of each role's revision: "config" or "role table".

        Raises:
            MixfuseError: An adapter cannot be served. The error is that of the first one, and says what to do.
        """
        table, record = self._table, self._table.record
        table.base.model = table.engine.base_model_name  # an external engine names its base only once it is reached
        entries = dict(await record.read()) if record is not None else {}
        sources = {}
        for role, directory in seeds.items():
            state = table.swappable(role)
            if from_config or role not in entries:
                try:
                    await self._seed(state, directory)
                    sources[role] = "config"
                    continue
                except MixfuseError as error:
                    if error.kind != "conflict" or record is None:
                        raise
                    entries = dict(await record.read())  # another gateway that starts wrote first
            await self._start_from_record(state, entries[role])
            sources[role] = "role table"
        return sources

    def versions(self) -> dict[str, int]:
        """The version of each role that this table serves, or that it has found it cannot serve."""
        served = {state.name: state.version for state in self._table.states() if state.version}
        return {role: max(version, self._failed.get(role, (0, 0.0))[0]) for role, version in served.items()}

    def answers(self) -> dict[str, tuple[str, str | None]]:
        """What this table says of the last proposal for each role: its id, and why it is refused; None: it is ready."""
        return dict(self._answered)

    async def follow(self) -> None:
        """Brings each role to where the record has it, and has ready what other gateways propose.

        A role that cannot follow keeps its revision, and says why in `RoleState.problem`.

        Raises:
            MixfuseError: The record cannot be read.
        """
        table, record = self._table, self._table.record
        if record is None:
            return
        names = set(table.names()) - {BASE}
        proposals = await record.proposals()  # before the roles: a proposal ends with the change that it announced
        for role, entry in (await record.read()).items():
            if role not in names:
                continue
            state = table.state(role)
            state.pinned = entry.pinned
            if entry.version == state.version or state.lock.locked():
                continue
            now = self._clock()
            version, failed_at = self._failed.get(role, (0, 0.0))
            if version == entry.version and now < failed_at + RETRY_S:
                continue
            try:
                async with state.lock:
                    await self._swapper.adopt(state, entry)
            except MixfuseError as error:
                self._failed[role] = (entry.version, now)
                state.problem = f"{entry.gateway} swapped to {entry.revision or BASE}, which cannot serve here: {error}"
                logger.warning("role %s: %s", role, state.problem)

        for state in table.states():
            if not state.lock.locked():
                await self._prepare(state, proposals.get(state.name))

    async def _prepare(self, state: RoleState, proposal: Proposal | None) -> None:
        """Has ready what another gateway is about to swap in, or gives it up once it is not."""
        if state.prepared is not None and (proposal is None or proposal.id != state.prepared):
            async with state.lock:
                await self._swapper.drop_withdrawn(state)
        if proposal is None:  # one that comes back, with the gateway that made it, has to be prepared again
            self._answered.pop(state.name, None)
        if proposal is None or self._answered.get(state.name, ("", None))[0] == proposal.id:
            return
        refusal = None
        try:
            async with state.lock:
                await self._swapper.prepare(state, proposal)
        except MixfuseError as error:
            refusal = str(error)
            logger.warning("role %s: revision %s is refused: %s", state.name, proposal.revision, refusal)
        self._answered[state.name] = (proposal.id, refusal)

    async def _seed(self, state: RoleState, directory: Path | None) -> None:
        """Serves a role as the config says, and records that."""
        if directory is not None:
            await self._swapper.swap(state.name, directory, why="config")
        elif (record := self._table.record) is not None:
            entry = (await record.read()).get(state.name)
            version = entry.version if entry is not None else 0
            state.follow(await record.change(state.name, version, None, None, "config"))

    async def _start_from_record(self, state: RoleState, entry: RoleEntry) -> None:
        try:
            await self._swapper.adopt(state, entry)
        except MixfuseError as error:
            role, database = state.name, self._table.record.name if self._table.record is not None else ""
            raise MixfuseError(
                f"role {role!r} cannot be served as the role table says: {error}. Put that right, or go back to "
                f"the revision before (mixfuse roles rollback {role} --db {database}), or start from the config "
                "(roles_from=config)",
                kind=error.kind,
            ) from None
