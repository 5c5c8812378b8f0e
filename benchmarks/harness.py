"""What the benchmarks of the fusion runtime share: processes, one fused request by hand, statistics, tables."""

import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MEMBERS = ("m0", "m1", "m2")
QUESTION = [{"role": "user", "content": "What is the capital of France, and since when?"}]

Shape = Literal["merge", "best_of"]
"""Which calls a fused request makes: three members, then one synthesis, or six verdicts (three pairs, both orders)."""


class BenchmarkError(Exception):
    """A target did not answer as it should; the message says what came instead."""


# --- processes ------------------------------------------------------------------------------------------------------


@contextmanager
def process(
    command: Sequence[str], log: Path, *, wait_s: float = 120.0, **environment: str
) -> Iterator[tuple[str, psutil.Process]]:
    """Runs a server that says `ready: URL` on standard error; yields that URL and the process, and ends it.

    Raises:
        BenchmarkError: It did not start within `wait_s` seconds; the message ends with its log.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what was started, as Ctrl-C does
    with log.open("wb") as errors:
        running = subprocess.Popen(command, stdout=errors, stderr=errors, cwd=ROOT, env={**os.environ, **environment})
        try:
            end = time.monotonic() + wait_s
            while not (ready := re.search(r"ready: (http://\S+)", log.read_text(errors="replace"))):
                if running.poll() is not None or time.monotonic() > end:
                    raise BenchmarkError(
                        f"{' '.join(command)} did not start: {log.read_text(errors='replace')[-2000:]}"
                    )
                time.sleep(0.05)
            yield ready.group(1), psutil.Process(running.pid)
        finally:
            running.terminate()
            try:
                running.wait(30)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()


@contextmanager
def mock_upstream(folder: Path, port: int = 0, answers: Path | None = None) -> Iterator[str]:
    """Runs the mock, which replays these answers if there are any; yields its base URL, which ends in `/v1`."""
    command = [sys.executable, str(HERE / "mock_upstream.py"), "--port", str(port)]
    command += [] if answers is None else ["--answers", str(answers)]
    with process(command, folder / "mock.log") as (url, _):
        yield url


@contextmanager
def gateway(
    folder: Path,
    name: str,
    upstream: str,
    *,
    models: dict[str, dict[str, Any]] | None = None,
    workers: int = 1,
    config: dict[str, Any] | None = None,
    **modes: Any,
) -> Iterator[tuple[str, psutil.Process]]:
    """Runs the real gateway over the mock's members, judge and synthesizer; yields its base URL and process.

    Args:
        folder: Takes its config, log and traces.
        name: What its files are called.
        upstream: The mock's base URL.
        models: More settings of a model by its name; "*" is for all.
        workers: How many processes serve.
        config: More keys of the config.
        modes: The config's `modes`.
    """
    models = models or {}

    def at(model: str) -> dict[str, Any]:
        return {"base_url": upstream, "model": model, **models.get("*", {}), **models.get(model, {})}

    written = {
        "members": [{"name": member, **at(member)} for member in MEMBERS],
        "judge": at("judge"),
        "synthesizer": at("synth"),
        "modes": modes,
        "trace_db": str(folder / f"{name}.sqlite3"),
        **(config or {}),
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(written), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "mixfuse", "gateway", str(path), "--port", "0", "--workers", str(workers)]
    with process(command, folder / f"{name}.log") as started:
        yield started


@contextmanager
def floor(folder: Path, upstream: str) -> Iterator[tuple[str, psutil.Process]]:
    """Runs the floor; yields its base URL and process."""
    with process([sys.executable, str(HERE / "floor.py"), upstream], folder / "floor.log") as started:
        yield started


class Control:
    """Tells the mock how to behave, and asks what it saw."""

    def __init__(self, session: ClientSession, upstream: str) -> None:
        self._session, self._url = session, upstream.removesuffix("/v1")

    async def set(self, **behaviour: Any) -> None:
        """Replaces the mock's behaviour (see `mock_upstream.Control`) and forgets what it saw."""
        async with self._session.post(f"{self._url}/control", json=behaviour) as response:
            if response.status != 200:
                raise BenchmarkError(f"the mock refused {behaviour}: {await response.text()}")

    async def stats(self) -> dict[str, dict[str, int]]:
        """Calls by model: all of them under "calls", and by how they ended."""
        async with self._session.get(f"{self._url}/stats") as response:
            return await response.json()

    async def calls(self) -> list[dict[str, Any]]:
        """Every call the mock saw."""
        async with self._session.get(f"{self._url}/calls") as response:
            return await response.json()


# --- one fused request, by hand --------------------------------------------------------------------------------------


def open_session() -> ClientSession:
    """A keep-alive session without a limit; one for each target, so that none waits for another."""
    return ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(total=120))


async def fuse(session: ClientSession, url: str, messages: list[dict[str, str]], headers: Any = None) -> list[str]:
    """The members' part of a fused request; members that fail are left out.

    Raises:
        BenchmarkError: None of them answered.
    """
    asked = (_content(session, url, {"model": member, "messages": messages}, headers) for member in MEMBERS)
    answers = [answer for answer in await asyncio.gather(*asked, return_exceptions=True) if isinstance(answer, str)]
    if not answers:
        raise BenchmarkError("no member answered")
    return answers


async def verdicts(session: ClientSession, url: str, answers: list[str], headers: Any = None) -> None:
    """The judge's part: every pair in both orders, one token with its alternatives each, all at once."""
    pairs = [(one, other) for one in answers for other in answers if one is not other]
    await asyncio.gather(*(_content(session, url, _comparison(*pair), headers) for pair in pairs))


def _comparison(first: str, second: str) -> dict[str, Any]:
    answers = f"[A 0000]\n{first}\n[B 0000]\n{second}\n[end 0000]"
    prompt = f"Pick the better answer.\n\n[question 0000]\n{QUESTION[0]['content']}\n{answers}\nA or B?"
    messages = [{"role": "user", "content": prompt}]
    verdict = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    return {"model": "judge", "messages": messages, **verdict}


def synthesis(answers: list[str], *, stream: bool = False) -> dict[str, Any]:
    """The synthesizer's part, as a request body."""
    prompt = f"{QUESTION[0]['content']}\n\nFuse these answers:\n" + "\n".join(answers)
    return {"model": "synth", "messages": [{"role": "user", "content": prompt}], "stream": stream}


async def _content(session: ClientSession, url: str, body: dict[str, Any], headers: Any = None) -> str:
    async with session.post(f"{url}/chat/completions", json=body, headers=headers) as response:
        if response.status != 200:
            raise BenchmarkError(f"HTTP {response.status}: {(await response.text())[:200]}")
        return (await response.json(content_type=None))["choices"][0]["message"]["content"]


# --- targets ---------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What came back of one fused request.

    Attributes:
        text: The answer.
        first_s: Seconds until its first piece.
        total_s: Seconds until its end.
        pieces: How many chunks with text; 0 where it was not streamed.
    """

    text: str
    first_s: float
    total_s: float
    pieces: int = 0


@dataclass
class Target:
    """Something that makes fused requests.

    Attributes:
        name: In the tables.
        url: Its base URL.
        model: The model to ask for; empty where the benchmark makes the calls itself, through `url`.
        shape: Which calls it makes, and so whose ratio to `direct` it is.
        headers: Sent with each request.
        session: Its own.
        process: What answers, where it is ours; its CPU time is measured.
    """

    name: str
    url: str
    model: str
    shape: Shape
    headers: dict[str, str] = field(default_factory=dict)
    session: ClientSession = field(default_factory=open_session)
    process: psutil.Process | None = None

    def cpu_s(self) -> float:
        """CPU seconds its processes have used so far: what other work on the machine disturbs least."""
        if self.process is None:
            return 0.0
        times = [one.cpu_times() for one in (self.process, *self.process.children())]
        return sum(one.user + one.system for one in times)

    @classmethod
    def parse(cls, spec: str) -> "Target":
        """Reads `NAME=URL[;model=M][;shape=merge|best_of][;h.HEADER=VALUE]`; without a model the calls are made one by
        one through that URL, as through a proxy.

        Raises:
            BenchmarkError: It reads otherwise.
        """  # noqa: D205 - the form is one line
        name, separator, rest = spec.partition("=")
        url, *options = rest.split(";")
        target = cls(name, url.rstrip("/"), "", "merge")
        for option in options:
            key, _, value = option.partition("=")
            if key == "model":
                target.model = value
            elif key == "shape" and value in ("merge", "best_of"):
                target.shape = "best_of" if value == "best_of" else "merge"
            elif key.startswith("h."):
                target.headers[key[2:]] = value
            else:
                separator = ""
        if not separator or not name or not url:
            raise BenchmarkError(
                f"--target {spec!r}: write NAME=URL, then any of ;model=M ;shape=merge|best_of ;h.HEADER=VALUE"
            )
        return target

    async def ask(self, *, stream: bool = False, **extra: Any) -> Answer:
        """Makes one fused request.

        Raises:
            BenchmarkError: It failed.
        """
        began = time.perf_counter()
        try:
            if self.model:
                body = {"model": self.model, "messages": QUESTION, **extra}
                return await self._post(body, began, stream)
            answers = await fuse(self.session, self.url, QUESTION, self.headers)
            if self.shape == "best_of":
                await verdicts(self.session, self.url, answers, self.headers)
                elapsed = time.perf_counter() - began
                return Answer(answers[0], elapsed, elapsed)
            return await self._post(synthesis(answers), began, stream)
        except (ClientError, TimeoutError, KeyError, IndexError) as error:
            raise BenchmarkError(f"{type(error).__name__}: {error}") from error

    async def _post(self, body: dict[str, Any], began: float, stream: bool) -> Answer:
        if not stream:
            text = await _content(self.session, self.url, {**body, "stream": False}, self.headers)
            elapsed = time.perf_counter() - began
            return Answer(text, elapsed, elapsed)
        pieces, first = [], 0.0
        async with self.session.post(
            f"{self.url}/chat/completions", json={**body, "stream": True}, headers=self.headers
        ) as response:
            if response.status != 200:
                raise BenchmarkError(f"HTTP {response.status}: {(await response.text())[:200]}")
            if "event-stream" not in response.headers.get("content-type", ""):  # asked to stream, it does not
                text = (await response.json(content_type=None))["choices"][0]["message"]["content"]
                elapsed = time.perf_counter() - began
                return Answer(text, elapsed, elapsed)
            async for event in events(response.content):
                if "error" in event:
                    raise BenchmarkError(f"the stream ended with {event['error']}")
                choices = event.get("choices") or []
                if choices and (text := choices[0].get("delta", {}).get("content")):
                    first = first or time.perf_counter() - began
                    pieces.append(text)
        if not pieces:
            raise BenchmarkError("the stream held no text")
        return Answer("".join(pieces), first, time.perf_counter() - began, len(pieces))


async def events(content: Any) -> Any:
    """The JSON objects of a server-sent event stream; one that ends without `[DONE]` or an error is refused.

    Raises:
        BenchmarkError: It broke off.
    """
    async for line in content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        yield event
        if "error" in event:
            return
    raise BenchmarkError("the stream broke off")


# --- figures ---------------------------------------------------------------------------------------------------------


def rotated(targets: list[Target], turn: int) -> list[Target]:
    """The targets in another order each turn, so that none is always the first."""
    turn %= len(targets)
    return targets[turn:] + targets[:turn]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`median [min..max]`."""
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}..{max(values):.{digits}f}]"


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round."""
    return [value / under for value, under in zip(values, base, strict=True)]


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |")
    sys.stdout.flush()


def rss_mib(running: psutil.Process) -> float:
    """Resident memory of a process and its children, in MiB."""
    return sum(one.memory_info().rss for one in (running, *running.children(recursive=True))) / 2**20


def note(text: str) -> None:
    """Says on standard error how far things are."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def load() -> float:
    """The machine's load average over a minute: how noisy the figures are."""
    return os.getloadavg()[0]
