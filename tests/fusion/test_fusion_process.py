"""The gateway as a process: what SIGTERM and SIGKILL leave behind, and the keys and traces commands beside it."""

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from fake_upstream import FakeUpstream, Script
from fusion_harness import MIXFUSE, Gateway, config_keys, prefers, start_process

from mixfuse.contracts.strict_yaml import validate
from mixfuse.fusion.config import FusionConfig

HELLO: list[Any] = [{"role": "user", "content": "why?"}]
BEST: dict[str, Any] = {"model": "fusion/best-of", "messages": HELLO}


@dataclass
class Process:
    """A running `mixfuse gateway`."""

    process: asyncio.subprocess.Process
    gateway: Gateway

    async def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return await asyncio.wait_for(self.process.wait(), 60)


Start = Callable[..., Awaitable[Process]]


@pytest.fixture
async def start(upstream: FakeUpstream, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts `mixfuse gateway` over the fake upstream; keywords are keys of its config."""
    running: list[Process] = []
    async with AsyncExitStack() as stack:

        async def run(*overrides: str, env: dict[str, str] | None = None, **keys: Any) -> Process:
            process, line = await start_process(tmp_path, config_keys(upstream, tmp_path, **keys), *overrides, env=env)
            found = Process(process, Gateway(line.split()[1].removesuffix("/v1")))
            stack.push_async_callback(found.gateway.close)
            running.append(found)
            return found

        try:
            yield run
        finally:
            for one in running:
                if one.process.returncode is None:
                    await one.end(signal.SIGKILL)


def mixfuse(folder: Path, *arguments: object) -> str:
    """Runs a command beside the gateway's database; returns what it printed."""
    done = subprocess.run(
        [*MIXFUSE, *map(str, arguments), "--db", folder / "traces.sqlite3"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def stored(folder: Path) -> set[str]:
    connection = sqlite3.connect(folder / "traces.sqlite3")
    found = {row[0] for row in connection.execute("SELECT id FROM traces")}
    connection.close()
    return found


async def test_sigterm_lets_requests_finish_and_loses_no_trace(
    start: Start, upstream: FakeUpstream, tmp_path: Path
) -> None:
    server = await start()
    hold = upstream.models["gamma"].hold = asyncio.Event()
    upstream.models["gamma"].hold_from = 21
    done = await asyncio.gather(*(server.gateway.post(**BEST) for _ in range(20)))
    asking = asyncio.create_task(server.gateway.post(**BEST))
    await upstream.wait_asked("gamma", 21)
    ending = asyncio.create_task(server.end(signal.SIGTERM))
    await asyncio.sleep(0.1)
    hold.set()
    done.append(await asking)
    await ending
    assert {one.status_code for one in done} == {200}
    assert stored(tmp_path) == {one.json()["fusion"]["trace_id"] for one in done}
    assert list((tmp_path / "traces.sqlite3.spool").iterdir()) == []


async def test_sigkill_costs_no_more_than_the_requests_under_way(
    start: Start, upstream: FakeUpstream, tmp_path: Path
) -> None:
    server = await start()
    upstream.models["gamma"].hold = asyncio.Event()
    upstream.models["gamma"].hold_from = 31
    done = await asyncio.gather(*(server.gateway.post(**BEST) for _ in range(30)))
    asking = asyncio.create_task(server.gateway.post(**BEST))
    await upstream.wait_asked("gamma", 31)
    done.append(await server.gateway.post(model="alpha", messages=HELLO))
    server.process.kill()  # at once: the last answer is milliseconds old
    await server.process.wait()
    await asyncio.gather(asking, return_exceptions=True)
    again = await start()
    answered = {one.json()["fusion"]["trace_id"] for one in done}
    listed = (await again.gateway.http.get("/v1/traces", params={"limit": 1000})).json()["data"]
    assert {one["id"] for one in listed} == answered
    assert len(answered) == 31
    await again.end(signal.SIGTERM)
    assert stored(tmp_path) == answered


async def test_requests_that_never_end_are_cut_off_with_a_trace(
    start: Start, upstream: FakeUpstream, tmp_path: Path
) -> None:
    server = await start("--drain-s=1")
    upstream.models["alpha"].hold = asyncio.Event()
    asking = asyncio.create_task(server.gateway.post(model="alpha", messages=HELLO))
    await upstream.wait_asked("alpha")
    await server.end(signal.SIGTERM)
    await upstream.wait_aborted("alpha")
    await asyncio.gather(asking, return_exceptions=True)
    connection = sqlite3.connect(tmp_path / "traces.sqlite3")
    (record,) = connection.execute("SELECT record FROM traces").fetchone()
    connection.close()
    assert [call["outcome"] for call in json.loads(record)["calls"]] == ["cancelled"]


def test_a_keys_name_is_printed_as_it_is_or_refused(tmp_path: Path) -> None:
    names = ["[/red]", "[bold]x", "a:smile:b", "[link=x]", "\\[/]"]
    for name in names:
        mixfuse(tmp_path, "keys", "add", name)
    listing = mixfuse(tmp_path, "keys", "list")
    assert all(name in listing for name in names)
    with pytest.raises(subprocess.CalledProcessError) as refused:
        mixfuse(tmp_path, "keys", "add", "x\x1b[2J")
    assert refused.value.returncode == 2
    assert "cannot be printed" in refused.value.stderr


async def test_keys_made_beside_a_running_gateway_count_at_once(
    start: Start, upstream: FakeUpstream, tmp_path: Path
) -> None:
    server = await start(env={"MIXFUSE_ADMIN_KEY": "admin-secret"})
    http = server.gateway.http
    assert (await http.get("/v1/models")).status_code == 200  # open: there is no key
    secret = (await asyncio.to_thread(mixfuse, tmp_path, "keys", "add", "jane", "--rate", 1000)).strip()
    async with asyncio.timeout(30):
        while (await http.get("/v1/models")).status_code != 401:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    http.headers["authorization"] = f"Bearer {secret}"
    answer = await server.gateway.post(**BEST)
    assert answer.status_code == 200
    assert (await http.get("/metrics")).status_code == 401
    http.headers["authorization"] = "Bearer admin-secret"
    assert (await http.get("/metrics")).status_code == 200
    assert (await server.gateway.post(**BEST)).status_code == 401  # the admin key is no API key
    assert len((await http.get("/v1/traces")).json()["data"]) == 1  # but sees all traces
    listing = await asyncio.to_thread(mixfuse, tmp_path, "keys", "list")
    assert "jane" in listing
    assert f"{answer.json()['usage']['total_tokens']} tokens" in listing.replace("\n", " ")
    assert "revoked" in await asyncio.to_thread(mixfuse, tmp_path, "keys", "revoke", "jane")
    http.headers["authorization"] = f"Bearer {secret}"
    async with asyncio.timeout(30):
        while (await http.get("/v1/models")).status_code != 401:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await server.end(signal.SIGTERM)
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert server.process.stderr is not None
    everything += await server.process.stderr.read()
    assert secret.removeprefix("mf-").encode() not in everything


async def test_traces_become_preference_pairs(start: Start, upstream: FakeUpstream, tmp_path: Path) -> None:
    upstream.models["judge"].verdict = prefers("right")
    server = await start()
    for number in range(6):
        upstream.models["alpha"] = Script(f"wrong {number}")
        upstream.models["beta"] = Script(f"right {number}")
        upstream.models["gamma"] = Script(f"nobody says of {number}")
        body = (
            await server.gateway.post(
                model="fusion/best-of", messages=[{"role": "user", "content": f"Question {number}?"}]
            )
        ).json()
        feedback = {"correct": [1], "wrong": [0]}
        path = f"/v1/traces/{body['fusion']['trace_id']}/feedback"
        assert (await server.gateway.http.post(path, json=feedback)).status_code == 200
    await server.gateway.post(**BEST)  # of which nothing is known
    assert len(await server.gateway.first_traces()) == 7  # a list is given once what it lists is in the database
    printed = await asyncio.to_thread(mixfuse, tmp_path, "traces", "export", "--out", tmp_path / "pool.jsonl")
    assert "traces 7, rows 6, right 6, wrong 6" in printed
    rows = [json.loads(line) for line in (tmp_path / "pool.jsonl").read_text().splitlines()]
    assert rows[0]["prompt"] == "Question 0?"
    assert rows[0]["responses"] == [
        {"model": "alpha", "text": "wrong 0", "correct": False},
        {"model": "beta", "text": "right 0", "correct": True},
    ]
    done = await asyncio.to_thread(
        subprocess.run,
        [*MIXFUSE, "pairs", "build", tmp_path / "pool.jsonl", "--out", tmp_path / "pairs.jsonl", "--dev-share", "0"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "12 training rows" in done.stdout  # six pairs in both orders
    judged = await asyncio.to_thread(
        mixfuse, tmp_path, "traces", "export", "--label", "judge", "--out", tmp_path / "judged.jsonl"
    )
    assert "traces 7, rows 7, right 7, wrong 14" in judged


OPERATIONS = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_the_operations_page_is_true(start: Start, upstream: FakeUpstream, tmp_path: Path) -> None:
    config, *others = re.findall(r"^```yaml\n(.*?)^```$", OPERATIONS, re.MULTILINE | re.DOTALL)
    for part in others:  # each is a config with the members of the first
        validate(yaml.safe_load(config) | yaml.safe_load(part), FusionConfig, source="docs/operations.md")
    upstream.models |= {"small-1": Script("six"), "large-1": Script("24"), "judge-1": Script(verdict=prefers("24"))}
    server = await start(
        env={"MIXFUSE_ADMIN_KEY": "admin"},
        **yaml.safe_load(config.replace("https://models.example/v1", upstream.base_url)),
    )
    body = (await server.gateway.post(**BEST)).json()
    path = f"/v1/traces/{body['fusion']['trace_id']}/feedback"
    assert (await server.gateway.http.post(path, json={"score": 1})).status_code == 200
    commands = "\n".join(re.findall(r"^```bash\n(.*?)^```$", OPERATIONS, re.MULTILINE | re.DOTALL))
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-euo",
        "pipefail",
        "-c",
        commands.replace("http://127.0.0.1:8080", server.gateway.url).replace("mixfuse ", f"{shlex.join(MIXFUSE)} "),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        | {"MIXFUSE_ADMIN_KEY": "admin"},
    )
    printed = (await asyncio.wait_for(process.communicate(), 120))[0].decode()
    assert process.returncode == 0, printed
    assert "traces 1, rows 1, right 1, wrong 0" in printed
    named = set(re.findall(r"^\| `(mixfuse_\w+)` \|", OPERATIONS, re.MULTILINE))
    assert named == set(re.findall(r"^# TYPE (\w+) (?:counter|gauge|histogram)$", printed, re.MULTILINE)) - {
        name for name in re.findall(r"^# TYPE (\w+_created) gauge$", printed, re.MULTILINE)
    }


def test_commands_on_a_database_that_is_not_there_say_so(tmp_path: Path) -> None:
    for command in (["keys", "list"], ["keys", "revoke", "x"], ["traces", "export", "--out", str(tmp_path / "o")]):
        done = subprocess.run(
            [*MIXFUSE, *command, "--db", tmp_path / "none.sqlite3"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith("mixfuse: error: there is no database ")
    assert list(tmp_path.iterdir()) == []


def test_a_gateway_reachable_from_outside_wants_keys(tmp_path: Path) -> None:
    config = {
        "members": [{"name": "a", "base_url": "http://127.0.0.1:9/v1", "model": "m"}],
        "trace_db": str(tmp_path / "t.sqlite3"),
    }
    (tmp_path / "fusion.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [*MIXFUSE, "gateway", tmp_path / "fusion.yaml", "--host", "0.0.0.0", "--port", "0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"MIXFUSE_ADMIN_KEY": "admin"},
    )
    assert done.returncode == 2
    assert "there is no API key" in done.stderr


async def test_a_full_disk_is_seen_and_costs_no_trace(start: Start, upstream: FakeUpstream, tmp_path: Path) -> None:
    server = await start()
    ids = [(await server.gateway.post(**BEST)).json()["fusion"]["trace_id"]]
    assert (await server.gateway.http.get("/readyz")).status_code == 200
    process = psutil.Process(server.process.pid)
    before = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (0, before[1]))  # every write beyond the first byte fails, as on a full disk
    try:
        for _ in range(3):
            answer = await server.gateway.post(**BEST)
            assert answer.status_code == 200
            ids.append(answer.json()["fusion"]["trace_id"])
            ready = await server.gateway.http.get("/readyz")
            assert (ready.status_code, "the trace spool cannot be written" in ready.text) == (503, True)
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, before)
    async with asyncio.timeout(60):
        while (await server.gateway.http.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    await server.end(signal.SIGTERM)
    assert stored(tmp_path) == set(ids)
