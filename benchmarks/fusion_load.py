"""Mixed load with random faults: is every error explained, and does the ledger balance?

    nice python benchmarks/fusion_load.py [--minutes 10] [--json] [--smoke]

All modes and single members, whole and streamed, clients who leave, requests that must be refused, feedback; upstream
calls fail at random (500, 503, 429, too long a prompt, no JSON, a connection that is cut before or amid the answer, no
answer at all). Afterwards three records of the same minutes are compared: what the clients saw, what the traces say,
what the mock upstream saw. It exits with 1 unless

- every error a client met, and every failed call in a trace, is of a named type and follows from a fault that was
  injected into that very request, or (an open circuit, a full queue) into the model's calls before it;
- the usage a client was sent is the sum over its trace's calls;
- each call that the mock saw is in exactly one trace, and a call in a trace that the mock did not see was given up
  before it was sent;
- the tokens a trace states as exact are those that the mock sent.
"""

import argparse
import asyncio
import json
import random
import sqlite3
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import uvloop
from aiohttp import ClientError, ClientSession
from harness import BenchmarkError, Control, gateway, mock_upstream, note, open_session, rss_mib, table

FAULTS = {
    "500": 0.02,
    "503": 0.01,
    "429": 0.01,
    "context": 0.01,
    "garbage": 0.01,
    "reset": 0.01,
    "break": 0.02,
    "hang": 0.01,
}
# What a failed call may be called, by what was done to it.
EXPLAINS = {
    "upstream_error": {"500", "503", "reset", "break"},
    "rate_limited": {"429"},
    "context_length": {"context"},
    "invalid_response": {"garbage", "break"},
    "timeout": {"hang"},
}
# These follow from how a model fared before, or from the load, not from a fault of this request.
OF_THE_MODEL = {"circuit_open", "queue_full"}
GIVEN_UP = {"cancelled_straggler", "cancelled_hedge", "cancelled"}
STATUS = {
    "context_length": 400,
    "refused": 400,
    "rate_limited": 429,
    "queue_full": 429,
    "upstream_error": 502,
    "invalid_response": 502,
    "too_few_answers": 503,
    "circuit_open": 503,
    "timeout": 504,
}

MODELS = ("fusion/best-of", "fusion/merge", "fusion/debate", "m0")
WEIGHTS = (4, 4, 2, 1)


@dataclass
class Request:
    """One request as its client saw it.

    Attributes:
        tag: The word in its prompt that the mock notes with every call.
        model: Whom it asked.
        stream: Whether it was to be streamed.
        refused: It was to be refused.
        end: "answered", "error" or "left".
        status: HTTP status.
        error: The error object.
        usage: As sent.
        trace_id: As sent.
        complaint: What was wrong with the answer's form.
    """

    tag: str
    model: str
    stream: bool
    refused: bool = False
    end: str = "open"
    status: int = 0
    error: dict[str, Any] | None = None
    usage: dict[str, int] | None = None
    trace_id: str | None = None
    complaint: str | None = None


class Load:
    """The clients."""

    def __init__(self, session: ClientSession, url: str, seed: int) -> None:
        self.requests: list[Request] = []
        self.feedback = Counter[int]()
        self._session, self._url = session, url
        self._chance = random.Random(seed)

    async def client(self, until: float) -> None:
        """Makes one request after the other until then."""
        chance = self._chance
        while time.monotonic() < until:
            [model] = chance.choices(MODELS, WEIGHTS)
            request = Request(f"request-{len(self.requests):07d}", model, stream=chance.random() < 0.5)
            request.refused = chance.random() < 0.02
            self.requests.append(request)
            patience = chance.uniform(0.0, 0.3) if chance.random() < 0.1 else 30.0
            try:
                await asyncio.wait_for(self._ask(request, agree=chance.random() < 0.2), patience)
            except TimeoutError:
                request.end = "left"
                if patience == 30.0:
                    request.complaint = "no answer within 30 s"
            except (ClientError, BenchmarkError, ValueError, KeyError) as error:
                request.end, request.complaint = "error", f"{type(error).__name__}: {error}"
            if request.end == "answered" and request.trace_id and chance.random() < 0.2:
                await self._praise(request.trace_id)
            await asyncio.sleep(chance.uniform(0.0, 0.1))

    async def _ask(self, request: Request, *, agree: bool) -> None:
        question = f"{request.tag}: what is the capital of France?" + (" You all agree." if agree else "")
        body = {
            "model": request.model,
            "messages": [{"role": "user", "content": question}],
            "stream": request.stream,
            **({"n": 2} if request.refused else {}),
            **({"stream_options": {"include_usage": True}} if request.stream else {}),
        }
        async with self._session.post(f"{self._url}/chat/completions", json=body) as response:
            request.status = response.status
            if response.status != 200:
                request.end, request.error = "error", (await response.json())["error"]
            elif request.stream:
                await self._read_stream(request, response.content)
            else:
                answer = await response.json()
                request.end, request.usage = "answered", answer["usage"]
                request.trace_id = _trace_id(answer)
                if not answer["choices"][0]["message"]["content"]:
                    request.complaint = "an empty answer"

    async def _read_stream(self, request: Request, content: Any) -> None:
        text, usages = "", []
        async for line in content:
            if not line.strip() or line.startswith(b":"):  # a comment keeps the connection open
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                request.end = "answered"
                break
            event = json.loads(data)
            if "error" in event:
                request.end, request.error = "error", event["error"]
                return
            request.trace_id = request.trace_id or _trace_id(event)
            text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            if event.get("usage"):
                usages.append(event["usage"])
        if request.end != "answered":
            raise BenchmarkError("the stream ended without [DONE] and without an error")
        request.usage = usages[0] if usages else None
        if len(usages) != 1 or not text:
            request.complaint = f"{len(usages)} usages and {len(text)} characters in a stream"

    async def _praise(self, trace_id: str) -> None:
        async with self._session.post(f"{self._url}/traces/{trace_id}/feedback", json={"rating": 1}) as response:
            self.feedback[response.status] += 1


def _trace_id(answer: dict[str, Any]) -> str | None:
    return (answer.get("fusion") or {}).get("trace_id")


# --- afterwards ------------------------------------------------------------------------------------------------------


def audit(
    requests: list[Request], traces: list[dict[str, Any]], calls: list[dict[str, Any]]
) -> tuple[dict[str, int], list[str]]:
    """Compares the clients', the traces' and the mock's record; returns counts and everything that does not fit."""
    complaints = [f"{request.tag}: {request.complaint}" for request in requests if request.complaint]
    seen: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for call in calls:
        seen[call["tag"]].append(call)
    by_tag: dict[str, dict[str, Any]] = {}
    for trace in traces:
        tag = trace["messages"][0]["content"].partition(":")[0]
        if tag in by_tag:
            complaints.append(f"{tag}: two traces")
        by_tag[tag] = trace
    for tag in seen.keys() - by_tag.keys():
        complaints.append(f"{tag}: the mock saw {len(seen[tag])} calls, but there is no trace")
    unwell = {call["model"] for call in calls if call["fault"]}
    for request in requests:
        trace = by_tag.get(request.tag)
        if request.refused:
            if request.end == "error" and (request.status != 400 or trace is not None):
                complaints.append(f"{request.tag}: to be refused with 400, got {request.status}")
            if request.end == "answered":
                complaints.append(f"{request.tag}: to be refused, was answered")
            continue
        complaints += [f"{request.tag}: {what}" for what in _errors(request, seen[request.tag], unwell)]
        if trace is None:
            if request.end != "left":  # one who left at once was perhaps never read
                complaints.append(f"{request.tag}: {request.end}, but there is no trace")
            continue
        complaints += [f"{request.tag}: {what}" for what in _ledger(request, trace, seen[request.tag], unwell)]
    counts = {
        "requests": len(requests),
        "answered": sum(request.end == "answered" for request in requests),
        "clients left": sum(request.end == "left" for request in requests),
        "refused": sum(request.refused and request.end == "error" for request in requests),
        "typed errors": sum(request.end == "error" and not request.refused for request in requests),
        "traces": len(traces),
        "calls in traces": sum(len(trace["calls"]) for trace in traces),
        "calls the mock saw": len(calls),
        "faults injected": sum(call["fault"] is not None for call in calls),
        "unexplained": len(complaints),
    }
    return counts, complaints


def _errors(request: Request, seen: list[dict[str, Any]], unwell: set[str]) -> Iterator[str]:
    """What is unexplained of the error that a client met."""
    if request.end != "error" or request.error is None:
        return
    kind = request.error.get("type")
    if kind not in STATUS:
        yield f"an error of no named type: {request.error}"
    elif request.status not in (200, _status(request.error)):  # 200: it came after the stream had begun
        yield f"{kind} with HTTP {request.status}"
    if kind == "too_few_answers":
        for failed in request.error["failed"]:
            own = [call for call in seen if call["model"] == failed["member"]]
            if not _explained(failed["type"], failed["member"], own, unwell):
                yield f"{failed} is unexplained"
    elif not any(_explained(str(kind), call["model"], [call], unwell) for call in seen) and kind not in OF_THE_MODEL:
        yield f"{request.error} is unexplained"


def _status(error: dict[str, Any]) -> int:
    """The HTTP status of an error, as docs/failures.md says."""
    if error["type"] == "too_few_answers" and all(
        failed["type"] in ("rate_limited", "queue_full") for failed in error["failed"]
    ):
        return 429
    return STATUS[error["type"]]


def _ledger(request: Request, trace: dict[str, Any], seen: list[dict[str, Any]], unwell: set[str]) -> Iterator[str]:
    """What does not balance in a trace."""
    calls = trace["calls"]
    total = {key: sum(call["usage"].get(key, 0) for call in calls) for key in ("prompt_tokens", "completion_tokens")}
    if request.usage is not None and {key: request.usage[key] for key in total} != total:
        yield f"the client was told {request.usage}, the trace's calls sum to {total}"
    for model in {call["model"] for call in (*calls, *seen)}:
        own = [call for call in calls if call["model"] == model]
        there = [call for call in seen if call["model"] == model]
        not_sent = sum(call["outcome"] in GIVEN_UP | OF_THE_MODEL | {"timeout", "budget"} for call in own)
        if not len(own) - not_sent <= len(there) <= len(own):
            ends = Counter(call["outcome"] for call in own)
            yield f"{model}: the mock saw {len(there)} calls, the trace has {len(own)} ({dict(ends)})"
        told = Counter(tuple(call["usage"]) for call in there if call["usage"])
        exact = Counter(
            (call["usage"].get("prompt_tokens", 0), call["usage"].get("completion_tokens", 0))
            for call in own
            if call["outcome"] == "ok" and not call["estimated"]
        )
        if exact - told:
            yield f"{model}: the trace has exact usages {dict(exact)}, the mock sent {dict(told)}"
        for call in own:
            if call["outcome"] in GIVEN_UP | {"ok"} or _explained(call["outcome"], model, there, unwell):
                continue
            faults = [fault["fault"] for fault in there]
            yield f"{call['stage']} by {model}: {call['outcome']} ({call['error']}); faults: {faults}"


def _explained(kind: str, model: str, seen: list[dict[str, Any]], unwell: set[str]) -> bool:
    """Whether a failure of that kind follows from what was done to these calls of the model."""
    if kind in OF_THE_MODEL:
        return model in unwell
    if kind in GIVEN_UP:
        return True  # a quorum that can no longer be met ends the others
    return any(call["fault"] in EXPLAINS.get(kind, ()) for call in seen)


def stored(path: Path) -> list[dict[str, Any]]:
    """Every trace in the database."""
    with sqlite3.connect(path) as database:
        return [json.loads(record) for (record,) in database.execute("SELECT record FROM traces")]


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the load and the audit; prints tables; returns all figures."""
    seconds = 6.0 if arguments.smoke else arguments.minutes * 60
    models = {
        "*": {"timeout_s": 5.0, "price": {"prompt": 1.0, "completion": 3.0}},
        "m0": {"max_concurrency": 8, "max_queue": 8},
        "m1": {"retry": {"attempts": 2, "backoff_ms": 20}},
        "m2": {"hedge_after_ms": 150},
    }
    modes = {"min_responses": 2, "grace_ms": 100, "deadline_ms": 15_000, "max_rounds": 1}
    with tempfile.TemporaryDirectory(prefix="mixfuse-load-") as name:
        folder = Path(name)
        with ExitStack() as stack:
            upstream = stack.enter_context(mock_upstream(folder))
            memory: list[float] = []
            async with open_session() as session, open_session() as admin:
                control = Control(admin, upstream)
                with gateway(folder, "load", upstream, models=models, **modes) as (url, running):
                    behaviour = {"latency": {"*": 0.02, "m2": 0.06}, "jitter": 0.03, "chunk_delay": 0.001}
                    await control.set(**behaviour, faults=FAULTS, seed=arguments.seed, log=True)
                    load = Load(session, url, arguments.seed)
                    await _under_load(load, arguments.concurrency, seconds, running, memory)
                calls = await control.calls()  # the gateway has ended: every call of its has, too
        counts, complaints = audit(load.requests, stored(folder / "load.sqlite3"), calls)
    table("Load", list(counts), [list(counts.values())])
    ends = Counter((request.model, request.stream, request.end) for request in load.requests)
    rows = [
        [model, "streamed" if stream else "whole", *(ends[model, stream, end] for end in ("answered", "error", "left"))]
        for model in MODELS
        for stream in (False, True)
    ]
    table("Requests", ["model", "form", "answered", "error", "left"], rows)
    kinds = Counter(request.error["type"] for request in load.requests if request.error)
    table("Errors that clients met, by type", ["type", "count"], kinds.most_common())
    tenth = len(memory) // 10
    first, last = memory[tenth], memory[-1]
    table(
        "Gateway's memory, MiB",
        ["after a tenth", "at the end", "ratio"],
        [[f"{first:.1f}", f"{last:.1f}", f"{last / first:.3f}"]],
    )
    print(f"\nfeedback by HTTP status: {dict(load.feedback)}")
    bad = sum(count for status, count in load.feedback.items() if status != 200)
    for complaint in complaints[:40]:
        note(f"unexplained: {complaint}")
    verdict = "balanced, no unexplained error" if not complaints and not bad else f"{len(complaints) + bad} unexplained"
    print(f"\n{seconds / 60:g} minutes: {verdict}")
    return {
        "minutes": seconds / 60,
        **counts,
        "errors": kinds,
        "feedback": load.feedback,
        "memory_mib": memory,
        "complaints": complaints,
        "ok": not complaints and not bad,
    }


async def _under_load(
    load: Load, concurrency: int, seconds: float, running: psutil.Process, memory: list[float]
) -> None:
    until = time.monotonic() + seconds
    clients = asyncio.gather(*(load.client(until) for _ in range(concurrency)))
    while not clients.done():
        await asyncio.wait({clients}, timeout=seconds / 40)
        memory.append(rss_mib(running))
        if len(memory) % 8 == 0:
            note(f"{len(load.requests)} requests, gateway {memory[-1]:.0f} MiB")
    await clients


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the load and of the faults")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args()
    try:
        report = uvloop.run(main(options))
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps(report))
    sys.exit(0 if report["ok"] else 1)
