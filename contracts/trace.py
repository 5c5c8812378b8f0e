"""The trace: the record of one fused request.

The gateway writes it; `mixfuse pairs build` and people read it. It holds everything that a preference pair needs.
"""

import time
import uuid
from datetime import UTC, datetime
from itertools import combinations
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mixfuse.contracts.strict_yaml import Strict

Stage = Literal["answer", "revision", "verdict", "analysis", "synthesis"]

_FIRST = datetime(1, 1, 1, tzinfo=UTC).timestamp()
_LAST = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()


def time_in_utc(at: float) -> datetime:
    """Returns seconds since 1970 as a time in UTC; what is outside the years 1 to 9999 is on their first or last day.

    Another program may have written milliseconds.
    """
    return datetime.fromtimestamp(min(max(at, _FIRST), _LAST), UTC)


class Usage(Strict):
    """Tokens of one call, or summed over several.

    Attributes:
        prompt_tokens: What was sent.
        completion_tokens: What was written, thoughts included.
        reasoning_tokens: How many of the completion's are thoughts, as far as the endpoint says.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


class Call(Strict):
    """One attempt to call one model; failed and cancelled attempts are recorded too.

    Attributes:
        stage: The purpose of the call.
        member: The name of the member, judge or synthesizer in the config.
        model: The model name sent upstream; for a role it names the adapter revision.
        revision: The adapter revision that answered, if the member is a role.
        candidate: The candidate that the call produced, counted from 0; for answers and revisions.
        attempt: The number of the attempt at this call, from 1; retries and hedges are counted.
        outcome: "ok", or the type of the failure (`timeout`, `upstream_error`, …); see docs/failures.md.
        error: The failure's message.
        text: The answer, or the part of it that arrived.
        thoughts: What a reasoning model thought before it answered.
        tool_calls: The tools that the answer calls.
        usage: Tokens of the call.
        estimated: Whether the usage was estimated because the upstream sent none.
        cost: The call's cost in dollars.
        started_ms: Milliseconds since the request began.
        duration_ms: How long the attempt took, in milliseconds.
    """

    stage: Stage
    member: str
    model: str
    revision: str | None = None
    candidate: int | None = None
    attempt: int = 1
    outcome: str = "ok"
    error: str | None = None
    text: str | None = None
    thoughts: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    usage: Usage = Usage()
    estimated: bool = False
    cost: float = 0.0
    started_ms: float = 0.0
    duration_ms: float = 0.0


class Verdict(Strict):
    """The judge's verdict on one pair of candidates, both orders combined (see `judge_protocol.combine`).

    Attributes:
        first: One candidate, counted from 0.
        second: The other candidate.
        winner: The better one of the two, or "tie".
        score: Probability that the first is better, averaged over the orders.
        consistent: Whether both orders name the same winner.
        orders: The probability that the first is better in each order, as it was read and before calibration: with the
            first shown as A, with the second shown as A; None for one that could not be read.
        parse_failures: How many of the two verdicts could not be read.
        read: How the verdict was read: from the log-probabilities of the first token, from its text, or from the
            scores that a reward model gave the two.
    """

    first: int
    second: int
    winner: Literal["first", "second", "tie"]
    score: float
    consistent: bool
    parse_failures: int = 0
    read: Literal["logprobs", "parsed", "scores"] = "logprobs"
    orders: tuple[float | None, float | None] | None = None


class Turn(Strict):
    """The text of one candidate in one round of a debate."""

    candidate: int
    text: str


class Debate(Strict):
    """The transcript of a debate.

    Attributes:
        rounds: The candidates' texts: first their answers, then each round of revisions.
        stopped: Why the debate ended.
    """

    rounds: list[list[Turn]]
    stopped: Literal["agreement", "max_rounds", "budget", "deadline"]


class Citation(Strict):
    """The candidates that a paragraph of the answer uses, as the synthesizer states them."""

    paragraph: int
    candidates: list[int]


class Analysis(Strict):
    """What the synthesizer found in the candidates before it wrote the answer; each entry is a sentence.

    Attributes:
        consensus: What they agree on.
        contradictions: Where they contradict each other.
        partial_coverage: What only some of them say.
        unique_insights: What a single one says, and is worth keeping.
        blind_spots: What none of them says.
    """

    consensus: list[str]
    contradictions: list[str]
    partial_coverage: list[str]
    unique_insights: list[str]
    blind_spots: list[str]


class WeighedAnswer(Strict):
    """One class of equal answers, as mode `auto` weighed it.

    Attributes:
        candidates: The candidates that give it, counted from 0.
        score: What it weighs, in nats.
        probability: That it is right, before calibration.
    """

    candidates: list[int]
    score: float
    probability: float


class Weighing(Strict):
    """How mode `auto` came to its answer.

    Attributes:
        combiner: The combiner's revision; None where votes were counted without one.
        target: The confidence that was asked for.
        domain: The kind of question, as the request named it.
        confidence: The probability that the answer is right; without a combiner a rough one, from votes alone.
        low_confidence: Whether it is below `abstain_below`.
        stopped: Why no further member was asked: `target`, `not_worth_more`, `all_asked`, `budget`, `deadline`,
            `explore`.
        asked: The members that were asked, in order.
        propensities: Member → the probability with which it was asked, given the answers before it. It names all those
            who were asked together by chance; any other member that was asked was asked for sure.
        classes: The likeliest first.
    """

    combiner: str | None = None
    target: float | None = None
    domain: str | None = None
    confidence: float
    low_confidence: bool = False
    stopped: str
    asked: list[str]
    propensities: dict[str, float] = {}
    classes: list[WeighedAnswer]


_Candidates = tuple[Annotated[int, Field(strict=True, ge=0)], ...]


class Feedback(Strict):
    """What a user says of an answer. A trace keeps it as it came.

    Attributes:
        correct: Candidates that are right.
        wrong: Candidates that are wrong.
        unmarked: Candidates whose earlier marks count no more.
        best: The best candidate; the others are then not right.
        score: For the answer that was returned: right above 0, wrong below.
        user: Who says so; unset: the API key.
        comment: Anything in words; nothing reads it.
        metadata: Anything else; nothing reads it.
    """

    correct: _Candidates = ()
    wrong: _Candidates = ()
    unmarked: _Candidates = ()
    best: Annotated[int, Field(strict=True, ge=0)] | None = None
    score: Annotated[float, Field(strict=True)] | None = None
    user: str | None = None
    comment: str | None = None
    metadata: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _either(self) -> Self:
        for one, other in combinations(("correct", "wrong", "unmarked"), 2):
            if both := sorted({*getattr(self, one)} & {*getattr(self, other)}):
                raise ValueError(f"candidate {both[0]} cannot be both {one!r} and {other!r}")
        return self

    @property
    def most(self) -> int:
        """The highest candidate that it names; -1 if it names none."""
        return max((*self.correct, *self.wrong, *self.unmarked, -1 if self.best is None else self.best))


class Trace(Strict):
    """One fused request.

    Attributes:
        key: The id of the request's API key, never the key itself.
        metadata: What the client noted about the request.
        candidates: The member's name of each candidate.
        debate: The transcript, in mode `debate`.
        analysis: What the synthesizer found in the candidates, if it was asked to analyse them first.
        citations: The candidates that each paragraph uses, if citations were requested in mode `merge`.
        weighing: How mode `auto` came to its answer.
        winner: The candidate whose text was returned, in the modes `best_of` and `auto`.
        reason: How the answer was chosen: `judged`, `agreement`, `lone_survivor`, `judge_failed`, `synthesis`, …
        tool_calls: The tools that the answer calls.
        cached_from: The trace of the request whose kept answer this one got; nobody was called then.
        feedback: Feedback that users gave later.
    """

    id: str = Field(default_factory=lambda: f"trace-{uuid.uuid4().hex}")
    created_at: float = Field(default_factory=time.time)
    model: str
    mode: str
    key: str | None = None
    messages: list[dict[str, Any]]
    parameters: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    candidates: list[str] = []
    calls: list[Call] = []
    verdicts: list[Verdict] = []
    debate: Debate | None = None
    analysis: Analysis | None = None
    citations: list[Citation] | None = None
    weighing: Weighing | None = None
    winner: int | None = None
    reason: str = ""
    answer: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    cached_from: str | None = None
    outcome: str = "ok"
    error: str | None = None
    judge_protocol: str | None = None
    duration_ms: float = 0.0
    feedback: list[dict[str, Any]] = []

    @property
    def usage(self) -> Usage:
        """Tokens of all calls together, as the client sees them."""
        return Usage(
            prompt_tokens=sum(call.usage.prompt_tokens for call in self.calls),
            completion_tokens=sum(call.usage.completion_tokens for call in self.calls),
            reasoning_tokens=sum(call.usage.reasoning_tokens for call in self.calls),
        )

    @property
    def cost(self) -> float:
        """The cost of all calls together, in dollars."""
        return sum(call.cost for call in self.calls)
