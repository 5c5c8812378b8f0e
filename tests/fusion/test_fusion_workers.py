"""Several worker processes as one gateway: what they share, what a killed one leaves, and how they end."""

import asyncio
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml
from fake_upstream import FakeUpstream, Script
from fusion_harness import MIXFUSE, config_keys, start_process

from mixfuse.contracts.database import opened
from mixfuse.fusion.calls.board import SharedBoard
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import Spend
from mixfuse.fusion.http.key_limits import KeyBudget
from mixfuse.fusion.http.keys import KeyRing, create, revoke
from mixfuse.fusion.store.traces import Spent

HELLO: list[Any] = [{"role": "user", "content": "why?"}]
# So many connections reach both workers, but for once in a million times.
MANY = 20


@dataclass
class Workers:
    """A running `mixfuse gateway --workers 2`."""

    process: asyncio.subprocess.Process
    url: str
    folder: Path
    secret: str = "unused"

    async def ask(self, model: str = "alpha", **more: Any) -> httpx.Response:
        """Asks over a connection of its own, which either worker may take."""
        return await self.http("POST", "/v1/chat/completions", json={"model": model, "messages": HELLO, **more})

    async def ask_often(self, count: int = MANY, **more: Any) -> list[httpx.Response]:
        return await asyncio.gather(*(self.ask(**more) for _ in range(count)))

    async def http(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.secret}"}
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:
            return await client.request(method, path, headers=headers, **more)

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(30):
            while not await condition():  # noqa: ASYNC110 - other processes set no event here
                await asyncio.sleep(0.05)

    async def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return await asyncio.wait_for(self.process.wait(), 60)


Start = Callable[..., Awaitable[Workers]]


@pytest.fixture
async def start(upstream: FakeUpstream, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts the gateway over the fake upstream; keywords are keys of its config."""
    running: list[Workers] = []

    async def run(secret: str = "unused", members: list[Any] | None = None, **keys: Any) -> Workers:
        config = config_keys(upstream, tmp_path, members, **keys)
        process, line = await start_process(tmp_path, config, "--workers=2", "--drain-s=5")
        assert "2 workers" in line
        running.append(Workers(process, line.split()[1].removesuffix("/v1"), tmp_path, secret))
        return running[-1]

    yield run
    for one in running:
        if one.process.returncode is None:
            await one.end()


def key(folder: Path, **limits: Any) -> str:
    with opened(folder / "traces.sqlite3") as database:
        return create(database, "jane", **limits)[1]


def used(folder: Path) -> int:
    """The tokens that the database charges to the keys."""
    connection = sqlite3.connect(folder / "traces.sqlite3")
    (tokens,) = connection.execute("SELECT SUM(tokens) FROM key_usage").fetchone()
    connection.close()
    return int(tokens or 0)


def codes(responses: list[httpx.Response]) -> dict[int, int]:
    found = [response.status_code for response in responses]
    return {code: found.count(code) for code in set(found)}


async def test_a_budget_holds_for_all_workers_together(start: Start, upstream: FakeUpstream, tmp_path: Path) -> None:
    server = await start(key(tmp_path, max_tokens=100, period="total"))
    hold = upstream.models["alpha"].hold = asyncio.Event()
    asked = [asyncio.create_task(server.ask(max_tokens=60)) for _ in range(MANY)]
    await upstream.wait_asked("alpha")
    await server.until(lambda: _true(sum(one.done() for one in asked) == MANY - 1))
    hold.set()
    assert codes(await asyncio.gather(*asked)) == {200: 1, 402: MANY - 1}
    # 15 of 100 are spent, and the rest is free again; an answer needs some 20 and spends 15.
    answers = [await server.ask(max_tokens=5) for _ in range(MANY)]
    assert codes(answers) == {200: 5, 402: MANY - 5}
    (first,) = {one.json()["error"]["type"] for one in answers if one.status_code == 402}
    assert first == "budget"
    assert (await server.http("GET", "/v1/traces")).status_code == 200  # which waits until all are stored
    assert used(tmp_path) == 90


async def _true(value: bool) -> bool:
    return value


async def test_a_rate_holds_for_all_workers_together(start: Start, tmp_path: Path) -> None:
    server = await start(key(tmp_path, per_minute=6))
    assert codes(await server.ask_often()) == {200: 6, 429: MANY - 6}


async def test_a_revoked_key_is_refused_by_all_workers(start: Start, tmp_path: Path) -> None:
    server = await start(key(tmp_path))
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.secret, max_retries=0)
    answer = await client.chat.completions.create(model="fusion/best-of", messages=HELLO)
    assert answer.choices[0].message.content == "the answer of beta"
    with opened(tmp_path / "traces.sqlite3") as database:
        revoke(database, "jane")

    async def refused_by_all() -> bool:
        return codes(await server.ask_often()) == {401: MANY}

    await server.until(refused_by_all)
    with pytest.raises(openai.AuthenticationError):
        await client.chat.completions.create(model="alpha", messages=HELLO)
    await client.close()


async def test_a_circuit_is_open_for_all_workers(start: Start, upstream: FakeUpstream) -> None:
    at = {"base_url": upstream.base_url}
    member = {"name": "alpha", "model": "alpha", "breaker": {"failures": 3, "cooldown_ms": 60_000}, **at}
    server = await start(members=[member, {"name": "beta", "model": "beta", **at}])
    upstream.models["alpha"] = Script(status=500)
    for _ in range(MANY):
        assert (await server.ask()).status_code in (502, 503)
    assert len(upstream.asked("alpha")) == 3
    metrics = (await server.http("GET", "/metrics")).text
    assert 'mixfuse_circuit_state{member="alpha"} 2.0' in metrics


async def test_a_killed_worker_is_replaced_and_nothing_is_lost(
    start: Start, upstream: FakeUpstream, tmp_path: Path
) -> None:
    server = await start(key(tmp_path, max_tokens=1_000_000, period="total"))
    answered = await server.ask_often(30)
    old = server.workers()
    assert len(old) == 2
    old[0].kill()  # at once: the last traces are in its spool only
    answered += await server.ask_often(30)  # of which some wait for the new one
    assert codes(answered) == {200: 60}
    ids = [one.json()["fusion"]["trace_id"] for one in answered]
    found = await asyncio.gather(*(server.http("GET", f"/v1/traces/{id_}") for id_ in ids))
    assert codes(found) == {200: 60}
    assert used(tmp_path) == sum(one.json()["usage"]["total_tokens"] for one in answered) == 900
    assert len(server.workers()) == 2
    assert old[0].pid not in [one.pid for one in server.workers()]
    ready = await server.http("GET", "/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "ok")
    metrics = (await server.http("GET", "/metrics")).text
    assert 'mixfuse_requests_total{mode="pass_through",outcome="ok"} 60.0' in metrics
    listed = (await server.http("GET", "/v1/traces?limit=1000")).json()["data"]
    assert {one["id"] for one in listed} == set(ids)
    await server.end()
    assert list((tmp_path / "traces.sqlite3.spool").iterdir()) == []


async def test_a_trace_is_found_through_every_worker_at_once(start: Start) -> None:
    server = await start()
    for _ in range(8):
        trace_id = (await server.ask()).json()["fusion"]["trace_id"]
        assert codes([await server.http("GET", f"/v1/traces/{trace_id}") for _ in range(4)]) == {200: 4}
        feedback = await server.http("POST", f"/v1/traces/{trace_id}/feedback", json={"score": 1})
        assert feedback.json()["feedback"] == [{"score": 1}]


async def test_a_silent_worker_is_named_by_the_other(start: Start) -> None:
    server = await start()
    silent = server.workers()[0]
    silent.suspend()

    async def named() -> bool:
        try:
            async with asyncio.timeout(1):  # the connection may be that worker's
                ready = await server.http("GET", "/readyz")
        except TimeoutError:
            return False
        return ready.status_code == 200 and any("has said nothing for" in one for one in ready.json()["problems"])

    await server.until(named)
    silent.resume()


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)])
async def test_a_signal_ends_all_and_lets_requests_finish(
    start: Start, upstream: FakeUpstream, how: signal.Signals, code: int
) -> None:
    server = await start()
    workers = server.workers()
    hold = upstream.models["alpha"].hold = asyncio.Event()
    asked = [asyncio.create_task(server.ask()) for _ in range(MANY)]
    await upstream.wait_asked("alpha", MANY)
    ending = asyncio.create_task(server.end(how))
    await asyncio.sleep(0.2)
    hold.set()
    assert codes(await asyncio.gather(*asked)) == {200: MANY}
    assert await ending == code
    assert not any(one.is_running() for one in workers)


async def test_workers_end_with_their_parent(start: Start) -> None:
    server = await start()
    workers = server.workers()
    await server.end(signal.SIGKILL)
    _, alive = await asyncio.to_thread(psutil.wait_procs, workers, 30)
    assert alive == []


def refused(folder: Path, *arguments: str, **keys: Any) -> str:
    """What a gateway says that does not start."""
    member = {"name": "a", "base_url": "http://127.0.0.1:9/v1", "model": "m", **keys}
    path = folder / "fusion.yaml"
    path.write_text(yaml.safe_dump({"members": [member], "trace_db": str(folder / "t.sqlite3")}))
    done = subprocess.run(
        [*MIXFUSE, *(argument.replace("CONFIG", str(path)) for argument in arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=folder,
    )
    assert done.returncode == 2
    return done.stderr


def test_what_workers_cannot_do_is_refused_in_one_line(tmp_path: Path) -> None:
    said = refused(tmp_path, "gateway", "CONFIG", "--port=0", "--workers=3", max_concurrency=2)
    assert said.startswith("mixfuse: error: max_concurrency 2 of 'm' cannot be divided among 3 workers")
    assert len(said.splitlines()) == 1
    assert "--workers" in refused(tmp_path, "gateway", "CONFIG", "--workers=0")
    assert "--workers" in refused(tmp_path, "serve", "CONFIG", "--workers=2")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "cannot listen on" in refused(tmp_path, "gateway", "CONFIG", f"--port={port}", "--workers=2")
    # What only a worker finds out is said by the parent, once.
    said = refused(tmp_path, "gateway", "CONFIG", "--port=0", "--workers=2", role="judge", base_url=None, model=None)
    assert said.count("this gateway has no server beside it") == 1


SPEND = """
import sys
from mixfuse.fusion.calls.board import SharedBoard
from mixfuse.fusion.calls.ledger import Spend
from mixfuse.fusion.http.key_limits import KeyBudget
board = SharedBoard(int(sys.argv[1]), int(sys.argv[2]), 3)
budget = KeyBudget("k", "jane", "total", max_cost=None, max_tokens=5000, board=board)
print(sum(budget.take(Spend(0.0, 1)) for _ in range(4000)))
"""


def test_processes_at_once_take_a_budget_to_the_last_token() -> None:
    memory = SharedBoard.create(3)
    command = [sys.executable, "-c", SPEND, str(memory)]
    running = [
        subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, pass_fds=[memory]) for number in range(3)
    ]
    taken = [int(one.communicate(timeout=60)[0]) for one in running]
    assert sum(taken) == 5000
    budget = KeyBudget("k", "jane", "total", max_cost=None, max_tokens=5000, board=SharedBoard(memory, 0, 3))
    assert budget.used == Spend(0.0, 5000)
    os.close(memory)


def test_what_a_killed_worker_spent_counts_until_it_is_in_the_database(tmp_path: Path) -> None:
    memory = SharedBoard.create(2)
    with opened(tmp_path / "traces.sqlite3") as database:
        made, _ = create(database, "jane", max_tokens=100, period="total")
        killed, other = (KeyRing(database, "auto", board=SharedBoard(memory, number, 2)) for number in (0, 1))
        killed.admit(made).add(Spend(0.0, 70))  # 30 are in its spool, 40 are reserved
        killed.committing().__enter__()
        assert not other.admit(made).take(Spend(0.0, 31))
        replacing = KeyRing(database, "auto", board=SharedBoard(memory, 0, 2))
        assert not other.admit(made).take(Spend(0.0, 31))
        left = Spent(made.id, "2026-01-01", Spend(0.0, 30))
        replacing.adopt([left])
        assert other.admit(made).used.tokens == 30
        with replacing.committing():
            replacing.committed(left)
        assert other.admit(made).used.tokens == 30
        assert other.admit(made).take(Spend(0.0, 70))
        with pytest.raises(CallError, match="100 of 100 tokens"):
            replacing.admit(made)
    os.close(memory)
