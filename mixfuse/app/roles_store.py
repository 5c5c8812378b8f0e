"""The role record in the trace database: what serves each role, and every change of it.

Table `roles` has one row a role, its present state. Table `role_history` only grows: one row an event. A change names
the version that its author last saw, and is refused if the role has another version by then (compare and set). So of
two gateways that swap at the same time, one gets a conflict. A restarted gateway, and every other gateway on the same
database, reads its revisions from here.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from mixfuse.app.engine_lease import EngineLease
from mixfuse.contracts.bounded_json import shortened
from mixfuse.contracts.database import Database
from mixfuse.contracts.errors import MixfuseError, printable
from mixfuse.contracts.paths import resolved
from mixfuse.serve.role_record import Proposal, Reason, RoleEntry

Result = TypeVar("Result")

_ENTRY = TypeAdapter(RoleEntry)

# A change may wait for another gateway's; a database that is longer silent is reported.
_ANSWER_S = 30.0


@dataclass(frozen=True)
class Event:
    """One line of a role's history.

    Attributes:
        at: Time of the event, in seconds since 1970.
        role: The role.
        why: The reason for the change: swap, rollback, watch, …
        outcome: "ok" or "refused".
        old: The revision that served before; None for the base.
        new: The revision that was to serve; None for the base, or if the adapter could not be read.
        directory: The adapter directory of `new`.
        gateway: The gateway that made the change.
        version: The role's version after the change; None if the serving revision did not change.
        error: Why the change was refused.
    """

    at: float
    role: str
    why: Reason
    outcome: str
    old: str | None
    new: str | None
    directory: str | None
    gateway: str
    version: int | None
    error: str | None


class StoredRoles:
    """The record, as one gateway uses it; implements `mixfuse.serve.role_record.RoleRecord`.

    Args:
        database: The trace database.
        gateway: This gateway's name in the history.
        lease: Knows the gateways that share its engines.
    """

    def __init__(self, database: Database, gateway: str, lease: EngineLease | None = None) -> None:
        self._database, self._gateway, self._lease = database, gateway, lease
        self.name = database.name

    async def read(self) -> Mapping[str, RoleEntry]:
        """Returns the entry of each known role."""
        return await self._run(read)

    async def change(
        self, role: str, expected: int, revision: str | None, directory: Path | None, why: Reason
    ) -> RoleEntry:
        """Records the revision that serves a role from now on; see the function `change`.

        Raises:
            MixfuseError: As for `change`, or the gateways that share this one's engines count it as gone (kind
                "engine"): they may have given up what it proposed.
        """
        path = None if directory is None else _stored(directory)

        def work(connection: Connection) -> RoleEntry:
            if self._lease is not None:
                self._lease.check(connection)
            return change(connection, new=_new(role, expected, revision, path, self._gateway), why=why)

        return await self._run(work)

    async def note_refusal(
        self, role: str, revision: str | None, directory: Path | None, why: Reason, error: str
    ) -> None:
        """Adds a line to the history: a change was attempted and refused."""
        path = None if directory is None else _stored(directory)

        def note(connection: Connection) -> None:
            entry = read(connection).get(role)
            serving = entry.revision if entry is not None else None
            _append(
                connection,
                Event(time.time(), role, why, "refused", serving, revision, path, self._gateway, None, error),
            )

        await self._run(note)

    async def rollback_target(self, role: str) -> RoleEntry:
        """Returns the entry that a rollback would serve; see the function `rollback_target`."""
        return await self._run(partial(rollback_target, role=role))

    async def has_served(self, role: str, revision: str) -> bool:
        """Whether a revision has ever served the role."""
        query = text("SELECT 1 FROM role_history WHERE role = :role AND new_revision = :new AND version IS NOT NULL")
        return await self._run(
            lambda connection: connection.execute(query, {"role": role, "new": revision}).first() is not None
        )

    @asynccontextmanager
    async def agreed(self, role: str, revision: str, directory: Path) -> AsyncIterator[None]:
        """Runs the block once every gateway that shares this one's engines has the revision ready."""
        if self._lease is None:
            yield
            return
        proposal = Proposal(uuid.uuid4().hex, role, revision, _stored(directory))
        try:
            await self._lease.propose(proposal)
            yield
        finally:
            with suppress(MixfuseError):  # it ends with the change, or with this gateway's row
                await self._lease.withdraw(proposal)

    async def proposals(self) -> Mapping[str, Proposal]:
        """Returns what the living gateways that share this one's engines propose, by role."""
        return {} if self._lease is None else await self._lease.proposals()

    async def followed(self, role: str, version: int) -> None:
        """Returns once every gateway that shares this one's engines serves this version of a role, or cannot."""
        if self._lease is not None:
            await self._lease.followed(role, version)

    async def pin(self, role: str, pinned: bool) -> RoleEntry:
        """Records whether a role's adapter stays loaded.

        Raises:
            MixfuseError: The record does not know the role (kind "role").
        """

        def work(connection: Connection) -> RoleEntry:
            entry = read(connection).get(role)
            if entry is None:
                raise MixfuseError(f"the role table does not know {role!r}", kind="role")
            connection.execute(
                text("UPDATE roles SET pinned = :pinned WHERE role = :role"), {"pinned": int(pinned), "role": role}
            )
            why: Reason = "pin" if pinned else "unpin"
            serving = entry.revision
            _append(
                connection,
                Event(time.time(), role, why, "ok", serving, serving, entry.directory, self._gateway, None, None),
            )
            return read(connection)[role]

        return await self._run(work)

    async def history(self, role: str, limit: int = 100) -> list[Event]:
        """Returns the role's newest events, newest first."""
        return await self._run(partial(history, role=role, limit=limit))

    async def served(self, role: str, count: int) -> list[Path]:
        """Returns the adapter directories that served a role last, newest first, each once."""
        query = text(
            "SELECT directory FROM role_history WHERE role = :role AND version IS NOT NULL AND directory IS NOT NULL "
            "GROUP BY directory ORDER BY MAX(version) DESC LIMIT :count"
        )

        def work(connection: Connection) -> list[Path]:
            return [Path(row[0]) for row in connection.execute(query, {"role": role, "count": count})]

        return await self._run(work)

    async def _run(self, work: Callable[[Connection], Result]) -> Result:
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await self._database.run(work)
        except (SQLAlchemyError, TimeoutError) as error:
            raise MixfuseError(
                f"the role table in {self._database.name} cannot be reached now: {error.__class__.__name__}; "
                "try again later",
                kind="trace_db",
            ) from error


def _stored(directory: Path) -> str:
    """A directory as the record holds it: without links, and as text that every database takes."""
    return printable(str(resolved(directory)))


def read(connection: Connection) -> dict[str, RoleEntry]:
    """Returns the entry of each known role.

    Raises:
        MixfuseError: A row is not as it was written (kind "trace_db"); SQLite keeps any value in any column.
    """
    rows = connection.execute(text("SELECT role, version, revision, directory, pinned, since, gateway FROM roles"))
    entries = {}
    for row in rows.mappings():
        try:
            entry = _ENTRY.validate_python({**row, "pinned": bool(row["pinned"])})
        except ValidationError as error:
            column, what = error.errors()[0]["loc"][-1], error.errors()[0]["msg"]
            role = shortened(repr(row["role"]), 80)
            raise MixfuseError(
                f"the role table's row of {role} is damaged: {column}: {what}; delete the row, and the role is taken "
                "from the config",
                kind="trace_db",
            ) from None
        entries[entry.role] = entry
    return entries


def change(connection: Connection, *, new: RoleEntry, why: Reason) -> RoleEntry:
    """Records the revision that serves a role from now on.

    Args:
        connection: A connection within a transaction.
        new: The new entry. Its version must be one above the version in the table. `pinned` is not written.
        why: The reason, for the history.

    Returns:
        The entry as it is stored now.

    Raises:
        MixfuseError: Another gateway has changed the role meanwhile (kind "conflict").
    """
    old = read(connection).get(new.role)
    values = vars(new) | {"pinned": 0, "expected": new.version - 1}
    if new.version == 1:
        statement = (
            "INSERT INTO roles (role, version, revision, directory, pinned, since, gateway) VALUES "
            "(:role, :version, :revision, :directory, :pinned, :since, :gateway) ON CONFLICT (role) DO NOTHING"
        )
    else:
        statement = (
            "UPDATE roles SET version = :version, revision = :revision, directory = :directory, since = :since, "
            "gateway = :gateway WHERE role = :role AND version = :expected"
        )
    if connection.execute(text(statement), values).rowcount != 1:
        now = read(connection).get(new.role)
        change_made = f"{now.gateway} swapped it to {now.revision or 'the base'}" if now is not None else "it is gone"
        raise MixfuseError(
            f"role {new.role!r} was changed by another gateway meanwhile: {change_made}; look at it, and try again",
            kind="conflict",
        )
    connection.execute(text("DELETE FROM role_proposals WHERE role = :role"), {"role": new.role})
    _append(
        connection,
        Event(
            new.since,
            new.role,
            why,
            "ok",
            old.revision if old is not None else None,
            new.revision,
            new.directory,
            new.gateway,
            new.version,
            None,
        ),
    )
    return read(connection)[new.role]


def rollback_target(connection: Connection, *, role: str) -> RoleEntry:
    """Returns the entry that a rollback of a role would serve, with the role's present version.

    A rollback undoes the newest change that is not undone yet. Several rollbacks go back step by step; a swap after a
    rollback is undone to the revision that the rollback served.

    Raises:
        MixfuseError: Nothing served the role before (kind "conflict"), or the role is unknown (kind "role").
    """
    entry = read(connection).get(role)
    if entry is None:
        raise MixfuseError(f"the role table does not know {role!r}", kind="role")
    query = text(
        "SELECT why, new_revision, directory FROM role_history WHERE role = :role AND version > 0 ORDER BY version"
    )
    stack: list[tuple[str | None, str | None]] = []
    for why, revision, directory in connection.execute(query, {"role": role}):
        if why == "rollback" and len(stack) > 1:
            stack.pop()
        else:
            stack.append((revision, directory))
    if len(stack) < 2:
        raise MixfuseError(f"nothing served {role!r} before; there is nothing to go back to", kind="conflict")
    revision, directory = stack[-2]
    return RoleEntry(role, entry.version, revision, directory, entry.pinned, entry.since, entry.gateway)


def roll_back(database: Database, role: str, gateway: str) -> RoleEntry:
    """Records a rollback without a server. Running gateways follow it; others start with it.

    Raises:
        MixfuseError: As for `rollback_target`, or another gateway changed the role at the same time.
    """

    def work(connection: Connection) -> RoleEntry:
        target = rollback_target(connection, role=role)
        new = _new(role, target.version, target.revision, target.directory, gateway)
        return change(connection, new=new, why="rollback")

    return database.run_now(work)


def history(connection: Connection, *, role: str, limit: int) -> list[Event]:
    """Returns the role's newest events, newest first."""
    # Clocks of gateways differ, so the times do not tell the order of changes. What has no version, such as a refusal,
    # comes after the newest change that is not later by its own gateway's clock.
    query = text(
        "SELECT at, role, why, outcome, old_revision AS old, new_revision AS new, directory, gateway, version, error "
        "FROM role_history AS event WHERE role = :role ORDER BY COALESCE(version, (SELECT MAX(earlier.version) FROM "
        "role_history AS earlier WHERE earlier.role = event.role AND earlier.at <= event.at), 0) DESC, "
        "CASE WHEN version IS NULL THEN 0 ELSE 1 END, at DESC LIMIT :limit"
    )
    return [Event(**row) for row in connection.execute(query, {"role": role, "limit": limit}).mappings()]


def _new(role: str, expected: int, revision: str | None, directory: str | None, gateway: str) -> RoleEntry:
    return RoleEntry(role, expected + 1, revision, directory, False, time.time(), gateway)


def _append(connection: Connection, event: Event) -> None:
    names = [column.name for column in fields(Event)]
    columns = ", ".join({"old": "old_revision", "new": "new_revision"}.get(name, name) for name in names)
    values = ", ".join(f":{name}" for name in names)
    connection.execute(
        text(f"INSERT INTO role_history (id, {columns}) VALUES (:id, {values})"),  # noqa: S608 - our own names
        vars(event) | {"id": uuid.uuid4().hex},
    )
