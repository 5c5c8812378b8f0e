"""One verdict: the judge reads one pair in one order and says which answer is better.

A verdict is read in one of three ways: from the log-probabilities of one token, from a JSON object that the judge
writes, or from the end of a rationale. How a comparison is worded and a reply read is in
`mixfuse.contracts.judge_protocol`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixfuse.contracts.judge_protocol import MAX_CHARS, VERDICTS, comparison, explained, read_explained, read_verdict
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import Ledger
from mixfuse.fusion.calls.responses import first_token_logprobs
from mixfuse.fusion.calls.upstream import Client, Endpoint, Purpose, Reply, call
from mixfuse.fusion.messages import Message

# One token is enough: the verdict is read from its alternatives; 20 is the most OpenAI and vLLM give.
LOGPROB_PARAMETERS = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}

WRITTEN_INSTRUCTION = 'Reply with a JSON object: {"verdict": "A"} or {"verdict": "B"}.'
# Room for a little more than the object: some models put it behind a fence or a word.
WRITTEN_PARAMETERS: dict[str, Any] = {
    "max_tokens": 64,
    "temperature": 0,
    "response_format": {
        "type": "json_schema",
        "json_schema": {
            "name": "verdict",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": {"verdict": {"type": "string", "enum": list(VERDICTS)}},
                "required": ["verdict"],
                "additionalProperties": False,
            },
        },
    },
}
# Two sentences and the verdict; a longer rationale gives no verdict.
RATIONALE_PARAMETERS: dict[str, Any] = {"max_tokens": 256, "temperature": 0}
_WRITTEN = re.compile(r'\{\s*"verdict"\s*:\s*"([AB])"\s*\}')


class NoLogprobsError(CallError):
    """The judge's endpoint answers, but without log-probabilities."""

    def __init__(self) -> None:
        super().__init__("invalid_response", "the judge's endpoint gives no log-probabilities")


@dataclass(frozen=True, slots=True)
class OrderedPair:
    """A pair of answers in the order in which the judge reads them.

    Attributes:
        question: The question that both answer.
        first: The answer shown as A.
        second: The answer shown as B.
        nonce: The nonce of the fences; comparisons that share one share a prefix in the engine's cache.
        max_chars: The most characters of each answer to show.
    """

    question: str
    first: str
    second: str
    nonce: str
    max_chars: int = MAX_CHARS

    def messages(self) -> list[Message]:
        """Returns the conversation that asks for the verdict."""
        return comparison(self.question, self.first, self.second, nonce=self.nonce, max_chars=self.max_chars)


@dataclass(frozen=True, slots=True)
class JudgeEndpoint:
    """A judge that can be asked.

    Attributes:
        client: Shared by all calls.
        endpoint: The judge's endpoint.
        purpose: The purpose that the ledger notes.
        ledger: Takes the calls.
    """

    client: Client
    endpoint: Endpoint
    purpose: Purpose
    ledger: Ledger

    async def ask(self, messages: list[Message], parameters: Mapping[str, Any]) -> Reply:
        """Makes one call.

        Raises:
            CallError: The call failed.
        """
        return await call(self.client, self.endpoint, messages, parameters, purpose=self.purpose, ledger=self.ledger)


async def logprob_verdict(judge: JudgeEndpoint, pair: OrderedPair) -> float | None:
    """Judges a pair by the log-probabilities of the reply's first token.

    Returns:
        The probability that the first answer is the better one; None if the reply holds no verdict.

    Raises:
        NoLogprobsError: The endpoint gives none.
        CallError: The call failed.
    """
    try:
        reply = await judge.ask(pair.messages(), LOGPROB_PARAMETERS)
    except CallError as failure:
        # Some endpoints refuse the parameter by name instead of ignoring it.
        if failure.kind == "upstream_error" and "HTTP 4" in str(failure) and "logprobs" in str(failure):
            raise NoLogprobsError from failure
        raise
    if not reply.logprobs:
        raise NoLogprobsError
    return read_verdict(first_token_logprobs(reply.logprobs))


async def written_verdict(judge: JudgeEndpoint, pair: OrderedPair) -> float | None:
    """Judges a pair by a JSON object that the judge writes.

    Returns:
        1 if the first answer is better, 0 if the second is; None if the reply holds no verdict.

    Raises:
        CallError: The call failed.
    """
    messages = pair.messages()
    messages[-1]["content"] += f"\n{WRITTEN_INSTRUCTION}"
    reply = await judge.ask(messages, WRITTEN_PARAMETERS)
    verdicts = set(_WRITTEN.findall(reply.text))
    # A reply with both verdicts holds none.
    return float(verdicts == {VERDICTS[0]}) if len(verdicts) == 1 else None


async def rationale_verdict(judge: JudgeEndpoint, pair: OrderedPair) -> float | None:
    """Judges a pair by the end of the judge's rationale.

    Returns:
        1 if the first answer is better, 0 if the second is; None if the reply holds no verdict.

    Raises:
        CallError: The call failed.
    """
    reply = await judge.ask(explained(pair.messages()), RATIONALE_PARAMETERS)
    verdict = read_explained(reply.text)
    return None if verdict is None else float(verdict == VERDICTS[0])
