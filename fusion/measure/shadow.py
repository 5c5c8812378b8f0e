"""Compares two revisions of a role: what each did in live requests, and what the new one does with finished ones.

How revisions are loaded, and what follows from the figures, is in `mixfuse/app/gates.py`.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mixfuse.contracts.trace import Call, Stage, Trace, Verdict
from mixfuse.fusion.answering.agreement import candidate_key, distinct
from mixfuse.fusion.answering.candidate import Candidate
from mixfuse.fusion.answering.pairwise_judge import Pair, judge_pairs
from mixfuse.fusion.answering.request import FusionRequest, Plan
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import Ledger
from mixfuse.fusion.calls.pool import Pool
from mixfuse.fusion.calls.upstream import Purpose
from mixfuse.fusion.config import FusionConfig, Judge, Member, ModelConfig
from mixfuse.fusion.messages import Message, images
from mixfuse.fusion.modes.merge import synthesis_prompt
from mixfuse.fusion.store.export_traces import by_feedback

FAULTS = frozenset({"timeout", "upstream_error", "unreachable", "invalid_response", "refused"})
"""Outcomes that count against the model; others are due to the request, its client or its budget."""

_WRITTEN = ("answer", "synthesis")  # not a debate's revisions, which answer other candidates


@dataclass
class Side:
    """The figures of one of the two revisions.

    Attributes:
        requests: The requests that it took part in.
        calls: Its calls that succeeded or failed by its own fault (`FAULTS`); others are not counted.
        failures: The calls that failed.
        latencies_ms: The times of the calls that succeeded, in milliseconds.
        tokens: Prompt and completion tokens of all calls.
        cost: Dollars of all calls.
        pairs: The pairs that it judged, in both orders.
        consistent: The pairs with the same winner in both orders.
        parse_failures: The verdicts, two a pair, that could not be read.
        liked: Positive feedback for answers that it wrote or chose.
        disliked: Negative feedback for them.
    """

    requests: int = 0
    calls: int = 0
    failures: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    tokens: int = 0
    cost: float = 0.0
    pairs: int = 0
    consistent: int = 0
    parse_failures: int = 0
    liked: int = 0
    disliked: int = 0

    def count(self, calls: Sequence[Call], verdicts: Sequence[Verdict] = ()) -> None:
        """Counts its calls and verdicts in a request."""
        for call in calls:
            self.tokens += call.usage.total_tokens
            self.cost += call.cost
            if call.outcome == "ok":
                self.calls += 1
                self.latencies_ms.append(call.duration_ms)
            elif call.outcome in FAULTS:
                self.calls += 1
                self.failures += 1
        for verdict in verdicts:
            self.pairs += 1
            self.consistent += verdict.consistent
            self.parse_failures += verdict.parse_failures

    def percentile_ms(self, percent: float) -> float | None:
        """Returns a percentile of its latencies (the nearest rank); None if no call succeeded."""
        ordered = sorted(self.latencies_ms)
        return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else None

    def report(self) -> dict[str, Any]:
        """Returns the figures for JSON; a rate without cases is None."""
        return {
            "requests": self.requests,
            "calls": self.calls,
            "failures": self.failures,
            "p50_ms": _rounded(self.percentile_ms(50), 1),
            "p95_ms": _rounded(self.percentile_ms(95), 1),
            "tokens": self.tokens,
            "cost": self.cost,
            "pairs": self.pairs,
            "consistency": share(self.consistent, self.pairs),
            "parse_failures": self.parse_failures,
            "liked": self.liked,
            "disliked": self.disliked,
        }


@dataclass
class Comparison:
    """Both revisions' figures, and their agreement on requests that both answered.

    Attributes:
        old: The old revision's figures.
        new: The new revision's figures.
        decided: Pairs for which both named a winner, each the same one in both orders.
        agreed: Pairs of those with the same winner.
        answers: Prompts that both answered.
        same: Prompts of those with answers that agree (`mixfuse.fusion.answering.agreement`).
        preferred: How often the judge preferred the new revision's answer; a tie counts half.
        preferences: The number of pairs that the judge was asked about.
        spent_tokens: Tokens of the calls that were made only for the comparison.
        spent_cost: Dollars of these calls.
    """

    old: Side = field(default_factory=Side)
    new: Side = field(default_factory=Side)
    decided: int = 0
    agreed: int = 0
    answers: int = 0
    same: int = 0
    preferred: float = 0.0
    preferences: int = 0
    spent_tokens: int = 0
    spent_cost: float = 0.0

    def spend(self, ledger: Ledger) -> None:
        """Counts the calls of a ledger as made for the comparison."""
        self.spent_tokens += ledger.spent.tokens
        self.spent_cost += ledger.spent.cost

    def count_agreement(self, old: Sequence[Verdict], new: Sequence[Verdict]) -> None:
        """Counts how often both revisions' verdicts on the same pairs agree."""
        for by_old, by_new in zip(old, new, strict=True):
            if by_old.consistent and by_new.consistent:
                self.decided += 1
                self.agreed += by_old.winner == by_new.winner

    def report(self) -> dict[str, Any]:
        """Returns the figures for JSON; a rate without cases is None."""
        return {
            "old": self.old.report(),
            "new": self.new.report(),
            "agreement": share(self.agreed, self.decided),
            "decided": self.decided,
            "answer_agreement": share(self.same, self.answers),
            "preference": share(self.preferred, self.preferences),
            "spent_tokens": self.spent_tokens,
            "spent_cost": self.spent_cost,
        }


@dataclass(frozen=True)
class Part:
    """The part that a role plays in traces.

    Attributes:
        role: The role's name.
        names: The names of its calls: its members' names, "judge", "synthesizer", and its own name.
        judge: The judge's config, if the role judges.
        config: The gateway's config.
    """

    role: str
    names: frozenset[str]
    judge: Judge | None
    config: FusionConfig

    @classmethod
    def of(cls, role: str, config: FusionConfig) -> "Part":
        """Returns the part that a role plays in a config."""
        judge = config.judge if config.judge is not None and config.judge.role == role else None
        names = {member.name for member in config.members if member.role == role} | {role}
        names |= {"judge"} if judge else set()
        names |= {"synthesizer"} if config.synthesizer is not None and config.synthesizer.role == role else set()
        return cls(role, frozenset(names), judge, config)

    def calls(self, trace: Trace, model: str) -> list[Call]:
        """Returns the role's calls in a trace that went to this model of the engine.

        Both role and model are compared: several roles may be served by the base, under one model name.
        """
        return [call for call in trace.calls if call.model == model and call.member in self.names]

    def verdicts(self, trace: Trace, model: str) -> list[Verdict]:
        """Returns a trace's verdicts if this model gave all of them; none otherwise."""
        judges = {call.model for call in trace.calls if call.stage == "verdict" and call.outcome == "ok"}
        return trace.verdicts if self.judge is not None and judges == {model} else []

    def member(self, name: str) -> ModelConfig:
        """Returns the config of the model that a trace calls by this name."""
        if name == "synthesizer" and self.config.synthesizer is not None:
            return self.config.synthesizer
        member = next((member for member in self.config.members if member.name == name), None)
        return member or Member(name=name, role=self.role)


def watch(trace: Trace, part: Part, old: str, new: str, seen: Comparison) -> None:
    """Counts what each revision did in a live request, or, if the trace comes again with feedback, only that.

    Args:
        trace: The request's trace.
        part: The role's part.
        old: The old revision's model name in the engine.
        new: The new revision's model name.
        seen: Takes the figures.
    """
    for model, side in ((old, seen.old), (new, seen.new)):
        calls = part.calls(trace, model)
        if not calls:
            continue
        if not trace.feedback:
            side.requests += 1
            side.count(calls, part.verdicts(trace, model))
        elif _answered(trace, calls) and (liked := _liked(trace)) is not None:
            side.liked += liked
            side.disliked += not liked


async def side_by_side(
    trace: Trace, part: Part, model: str, *, old: Pool, new: Pool, met: Comparison, preference: bool = False
) -> bool:
    """Has the new revision repeat what the old one did in a finished request.

    The new revision judges every pair that the old one judged. Answers that the old one wrote as a member or
    synthesizer are written again by both at the same time, so that both work under the same load. The client gets
    nothing of this.

    Args:
        trace: The finished request's trace.
        part: The role's part.
        model: The old revision's model name in the engine.
        old: Reaches the old revision under the role's name.
        new: Reaches the new revision under the role's name.
        met: Takes the figures, of failed calls too.
        preference: Whether the judge compares both answers.

    Returns:
        Whether there was anything to compare.
    """
    calls, verdicts = part.calls(trace, model), part.verdicts(trace, model)
    # One question a member, whatever its samples. A trace holds no images, so a request with images is left out.
    written = {call.member: call.stage for call in calls if call.stage in _WRITTEN and not images(trace.messages)}
    if not verdicts and not written:
        return False
    met.old.requests += 1
    met.new.requests += 1
    repetition = _Repetition(trace, part, old, new, met)
    if verdicts and part.judge is not None:
        met.old.count([call for call in calls if call.stage == "verdict"], verdicts)
        met.new.count(*await repetition.judge(part.judge, verdicts))
    for name, stage in written.items():
        await repetition.write(name, stage, preference=preference)
    return True


@dataclass(frozen=True)
class _Repetition:
    """A finished request that is repeated with both revisions; the attributes are those of `side_by_side`."""

    trace: Trace
    part: Part
    old: Pool
    new: Pool
    met: Comparison

    async def judge(self, judge: Judge, verdicts: list[Verdict]) -> tuple[list[Call], list[Verdict]]:
        """Returns (the new judge's calls, its verdicts on the same pairs; none if a call failed)."""
        request = self._request(self.new)
        candidates = {candidate.index: candidate for candidate in request.candidates}
        pairs = [(candidates[verdict.first], candidates[verdict.second]) for verdict in verdicts]
        try:
            again = await self._judge_pairs(request, judge, pairs)
        except CallError:  # the ledger has it
            return request.ledger.calls, []
        self.met.count_agreement(verdicts, again)
        return request.ledger.calls, again

    async def write(self, name: str, stage: Stage, *, preference: bool) -> None:
        """Has both revisions write an answer or a synthesis, and counts how they compare."""
        requests = [self._request(pool) for pool in (self.old, self.new)]
        messages: Sequence[Message] = self.trace.messages
        if stage == "synthesis":
            messages = synthesis_prompt(requests[0].plan, distinct(requests[0].candidates, "exact"))
        purposes = [Purpose.of(self.part.member(name), stage, name, index) for index in range(2)]
        by_old, by_new = await asyncio.gather(
            *(self._written(request, messages, purpose) for request, purpose in zip(requests, purposes, strict=True))
        )
        for side, request in zip((self.met.old, self.met.new), requests, strict=True):
            side.count(request.ledger.calls)
            self.met.spend(request.ledger)
        if by_old is None or by_new is None:
            return
        config = self.part.config
        rule = config.modes.agreement if config.modes.agreement != "never" else "exact"
        same = candidate_key(by_old, rule) == candidate_key(by_new, rule)
        self.met.answers += 1
        self.met.same += same
        if preference and config.judge is not None:
            preferred = 0.5 if same else await self._preferred(config.judge, (by_old, by_new))
            if preferred is not None:
                self.met.preferences += 1
                self.met.preferred += preferred

    async def _written(self, request: FusionRequest, messages: Sequence[Message], purpose: Purpose) -> Candidate | None:
        """Has one revision write; returns what it wrote, or None if the call failed."""
        model = self.part.member(purpose.member)
        try:
            reply = await request.pool.ask(
                model, messages, self.trace.parameters, purpose=purpose, ledger=request.ledger
            )
        except CallError:  # the ledger has it
            return None
        return Candidate.of(purpose.candidate or 0, _ANONYMOUS, reply)

    async def _preferred(self, judge: Judge, pair: tuple[Candidate, Candidate]) -> float | None:
        """Returns 1 if the judge prefers the second of the pair, 0 if the first, ½ for a tie; None if it failed."""
        try:
            (verdict,) = await self._judge_pairs(self._request(self.old), judge, [pair])
        except CallError:
            return None
        return {"first": 0.0, "tie": 0.5, "second": 1.0}[verdict.winner]

    async def _judge_pairs(self, request: FusionRequest, judge: Judge, pairs: Sequence[Pair]) -> list[Verdict]:
        """Has pairs judged over the request's pool, and counts what that costs.

        Raises:
            CallError: A call failed.
        """
        try:
            async with request.pool.lease(judge, Purpose.of(judge, "verdict", "judge"), request.ledger) as endpoint:
                return await judge_pairs(request, judge, endpoint, pairs)
        finally:
            self.met.spend(request.ledger)

    def _request(self, pool: Pool) -> FusionRequest:
        """Returns the finished request as one under way, with its candidates and a ledger of its own."""
        trace, config = self.trace, self.part.config
        plan = Plan(
            trace.model,
            "best_of",
            tuple(trace.messages),
            trace.parameters,
            members=(),
            settings=config.modes.model_copy(update={"cite": trace.citations is not None}),
            synthesizer=config.synthesizer,
        )
        candidates = {
            call.candidate: Candidate(call.candidate, _ANONYMOUS, call.text or "", "stop", call.tool_calls)
            for call in trace.calls  # in the order in which they ended: of a debate the last round counts
            if call.outcome == "ok" and call.candidate is not None and call.stage in ("answer", "revision")
        }
        return FusionRequest(plan, pool, candidates=[candidates[index] for index in sorted(candidates)])


_ANONYMOUS = Member(name="candidate", role="candidate")  # nothing here depends on who wrote a text


def _answered(trace: Trace, calls: Sequence[Call]) -> bool:
    """Whether one of these calls wrote or chose the answer that the client got."""
    return any(
        call.stage in ("synthesis", "verdict") or (trace.winner is not None and call.candidate == trace.winner)
        for call in calls
        if call.outcome == "ok"
    )


def _liked(trace: Trace) -> bool | None:
    """Whether the feedback likes the answer that was returned; None if it does not say."""
    if trace.winner is not None:
        return by_feedback(trace).get(trace.winner)
    score = trace.feedback[-1].get("score")
    return score > 0 if isinstance(score, int | float) and score else None


def share(part: float, whole: float) -> float | None:
    """Returns `part / whole`; None if `whole` is 0."""
    return part / whole if whole else None


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
