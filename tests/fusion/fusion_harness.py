"""What the fusion tests share beside the fake upstream: a role table, a running gateway, a judge's taste."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import yaml
from fake_upstream import FakeUpstream
from openai import AsyncOpenAI, OpenAI

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import Calibration
from mixfuse.fusion.calls.upstream import Endpoint

MIXFUSE = (sys.executable, "-m", "mixfuse")


def prefers(word: str) -> Callable[[str, str], float]:
    """A judge who likes answers with that word in them, wherever they stand."""
    return lambda first, second: 0.5 + 0.4 * ((word in first) - (word in second))


def summed(trace: dict[str, Any]) -> dict[str, Any]:
    """A trace's usage: the sum over its calls."""
    prompt = sum(call["usage"]["prompt_tokens"] for call in trace["calls"])
    completion = sum(call["usage"]["completion_tokens"] for call in trace["calls"])
    reasoning = sum(call["usage"]["reasoning_tokens"] for call in trace["calls"])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def config_keys(upstream: FakeUpstream, folder: Path, members: list[Any] | None = None, **keys: Any) -> dict[str, Any]:
    """The keys of a config over the fake upstream, with its traces in the folder; keywords replace or add keys.

    A member is a name, or keys: with a `price`, say, but no place, it is at the fake upstream, too.
    """

    def at(model: str) -> dict[str, Any]:
        return {"base_url": upstream.base_url, "model": model}

    def member(one: Any) -> dict[str, Any]:
        keys = {"name": one} if isinstance(one, str) else one
        return keys if {"role", "base_url"} & keys.keys() else {**at(keys["name"]), **keys}

    chosen = ["alpha", "beta", "gamma"] if members is None else members
    if "://" in str(keys.get("trace_db")):  # else beside the tests of the same server, one of which kills gateways
        keys["traces"] = {"spool": str(folder / "spool"), **keys.get("traces", {})}
    return {
        "members": [member(one) for one in chosen],
        "judge": at("judge"),
        "synthesizer": at("synth"),
        "trace_db": str(folder / "traces.sqlite3"),
        **keys,
    }


async def start_process(
    folder: Path, config: dict[str, Any], *options: str, env: Mapping[str, str] | None = None
) -> tuple[asyncio.subprocess.Process, str]:
    """Starts `mixfuse gateway` with a config in the folder; returns the process and the line that says it is ready."""
    (folder / "fusion.yaml").write_text(yaml.safe_dump(config))
    process = await asyncio.create_subprocess_exec(
        *MIXFUSE,
        "gateway",
        folder / "fusion.yaml",
        "--port=0",
        *options,
        stderr=asyncio.subprocess.PIPE,
        cwd=folder,
        env=os.environ | (env or {}),
    )
    assert process.stderr is not None
    async with asyncio.timeout(60):
        line = (await process.stderr.readline()).decode()
    assert line.startswith("ready: http://"), line + (await process.stderr.read()).decode()
    return process, line


class FakeRoles:
    """A role table over the fake upstream; counts its leases."""

    def __init__(self, upstream: FakeUpstream, *roles: str) -> None:
        self._upstream, self._roles = upstream, roles
        self.leases: list[str] = []
        self.revision = "r1"
        self.calibration: Calibration | None = None
        self.held = 0

    @asynccontextmanager
    async def lease(self, role: str) -> AsyncIterator[Endpoint]:
        if role not in self._roles:
            raise MixfuseError(f"role {role!r} is not served")
        self.leases.append(role)
        self.held += 1
        try:
            name = f"{role}@{self.revision}"
            yield Endpoint(self._upstream.base_url, name, revision=self.revision, calibration=self.calibration)
        finally:
            self.held -= 1

    def names(self) -> list[str]:
        return list(self._roles)


class Gateway:
    """A running gateway, and what talks to it: plain HTTP and the official clients."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.AsyncClient(base_url=url, timeout=60, verify=False)

    @cached_property
    def client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    @cached_property
    def sync_client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    async def post(self, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json=body)

    async def trace(self, fusion: dict[str, Any]) -> dict[str, Any]:
        return (await self.http.get(f"/v1/traces/{fusion['trace_id']}")).json()

    async def first_traces(self) -> list[dict[str, Any]]:
        """Waits until a trace is stored: one of a client who left is stored when nobody waits for it."""
        async with asyncio.timeout(30):
            while True:
                if found := (await self.http.get("/v1/traces")).json()["data"]:
                    return found
                await asyncio.sleep(0.01)

    async def metrics(self) -> dict[str, float]:
        """The metrics, by name and labels as Prometheus writes them."""
        lines = (await self.http.get("/metrics")).text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    async def until_metric(self, name: str, value: float) -> None:
        """Waits until a metric has that value."""
        async with asyncio.timeout(30):
            while (await self.metrics()).get(name) != value:  # noqa: ASYNC110 - it is another process's
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        await self.http.aclose()
        if "client" in vars(self):
            await self.client.close()
        if "sync_client" in vars(self):
            self.sync_client.close()


StartGateway = Callable[..., Awaitable[Gateway]]
