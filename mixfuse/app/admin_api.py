"""What travels over `/admin/roles`: the server's answers and the body of a swap, as both sides read and write them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mixfuse.contracts.strict_yaml import Strict

Share = Annotated[float, Field(ge=0, le=1)]
Ratio = Annotated[float, Field(gt=0)]

GateState = Literal["shadow", "canary", "draining", "promoted", "refused", "stopped", "failed"]
"""The phases of a gate, then its ends. Only after "promoted" does the new revision serve."""

UNDER_WAY: tuple[GateState, ...] = ("shadow", "canary", "draining")


class GateRequest(Strict):
    """The gate that a new revision has to pass before it serves.

    Attributes:
        shadow: How many live requests the new revision repeats before it serves any.
        canary: The share of requests that it serves after that.
        for_s: How long the canary lasts, in seconds.
        requests: How many requests the canary lasts, instead.
        timeout_s: The longest wait for `shadow` or `requests`, in seconds.
        limits: Replaces limits of the serve config's `gate`, by name.
    """

    shadow: int | None = Field(default=None, ge=1)
    canary: float | None = Field(default=None, gt=0, lt=1)
    for_s: Ratio | None = None
    requests: int | None = Field(default=None, ge=1)
    timeout_s: Ratio = 600.0
    limits: dict[str, Any] = Field(default={}, max_length=64)

    @model_validator(mode="after")
    def _check_canary(self) -> Self:
        if self.for_s is not None and self.requests is not None:
            raise ValueError("a canary has a time (for_s) or a number of requests, not both")
        if self.canary is None and (self.for_s or self.requests):
            raise ValueError("for_s and requests go with a canary's share (canary)")
        if self.canary is not None and not (self.for_s or self.requests):
            raise ValueError("say how long the canary lasts: for_s (seconds) or requests")
        if self.limits and not self.gated:
            raise ValueError("limits go with shadow or canary")
        return self

    @property
    def gated(self) -> bool:
        """Whether the revision has to pass a gate before it serves."""
        return self.shadow is not None or self.canary is not None


class SwapRequest(GateRequest):
    """The body of `PUT /admin/roles/ROLE`.

    Attributes:
        directory: The adapter directory, as a path on the server.
    """

    directory: Path


@dataclass(frozen=True)
class GateReport:
    """A gate, in progress or ended.

    Attributes:
        state: Its phase, or how it ended.
        reason: Why it ended so.
        old: The serving revision; None for the base.
        new: The staged revision.
        began: When it began, in seconds since 1970.
        asked: The keys of the `SwapRequest`.
        limits: The limits that the new revision must keep.
        shadow: The figures of the shadow; None before it.
        canary: The figures of the canary; None before it.
    """

    state: GateState
    reason: str
    old: str | None
    new: str
    began: float
    asked: dict[str, Any]
    limits: dict[str, Any]
    shadow: dict[str, Any] | None
    canary: dict[str, Any] | None

    @property
    def under_way(self) -> bool:
        """Whether it has not ended."""
        return self.state in UNDER_WAY


@dataclass(frozen=True)
class StagedRow:
    """A role's staged revision.

    Attributes:
        revision: The revision; None for the base.
        share: The share of requests that it gets as a canary.
        in_flight: Requests that lease it.
    """

    revision: str | None
    share: float
    in_flight: int


@dataclass(frozen=True)
class RoleRow:
    """One role of `GET /admin/roles`.

    Attributes:
        role: Its name.
        revision: The serving revision; None for the base.
        directory: The adapter directory of the revision, as a path on the server.
        in_flight: Requests that lease the revision.
        loaded: Whether the revision is in every engine, as far as they say.
        pinned: Whether it stays there.
        since: When it began to serve, in seconds since 1970; None for the base from the start.
        version: The role's version in the shared record.
        staged: The revision that may replace it.
        problem: Why this server could not follow the shared record, or what keeps an engine from answering.
        doing: What a swap does now: verifying, loading, probing, waiting for other gateways; None if none is under way.
        gate: The role's latest gate.
    """

    role: str
    revision: str | None
    directory: str | None
    in_flight: int
    loaded: bool
    pinned: bool
    since: float | None
    version: int
    staged: StagedRow | None
    problem: str | None
    doing: str | None
    gate: GateReport | None
