"""The responses of an endpoint: complete bodies, event streams and errors, read into a partial answer.

`calls/upstream.py` makes the calls. This module knows OpenAI's formats, and turns a malformed response into a failure.
"""

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

import aiohttp
import orjson

from mixfuse.contracts import bounded_json
from mixfuse.contracts.trace import Usage
from mixfuse.fusion.calls.failures import CallError, FailureKind
from mixfuse.fusion.calls.thoughts import Splitter

LONGEST_RESPONSE = 64 << 20
"""Bytes; a longer response is cut off, so that no endpoint can fill the gateway's memory."""

MOST_TOKENS = 100_000_000
"""Tokens; an endpoint that claims more for one call is not believed. The longest contexts hold ten million."""

LONGEST_RETRY_AFTER_S = 86_400.0
"""Seconds; an endpoint that asks for a longer wait is taken to ask for this one."""

_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 529})


@dataclass
class PartialAnswer:
    """The part of an answer that has been received.

    Attributes:
        text: Its text, without thoughts.
        thoughts: What the model thought before it answered.
        splitter: Tells the two apart where the endpoint sends them as one text.
        tool_calls: Its tool calls, in OpenAI's form.
        refusal: The text with which the model refused.
        usage: The tokens that the endpoint reported.
        finish_reason: Why the answer ended; None before its end.
        logprobs: The choice's `logprobs` object.
        places: A streamed tool call's index → its place in `tool_calls`.
        sent: Whether the request may have reached the endpoint.
        free: Whether it cost nothing: the endpoint was not reached, or refused by its HTTP status.
        limit: Ends its call when it has taken too long.
        held_s: How long its client took to read, in seconds.
    """

    text: str = ""
    thoughts: str = ""
    splitter: Splitter = field(default_factory=Splitter)
    tool_calls: list[dict[str, Any]] | None = None
    refusal: str = ""
    usage: Usage | None = None
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None
    places: dict[int | None, int] = field(default_factory=dict)
    sent: bool = False
    free: bool = False
    limit: asyncio.Timeout | None = None
    held_s: float = 0.0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Stops the clock of the call's limit meanwhile."""
        now = asyncio.get_running_loop().time
        began, until = now(), self.limit.when() if self.limit else None
        if until is None or self.limit is None or self.limit.expired():
            yield
            return
        self.limit.reschedule(None)
        yield
        self.held_s += now() - began
        self.limit.reschedule(until + now() - began)


def first_token_logprobs(logprobs: Mapping[str, Any] | None) -> dict[str, float]:
    """Returns the natural-log probabilities of the alternatives for a reply's first token, by their text.

    Probabilities of tokens with the same text are added: SentencePiece's "A" and "▁A" both decode to "A".

    Args:
        logprobs: A choice's `logprobs` object; if it is absent or malformed, the result is empty.
    """
    try:
        top = (logprobs or {})["content"][0]["top_logprobs"]
        # No probability is above 1, whatever an endpoint says.
        pairs = [(str(entry["token"]), min(0.0, float(entry["logprob"]))) for entry in top]
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return {}
    total: dict[str, float] = {}
    for token, logprob in pairs:
        total[token] = logprob if token not in total else _log_of_sum(total[token], logprob)
    return total


def _log_of_sum(first: float, second: float) -> float:
    """Returns log(exp(first) + exp(second)), also where both are too small for `exp`."""
    most = max(first, second)
    return most if math.isinf(most) else most + math.log1p(math.exp(min(first, second) - most))


def split_events(received: bytes) -> tuple[list[bytes], bytes]:
    """Splits the received part of a server-sent event stream into the data of complete events, and the rest.

    Lines end at newline bytes only: httpx's `iter_lines` also splits at U+2028 and similar characters, which some
    servers send unescaped in JSON.
    """
    *lines, rest = received.split(b"\n")
    return [line.removeprefix(b"data:").strip() for line in lines if line.startswith(b"data:")], rest


async def read_body(response: aiohttp.ClientResponse) -> bytes:
    """Reads the whole body.

    Raises:
        CallError: It is longer than `LONGEST_RESPONSE`.
    """
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > LONGEST_RESPONSE:
            raise CallError("invalid_response", f"the response is longer than {LONGEST_RESPONSE >> 20} MiB")
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_complete(content: bytes, answer: PartialAnswer, secrets: Sequence[str] = ()) -> None:
    """Reads a complete response into `answer`.

    Raises:
        CallError: It is not a chat completion with text or tool calls (`invalid_response`), the model declined
            (`refused`), or it is an error that came with status 200.
    """
    data = _json_value(content)
    raise_if_error(data, answer, secrets)
    data = _object(data)
    answer.usage = _usage(data)
    try:
        choice = data["choices"][0]
    except (KeyError, IndexError, TypeError):
        raise CallError("invalid_response", "the answer has no choices[0].message") from None
    read_choice(choice, answer)


def read_batch(
    content: bytes, answers: Sequence[PartialAnswer], weights: Sequence[int], secrets: Sequence[str] = ()
) -> list[CallError | None]:
    """Reads the response to several conversations, one choice for each, into `answers`.

    The endpoint reports the tokens of all together. Each answer gets its share, by what was sent and written, so that
    the shares add up to the sum.

    Args:
        content: The body.
        answers: One for each conversation, in order.
        weights: The estimated tokens of each conversation.
        secrets: What no message may repeat.

    Returns:
        For each conversation why it has no answer; None where it has one.

    Raises:
        CallError: The response holds no choices, or is an error.
    """
    data = _json_value(content)
    raise_if_error(data, answers[0], secrets)
    data = _object(data)
    choices = data.get("choices")
    if not isinstance(choices, list):
        raise CallError("invalid_response", "the answer has no choices")
    by_index = {choice.get("index"): choice for choice in choices if isinstance(choice, dict)}
    failures: list[CallError | None] = []
    for index, answer in enumerate(answers):
        try:
            if index not in by_index:
                raise CallError("invalid_response", f"the answer has no choice {index}")
            read_choice(by_index[index], answer)
            failures.append(None)
        except CallError as failure:
            failures.append(failure)
    if (usage := _usage(data)) is not None:
        prompts = shares(usage.prompt_tokens, weights)
        completions = shares(usage.completion_tokens, [_written(answer) for answer in answers])
        thoughts = shares(usage.reasoning_tokens, completions)  # of the completion, so none exceeds its own
        for answer, prompt, completion, thought in zip(answers, prompts, completions, thoughts, strict=True):
            answer.usage = Usage(prompt_tokens=prompt, completion_tokens=completion, reasoning_tokens=thought)
    return failures


def _written(answer: PartialAnswer) -> int:
    """Returns the tokens of an answer where its log-probabilities tell them, or else its characters."""
    entries = (answer.logprobs or {}).get("content") if isinstance(answer.logprobs, dict) else None
    return len(entries) if isinstance(entries, list) and entries else len(answer.text) + len(answer.thoughts)


def shares(total: int, weights: Sequence[int]) -> list[int]:
    """Divides a whole number in proportion to weights; the parts add up to it exactly."""
    whole = sum(weights)
    if whole == 0:
        weights, whole = [1] * len(weights), len(weights)
    parts, given, seen = [], 0, 0
    for weight in weights:
        seen += weight
        until = total * seen // whole
        parts.append(until - given)
        given = until
    return parts


def read_other(content: bytes, answer: PartialAnswer, secrets: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the response of a route other than chat completions; `answer` takes its usage.

    Raises:
        CallError: It is not a JSON object, or an error.
    """
    data = _json_value(content)
    raise_if_error(data, answer, secrets)
    data = _object(data)
    answer.usage = _usage(data)
    return data


def read_choice(choice: Any, answer: PartialAnswer) -> None:
    """Reads one choice of a complete response into `answer`.

    Raises:
        CallError: As for `read_complete`.
    """
    try:
        message = choice["message"]
        content, tool_calls, refusal = message.get("content"), message.get("tool_calls"), message.get("refusal")
    except (KeyError, TypeError, AttributeError):
        raise CallError("invalid_response", "the answer has no choices[0].message") from None
    finish, logprobs = choice.get("finish_reason"), choice.get("logprobs")
    answer.finish_reason = finish if isinstance(finish, str) else None
    answer.logprobs = logprobs if isinstance(logprobs, dict) else None
    if isinstance(tool_calls, list) and tool_calls:
        if not all(isinstance(call, dict) for call in tool_calls):
            raise CallError("invalid_response", "the answer has a malformed tool call")
        answer.tool_calls = tool_calls
    text, thoughts = _text_and_thoughts(content)
    answer.refusal = refusal if isinstance(refusal, str) else ""
    answer.thoughts = _thoughts_beside(message) + thoughts
    answer.splitter.feed(text)
    answer.splitter.end(cut=answer.finish_reason == "length")
    answer.text = answer.splitter.said
    answer.thoughts += answer.splitter.thought
    check_answered(answer, has_content=isinstance(content, str | list))


def check_answered(answer: PartialAnswer, *, has_content: bool = True) -> None:
    """Checks that a complete answer is one.

    Raises:
        CallError: The model declined (`refused`), or it said nothing (`invalid_response`).
    """
    if answer.text or answer.tool_calls is not None:
        return
    check_refusal(answer)
    if answer.thoughts or answer.splitter.found:
        why = "it was cut off by max_tokens" if answer.finish_reason == "length" else "no answer followed"
        raise OnlyThoughtError(why)
    if not has_content:
        raise CallError("invalid_response", "the answer's message has no text content")


class OnlyThoughtError(CallError):
    """A reasoning model thought, and gave no answer."""

    def __init__(self, why: str) -> None:
        super().__init__("invalid_response", f"the model thought but did not answer: {why}")


def _text_and_thoughts(content: Any) -> tuple[str, str]:
    """Returns a content's text and thoughts: a string, or parts such as Mistral's and Anthropic's."""
    if isinstance(content, str):
        return content, ""
    text, thoughts = [], []
    for part in content if isinstance(content, list) else ():
        if isinstance(part, str):
            text.append(part)
        elif isinstance(part, dict):
            kind = part.get("type")
            if kind in ("thinking", "reasoning", "thought"):
                inner = part.get("thinking") or part.get("reasoning") or part.get("text") or part.get("content")
                thoughts.append("".join(_text_and_thoughts(inner)))
            elif kind in (None, "text", "output_text") and isinstance(part.get("text"), str):
                text.append(part["text"])
    return "".join(text), "".join(thoughts)


def _thoughts_beside(message: Mapping[str, Any]) -> str:
    """Returns the thoughts that a message or a delta has beside its content."""
    for name in ("reasoning_content", "reasoning", "thinking"):  # DeepSeek and many; OpenRouter, vLLM; some proxies
        if isinstance(thoughts := message.get(name), str) and thoughts:
            return thoughts
    details = message.get("reasoning_details")  # OpenRouter
    texts = (
        [part.get("text") or part.get("summary") for part in details or () if isinstance(part, dict)]
        if isinstance(details, list)
        else []
    )
    return "".join(text for text in texts if isinstance(text, str))


def read_chunk(event: Any, answer: PartialAnswer, secrets: Sequence[str] = ()) -> tuple[str, str]:
    """Reads a chunk of a stream into `answer`, except for its text and thoughts, which are returned.

    Raises:
        CallError: The chunk is an error of the endpoint, or malformed.
    """
    raise_if_error(event, answer, secrets, where="the stream ended with")
    event = _object(event)
    if "usage" in event:
        answer.usage = _usage(event) or answer.usage
    choices = event.get("choices")
    if not choices and (isinstance(choices, list) or answer.usage is not None or answer.finish_reason is not None):
        return "", ""  # the usage, or something after the end
    try:
        choice = choices[0]
        delta = choice.get("delta") or {}
        content, tool_calls, refusal = delta.get("content"), delta.get("tool_calls"), delta.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise CallError("invalid_response", "a chunk has no choices[0].delta") from None
    finish = choice.get("finish_reason")
    answer.finish_reason = finish if isinstance(finish, str) and finish else answer.finish_reason
    if refusal:
        answer.refusal += str(refusal)
    for piece in tool_calls if isinstance(tool_calls, list) else ():
        _add_tool_call(piece, answer)
    text, thoughts = _text_and_thoughts(content)
    said, thought = answer.splitter.feed(text) if text else ("", "")
    return said, _thoughts_beside(delta) + thoughts + thought


def _add_tool_call(piece: Any, answer: PartialAnswer) -> None:
    """Adds a piece of a streamed tool call: its first piece names the function, all carry arguments.

    Some endpoints send no index, or the same for all: a piece with an id or a name of its own then begins a call.
    """
    try:
        index, function = piece.get("index"), piece.get("function") or {}
        name, arguments = function.get("name"), function.get("arguments")
        if isinstance(arguments, dict):
            arguments = orjson.dumps(arguments).decode()
        identity = piece.get("id") or None
        calls = answer.tool_calls = answer.tool_calls or []
        place = answer.places.get(index, -1) if index is not None else len(calls) - 1
        begins = place < 0
        if not begins and name:
            known = calls[place]
            begins = known["id"] not in (None, identity) and identity is not None
            begins = begins or (index is None and identity is None and bool(known["function"]["arguments"]))
        if begins:
            if name is None and identity is None:
                raise KeyError(index)
            answer.places[index] = place = len(calls)
            calls.append({"id": identity, "type": "function", "function": {"name": "", "arguments": ""}})
        call = calls[place]
        call["id"] = call["id"] or identity
        if name and not call["function"]["name"]:
            call["function"]["name"] = name
        elif name and name != call["function"]["name"]:
            call["function"]["name"] += name
        call["function"]["arguments"] += arguments or ""
    except (KeyError, IndexError, TypeError, AttributeError):
        raise CallError("invalid_response", "a chunk has a malformed tool call") from None


def check_refusal(answer: PartialAnswer) -> None:
    """Raises `refused` if an answer without text says that the model or its filter declined."""
    if answer.refusal:
        raise CallError("refused", f"the model refused: {answer.refusal[:300]}")
    if answer.finish_reason == "content_filter":
        raise CallError("refused", "the endpoint's content filter removed the answer")


async def stream_events(response: aiohttp.ClientResponse) -> AsyncIterator[Any]:
    """Yields the JSON values of an event stream, up to its end mark.

    Raises:
        CallError: An event is not JSON, or the stream is longer than `LONGEST_RESPONSE`.
    """
    waiting: list[bytes] = []  # the beginning of a line whose end has not come
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > LONGEST_RESPONSE:
            raise CallError("invalid_response", f"the stream is longer than {LONGEST_RESPONSE >> 20} MiB")
        waiting.append(part)
        if b"\n" not in part:
            continue
        events, rest = split_events(b"".join(waiting))
        waiting = [rest]
        for data in events:
            if data == b"[DONE]":
                return
            yield _json_value(data)


def _json_value(content: bytes) -> Any:
    try:
        return bounded_json.loads(content)
    except bounded_json.TooDeepError as error:
        raise CallError("invalid_response", str(error)) from None
    except ValueError:
        raise CallError("invalid_response", f"not JSON: {content[:100]!r}") from None


def _object(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise CallError("invalid_response", f"expected a JSON object, found {type(data).__name__}")
    return data


def raise_status(response: aiohttp.ClientResponse, content: bytes, secrets: Sequence[str] = ()) -> NoReturn:
    """Raises the failure that an HTTP status other than 200 stands for."""
    try:
        data = bounded_json.loads(content)
    except ValueError:
        data = None
    raise _failure(
        response.status,
        data,
        secrets,
        where=f"HTTP {response.status}",
        retry_after_s=_retry_after_s(response.headers.get("retry-after")),
    )


def raise_if_error(data: Any, answer: PartialAnswer, secrets: Sequence[str], *, where: str = "HTTP 200") -> None:
    """Raises the failure that an endpoint reports in a body of status 200, or in a stream."""
    if isinstance(data, dict):
        if data.get("choices"):
            if not data.get("error"):
                return
        elif not (data.get("error") or data.get("object") == "error" or ("detail" in data and "choices" not in data)):
            return
    elif not (isinstance(data, list) and data and isinstance(data[0], dict) and data[0].get("error")):
        return
    answer.free = answer.usage is None
    raise _failure(None, data, secrets, where=where)


# What endpoints call a failure, where they give no status.
_STATUS_OF_WORD = {
    "rate_limit": 429,
    "ratelimit": 429,
    "too_many": 429,
    "resource_exhausted": 429,
    "quota": 429,
    "overloaded": 529,
    "unavailable": 503,
    "timeout": 504,
    "context_length": 400,
    "content_filter": 400,
    "content_policy": 400,
    "invalid_request": 400,
    "invalid_argument": 400,
    "bad_request": 400,
    "badrequest": 400,
    "unprocessable": 422,
    "authentication": 401,
    "permission": 403,
    "not_found": 404,
}


def _failure(
    status: int | None, data: Any, secrets: Sequence[str], *, where: str, retry_after_s: float | None = None
) -> CallError:
    """Returns the failure that an endpoint's error stands for; without a status, its code or type names one."""
    error = _error_of(data)
    words = [str(error[key]) for key in ("code", "type", "status") if isinstance(error.get(key), str | int)]
    if status is None:
        status = _status_in(error, words)
    code = next((word for word in words if not word.isdigit() and _CODE.fullmatch(word)), None)
    message = _sanitized(_message_of(error), secrets)
    detail = where + (f": {message}" if message else "")
    if status == 429:
        return CallError("rate_limited", detail, transient=True, retry_after_s=retry_after_s, code=code)
    kind: FailureKind = "upstream_error"
    if status in (400, 413, 422):
        kind = "bad_request"
        lowered = f"{message} {words} {str(error.get('innererror'))[:500]}".lower()
        # OpenAI's code is `context_length_exceeded`; vLLM and Mistral say it only in the message.
        if any(sign in lowered for sign in ("context_length", "context length", "maximum context", "max_model_len")):
            kind = "context_length"
        # OpenAI's and Azure's codes.
        elif any(sign in lowered for sign in ("content_filter", "content_policy", "responsibleaipolicy")):
            kind = "refused"
    # An error of which nothing is known may pass.
    transient = status is None or status in _TRANSIENT_STATUS
    return CallError(kind, detail, transient=transient, retry_after_s=retry_after_s, code=code)


_CODE = re.compile(r"[A-Za-z][\w.-]{0,63}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]+")
_LONGEST_MESSAGE = 300


def _error_of(data: Any) -> dict[str, Any]:
    """Returns the object that describes an error: OpenAI's `error`, FastAPI's `detail`, or the body itself."""
    if isinstance(data, list) and data:
        data = data[0]
    if not isinstance(data, dict):
        return {"message": data} if isinstance(data, str) else {}
    for key in ("error", "detail"):
        if isinstance(inner := data.get(key), dict):
            return inner
        if inner:
            return {**data, "message": inner}
    return data


def _message_of(error: Mapping[str, Any]) -> str:
    message = next((error[key] for key in ("message", "msg", "detail", "error") if error.get(key)), "")
    if isinstance(message, list):  # FastAPI's list of faults
        message = "; ".join(_fault(fault) for fault in message[:5] if isinstance(fault, dict))
    return str(message)


def _fault(fault: Mapping[str, Any]) -> str:
    """Returns one fault of FastAPI's list in words: where it is, and what it is."""
    place = fault.get("loc")
    where = f"{'.'.join(map(str, place))}: " if isinstance(place, list) else ""
    return f"{where}{fault.get('msg')}"


def _status_in(error: Mapping[str, Any], words: Sequence[str]) -> int | None:
    numbers = (error.get(key) for key in ("code", "status", "status_code", "http_status"))
    for number in numbers:
        if str(number).isdigit() and 400 <= int(str(number)[:6]) < 600:
            return int(number)  # type: ignore[arg-type]
    lowered = " ".join(words).lower().replace(" ", "_")
    return next((status for word, status in _STATUS_OF_WORD.items() if word in lowered), None)


def _sanitized(text: str, secrets: Sequence[str]) -> str:
    """Returns an endpoint's words in one bounded line, without the keys that some endpoints repeat."""
    text = text[:100_000]
    for secret in secrets:
        if secret:
            text = text.replace(secret, "[key]")
    return _CONTROL.sub(" ", text)[:_LONGEST_MESSAGE]


def _retry_after_s(value: str | None) -> float | None:
    """Returns the seconds of a `Retry-After` header, which is a number or a date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError, OSError):  # of a year that no calendar has, say
            return None
    return None if math.isnan(seconds) else min(max(0.0, seconds), LONGEST_RETRY_AFTER_S)


def _usage(data: dict[str, Any]) -> Usage | None:
    usage = data.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    if type(prompt) is not int or type(completion) is not int:
        return None
    if min(prompt, completion) < 0 or max(prompt, completion) > MOST_TOKENS:
        return None  # it is estimated then
    details = usage.get("completion_tokens_details")
    reasoning = details.get("reasoning_tokens") if isinstance(details, dict) else None
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        reasoning_tokens=min(max(reasoning, 0), completion) if type(reasoning) is int else 0,
    )
