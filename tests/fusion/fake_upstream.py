"""The one fake upstream: a real HTTP server on loopback that speaks OpenAI's chat completions as told.

Each model answers by its `Script`. What was asked and which connections were closed on it is recorded, and
tests wait for that by event, never by time.
"""

import asyncio
import json
import math
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mixfuse.app.workers import tcp_socket

COMPARISON = re.compile(
    r"\[A (?P<nonce>\w+)\]\n(?P<first>.*)\n\[B (?P=nonce)\]\n(?P<second>.*)\n\[end (?P=nonce)\]",
    re.DOTALL,
)


@dataclass
class Script:
    """How a model behaves.

    Attributes:
        text: What it answers; a list is used up answer by answer, its last one for ever.
        reply: Question → what it answers, instead of `text`.
        status: Its HTTP status.
        body: Sent instead of a completion, as it is.
        hold: It answers only once this is set; a caller who leaves before is counted as aborted.
        verdict: For a judge: (first answer, second answer) → P(first is better).
        logprobs: For a judge: sent as the first token's alternatives instead of a verdict's.
        usage: (prompt, completion) tokens; None sends none.
        reasoning_tokens: How many of the completion's tokens it says are thoughts; None says nothing.
        break_after: Streaming breaks off after so many pieces, without an end.
        fail_after: It answers so many requests; after them it sends 500.
        hold_from: Only from this request on (the first is 1) it waits for `hold`.
        tool_calls: (name, arguments) of each tool it calls, if it is offered tools.
        refuses: A parameter it answers with a 400 that names it.
        no_logprobs: It ignores that log-probabilities are asked for.
        hold_after: Streaming waits for `hold` after so many pieces instead of before the first.
        headers: Sent with a status other than 200.
        refusal: The model refuses, in these words, instead of answering.
        finish: Why it ended, as it says.
        cut: The connection breaks in the middle of the response.
        thoughts: What it thinks before each answer, in the field that `thinks_in` names.
        thinks_in: `reasoning_content`, `reasoning`, `parts` (Mistral's), or a text with `{}` for the answer's place.
        events: What it streams instead of a completion, as JSON values.
        refuse: Request → the (status, error message) with which it is refused; None for one that is answered.
        reward: For a reward model: answer → its score, or anything else that is sent as the score.
        routes: For a reward model: the routes that the server has.
        faults: How its next requests go, one by one; None, and when they are used up: as the script itself says.
    """

    text: str | list[str] = "an answer"
    reply: Callable[[str], str] | None = None
    status: int = 200
    body: bytes | None = None
    hold: asyncio.Event | None = None
    verdict: Callable[[str, str], float] | None = None
    logprobs: dict[str, float] | None = None
    usage: tuple[int, int] | None = (10, 5)
    reasoning_tokens: Any = None
    break_after: int | None = None
    hold_after: int | None = None
    fail_after: int | None = None
    hold_from: int = 1
    tool_calls: list[tuple[str, str]] | None = None
    refuses: str | None = None
    no_logprobs: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    refusal: str | None = None
    finish: str = "stop"
    cut: bool = False
    thoughts: str | None = None
    thinks_in: str = "reasoning_content"
    events: list[Any] | None = None
    refuse: Callable[[dict[str, Any]], tuple[int, str] | None] | None = None
    reward: Callable[[str], Any] | None = None
    routes: tuple[str, ...] = ("classify", "pooling", "score")
    faults: "list[Script | None]" = field(default_factory=list)

    def next_text(self) -> str:
        if isinstance(self.text, str):
            return self.text
        return self.text.pop(0) if len(self.text) > 1 else self.text[0]


@dataclass
class Batches:
    """How an endpoint answers several conversations in one call.

    Attributes:
        status: Its HTTP status.
        left_out: The choices that it does not send.
        requests: What it was asked.
    """

    status: int = 200
    left_out: tuple[int, ...] = ()
    requests: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class FakeUpstream:
    """The server's address, its models and what it has seen."""

    base_url: str = ""
    models: dict[str, Script] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    batches: "Batches | None" = None
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def asked(self, model: str) -> list[dict[str, Any]]:
        return [request for request in self.requests if request["model"] == model]

    async def wait_asked(self, model: str, times: int = 1) -> None:
        await self._until(lambda: len(self.asked(model)) >= times)

    async def wait_aborted(self, model: str, times: int = 1) -> None:
        await self._until(lambda: self.aborted.count(model) >= times)

    async def _until(self, condition: Callable[[], bool]) -> None:
        # Generous: it ends a test that would otherwise hang; no test passes or fails by how long things take.
        async with asyncio.timeout(30), self._changed:
            await self._changed.wait_for(condition)

    async def _note(self, change: Callable[[], None]) -> None:
        async with self._changed:
            change()
            self._changed.notify_all()

    async def handle(self, request: Request) -> Response:
        payload = json.loads(await request.body())
        model = payload["model"]
        await self._note(lambda: (self.requests.append(payload), self.headers.append(dict(request.headers))))
        script = self.models[model]
        if script.faults:
            script = script.faults.pop(0) or script
        times = len(self.asked(model))
        holding = script.hold if script.hold_after is None and times >= script.hold_from else None
        if holding is not None and await self._left(request, model, holding):
            return Response()
        if script.fail_after is not None and times > script.fail_after:
            script = Script(status=500)
        if script.refuses in payload:
            script = Script(status=400, body=_error(f"Unsupported parameter: '{script.refuses}'"))
        if script.refuse is not None and (refusal := script.refuse(payload)) is not None:
            script = Script(status=refusal[0], body=_error(refusal[1]))
        if script.body is not None or script.status != 200:
            body = _error(f"status {script.status}") if script.body is None else script.body
            return Response(body, script.status, script.headers, media_type="application/json")
        if script.cut:
            return _Cut()
        if payload.get("stream") and script.events is not None:
            return _EventStream(_raw(script.events))
        if payload.get("stream"):
            return _EventStream(self._stream(request, payload, script))
        return JSONResponse(self._completion(payload, script))

    async def handle_batch(self, request: Request) -> Response:
        """vLLM's `/chat/completions/batch`: a choice for each conversation, and the usage of all together."""
        payload = json.loads(await request.body())
        batches = self.batches
        if batches is None or batches.status != 200:
            status = 404 if batches is None else batches.status
            await self._note(lambda: batches is None or batches.requests.append(payload))
            return JSONResponse({"detail": "Not Found"}, status)
        await self._note(lambda: batches.requests.append(payload))
        script, model = self.models[payload["model"]], payload["model"]
        if script.hold is not None and await self._left(request, model, script.hold):
            return Response()
        if script.refuse is not None and (refusal := script.refuse(payload)) is not None:
            return Response(_error(refusal[1]), refusal[0], media_type="application/json")
        wholes = [self._completion({**payload, "messages": messages}, script) for messages in payload["messages"]]
        choices = [{**whole["choices"][0], "index": place} for place, whole in enumerate(wholes)]
        prompt, completion = script.usage or (0, 0)
        usage = {"prompt_tokens": prompt * len(wholes) + 1, "completion_tokens": completion * len(wholes)}
        kept = [choice for choice in choices if choice["index"] not in batches.left_out]
        return JSONResponse({**wholes[0], "choices": kept[::-1], "usage": usage})

    async def handle_reward(self, request: Request) -> Response:
        """vLLM's `/classify`, `/pooling` and `/score`, as a model with one output answers them."""
        payload = json.loads(await request.body())
        script, route = self.models[payload["model"]], request.url.path.strip("/")
        if script.reward is None or route not in script.routes:
            return JSONResponse({"detail": "Not Found"}, 404)
        await self._note(
            lambda: (self.requests.append({**payload, "route": route}), self.headers.append(dict(request.headers)))
        )
        if script.status != 200:
            return Response(_error(f"status {script.status}"), script.status, media_type="application/json")
        if script.body is not None:
            return Response(script.body, media_type="application/json")
        score = script.reward(payload["text_2"] if route == "score" else payload["messages"][-1]["content"])
        row = {"classify": {"probs": [score], "num_classes": 1, "label": None}, "pooling": {"data": [score]}}
        data = [{"index": 0, **row.get(route, {"score": score})}]
        usage = script.usage and {"prompt_tokens": script.usage[0], "total_tokens": script.usage[0]}
        # As a server that computes NaN writes it, which is no JSON.
        return Response(
            json.dumps({"object": "list", "model": payload["model"], "data": data, "usage": usage}),
            media_type="application/json",
        )

    async def handle_other(self, request: Request) -> Response:
        """Completions and embeddings: as many as there are inputs."""
        payload = json.loads(await request.body())
        await self._note(lambda: (self.requests.append(payload), self.headers.append(dict(request.headers))))
        script = self.models[payload["model"]]
        if script.status != 200:
            return Response(_error(f"status {script.status}"), script.status, media_type="application/json")
        given = payload.get("prompt", payload.get("input"))
        count = len(given) if isinstance(given, list) and not isinstance(given[0], int) else 1
        usage = script.usage and {"prompt_tokens": script.usage[0], "total_tokens": sum(script.usage)}
        body: dict[str, Any] = {"object": "list", "model": payload["model"], **({"usage": usage} if usage else {})}
        if "prompt" in payload:
            choices = [{"index": n, "text": script.next_text(), "finish_reason": "stop"} for n in range(count)]
            if usage:
                body["usage"] = {**usage, "completion_tokens": (script.usage or (0, 0))[1]}
            return JSONResponse({**body, "id": "fake", "object": "text_completion", "created": 0, "choices": choices})
        data = [{"object": "embedding", "index": n, "embedding": [0.5, -0.25]} for n in range(count)]
        return JSONResponse({**body, "data": data})

    async def _left(self, request: Request, model: str, hold: asyncio.Event) -> bool:
        """Waits until `hold` is set or the caller has gone; whether it has gone."""
        released = asyncio.ensure_future(hold.wait())
        gone = asyncio.ensure_future(_disconnected(request))
        await asyncio.wait({released, gone}, return_when=asyncio.FIRST_COMPLETED)
        left = gone.done()
        for task in (released, gone):
            task.cancel()
        await asyncio.wait({released, gone})
        if left:
            await self._note(lambda: self.aborted.append(model))
        return left

    def _completion(self, payload: dict[str, Any], script: Script) -> dict[str, Any]:
        text = script.reply(payload["messages"][-1]["content"]) if script.reply else script.next_text()
        logprobs = None
        if script.thoughts is not None and script.verdict and COMPARISON.search(payload["messages"][-1]["content"]):
            text = next(iter(_verdict(payload, script)))
        calls = script.tool_calls if payload.get("tools") else None
        if (payload.get("response_format") or {}).get("json_schema", {}).get("name") == "verdict" and script.verdict:
            text = json.dumps({"verdict": next(iter(_verdict(payload, script)))})
        if payload.get("logprobs") and not script.no_logprobs:
            alternatives = script.logprobs if script.logprobs is not None else _verdict(payload, script)
            top = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in alternatives.items()]
            if top:
                text = top[0]["token"]
                logprobs = {"content": [{**top[0], "top_logprobs": top}]}
        message: dict[str, Any] = {"content": None, "tool_calls": _tool_calls(calls)} if calls else {"content": text}
        if script.refusal is not None:
            message = {"content": None, "refusal": script.refusal}
        finish = "tool_calls" if calls else script.finish
        if script.thoughts is not None:
            message |= _thinking(script, message["content"])
            if payload.get("max_tokens", payload.get("max_completion_tokens", 1 << 20)) < 100:  # cut while it thinks
                message |= _thinking(script, "") if "{}" in script.thinks_in else {"content": None}
                finish, logprobs = "length", None
        usage: dict[str, Any] | None = script.usage and dict(
            zip(("prompt_tokens", "completion_tokens"), script.usage, strict=True)
        )
        if usage and script.reasoning_tokens is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": script.reasoning_tokens}
        return {
            "id": "fake",
            "object": "chat.completion",
            "created": 0,
            "model": payload["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", **message},
                    "logprobs": logprobs,
                    "finish_reason": finish,
                }
            ],
            **({"usage": {**usage, "total_tokens": sum(script.usage or ())}} if usage else {}),
        }

    async def _stream(self, request: Request, payload: dict[str, Any], script: Script) -> AsyncIterator[bytes]:
        whole = self._completion(payload, script)
        head = {"id": "fake", "object": "chat.completion.chunk", "created": 0, "model": payload["model"]}

        def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
            chunk = {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
            return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()

        yield event({"role": "assistant", "content": ""})
        message = whole["choices"][0]["message"]
        if script.refusal is not None:
            yield event({"refusal": script.refusal})
        for field_name in ("reasoning_content", "reasoning"):
            for piece in re.findall(r"\S+\s*|\s+", message.get(field_name, "")):
                yield event({field_name: piece})
        if isinstance(message["content"], list):  # as Mistral streams: each part a list of its own
            *parts, last = message["content"]
            for part in parts:
                yield event({"content": [part]})
            message["content"] = last["text"]
        for place, tool in enumerate(message.get("tool_calls", ())):
            arguments = tool["function"]["arguments"]
            begun = {**tool, "index": place, "function": {"name": tool["function"]["name"], "arguments": ""}}
            yield event({"tool_calls": [begun]})
            for piece in (arguments[:3], arguments[3:]):
                yield event({"tool_calls": [{"index": place, "function": {"arguments": piece}}]})
        for count, piece in enumerate(re.findall(r"\S+\s*|\s+", message["content"] or "")):
            if count == script.break_after:
                return
            if count == script.hold_after and script.hold and await self._left(request, payload["model"], script.hold):
                return
            yield event({"content": piece})
        yield event({}, whole["choices"][0]["finish_reason"])
        if payload.get("stream_options", {}).get("include_usage") and "usage" in whole:
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': whole['usage']})}\n\n".encode()
        yield b"data: [DONE]\n\n"


def _thinking(script: Script, answer: str | None) -> dict[str, Any]:
    """The fields of a message that a reasoning model's answer has."""
    if script.thinks_in == "parts":
        thinking = {"type": "thinking", "thinking": [{"type": "text", "text": script.thoughts}]}
        return {"content": [thinking, {"type": "text", "text": answer}]}
    if "{}" in script.thinks_in:
        return {"content": script.thinks_in.replace("{}", answer or "")}
    return {script.thinks_in: script.thoughts}


async def _raw(events: list[Any]) -> AsyncIterator[bytes]:
    for event in events:
        yield f"data: {json.dumps(event)}\n\n".encode()
    yield b"data: [DONE]\n\n"


def _error(message: str) -> bytes:
    return json.dumps({"error": {"message": message, "code": None}}).encode()


def _tool_calls(calls: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {"id": f"call_{place}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for place, (name, arguments) in enumerate(calls)
    ]


def _verdict(payload: dict[str, Any], script: Script) -> dict[str, float]:
    found = COMPARISON.search(payload["messages"][-1]["content"])
    if script.verdict is None or found is None:
        return {}
    p = min(max(script.verdict(found["first"], found["second"]), 1e-6), 1 - 1e-6)
    return {"A": math.log(p), "B": math.log(1 - p)} if p >= 0.5 else {"B": math.log(1 - p), "A": math.log(p)}


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(Response):
    """Leaves watching for the caller's disconnect to the stream, as Starlette's own would not."""

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class _Cut(Response):
    """Promises more than it sends; uvicorn then closes the connection."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"choices": ['})


class _Server(uvicorn.Server):
    """Starts and stops at once: uvicorn's own loop looks only ten times a second whether it shall end."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up, self.stop = asyncio.Event(), asyncio.Event()

    def capture_signals(self) -> Any:
        return nullcontext()  # the signals are pytest's

    async def main_loop(self) -> None:
        await self.on_tick(0)
        self.up.set()
        await self.stop.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        async with asyncio.timeout(60):
            while self.server_state.connections:
                for connection in list(self.server_state.connections):
                    connection.shutdown()
                await asyncio.sleep(0.001)
        await self.lifespan.shutdown()


@asynccontextmanager
async def serving(app: Starlette) -> AsyncIterator[str]:
    """Runs an app over real HTTP on a free loopback port; yields its URL."""
    listener = tcp_socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(100)
    limited = getattr(app.state, "connections", None)  # a gateway's own
    http = limited.protocol if limited is not None else "auto"
    server = _Server(uvicorn.Config(app, log_level="warning", ws="none", http=http))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        up = asyncio.create_task(server.up.wait())
        await asyncio.wait({up, running}, return_when=asyncio.FIRST_COMPLETED)
        assert up.done(), "the server did not start"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.stop.set()
        await running
        listener.close()


@asynccontextmanager
async def fake_upstream(**models: Script) -> AsyncIterator[FakeUpstream]:
    """Runs the fake upstream with these models."""
    fake = FakeUpstream(models=dict(models))
    routes = [Route("/v1/chat/completions", fake.handle, methods=["POST"])]
    routes += [Route(f"/v1/{name}", fake.handle_other, methods=["POST"]) for name in ("completions", "embeddings")]
    routes += [Route("/v1/chat/completions/batch", fake.handle_batch, methods=["POST"])]
    routes += [Route(f"/{name}", fake.handle_reward, methods=["POST"]) for name in ("classify", "pooling", "score")]
    app = Starlette(routes=routes)
    async with serving(app) as url:
        fake.base_url = f"{url}/v1"
        yield fake
