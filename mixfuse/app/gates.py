"""Gates before a swap: an adapter shows on live requests that it may serve, in their shadow or as a canary.

Shadow: the staged revision does what the serving one did in N live requests, beside them (`fusion/measure/shadow.py`).
Canary: a share of the requests is given to it, and the traces are watched. One after the other where both are asked
for. A limit that is broken ends the gate, and the old revision serves on; at the end the staged one is flipped in.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import Field, model_validator

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import Strict, validate
from mixfuse.contracts.trace import Trace
from mixfuse.fusion.calls.pool import Pool, RoleSource
from mixfuse.fusion.calls.upstream import Endpoint
from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.measure.shadow import Comparison, Part, share, side_by_side, watch
from mixfuse.serve.roles import Revision, RoleTable, Why

logger = logging.getLogger(__name__)

_LOOK_S = 0.5  # how often a canary's figures are held against the limits

Share = Annotated[float, Field(ge=0, le=1)]
Ratio = Annotated[float, Field(gt=0)]


class GateConfig(Strict):
    """What a revision has to keep to, beside the one it is to replace; a limit that is null is not looked at.

    Attributes:
        min_agreement: Of the pairs in which both judges name a winner, the least share in which it is the same. In the
            shadow only. Not looked at where the old judge is the base model, unless the swap asks for it.
        min_consistency: The least share of pairs in which a judge names one winner in both orders. Unset: it may not be
            below the old one's by more than chance (two standard errors).
        max_parse_failures: The largest share of a judge's verdicts that cannot be read.
        min_answer_agreement: The least share of prompts that both answer alike. In the shadow only.
        min_preference: The least share of prompts at which the judge prefers the new answer, ties counting half. In the
            shadow only, and only then is the judge asked.
        max_failures: The largest share of the new one's calls that fail.
        max_latency_ratio: The largest ratio of the 95th percentiles of the calls' latencies, new to old; of
            `min_requests` calls each at least, since one slow call is no figure.
        max_disliked: The largest share of feedback against the new one's answers, beyond the old one's share. In a
            canary only.
        min_requests: A canary's figures decide nothing before so many requests met it, and so many the old one.
        concurrency: The most requests done again at once in the shadow.
    """

    min_agreement: Share | None = 0.5
    min_consistency: Share | None = None
    max_parse_failures: Share | None = 0.02
    min_answer_agreement: Share | None = None
    min_preference: Share | None = None
    max_failures: Share | None = 0.05
    max_latency_ratio: Ratio | None = 2.0
    max_disliked: Share | None = 0.2
    min_requests: int = Field(default=20, ge=1)
    concurrency: int = Field(default=2, ge=1)


class SwapRequest(Strict):
    """The body of `PUT /admin/roles/ROLE`.

    Attributes:
        directory: The adapter directory, as the server sees it.
        shadow: So many live requests are done again by the new revision before it gets any.
        canary: Then it is given this share of the requests.
        for_s: How long it is a canary, in seconds.
        requests: Or until so many requests have met it.
        timeout_s: The longest to wait for `shadow` or `requests`, in seconds.
        limits: Instead of the serve config's `gate`, by name.
    """

    directory: Path
    shadow: int | None = Field(default=None, ge=1)
    canary: float | None = Field(default=None, gt=0, lt=1)
    for_s: Ratio | None = None
    requests: int | None = Field(default=None, ge=1)
    timeout_s: Ratio = 600.0
    limits: dict[str, Any] = {}

    @model_validator(mode="after")
    def _whole(self) -> "SwapRequest":
        if self.for_s is not None and self.requests is not None:
            raise ValueError("a canary has a time (for_s) or a number of requests, not both")
        if self.canary is None and (self.for_s or self.requests):
            raise ValueError("for_s and requests go with a canary's share (canary)")
        if self.canary is not None and not (self.for_s or self.requests):
            raise ValueError("say how long it is a canary: for_s (seconds) or requests")
        if self.limits and not self.gated:
            raise ValueError("limits go with shadow or canary")
        return self

    @property
    def gated(self) -> bool:
        """Whether anything stands before the flip."""
        return self.shadow is not None or self.canary is not None


State = Literal["shadow", "canary", "draining", "promoted", "refused", "stopped", "failed"]
UNDER_WAY = ("shadow", "canary", "draining")


@dataclass
class Gate:
    """One gate, under way or ended.

    Attributes:
        role: Whose.
        old: The revision that serves; None for the base.
        new: The one that wants to.
        request: What was asked for.
        limits: What it has to keep to.
        state: Where it stands; the last four are ends, and only "promoted" means that the new one serves.
        reason: Why it ended as it did.
        shadow: The shadow's figures.
        canary: The canary's.
        began: Seconds since 1970.
    """

    role: str
    old: str | None
    new: str
    request: SwapRequest
    limits: GateConfig
    state: State
    reason: str = ""
    shadow: Comparison | None = None
    canary: Comparison | None = None
    began: float = field(default_factory=time.time)

    @property
    def under_way(self) -> bool:
        """Whether it has not ended."""
        return self.state in UNDER_WAY

    def report(self) -> dict[str, Any]:
        """State and figures as JSON."""
        return {
            "state": self.state,
            "reason": self.reason,
            "old": self.old,
            "new": self.new,
            "began": self.began,
            "asked": self.request.model_dump(mode="json", exclude_none=True),
            "limits": self.limits.model_dump(exclude_none=True),
            "shadow": self.shadow and self.shadow.report(),
            "canary": self.canary and self.canary.report(),
        }


class GateError(MixfuseError):
    """A revision did not get through its gate; the old one serves on."""

    def __init__(self, message: str) -> None:
        super().__init__(message, kind="gate")


class Revisions(RoleSource, Protocol):
    """The role table as the gateway sees it, and each of its revisions."""

    def hold(self, revision: Revision) -> AbstractAsyncContextManager[Endpoint]:
        """Pins this revision, whichever serves the role, for as long as the block runs."""
        ...


class Gates:
    """The gates of a server.

    Args:
        table: The server's roles.
        roles: How their revisions are reached.
        fusion: What the gateway serves.
        limits: The serve config's `gate`.
    """

    def __init__(self, table: RoleTable, roles: Revisions, fusion: FusionConfig, limits: GateConfig) -> None:
        self._table, self._roles, self._fusion, self._limits = table, roles, fusion, limits
        self._gates: dict[str, Gate] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._watches: dict[str, _Shadow | _Canary] = {}

    async def close(self) -> None:
        """Ends what is under way; the old revisions serve on."""
        for role in list(self._tasks):
            await self.stop(role)

    def observe(self, trace: Trace) -> None:
        """Takes a finished trace of the gateway's (`mixfuse.fusion.http.gateway.Observer`)."""
        for watching in self._watches.values():
            watching.take(trace)

    def of(self, role: str) -> Gate | None:
        """The role's gate, the last one where none is under way."""
        return self._gates.get(role)

    async def begin(self, role: str, request: SwapRequest) -> Gate:
        """Stages an adapter and has it begin to show what it does; returns then.

        Raises:
            MixfuseError: A limit is unknown, or as `RoleTable.stage`.
        """
        known = {**self._limits.model_dump(), **request.limits}
        limits = validate(known, GateConfig, source="limits")
        why: Why = "shadow" if request.canary is None else "canary"
        revision = await self._table.stage(role, request.directory, why=why)
        assert revision.revision is not None  # noqa: S101 - what was staged is an adapter
        old = self._table.serving()[role]
        if old.revision is None and "min_agreement" not in request.limits:
            limits = limits.model_copy(update={"min_agreement": None})
        state: State = "canary" if request.shadow is None else "shadow"
        gate = self._gates[role] = Gate(role, old.revision, revision.revision, request, limits, state)
        self._tasks[role] = asyncio.create_task(self._run(gate, old, revision))
        await asyncio.sleep(0)  # a task that is cancelled before it has begun could not clean up
        return gate

    async def stop(self, role: str) -> Gate | None:
        """Ends a gate that is under way, and gives the staged revision up; returns the role's gate."""
        if task := self._tasks.get(role):
            task.cancel()
            await asyncio.wait({task})
        return self._gates.get(role)

    async def _run(self, gate: Gate, old: Revision, new: Revision) -> None:
        role, request = gate.role, gate.request
        try:
            if request.shadow is not None:
                await self._shadow(gate, old, new)
            if request.canary is not None:
                await self._canary(gate, old, new)
            gate.state = "draining"
            swap = await self._table.commit(role, new)
            gate.state, gate.reason = "promoted", f"within its limits; {swap.drained} requests finished on the old one"
        except GateError as refusal:
            await self._give_up(gate, "refused", str(refusal), new)
        except asyncio.CancelledError:
            # Between flip and end the new one serves already: only the draining is not waited for.
            if self._table.serving()[role] is new:
                gate.state, gate.reason = "promoted", "within its limits"
            else:
                await self._give_up(gate, "stopped", "it was stopped; the old revision serves on", new)
        except Exception as error:
            if not isinstance(error, MixfuseError):
                logger.exception("the gate of role %s failed in a way it should not", role)
            await self._give_up(gate, "failed", str(error), new)
        finally:
            del self._tasks[role]
            logger.info("gate of role %s: %s: %s (%s)", role, gate.new, gate.state, gate.reason)

    async def _give_up(self, gate: Gate, state: State, reason: str, revision: Revision) -> None:
        why: Why = "canary-rollback" if gate.canary is not None else "shadow-rollback"
        try:
            await self._table.discard(revision, why=why, reason=reason)
        except MixfuseError as error:  # the engine is gone, and the adapter with it
            logger.warning("%s could not be unloaded: %s", revision.model, error)
        gate.state, gate.reason = state, reason

    async def _shadow(self, gate: Gate, old: Revision, new: Revision) -> None:
        gate.state, gate.shadow = "shadow", Comparison()
        wanted, timeout_s = gate.request.shadow or 0, gate.request.timeout_s
        async with (
            Pool(_Pinned(self._roles, gate.role, old)) as old_pool,
            Pool(_Pinned(self._roles, gate.role, new)) as new_pool,
            _Shadow(gate, self._part(gate), old.model, old_pool, new_pool) as shadow,
        ):
            try:
                with self._watching(gate.role, shadow):
                    async with asyncio.timeout(timeout_s):
                        await shadow.done.wait()
            except TimeoutError:
                raise GateError(
                    f"no swap: within {timeout_s:g} s {gate.shadow.new.requests} of {wanted} live requests asked role "
                    f"{gate.role!r}; the old revision serves on. Ask for fewer (--shadow), or wait longer (--timeout)"
                ) from None
        if limit := broken(gate.limits, gate.shadow):
            raise GateError(f"no swap: in the shadow of {wanted} requests, {limit}; the old revision serves on")

    async def _canary(self, gate: Gate, old: Revision, new: Revision) -> None:
        gate.state, gate.canary = "canary", Comparison()
        request, seen = gate.request, gate.canary
        least = min(gate.limits.min_requests, request.requests or gate.limits.min_requests)
        canary = _Canary(self._part(gate), old.model, new.model, seen, request.requests)
        self._table.set_canary(gate.role, new, request.canary or 0.0)
        end = time.monotonic() + (request.for_s or request.timeout_s)
        try:
            with self._watching(gate.role, canary):
                while not canary.done.is_set() and (left := end - time.monotonic()) > 0:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(min(left, _LOOK_S)):
                            await canary.done.wait()
                    if limit := broken(gate.limits, seen, least=least):
                        raise GateError(
                            f"rolled back: as a canary, in {seen.new.requests} requests, {limit}; "
                            "the old revision serves all again"
                        )
        finally:
            self._table.clear_canary(gate.role)
        if seen.new.requests < (request.requests or least):
            raise GateError(
                f"rolled back: within {request.for_s or request.timeout_s:g} s {seen.new.requests} requests met the "
                f"canary, {request.requests or least} are needed; the old revision serves all again"
            )

    def _part(self, gate: Gate) -> Part:
        return Part.of(gate.role, self._fusion)

    @contextmanager
    def _watching(self, role: str, watching: "_Shadow | _Canary") -> Iterator[None]:
        """Has traces handed to `watching` while the block runs."""
        self._watches[role] = watching
        try:
            yield
        finally:
            del self._watches[role]


class _Shadow:
    """A shadow at work; an async context manager that cancels what still runs at its end.

    Attributes:
        done: Set when as many requests as were wanted have been done again.
    """

    def __init__(self, gate: Gate, part: Part, model: str, old: Pool, new: Pool) -> None:
        self._gate, self._part, self._model, self._old, self._new = gate, part, model, old, new
        self._working: set[asyncio.Task[None]] = set()
        self._compared = 0
        self.done = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._working:
            task.cancel()
        await asyncio.gather(*self._working, return_exceptions=True)

    def take(self, trace: Trace) -> None:
        """Begins to do a request again, unless enough are being done already, or have been."""
        wanted = self._gate.request.shadow or 0
        at_once = min(self._gate.limits.concurrency, wanted - self._compared)
        if trace.feedback or len(self._working) >= at_once or not self._part.calls(trace, self._model):
            return
        task = asyncio.create_task(self._work(trace))
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _work(self, trace: Trace) -> None:
        met = self._gate.shadow
        assert met is not None  # noqa: S101 - the gate is in the shadow
        try:
            self._compared += await side_by_side(
                trace,
                self._part,
                self._model,
                old=self._old,
                new=self._new,
                met=met,
                preference=self._gate.limits.min_preference is not None,
            )
        except Exception:
            logger.exception("trace %s could not be done again in the shadow", trace.id)
        if self._compared >= (self._gate.request.shadow or 0):
            self.done.set()


class _Canary:
    """A canary watched.

    Attributes:
        done: Set when it has met as many requests as were wanted, if a number was.
    """

    def __init__(self, part: Part, old: str, new: str, seen: Comparison, wanted: int | None) -> None:
        self._part, self._old, self._new, self._seen, self._wanted = part, old, new, seen, wanted
        self.done = asyncio.Event()

    def take(self, trace: Trace) -> None:
        """Counts a request."""
        watch(trace, self._part, self._old, self._new, self._seen)
        if self._wanted is not None and self._seen.new.requests >= self._wanted:
            self.done.set()


class _Pinned:
    """The roles, one of them pinned to a revision (a `RoleSource`)."""

    def __init__(self, roles: Revisions, role: str, revision: Revision) -> None:
        self._roles, self._role, self._revision = roles, role, revision

    def names(self) -> list[str]:
        """The roles."""
        return self._roles.names()

    @asynccontextmanager
    async def lease(self, role: str) -> AsyncIterator[Endpoint]:
        """Yields the revision's endpoint for the one role, and for any other what serves it."""
        held = self._roles.hold(self._revision) if role == self._role else self._roles.lease(role)
        async with held as endpoint:
            yield endpoint


def broken(limits: GateConfig, met: Comparison, *, least: int = 1) -> str | None:
    """Says which limit the new revision breaks, and by how much; None where it keeps to all of them.

    Args:
        limits: The limits.
        met: The figures.
        least: Figures of fewer requests than these decide nothing.
    """
    old, new = met.old, met.new
    if new.requests < least:
        return None
    both = old.requests >= least
    consistency, before = share(new.consistent, new.pairs), share(old.consistent, old.pairs)
    floor = limits.min_consistency
    if floor is None and consistency is not None and before is not None and both:
        chance = math.sqrt(consistency * (1 - consistency) / new.pairs + before * (1 - before) / old.pairs)
        floor = before - 2 * chance
    timed = both and min(len(old.latencies_ms), len(new.latencies_ms)) >= limits.min_requests
    slower = _ratio(new.percentile_ms(95), old.percentile_ms(95)) if timed else None
    said = new.liked + new.disliked
    against = share(new.disliked, said) if said >= least else None
    if against is not None:
        against -= share(old.disliked, old.liked + old.disliked) or 0.0
    unread = share(new.parse_failures, 2 * new.pairs)
    failed = share(new.failures, new.calls)
    agreed, alike = share(met.agreed, met.decided), share(met.same, met.answers)
    preferred = share(met.preferred, met.preferences)
    looked_at: list[tuple[str, str, float | None, float | None]] = [
        ("max_failures", "the share of calls that failed", failed, limits.max_failures),
        ("max_parse_failures", "the share of unreadable verdicts", unread, limits.max_parse_failures),
        ("min_agreement", "the judges' agreement on winners", agreed, limits.min_agreement),
        ("min_consistency", "the share of pairs judged alike in both orders", consistency, floor),
        ("min_answer_agreement", "the share of like answers", alike, limits.min_answer_agreement),
        ("min_preference", "the judge's preference for the new answers", preferred, limits.min_preference),
        ("max_latency_ratio", "the calls' p95 latency over the old one's", slower, limits.max_latency_ratio),
        ("max_disliked", "feedback against it, beyond the old one's share,", against, limits.max_disliked),
    ]
    for name, measured, value, limit in looked_at:
        if value is None or limit is None:
            continue
        if name.startswith("min_") and value < limit:
            return f"{measured} was {value:.3g}, below {limit:.3g} ({name})"
        if name.startswith("max_") and value > limit:
            return f"{measured} was {value:.3g}, above {limit:.3g} ({name})"
    return None


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
