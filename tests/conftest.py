"""Which tests run, and beside which; and databases for tests of all folders.

Tests marked `slow` are left out unless asked for: `scripts/test --slow`. `scripts/test` runs two processes of pytest.
All tests of a file run in one of them, because they share a gateway or an engine; so do tests that look at one
training run, in whatever file.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from postgres import Postgres, emptied, postgres

# A busy machine is no failure: a request of a test waits longer than httpx's 5 s. All its clients share this default.
_TIMEOUT: httpx.Timeout = inspect.signature(httpx.get).parameters["timeout"].default
_TIMEOUT.connect = _TIMEOUT.read = _TIMEOUT.write = _TIMEOUT.pool = 60.0


# Training runs of a whole session, each of which takes 20 seconds or more.
_TRAINED = {"sft_by_one", "sft_by_two", "stopped_early", "judge_by_one", "judge_by_two"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            trained = _TRAINED.intersection(getattr(item, "fixturenames", ()))
            item.add_marker(pytest.mark.xdist_group("trained" if trained else item.location[0]))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
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
