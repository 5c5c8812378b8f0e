"""One request under way: what the modes share while they work, and what becomes its trace."""

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Literal

from fusion.config import Member, ModelConfig, Modes
from fusion.ledger import NOTHING, Spend
from fusion.pool import Pool, estimate, fan_out
from fusion.upstream import CallError, Emit, Ledger, Message, Reply
from mixfuse import judge_protocol
from mixfuse.errors import MixfuseError
from mixfuse.trace import Trace, Verdict

Mode = Literal["best_of", "merge", "debate", "pass_through"]

# Long enough that a chunk is worth its frame, short enough that a reader sees text move.
_PIECE = 48


@dataclass(frozen=True)
class Plan:
    """What one request asks for, settled against the config.

    Attributes:
        model: The model name the client sent.
        mode: How the answer is made.
        messages: The conversation, each content a plain string.
        parameters: Sampling parameters for the calls that write text.
        members: Who answers, in the config's order; for `pass_through` the one model asked for.
        settings: How the modes wait and end.
        judge: Who compares, where there is one.
        synthesizer: Who merges, where there is one.
    """

    model: str
    mode: Mode
    messages: tuple[Message, ...]
    parameters: dict[str, Any]
    members: tuple[Member, ...]
    settings: Modes = field(default_factory=Modes)
    judge: ModelConfig | None = None
    synthesizer: ModelConfig | None = None


@dataclass(frozen=True)
class Candidate:
    """A member's answer. `index` counts every sample asked for, so a failed one leaves a gap."""

    index: int
    member: Member
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Failure:
    """A member that gave no answer, and why."""

    member: str
    candidate: int
    type: str
    message: str


class TooFewAnswersError(MixfuseError):
    """Fewer members answered than the quorum; lists each one's reason."""

    def __init__(self, answered: int, quorum: int, failures: Sequence[Failure]) -> None:
        reasons = "; ".join(f"{failure.member}: {failure.type} ({failure.message})" for failure in failures)
        super().__init__(f"{answered} of at least {quorum} members answered: {reasons}", kind="too_few_answers")
        self.failures = tuple(failures)


@dataclass
class Run:
    """The state of one request; ends as a `Trace`.

    Attributes:
        plan: What is asked for.
        pool: How models are reached.
        key: The id of the API key it came with.
        emit: Takes the answer piece by piece; None where it is sent whole.
        id: Its trace's.
        created_at: When it began, in seconds since 1970.
        ledger: Every call made so far.
        candidates: The answers in hand, in candidate order; a debate replaces them each round.
        verdicts: What the judge said of each pair.
        winner: The candidate returned, if the answer is one.
        reason: Why the answer is what it is; see `mixfuse.trace.Trace`.
        finish_reason: Of the text returned.
        error: Why the judge or the synthesizer was done without.
        logprobs: Of the text returned, in a pass-through that asked for them.
    """

    plan: Plan
    pool: Pool
    key: str | None = None
    emit: Emit | None = None
    id: str = field(default_factory=lambda: f"trace-{uuid.uuid4().hex}")
    created_at: float = field(default_factory=time.time)
    ledger: Ledger = field(default_factory=Ledger)
    candidates: list[Candidate] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    winner: int | None = None
    reason: str = ""
    finish_reason: str = "stop"
    error: str | None = None
    logprobs: dict[str, Any] | None = None

    @property
    def names(self) -> list[str]:
        """Member names by candidate index."""
        return [member.name for member in self.plan.members for _ in range(member.samples)]

    def time_left_s(self) -> float:
        """Seconds until members are no longer waited for; never negative."""
        return max(0.0, self.plan.settings.deadline_ms - self.ledger.elapsed_ms()) / 1000

    async def answers(self) -> None:
        """Has every member answer and fills `candidates`.

        Raises:
            TooFewAnswersError: The quorum was not met.
            CallError: A budget does not allow asking them all (`budget`).
        """
        asked = [(member, sample) for member in self.plan.members for sample in range(member.samples)]
        # All or nothing, and before anything is sent: a member left out for want of money would be a worse answer.
        self._reserve((member, self.plan.messages) for member, _ in asked)
        attempts = [
            self.pool.ask(
                member,
                self.plan.messages,
                _sample_parameters(self.plan.parameters, sample),
                stage="answer",
                name=member.name,
                ledger=self.ledger,
                candidate=index,
            )
            for index, (member, sample) in enumerate(asked)
        ]
        settings = self.plan.settings
        results = await fan_out(
            attempts,
            quorum=settings.min_responses,
            grace_s=None if settings.grace_ms is None else settings.grace_ms / 1000,
            deadline_s=self.time_left_s(),
        )
        failures: list[Failure] = []
        for index, ((member, _), result) in enumerate(zip(asked, results, strict=True)):
            if isinstance(result, CallError):
                failures.append(Failure(member.name, index, result.kind, str(result)))
            else:
                self.candidates.append(Candidate(index, member, result.text, result.finish_reason))
        if len(self.candidates) < settings.min_responses:
            raise TooFewAnswersError(len(self.candidates), settings.min_responses, failures)

    async def revise(self, prompts: Sequence[Sequence[Message]]) -> None:
        """Has every candidate's member write it anew; one whose revision fails or is late stays as it is.

        Args:
            prompts: What each candidate's member is told, in candidate order.

        Raises:
            CallError: A budget does not allow asking them all (`budget`).
        """
        self._reserve((candidate.member, prompt) for candidate, prompt in zip(self.candidates, prompts, strict=True))
        attempts = [
            self.pool.ask(
                candidate.member,
                prompt,
                self.plan.parameters,
                stage="revision",
                name=candidate.member.name,
                ledger=self.ledger,
                candidate=candidate.index,
            )
            for candidate, prompt in zip(self.candidates, prompts, strict=True)
        ]
        settings = self.plan.settings
        results = await fan_out(
            attempts,
            quorum=min(settings.min_responses, len(attempts)),
            grace_s=None if settings.grace_ms is None else settings.grace_ms / 1000,
            deadline_s=self.time_left_s(),
        )
        self.candidates = [
            replace(candidate, text=result.text, finish_reason=result.finish_reason)
            if isinstance(result, Reply)
            else candidate
            for candidate, result in zip(self.candidates, results, strict=True)
        ]

    def _reserve(self, calls: Iterable[tuple[Member, Sequence[Message]]]) -> None:
        """Sets aside what these calls may cost.

        Raises:
            CallError: A budget does not allow it (`budget`).
        """
        if self.ledger.budgets:
            estimates = (estimate(member, messages, self.plan.parameters) for member, messages in calls)
            self.ledger.reserve(reduce(Spend.plus, estimates, NOTHING))

    async def give(self, candidate: Candidate, reason: str) -> str:
        """Settles on a candidate and emits its text, verbatim, in pieces."""
        self.winner, self.reason, self.finish_reason = candidate.index, reason, candidate.finish_reason
        if self.emit is not None:
            for start in range(0, len(candidate.text), _PIECE):
                await self.emit(candidate.text[start : start + _PIECE])
        return candidate.text

    def trace(self, answer: str | None, *, outcome: str = "ok", error: str | None = None) -> Trace:
        """What happened, as the record that is stored."""
        return Trace(
            id=self.id,
            created_at=self.created_at,
            model=self.plan.model,
            mode=self.plan.mode,
            key=self.key,
            messages=list(self.plan.messages),
            parameters=self.plan.parameters,
            candidates=self.names,
            calls=list(self.ledger.calls),
            verdicts=list(self.verdicts),
            winner=self.winner,
            reason=self.reason,
            answer=answer,
            outcome=outcome,
            error=error or self.error,
            judge_protocol=judge_protocol.digest() if self.verdicts else None,
            duration_ms=self.ledger.elapsed_ms(),
        )


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates without those that repeat an earlier one; runs of white space count as one space."""
    by_text: dict[str, Candidate] = {}
    for candidate in candidates:
        by_text.setdefault(" ".join(candidate.text.split()), candidate)
    return list(by_text.values())


def question(messages: Sequence[Message]) -> str:
    """The conversation as a judge is shown it: a lone message as it is, several as a transcript."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _sample_parameters(parameters: dict[str, Any], sample: int) -> dict[str, Any]:
    """Moves the seed on from sample to sample: with one and the same they would all be alike."""
    if sample == 0 or "seed" not in parameters:
        return parameters
    return {**parameters, "seed": parameters["seed"] + sample}
