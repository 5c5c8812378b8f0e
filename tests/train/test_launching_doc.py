"""The commands of docs/launching.md run as they stand there."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import train_harness as harness

DOC = (harness.PROJECT / "docs" / "launching.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```$", DOC, flags=re.DOTALL | re.MULTILINE)
DONE_ALREADY = ("scripts/setup", "source .venv/bin/activate")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with this project's scripts and configs in it, so that `runs/` is not the user's."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "scripts").mkdir()
    shutil.copy(harness.PROJECT / "scripts" / "launch", folder / "scripts" / "launch")
    (folder / "configs").symlink_to(harness.PROJECT / "configs")
    (folder / ".venv").symlink_to(harness.PROJECT / ".venv")
    return folder


def test_the_commands_of_the_document_run(elsewhere: Path) -> None:
    assert len(BLOCKS) == 7
    # tests/train/test_gpu_check.py runs the checks of one GPU.
    lines = [
        line
        for block in BLOCKS
        for line in block.splitlines()
        if line not in DONE_ALREADY and not line.startswith("scripts/gpu-check")
    ]
    script = "\n".join(["set -e", *lines])
    path = f"{elsewhere}/.venv/bin:{os.environ['PATH']}"
    environment = {**harness.ENVIRONMENT, "PATH": path, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(
        ["bash", "-c", script], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("all is well") == 2
    assert done.stdout.count("-m mixfuse.train.processes.graceful_torchrun") == 4
    assert done.stdout.count("-m deepspeed.launcher.runner") == 1
    assert "#SBATCH --partition=gpu" in done.stdout


def test_the_exit_codes_of_the_document_are_the_ones_of_the_code() -> None:
    from mixfuse.contracts.errors import PREEMPTED, MixfuseError
    from mixfuse.train.processes.heartbeat import EXIT_CODE, SILENCE

    rows = {cells[1].strip(): cells for line in DOC.splitlines() if len(cells := line.split("|")) == 6}
    codes = {name: cells[3].strip() for name, cells in rows.items()}
    assert codes["SIGTERM: preemption, the time limit, `kill`"] == str(PREEMPTED)
    assert codes["The disk is full"] == str(MixfuseError.exit_code)
    assert codes["A machine freezes or loses its network"] == f"{MixfuseError.exit_code} (the rank: {EXIT_CODE})"
    assert f"after {SILENCE:.0f} s without" in rows["A machine freezes or loses its network"][2]
