"""The ledger of a request's calls, and the budgets that they draw on.

Before a call is made, the most that it is expected to cost is reserved in each budget; when the request ends, the
budgets get back what was not used. Several requests may draw on one budget (an API key's), so a reservation counts
from the moment it is made.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mixfuse.contracts.trace import Call, Usage
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.config import Price
from mixfuse.fusion.messages import Message

CHARACTERS_PER_TOKEN = 4
"""For estimates: the average of English text in common vocabularies."""

UNLIMITED_COMPLETION = 1024
"""Tokens reserved for an answer if neither the request nor the model sets a limit."""

NON_TEXT_PART = 4000
"""Characters that an image counts as: about 1000 tokens, as in common vision models."""


class Spend(NamedTuple):
    """Dollars and tokens."""

    cost: float = 0.0
    tokens: int = 0

    def plus(self, other: "Spend") -> "Spend":
        """Returns the sum of both."""
        return Spend(self.cost + other.cost, self.tokens + other.tokens)

    def minus(self, other: "Spend") -> "Spend":
        """Returns this less the other."""
        return Spend(self.cost - other.cost, self.tokens - other.tokens)


NOTHING = Spend()


class Budget:
    """A limit on spending, and what has been spent or reserved of it.

    Args:
        name: Its name in the message of a refusal.
        max_cost: Dollars; None for no limit.
        max_tokens: Prompt and completion tokens; None for no limit.
    """

    def __init__(self, name: str, *, max_cost: float | None = None, max_tokens: int | None = None) -> None:
        self.name, self.max_cost, self.max_tokens = name, max_cost, max_tokens
        self.used = NOTHING

    def allows(self, more: Spend) -> bool:
        """Whether this much more may be spent."""
        after = self.used.plus(more)
        return (self.max_cost is None or after.cost <= self.max_cost + 1e-12) and (
            self.max_tokens is None or after.tokens <= self.max_tokens
        )

    def add(self, spend: Spend) -> None:
        """Counts a reservation, or the difference between it and what was spent."""
        self.used = self.used.plus(spend)

    def describe(self) -> str:
        """Returns the limits and what is used of them, for the message of a refusal."""
        parts = []
        if self.max_cost is not None:
            parts.append(f"${self.used.cost:.6g} of ${self.max_cost:.6g}")
        if self.max_tokens is not None:
            parts.append(f"{self.used.tokens} of {self.max_tokens} tokens")
        return " and ".join(parts)


class Ledger:
    """Every attempt at a call in one request, failed and cancelled ones too, in the order in which they ended.

    Args:
        deadline_ms: Milliseconds after which no call of the request is retried; None for no limit.
        budgets: The budgets that its calls draw on.
    """

    def __init__(self, *, deadline_ms: float | None = None, budgets: Sequence[Budget] = ()) -> None:
        self.calls: list[Call] = []
        self.deadline_ms = deadline_ms
        self.budgets = list(budgets)
        self._began = time.monotonic()
        self._open = self._reserved = NOTHING

    def elapsed_ms(self) -> float:
        """Milliseconds since the request began."""
        return (time.monotonic() - self._began) * 1000

    def time_left_s(self) -> float:
        """Seconds until the deadline; infinite without one."""
        return math.inf if self.deadline_ms is None else (self.deadline_ms - self.elapsed_ms()) / 1000

    @property
    def spent(self) -> Spend:
        """What the calls in the ledger cost."""
        return Spend(sum(call.cost for call in self.calls), sum(call.usage.total_tokens for call in self.calls))

    def affords(self, more: Spend) -> bool:
        """Whether the budgets allow this much beyond what was spent and what calls under way may still cost."""
        need = self._missing(more)
        return all(budget.allows(need) for budget in self.budgets)

    def reserve(self, more: Spend) -> None:
        """Reserves what the next calls may cost, all of it or nothing.

        Raises:
            CallError: A budget does not allow it (`budget`).
        """
        if not self.budgets:
            return
        need = self._missing(more)
        for budget in self.budgets:
            if not budget.allows(need):
                raise CallError(
                    "budget",
                    f"{budget.name}: {budget.describe()} taken, and this may need ${more.cost:.6g} "
                    f"and {more.tokens} tokens more",
                )
        for budget in self.budgets:
            budget.add(need)
        self._reserved = self._reserved.plus(need)

    def open(self, estimate: Spend) -> None:
        """Reserves what an attempt may cost; `enter` must follow when it has ended.

        Raises:
            CallError: A budget does not allow it (`budget`).
        """
        self.reserve(estimate)
        self._open = self._open.plus(estimate)

    def enter(self, call: Call, estimate: Spend = NOTHING) -> None:
        """Adds an attempt that has ended; `estimate` is the estimate that it was opened with."""
        self.calls.append(call)
        if estimate is not NOTHING:
            self._open = self._open.minus(estimate)

    def settle(self) -> None:
        """Ends the request: the budgets keep what was spent and get the rest back. May be called again."""
        if not self.budgets:
            return
        spent = self.spent
        for budget in self.budgets:
            budget.add(spent.minus(self._reserved))
        self._reserved = spent

    def _missing(self, more: Spend) -> Spend:
        """Returns what must be reserved in addition, so that `more` is covered."""
        need = self.spent.plus(self._open).plus(more).minus(self._reserved)
        return Spend(max(0.0, need.cost), max(0, need.tokens))


def tokens(text: str) -> int:
    """Estimates the tokens of a text."""
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


def prompt_tokens(messages: Sequence[Message]) -> int:
    """Estimates the tokens of a conversation."""
    return math.ceil(sum(_length(message.get("content")) for message in messages) / CHARACTERS_PER_TOKEN)


def _length(content: object) -> int:
    """Returns the characters of a message's content; a part that is not text counts as `NON_TEXT_PART`."""
    if isinstance(content, str):
        return len(content)
    if not isinstance(content, list):
        return 0
    return sum(len(part["text"]) if part.get("type") == "text" else NON_TEXT_PART for part in content)


def most(messages: Sequence[Message], parameters: Mapping[str, Any], price: Price) -> Spend:
    """Estimates the most that a call costs: its prompt, and the longest answer that is allowed."""
    usage = Usage(
        prompt_tokens=prompt_tokens(messages),
        completion_tokens=parameters.get("max_completion_tokens")
        or parameters.get("max_tokens")
        or UNLIMITED_COMPLETION,
    )
    return Spend(price.cost(usage.prompt_tokens, usage.completion_tokens), usage.total_tokens)
