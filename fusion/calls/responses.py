"""The responses of an endpoint: complete bodies, event streams and errors, read into a partial answer.

`calls/upstream.py` makes the calls. This module knows OpenAI's formats, and turns a malformed response into a failure.
"""

import math
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

import aiohttp
import orjson

from mixfuse.contracts.trace import Usage
from mixfuse.fusion.calls.failures import CallError

LONGEST_RESPONSE = 64 << 20
"""Bytes; a longer response is cut off, so that no endpoint can fill the gateway's memory."""

_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 529})


@dataclass
class PartialAnswer:
    """The part of an answer that has been received.

    Attributes:
        text: Its text.
        tool_calls: Its tool calls, in OpenAI's form.
        refusal: The text with which the model refused.
        usage: The tokens that the endpoint reported.
        finish_reason: Why the answer ended; None before its end.
        logprobs: The choice's `logprobs` object.
        sent: Whether the request may have reached the endpoint.
        free: Whether it cost nothing: the endpoint was not reached, or refused by its HTTP status.
    """

    text: str = ""
    tool_calls: list[dict[str, Any]] | None = None
    refusal: str = ""
    usage: Usage | None = None
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None
    sent: bool = False
    free: bool = False


def first_token_logprobs(logprobs: Mapping[str, Any] | None) -> dict[str, float]:
    """Returns the natural-log probabilities of the alternatives for a reply's first token, by their text.

    Probabilities of tokens with the same text are added: SentencePiece's "A" and "▁A" both decode to "A".

    Args:
        logprobs: A choice's `logprobs` object; if it is absent or malformed, the result is empty.
    """
    try:
        top = (logprobs or {})["content"][0]["top_logprobs"]
        pairs = [(str(entry["token"]), float(entry["logprob"])) for entry in top]
    except (KeyError, IndexError, TypeError, ValueError):
        return {}
    total: dict[str, float] = {}
    for token, logprob in pairs:
        total[token] = logprob if token not in total else math.log(math.exp(total[token]) + math.exp(logprob))
    return total


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


def read_complete(content: bytes, answer: PartialAnswer) -> None:
    """Reads a complete response into `answer`.

    Raises:
        CallError: It is not a chat completion with text or tool calls (`invalid_response`), or the model declined
            (`refused`).
    """
    data = _json_object(content)
    answer.usage = _usage(data)
    try:
        choice = data["choices"][0]
        message = choice["message"]
        text, tool_calls, refusal = message.get("content"), message.get("tool_calls"), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise CallError("invalid_response", "the answer has no choices[0].message") from None
    answer.finish_reason, answer.logprobs = choice.get("finish_reason"), choice.get("logprobs")
    if isinstance(tool_calls, list) and tool_calls:
        answer.tool_calls = tool_calls
    answer.refusal = refusal if isinstance(refusal, str) else ""
    if isinstance(text, str):
        answer.text = text
    if not answer.text and answer.tool_calls is None:
        check_refusal(answer)
        if not isinstance(text, str):
            raise CallError("invalid_response", "the answer's message has no text content")


def read_chunk(event: dict[str, Any], answer: PartialAnswer, api_key: str | None) -> str:
    """Reads a chunk of a stream into `answer`, except for its text, which is returned.

    Raises:
        CallError: The chunk is an error of the endpoint, or malformed.
    """
    if event.get("error"):
        raise CallError("upstream_error", f"the stream ended with: {_error_message(event, api_key)}", transient=True)
    if "usage" in event:
        answer.usage = _usage(event) or answer.usage
    try:
        choices = event["choices"]
        if not choices:
            return ""
        choice = choices[0]
        delta = choice["delta"]
        text, tool_calls, refusal = delta.get("content"), delta.get("tool_calls"), delta.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise CallError("invalid_response", "a chunk has no choices[0].delta") from None
    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    if refusal:
        answer.refusal += str(refusal)
    for piece in tool_calls or ():
        _add_tool_call(piece, answer)
    return text if isinstance(text, str) else ""


def _add_tool_call(piece: Any, answer: PartialAnswer) -> None:
    """Adds a piece of a streamed tool call: the first piece of an index names the function, all carry arguments."""
    try:
        index, function = piece["index"], piece.get("function") or {}
        calls = answer.tool_calls = answer.tool_calls or []
        if index == len(calls):
            calls.append({"id": piece.get("id"), "type": "function", "function": {"name": "", "arguments": ""}})
        for key in ("name", "arguments"):
            calls[index]["function"][key] += function.get(key) or ""
    except (KeyError, IndexError, TypeError, AttributeError):
        raise CallError("invalid_response", "a chunk has a malformed tool call") from None


def check_refusal(answer: PartialAnswer) -> None:
    """Raises `refused` if an answer without text says that the model or its filter declined."""
    if answer.refusal:
        raise CallError("refused", f"the model refused: {answer.refusal[:300]}")
    if answer.finish_reason == "content_filter":
        raise CallError("refused", "the endpoint's content filter removed the answer")


async def stream_events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Yields the JSON objects of an event stream, up to its end mark.

    Raises:
        CallError: An event is not a JSON object, or a line is longer than `LONGEST_RESPONSE`.
    """
    rest = b""
    async for part in response.content.iter_any():
        events, rest = split_events(rest + part)
        if len(rest) > LONGEST_RESPONSE:
            raise CallError("invalid_response", f"a line of the stream is longer than {LONGEST_RESPONSE >> 20} MiB")
        for data in events:
            if data == b"[DONE]":
                return
            yield _json_object(data)


def _json_object(content: bytes) -> dict[str, Any]:
    try:
        data = orjson.loads(content)
    except ValueError:
        raise CallError("invalid_response", f"not JSON: {content[:100]!r}") from None
    if not isinstance(data, dict):
        raise CallError("invalid_response", f"expected a JSON object, found {type(data).__name__}")
    return data


def raise_status(response: aiohttp.ClientResponse, content: bytes, api_key: str | None) -> NoReturn:
    """Raises the failure that an HTTP status other than 200 stands for."""
    status = response.status
    try:
        data = orjson.loads(content)
    except ValueError:
        data = {}
    message = _error_message(data, api_key) if isinstance(data, dict) else ""
    detail = f"HTTP {status}" + (f": {message}" if message else "")
    retry_after_s = _retry_after_s(response.headers.get("retry-after"))
    if status == 429:
        raise CallError("rate_limited", detail, transient=True, retry_after_s=retry_after_s)
    lowered = f"{message} {data.get('error') if isinstance(data, dict) else ''}".lower()
    if status in (400, 413, 422):
        # OpenAI's code is `context_length_exceeded`; vLLM and Mistral say it only in the message.
        if any(sign in lowered for sign in ("context_length", "context length", "maximum context", "max_model_len")):
            raise CallError("context_length", detail)
        # OpenAI's and Azure's codes.
        if any(sign in lowered for sign in ("content_filter", "content_policy", "responsibleaipolicy")):
            raise CallError("refused", detail)
    raise CallError("upstream_error", detail, transient=status in _TRANSIENT_STATUS, retry_after_s=retry_after_s)


def _retry_after_s(value: str | None) -> float | None:
    """Returns the seconds of a `Retry-After` header, which is a number or a date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _error_message(data: dict[str, Any], api_key: str | None) -> str:
    error = data.get("error", data)
    message = error.get("message") if isinstance(error, dict) else error
    text = str(message)[:300] if message else ""
    # Some endpoints repeat the key that they refuse.
    return text.replace(api_key, "[key]") if api_key else text


def _usage(data: dict[str, Any]) -> Usage | None:
    usage = data.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    if not isinstance(prompt, int) or not isinstance(completion, int) or min(prompt, completion) < 0:
        return None
    return Usage(prompt_tokens=prompt, completion_tokens=completion)
