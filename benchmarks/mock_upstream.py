"""The models behind the gateway, for benchmarks: one OpenAI-compatible server with members, a judge and a synthesizer.

It does as `POST /control` says: latency, failures and hangs by model, chunks of a stream, random faults at given
rates. `GET /stats` says what was called and which calls were aborted, `GET /calls` lists them one by one.
Says where it listens and runs until it is ended.

    python benchmarks/mock_upstream.py [--port N] [--answers FILE]

With `--answers` it replays recorded answers: each line of the file has a `tag` and `texts` by model, and a prompt names
its tag. Such an answer is one completion token.
"""

import argparse
import asyncio
import itertools
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any

import uvloop
from aiohttp import web
from hostile import REPLIES

ANSWER = "The capital of France is Paris; it has been so, with a few interruptions, for about a thousand years."
POOL = ("m0", "m1", "m2")
COMPARISON = re.compile(r"\[A (?P<n>\w+)\]\n(?P<first>.*)\n\[B (?P=n)\]\n(?P<second>.*)\n\[end (?P=n)\]", re.DOTALL)
TAG = re.compile(r"request-\d+")
"""A word in a prompt that says which request a call belongs to: members, judge and synthesizer all see it."""


@dataclass
class Control:
    """How the models behave.

    Attributes:
        latency: Seconds until a model answers, by name; "*" is for all others.
        fail: HTTP status by model.
        hang: Models that never answer.
        chunks: Into how many chunks a streamed answer is cut.
        chunk_delay: Seconds between them.
        faults: Kind of fault → share of the calls that it befalls, at random; see `Mock.fault`.
        seed: Of the random faults.
        jitter: Random extra latency up to so many seconds.
    """

    latency: dict[str, float] = field(default_factory=dict)
    fail: dict[str, int] = field(default_factory=dict)
    hang: list[str] = field(default_factory=list)
    chunks: int = 20
    chunk_delay: float = 0.0
    faults: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    jitter: float = 0.0


@dataclass(slots=True)
class Seen:
    """One call as the mock saw it.

    Attributes:
        tag: The request it belongs to, from its prompt.
        model: Whom it asked.
        fault: What was done to it, if anything.
        end: "open", "answered", "failed" (as told) or "aborted" (the caller went away).
        usage: (prompt, completion) tokens that were sent back.
    """

    tag: str
    model: str
    fault: str | None = None
    end: str = "open"
    usage: tuple[int, int] | None = None


class Mock:
    """The handlers and what they have seen."""

    def __init__(self, answers: dict[str, dict[str, str]]) -> None:
        self.control, self._answers = Control(), answers
        self.calls: list[Seen] = []
        self._chance = random.Random(0)
        self._log = False
        self._turns = itertools.cycle(POOL)
        self._replies = itertools.cycle(REPLIES)

    async def set(self, request: web.Request) -> web.Response:
        """`POST /control`: replaces the behaviour and forgets what was seen; `log` keeps tags for `GET /calls`."""
        body = await request.json()
        self._log = body.pop("log", False)
        self.control = Control(**body)
        self._chance = random.Random(self.control.seed)
        self.calls = []
        return web.json_response(asdict(self.control))

    async def stats(self, _request: web.Request) -> web.Response:
        """`GET /stats`: how many calls, by model and by end."""
        ends = {end: Counter(c.model for c in self.calls if c.end == end) for end in {c.end for c in self.calls}}
        return web.json_response({"calls": Counter(call.model for call in self.calls), **ends})

    async def list(self, _request: web.Request) -> web.Response:
        """`GET /calls`: every call since `POST /control`."""
        return web.json_response([asdict(call) for call in self.calls])

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/chat/completions`."""
        body = await request.json()
        text = "\n".join(_text(message.get("content")) for message in body["messages"])
        tag = TAG.search(text) if self._log or self._answers else None
        seen = Seen(tag.group() if tag else "", self._model(body, text), self.fault())
        self.calls.append(seen)
        try:
            answer = await self._answer(request, body, text, seen)
        except (asyncio.CancelledError, ConnectionResetError):
            if seen.end == "open":
                seen.end = "aborted"
            raise
        if seen.end == "open":
            seen.end = "answered"
        return answer

    async def batch(self, request: web.Request) -> web.Response:
        """`POST /v1/chat/completions/batch`: as vLLM answers many chats in one call, for the model `batching-judge`."""
        body = await request.json()
        if body["model"] != "batching-judge":
            return web.json_response({"detail": "Not Found"}, status=404)
        texts = ["\n".join(_text(message.get("content")) for message in messages) for messages in body["messages"]]
        self.calls.append(Seen("", body["model"], end="answered"))
        wait = self.control.latency.get("judge", self.control.latency.get("*", 0.0))
        if wait:
            await asyncio.sleep(wait)
        choices = []
        for index, text in enumerate(texts):
            message, logprobs = _reply(body, text, "judge")
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": "stop"})
        prompt = sum(max(1, len(text) // 4) for text in texts)
        usage = {"prompt_tokens": prompt, "completion_tokens": len(texts), "total_tokens": prompt + len(texts)}
        head = {"id": "chatcmpl-mock", "object": "chat.completion", "created": 1700000000, "model": body["model"]}
        return web.json_response({**head, "choices": choices, "usage": usage})

    def fault(self) -> str | None:
        """Draws what befalls the next call: a kind of `faults`, or nothing; of `reply` each kind of reply in turn."""
        left = self._chance.random()
        for kind, share in self.control.faults.items():
            left -= share
            if left < 0:
                return f"reply:{next(self._replies)}" if kind == "reply" else kind
        return None

    def _model(self, body: dict[str, Any], text: str) -> str:
        """Whom a call is for. Peers that know one model only ask `pool`: the members in turn, or their judge."""
        if body["model"] != "pool":
            return str(body["model"])
        if any(sign in text for sign in ("Rate the above response", "optimized response", "critique each response")):
            return "judge"
        if int(body.get("n") or 1) > 1:  # several answers in one call: it fares as the worst of the members
            control = self.control

            def badness(member: str) -> tuple[bool, bool, float]:
                late = control.latency.get(member, control.latency.get("*", 0.0))
                return member in control.hang, member in control.fail, late

            return max(POOL, key=badness)
        return next(self._turns)

    async def _answer(self, request: web.Request, body: dict[str, Any], text: str, seen: Seen) -> web.StreamResponse:
        control, model = self.control, seen.model
        wait = control.latency.get(model, control.latency.get("*", 0.0)) + control.jitter * self._chance.random()
        if wait:
            await asyncio.sleep(wait)
        if model in control.hang or seen.fault == "hang":
            seen.fault = "hang"
            await asyncio.sleep(3600)
        if status := control.fail.get(model):
            return _fails(seen, status, "server_error")
        if seen.fault in ("500", "503", "429"):
            return _fails(seen, int(seen.fault), "server_error")
        if seen.fault == "context":
            return _fails(seen, 400, "context_length_exceeded")
        if seen.fault == "garbage":
            seen.end = "failed"
            return web.Response(body=b"<html>not JSON</html>", content_type="application/json")
        if seen.fault == "reset":
            return _cut(request, seen)
        if seen.fault is not None and (reply := REPLIES.get(seen.fault.removeprefix("reply:"))) is not None:
            seen.end = "failed"
            return web.Response(
                body=reply.body, status=reply.status, headers=reply.headers | {"content-type": reply.content_type}
            )
        count = int(body.get("n") or 1)
        message, logprobs = _reply(body, text, model)
        completion = 1 if logprobs else max(1, len(str(message["content"]).split()))
        if (recorded := self._answers.get(seen.tag, {}).get(model)) is not None:
            message, completion = {"role": "assistant", "content": recorded}, 1
        seen.usage = (max(1, len(text) // 4), completion * count)
        usage = {
            "prompt_tokens": seen.usage[0],
            "completion_tokens": seen.usage[1],
            "total_tokens": sum(seen.usage),
        }
        head = {"id": "chatcmpl-mock", "created": 1700000000, "model": body["model"]}
        finish = "tool_calls" if message.get("tool_calls") else "stop"
        if not body.get("stream"):
            choices = [
                {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}
                for index in range(count)
            ]
            whole = json.dumps({**head, "object": "chat.completion", "choices": choices, "usage": usage}).encode()
            if seen.fault == "break":  # half a body, then nothing
                half = web.StreamResponse(
                    headers={"content-type": "application/json", "content-length": str(len(whole))}
                )
                await half.prepare(request)
                await half.write(whole[: len(whole) // 2])
                return _cut(request, seen)
            return web.Response(body=whole, content_type="application/json")
        head["object"] = "chat.completion.chunk"
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        wanted = (body.get("stream_options") or {}).get("include_usage", False)
        async for sent, event in self._events(head, message, finish, usage if wanted else None):
            if seen.fault == "break" and sent == control.chunks // 2:
                return _cut(request, seen)
            await response.write(b"data: " + event + b"\n\n")
        if not wanted:
            seen.usage = None
        seen.end = "answered"  # the caller may close before the last bytes are acknowledged
        await response.write_eof()
        return response

    async def _events(
        self, head: dict[str, Any], message: dict[str, Any], finish: str, usage: dict[str, int] | None
    ) -> AsyncIterator[tuple[int, bytes]]:
        def chunk(choices: list[dict[str, Any]], **extra: Any) -> bytes:
            return json.dumps({**head, "choices": choices, **extra}).encode()

        if message.get("tool_calls"):
            calls = [{"index": index, **call} for index, call in enumerate(message["tool_calls"])]
            yield 0, chunk([{"index": 0, "delta": {"role": "assistant", "tool_calls": calls}, "finish_reason": None}])
        else:
            content = message["content"]
            step = max(1, math.ceil(len(content) / max(1, self.control.chunks)))
            for sent, start in enumerate(range(0, len(content), step)):
                if sent and self.control.chunk_delay:
                    await asyncio.sleep(self.control.chunk_delay)
                role = {} if sent else {"role": "assistant"}
                delta = {**role, "content": content[start : start + step]}
                yield sent, chunk([{"index": 0, "delta": delta, "finish_reason": None}])
        yield -1, chunk([{"index": 0, "delta": {}, "finish_reason": finish}])
        if usage:
            yield -1, chunk([], usage=usage)
        yield -1, b"[DONE]"


def _reply(body: dict[str, Any], text: str, model: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(message, logprobs) of a model that is well."""
    content = ANSWER if "all agree" in text else f"[{model}] {ANSWER}"
    if "a long answer" in text:
        content *= 20_000
    if model == "judge" and body.get("logprobs"):
        found = COMPARISON.search(text)
        # Prefers one answer to the other wherever they stand, so that verdicts are consistent.
        p = 0.8 if found is None or found["first"] >= found["second"] else 0.2
        alternatives = sorted([("A", math.log(p)), ("B", math.log(1 - p))], key=lambda pair: -pair[1])
        top = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in alternatives]
        return {"role": "assistant", "content": top[0]["token"]}, {"content": [{**top[0], "top_logprobs": top}]}
    if model == "judge":
        content = _peer_verdict(body, text)
    schema = (body.get("response_format") or {}).get("json_schema", {}).get("schema")
    if schema is not None:
        content = json.dumps(_instance(schema))
    return {"role": "assistant", "content": content}, None


def _peer_verdict(body: dict[str, Any], text: str) -> str:
    """What the judges of other gateways are expected to say, in each one's form."""
    if "Rate the above response" in text:  # optillm's best of n reads a number
        return "7"
    if "answer_choice" in text or (body.get("response_format") or {}).get("type") == "json_object":  # TensorZero's
        return '{"thinking": "", "answer_choice": 0}'
    return f"The best of the answers: {ANSWER}"


def _instance(schema: dict[str, Any]) -> Any:
    """A small valid instance of a plain JSON schema."""
    if "const" in schema or schema.get("enum"):
        return schema.get("const", (schema.get("enum") or [None])[0])
    kind = schema.get("type")
    if kind == "object":
        return {key: _instance(value) for key, value in schema.get("properties", {}).items()}
    return {"array": [], "integer": 0, "number": 0, "boolean": True, "null": None}.get(str(kind), "mock")


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _fails(seen: Seen, status: int, code: str) -> web.Response:
    seen.end = "failed"
    headers = {"retry-after": "0"} if status == 429 else {}
    error = {"message": f"told to fail: {code}", "type": "mock", "code": code}
    return web.json_response({"error": error}, status=status, headers=headers)


def _cut(request: web.Request, seen: Seen) -> web.StreamResponse:
    """Closes the connection in the caller's face."""
    seen.end, seen.usage = "failed", None
    if request.transport is not None:
        request.transport.abort()
    raise ConnectionResetError


async def serve(port: int, answers: str | None) -> None:
    """Serves until it is ended."""
    recorded: dict[str, dict[str, str]] = {}
    if answers is not None:
        with open(answers, encoding="utf-8") as lines:  # noqa: ASYNC230 - before anything is served
            recorded = {row["tag"]: row["texts"] for row in map(json.loads, lines)}
    mock = Mock(recorded)
    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/v1/chat/completions", mock.chat)
    app.router.add_post("/v1/chat/completions/batch", mock.batch)
    app.router.add_post("/control", mock.set)
    app.router.add_get("/stats", mock.stats)
    app.router.add_get("/calls", mock.list)
    # `handler_cancellation`: a caller who goes away is noticed, and counted as an aborted call.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=4096)
    await site.start()
    print(f"ready: http://127.0.0.1:{runner.addresses[0][1]}/v1", file=sys.stderr, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--answers")
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.answers))
