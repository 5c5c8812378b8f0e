"""The ledger of a request's calls, and the budgets that they draw on.

Before a call is made, the most that it is expected to cost is reserved in each budget; when the request ends, the
budgets get back what was not used. Several requests may draw on one budget (an API key's), so a reservation counts
from the moment it is made.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixfuse.contracts.trace import Call, Usage
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.token_counts import count
from mixfuse.fusion.config import Price
from mixfuse.fusion.messages import Message

CHARACTERS_PER_TOKEN = 4
"""For estimates: the average of English text in common vocabularies."""

UNLIMITED_COMPLETION = 4096
"""Tokens reserved for an answer if neither the request nor the model sets a limit."""

IMAGE_TOKENS = 1600
"""What an image counts as: a little more than the most in GPT-4o (1445) and Claude (1568)."""
TEMPLATE_TOKENS = 3
"""What a chat template puts around one message, and around the whole: OpenAI's figure; others differ by a few."""
TOOLS_TEMPLATE_TOKENS = 400
"""What a chat template says about tools, beside the tools themselves: 100 to 300 tokens in common ones."""
_SENT_AS_TEXT = ("tools", "tool_choice", "response_format", "functions")


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
        self._used = NOTHING

    @property
    def used(self) -> Spend:
        """What has been spent or reserved."""
        return self._used

    def allows(self, more: Spend) -> bool:
        """Whether this much more may be spent."""
        after = self.used.plus(more)
        return (self.max_cost is None or after.cost <= self.max_cost + 1e-12) and (
            self.max_tokens is None or after.tokens <= self.max_tokens
        )

    def add(self, spend: Spend) -> None:
        """Counts a reservation, or the difference between it and what was spent."""
        self._used = self._used.plus(spend)

    def take(self, more: Spend) -> bool:
        """Reserves this much if it may be spent; returns whether it did."""
        if not self.allows(more):
            return False
        self.add(more)
        return True

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
        watch: Is told of each call as it ends; it must return at once.
    """

    def __init__(
        self,
        *,
        deadline_ms: float | None = None,
        budgets: Sequence[Budget] = (),
        watch: Callable[[Call], None] | None = None,
    ) -> None:
        self.calls: list[Call] = []
        self._watch = watch
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
        for place, budget in enumerate(self.budgets):
            if not budget.take(need):
                for taken in self.budgets[:place]:
                    taken.add(NOTHING.minus(need))
                raise CallError(
                    "budget",
                    f"{budget.name}: {budget.describe()} taken, and this may need ${more.cost:.6g} "
                    f"and {more.tokens} tokens more",
                )
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
        if self._watch is not None:
            self._watch(call)
        self.close(estimate)

    def close(self, estimate: Spend) -> None:
        """Takes back what an attempt was opened with that turned out to be none."""
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
    """Estimates the tokens of a text: four ASCII characters a token, of other scripts two UTF-8 bytes."""
    ascii_only = len(text.encode("ascii", "ignore"))
    others = len(text.encode(errors="replace")) - ascii_only
    return math.ceil(ascii_only / CHARACTERS_PER_TOKEN + others / 2)


def prompt_tokens(messages: Sequence[Message], parameters: Mapping[str, Any] | None = None) -> int:
    """Estimates the tokens of all that is sent: the conversation with its tool calls and images, tools and schemas."""
    return tokens("".join(_texts(messages, parameters or {}))) + IMAGE_TOKENS * _images(messages)


def most(
    messages: Sequence[Message], parameters: Mapping[str, Any], price: Price, tokenizer: Path | None = None
) -> Spend:
    """Returns the most that a call costs: all that is sent, and the longest answer that is allowed.

    Without a tokenizer each byte of the prompt counts as a token, which no tokenizer exceeds.

    Args:
        messages: The conversation.
        parameters: What is sent beside it.
        price: The model's.
        tokenizer: The model's `tokenizer.json`, if it is at hand.
    """
    around = TEMPLATE_TOKENS * (len(messages) + 1) + (TOOLS_TEMPLATE_TOKENS if parameters.get("tools") else 0)
    usage = Usage(
        prompt_tokens=sum(count(text, tokenizer) for text in _texts(messages, parameters))
        + IMAGE_TOKENS * _images(messages)
        + around,
        completion_tokens=parameters.get("max_completion_tokens")
        or parameters.get("max_tokens")
        or UNLIMITED_COMPLETION,
    )
    answers = parameters.get("n") or 1
    completion = usage.completion_tokens * answers
    return Spend(price.cost(usage.prompt_tokens, completion), usage.prompt_tokens + completion)


def _texts(messages: Sequence[Message], parameters: Mapping[str, Any]) -> Iterator[str]:
    """Yields every text that a call sends: what a template may write out as JSON as JSON writes it."""
    for message in messages:
        for key, value in message.items():
            if key == "role":
                continue
            if key == "content" and isinstance(value, list):
                yield from (part["text"] for part in value if isinstance(part.get("text"), str))
            elif isinstance(value, str):
                yield value
            elif value is not None:
                yield json.dumps(value)
    for key in _SENT_AS_TEXT:
        if parameters.get(key) and not isinstance(parameters[key], str):
            yield json.dumps(parameters[key])


def _images(messages: Sequence[Message]) -> int:
    """Returns the number of parts that are not text."""
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    return sum(not isinstance(part.get("text"), str) for parts in contents for part in parts)
