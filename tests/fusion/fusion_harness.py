"""What the fusion tests share beside the fake upstream: a role table, a running gateway, a judge's taste."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from fake_upstream import FakeUpstream
from openai import AsyncOpenAI, OpenAI

from fusion.upstream import Endpoint
from mixfuse.errors import MixfuseError


def prefers(word: str) -> Callable[[str, str], float]:
    """A judge who likes answers with that word in them, wherever they stand."""
    return lambda first, second: 0.5 + 0.4 * ((word in first) - (word in second))


class FakeRoles:
    """A role table over the fake upstream; counts its leases."""

    def __init__(self, upstream: FakeUpstream, *roles: str) -> None:
        self._upstream, self._roles = upstream, roles
        self.leases: list[str] = []
        self.held = 0

    @asynccontextmanager
    async def lease(self, role: str) -> AsyncIterator[Endpoint]:
        if role not in self._roles:
            raise MixfuseError(f"role {role!r} is not served")
        self.leases.append(role)
        self.held += 1
        try:
            yield Endpoint(self._upstream.base_url, f"{role}@r1", revision="r1")
        finally:
            self.held -= 1

    def names(self) -> list[str]:
        return list(self._roles)


@dataclass
class Gateway:
    """A running gateway and the official clients for it."""

    url: str
    client: AsyncOpenAI
    sync_client: OpenAI
    http: httpx.AsyncClient

    async def post(self, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json=body)

    async def trace(self, fusion: dict[str, Any]) -> dict[str, Any]:
        return (await self.http.get(f"/v1/traces/{fusion['trace_id']}")).json()


StartGateway = Callable[..., Awaitable[Gateway]]
