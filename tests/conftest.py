"""Which tests run, and beside which.

Tests marked `slow` are left out unless asked for: `scripts/test --slow`. `scripts/test` runs two processes. All tests
of a file are run by one of them: they share a gateway or an engine. So are the tests that look at one training run.
"""

import inspect

import httpx
import pytest

# A busy machine is no failure: a request of a test waits longer than httpx's 5 s. All its clients share this default.
_TIMEOUT: httpx.Timeout = inspect.signature(httpx.get).parameters["timeout"].default
_TIMEOUT.connect = _TIMEOUT.read = _TIMEOUT.write = _TIMEOUT.pool = 60.0

# Fixtures of the whole session that take long.
_RUNS = {"sft_by_one", "sft_by_two", "stopped_early", "judge_by_one", "judge_by_two"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        runs = _RUNS.intersection(getattr(item, "fixturenames", ()))
        item.add_marker(pytest.mark.xdist_group("training runs" if runs else item.location[0]))
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with scripts/test --slow"))
