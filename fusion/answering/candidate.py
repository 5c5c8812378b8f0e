"""A candidate: one member's answer to a request."""

from dataclasses import dataclass
from typing import Any

from mixfuse.fusion.calls.upstream import Reply
from mixfuse.fusion.config import Member


@dataclass(frozen=True)
class Candidate:
    """A member's answer.

    Attributes:
        index: Its number among all samples that were asked for, from 0; a failed sample leaves a gap.
        member: The member that gave it.
        text: Its text; empty where it only calls tools.
        finish_reason: Why the member stopped, as its endpoint sent it.
        tool_calls: The tools it calls, in OpenAI's form.
        thoughts: What the member thought before it answered; nobody but the client who asks for them sees them.
    """

    index: int
    member: Member
    text: str
    finish_reason: str
    tool_calls: list[dict[str, Any]] | None = None
    thoughts: str | None = None

    @classmethod
    def of(cls, index: int, member: Member, reply: Reply) -> "Candidate":
        """Returns a member's reply as a candidate."""
        return cls(index, member, reply.text, reply.finish_reason, reply.tool_calls, reply.thoughts)
