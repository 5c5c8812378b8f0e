"""Gates before a swap: a staged revision must keep limits on live requests before it serves.

Shadow: the staged revision repeats the calls of N live requests beside the serving one (`fusion/measure/shadow.py`).
Canary: the staged revision serves a share of the requests, and their traces are measured. If both are requested, the
canary follows the shadow. A broken limit ends the gate, and the old revision serves on. A gate that is passed ends with
the flip.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from pydantic import Field

from mixfuse.app.admin_api import UNDER_WAY, GateReport, GateRequest, GateState, Ratio, Share, SwapRequest
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import Strict, validate
from mixfuse.contracts.trace import Trace
from mixfuse.fusion.calls.pool import Pool, RoleSource
from mixfuse.fusion.calls.upstream import Endpoint
from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.measure.shadow import Comparison, Part, share, side_by_side, watch
from mixfuse.serve.role_record import Reason
from mixfuse.serve.slots import Revision
from mixfuse.serve.swap import Swapper

logger = logging.getLogger(__name__)

_CHECK_S = 0.5  # seconds between two checks of a canary's limits


class GateConfig(Strict):
    """The limits that a staged revision must keep, compared with the serving one. A null limit is not checked.

    Attributes:
        min_agreement: Shadow only. Of the pairs in which both judges name a winner, the least share with the same
            winner. Not checked if the old judge is the base model, unless the swap sets it.
        min_consistency: The least share of pairs in which the judge names the same winner in both orders. Null: it may
            be below the old one's share by chance only (two standard errors).
        max_parse_failures: The largest share of a judge's verdicts that cannot be read.
        min_answer_agreement: Shadow only. The least share of prompts to which both give the same answer.
        min_preference: Shadow only. The least share of prompts for which the judge prefers the new answer; ties count
            half. The judge is asked only if this is set.
        max_failures: The largest share of the new revision's calls that fail.
        max_latency_ratio: The largest ratio, new to old, of the 95th percentiles of the calls' latencies. Checked once
            both have `min_requests` calls, since one slow call proves nothing.
        max_disliked: Canary only. The largest share of negative feedback on the new revision's answers, in excess of
            the old one's share.
        min_requests: A canary is not judged before this many requests reached it, and this many the old revision.
        concurrency: The most requests repeated at once in the shadow.
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


@dataclass
class Gate:
    """One gate, in progress or ended.

    Attributes:
        role: The role.
        old: The serving revision; None for the base.
        new: The staged revision.
        request: The request that began the gate.
        limits: The limits that the staged revision must keep.
        state: The gate's phase, or how it ended.
        reason: Why it ended so.
        shadow: The figures of the shadow; None before it.
        canary: The figures of the canary; None before it.
        began: When it began, in seconds since 1970.
    """

    role: str
    old: str | None
    new: str
    request: SwapRequest
    limits: GateConfig
    state: GateState
    reason: str = ""
    shadow: Comparison | None = None
    canary: Comparison | None = None
    began: float = field(default_factory=time.time)

    @property
    def under_way(self) -> bool:
        """Whether it has not ended."""
        return self.state in UNDER_WAY

    def report(self) -> GateReport:
        """Returns the gate as the admin API reports it."""
        return GateReport(
            state=self.state,
            reason=self.reason,
            old=self.old,
            new=self.new,
            began=self.began,
            asked=self.request.model_dump(mode="json", exclude_none=True),
            limits=self.limits.model_dump(exclude_none=True),
            shadow=self.shadow.report() if self.shadow else None,
            canary=self.canary.report() if self.canary else None,
        )


def limits_of(limits: GateConfig, request: GateRequest) -> GateConfig:
    """The limits of a gate: those of the serve config, some of them replaced.

    Raises:
        MixfuseError: A limit is unknown, or its value does not fit.
    """
    return validate({**limits.model_dump(), **request.limits}, GateConfig, source="limits")


class GateError(MixfuseError):
    """A staged revision did not pass its gate; the old one serves on."""

    def __init__(self, message: str) -> None:
        super().__init__(message, kind="gate")


class Revisions(RoleSource, Protocol):
    """The role table as the gateway uses it, with leases of single revisions."""

    def hold(self, revision: Revision) -> AbstractAsyncContextManager[Endpoint]:
        """Leases this revision, serving or staged, while the block runs."""
        ...


class Gates:
    """The gates of a server.

    Args:
        swapper: Swaps the server's roles.
        roles: Leases their revisions as endpoints.
        fusion: The gateway's config.
        limits: The serve config's `gate`.
    """

    def __init__(self, swapper: Swapper, roles: Revisions, fusion: FusionConfig, limits: GateConfig) -> None:
        self._swapper, self._table = swapper, swapper.table
        self._roles, self._fusion, self._limits = roles, fusion, limits
        self._gates: dict[str, Gate] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._phases: dict[str, _Shadow | _Canary] = {}

    async def close(self) -> None:
        """Stops every gate; the old revisions serve on."""
        for role in list(self._tasks):
            await self.stop(role)

    def observe(self, trace: Trace) -> None:
        """Measures a finished trace of the gateway (`mixfuse.fusion.http.gateway.Observer`)."""
        for phase in self._phases.values():
            phase.observe(trace)

    def of(self, role: str) -> Gate | None:
        """The role's gate: the present one, or the last."""
        return self._gates.get(role)

    async def begin(self, role: str, request: SwapRequest) -> Gate:
        """Stages an adapter, starts its gate in the background, and returns.

        Raises:
            MixfuseError: A limit is unknown, or as for `Swapper.stage`.
        """
        limits = limits_of(self._limits, request)
        why: Reason = "shadow" if request.canary is None else "canary"
        revision = await self._swapper.stage(role, request.directory, why=why)
        assert revision.revision is not None  # noqa: S101 - only an adapter can be staged
        old = self._table.serving()[role]
        if old.revision is None and "min_agreement" not in request.limits:
            limits = limits.model_copy(update={"min_agreement": None})
        state: GateState = "canary" if request.shadow is None else "shadow"
        gate = self._gates[role] = Gate(role, old.revision, revision.revision, request, limits, state)
        self._tasks[role] = asyncio.create_task(self._run(gate, old, revision))
        await asyncio.sleep(0)  # a task that is cancelled before its first step cannot clean up
        return gate

    async def through(self, role: str, request: SwapRequest) -> None:
        """Swaps a role through a gate, and returns when the revision serves.

        Raises:
            MixfuseError: It did not pass, or was stopped (kind "gate"); or the gate failed (kind "engine"); or as for
                `begin`.
        """
        gate = await self.begin(role, request)
        if task := self._tasks.get(role):
            await asyncio.wait({task})
        if gate.state != "promoted":
            raise MixfuseError(f"{gate.new}: {gate.reason}", kind="engine" if gate.state == "failed" else "gate")

    async def stop(self, role: str) -> Gate | None:
        """Stops the role's gate, if it is in progress, and discards the staged revision; returns the role's gate."""
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
            swap = await self._swapper.commit(role, new)
            gate.state, gate.reason = "promoted", f"within its limits; {swap.drained} requests finished on the old one"
        except GateError as refusal:
            await self._discard(gate, "refused", str(refusal), new)
        except asyncio.CancelledError:
            # After the flip the new revision serves already: the drain continues in the background.
            if self._table.serving()[role] is new:
                gate.state, gate.reason = "promoted", "within its limits"
            else:
                await self._discard(gate, "stopped", "it was stopped; the old revision serves on", new)
        except Exception as error:
            if not isinstance(error, MixfuseError):
                logger.exception("the gate of role %s failed unexpectedly", role)
            await self._discard(gate, "failed", str(error), new)
        finally:
            del self._tasks[role]
            logger.info("gate of role %s: %s: %s (%s)", role, gate.new, gate.state, gate.reason)

    async def _discard(self, gate: Gate, state: GateState, reason: str, revision: Revision) -> None:
        why: Reason = "canary-rollback" if gate.canary is not None else "shadow-rollback"
        try:
            await self._swapper.discard(revision, why=why, reason=reason)
        except MixfuseError as error:  # the engine is gone, and its adapters with it
            logger.warning("%s could not be unloaded: %s", revision.model, error)
        gate.state, gate.reason = state, reason

    async def _shadow(self, gate: Gate, old: Revision, new: Revision) -> None:
        gate.state, gate.shadow = "shadow", Comparison()
        wanted, timeout_s = gate.request.shadow or 0, gate.request.timeout_s
        async with (
            Pool(_FixedRevision(self._roles, gate.role, old)) as old_pool,
            Pool(_FixedRevision(self._roles, gate.role, new)) as new_pool,
            _Shadow(gate, self._part(gate), old.model, old_pool, new_pool) as shadow,
        ):
            try:
                with self._observing(gate.role, shadow):
                    async with asyncio.timeout(timeout_s):
                        await shadow.done.wait()
            except TimeoutError:
                raise GateError(
                    f"no swap: within {timeout_s:g} s {gate.shadow.new.requests} of {wanted} live requests used role "
                    f"{gate.role!r}; the old revision serves on. Ask for fewer (--shadow), or wait longer (--timeout)"
                ) from None
        if limit := broken(gate.limits, gate.shadow):
            raise GateError(f"no swap: in the shadow of {wanted} requests, {limit}; the old revision serves on")

    async def _canary(self, gate: Gate, old: Revision, new: Revision) -> None:
        gate.state, gate.canary = "canary", Comparison()
        request, figures = gate.request, gate.canary
        least = min(gate.limits.min_requests, request.requests or gate.limits.min_requests)
        canary = _Canary(self._part(gate), old.model, new.model, figures, request.requests)
        self._table.set_canary(gate.role, new, request.canary or 0.0)
        end = time.monotonic() + (request.for_s or request.timeout_s)
        try:
            with self._observing(gate.role, canary):
                while not canary.done.is_set() and (left_s := end - time.monotonic()) > 0:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(min(left_s, _CHECK_S)):
                            await canary.done.wait()
                    if limit := broken(gate.limits, figures, least=least):
                        raise GateError(
                            f"rolled back: as a canary, in {figures.new.requests} requests, {limit}; "
                            "the old revision serves all again"
                        )
        finally:
            self._table.clear_canary(gate.role)
        if figures.new.requests < (request.requests or least):
            raise GateError(
                f"rolled back: within {request.for_s or request.timeout_s:g} s {figures.new.requests} requests reached "
                f"the canary, {request.requests or least} are needed; the old revision serves all again"
            )

    def _part(self, gate: Gate) -> Part:
        return Part.of(gate.role, self._fusion)

    @contextmanager
    def _observing(self, role: str, phase: "_Shadow | _Canary") -> Iterator[None]:
        """Passes finished traces to `phase` while the block runs."""
        self._phases[role] = phase
        try:
            yield
        finally:
            del self._phases[role]


class _Shadow:
    """The shadow phase: repeats live requests. An async context manager that cancels unfinished ones at its end.

    Attributes:
        done: Set when the wanted number of requests has been repeated.
    """

    def __init__(self, gate: Gate, part: Part, model: str, old: Pool, new: Pool) -> None:
        self._gate, self._part, self._model, self._old, self._new = gate, part, model, old, new
        self._tasks: set[asyncio.Task[None]] = set()
        self._compared = 0
        self.done = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def observe(self, trace: Trace) -> None:
        """Repeats a request in the background, unless enough are being repeated or have been."""
        wanted = self._gate.request.shadow or 0
        at_once = min(self._gate.limits.concurrency, wanted - self._compared)
        if trace.feedback or len(self._tasks) >= at_once or not self._part.calls(trace, self._model):
            return
        task = asyncio.create_task(self._repeat(trace))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _repeat(self, trace: Trace) -> None:
        figures = self._gate.shadow
        assert figures is not None  # noqa: S101 - set before the shadow begins
        try:
            self._compared += await side_by_side(
                trace,
                self._part,
                self._model,
                old=self._old,
                new=self._new,
                met=figures,
                preference=self._gate.limits.min_preference is not None,
            )
        except Exception:
            logger.exception("trace %s could not be repeated in the shadow", trace.id)
        if self._compared >= (self._gate.request.shadow or 0):
            self.done.set()


class _Canary:
    """The canary phase: measures the traces of live requests.

    Attributes:
        done: Set when the wanted number of requests has reached the canary; never if no number is wanted.
    """

    def __init__(self, part: Part, old: str, new: str, figures: Comparison, wanted: int | None) -> None:
        self._part, self._old, self._new, self._figures, self._wanted = part, old, new, figures, wanted
        self.done = asyncio.Event()

    def observe(self, trace: Trace) -> None:
        """Measures a request."""
        watch(trace, self._part, self._old, self._new, self._figures)
        if self._wanted is not None and self._figures.new.requests >= self._wanted:
            self.done.set()


class _FixedRevision:
    """The roles, one of them fixed to a revision (a `RoleSource`)."""

    def __init__(self, roles: Revisions, role: str, revision: Revision) -> None:
        self._roles, self._role, self._revision = roles, role, revision

    def names(self) -> list[str]:
        """The roles."""
        return self._roles.names()

    @asynccontextmanager
    async def lease(self, role: str) -> AsyncIterator[Endpoint]:
        """Leases the fixed revision for its role, and the serving revision for any other role."""
        lease = self._roles.hold(self._revision) if role == self._role else self._roles.lease(role)
        async with lease as endpoint:
            yield endpoint


def broken(limits: GateConfig, figures: Comparison, *, least: int = 1) -> str | None:
    """Returns which limit the new revision breaks, and by how much; None if it keeps all of them.

    Args:
        limits: The limits.
        figures: What both revisions did.
        least: No limit is checked before this many requests.
    """
    old, new = figures.old, figures.new
    if new.requests < least:
        return None
    comparable = old.requests >= least
    consistency, before = share(new.consistent, new.pairs), share(old.consistent, old.pairs)
    floor = limits.min_consistency
    if floor is None and consistency is not None and before is not None and comparable:
        chance = math.sqrt(consistency * (1 - consistency) / new.pairs + before * (1 - before) / old.pairs)
        floor = before - 2 * chance
    timed = comparable and min(len(old.latencies_ms), len(new.latencies_ms)) >= limits.min_requests
    slower = _ratio(new.percentile_ms(95), old.percentile_ms(95)) if timed else None
    feedback = new.liked + new.disliked
    disliked = share(new.disliked, feedback) if feedback >= least else None
    if disliked is not None:
        disliked -= share(old.disliked, old.liked + old.disliked) or 0.0
    unread = share(new.parse_failures, 2 * new.pairs)
    failed = share(new.failures, new.calls)
    agreed, alike = share(figures.agreed, figures.decided), share(figures.same, figures.answers)
    preferred = share(figures.preferred, figures.preferences)
    checks: list[tuple[str, str, float | None, float | None]] = [
        ("max_failures", "the share of calls that failed", failed, limits.max_failures),
        ("max_parse_failures", "the share of unreadable verdicts", unread, limits.max_parse_failures),
        ("min_agreement", "the judges' agreement on winners", agreed, limits.min_agreement),
        ("min_consistency", "the share of pairs judged alike in both orders", consistency, floor),
        ("min_answer_agreement", "the share of like answers", alike, limits.min_answer_agreement),
        ("min_preference", "the judge's preference for the new answers", preferred, limits.min_preference),
        ("max_latency_ratio", "the calls' p95 latency over the old one's", slower, limits.max_latency_ratio),
        ("max_disliked", "feedback against it, beyond the old one's share,", disliked, limits.max_disliked),
    ]
    for name, measured, value, limit in checks:
        if value is None or limit is None:
            continue
        if name.startswith("min_") and value < limit:
            return f"{measured} was {value:.3g}, below {limit:.3g} ({name})"
        if name.startswith("max_") and value > limit:
            return f"{measured} was {value:.3g}, above {limit:.3g} ({name})"
    return None


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
