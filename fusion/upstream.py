"""One chat completion from one endpoint: typed result, typed failure, and always a line in the ledger."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import httpx

from fusion.config import Price
from mixfuse.errors import MixfuseError
from mixfuse.trace import Call, Stage, Usage

Message = dict[str, Any]
Emit = Callable[[str], Awaitable[None]]
"""Takes the next piece of an answer's text."""

FailureKind = Literal[
    "timeout",  # the call's own limit or the members' deadline
    "rate_limited",
    "upstream_error",
    "invalid_response",
    "context_length",
    "unreachable",
    "cancelled_straggler",  # enough others had answered
    "cancelled",  # the client went away
]


class CallError(MixfuseError):
    """One call gave no usable answer; `kind` is one of `FailureKind`."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message, kind=kind)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one call goes.

    Attributes:
        base_url: What `/chat/completions` is appended to.
        model: The model's name there; for a role it is revision-qualified.
        api_key: Sent as bearer token where set.
        revision: The adapter revision that answers, where the endpoint is a role.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a call is for, as its line in the ledger says.

    Attributes:
        stage: The step of the mode.
        member: The member's name, or "judge" or "synthesizer".
        candidate: The candidate the call produces, if any.
        price: What its tokens cost.
        timeout_s: The longest it may take, in seconds.
    """

    stage: Stage
    member: str
    candidate: int | None = None
    price: Price = field(default_factory=Price)
    timeout_s: float = 120.0


class Ledger:
    """Every attempt of one request, failed and cancelled ones too, in the order in which they ended."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._began = time.monotonic()

    def elapsed_ms(self) -> float:
        """Milliseconds since the request began."""
        return (time.monotonic() - self._began) * 1000


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer.

    Attributes:
        text: The message's content.
        finish_reason: As the endpoint sent it (`stop`, `length`, …).
        logprobs: The choice's `logprobs` object as the endpoint sent it, where asked for.
        call: Its line in the ledger.
    """

    text: str
    finish_reason: str
    logprobs: dict[str, Any] | None
    call: Call


async def call(
    client: httpx.AsyncClient,
    endpoint: Endpoint,
    messages: Sequence[Message],
    parameters: Mapping[str, Any],
    *,
    purpose: Purpose,
    ledger: Ledger,
    emit: Emit | None = None,
) -> Reply:
    """Makes one attempt at one chat completion and writes it into the ledger, however it ends.

    Cancelling it closes the connection, so the endpoint stops working. `Task.cancel`'s message names the
    outcome (`cancelled_straggler`, `timeout`); without one it is `cancelled`.

    Args:
        client: Shared by all calls.
        endpoint: Where to.
        messages: The conversation.
        parameters: Sampling parameters, as in OpenAI's request.
        purpose: What the call is for.
        ledger: Takes the call's line.
        emit: Where given, the answer is streamed and each piece of text handed over as it arrives.

    Raises:
        CallError: No usable answer came back.
    """
    body = {"model": endpoint.model, "messages": list(messages), **parameters}
    answer = _Partial()
    started_ms = ledger.elapsed_ms()

    def enter(outcome: str, error: str | None = None) -> Call:
        usage, estimated = answer.usage, False
        if usage is None:
            usage, estimated = _estimate(outcome, messages, answer.text)
        entry = Call(
            stage=purpose.stage,
            member=purpose.member,
            model=endpoint.model,
            revision=endpoint.revision,
            candidate=purpose.candidate,
            outcome=outcome,
            error=error,
            text=answer.text or (None if error else ""),
            usage=usage,
            estimated=estimated,
            cost=purpose.price.cost(usage.prompt_tokens, usage.completion_tokens),
            started_ms=started_ms,
            duration_ms=ledger.elapsed_ms() - started_ms,
        )
        ledger.calls.append(entry)
        return entry

    try:
        with _typed_failures(purpose.timeout_s):
            async with asyncio.timeout(purpose.timeout_s):
                if emit is None:
                    await _whole(client, endpoint, body, answer)
                else:
                    await _streamed(client, endpoint, body, answer, emit)
    except CallError as failure:
        enter(failure.kind, str(failure))
        raise
    except asyncio.CancelledError as stop:
        enter(str(stop.args[0]) if stop.args else "cancelled", "cancelled before it ended")
        raise
    return Reply(answer.text, answer.finish_reason or "stop", answer.logprobs, enter("ok"))


def first_token_logprobs(logprobs: Mapping[str, Any] | None) -> dict[str, float]:
    """Token text → natural-log probability of the candidates for a reply's first token.

    Tokens that are spelled alike are added up: SentencePiece's "A" and "▁A" both decode to "A".

    Args:
        logprobs: A choice's `logprobs` object; an absent or malformed one gives an empty result.
    """
    try:
        top = (logprobs or {})["content"][0]["top_logprobs"]
        pairs = [(str(entry["token"]), float(entry["logprob"])) for entry in top]
    except (KeyError, IndexError, TypeError, ValueError):
        return {}
    found: dict[str, float] = {}
    for token, logprob in pairs:
        found[token] = logprob if token not in found else math.log(math.exp(found[token]) + math.exp(logprob))
    return found


def split_events(received: bytes) -> tuple[list[bytes], bytes]:
    """Splits what has come of a server-sent event stream into the data of whole events, and the rest.

    Lines end at newline bytes only: httpx's `iter_lines` also splits at U+2028 and its like, which stand
    unescaped in the JSON of some servers.
    """
    *lines, rest = received.split(b"\n")
    return [line.removeprefix(b"data:").strip() for line in lines if line.startswith(b"data:")], rest


@dataclass
class _Partial:
    """An answer as far as it has come."""

    text: str = ""
    usage: Usage | None = None
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


@contextmanager
def _typed_failures(timeout_s: float) -> Iterator[None]:
    """Turns what goes wrong inside into `CallError`."""
    try:
        yield
    except TimeoutError as error:
        raise CallError("timeout", f"no whole answer within {timeout_s:g} s") from error
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
        raise CallError("unreachable", f"cannot connect: {str(error) or type(error).__name__}") from error
    except httpx.DecodingError as error:
        raise CallError("invalid_response", f"undecodable body: {error}") from error
    except httpx.HTTPError as error:
        raise CallError("upstream_error", f"the connection broke: {str(error) or type(error).__name__}") from error


async def _whole(client: httpx.AsyncClient, endpoint: Endpoint, body: dict[str, Any], answer: _Partial) -> None:
    response = await client.post(_url(endpoint), json=body, headers=_headers(endpoint))
    if response.status_code != httpx.codes.OK:
        _refuse(response.status_code, response.content)
    data = _json_object(response.content)
    answer.usage = _usage(data)
    try:
        choice = data["choices"][0]
        content = choice["message"].get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise CallError("invalid_response", "the answer has no choices[0].message") from None
    if not isinstance(content, str):
        raise CallError("invalid_response", "the answer's message has no text content")
    answer.text = content
    answer.finish_reason = choice.get("finish_reason")
    answer.logprobs = choice.get("logprobs")


async def _streamed(
    client: httpx.AsyncClient, endpoint: Endpoint, body: dict[str, Any], answer: _Partial, emit: Emit
) -> None:
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", _url(endpoint), json=body, headers=_headers(endpoint)) as response:
        if response.status_code != httpx.codes.OK:
            _refuse(response.status_code, await response.aread())
        async for event in _events(response):
            if event.get("error"):
                raise CallError("upstream_error", f"the stream ended with: {_error_message(event)}")
            answer.usage = _usage(event) or answer.usage
            try:
                choices = event["choices"]
                if not choices:
                    continue
                delta = choices[0]["delta"].get("content")
            except (KeyError, IndexError, TypeError, AttributeError):
                raise CallError("invalid_response", "a chunk has no choices[0].delta") from None
            answer.finish_reason = choices[0].get("finish_reason") or answer.finish_reason
            if delta:
                answer.text += delta
                await emit(delta)
    if answer.finish_reason is None:
        raise CallError("upstream_error", "the stream broke off before its end")


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream, up to its end mark."""
    rest = b""
    async for part in response.aiter_bytes():
        events, rest = split_events(rest + part)
        for data in events:
            if data == b"[DONE]":
                return
            yield _json_object(data)


def _url(endpoint: Endpoint) -> str:
    return f"{endpoint.base_url.rstrip('/')}/chat/completions"


def _headers(endpoint: Endpoint) -> dict[str, str]:
    return {"authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}


def _json_object(content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except ValueError:
        raise CallError("invalid_response", f"not JSON: {content[:100]!r}") from None
    if not isinstance(data, dict):
        raise CallError("invalid_response", f"expected a JSON object, found {type(data).__name__}")
    return data


def _refuse(status: int, content: bytes) -> NoReturn:
    """Raises what an HTTP status other than 200 means."""
    try:
        data = json.loads(content)
    except ValueError:
        data = {}
    message = _error_message(data) if isinstance(data, dict) else ""
    detail = f"HTTP {status}" + (f": {message}" if message else "")
    lowered = f"{message} {data.get('error') if isinstance(data, dict) else ''}".lower()
    if status == httpx.codes.TOO_MANY_REQUESTS:
        raise CallError("rate_limited", detail)
    # OpenAI's code is `context_length_exceeded`; vLLM and Mistral say it in words only.
    if status in (400, 413, 422) and any(
        sign in lowered for sign in ("context_length", "context length", "maximum context", "max_model_len")
    ):
        raise CallError("context_length", detail)
    raise CallError("upstream_error", detail)


def _error_message(data: dict[str, Any]) -> str:
    error = data.get("error", data)
    message = error.get("message") if isinstance(error, dict) else error
    return str(message)[:300] if message else ""


def _usage(data: dict[str, Any]) -> Usage | None:
    usage = data.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    return Usage(prompt_tokens=prompt, completion_tokens=completion)


# An endpoint that refused or was never reached has used no tokens; any other has read the prompt.
_FREE = frozenset({"unreachable", "rate_limited", "context_length", "upstream_error"})


def _estimate(outcome: str, messages: Sequence[Message], text: str) -> tuple[Usage, bool]:
    """Tokens of a call whose endpoint reported none, at four characters each; and whether that is a guess."""
    if outcome in _FREE and not text:
        return Usage(), False
    prompt = sum(len(str(message.get("content", ""))) for message in messages)
    return Usage(prompt_tokens=math.ceil(prompt / 4), completion_tokens=math.ceil(len(text) / 4)), True
