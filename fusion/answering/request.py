"""One request under way: what it asks for, what its mode does with the members, and the trace it ends as."""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NoReturn

from mixfuse.contracts import judge_protocol
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.mode_names import SINGLE_MODEL_MODE
from mixfuse.contracts.trace import Analysis, Citation, Debate, Trace, Verdict, Weighing
from mixfuse.fusion.answering.candidate import Candidate
from mixfuse.fusion.answering.response_format import OutputFormat
from mixfuse.fusion.calls.failures import CallError, FailureKind
from mixfuse.fusion.calls.ledger import NOTHING, Ledger, Spend
from mixfuse.fusion.calls.pool import Pool, estimate, fan_out
from mixfuse.fusion.calls.upstream import Emit, Purpose, Reply
from mixfuse.fusion.config import Agreement, Member, ModelConfig, Modes
from mixfuse.fusion.messages import Message, without_image_data

# Characters. Long enough that a chunk is worth its frame, short enough that a reader sees the text move.
_PIECE = 48
_PROTOCOL = judge_protocol.digest()

MAX_SEED = 2**63 - 1
"""The greatest seed that OpenAI's API takes; the least is -2**63."""


@dataclass(frozen=True)
class Plan:
    """What a request asks for, with the config's defaults filled in.

    Attributes:
        model: The model name that the client sent.
        mode: The mode's name.
        messages: The conversation; a content is a string, or OpenAI's list of parts if there are images.
        parameters: Sampling parameters, tools and output format for the calls that write text.
        members: The members to ask, in the config's order; for `pass_through` the one model asked for.
        settings: How the mode waits and ends.
        judge: The model that compares candidates, if there is one.
        synthesizer: The model that merges, if there is one.
        tools: Whether an answer may call tools.
        output: The form that the answer must have; None for plain text.
        skipped: Members that are not asked because they take no images.
        domain: The kind of question, as the request names it.
        metadata: What the client notes about the request; it goes to the trace.
    """

    model: str
    mode: str
    messages: tuple[Message, ...]
    parameters: dict[str, Any]
    members: tuple[Member, ...]
    settings: Modes = field(default_factory=Modes)
    judge: ModelConfig | None = None
    synthesizer: ModelConfig | None = None
    tools: bool = False
    output: OutputFormat | None = None
    skipped: tuple[str, ...] = ()
    domain: str | None = None
    metadata: dict[str, str] | None = None


@dataclass(frozen=True)
class Failure:
    """A member that gave no answer.

    Attributes:
        member: Its name.
        candidate: The candidate that it would have given.
        type: The failure's kind.
        message: The failure in words.
    """

    member: str
    candidate: int
    type: str
    message: str


class TooFewAnswersError(MixfuseError):
    """Fewer members answered than the quorum; lists each one's failure."""

    def __init__(self, answered: int, quorum: int, failures: Sequence[Failure]) -> None:
        reasons = "; ".join(f"{failure.member}: {failure.type} ({failure.message})" for failure in failures)
        self.summary = f"{answered} of at least {quorum} members answered"
        super().__init__(f"{self.summary}: {reasons}", kind="too_few_answers")
        self.failures = tuple(failures)


@dataclass
class FusionRequest:
    """The state of one request while its mode works on it.

    Attributes:
        plan: What is asked for.
        pool: Reaches the models.
        key: The id of the client's API key.
        emit: Takes the answer piece by piece; None if the answer is sent whole.
        think: Takes the thoughts of the model that answers piece by piece, where the client asked for them.
        id: The id of its trace.
        created_at: When it began, in seconds since 1970.
        ledger: Every call made so far.
        candidates: The answers in hand, in candidate order; a debate replaces them each round.
        verdicts: The judge's verdicts, one a pair.
        winner: The index of the candidate that was returned, if the answer is a candidate's.
        reason: Why the answer is what it is; see `mixfuse.contracts.trace.Trace`.
        finish_reason: The finish reason of the text returned.
        error: The failure of the judge or the synthesizer, if the request was answered without it.
        tool_calls: The answer's tool calls.
        thoughts: What the model whose text is returned thought.
        debate: The transcript of a debate so far.
        analysis: What the synthesizer found in the candidates, if it was asked to analyse them first.
        citations: The candidates that each paragraph of a merged answer drew on, if `cite` is set.
        logprobs: The log-probabilities of the text returned, in a pass-through that asked for them.
        combiner: What weighs the answers in mode `auto`: a `mixfuse.fusion.combiner.serving.Serving`; None for votes.
        weighing: How mode `auto` came to its answer.
        cached_from: The trace of the request whose kept answer this one got.
        rewards: The scores of a reward model, by its name and the candidate; some may still be asked for.
    """

    plan: Plan
    pool: Pool
    key: str | None = None
    emit: Emit | None = None
    think: Emit | None = None
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
    thoughts: str | None = None
    debate: Debate | None = None
    analysis: Analysis | None = None
    citations: list[Citation] | None = None
    logprobs: dict[str, Any] | None = None
    combiner: object | None = None
    weighing: Weighing | None = None
    cached_from: str | None = None
    rewards: dict[tuple[str, int, str], asyncio.Future[float]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Member names by candidate index."""
        return [member.name for member in self.plan.members for _ in range(member.samples)]

    @property
    def agreement(self) -> Agreement:
        """When candidates agree: JSON that must fit a schema is compared as JSON, not as text."""
        rule = self.plan.settings.agreement
        return "json" if rule == "exact" and self.plan.output is not None else rule

    def time_left_s(self) -> float:
        """Seconds until members are no longer waited for; never negative."""
        return max(0.0, self.plan.settings.deadline_ms - self.ledger.elapsed_ms()) / 1000

    async def ask_members(self, on_answer: Callable[[list[Candidate]], None] | None = None) -> None:
        """Asks every member and fills `candidates`.

        Args:
            on_answer: Gets the candidates so far when the grace begins, and again with each further answer; see
                `fan_out`.

        Raises:
            TooFewAnswersError: The quorum was not met.
            CallError: A budget does not allow asking them all (`budget`).
        """
        samples = [(member, sample) for member in self.plan.members for sample in range(member.samples)]
        # All or nothing, and before anything is sent: a member left out for want of money would be a worse answer.
        self._reserve((member, self.plan.messages) for member, _ in samples)
        attempts = [
            self._ask_member(
                member,
                self.plan.messages,
                _sample_parameters(self.plan.parameters, sample),
                Purpose.of(member, "answer", member.name, index),
            )
            for index, (member, sample) in enumerate(samples)
        ]
        settings = self.plan.settings

        def on_success(replies: list[Reply | None]) -> None:
            if on_answer is not None:
                on_answer(
                    [Candidate.of(i, samples[i][0], reply) for i, reply in enumerate(replies) if reply is not None]
                )

        results = await fan_out(
            attempts,
            quorum=settings.min_responses,
            grace_s=None if settings.grace_ms is None else settings.grace_ms / 1000,
            deadline_s=self.time_left_s(),
            on_success=on_success if on_answer else None,
        )
        failures: list[Failure] = []
        for index, ((member, _), result) in enumerate(zip(samples, results, strict=True)):
            if isinstance(result, CallError):
                failures.append(Failure(member.name, index, result.kind, str(result)))
            else:
                self.candidates.append(Candidate.of(index, member, result))
        if len(self.candidates) < settings.min_responses:
            raise TooFewAnswersError(len(self.candidates), settings.min_responses, failures)

    async def ask_member(self, member: Member) -> list[Failure]:
        """Asks one member for all its samples and adds its answers to `candidates`; returns its failures."""
        first = sum(other.samples for other in self.plan.members[: self.plan.members.index(member)])
        attempts = [
            self._ask_member(
                member,
                self.plan.messages,
                _sample_parameters(self.plan.parameters, sample),
                Purpose.of(member, "answer", member.name, first + sample),
            )
            for sample in range(member.samples)
        ]
        failures = []
        for index, result in enumerate(await fan_out(attempts, quorum=1), first):
            if isinstance(result, CallError):
                failures.append(Failure(member.name, index, result.kind, str(result)))
            else:
                self.candidates.append(Candidate.of(index, member, result))
        self.candidates.sort(key=lambda candidate: candidate.index)
        return failures

    def affords(self, member: Member) -> bool:
        """Whether the budgets allow asking this member."""
        if not self.ledger.budgets:
            return True
        need = reduce(
            Spend.plus, [estimate(member, self.plan.messages, self.plan.parameters)] * member.samples, NOTHING
        )
        return self.ledger.affords(need)

    async def revise(self, prompts: Sequence[Sequence[Message]]) -> None:
        """Asks each candidate's member for a revision; a candidate whose revision fails or is late stays as it is.

        Args:
            prompts: The messages for each candidate's member, in candidate order.

        Raises:
            CallError: A budget does not allow asking them all (`budget`).
        """
        self._reserve((candidate.member, prompt) for candidate, prompt in zip(self.candidates, prompts, strict=True))
        attempts = [
            self._ask_member(
                candidate.member,
                prompt,
                self.plan.parameters,
                Purpose.of(candidate.member, "revision", candidate.member.name, candidate.index),
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
            Candidate.of(candidate.index, candidate.member, result) if isinstance(result, Reply) else candidate
            for candidate, result in zip(self.candidates, results, strict=True)
        ]

    def _reserve(self, calls: Iterable[tuple[Member, Sequence[Message]]]) -> None:
        """Reserves what these calls may cost.

        Raises:
            CallError: A budget does not allow it (`budget`).
        """
        if self.ledger.budgets:
            estimates = (estimate(member, messages, self.plan.parameters) for member, messages in calls)
            self.ledger.reserve(reduce(Spend.plus, estimates, NOTHING))

    async def answer_alone(self, reason: str) -> str:
        """Has the first member answer alone, streamed as it writes; if it fails, the next in the config's order.

        For a model asked for by name, and for requests with tools in a mode that writes a new text: two members' tool
        calls cannot be made into one.

        Raises:
            CallError: A member failed after its first piece of text, or the last one failed.
        """
        begun = False

        async def emit(text: str) -> None:
            nonlocal begun
            begun = True
            if self.emit is not None:
                await self.emit(text)

        async def think(text: str) -> None:
            nonlocal begun
            begun = True
            if self.think is not None:
                await self.think(text)

        stream = None if self.emit is None or self.plan.output is not None else emit
        thinking = think if stream is not None and self.think is not None else None
        index = 0
        for member in self.plan.members:
            purpose = Purpose.of(member, "answer", member.name, index)
            try:
                reply = await self._ask_member(
                    member, self.plan.messages, self.plan.parameters, purpose, emit=stream, think=thinking
                )
                break
            except CallError:
                if begun or member is self.plan.members[-1]:
                    raise
            index += member.samples
        candidate = Candidate.of(index, member, reply)
        self.candidates = [candidate]
        self.logprobs = reply.logprobs
        return await self.select(candidate, reason, sent=stream is not None)

    async def _ask_member(
        self,
        member: Member,
        messages: Sequence[Message],
        parameters: dict[str, Any],
        purpose: Purpose,
        *,
        emit: Emit | None = None,
        think: Emit | None = None,
    ) -> Reply:
        """Asks a member for a candidate: an answer with words in it, in the form that the request asks for.

        What a content filter left of an answer is none. A model asked for by its own name may answer as it likes.

        Raises:
            CallError: The member gave no usable answer.
        """
        reply = await self.pool.ask(
            member, messages, parameters, purpose=purpose, ledger=self.ledger, emit=emit, think=think
        )
        if self.plan.mode != SINGLE_MODEL_MODE:
            self.check_whole(reply)
        await self.check_form(reply)
        return reply

    def check_whole(self, reply: Reply) -> None:
        """Checks that an answer says something and was not filtered; if not, its ledger entry becomes a failure.

        Raises:
            CallError: It is empty (`invalid_response`), or a content filter cut it (`refused`).
        """
        if reply.finish_reason == "content_filter":
            self._fail(reply, "refused", "the endpoint's content filter cut the answer")
        if not reply.tool_calls and not judge_protocol.visible(reply.text).strip():
            cut = " (max_tokens was reached)" if reply.finish_reason == "length" else ""
            self._fail(reply, "invalid_response", f"the answer is empty{cut}")

    async def check_form(self, reply: Reply) -> None:
        """Checks that an answer has the form that the request asks for; if not, its ledger entry becomes a failure.

        Raises:
            CallError: It has not that form (`invalid_response`).
        """
        if reply.tool_calls:
            fault = _tool_call_fault(reply.tool_calls)
        else:
            output = self.plan.output  # in a thread: the answer and its schema may take their time
            fault = await asyncio.to_thread(output.fault, reply.text) if output else None
        if fault is None:
            return
        if reply.finish_reason == "length":
            fault = f"{fault} (it was cut off by max_tokens)"
        self._fail(reply, "invalid_response", fault)

    def _fail(self, reply: Reply, kind: FailureKind, fault: str) -> NoReturn:
        """Makes an answer's ledger entry a failure and raises it."""
        calls = self.ledger.calls
        place = next(place for place, entry in enumerate(calls) if entry is reply.call)
        calls[place] = reply.call.model_copy(update={"outcome": kind, "error": fault})
        raise CallError(kind, fault)

    async def select(self, candidate: Candidate, reason: str, *, sent: bool = False) -> str:
        """Makes a candidate the answer and emits its text unchanged, unless it was `sent` while it was written."""
        self.winner, self.reason, self.finish_reason = candidate.index, reason, candidate.finish_reason
        self.tool_calls, self.thoughts = candidate.tool_calls, candidate.thoughts
        if not sent:
            if self.think is not None and candidate.thoughts:
                await self.think(candidate.thoughts)
            await self.emit_text(candidate.text)
        return candidate.text

    async def emit_text(self, text: str) -> None:
        """Emits a complete text in pieces, if the request is streamed."""
        if self.emit is not None:
            for start in range(0, len(text), _PIECE):
                await self.emit(text[start : start + _PIECE])

    def trace(self, answer: str | None, *, outcome: str = "ok", error: str | None = None) -> Trace:
        """Returns the record that is stored of the request."""
        return Trace(
            id=self.id,
            created_at=self.created_at,
            model=self.plan.model,
            mode=self.plan.mode,
            key=self.key,
            messages=[without_image_data(message) for message in self.plan.messages],
            parameters=self.plan.parameters,
            metadata=self.plan.metadata or {},
            candidates=self.names,
            calls=list(self.ledger.calls),
            verdicts=list(self.verdicts),
            debate=self.debate,
            analysis=self.analysis,
            citations=self.citations,
            weighing=self.weighing,
            winner=self.winner,
            reason=self.reason,
            answer=answer,
            tool_calls=None if answer is None else self.tool_calls,
            cached_from=self.cached_from,
            outcome=outcome,
            error=error or self.error,
            judge_protocol=_PROTOCOL if self.verdicts else None,
            duration_ms=self.ledger.elapsed_ms(),
        )


def _tool_call_fault(calls: list[dict[str, Any]]) -> str | None:
    """Returns what is wrong with the form of tool calls; None if nothing is."""
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
    """Adds the sample's number to the seed: with one seed for all, all samples would be the same."""
    if sample == 0 or "seed" not in parameters:
        return parameters
    seed = parameters["seed"]
    return {**parameters, "seed": seed + sample if seed + sample <= MAX_SEED else seed - sample}
