"""One request under way: what the modes share while they work, and what becomes its trace."""

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

from mixfuse.contracts import judge_protocol
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.trace import Citation, Debate, Trace, Verdict
from mixfuse.fusion.answering.candidate import Candidate
from mixfuse.fusion.answering.response_format import OutputFormat
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import NOTHING, Ledger, Spend
from mixfuse.fusion.calls.pool import Pool, estimate, fan_out
from mixfuse.fusion.calls.upstream import Emit, Reply
from mixfuse.fusion.config import Agreement, Member, ModelConfig, Modes
from mixfuse.fusion.messages import Message, without_image_data

Mode = Literal["best_of", "merge", "debate", "pass_through"]

# Long enough that a chunk is worth its frame, short enough that a reader sees text move.
_PIECE = 48
_PROTOCOL = judge_protocol.digest()


@dataclass(frozen=True)
class Plan:
    """What one request asks for, settled against the config.

    Attributes:
        model: The model name the client sent.
        mode: How the answer is made.
        messages: The conversation; a content is a string, or OpenAI's list of parts where there are images.
        parameters: Sampling parameters, tools and output format for the calls that write text.
        members: Who answers, in the config's order; for `pass_through` the one model asked for.
        settings: How the modes wait and end.
        judge: Who compares, where there is one.
        synthesizer: Who merges, where there is one.
        tools: Whether an answer may call tools.
        output: What the answer must be, if not just text.
        skipped: Members that are not asked because they take no images.
    """

    model: str
    mode: Mode
    messages: tuple[Message, ...]
    parameters: dict[str, Any]
    members: tuple[Member, ...]
    settings: Modes = field(default_factory=Modes)
    judge: ModelConfig | None = None
    synthesizer: ModelConfig | None = None
    tools: bool = False
    output: OutputFormat | None = None
    skipped: tuple[str, ...] = ()


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
        reason: Why the answer is what it is; see `mixfuse.contracts.trace.Trace`.
        finish_reason: Of the text returned.
        error: Why the judge or the synthesizer was done without.
        tool_calls: What the answer calls, if it calls tools.
        debate: The transcript of a debate so far.
        citations: What each paragraph of a merged answer drew on, where it was to say so.
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
    tool_calls: list[dict[str, Any]] | None = None
    debate: Debate | None = None
    citations: list[Citation] | None = None
    logprobs: dict[str, Any] | None = None

    @property
    def names(self) -> list[str]:
        """Member names by candidate index."""
        return [member.name for member in self.plan.members for _ in range(member.samples)]

    @property
    def agreement(self) -> Agreement:
        """When candidates say the same: JSON that must fit a schema is compared as JSON, not as text."""
        how = self.plan.settings.agreement
        return "json" if how == "exact" and self.plan.output is not None else how

    def time_left_s(self) -> float:
        """Seconds until members are no longer waited for; never negative."""
        return max(0.0, self.plan.settings.deadline_ms - self.ledger.elapsed_ms()) / 1000

    async def answers(self, heard: Callable[[list[Candidate]], None] | None = None) -> None:
        """Has every member answer and fills `candidates`.

        Args:
            heard: Told the answers so far while the grace lasts; see `fan_out`.

        Raises:
            TooFewAnswersError: The quorum was not met.
            CallError: A budget does not allow asking them all (`budget`).
        """
        asked = [(member, sample) for member in self.plan.members for sample in range(member.samples)]
        # All or nothing, and before anything is sent: a member left out for want of money would be a worse answer.
        self._reserve((member, self.plan.messages) for member, _ in asked)
        attempts = [
            self._ask(
                member,
                self.plan.messages,
                _sample_parameters(self.plan.parameters, sample),
                stage="answer",
                index=index,
            )
            for index, (member, sample) in enumerate(asked)
        ]
        settings = self.plan.settings

        def so_far(results: list[Reply | None]) -> None:
            found = zip(asked, results, strict=True)
            if heard is not None:
                heard([Candidate.of(index, member, reply) for index, ((member, _), reply) in enumerate(found) if reply])

        results = await fan_out(
            attempts,
            quorum=settings.min_responses,
            grace_s=None if settings.grace_ms is None else settings.grace_ms / 1000,
            deadline_s=self.time_left_s(),
            heard=so_far if heard else None,
        )
        failures: list[Failure] = []
        for index, ((member, _), result) in enumerate(zip(asked, results, strict=True)):
            if isinstance(result, CallError):
                failures.append(Failure(member.name, index, result.kind, str(result)))
            else:
                self.candidates.append(Candidate.of(index, member, result))
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
            self._ask(candidate.member, prompt, self.plan.parameters, stage="revision", index=candidate.index)
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
            Candidate.of(candidate.index, candidate.member, result) if isinstance(result, Reply) else candidate
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

    async def primary(self, reason: str = "primary") -> str:
        """Has the first member answer alone, streamed as it comes; where it fails, the next, in the config's order.

        For a model asked for by name, and for requests with tools in a mode that writes a new text: no two members'
        calls can be made into one.

        Raises:
            CallError: A member failed after its first piece of text, or the last one failed.
        """
        begun = False

        async def emit(text: str) -> None:
            nonlocal begun
            begun = True
            if self.emit is not None:
                await self.emit(text)

        stream = None if self.emit is None or self.plan.output is not None else emit
        index = 0
        for member in self.plan.members:
            try:
                reply = await self._ask(
                    member, self.plan.messages, self.plan.parameters, stage="answer", index=index, emit=stream
                )
                break
            except CallError:
                if begun or member is self.plan.members[-1]:
                    raise
            index += member.samples
        chosen = Candidate.of(index, member, reply)
        self.candidates = [chosen]
        self.logprobs = reply.logprobs
        return await self.give(chosen, reason, sent=stream is not None)

    async def _ask(
        self,
        member: Member,
        messages: Sequence[Message],
        parameters: dict[str, Any],
        *,
        stage: Literal["answer", "revision"],
        index: int,
        emit: Emit | None = None,
    ) -> Reply:
        """Asks a member for a candidate, which must have the form that the request wants.

        Raises:
            CallError: No usable answer came back.
        """
        reply = await self.pool.ask(
            member, messages, parameters, stage=stage, name=member.name, ledger=self.ledger, candidate=index, emit=emit
        )
        self.check(reply)
        return reply

    def check(self, reply: Reply) -> None:
        """Sees to it that an answer has the form the request wants; the ledger's line says so if it has not.

        Raises:
            CallError: It has not (`invalid_response`).
        """
        if reply.tool_calls:
            fault = _tool_call_fault(reply.tool_calls)
        else:
            fault = self.plan.output.fault(reply.text) if self.plan.output else None
        if fault is None:
            return
        if reply.finish_reason == "length":
            fault = f"{fault} (it was cut off by max_tokens)"
        calls = self.ledger.calls
        place = next(place for place, entry in enumerate(calls) if entry is reply.call)
        calls[place] = reply.call.model_copy(update={"outcome": "invalid_response", "error": fault})
        raise CallError("invalid_response", fault)

    async def give(self, candidate: Candidate, reason: str, *, sent: bool = False) -> str:
        """Settles on a candidate and emits its text, verbatim, in pieces, unless it was sent as it came."""
        self.winner, self.reason, self.finish_reason = candidate.index, reason, candidate.finish_reason
        self.tool_calls = candidate.tool_calls
        if not sent:
            await self.emit_whole(candidate.text)
        return candidate.text

    async def emit_whole(self, text: str) -> None:
        """Emits a text that is there already, in pieces."""
        if self.emit is not None:
            for start in range(0, len(text), _PIECE):
                await self.emit(text[start : start + _PIECE])

    def trace(self, answer: str | None, *, outcome: str = "ok", error: str | None = None) -> Trace:
        """What happened, as the record that is stored."""
        return Trace(
            id=self.id,
            created_at=self.created_at,
            model=self.plan.model,
            mode=self.plan.mode,
            key=self.key,
            messages=[without_image_data(message) for message in self.plan.messages],
            parameters=self.plan.parameters,
            candidates=self.names,
            calls=list(self.ledger.calls),
            verdicts=list(self.verdicts),
            debate=self.debate,
            citations=self.citations,
            winner=self.winner,
            reason=self.reason,
            answer=answer,
            tool_calls=None if answer is None else self.tool_calls,
            outcome=outcome,
            error=error or self.error,
            judge_protocol=_PROTOCOL if self.verdicts else None,
            duration_ms=self.ledger.elapsed_ms(),
        )


def _tool_call_fault(calls: list[dict[str, Any]]) -> str | None:
    """What is wrong with the form of tool calls, if something is."""
    try:
        whole = all(
            isinstance(text, str)
            for call in calls
            for text in (call["id"], call["function"]["name"], call["function"]["arguments"])
        )
    except (KeyError, TypeError):
        whole = False
    return None if whole else "a tool call has no id, name or arguments"


def _sample_parameters(parameters: dict[str, Any], sample: int) -> dict[str, Any]:
    """Moves the seed on from sample to sample: with one and the same they would all be alike."""
    if sample == 0 or "seed" not in parameters:
        return parameters
    return {**parameters, "seed": parameters["seed"] + sample}
