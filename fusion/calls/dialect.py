"""How one model wants to be asked: what its config says, and what its endpoint's errors have taught.

What is learned here is learned once and kept for all requests: the name of the limit of an answer, the most
log-probabilities, and whether several conversations may come in one call.
"""

import re
from collections.abc import Mapping
from typing import Any

from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.config import Judge, ModelConfig

THINKING_ROOM = 8192
"""Tokens for a judge that thinks before its verdict, unless its `max_tokens` says otherwise."""
MISSES = 3
"""Replies in a row without the log-probabilities that were asked for, after which verdicts are asked for in writing."""
TRIED_AGAIN = 50
"""Written verdicts after which log-probabilities are asked for once more."""

_NUMBER = re.compile(r"(?<![\w.])\d{1,2}(?![\w.]*\d)")
_LIMITS = ("max_tokens", "max_completion_tokens")
# "max_tokens=8192 cannot be greater than max_model_len=1024", "maximum context length is 1024 tokens"
_CONTEXT = re.compile(r"(?:max_model_len\W{1,4}|context length (?:is|of) )(\d{1,9})")


class Dialect:
    """What is known of one model's way to be asked; shared by all calls to it.

    Args:
        model: Its config; None for an endpoint of which nothing is configured.

    Attributes:
        batches: Whether it answers several conversations in one call; None until that was tried.
        thinks: Whether it was seen to think before its verdict.
        opened: Whether its answers were seen to begin in the thoughts, without a mark.
        route: The route on which a reward model was found to give scores; None until then.
        problem: Why it cannot judge at the moment, in words; None while it can.
    """

    def __init__(self, model: ModelConfig | None = None) -> None:
        self.thoughts = model.thoughts if model else "auto"
        self.batches: bool | None = None if model is None or not isinstance(model, Judge) or model.batch else False
        self.thinks = self.opened = False
        self.route: str | None = None
        self.problem: str | None = None
        self._renames = dict(model.rename_params) if model else {}
        self._drop = frozenset(model.drop_params if model else ())
        self._unwanted: set[str] = set()  # parameters of the gateway's own that the endpoint refused
        self._top_logprobs: int | None = None
        self._room: int | None = None  # the most tokens of an answer of the gateway's own asking
        self._without_logprobs = False
        self._misses = self._written = 0

    def body(self, parameters: Mapping[str, Any], *, own: bool) -> dict[str, Any]:
        """Returns parameters as the endpoint takes them.

        Args:
            parameters: As in OpenAI's request.
            own: Whether the gateway chose them, as for a verdict, so that they may be changed to what it takes.
        """
        sent = {name: value for name, value in parameters.items() if not (own and name in self._unwanted)}
        if own and self._top_logprobs is not None and "top_logprobs" in sent:
            sent["top_logprobs"] = min(sent["top_logprobs"], self._top_logprobs)
        if own and self._room is not None:
            sent |= {name: min(sent[name], self._room) for name in _LIMITS if name in sent}
        return {self._renames.get(name, name): value for name, value in sent.items()}

    def wants_usage(self) -> bool:
        """Whether a stream may be asked for its usage."""
        return "stream_options" not in self._drop

    def learn(self, failure: CallError, parameters: Mapping[str, Any], *, own: bool) -> bool:
        """Reads how the endpoint wants to be asked from its refusal.

        Args:
            failure: The refusal.
            parameters: What was sent.
            own: As for `body`.

        Returns:
            Whether the same call, written as learned, may succeed.
        """
        said = str(failure)
        if own and self._room is None and (context := _CONTEXT.search(said)):
            # The room to think is more than its context holds: a quarter of that leaves the rest for the comparison.
            self._room = max(1, int(context[1]) // 4)
            return True
        if failure.kind != "bad_request":
            return False
        if "max_completion_tokens" in said and "max_tokens" in parameters and "max_tokens" not in self._renames:
            self._renames["max_tokens"] = "max_completion_tokens"
            return True
        if not own:
            return False
        if "logprobs" in said and "top_logprobs" in parameters:
            # "… must be less than or equal to 5", "requested 20, … max allowed: 5"
            now = parameters["top_logprobs"]
            lower = [int(number) for number in _NUMBER.findall(said) if 0 < int(number) < now]
            if lower:
                self._top_logprobs = max(lower)
                return True
            return False
        for name in ("temperature", "response_format"):
            if name in said and name in parameters and name not in self._unwanted:
                self._unwanted.add(name)
                return True
        return False

    def gives_logprobs(self) -> bool:
        """Whether the next verdict may be read from log-probabilities; after many written ones that is tried again."""
        if not self._without_logprobs and self._misses < MISSES:
            return True
        self._written += 1
        return self._written % TRIED_AGAIN == 0

    def note_logprobs(self, given: bool, *, refused: bool = False) -> None:
        """Notes whether a reply had the log-probabilities that were asked for, or its endpoint refused them."""
        if given:
            self._misses, self._without_logprobs = 0, False
        else:
            self._misses += 1
            self._without_logprobs = self._without_logprobs or refused


def with_own(model: ModelConfig, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns parameters with what a model's config adds to them and without what it drops."""
    sent = dict(parameters)
    limited = any(name in sent for name in _LIMITS)
    for name, value in (model.defaults | _set(model)).items():
        if not (limited and name in _LIMITS):
            sent.setdefault(name, value)
    for name in model.drop_params:
        sent.pop(name, None)
    return {**sent, **model.extra_body}


def for_judge(model: ModelConfig, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of a verdict.

    A judge's `temperature` and `max_tokens` count in place of the gateway's own. Those of a member that judges are for
    its answers.
    """
    sent = dict(parameters)
    if isinstance(model, Judge):
        sent |= model.defaults | _set(model)
    for name in model.drop_params:
        sent.pop(name, None)
    return {**sent, **model.extra_body}


def _set(model: ModelConfig) -> dict[str, Any]:
    """Returns the sampling parameters that have keys of their own in the config, as far as they are set."""
    own = {"temperature": model.temperature, "max_tokens": model.max_tokens}
    return {name: value for name, value in own.items() if value is not None}
