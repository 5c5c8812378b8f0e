"""The fault suite: load with random faults, hostile replies and requests, floods, a full disk, a locked database.

    nice python benchmarks/fusion_load.py [--minutes 1.5] [--json] [--smoke]

All modes and single members, whole and streamed, clients who leave, requests that must be refused, feedback; upstream
calls fail at random (500, 503, 429, too long a prompt, no JSON, a connection that is cut before or amid the answer, no
answer at all, and every kind of `hostile.REPLIES`). Beside it come: every kind of `hostile.REQUESTS`; ten thousand
connections; headers that trickle; readers that never read; no space on the disk; a database that another process locks.
`/readyz` is asked all the time. Afterwards three records of the same minutes are compared: what the clients saw, what
the traces say, what the mock upstream saw. It exits with 1 unless

- every error a client met, and every failed call in a trace, is of a named type and follows from a fault that was
  injected into that very request, or (an open circuit, a full queue) into the model's calls before it;
- the usage a client was sent is the sum over its trace's calls;
- each call that the mock saw is in exactly one trace, and a call in a trace that the mock did not see was given up
  before it was sent;
- the tokens a trace states as exact are those that the mock sent;
- no answer has status 500, and every hostile request got what its kind may get;
- `/readyz` was true to the state: of the circuits, the disk and the database;
- at least 1000 faults were injected, and 300 hostile requests of 60 kinds sent.
"""

import argparse
import asyncio
import json
import random
import re
import resource
import socket
import sqlite3
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import hostile
import psutil
import uvloop
from aiohttp import ClientConnectionError, ClientError, ClientSession
from harness import MEMBERS, BenchmarkError, Control, gateway, mock_upstream, note, open_session, rss_mib, table

FAULTS = {
    "500": 0.02,
    "503": 0.01,
    "429": 0.01,
    "context": 0.01,
    "garbage": 0.01,
    "reset": 0.01,
    "break": 0.02,
    "hang": 0.01,
    "reply": 0.04,
}
# What a failed call may be called, by what was done to it.
EXPLAINS = {
    "upstream_error": {"500", "503", "reset", "break"},
    "rate_limited": {"429"},
    "context_length": {"context"},
    "invalid_response": {"garbage", "break"},
    "timeout": {"hang"},
}
# A hostile reply may be called by any of these.
OF_REPLIES = {*EXPLAINS, "refused", "bad_request"}
# These follow from how a model fared before, or from the load, not from a fault of this request.
OF_THE_MODEL = {"circuit_open", "queue_full"}
GIVEN_UP = {"cancelled_straggler", "cancelled_hedge", "cancelled"}
STATUS = {
    "bad_request": 400,
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
LEAST_FAULTS, LEAST_HOSTILE, LEAST_KINDS = 1000, 300, 60
WRITE_TIMEOUT_S = 8.0  # longer than the members' time-out


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

    def __init__(self, session: ClientSession, url: str, seed: int, trouble: "Trouble") -> None:
        self.requests: list[Request] = []
        self.feedback = Counter[int]()
        self.over = False
        self._trouble = trouble
        self._session, self._url = session, url
        self._chance = random.Random(seed)

    async def client(self) -> None:
        """Makes one request after the other until it is over."""
        chance = self._chance
        while not self.over:
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
            except ClientConnectionError:
                if not self._trouble.flood:
                    raise
                request.end = "left"  # a flood takes the place of connections that wait, as these do between requests
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
                    request.complaint = f"an empty answer: {json.dumps(answer)[:600]}"

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
        troubled = self._trouble.storage
        try:
            path = f"{self._url}/traces/{trace_id}/feedback"
            async with self._session.post(path, json={"score": 1}) as response:
                if response.status != 503 or not (troubled or self._trouble.recently()):
                    self.feedback[response.status] += 1
        except ClientConnectionError:
            if not self._trouble.flood:
                raise


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
        tag = str(trace["messages"][0]["content"]).partition(":")[0]
        if tag in by_tag:
            complaints.append(f"{tag}: two traces")
        by_tag[tag] = trace
    for tag in seen.keys() - by_tag.keys():
        complaints.append(f"{tag}: the mock saw {len(seen[tag])} calls, but there is no trace")
    unwell = {call["model"] for call in calls if call["fault"]}
    ledger: list[str] = []
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
        ledger += [f"{request.tag}: {what}" for what in _ledger(request, trace, seen[request.tag], unwell)]
    complaints += ledger
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
        "ledger errors": len(ledger),
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
    if error["type"] == "too_few_answers" and all(STATUS.get(failed["type"]) == 400 for failed in error["failed"]):
        return 400
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
    faults = [call["fault"] or "" for call in seen]
    return any(
        fault in EXPLAINS.get(kind, ()) or (fault.startswith("reply:") and kind in OF_REPLIES) for fault in faults
    )


# --- what else happens -----------------------------------------------------------------------------------------------


class Trouble:
    """What is being done to the gateway now.

    Attributes:
        storage: "disk" or "database", while it cannot be written.
        since: When that last changed, by `time.monotonic`.
        flood: Whether there are more connections than it takes.
    """

    def __init__(self) -> None:
        self.storage: str | None = None
        self.since = 0.0
        self.flood = False

    def set(self, storage: str | None) -> None:
        """Notes that the storage is in trouble, or no longer."""
        self.storage, self.since = storage, time.monotonic()

    def recently(self) -> bool:
        """Whether the storage's state changed in the last seconds."""
        return time.monotonic() - self.since < 12


class Readiness:
    """Asks `/readyz` all the time, and compares it with the circuits in `/metrics` and with what is being done."""

    SAYS = {"disk": "spool", "database": "database"}

    def __init__(self, session: ClientSession, url: str, trouble: Trouble) -> None:
        self._session, self._url, self._trouble = session, url.removesuffix("/v1"), trouble
        self.asked = Counter[int]()
        self.complaints: list[str] = []

    async def watch(self) -> None:
        """Asks until it is cancelled."""
        while True:
            before, storage, since = await self._answers(), self._trouble.storage, self._trouble.since
            began = time.monotonic()
            async with self._session.get(f"{self._url}/readyz") as response:
                status, problems = response.status, " ".join((await response.json())["problems"])
            seconds, after = time.monotonic() - began, await self._answers()
            self.asked[status] += 1
            if seconds > 8:
                self.complaints.append(f"/readyz took {seconds:.1f} s")
            circuits = "circuit is not open" in problems
            if max(before, after) < 2 and not circuits:
                self.complaints.append(f"/readyz does not say that the circuits leave {before} answers: {problems}")
            if min(before, after) >= 2 and circuits:
                self.complaints.append(f"/readyz says of {before} answers: {problems}")
            if self._trouble.since == since and began - since > 3:  # it has been so for a while, and still is
                said = any(word in problems for word in self.SAYS.values())
                if storage is not None and (status != 503 or self.SAYS[storage] not in problems):
                    self.complaints.append(f"/readyz says nothing of the {storage}: {status} {problems}")
                if storage is None and said:
                    self.complaints.append(f"/readyz says, though all is well: {problems}")
            if (status == 503) != bool(circuits or any(word in problems for word in self.SAYS.values())):
                self.complaints.append(f"/readyz: {status} with the problems {problems!r}")
            await asyncio.sleep(0.3)

    async def _answers(self) -> int:
        """How many members' circuits are not open."""
        async with self._session.get(f"{self._url}/metrics") as response:
            states = re.findall(r'^mixfuse_circuit_state\{member="(m\d)"\} (\S+)', await response.text(), re.MULTILINE)
        return len(MEMBERS) - sum(float(state) == 2 for _, state in states)


# An answer of a member that does not fit the schema of one of these is its client's doing.
OWN_DOING = {"schema that doubles", "schema with an evil pattern", "schema without end"}


class Hostile:
    """Sends the hostile requests, each over a connection of its own."""

    def __init__(self, url: str, load: Load) -> None:
        self._address = urlsplit(url)
        self._load = load
        self.sent = Counter[str]()
        self.statuses = Counter[int]()
        self.complaints: list[str] = []

    async def send(self, kind: str) -> None:
        """Sends one of a kind and judges what comes back."""
        request = hostile.REQUESTS[kind]
        tag = f"request-9{self.sent.total():06d}"
        self.sent[kind] += 1
        status, body = await self._exchange(request.raw(tag, self._address.netloc))
        self.statuses[status] += 1
        if status not in request.statuses:
            self.complaints.append(f"hostile {kind!r}: {status} {body[:200]!r}")
        if status >= 400 and not self._typed(body):
            self.complaints.append(f"hostile {kind!r}: {status} without a typed error: {body[:200]!r}")
        if request.statuses >= hostile.ANSWERED and kind not in OWN_DOING:  # it may have its trace
            answered = Request(tag, "m0", stream=False, end="answered" if status == 200 else "left", status=status)
            answered.usage = json.loads(body)["usage"] if status == 200 else None
            self._load.requests.append(answered)

    async def _exchange(self, sent: bytes) -> tuple[int, bytes]:
        """Returns the status and body of the response; (0, b"") if the connection was closed without one."""
        reader, writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        received = b""
        try:
            async with asyncio.timeout(40):
                writer.write(sent)
                while part := await reader.read(1 << 20):
                    received += part
        except ConnectionError:
            pass
        except TimeoutError:
            received = received or b"HTTP/1.1 999 no answer\r\n\r\n"
        finally:
            writer.transport.abort()
        head, _, body = received.partition(b"\r\n\r\n")
        return (int(head.split()[1]) if head else 0), body

    @staticmethod
    def _typed(body: bytes) -> bool:
        try:
            error = json.loads(body)["error"]
            return bool(error["type"]) and bool(error["message"])
        except (ValueError, KeyError, TypeError):
            return False


async def flood(url: str, trouble: Trouble, count: int) -> int:
    """Opens connections that send nothing, half of the headers or half of a body; returns how many there were."""
    address = urlsplit(url)
    beginnings = (b"", b"GET / HTTP/1.1\r\nx:", b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 9\r\n\r\n{")
    trouble.flood = True
    opened: list[asyncio.StreamWriter] = []
    try:
        for _ in range(0, count, 500):
            pairs = await asyncio.gather(
                *(asyncio.open_connection(address.hostname, address.port) for _ in range(min(500, count))),
                return_exceptions=True,
            )
            opened += [pair[1] for pair in pairs if not isinstance(pair, BaseException)]
        for number, writer in enumerate(opened):
            writer.write(beginnings[number % len(beginnings)])
        await asyncio.sleep(2)
        return len(opened)
    finally:
        for writer in opened:
            writer.transport.abort()
        await asyncio.sleep(1)
        trouble.flood = False


async def trickle(url: str, count: int, seconds: float) -> int:
    """Sends headers a few bytes at a time; returns how many connections were still open at the end."""
    address = urlsplit(url)
    opened = [await asyncio.open_connection(address.hostname, address.port) for _ in range(count)]
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for writer in (writer for _, writer in opened if not writer.is_closing()):
            writer.write(b"x: y\r\n" if until - time.monotonic() < seconds - 0.5 else b"GET / HTTP/1.1\r\n")
        await asyncio.sleep(0.5)
    left = sum(not reader.at_eof() and not writer.is_closing() for reader, writer in opened)
    for _, writer in opened:
        writer.transport.abort()
    return left


async def never_read(url: str, load: Load, count: int) -> None:
    """Asks for long streams and reads nothing of them, for longer than the gateway waits."""
    address, loop = urlsplit(url), asyncio.get_running_loop()
    with ExitStack() as stack:
        for number in range(count):
            request = Request(f"request-8{number:06d}", "m1", stream=True, end="left")
            load.requests.append(request)
            content = f"{request.tag}: a long answer, please"
            body = {"model": "m1", "messages": [{"role": "user", "content": content}], "stream": True}
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, (address.hostname, address.port))
            await loop.sock_sendall(client, hostile.raw_request(json.dumps(body).encode(), address.netloc))
        await asyncio.sleep(WRITE_TIMEOUT_S + 2)


async def full_disk(running: psutil.Process, trouble: Trouble, seconds: float) -> None:
    """Lets the gateway write nothing for some time, as on a full disk."""
    before = running.rlimit(psutil.RLIMIT_FSIZE)
    running.rlimit(psutil.RLIMIT_FSIZE, (0, before[1]))
    trouble.set("disk")
    await asyncio.sleep(seconds)
    running.rlimit(psutil.RLIMIT_FSIZE, before)
    trouble.set(None)


async def locked_database(path: Path, session: ClientSession, url: str, trouble: Trouble) -> list[str]:
    """Locks the database as another process would; returns complaints about the paths that need it."""
    other = await asyncio.to_thread(sqlite3.connect, path, 30, isolation_level=None, check_same_thread=False)
    await asyncio.to_thread(other.execute, "BEGIN IMMEDIATE")
    trouble.set("database")
    complaints = []
    try:
        began = time.monotonic()
        async with session.get(f"{url}/traces") as response:
            seconds = time.monotonic() - began
            if response.status != 503 or seconds > 12:
                complaints.append(f"a locked database: /v1/traces said {response.status} after {seconds:.1f} s")
    finally:
        other.close()
        trouble.set(None)
    return complaints


def stored(path: Path) -> list[dict[str, Any]]:
    """Every trace in the database."""
    with sqlite3.connect(path) as database:
        return [json.loads(record) for (record,) in database.execute("SELECT record FROM traces")]


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the load and the audit; prints tables; returns all figures."""
    smoke = arguments.smoke
    seconds = 6.0 if smoke else arguments.minutes * 60
    models = {
        "*": {"timeout_s": 5.0, "price": {"prompt": 1.0, "completion": 3.0}},
        "m0": {"max_concurrency": 8, "max_queue": 8},
        "m1": {"retry": {"attempts": 2, "backoff_ms": 20}},
        "m2": {"hedge_after_ms": 150},
    }
    modes = {"min_responses": 2, "grace_ms": 100, "deadline_ms": 15_000, "max_rounds": 1}
    config = {"limits": {"write_timeout_s": WRITE_TIMEOUT_S}}
    complaints: list[str] = []
    trouble = Trouble()
    with tempfile.TemporaryDirectory(prefix="mixfuse-load-") as name:
        folder = Path(name)
        with ExitStack() as stack:
            upstream = stack.enter_context(mock_upstream(folder))
            memory: list[float] = []
            async with open_session() as session, open_session() as admin:
                control = Control(admin, upstream)
                with gateway(folder, "load", upstream, models=models, config=config, **modes) as (url, running):
                    behaviour = {"latency": {"*": 0.02, "m2": 0.06}, "jitter": 0.03, "chunk_delay": 0.001}
                    await control.set(**behaviour, faults=FAULTS, seed=arguments.seed, log=True)
                    load = Load(session, url, arguments.seed, trouble)
                    enemies, ready = Hostile(url, load), Readiness(admin, url, trouble)
                    watching = asyncio.create_task(ready.watch())
                    target = Target(url, running, folder / "load.sqlite3")
                    troubles = asyncio.create_task(_troubles(target, admin, trouble, load, enemies, smoke=smoke))
                    clients = [load.client() for _ in range(arguments.concurrency)]
                    await _under_load(load, clients, seconds, troubles, lambda: memory.append(rss_mib(running)))
                    complaints += await troubles
                    watching.cancel()
                    await asyncio.wait({watching})
                    if not watching.cancelled():
                        complaints.append(f"/readyz could not be asked: {watching.exception()!r}")
                calls = await control.calls()  # the gateway has ended: every call of its has, too
        counts, unbalanced = audit(load.requests, stored(folder / "load.sqlite3"), calls)
        log = (folder / "load.log").read_text(errors="replace")
    complaints += [*unbalanced, *enemies.complaints, *ready.complaints]
    if "Traceback" in log:
        complaints.append("the gateway's log: " + log[log.index("Traceback") - 200 :][:4000])
    bad = {status: count for status, count in load.feedback.items() if status != 200}
    complaints += [f"feedback: {count} answers of {status}" for status, count in bad.items()]
    counts |= {
        "hostile requests": enemies.sent.total(),
        "hostile kinds": len(enemies.sent),
        "answers of 500": sum(one.status == 500 for one in load.requests) + enemies.statuses[500],
        "/readyz asked": ready.asked.total(),
        "lost traces": sum("there is no trace" in one for one in complaints),
        "unexplained": len(complaints),
    }
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(one.ru_utime + one.ru_stime for one in used)
    if not smoke:
        for what, least in (
            ("faults injected", LEAST_FAULTS),
            ("hostile requests", LEAST_HOSTILE),
            ("hostile kinds", LEAST_KINDS),
        ):
            if counts[what] < least:
                complaints.append(f"{what}: {counts[what]}, not {least}")
    table("Load", ["", "count"], [[key, value] for key, value in counts.items()])
    ends = Counter((request.model, request.stream, request.end) for request in load.requests)
    rows = [
        [model, "streamed" if stream else "whole", *(ends[model, stream, end] for end in ("answered", "error", "left"))]
        for model in MODELS
        for stream in (False, True)
    ]
    table("Requests", ["model", "form", "answered", "error", "left"], rows)
    kinds = Counter(request.error["type"] for request in load.requests if request.error)
    table("Errors that clients met, by type", ["type", "count"], kinds.most_common())
    table("Hostile requests, by status", ["status", "count"], sorted(enemies.statuses.items()))
    tenth = len(memory) // 10
    first, last = memory[tenth], memory[-1]
    table(
        "Gateway's memory, MiB",
        ["after a tenth", "at the end", "ratio"],
        [[f"{first:.1f}", f"{last:.1f}", f"{last / first:.3f}"]],
    )
    print(f"\nfeedback by HTTP status: {dict(load.feedback)}; /readyz: {dict(ready.asked)}; CPU time {cpu_s:.0f} s")
    for complaint in complaints[:40]:
        note(f"unexplained: {complaint}")
    verdict = f"{len(complaints)} unexplained" if complaints else "balanced, no unexplained error"
    print(f"\n{seconds / 60:g} minutes: {verdict}")
    return {
        "minutes": seconds / 60,
        **counts,
        "errors": kinds,
        "feedback": load.feedback,
        "readyz": ready.asked,
        "hostile": enemies.statuses,
        "memory_mib": memory,
        "cpu_s": cpu_s,
        "complaints": complaints,
        "ok": not complaints,
    }


class Target(NamedTuple):
    """The gateway: its base URL, its process and its database."""

    url: str
    process: psutil.Process
    database: Path


async def _troubles(
    target: Target, session: ClientSession, trouble: Trouble, load: Load, enemies: Hostile, *, smoke: bool
) -> list[str]:
    """Does to the gateway what can be done to it, one thing after the other; returns complaints."""
    complaints = []
    url = target.url
    await asyncio.sleep(1)
    for _ in range(1 if smoke else 3):
        kinds = iter(hostile.REQUESTS)

        async def send(kinds: Iterator[str] = kinds) -> None:
            for kind in kinds:
                await enemies.send(kind)

        await asyncio.gather(*(send() for _ in range(3)))
        note(f"{enemies.sent.total()} hostile requests")
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    count = 500 if smoke else 10_000
    opened = await flood(url, trouble, count)
    note(f"{opened} connections at once")
    if opened < count * 0.9:
        complaints.append(f"only {opened} of {count} connections could be opened")
    if not smoke:
        left, _ = await asyncio.gather(trickle(url, 300, 14), never_read(url, load, 20))
        if left:
            complaints.append(f"{left} connections trickle on")
        note("readers that never read, and headers that trickle, have ended")
    await full_disk(target.process, trouble, 4.5)
    await asyncio.sleep(5)
    if not smoke:
        note("the disk is back")
        complaints += await locked_database(target.database, session, url, trouble)
        await asyncio.sleep(5)
        note("the database is back")
    return complaints


async def _under_load(
    load: Load,
    clients: Sequence[Coroutine[Any, Any, None]],
    seconds: float,
    troubles: "asyncio.Task[list[str]]",
    measure: Callable[[], None],
) -> None:
    """Keeps clients asking for so long, and until the troubles are over."""
    until = time.monotonic() + seconds
    asking = asyncio.gather(*clients)
    while not asking.done():
        await asyncio.wait({asking}, timeout=max(0.1, seconds / 40))
        load.over = time.monotonic() > until and troubles.done()
        measure()
    await asking


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.5)
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
