"""Gateways that share engines: who is alive, what each serves, and whose adapters may be taken out of the engines.

Each gateway has an owner's token, new at every start, and loads adapters under names that end with it
(`ROLE@REVISION~OWNER`). So no gateway touches another's adapters, even if the two know nothing of each other. A row in
the trace database says until when the gateway is alive; the database's clock counts, since those of the gateways
differ. It also says which version of each role the gateway serves, so that a swap ends once all serve it, and what it
has ready of the swaps that others propose, so that a swap begins only where all can follow.

A gateway that has not renewed its row stops answering by itself, before the others count it as gone. They then fence
the row, which can never be renewed after that, and unload what is left of that owner. The token is the fence: a
gateway that comes back is another owner. One that renews its row before it is fenced goes on, once it serves what was
swapped meanwhile. After an outage of the database all are late, so nobody fences before the others had time to renew.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from mixfuse.contracts.database import Database
from mixfuse.contracts.errors import MixfuseError
from mixfuse.serve.role_record import Proposal

logger = logging.getLogger(__name__)

_LASTS_S = 30.0
_RENEW_S = 5.0
_GRACE_S = 2 * _RENEW_S
"""How long a gateway reaches the database before it fences others, which may have been as cut off from it."""
_LOOK_S = 0.2
_FENCED = 0.0
_NOW_SQLITE = "((julianday('now') - 2440587.5) * 86400.0)"
_NOW_POSTGRES = "EXTRACT(EPOCH FROM clock_timestamp())"


class EngineLease:
    """One gateway's row.

    Args:
        database: The trace database.
        gateway: This gateway's name, for messages.
        engines: The base URLs of the engines that others may use too; with none there is no row, and nothing to wait
            for.

    Attributes:
        owner: The token that the names of this gateway's adapters end with; empty without engines.
    """

    def __init__(self, database: Database, gateway: str, engines: list[str]) -> None:
        self._database, self._gateway, self._engines = database, gateway, engines
        self.owner = uuid.uuid4().hex[:16] if engines else ""
        self._valid_until = self._back_at = float("-inf")
        self._caught_up = True
        self._said: tuple[dict[str, int], dict[str, tuple[str, str | None]]] = ({}, {})
        self._renewing: asyncio.Task[MixfuseError] | None = None
        self._now = _NOW_SQLITE if database.is_sqlite else _NOW_POSTGRES

    @property
    def valid(self) -> bool:
        """Whether this gateway may answer: no other counts it as gone, and it knows what was swapped while one did."""
        return not self._engines or (self._caught_up and time.monotonic() < self._valid_until)

    async def take(self) -> None:
        """Writes the row, and renews it from now on.

        Raises:
            MixfuseError: The database cannot be reached.
        """
        if self._engines:
            statement = text(
                "INSERT INTO gateways (owner, name, engines, serves, expires_at) "  # noqa: S608 - our own expression
                f"VALUES (:owner, :name, :engines, '{{}}', {self._now} + :lasts)"
            )
            values = {"name": self._gateway, "engines": json.dumps(sorted(self._engines))}
            await self._run(lambda connection: self._write(connection, statement, **values))
        self._renewing = asyncio.create_task(self._renew())

    async def lost(self) -> MixfuseError:
        """Returns why once another gateway has fenced this one, because it stood still for long."""
        assert self._renewing is not None  # noqa: S101 - it was taken
        return await asyncio.shield(self._renewing)

    async def catch_up(self, follow: Callable[[], Awaitable[None]]) -> None:
        """Follows the shared record; if others counted this gateway as gone, it may answer again afterwards.

        Raises:
            MixfuseError: As `follow`.
        """
        back_at = self._back_at
        await follow()
        self._caught_up = back_at == self._back_at  # what was swapped before it was back has been read

    def check(self, connection: Connection) -> None:
        """Makes sure that no other gateway counts this one as gone before the connection's transaction ends.

        Raises:
            MixfuseError: One does, or may do so at any time.
        """
        if not self._engines:
            return
        # An update, as it makes others wait who would fence the row.
        statement = text(
            "UPDATE gateways SET expires_at = expires_at "  # noqa: S608 - our own expression
            f"WHERE owner = :owner AND expires_at >= {self._now}"
        )
        if connection.execute(statement, {"owner": self.owner}).rowcount != 1:
            raise _gone()

    async def say(
        self, serves: Mapping[str, int], prepared: Mapping[str, tuple[str, str | None]] | None = None
    ) -> None:
        """Tells the others what this gateway serves, and what it has ready.

        Args:
            serves: Role → the version that it serves, or cannot follow.
            prepared: Role → the last proposal's id, and why it is refused; None: it is ready.

        Raises:
            MixfuseError: The database cannot be reached.
        """
        said = (dict(serves), dict(prepared or {}))
        if self._engines and said != self._said:
            statement = text("UPDATE gateways SET serves = :serves, prepared = :prepared WHERE owner = :owner")
            values = {"serves": json.dumps(said[0]), "prepared": json.dumps(said[1]), "owner": self.owner}
            await self._run(lambda connection: connection.execute(statement, values))
            self._said = said

    async def propose(self, proposal: Proposal) -> None:
        """Returns once every gateway that serves the role has the proposed revision ready, or is gone.

        Raises:
            MixfuseError: One refuses it (kind "adapter"), another proposal is under way (kind "conflict"), this gateway
                is gone for the others (kind "engine"), or the database cannot be reached. Call `withdraw` in any case.
        """
        if not self._engines:
            return
        values = {**vars(proposal), "owner": self.owner}

        def write(connection: Connection) -> bool:
            connection.execute(text(f"DELETE FROM role_proposals WHERE owner NOT IN ({self._living})"))  # noqa: S608
            return connection.execute(_PROPOSE, values).rowcount == 1

        if not await self._run(write):
            raise MixfuseError(
                f"another gateway is about to swap role {proposal.role!r}; look at it, and try again", kind="conflict"
            )
        query = text(f"SELECT owner, name, serves, prepared FROM gateways WHERE owner IN ({self._living})")  # noqa: S608
        while True:
            waiting = False
            rows = await self._run(lambda connection: connection.execute(query).all())
            if self.owner not in [row.owner for row in rows]:
                raise _gone()  # nobody would answer
            for owner, name, serves, prepared in rows:
                if owner == self.owner or proposal.role not in json.loads(serves):
                    continue
                answered, refusal = json.loads(prepared).get(proposal.role, ("", None))
                if answered == proposal.id and refusal:
                    raise MixfuseError(f"the gateway {name} cannot serve it: {refusal}", kind="adapter")
                waiting = waiting or answered != proposal.id
            if not waiting:
                return
            await asyncio.sleep(_LOOK_S)

    async def withdraw(self, proposal: Proposal) -> None:
        """Ends a proposal, if it did not end with the change."""
        if self._engines:
            statement = text("DELETE FROM role_proposals WHERE id = :id")
            await self._run(lambda connection: connection.execute(statement, {"id": proposal.id}))

    async def proposals(self) -> dict[str, Proposal]:
        """What other living gateways propose, by role."""
        if not self._engines:
            return {}
        query = text(
            "SELECT id, role, revision, directory FROM role_proposals "  # noqa: S608 - our own expression
            f"WHERE owner <> :owner AND owner IN ({self._living})"
        )
        rows = await self._run(lambda connection: connection.execute(query, {"owner": self.owner}).all())
        return {row.role: Proposal(*row) for row in rows}

    @property
    def _living(self) -> str:
        return f"SELECT owner FROM gateways WHERE expires_at >= {self._now}"  # noqa: S608 - our own expression

    async def followed(self, role: str, version: int) -> None:
        """Returns once every gateway that serves the role serves this version of it, is gone, or cannot follow.

        Raises:
            MixfuseError: The database cannot be reached.
        """
        query = text(
            "SELECT name, serves FROM gateways WHERE owner <> :owner "  # noqa: S608 - our own expression
            f"AND expires_at >= {self._now}"
        )
        while self._engines:
            rows = await self._run(lambda connection: connection.execute(query, {"owner": self.owner}).all())
            behind = [str(name) for name, serves in rows if json.loads(serves).get(role, version) < version]
            if not behind:
                return
            await asyncio.sleep(_LOOK_S)

    async def bury(self, unload: Callable[[str], Awaitable[bool]]) -> None:
        """Fences the gateways that are gone, and has their adapters unloaded; does nothing if this one may be gone.

        Args:
            unload: Unloads the adapters of an owner from this gateway's engines, and says whether none is left.

        Raises:
            MixfuseError: The database cannot be reached.
        """
        if not self._engines or not self.valid:
            return
        for owner, engines in await self._run(self._fence):
            clean = await unload(str(owner))
            if clean and set(json.loads(engines)) <= set(self._engines):
                await self._run(partial(_forget, owner=owner))

    async def release(self, unload: Callable[[str], Awaitable[bool]]) -> None:
        """Ends this gateway's row; its adapters are unloaded, by the others if not by this gateway."""
        if self._renewing is None:
            return
        self._renewing.cancel()
        await asyncio.wait({self._renewing})
        if not self._engines:
            return
        self._valid_until = float("-inf")
        clean = await unload(self.owner)
        statement = _FORGET if clean else text("UPDATE gateways SET expires_at = 0 WHERE owner = :owner")
        try:
            await self._run(lambda connection: connection.execute(statement, {"owner": self.owner}))
        except MixfuseError as error:  # it ends by itself
            logger.warning("this gateway's row could not be ended: %s", error)

    async def _renew(self) -> MixfuseError:
        statement = text(
            f"UPDATE gateways SET expires_at = {self._now} + :lasts "  # noqa: S608 - our own expression
            "WHERE owner = :owner AND expires_at > 0"
        )
        while True:
            await asyncio.sleep(_RENEW_S)
            try:
                if self._engines and not await self._run(lambda connection: self._write(connection, statement)):
                    self._valid_until = float("-inf")
                    return MixfuseError(
                        f"this gateway stood still for more than {_LASTS_S:g} s; the others on its engines have taken "
                        "its adapters out of them: start it again",
                        kind="engine",
                    )
            except MixfuseError as error:
                logger.warning("the lease on the engines cannot be renewed for now: %s", error)

    def _write(self, connection: Connection, statement: Any, **values: Any) -> bool:
        began = time.monotonic()
        changed = connection.execute(statement, {"owner": self.owner, "lasts": _LASTS_S, **values}).rowcount == 1
        if changed:
            if began >= self._valid_until:
                self._caught_up = self._valid_until == float("-inf")  # at the start there is nothing to catch up with
                self._back_at = began
            self._valid_until = began + _LASTS_S
        return changed

    def _fence(self, connection: Connection) -> list[tuple[str, str]]:
        """Fences what has expired. Returns all that are fenced and share an engine with this gateway."""
        if time.monotonic() >= self._back_at + _GRACE_S:
            statement = text(
                "UPDATE gateways SET expires_at = :fenced "  # noqa: S608 - our own expression
                f"WHERE owner <> :owner AND expires_at < {self._now}"
            )
            connection.execute(statement, {**_AS_FENCED, "owner": self.owner})
        rows = connection.execute(text("SELECT owner, engines FROM gateways WHERE expires_at = :fenced"), _AS_FENCED)
        return [(owner, engines) for owner, engines in rows if set(json.loads(engines)) & set(self._engines)]

    async def _run(self, work: Callable[[Connection], Any]) -> Any:
        try:
            return await self._database.run(work)
        except SQLAlchemyError as error:
            raise MixfuseError(
                f"the table of gateways in {self._database.name} cannot be reached: {error.__class__.__name__}",
                kind="trace_db",
            ) from error


def _gone() -> MixfuseError:
    return MixfuseError(
        f"this gateway has not renewed its row for {_LASTS_S:g} s, so that the others on its engines count it as gone; "
        "until it is back it can change no role",
        kind="engine",
    )


def _forget(connection: Connection, owner: str) -> None:
    connection.execute(_FORGET, {"owner": owner})


_PROPOSE = text(
    "INSERT INTO role_proposals (role, id, owner, revision, directory) "
    "VALUES (:role, :id, :owner, :revision, :directory) ON CONFLICT (role) DO NOTHING"
)
_FORGET = text("DELETE FROM gateways WHERE owner = :owner")
_AS_FENCED = {"fenced": _FENCED}
