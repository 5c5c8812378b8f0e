"""The trace record: what one fused request did.

Written by the gateway, read by `mixfuse pairs build` and by people. Everything a preference pair needs is in it.
"""

import time
import uuid
from typing import Any, Literal

from pydantic import Field

from mixfuse.contracts.strict_yaml import Strict

Stage = Literal["answer", "revision", "verdict", "synthesis"]


class Usage(Strict):
    """Tokens of one call, or summed over several."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


class Call(Strict):
    """One attempt at one model, failed and cancelled ones too.

    Attributes:
        stage: What the call was for.
        member: The member's (or judge's, synthesizer's) name in the config.
        model: The model name sent upstream; for a role it is revision-qualified.
        revision: The adapter revision that answered, where the member is a role.
        candidate: Which candidate (0-based) the call produced, for answers and revisions.
        attempt: Which attempt at the same call this was, from 1; retries and hedges count on.
        outcome: "ok", or the type of the failure (`timeout`, `upstream_error`, …); see docs/failures.md.
        text: What came back, whole or as far as it came.
        estimated: The usage was estimated because the upstream sent none.
        cost: Dollars.
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
    tool_calls: list[dict[str, Any]] | None = None
    usage: Usage = Usage()
    estimated: bool = False
    cost: float = 0.0
    started_ms: float = 0.0
    duration_ms: float = 0.0


class Verdict(Strict):
    """What the judge said of one pair of candidates, both orders together (see `judge_protocol.combine`).

    Attributes:
        read: From what: the log-probabilities of its first token, or a written verdict where there are none.
    """

    first: int
    second: int
    winner: Literal["first", "second", "tie"]
    score: float
    consistent: bool
    parse_failures: int = 0
    read: Literal["logprobs", "parsed"] = "logprobs"


class Turn(Strict):
    """What one candidate of a debate said in one round."""

    candidate: int
    text: str


class Debate(Strict):
    """How a debate went.

    Attributes:
        rounds: What the candidates said: first their answers, then each round of revisions.
        stopped: Why there was no further round.
    """

    rounds: list[list[Turn]]
    stopped: Literal["agreement", "max_rounds", "budget", "deadline"]


class Citation(Strict):
    """Which candidates the synthesizer says a paragraph of its answer drew on."""

    paragraph: int
    candidates: list[int]


class Trace(Strict):
    """One fused request.

    Attributes:
        key: The id of the API key the request came with; never the key itself.
        winner: The candidate whose text was returned, for `best_of`.
        candidates: Member names by candidate index.
        debate: The transcript, for `debate`.
        citations: What each paragraph drew on, for a `merge` that was to say so.
        tool_calls: The answer's, where it calls tools.
        reason: Why the answer is what it is: `judged`, `agreement`, `lone_survivor`, `judge_failed`, `synthesis`, …
        feedback: What users said of the answer later.
    """

    id: str = Field(default_factory=lambda: f"trace-{uuid.uuid4().hex}")
    created_at: float = Field(default_factory=time.time)
    model: str
    mode: str
    key: str | None = None
    messages: list[dict[str, Any]]
    parameters: dict[str, Any] = {}
    candidates: list[str] = []
    calls: list[Call] = []
    verdicts: list[Verdict] = []
    debate: Debate | None = None
    citations: list[Citation] | None = None
    winner: int | None = None
    reason: str = ""
    answer: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    outcome: str = "ok"
    error: str | None = None
    judge_protocol: str | None = None
    duration_ms: float = 0.0
    feedback: list[dict[str, Any]] = []

    @property
    def usage(self) -> Usage:
        """The sum over all calls: what the client is shown."""
        return Usage(
            prompt_tokens=sum(call.usage.prompt_tokens for call in self.calls),
            completion_tokens=sum(call.usage.completion_tokens for call in self.calls),
        )

    @property
    def cost(self) -> float:
        """Dollars of all calls."""
        return sum(call.cost for call in self.calls)
