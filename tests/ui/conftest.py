"""One Chromium for each module of tests, and a tab for each test."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from browsing import Watched, chromium
from playwright.sync_api import Browser, expect

# A page that refreshes itself every five seconds, on a busy machine.
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def tab(browser: Browser) -> Iterator[Callable[..., Watched]]:
    """Opens tabs of their own session; at the end none of them may have complained."""
    opened: list[Watched] = []

    def new(**options: Any) -> Watched:
        opened.append(Watched(browser, **options))
        return opened[-1]

    yield new
    for one in opened:
        one.context.close()
    assert [complaint for one in opened for complaint in one.complaints] == []
