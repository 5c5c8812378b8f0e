"""One chat completion from one endpoint: a typed result or failure, and a ledger entry for every attempt."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import orjson
from multidict import CIMultiDict
from yarl import URL

from mixfuse.contracts.judge_protocol import Calibration
from mixfuse.contracts.trace import Call, Stage, Usage
from mixfuse.fusion.calls.dialect import Dialect
from mixfuse.fusion.calls.failures import KINDS, CallError, FailureKind
from mixfuse.fusion.calls.ledger import NOTHING, Ledger, Spend, most, prompt_tokens, tokens
from mixfuse.fusion.calls.model_limits import Guard
from mixfuse.fusion.calls.responses import (
    PartialAnswer,
    check_answered,
    raise_status,
    read_batch,
    read_body,
    read_chunk,
    read_complete,
    read_other,
    stream_events,
)
from mixfuse.fusion.calls.thoughts import Splitter
from mixfuse.fusion.config import ModelConfig, Price
from mixfuse.fusion.messages import Message

logger = logging.getLogger(__name__)

Client = aiohttp.ClientSession
"""The HTTP client that all calls share. httpx takes five times the CPU time per call (0.80 ms against 0.16)."""
Emit = Callable[[str], Awaitable[None]]
"""Takes the next piece of an answer's text."""

# Well below the 5 s after which uvicorn closes an idle connection: no request may be sent on a connection that the
# other end is closing, even if this process gets no CPU for seconds. With 4 s the demo lost 17 requests on a busy
# machine.
_KEEP_ALIVE_S = 2.0
_CONNECT_S = 10.0
_NO_ROUTE = frozenset({404, 405, 501})
_UNKNOWN_MODEL = re.compile(rb"model\b.{0,200}\b(?:does not exist|not found)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The destination of a call.

    Attributes:
        base_url: The URL before `/chat/completions`.
        model: The model's name at the endpoint; for a role it includes the revision.
        api_key: The bearer token, if the endpoint needs one.
        revision: The adapter revision that answers, if the endpoint serves a role.
        guard: The model's limits; without them a call is made once, immediately.
        dialect: How the model wants to be asked.
        headers: More HTTP headers of each call; secret, as the key is.
        calibration: The calibration of a judge's probabilities, from its adapter's manifest; None: they are used as
            they are.
        regain: Called if the endpoint says that it has no such model; returns whether it has it again.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    revision: str | None = None
    guard: Guard | None = field(default=None, repr=False, compare=False)
    dialect: Dialect = field(default_factory=Dialect, repr=False, compare=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    calibration: Calibration | None = None
    regain: Callable[[], Awaitable[bool]] | None = field(default=None, repr=False, compare=False)

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no message may repeat, the longest first."""
        found = {value for _, value in self.headers} | {value.split(" ", 1)[-1] for _, value in self.headers}
        return tuple(sorted((text for text in {self.api_key or "", *found} if len(text) > 3), key=len, reverse=True))


@dataclass(frozen=True, slots=True)
class Purpose:
    """The purpose of a call, for its ledger entry, and its price and time limit.

    Attributes:
        stage: The step of the mode.
        member: The member's name, or "judge" or "synthesizer".
        candidate: The candidate that the call produces, if any.
        price: The price of its tokens.
        timeout_s: The longest that one attempt may take, in seconds.
        tokenizer: Counts what a call may cost at most.
    """

    stage: Stage
    member: str
    candidate: int | None = None
    price: Price = field(default_factory=Price)
    timeout_s: float = 120.0
    tokenizer: Path | None = None

    @classmethod
    def of(cls, model: ModelConfig, stage: Stage, name: str, candidate: int | None = None) -> "Purpose":
        """Returns the purpose of a call to a configured model, with the model's price and time limit."""
        return cls(stage, name, candidate, model.price, model.timeout_s, model.tokenizer)


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer.

    Attributes:
        text: The message's content without thoughts; empty if it only calls tools.
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

    @property
    def thoughts(self) -> str | None:
        """What the model thought before it answered."""
        return self.call.thoughts


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
    think: Emit | None = None,
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
        think: Takes each piece of the model's thoughts, where the answer is streamed.

    Raises:
        CallError: No usable answer came back.
    """
    pending = _PendingCall(
        client, endpoint, [messages], parameters, purpose=purpose, ledger=ledger, emit=emit, think=think
    )
    if endpoint.guard is None or endpoint.guard.hedge_after_s is None:
        (reply,) = await pending.until_answered()
    else:
        (reply,) = await _hedged(pending, endpoint.guard.hedge_after_s)
    if isinstance(reply, CallError):
        raise reply
    return reply


class NoRouteError(CallError):
    """The endpoint lacks an optional route, such as the one that answers several conversations in one call."""


async def call_batch(
    client: Client,
    endpoint: Endpoint,
    conversations: Sequence[Sequence[Message]],
    parameters: Mapping[str, Any],
    *,
    purpose: Purpose,
    ledger: Ledger,
) -> list[Reply | CallError]:
    """Makes one chat completion of each conversation, all in one call, as vLLM's `/chat/completions/batch` does.

    The ledger gets an entry for each conversation. An endpoint without such a route costs nothing and gets none.

    Args:
        client: Shared by all calls.
        endpoint: The destination.
        conversations: The conversations; their parameters are the same.
        parameters: Sampling parameters, as in OpenAI's request.
        purpose: The purpose of the calls.
        ledger: Takes the attempts; its deadline and budgets limit them.

    Returns:
        For each conversation, in order, its answer or why there is none.

    Raises:
        NoRouteError: The endpoint has no such route.
        CallError: No answer came back at all.
    """
    pending = _PendingCall(
        client, endpoint, conversations, parameters, purpose=purpose, ledger=ledger, path="/chat/completions/batch"
    )
    return await pending.until_answered()


async def forward(
    client: Client,
    endpoint: Endpoint,
    body: Mapping[str, Any],
    *,
    path: str,
    inputs: Sequence[Message],
    parameters: Mapping[str, Any],
    purpose: Purpose,
    ledger: Ledger,
    check: Callable[[dict[str, Any]], object] | None = None,
    optional: bool = False,
) -> dict[str, Any]:
    """Passes a request to another route of an endpoint and returns its response, within the same limits.

    Args:
        client: Shared by all calls.
        endpoint: The destination.
        body: The request's body; its model is replaced by the endpoint's.
        path: The route, after the base URL.
        inputs: The texts that are sent, for estimates.
        parameters: What limits the answer's length, for estimates.
        purpose: The purpose of the call.
        ledger: Takes the attempts; its deadline and budgets limit them.
        check: Raises a `CallError` for a response that is not usable; the attempt has then failed.
        optional: Whether the endpoint may lack the route; that costs nothing and gets no entry in the ledger.

    Raises:
        NoRouteError: The route is optional, and the endpoint lacks it.
        CallError: No usable response came back.
    """
    pending = _Forwarded(
        client, endpoint, [inputs], parameters, purpose=purpose, ledger=ledger, path=path, forwarded=body
    )
    pending.check, pending.optional = check, optional
    await pending.until_answered()
    return pending.response


class _PendingCall:
    """One call under way, over all attempts at it.

    Attributes:
        begun: Whether a part of the answer has been emitted, so that no further attempt may be made.
    """

    def __init__(
        self,
        client: Client,
        endpoint: Endpoint,
        conversations: Sequence[Sequence[Message]],
        parameters: Mapping[str, Any],
        *,
        purpose: Purpose,
        ledger: Ledger,
        emit: Emit | None = None,
        think: Emit | None = None,
        path: str = "/chat/completions",
    ) -> None:
        self._client, self._endpoint, self._conversations = client, endpoint, conversations
        self._purpose, self.ledger, self._emit, self._think = purpose, ledger, emit, think
        self._parameters, self._path = parameters, path
        self._dialect = endpoint.dialect
        self._own = purpose.stage == "verdict"
        self._secrets = endpoint.secrets
        self._body = self._write()
        # Estimated only if there are budgets: the estimate reads the whole prompt.
        self.estimate: Spend = NOTHING
        if ledger.budgets:
            for messages in conversations:
                self.estimate = self.estimate.plus(most(messages, parameters, purpose.price, purpose.tokenizer))
        self._attempts = 0
        self._emitting: PartialAnswer | None = None
        self._unknown_model = False
        self.optional = self._batch

    @property
    def begun(self) -> bool:
        return self._emitting is not None

    @property
    def _batch(self) -> bool:
        return self._path == "/chat/completions/batch"

    def _write(self) -> bytes:
        """Returns the request's body, as the endpoint is known to want it."""
        messages = [list(messages) for messages in self._conversations]
        body: dict[str, Any] = {"model": self._endpoint.model, "messages": messages if self._batch else messages[0]}
        body |= self._dialect.body(self._parameters, own=self._own)
        if self._emit is not None:
            body["stream"] = True
            if self._dialect.wants_usage():
                body["stream_options"] = {"include_usage": True}
        return orjson.dumps(body)

    async def until_answered(self) -> list[Reply | CallError]:
        """Makes attempts until one succeeds, a failure is final, or the guard or the deadline allows no further one."""
        guard = self._endpoint.guard
        attempts = 0
        regained = False
        while True:
            try:
                return await self.attempt()
            except CallError as failure:
                if not self.begun and self._relearn(failure):
                    continue
                if self._unknown_model and self._endpoint.regain is not None and not regained:
                    regained = await self._endpoint.regain()
                    if regained:
                        continue
                attempts += 1
                wait_s = guard.wait_before_retry_s(failure, attempts) if guard else None
                if wait_s is None or self.begun or wait_s >= self.ledger.time_left_s():
                    raise
            await asyncio.sleep(wait_s)

    def _relearn(self, failure: CallError) -> bool:
        """Writes the request anew if the refusal says how, or another call has learned it meanwhile."""
        self._dialect.learn(failure, self._parameters, own=self._own)
        before, self._body = self._body, self._write()
        return failure.kind in ("bad_request", "context_length") and self._body != before

    async def attempt(self) -> list[Reply | CallError]:
        """Makes one attempt and notes it in the ledger, however it ends."""
        guard, ledger = self._endpoint.guard, self.ledger
        begins = "open" if self._dialect.opened and self._dialect.thoughts == "auto" else self._dialect.thoughts
        answers = [PartialAnswer(splitter=Splitter(begins)) for _ in self._conversations]
        answer = answers[0]
        self._attempts += 1
        number = self._attempts
        self._unknown_model = False
        started_ms = ledger.elapsed_ms()
        opened = NOTHING
        admitted = False
        try:
            if ledger.budgets:
                ledger.open(self.estimate)
                opened = self.estimate
            if guard is None:
                failures = await self._send(answers)
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
                    failures = await self._send(answers)
                finally:
                    guard.leave()
        except NoRouteError:
            if guard is not None:
                guard.report("queue_full")
            ledger.close(opened)
            raise
        except CallError as failure:
            if guard is not None and admitted:
                # An endpoint that refuses a request (4xx) is healthy.
                refusal = failure.kind == "upstream_error" and not failure.transient
                guard.report(failure.kind if answer.sent and not refusal else "queue_full")
            self._enter(answers, [failure] * len(answers), number, started_ms, opened)
            raise
        except asyncio.CancelledError as stop:
            outcome = cancelled_as(stop)
            if guard is not None and admitted:
                guard.report(outcome if answer.sent else "cancelled")
            stopped = CallError(outcome, "cancelled before it ended")
            self._enter(answers, [stopped] * len(answers), number, started_ms, opened)
            raise
        if guard is not None:
            guard.report(None)
            guard.took((ledger.elapsed_ms() - started_ms) / 1000 - answer.held_s)
        self._dialect.opened = self._dialect.opened or any(part.splitter.opened for part in answers)
        lines = self._enter(answers, failures, number, started_ms, opened)
        return [
            failure or Reply(part.text, part.finish_reason or "stop", part.logprobs, line, part.tool_calls)
            for part, line, failure in zip(answers, lines, failures, strict=True)
        ]

    async def _send(self, answers: list[PartialAnswer]) -> list[CallError | None]:
        """Makes the HTTP request and reads the response; returns why single conversations got no answer."""
        for answer in answers:
            answer.sent = True
        endpoint = self._endpoint
        url, headers, proxy = _address(endpoint.base_url, self._path, endpoint.api_key, endpoint.headers)
        try:
            async with (
                asyncio.timeout(self._purpose.timeout_s) as limit,
                # A redirect could carry the key and the prompt to somewhere else.
                self._client.post(
                    url, data=self._body, headers=headers, proxy=proxy, allow_redirects=False
                ) as response,
            ):
                if response.status != 200:
                    for answer in answers:
                        answer.free = True
                    content = await read_body(response)
                    unknown = _UNKNOWN_MODEL.search(content[:1000]) is not None
                    self._unknown_model = unknown and response.status == HTTPStatus.NOT_FOUND
                    # vLLM also says 404 of a model that it does not serve.
                    if self.optional and response.status in _NO_ROUTE and not unknown:
                        raise NoRouteError("upstream_error", f"HTTP {response.status}")
                    raise_status(response, content, self._secrets)
                answers[0].limit = limit
                return await self._read(response, answers)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _typed(error, answers[0], self._purpose.timeout_s) from error
        except CallError:
            raise
        except Exception as error:  # whatever an endpoint sends: the attempt ends, with its entry and its place back
            logger.warning("a response of %s cannot be read", endpoint.base_url, exc_info=True)
            reason = f"the response cannot be read ({type(error).__name__})"
            raise CallError("invalid_response", reason) from error

    async def _read(self, response: aiohttp.ClientResponse, answers: list[PartialAnswer]) -> list[CallError | None]:
        """Reads a response with status 200 into the answers; returns why single conversations got none."""
        if self._batch:
            weights = [prompt_tokens(messages) for messages in self._conversations]
            return read_batch(await read_body(response), answers, weights, self._secrets)
        if self._emit is None:
            read_complete(await read_body(response), answers[0], self._secrets)
        else:
            await self._read_stream(response, answers[0])
        return [None]

    async def _read_stream(self, response: aiohttp.ClientResponse, answer: PartialAnswer) -> None:
        any_event = False
        async for event in stream_events(response):
            any_event = True
            await self._pass_on(*read_chunk(event, answer, self._secrets), answer)
        if not any_event:
            raise CallError("invalid_response", "the answer is not an event stream")
        if answer.finish_reason is None:
            raise CallError("upstream_error", "the stream broke off before its end", transient=True)
        await self._pass_on(*answer.splitter.end(cut=answer.finish_reason == "length"), answer)
        if answer.splitter.opened:
            # The beginning was thought, though it was streamed before that could be known.
            answer.text = answer.splitter.said
        check_answered(answer)

    async def _pass_on(self, text: str, thought: str, answer: PartialAnswer) -> None:
        """Notes a piece of a stream and emits it."""
        answer.thoughts += thought
        if text or (thought and self._think is not None):
            if self._emitting is None:
                self._emitting = answer
            elif self._emitting is not answer:
                raise CallError("cancelled_hedge", "another attempt at the same call answered first")
        answer.text += text
        # The time that the client takes to read is not the endpoint's.
        with answer.held():
            if thought and self._think is not None:
                await self._think(thought)
            if text:
                await self._emit(text)  # type: ignore[misc] # only called if there is an `_emit`

    def _enter(
        self,
        answers: list[PartialAnswer],
        failures: Sequence[CallError | None],
        number: int,
        started_ms: float,
        opened: Spend,
    ) -> list[Call]:
        """Notes the attempt in the ledger, with a line for each conversation."""
        lines = []
        for messages, answer, failure in zip(self._conversations, answers, failures, strict=True):
            line = self._line(messages, answer, failure, number, started_ms)
            self.ledger.enter(line, opened)
            opened = NOTHING
            lines.append(line)
        return lines

    def _line(
        self,
        messages: Sequence[Message],
        answer: PartialAnswer,
        failure: CallError | None,
        number: int,
        started_ms: float,
    ) -> Call:
        """Returns a ledger entry of the attempt."""
        purpose, usage, estimated = self._purpose, answer.usage, False
        if usage is None:
            usage, estimated = self._estimate(messages, answer)
        return Call(
            stage=purpose.stage,
            member=purpose.member,
            model=self._endpoint.model,
            revision=self._endpoint.revision,
            candidate=purpose.candidate,
            attempt=number,
            outcome=failure.kind if failure else "ok",
            error=str(failure) if failure else None,
            text=answer.text or (None if failure else ""),
            thoughts=answer.thoughts or None,
            tool_calls=answer.tool_calls,
            usage=usage,
            estimated=estimated,
            cost=purpose.price.cost(usage.prompt_tokens, usage.completion_tokens),
            started_ms=started_ms,
            duration_ms=self.ledger.elapsed_ms() - started_ms,
        )

    def _estimate(self, messages: Sequence[Message], answer: PartialAnswer) -> tuple[Usage, bool]:
        """Returns the tokens of an attempt whose endpoint reported none, and whether they are an estimate.

        An endpoint that was not reached, or that refused by its HTTP status, used none; any other read the prompt.
        """
        if not answer.sent or (answer.free and not answer.text):
            return Usage(), False
        thoughts = tokens(answer.thoughts)
        return Usage(
            prompt_tokens=prompt_tokens(messages, self._parameters),
            completion_tokens=tokens(answer.text) + thoughts,
            reasoning_tokens=thoughts,
        ), True


class _Forwarded(_PendingCall):
    """A request passed on as it is.

    Attributes:
        response: The endpoint's response, once there is one.
        check: Raises for a response that is not usable.
    """

    check: Callable[[dict[str, Any]], object] | None = None

    def __init__(self, *arguments: Any, forwarded: Mapping[str, Any], **keywords: Any) -> None:
        self._forwarded = forwarded
        self.response: dict[str, Any] = {}
        super().__init__(*arguments, **keywords)

    def _write(self) -> bytes:
        return orjson.dumps({**self._forwarded, "model": self._endpoint.model})

    def _relearn(self, failure: CallError) -> bool:
        return False

    async def _read(self, response: aiohttp.ClientResponse, answers: list[PartialAnswer]) -> list[CallError | None]:
        self.response = read_other(await read_body(response), answers[0], self._secrets)
        if self.check is not None:
            self.check(self.response)
        return [None]


async def _hedged(pending: _PendingCall, after_s: float) -> list[Reply | CallError]:
    """Makes a call, and a second one beside it if no text has come after `after_s`; the first to answer counts."""
    running = attempts = {asyncio.ensure_future(pending.until_answered())}
    reason: FailureKind = "cancelled_hedge"
    failure: CallError | None = None
    try:
        done, _ = await asyncio.wait(running, timeout=after_s)
        if not done and not pending.begun and pending.ledger.affords(pending.estimate):
            running = attempts = {*running, asyncio.ensure_future(pending.attempt())}
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
        for task in attempts:
            if not task.cancelled():
                task.exception()  # of one that failed as the other answered, nobody else asks


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
def _address(
    base_url: str, path: str, api_key: str | None, more: tuple[tuple[str, str], ...]
) -> tuple[URL, CIMultiDict[str], str | None]:
    """Returns (the URL of an endpoint's completions, the headers, the proxy); cached for each endpoint."""
    headers = CIMultiDict({"content-type": "application/json"})
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    headers.update(more)
    return URL(f"{base_url.rstrip('/')}{path}"), headers, _proxy(base_url)


def _proxy(url: str) -> str | None:
    """Returns the proxy that the environment names for a URL; loopback addresses never get one."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in ("127.0.0.1", "localhost", "::1") or proxy_bypass(host):
        return None
    proxies = getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")
