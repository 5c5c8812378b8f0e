"""The record that several role tables share: what serves each role, and every change of it.

Each gateway has an engine and a role table of its own. They agree through this record. A gateway that swaps writes to
the record before it flips, and only if no other gateway has written meanwhile; the others follow
(`serve/following.py`). `mixfuse.app.roles_store.StoredRoles` keeps the record in the trace database.
"""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import Field

Reason = Literal[
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
"""Why a line of a role's history was written."""


@dataclass(frozen=True)
class RoleEntry:
    """What the record says about one role.

    Attributes:
        role: The role's name.
        version: How many times the role's serving revision has changed.
        revision: The adapter revision that serves the role; None for the base.
        directory: The adapter directory of that revision; None for the base.
        pinned: Whether the adapter stays loaded.
        since: When the revision began to serve, in seconds since 1970.
        gateway: The gateway that made the last change.
    """

    role: str
    version: Annotated[int, Field(ge=0, lt=1 << 53)]
    revision: str | None
    directory: str | None
    pinned: bool
    since: float
    gateway: str


@dataclass(frozen=True)
class Proposal:
    """A revision that another gateway is about to swap in, for the others to have ready before it does.

    Attributes:
        id: Unlike that of any other proposal.
        role: The role.
        revision: The adapter revision.
        directory: Its adapter directory.
    """

    id: str
    role: str
    revision: str
    directory: str


class RoleRecord(Protocol):
    """The shared record, as the role table, the swapper and the follower use it.

    Each method raises a MixfuseError of kind "trace_db" if the record cannot be reached.

    Attributes:
        name: The database, as `mixfuse roles rollback --db` takes it.
    """

    name: str

    async def read(self) -> Mapping[str, RoleEntry]:
        """Returns the entry of each known role."""
        ...

    async def change(
        self, role: str, expected: int, revision: str | None, directory: Path | None, why: Reason
    ) -> RoleEntry:
        """Records the revision that serves a role from now on.

        Args:
            role: The role.
            expected: The version that the caller last saw; 0 if the record does not know the role.
            revision: The new revision; None for the base.
            directory: Its adapter directory; None for the base.
            why: The reason, for the history.

        Raises:
            MixfuseError: The role's version is no longer `expected` (kind "conflict"), or the gateways that share this
                one's engines count it as gone (kind "engine").
        """
        ...

    async def note_refusal(
        self, role: str, revision: str | None, directory: Path | None, why: Reason, error: str
    ) -> None:
        """Adds a line to the history: a change was attempted and refused."""
        ...

    async def rollback_target(self, role: str) -> RoleEntry:
        """Returns the entry that a rollback would serve, with the role's present version.

        Raises:
            MixfuseError: Nothing served the role before (kind "conflict").
        """
        ...

    async def has_served(self, role: str, revision: str) -> bool:
        """Whether a revision has ever served the role."""
        ...

    def agreed(self, role: str, revision: str, directory: Path) -> AbstractAsyncContextManager[None]:
        """Runs the block, which makes the change, once every gateway that shares this one's engines has it ready.

        The block is not run if one of them refuses (kind "adapter"), or proposes another revision of the role itself
        (kind "conflict"). After the block, or without it, the others give up what was not swapped in.
        """
        ...

    async def proposals(self) -> Mapping[str, Proposal]:
        """Returns what the living gateways that share this one's engines propose, by role."""
        ...

    async def followed(self, role: str, version: int) -> None:
        """Returns once every gateway that shares this one's engines serves this version of a role, or cannot."""
        ...

    async def pin(self, role: str, pinned: bool) -> RoleEntry:
        """Records whether a role's adapter stays loaded."""
        ...
