"""Databases for tests of all folders. Tests marked `slow` are left out unless asked for: `scripts/test --slow`."""

import inspect
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from postgres import Postgres, emptied, postgres

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


@pytest.fixture(scope="session")
def server() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return str(tmp_path / "traces.sqlite3")
    return emptied(request.getfixturevalue("server"))
