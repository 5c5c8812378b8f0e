"""The role table's record in the trace database: what serves each role, and everything that ever changed that.

`roles` holds the present of each role, `role_history` what happened, line by line, never changed. A change is made
only where the role's version is still the one its maker saw (compare and set), so of two gateways that swap at once
one is told. A restart, and every other gateway on the same database, comes to the same revisions from here.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from mixfuse.contracts.database import Database
from mixfuse.contracts.errors import MixfuseError
from mixfuse.serve.roles import Entry, Why

Result = TypeVar("Result")


@dataclass(frozen=True)
class Event:
    """A line of a role's history.

    Attributes:
        at: When, in seconds since 1970.
        role: The role.
        why: What it was done for: swap, rollback, watch, …
        outcome: "ok" or "refused".
        old: The revision that served before; None for the base.
        new: The one that was to serve; None for the base, or where the adapter could not be read.
        directory: Where that lies.
        gateway: Who did it.
        version: The role's version from then on; None where what serves it did not change.
        error: Why it was refused.
    """

    at: float
    role: str
    why: Why
    outcome: str
    old: str | None
    new: str | None
    directory: str | None
    gateway: str
    version: int | None
    error: str | None


class StoredRoles:
    """The record, for one gateway; implements `mixfuse.serve.roles.RoleStore`.

    Args:
        database: Where it is.
        gateway: Names this one in the history.
    """

    def __init__(self, database: Database, gateway: str) -> None:
        self._database, self._gateway = database, gateway
        self.name = database.name

    async def read(self) -> Mapping[str, Entry]:
        """All roles that are known."""
        return await self._run(read)

    async def change(self, role: str, expected: int, revision: str | None, directory: Path | None, why: Why) -> Entry:
        """Records what serves a role from now on; see `change`."""
        where = None if directory is None else str(directory.resolve())
        return await self._run(partial(change, new=_new(role, expected, revision, where, self._gateway), why=why))

    async def refused(self, role: str, revision: str | None, directory: Path | None, why: Why, error: str) -> None:
        """Notes in the history that something was not done."""
        where = None if directory is None else str(directory.resolve())

        def note(connection: Connection) -> None:
            old = read(connection).get(role)
            now = old.revision if old is not None else None
            _append(
                connection,
                Event(time.time(), role, why, "refused", now, revision, where, self._gateway, None, error),
            )

        await self._run(note)

    async def before(self, role: str) -> Entry:
        """What a rollback leads to; see `before`."""
        return await self._run(partial(before, role=role))

    async def had(self, role: str, revision: str) -> bool:
        """Whether a revision ever served the role."""
        query = text("SELECT 1 FROM role_history WHERE role = :role AND new_revision = :new AND version IS NOT NULL")
        return await self._run(
            lambda connection: connection.execute(query, {"role": role, "new": revision}).first() is not None
        )

    async def pin(self, role: str, pinned: bool) -> Entry:
        """Records whether a role's adapter has to stay loaded.

        Raises:
            MixfuseError: The record does not know the role (kind "role").
        """

        def work(connection: Connection) -> Entry:
            known = read(connection).get(role)
            if known is None:
                raise MixfuseError(f"the role table does not know {role!r}", kind="role")
            connection.execute(
                text("UPDATE roles SET pinned = :pinned WHERE role = :role"), {"pinned": int(pinned), "role": role}
            )
            why: Why = "pin" if pinned else "unpin"
            now = known.revision
            _append(
                connection,
                Event(time.time(), role, why, "ok", now, now, known.directory, self._gateway, None, None),
            )
            return read(connection)[role]

        return await self._run(work)

    async def history(self, role: str, limit: int = 100) -> list[Event]:
        """What happened to a role, newest first."""
        return await self._run(partial(history, role=role, limit=limit))

    async def _run(self, work: Callable[[Connection], Result]) -> Result:
        try:
            return await self._database.run(work)
        except SQLAlchemyError as error:
            raise MixfuseError(
                f"the role table in {self._database.name} cannot be reached now: {error.__class__.__name__}; "
                "try again later",
                kind="trace_db",
            ) from error


def read(connection: Connection) -> dict[str, Entry]:
    """What serves each role."""
    rows = connection.execute(text("SELECT role, version, revision, directory, pinned, since, gateway FROM roles"))
    return {row["role"]: Entry(**{**row, "pinned": bool(row["pinned"])}) for row in rows.mappings()}


def change(connection: Connection, *, new: Entry, why: Why) -> Entry:
    """Records what serves a role from now on.

    Args:
        connection: In a transaction.
        new: What shall be; its version is that of what is there now and one more. `pinned` is left as it is.
        why: For the history.

    Returns:
        The entry as it is now.

    Raises:
        MixfuseError: Somebody else has changed the role meanwhile (kind "conflict").
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
        there = read(connection).get(new.role)
        found = f"{there.gateway} had it serve {there.revision or 'the base'}" if there is not None else "it is gone"
        raise MixfuseError(
            f"role {new.role!r} was changed by somebody else meanwhile: {found}; look at it, and try again",
            kind="conflict",
        )
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


def before(connection: Connection, *, role: str) -> Entry:
    """What a rollback of a role leads to, with the version the role has now.

    Each rollback takes the newest change away that is not taken away yet, so several walk back, and a swap after a
    rollback is undone to what was rolled back to.

    Raises:
        MixfuseError: There is nothing before (kind "conflict"), or the role is not known (kind "role").
    """
    now = read(connection).get(role)
    if now is None:
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
    return Entry(role, now.version, revision, directory, now.pinned, now.since, now.gateway)


def roll_back(database: Database, role: str, gateway: str) -> Entry:
    """Goes back without a server: what `before` says is recorded. Running gateways follow, others start with it.

    Raises:
        MixfuseError: As `before`, or somebody else changed the role in this moment.
    """

    def work(connection: Connection) -> Entry:
        target = before(connection, role=role)
        new = _new(role, target.version, target.revision, target.directory, gateway)
        return change(connection, new=new, why="rollback")

    return database.run_now(work)


def history(connection: Connection, *, role: str, limit: int) -> list[Event]:
    """What happened to a role, newest first."""
    query = text(
        "SELECT at, role, why, outcome, old_revision AS old, new_revision AS new, directory, gateway, version, error "
        "FROM role_history WHERE role = :role ORDER BY at DESC, version DESC LIMIT :limit"
    )
    return [Event(**row) for row in connection.execute(query, {"role": role, "limit": limit}).mappings()]


def _new(role: str, expected: int, revision: str | None, directory: str | None, gateway: str) -> Entry:
    return Entry(role, expected + 1, revision, directory, False, time.time(), gateway)


def _append(connection: Connection, event: Event) -> None:
    names = [one.name for one in fields(Event)]
    columns = ", ".join({"old": "old_revision", "new": "new_revision"}.get(name, name) for name in names)
    values = ", ".join(f":{name}" for name in names)
    connection.execute(
        text(f"INSERT INTO role_history (id, {columns}) VALUES (:id, {values})"),  # noqa: S608 - our own names
        vars(event) | {"id": uuid.uuid4().hex},
    )
