"""Ask: a question to the pool, the members' answers as they come, and how one answer was made of them."""

import asyncio
from collections.abc import Sequence
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import text_of
from mixfuse.contracts.mode_names import MODEL_PREFIX
from mixfuse.contracts.trace import Call, Trace
from mixfuse.fusion.http.statuses import RequestError
from mixfuse.fusion.ui.frame import Page, Visit, number_of
from mixfuse.fusion.ui.requests_as_code import as_code
from mixfuse.fusion.ui.trace_view import view

_PATH = "/v1/chat/completions"
_OWN_NUMBERS = {"temperature": float, "max_tokens": int, "seed": int}
_FUSION_NUMBERS = {
    "samples": int, "min_responses": int, "max_rounds": int, "width": int, "target": float, "max_cost": float,
    "grace_ms": float, "deadline_ms": float,
}  # fmt: skip
_FUSION_WORDS = ("judge", "synthesizer", "prefer", "domain")
_FUSION_MARKS = ("cite", "analysis", "cache")
_ROLES = ("user", "assistant", "system")


async def show(visit: Visit) -> Response:
    """Shows the form; with `trace` filled with that trace's request, and its result below."""
    visit.known()
    trace_id = visit.request.query_params.get("trace")
    trace = await visit.trace(trace_id) if trace_id else None
    models = visit.inside.models()
    config = visit.inside.config
    alone = [name for name in models if not name.startswith(MODEL_PREFIX) and name not in config.presets]
    return await visit.page(
        "ask.html.jinja",
        trace=trace,
        view=view(trace, config) if trace is not None else None,
        given=_given(trace, visit),
        without_key=visit.inside.keys.needed and visit.by_admin_key,
        models=models,
        members=[member.name for member in config.members],
        judges=alone,
        numbers=(*_OWN_NUMBERS, *_FUSION_NUMBERS),
        marks=_FUSION_MARKS,
    )


def _given(trace: Trace | None, visit: Visit) -> dict[str, Any]:
    """Returns what the form begins with: a trace's request, as far as the trace tells it."""
    models = visit.inside.models()
    model = trace.model if trace is not None and trace.model in models else models[0]
    given: dict[str, Any] = {"model": model, "system": "", "turns": [], "question": "", "members": [], "judge": ""}
    given |= {"synthesizer": "", "numbers": {}}
    if trace is None:
        return given
    messages = [(str(turn.get("role")), text_of(turn.get("content"))) for turn in trace.messages]
    if messages and messages[0][0] == "system":
        given["system"] = messages.pop(0)[1]
    if messages and messages[-1][0] == "user":
        given["question"] = messages.pop()[1]
    given["turns"] = [(role, said) for role, said in messages if role in _ROLES]
    asked, pool = list(dict.fromkeys(trace.candidates)), [member.name for member in visit.inside.config.members]
    given["members"] = asked if asked != pool and set(asked) <= set(pool) else []
    given["numbers"] = {name: trace.parameters[name] for name in _OWN_NUMBERS if name in trace.parameters}
    if trace.weighing is not None and trace.weighing.target is not None:
        given["numbers"]["target"] = trace.weighing.target
    return given


def _body(fields: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Returns the request that a form stands for.

    Raises:
        RequestError: A number is none, or there is no question.
    """
    single = dict(fields)
    messages: list[dict[str, Any]] = []
    if single.get("system", "").strip():
        messages.append({"role": "system", "content": single["system"]})
    roles = [value for name, value in fields if name == "turn_role"]
    said = [value for name, value in fields if name == "turn_text"]
    messages += [{"role": role, "content": text} for role, text in zip(roles, said, strict=False) if text.strip()]
    pictures = [value for name, value in fields if name == "image"]
    if not single.get("question", "").strip() and not pictures:
        raise RequestError("write a question", code="missing_parameter", param="question")
    content: Any = single.get("question", "")
    if pictures:
        content = [{"type": "text", "text": content}]
        content += [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
    messages.append({"role": "user", "content": content})
    body: dict[str, Any] = {"model": single.get("model", ""), "messages": messages}
    body |= {name: number_of(single[name], name, kind) for name, kind in _OWN_NUMBERS.items() if single.get(name)}
    fusion: dict[str, Any] = {}
    if members := [value for name, value in fields if name == "member"]:
        fusion["members"] = members
    fusion |= {name: single[name] for name in _FUSION_WORDS if single.get(name)}
    fusion |= {name: number_of(single[name], name, kind) for name, kind in _FUSION_NUMBERS.items() if single.get(name)}
    fusion |= {name: True for name in _FUSION_MARKS if single.get(name)}
    return body | ({"fusion": fusion} if fusion else {})


async def ask(visit: Visit) -> Response:
    """Asks, and shows the trace when it is answered: for browsers without JavaScript."""
    answer = await visit.call("POST", _PATH, _body(await visit.fields()))
    return visit.to(f"/ask?trace={_trace_id(answer)}")


async def stream(visit: Visit) -> Response:
    """Asks, and sends what happens as it happens, as server-sent events."""
    return _Stream(visit, _body(await visit.fields()))


class _Stream(Response):
    """The events of a request under way.

    The gateway's own chunks are passed on as they are. Between them come `call`, for each call that has ended; then
    `error` if the request failed, or `code`: the request as code, and its trace.
    """

    def __init__(self, visit: Visit, body: dict[str, Any]) -> None:
        self.background = None
        self._visit, self._body = visit, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them; called by Starlette."""
        visit, waiting = self._visit, asyncio.Queue[bytes]()
        status, failed = 200, bytearray()
        first: dict[str, Any] = {}

        async def take(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif status != 200:
                failed.extend(message.get("body", b""))
            elif body := message.get("body", b""):
                if not first and body.startswith(b"data: {"):
                    first.update(orjson.loads(body[len(b"data: ") :]))
                waiting.put_nowait(body)

        def watch(call: Call) -> None:
            kept = call.model_dump(include=_TOLD) | {"text": call.text[:_MOST_CHARS] if call.text else call.text}
            waiting.put_nowait(_event("call", kept))

        async def write() -> None:
            while chunk := await waiting.get():
                # An answer that is known already comes in thousands of pieces: what waits is sent together.
                pieces = [chunk]
                while not waiting.empty() and pieces[-1]:
                    pieces.append(waiting.get_nowait())
                await send({"type": "http.response.body", "body": b"".join(pieces), "more_body": True})
                if not pieces[-1]:
                    return

        try:
            visit.owner()
            told = watch
        except MixfuseError:  # to this visitor the members' answers are not shown
            told = None
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        writing = asyncio.create_task(write())
        try:
            await visit.forward("POST", _PATH, {**self._body, "stream": True}, take, told)
            if status != 200:
                waiting.put_nowait(_event("error", _said(bytes(failed))))
            else:
                address = str(visit.request.base_url).rstrip("/")
                code = as_code(self._body, address, keyed=visit.inside.keys.needed)
                waiting.put_nowait(_event("code", {**code, "trace": _trace_id(first) if told is not None else None}))
        finally:
            waiting.put_nowait(b"")
            await writing
        await send({"type": "http.response.body", "body": b"", "more_body": False})


_TOLD = {"stage", "member", "candidate", "attempt", "outcome", "error", "usage", "cost", "started_ms", "duration_ms"}
_MOST_CHARS = 20_000


def _event(name: str, data: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(data))


def _said(body: bytes) -> dict[str, str]:
    """What the gateway's error object says."""
    try:
        return {"message": str(orjson.loads(body)["error"]["message"])}
    except (ValueError, KeyError, TypeError):
        return {"message": "the request failed"}


def _trace_id(answer: dict[str, Any]) -> str:
    return f"trace-{str(answer.get('id', '')).removeprefix('chatcmpl-')}"


PAGE = Page("Ask", order=10, gets={"": show}, posts={"": ask, "/stream": stream})
