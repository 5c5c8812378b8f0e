"""Tests marked `slow` are left out unless asked for: `scripts/test --slow`."""

import inspect

import httpx
import pytest

# A busy machine is no failure: a request of a test waits longer than httpx's 5 s. All its clients share this default.
_TIMEOUT: httpx.Timeout = inspect.signature(httpx.get).parameters["timeout"].default
_TIMEOUT.connect = _TIMEOUT.read = _TIMEOUT.write = _TIMEOUT.pool = 60.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with scripts/test --slow"))
