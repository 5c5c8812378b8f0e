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
from mixfuse.fusion.answering.pairwise_judge import compare
from mixfuse.fusion.answering.request import Plan, Run
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import Ledger
from mixfuse.fusion.calls.pool import Pool
from mixfuse.fusion.calls.upstream import Purpose
from mixfuse.fusion.config import FusionConfig, Judge, Member, ModelConfig
from mixfuse.fusion.messages import Message, images
from mixfuse.fusion.modes import merge
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

    def meet(self, old: Sequence[Verdict], new: Sequence[Verdict]) -> None:
        """Counts how far both sides' verdicts on the same pairs agree."""
        for one, other in zip(old, new, strict=True):
            if one.consistent and other.consistent:
                self.decided += 1
                self.agreed += one.winner == other.winner

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
        found = next((member for member in self.config.members if member.name == name), None)
        return found or Member(name=name, role=self.role)


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
        met.new.count(*await _judged_again(trace, part.judge, verdicts, part=part, new=new, met=met))
    for name, stage in written.items():
        await _write_again(trace, part, name, stage, old=old, new=new, met=met, preference=preference)
    return True


async def _judged_again(
    trace: Trace, judge: Judge, verdicts: list[Verdict], *, part: Part, new: Pool, met: Comparison
) -> tuple[list[Call], list[Verdict]]:
    """(the new judge's calls, its verdicts; none where a call failed)."""
    run = _again(trace, new, part.config)
    candidates = {one.index: one for one in run.candidates}
    pairs = [(candidates[verdict.first], candidates[verdict.second]) for verdict in verdicts]
    try:
        async with new.lease(judge, _purpose(judge), run.ledger) as endpoint:
            found = await compare(run, judge, endpoint, pairs)
    except CallError:  # the ledger says so
        return run.ledger.calls, []
    finally:
        met.spend(run.ledger)
    met.meet(verdicts, found)
    return run.ledger.calls, found


async def _write_again(
    trace: Trace, part: Part, name: str, stage: Stage, *, old: Pool, new: Pool, met: Comparison, preference: bool
) -> None:
    runs = [_again(trace, pool, part.config) for pool in (old, new)]
    messages: Sequence[Message] = trace.messages
    if stage == "synthesis":
        messages = merge.messages(runs[0], distinct(runs[0].candidates, "exact"))

    async def ask(run: Run, index: int) -> Candidate | None:
        model = part.member(name)
        try:
            reply = await run.pool.ask(
                model, messages, trace.parameters, stage=stage, name=name, ledger=run.ledger, candidate=index
            )
        except CallError:  # the ledger says so
            return None
        return Candidate(index, _SOMEBODY, reply.text, reply.finish_reason, reply.tool_calls)

    one, other = await asyncio.gather(*(ask(run, index) for index, run in enumerate(runs)))
    for side, run in zip((met.old, met.new), runs, strict=True):
        side.count(run.ledger.calls)
        met.spend(run.ledger)
    if one is None or other is None:
        return
    rule = part.config.modes.agreement if part.config.modes.agreement != "never" else "exact"
    same = candidate_key(one, rule) == candidate_key(other, rule)
    met.answers += 1
    met.same += same
    if preference and part.config.judge is not None:
        preferred = (
            0.5 if same else await _preferred(_again(trace, old, part.config), part.config.judge, one, other, met)
        )
        if preferred is not None:
            met.preferences += 1
            met.preferred += preferred


async def _preferred(run: Run, judge: Judge, one: Candidate, other: Candidate, met: Comparison) -> float | None:
    """1 where the judge prefers the other, 0 where it prefers the one, ½ for a tie; None where it failed."""
    try:
        async with run.pool.lease(judge, _purpose(judge), run.ledger) as endpoint:
            (verdict,) = await compare(run, judge, endpoint, [(one, other)])
    except CallError:
        return None
    finally:
        met.spend(run.ledger)
    return {"first": 0.0, "tie": 0.5, "second": 1.0}[verdict.winner]


_SOMEBODY = Member(name="candidate", role="candidate")  # whose a text is says nothing here


def _again(trace: Trace, pool: Pool, config: FusionConfig) -> Run:
    """A finished request as one under way, its candidates in hand, with a ledger of its own."""
    settings = config.modes.model_copy(update={"cite": trace.citations is not None})
    plan = Plan(
        trace.model,
        "best_of",
        tuple(trace.messages),
        trace.parameters,
        members=(),
        settings=settings,
        synthesizer=config.synthesizer,
    )
    said = {
        call.candidate: Candidate(call.candidate, _SOMEBODY, call.text or "", "stop", call.tool_calls)
        for call in trace.calls  # in the order in which they ended: a debate's later rounds count
        if call.outcome == "ok" and call.candidate is not None and call.stage in ("answer", "revision")
    }
    return Run(plan, pool, candidates=[said[index] for index in sorted(said)])


def _purpose(judge: Judge) -> Purpose:
    return Purpose("verdict", "judge", price=judge.price, timeout_s=judge.timeout_s)


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
