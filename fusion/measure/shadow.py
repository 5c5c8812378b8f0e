"""Two revisions of one role beside one another: what each did in live requests, and what the new one would have done.

Knows neither how revisions are loaded nor what follows from the figures: `mixfuse/app/gates.py` does.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mixfuse.contracts.trace import Call, Stage, Trace, Verdict
from mixfuse.fusion.answering.agreement import candidate_key, distinct
from mixfuse.fusion.answering.candidate import Candidate
from mixfuse.fusion.answering.pairwise_judge import judge_pairs
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
"""Outcomes that tell against the model that was asked: not what the request, its client or its budget brought about."""

_WRITTEN = ("answer", "synthesis")  # what is said in a debate's further rounds answers others: it is not asked again


@dataclass
class Side:
    """What one of the two revisions did.

    Attributes:
        requests: How many it had a part in.
        calls: Those that ended well or in a fault of its own (`FAULTS`); others are not counted.
        failures: Of them, those that failed.
        latencies_ms: Of the calls that ended well, in milliseconds.
        tokens: Prompt and completion tokens of all calls.
        cost: Dollars.
        pairs: How many it judged, in both orders.
        consistent: In how many of them both orders named one winner.
        parse_failures: How many of its verdicts, two a pair, could not be read.
        liked: Feedback for answers it wrote or chose.
        disliked: Feedback against them.
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
        """Counts what it did in a request."""
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
        """A percentile of its latencies (the nearest rank); None where it answered nothing."""
        ordered = sorted(self.latencies_ms)
        return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else None

    def report(self) -> dict[str, Any]:
        """The figures as JSON; a rate of nothing is None."""
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
    """Both revisions' figures, and how far they agree where they met the same request.

    Attributes:
        decided: Pairs in which both named a winner, in both orders.
        agreed: Of them, those in which it was the same.
        answers: Prompts that both answered.
        same: Of them, those with answers that say the same (`mixfuse.fusion.answering.agreement`).
        preferred: How often the judge preferred the new one's answer to the old one's; a tie counts half.
        preferences: Of how many such pairs.
        spent_tokens: What the comparing took: calls that no client had asked for.
        spent_cost: The same in dollars.
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
        """Counts what the comparing took in one ledger."""
        self.spent_tokens += ledger.spent.tokens
        self.spent_cost += ledger.spent.cost

    def count_agreement(self, old: Sequence[Verdict], new: Sequence[Verdict]) -> None:
        """Counts how far both sides' verdicts on the same pairs agree."""
        for by_old, by_new in zip(old, new, strict=True):
            if by_old.consistent and by_new.consistent:
                self.decided += 1
                self.agreed += by_old.winner == by_new.winner

    def report(self) -> dict[str, Any]:
        """The figures as JSON; a rate of nothing is None."""
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
    """A role as traces show it.

    Attributes:
        role: Its name.
        names: The names under which it is called: of members, "judge", "synthesizer", its own.
        judge: The judge's config where the role judges.
        config: The gateway's.
    """

    role: str
    names: frozenset[str]
    judge: Judge | None
    config: FusionConfig

    @classmethod
    def of(cls, role: str, config: FusionConfig) -> "Part":
        """Which part a role plays in a config."""
        judge = config.judge if config.judge is not None and config.judge.role == role else None
        names = {member.name for member in config.members if member.role == role} | {role}
        names |= {"judge"} if judge else set()
        names |= {"synthesizer"} if config.synthesizer is not None and config.synthesizer.role == role else set()
        return cls(role, frozenset(names), judge, config)

    def calls(self, trace: Trace, model: str) -> list[Call]:
        """A trace's calls of the role that the engine's model of that name was asked for.

        By both: several roles may be the base's, and have one model.
        """
        return [call for call in trace.calls if call.model == model and call.member in self.names]

    def verdicts(self, trace: Trace, model: str) -> list[Verdict]:
        """A trace's verdicts, if they are that model's; none where it is one of two that were asked."""
        judges = {call.model for call in trace.calls if call.stage == "verdict" and call.outcome == "ok"}
        return trace.verdicts if self.judge is not None and judges == {model} else []

    def member(self, name: str) -> ModelConfig:
        """The model config behind a name in a trace."""
        if name == "synthesizer" and self.config.synthesizer is not None:
            return self.config.synthesizer
        member = next((member for member in self.config.members if member.name == name), None)
        return member or Member(name=name, role=self.role)


def watch(trace: Trace, part: Part, old: str, new: str, seen: Comparison) -> None:
    """Counts what each of two models did in a request; one with feedback has been counted, and only that is.

    Args:
        trace: The request.
        part: The role's.
        old: The one revision's name in the engine.
        new: The other's.
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
    """Has the new revision do what the old one did in a request, outside of it.

    Every pair that the old one judged is judged by the new one. What the old one wrote as a member or synthesizer both
    write anew, at the same time, so that both are asked under the same load. Nothing of it reaches the client.

    Args:
        trace: The request, finished.
        part: The role's.
        model: The old revision's name in the engine.
        old: Reaches the old revision under the role's name.
        new: Reaches the new one.
        met: Takes the figures, of calls that failed as well.
        preference: Whether the judge says which of both answers is better.

    Returns:
        Whether there was anything to compare.
    """
    calls, verdicts = part.calls(trace, model), part.verdicts(trace, model)
    # One question a member, however many samples it gave. A trace has hashes where images were.
    written = {call.member: call.stage for call in calls if call.stage in _WRITTEN and not images(trace.messages)}
    if not verdicts and not written:
        return False
    met.old.requests += 1
    met.new.requests += 1
    if verdicts and part.judge is not None:
        met.old.count([call for call in calls if call.stage == "verdict"], verdicts)
        met.new.count(*await _judge_again(trace, part.judge, verdicts, part=part, new=new, met=met))
    for name, stage in written.items():
        await _write_again(trace, part, name, stage, old=old, new=new, met=met, preference=preference)
    return True


async def _judge_again(
    trace: Trace, judge: Judge, verdicts: list[Verdict], *, part: Part, new: Pool, met: Comparison
) -> tuple[list[Call], list[Verdict]]:
    """Returns (the new judge's calls, its verdicts; none if a call failed)."""
    request = _request_again(trace, new, part.config)
    candidates = {candidate.index: candidate for candidate in request.candidates}
    pairs = [(candidates[verdict.first], candidates[verdict.second]) for verdict in verdicts]
    try:
        async with new.lease(judge, Purpose.of(judge, "verdict", "judge"), request.ledger) as endpoint:
            again = await judge_pairs(request, judge, endpoint, pairs)
    except CallError:  # the ledger has it
        return request.ledger.calls, []
    finally:
        met.spend(request.ledger)
    met.count_agreement(verdicts, again)
    return request.ledger.calls, again


async def _write_again(
    trace: Trace, part: Part, name: str, stage: Stage, *, old: Pool, new: Pool, met: Comparison, preference: bool
) -> None:
    """Has both revisions write the answer anew and counts how they compare."""
    requests = [_request_again(trace, pool, part.config) for pool in (old, new)]
    messages: Sequence[Message] = trace.messages
    if stage == "synthesis":
        messages = synthesis_prompt(requests[0].plan, distinct(requests[0].candidates, "exact"))

    async def write(request: FusionRequest, index: int) -> Candidate | None:
        model = part.member(name)
        purpose = Purpose.of(model, stage, name, index)
        try:
            reply = await request.pool.ask(model, messages, trace.parameters, purpose=purpose, ledger=request.ledger)
        except CallError:  # the ledger has it
            return None
        return Candidate.of(index, _ANONYMOUS, reply)

    by_old, by_new = await asyncio.gather(*(write(request, index) for index, request in enumerate(requests)))
    for side, request in zip((met.old, met.new), requests, strict=True):
        side.count(request.ledger.calls)
        met.spend(request.ledger)
    if by_old is None or by_new is None:
        return
    rule = part.config.modes.agreement if part.config.modes.agreement != "never" else "exact"
    same = candidate_key(by_old, rule) == candidate_key(by_new, rule)
    met.answers += 1
    met.same += same
    if preference and part.config.judge is not None:
        request = _request_again(trace, old, part.config)
        preferred = 0.5 if same else await _preferred(request, part.config.judge, (by_old, by_new), met)
        if preferred is not None:
            met.preferences += 1
            met.preferred += preferred


async def _preferred(
    request: FusionRequest, judge: Judge, pair: tuple[Candidate, Candidate], met: Comparison
) -> float | None:
    """Returns 1 if the judge prefers the second of the pair, 0 if the first, ½ for a tie; None if it failed."""
    try:
        async with request.pool.lease(judge, Purpose.of(judge, "verdict", "judge"), request.ledger) as endpoint:
            (verdict,) = await judge_pairs(request, judge, endpoint, [pair])
    except CallError:
        return None
    finally:
        met.spend(request.ledger)
    return {"first": 0.0, "tie": 0.5, "second": 1.0}[verdict.winner]


_ANONYMOUS = Member(name="candidate", role="candidate")  # nothing here depends on who wrote a text


def _request_again(trace: Trace, pool: Pool, config: FusionConfig) -> FusionRequest:
    """Returns a finished request as one under way, with its candidates and a ledger of its own."""
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
        for call in trace.calls  # in the order in which they ended: a debate's later rounds count
        if call.outcome == "ok" and call.candidate is not None and call.stage in ("answer", "revision")
    }
    return FusionRequest(plan, pool, candidates=[candidates[index] for index in sorted(candidates)])


def _answered(trace: Trace, calls: Sequence[Call]) -> bool:
    """Whether one of these calls wrote the answer that the client got, or chose it."""
    return any(
        call.stage in ("synthesis", "verdict") or (trace.winner is not None and call.candidate == trace.winner)
        for call in calls
        if call.outcome == "ok"
    )


def _liked(trace: Trace) -> bool | None:
    """What the feedback says of the answer returned; None where nothing."""
    if trace.winner is not None:
        return by_feedback(trace).get(trace.winner)
    score = trace.feedback[-1].get("score")
    return score > 0 if isinstance(score, int | float) and score else None


def share(part: float, whole: float) -> float | None:
    """`part` of `whole`; None of nothing."""
    return part / whole if whole else None


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
