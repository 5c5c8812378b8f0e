"""One verdict: the judge reads one pair in one order and says which answer is better.

A verdict is read in one of three ways: from the log-probabilities of one token, from a JSON object that the judge
writes, or from the end of a rationale. How a comparison is worded and a reply read is in
`mixfuse.contracts.judge_protocol`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mixfuse.contracts.judge_protocol import (
    MAX_CHARS,
    VERDICTS,
    Asked,
    comparison,
    explained,
    read_explained,
    read_verdict,
)
from mixfuse.fusion.calls.dialect import THINKING_ROOM, for_judge
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import Ledger
from mixfuse.fusion.calls.pool import all_or_raise, fan_out
from mixfuse.fusion.calls.responses import OnlyThoughtError, first_token_logprobs
from mixfuse.fusion.calls.upstream import Client, Endpoint, NoRouteError, Purpose, Reply, call, call_batch
from mixfuse.fusion.config import Judge, ModelConfig
from mixfuse.fusion.messages import Message, with_system

Form = Literal["auto", "logprobs", "parsed", "rationale"]
"""How verdicts are read; see `mixfuse.fusion.config.Judge`."""

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
THINKING_INSTRUCTION = "When you have thought about it, reply with the one letter A or B and nothing else."
THINKING_PARAMETERS: dict[str, Any] = {"max_tokens": THINKING_ROOM, "temperature": 0}
_LETTER = re.compile(r"\W*(?:(?:final |the )?(?:answer|verdict)\W*(?:is\W*)?)?([AB])\W*", re.IGNORECASE)
_WRITTEN = re.compile(r'\{\s*"verdict"\s*:\s*"([AB])"\s*\}')


class NoLogprobsError(CallError):
    """The judge's endpoint answers, but without log-probabilities."""

    def __init__(self) -> None:
        super().__init__("invalid_response", "the judge's endpoint gives no log-probabilities")


@dataclass(frozen=True, slots=True)
class OrderedPair:
    """A pair of answers in the order in which the judge reads them.

    Attributes:
        question: The question that both answer, or the conversation as the judge is shown it.
        first: The answer shown as A.
        second: The answer shown as B.
        nonce: The nonce of the fences; comparisons that share one share a prefix in the engine's cache.
        max_chars: The most characters of each answer to show.
        own: The judge's own special tokens, if they are known.
    """

    question: str | Asked
    first: str
    second: str
    nonce: str
    max_chars: int = MAX_CHARS
    own: re.Pattern[str] | None = None

    def messages(self) -> list[Message]:
        """Returns the conversation that asks for the verdict."""
        return comparison(
            self.question, self.first, self.second, nonce=self.nonce, max_chars=self.max_chars, own=self.own
        )


@dataclass(frozen=True, slots=True)
class JudgeEndpoint:
    """A judge that can be asked.

    Attributes:
        client: Shared by all calls.
        endpoint: The judge's endpoint.
        purpose: The purpose that the ledger notes.
        ledger: Takes the calls.
        model: Its config; None where nothing is configured.
    """

    client: Client
    endpoint: Endpoint
    purpose: Purpose
    ledger: Ledger
    model: ModelConfig | None = None

    async def ask(self, messages: list[Message], parameters: Mapping[str, Any]) -> Reply:
        """Makes one call.

        Raises:
            CallError: The call failed.
        """
        return await call(
            self.client,
            self.endpoint,
            self._messages(messages),
            self._parameters(parameters),
            purpose=self.purpose,
            ledger=self.ledger,
        )

    async def ask_all(
        self, conversations: Sequence[list[Message]], parameters: Mapping[str, Any]
    ) -> list[Reply | CallError]:
        """Asks for the answers to several conversations in one call; see `upstream.call_batch`.

        Raises:
            CallError: No answer came back at all.
        """
        return await call_batch(
            self.client,
            self.endpoint,
            [self._messages(messages) for messages in conversations],
            self._parameters(parameters),
            purpose=self.purpose,
            ledger=self.ledger,
        )

    def _messages(self, messages: list[Message]) -> list[Message]:
        # A member's instructions are for its answers.
        return with_system(self.model.system, messages) if isinstance(self.model, Judge) else messages

    def _parameters(self, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        return parameters if self.model is None else for_judge(self.model, parameters)


class View(NamedTuple):
    """The verdict on one order of a pair.

    Attributes:
        p: The probability that the answer shown first is better; None if the reply holds no verdict.
        read: What it was read from.
    """

    p: float | None
    read: Literal["logprobs", "parsed"]


async def judge_all(judge: JudgeEndpoint, pairs: Sequence[OrderedPair], form: Form = "auto") -> list[View]:
    """Judges pairs: in one call where the endpoint can do that, or else each in one of its own, all at once.

    Args:
        judge: The judge.
        pairs: The pairs, each in one order.
        form: How the verdicts are read.

    Raises:
        CallError: A call failed; the others are cancelled then.
    """
    views = await _in_one_call(judge, pairs, form)
    missing = [place for place, view in enumerate(views) if view is None]
    calls = [judge_one(judge, pairs[place], form) for place in missing]
    asked = iter(all_or_raise(await fan_out(calls, quorum=len(calls)))) if calls else iter(())
    return [next(asked) if view is None else view for view in views]


async def _in_one_call(judge: JudgeEndpoint, pairs: Sequence[OrderedPair], form: Form) -> list[View | None]:
    """Judges pairs in one call; None for those that must be judged in calls of their own."""
    dialect, nothing = judge.endpoint.dialect, [None] * len(pairs)
    if len(pairs) < 2 or dialect.batches is False or dialect.thinks:
        return [*nothing]
    if form in ("auto", "logprobs") and (form == "logprobs" or dialect.gives_logprobs()):
        form = "logprobs" if form == "logprobs" else "auto"
        asked, parameters = [pair.messages() for pair in pairs], LOGPROB_PARAMETERS
    elif form == "rationale":
        asked, parameters = [explained(pair.messages()) for pair in pairs], RATIONALE_PARAMETERS
    else:
        form, asked, parameters = "parsed", [_written_messages(pair) for pair in pairs], WRITTEN_PARAMETERS
    try:
        replies = await judge.ask_all(asked, parameters)
    except NoRouteError:
        dialect.batches = False
        return [*nothing]
    except CallError as failure:
        if failure.kind not in _ONE_MAY_BE_AT_FAULT:
            raise
        # Perhaps the endpoint answers every route in its own way; one that has done it once can do it.
        dialect.batches = dialect.batches or (None if failure.kind in ("context_length", "refused") else False)
        return [*nothing]
    dialect.batches = True
    read = {"rationale": _read_rationale, "parsed": _read_written}.get(form, _read_logprobs)
    return [None if isinstance(reply, CallError) else read(judge, reply) for reply in replies]


# Failures of a call for several verdicts after which each is asked for by itself.
_ONE_MAY_BE_AT_FAULT = frozenset({"bad_request", "context_length", "refused", "invalid_response", "upstream_error"})


async def judge_one(judge: JudgeEndpoint, pair: OrderedPair, form: Form = "auto") -> View:
    """Judges one order of a pair, in the form that is asked for or that the endpoint allows.

    Raises:
        CallError: The call failed.
    """
    if form == "logprobs" or (form == "auto" and judge.endpoint.dialect.gives_logprobs()):
        try:
            return await _logprob_view(judge, pair)
        except NoLogprobsError:
            if form == "logprobs":
                raise
    if form == "rationale":
        return View(await rationale_verdict(judge, pair), "parsed")
    return View(await written_verdict(judge, pair), "parsed")


async def logprob_verdict(judge: JudgeEndpoint, pair: OrderedPair) -> float | None:
    """Judges a pair by the log-probabilities of the reply's first token, after its thoughts.

    Returns:
        The probability that the first answer is the better one; None if the reply holds no verdict.

    Raises:
        NoLogprobsError: The endpoint gives none.
        CallError: The call failed.
    """
    return (await _logprob_view(judge, pair)).p


async def _logprob_view(judge: JudgeEndpoint, pair: OrderedPair) -> View:
    dialect = judge.endpoint.dialect
    if dialect.thinks:
        return await _thinking_view(judge, pair, logprobs=True)
    try:
        reply = await judge.ask(pair.messages(), LOGPROB_PARAMETERS)
    except OnlyThoughtError:
        dialect.thinks = True
    except CallError as failure:
        # Some endpoints refuse the parameter by name instead of ignoring it.
        if failure.kind == "bad_request" and "logprobs" in str(failure):
            dialect.note_logprobs(given=False, refused=True)
            raise NoLogprobsError from failure
        raise
    else:
        view = _read_logprobs(judge, reply)
        if view is not None:
            return view
        if not dialect.thinks:
            raise NoLogprobsError
    return await _thinking_view(judge, pair, logprobs=True)


def _read_logprobs(judge: JudgeEndpoint, reply: Reply) -> View | None:
    """Reads a reply to `LOGPROB_PARAMETERS`; None if it has no log-probabilities or was cut in its thoughts."""
    dialect = judge.endpoint.dialect
    p = read_verdict(first_token_logprobs(answer_logprobs(reply)))
    if p is None and reply.finish_reason == "length" and (reply.logprobs or not reply.text.strip()):
        dialect.thinks = True  # or it needs a sentence before its verdict: it gets room for either
        return None
    dialect.note_logprobs(given=bool(reply.logprobs))
    return View(p, "logprobs") if reply.logprobs else None


def answer_logprobs(reply: Reply) -> dict[str, Any] | None:
    """Returns a reply's log-probabilities from the first token of its answer on, after its thoughts."""
    entries = reply.logprobs.get("content") if isinstance(reply.logprobs, dict) else None
    if not isinstance(entries, list):
        return None
    tokens = [str(entry.get("token", "")) if isinstance(entry, dict) else "" for entry in entries]
    answer = reply.text.strip()
    # Tokens may lack marks that the endpoint removed; the answer itself stands at the end.
    start = "".join(tokens).rfind(answer) if reply.thoughts is not None and answer else 0
    for place, token in enumerate(tokens):
        start -= len(token)
        if start < 0:
            return {"content": entries[place:]}
    return None


async def _thinking_view(judge: JudgeEndpoint, pair: OrderedPair, *, logprobs: bool) -> View:
    """Judges with room for thoughts; they are skipped, and the verdict is read from what follows."""
    dialect = judge.endpoint.dialect
    messages = pair.messages()
    messages[-1]["content"] += f"\n{THINKING_INSTRUCTION}"
    asks = logprobs and dialect.gives_logprobs()
    more = {"logprobs": True, "top_logprobs": LOGPROB_PARAMETERS["top_logprobs"]} if asks else {}
    try:
        reply = await judge.ask(messages, {**THINKING_PARAMETERS, **more})
    except OnlyThoughtError:
        return View(None, "parsed")
    except CallError as failure:
        if not (asks and failure.kind == "bad_request" and "logprobs" in str(failure)):
            raise
        dialect.note_logprobs(given=False, refused=True)
        return await _thinking_view(judge, pair, logprobs=False)
    if asks:
        dialect.note_logprobs(given=bool(reply.logprobs))
    p = read_verdict(first_token_logprobs(answer_logprobs(reply)))
    view = View(_verdict_in(reply.text), "parsed") if p is None else View(p, "logprobs")
    if view.p is None and reply.thoughts is None:
        dialect.thinks = False  # it only cannot judge; room is wasted on it
    return view


def _verdict_in(text: str) -> float | None:
    """Reads the verdict of a judge that was free to write: a letter, a JSON object, or a last line that names it."""
    lines = text.strip().splitlines()
    letter = (_LETTER.fullmatch(text.strip()) or (lines and _LETTER.fullmatch(lines[-1]))) or None
    verdict = letter[1].upper() if letter else read_explained(text)
    written = set(_WRITTEN.findall(text))
    if verdict is None and len(written) == 1:
        (verdict,) = written
    return None if verdict is None else float(verdict == VERDICTS[0])


def _cut_in_thought(reply: Reply) -> bool:
    return reply.finish_reason == "length" and not reply.text.strip()


def _written_messages(pair: OrderedPair) -> list[Message]:
    messages = pair.messages()
    messages[-1]["content"] += f"\n{WRITTEN_INSTRUCTION}"
    return messages


def _read_written(judge: JudgeEndpoint, reply: Reply) -> View | None:
    """Reads a JSON object with a verdict; None if the reply was cut in its thoughts."""
    if _cut_in_thought(reply):
        judge.endpoint.dialect.thinks = True
        return None
    verdicts = set(_WRITTEN.findall(reply.text))
    # A reply with both verdicts holds none.
    return View(float(verdicts == {VERDICTS[0]}) if len(verdicts) == 1 else None, "parsed")


def _read_rationale(judge: JudgeEndpoint, reply: Reply) -> View | None:
    """Reads a rationale with a verdict; None if the reply was cut in its thoughts."""
    if _cut_in_thought(reply):
        judge.endpoint.dialect.thinks = True
        return None
    verdict = read_explained(reply.text)
    return View(None if verdict is None else float(verdict == VERDICTS[0]), "parsed")


async def written_verdict(judge: JudgeEndpoint, pair: OrderedPair) -> float | None:
    """Judges a pair by a JSON object that the judge writes.

    Returns:
        1 if the first answer is better, 0 if the second is; None if the reply holds no verdict.

    Raises:
        CallError: The call failed.
    """
    dialect = judge.endpoint.dialect
    if not dialect.thinks:
        try:
            view = _read_written(judge, await judge.ask(_written_messages(pair), WRITTEN_PARAMETERS))
        except OnlyThoughtError:
            dialect.thinks, view = True, None
        if view is not None:
            return view.p
    return (await _thinking_view(judge, pair, logprobs=False)).p


async def rationale_verdict(judge: JudgeEndpoint, pair: OrderedPair) -> float | None:
    """Judges a pair by the end of the judge's rationale.

    Returns:
        1 if the first answer is better, 0 if the second is; None if the reply holds no verdict.

    Raises:
        CallError: The call failed.
    """
    dialect = judge.endpoint.dialect
    if not dialect.thinks:
        try:
            view = _read_rationale(judge, await judge.ask(explained(pair.messages()), RATIONALE_PARAMETERS))
        except OnlyThoughtError:
            dialect.thinks, view = True, None
        if view is not None:
            return view.p
    room = {**RATIONALE_PARAMETERS, "max_tokens": THINKING_ROOM}
    try:
        reply = await judge.ask(explained(pair.messages()), room)
    except OnlyThoughtError:
        return None
    return None if (verdict := read_explained(reply.text)) is None else float(verdict == VERDICTS[0])
