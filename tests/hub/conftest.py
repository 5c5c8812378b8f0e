"""A Hub that runs here, and the command line beside it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_server
import pytest
from hub_harness import Run, make, shell
from hub_server import TOKEN, Hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server.serving() as running:
        yield running


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return shell(hub, tmp_path / "hf")


@pytest.fixture
def mixfuse(environment: dict[str, str]) -> Run:
    """Runs `mixfuse adapter …`; keywords change the environment, None takes a variable out."""

    def run(*arguments: str | Path, **changes: str | None) -> "subprocess.CompletedProcess[str]":
        mine = {name: value for name, value in {**environment, **changes}.items() if value is not None}
        command = [sys.executable, "-m", "mixfuse", "adapter", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=mine, check=False)
        assert TOKEN not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    return make(tmp_path / "judge")
