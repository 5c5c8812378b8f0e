"""One chat completion from one endpoint: a typed result or failure, and a ledger entry for every attempt."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import orjson
from multidict import CIMultiDict
from yarl import URL

from mixfuse.contracts.judge_protocol import Calibration
from mixfuse.contracts.trace import Call, Stage, Usage
from mixfuse.fusion.calls.failures import KINDS, CallError, FailureKind
from mixfuse.fusion.calls.ledger import NOTHING, Ledger, Spend, most, prompt_tokens, tokens
from mixfuse.fusion.calls.model_limits import Guard
from mixfuse.fusion.calls.responses import (
    PartialAnswer,
    check_refusal,
    raise_status,
    read_body,
    read_chunk,
    read_complete,
    stream_events,
)
from mixfuse.fusion.config import ModelConfig, Price
from mixfuse.fusion.messages import Message

Client = aiohttp.ClientSession
"""The HTTP client that all calls share. httpx takes five times the CPU time per call (0.80 ms against 0.16)."""
Emit = Callable[[str], Awaitable[None]]
"""Takes the next piece of an answer's text."""

# Well below the 5 s after which uvicorn closes an idle connection: no request may be sent on a connection that the
# other end is closing, even if this process gets no CPU for seconds. With 4 s the demo lost 17 requests on a busy
# machine.
_KEEP_ALIVE_S = 2.0
_CONNECT_S = 10.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The destination of a call.

    Attributes:
        base_url: The URL before `/chat/completions`.
        model: The model's name at the endpoint; for a role it includes the revision.
        api_key: The bearer token, if the endpoint needs one.
        revision: The adapter revision that answers, if the endpoint serves a role.
        guard: The model's limits; without them a call is made once, immediately.
        calibration: The calibration of a judge's probabilities, from its adapter's manifest; None: they are used as
            they are.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    revision: str | None = None
    guard: Guard | None = field(default=None, repr=False, compare=False)
    calibration: Calibration | None = None


@dataclass(frozen=True, slots=True)
class Purpose:
    """The purpose of a call, for its ledger entry, and its price and time limit.

    Attributes:
        stage: The step of the mode.
        member: The member's name, or "judge" or "synthesizer".
        candidate: The candidate that the call produces, if any.
        price: The price of its tokens.
        timeout_s: The longest that one attempt may take, in seconds.
    """

    stage: Stage
    member: str
    candidate: int | None = None
    price: Price = field(default_factory=Price)
    timeout_s: float = 120.0

    @classmethod
    def of(cls, model: ModelConfig, stage: Stage, name: str, candidate: int | None = None) -> "Purpose":
        """Returns the purpose of a call to a configured model, with the model's price and time limit."""
        return cls(stage, name, candidate, model.price, model.timeout_s)


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer.

    Attributes:
        text: The message's content; empty if it only calls tools.
        finish_reason: Why it ended, as the endpoint sent it (`stop`, `length`, …).
        logprobs: The choice's `logprobs` object as the endpoint sent it, if it was asked for.
        call: Its ledger entry.
        tool_calls: The message's tool calls, in OpenAI's form.
    """

    text: str
    finish_reason: str
    logprobs: dict[str, Any] | None
    call: Call
    tool_calls: list[dict[str, Any]] | None = None


def http_client() -> Client:
    """Returns a client for many calls at once; needs a running event loop, and must be closed.

    The client itself limits neither time nor connections: `Purpose.timeout_s` and the guards do.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def call(
    client: Client,
    endpoint: Endpoint,
    messages: Sequence[Message],
    parameters: Mapping[str, Any],
    *,
    purpose: Purpose,
    ledger: Ledger,
    emit: Emit | None = None,
) -> Reply:
    """Makes one chat completion within the limits of `endpoint.guard`; the ledger gets every attempt.

    Cancelling it closes the connections, so that the endpoint stops generating. The message of `Task.cancel` names
    the outcome (`cancelled_straggler`, `timeout`); without a message it is `cancelled`.

    Args:
        client: Shared by all calls.
        endpoint: The destination.
        messages: The conversation.
        parameters: Sampling parameters, as in OpenAI's request.
        purpose: The purpose of the call.
        ledger: Takes the attempts; its deadline and budgets limit them.
        emit: Takes each piece of text as it arrives; without it the answer is not streamed.

    Raises:
        CallError: No usable answer came back.
    """
    pending = _PendingCall(client, endpoint, messages, parameters, purpose=purpose, ledger=ledger, emit=emit)
    if endpoint.guard is None or endpoint.guard.hedge_after_s is None:
        return await pending.until_answered()
    return await _hedged(pending, endpoint.guard.hedge_after_s)


class _PendingCall:
    """One call under way, over all attempts at it.

    Attributes:
        begun: Whether a part of the answer has been emitted, so that no further attempt may be made.
    """

    def __init__(
        self,
        client: Client,
        endpoint: Endpoint,
        messages: Sequence[Message],
        parameters: Mapping[str, Any],
        *,
        purpose: Purpose,
        ledger: Ledger,
        emit: Emit | None,
    ) -> None:
        self._client, self._endpoint, self._messages = client, endpoint, messages
        self._purpose, self.ledger, self._emit = purpose, ledger, emit
        body = {"model": endpoint.model, "messages": list(messages), **parameters}
        if emit is not None:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        self._body = orjson.dumps(body)
        # Estimated only if there are budgets: the estimate reads the whole prompt.
        self.estimate: Spend = most(messages, parameters, purpose.price) if ledger.budgets else NOTHING
        self._attempts = 0
        self._emitting: PartialAnswer | None = None

    @property
    def begun(self) -> bool:
        return self._emitting is not None

    async def until_answered(self) -> Reply:
        """Makes attempts until one succeeds, a failure is final, or the guard or the deadline allows no further one."""
        guard = self._endpoint.guard
        attempts = 0
        while True:
            try:
                return await self.attempt()
            except CallError as failure:
                attempts += 1
                wait_s = guard.wait_before_retry_s(failure, attempts) if guard else None
                if wait_s is None or self.begun or wait_s >= self.ledger.time_left_s():
                    raise
            await asyncio.sleep(wait_s)

    async def attempt(self) -> Reply:
        """Makes one attempt and notes it in the ledger, however it ends."""
        guard, ledger, answer = self._endpoint.guard, self.ledger, PartialAnswer()
        self._attempts += 1
        number = self._attempts
        started_ms = ledger.elapsed_ms()
        opened = NOTHING
        admitted = False
        try:
            if ledger.budgets:
                ledger.open(self.estimate)
                opened = self.estimate
            if guard is None:
                await self._send(answer)
            else:
                guard.admit()
                admitted = True
                if not guard.enter():
                    try:
                        async with asyncio.timeout(self._purpose.timeout_s):
                            await guard.wait()
                    except TimeoutError as error:
                        raise _typed(error, answer, self._purpose.timeout_s) from error
                try:
                    await self._send(answer)
                finally:
                    guard.leave()
        except CallError as failure:
            if guard is not None and admitted:
                # An endpoint that refuses a request (4xx) is healthy.
                refusal = failure.kind == "upstream_error" and not failure.transient
                guard.report(failure.kind if answer.sent and not refusal else "queue_full")
            ledger.enter(self._line(failure.kind, str(failure), answer, number, started_ms), opened)
            raise
        except asyncio.CancelledError as stop:
            outcome = cancelled_as(stop)
            if guard is not None and admitted:
                guard.report(outcome if answer.sent else "cancelled")
            ledger.enter(self._line(outcome, "cancelled before it ended", answer, number, started_ms), opened)
            raise
        if guard is not None:
            guard.report(None)
        line = self._line("ok", None, answer, number, started_ms)
        ledger.enter(line, opened)
        return Reply(answer.text, answer.finish_reason or "stop", answer.logprobs, line, answer.tool_calls)

    async def _send(self, answer: PartialAnswer) -> None:
        answer.sent = True
        url, headers, proxy = _address(self._endpoint.base_url, self._endpoint.api_key)
        try:
            async with (
                asyncio.timeout(self._purpose.timeout_s),
                # A redirect could carry the key and the prompt to somewhere else.
                self._client.post(
                    url, data=self._body, headers=headers, proxy=proxy, allow_redirects=False
                ) as response,
            ):
                if response.status != 200:
                    answer.free = True
                    raise_status(response, await read_body(response), self._endpoint.api_key)
                if self._emit is None:
                    read_complete(await read_body(response), answer)
                else:
                    await self._read_stream(response, answer)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _typed(error, answer, self._purpose.timeout_s) from error

    async def _read_stream(self, response: aiohttp.ClientResponse, answer: PartialAnswer) -> None:
        any_event = False
        async for event in stream_events(response):
            any_event = True
            text = read_chunk(event, answer, self._endpoint.api_key)
            if not text:
                continue
            if self._emitting is None:
                self._emitting = answer
            elif self._emitting is not answer:
                raise CallError("cancelled_hedge", "another attempt at the same call answered first")
            answer.text += text
            await self._emit(text)  # type: ignore[misc] # only called if there is an `_emit`
        if not any_event:
            raise CallError("invalid_response", "the answer is not an event stream")
        if answer.finish_reason is None:
            raise CallError("upstream_error", "the stream broke off before its end", transient=True)
        if not answer.text and answer.tool_calls is None:
            check_refusal(answer)

    def _line(self, outcome: str, error: str | None, answer: PartialAnswer, number: int, started_ms: float) -> Call:
        """Returns the attempt's ledger entry."""
        purpose, usage, estimated = self._purpose, answer.usage, False
        if usage is None:
            usage, estimated = self._estimate(answer)
        return Call(
            stage=purpose.stage,
            member=purpose.member,
            model=self._endpoint.model,
            revision=self._endpoint.revision,
            candidate=purpose.candidate,
            attempt=number,
            outcome=outcome,
            error=error,
            text=answer.text or (None if error else ""),
            tool_calls=answer.tool_calls,
            usage=usage,
            estimated=estimated,
            cost=purpose.price.cost(usage.prompt_tokens, usage.completion_tokens),
            started_ms=started_ms,
            duration_ms=self.ledger.elapsed_ms() - started_ms,
        )

    def _estimate(self, answer: PartialAnswer) -> tuple[Usage, bool]:
        """Returns the tokens of an attempt whose endpoint reported none, and whether they are an estimate.

        An endpoint that was not reached, or that refused by its HTTP status, used none; any other read the prompt.
        """
        if not answer.sent or (answer.free and not answer.text):
            return Usage(), False
        return Usage(prompt_tokens=prompt_tokens(self._messages), completion_tokens=tokens(answer.text)), True


async def _hedged(pending: _PendingCall, after_s: float) -> Reply:
    """Makes a call, and a second one beside it if no text has come after `after_s`; the first to answer counts."""
    running = {asyncio.ensure_future(pending.until_answered())}
    reason: FailureKind = "cancelled_hedge"
    failure: CallError | None = None
    try:
        done, _ = await asyncio.wait(running, timeout=after_s)
        if not done and not pending.begun and pending.ledger.affords(pending.estimate):
            running.add(asyncio.ensure_future(pending.attempt()))
        while running:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                try:
                    return task.result()
                except CallError as error:
                    # Reported is the failure of the attempt that emitted text, or else the last failure.
                    failure = error if failure is None or error.kind != "cancelled_hedge" else failure
            if pending.begun and failure is not None and failure.kind != "cancelled_hedge":
                break
        raise failure or CallError("upstream_error", "no attempt ended")
    except asyncio.CancelledError as stop:
        reason = cancelled_as(stop)
        raise
    finally:
        for task in running:
            task.cancel(reason)
        if running:
            await asyncio.wait(running)


def cancelled_as(stop: asyncio.CancelledError) -> FailureKind:
    """Returns the outcome that a cancellation's message names; `cancelled` for any other message."""
    return next((kind for kind in KINDS if stop.args and stop.args[0] == kind), "cancelled")


def _typed(error: Exception, answer: PartialAnswer, timeout_s: float) -> CallError:
    """Returns an error of the HTTP client as a failure of the call."""
    text = str(error) or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError | aiohttp.InvalidURL):
        answer.free = True
        transient = not isinstance(error, aiohttp.InvalidURL)
        return CallError("unreachable", f"cannot connect: {text}", transient=transient)
    if isinstance(error, TimeoutError):
        return CallError("timeout", f"no whole answer within {timeout_s:g} s")
    if "content-encoding" in text.lower():
        return CallError("invalid_response", f"undecodable body: {text}")
    return CallError("upstream_error", f"the connection broke: {text}", transient=True)


@lru_cache(maxsize=1024)
def _address(base_url: str, api_key: str | None) -> tuple[URL, CIMultiDict[str], str | None]:
    """Returns (the URL of an endpoint's completions, the headers, the proxy); cached for each endpoint."""
    headers = CIMultiDict({"content-type": "application/json"})
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    return URL(f"{base_url.rstrip('/')}/chat/completions"), headers, _proxy(base_url)


def _proxy(url: str) -> str | None:
    """Returns the proxy that the environment names for a URL; loopback addresses never get one."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in ("127.0.0.1", "localhost", "::1") or proxy_bypass(host):
        return None
    proxies = getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")
