"""The fake upstream and a gateway over it, for every test of the fusion room."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Script, fake_upstream, serving
from fusion_harness import FakeRoles, Gateway, StartGateway, config_keys

from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.http.gateway import create_app


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    async with fake_upstream(
        alpha=Script("the answer of alpha"),
        beta=Script("the answer of beta"),
        gamma=Script("the answer of gamma"),
        judge=Script(verdict=lambda first, second: 0.9 if "beta" in first else 0.1 if "beta" in second else 0.5),
        synth=Script("one merged answer in several words"),
    ) as fake:
        yield fake


@pytest.fixture
def config(upstream: FakeUpstream, tmp_path: Path) -> Callable[..., FusionConfig]:
    """Builds a config over the fake upstream; keywords replace or add keys."""

    def build(members: list[Any] | None = None, **keys: Any) -> FusionConfig:
        return FusionConfig.model_validate(config_keys(upstream, tmp_path, members, **keys))

    return build


@pytest.fixture
async def start_gateway(config: Callable[..., FusionConfig]) -> AsyncIterator[StartGateway]:
    """Starts a gateway; keywords as for `config`, and `roles`."""
    async with AsyncExitStack() as stack:

        async def start(members: list[Any] | None = None, *, roles: FakeRoles | None = None, **keys: Any) -> Gateway:
            url = await stack.enter_async_context(serving(create_app(config(members, **keys), roles)))
            gateway = Gateway(url)
            stack.push_async_callback(gateway.close)
            return gateway

        yield start


@pytest.fixture
async def gateway(start_gateway: StartGateway) -> Gateway:
    """A gateway over alpha, beta and gamma with a judge who likes beta."""
    return await start_gateway()
