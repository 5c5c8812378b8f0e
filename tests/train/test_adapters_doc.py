"""docs/adapters.md: a person comes from a finished run to a judge that serves, by the commands as they stand there."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hub_server
import pytest
import train_harness as harness
from hub_harness import shell
from train_harness import Run

PAGE = (harness.PROJECT / "docs" / "adapters.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.engine
@pytest.mark.slow
def test_the_pages_commands_lead_to_a_judge_that_serves(judge_by_one: Run, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "judge").symlink_to(judge_by_one.out)
    (tmp_path / "runs" / "base").symlink_to(tiny_base)
    (config,) = blocks("yaml")
    (tmp_path / "serve.yaml").write_text(config)
    *before, serving = blocks("bash")
    assert len(before) == 3
    # Without the parity gate's own engine, which tests/train/test_parity.py starts.
    before[0] = before[0].replace("verify runs/adapters/judge --base runs/base\n", "verify runs/adapters/judge\n")
    with hub_server.serving() as hub:
        environment = {**shell(hub, tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
        told = run("".join(before), tmp_path, environment)
        repo = hub.repos["my-org/judge"]
        assert repo.private
        assert len(repo.commits) == 2
        assert "nothing was sent" in told
        assert f"at commit {repo.branches['main']}" in told
        (tag,) = repo.tags
        with server(tmp_path, environment) as url:
            told = run(serving, tmp_path, {**environment, "MIXFUSE_URL": url})
    revision = tag.removeprefix("rev-")
    assert f"judge: base -> {revision}" in told
    assert "candidates ─" in told
    assert f"judge: {revision} -> base" in told


def test_its_links_and_the_files_it_names_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)", PAGE)
    assert links
    assert not [link for link in links if not (harness.PROJECT / "docs" / link).exists()]
    assert (harness.PROJECT / "tests" / "hub" / "hub_server.py").exists()


def test_the_version_it_names_is_the_one_that_was_tested() -> None:
    from importlib.metadata import version

    assert f"`huggingface_hub` {version('huggingface_hub')}" in PAGE


def run(script: str, folder: Path, environment: dict[str, str]) -> str:
    """Runs commands of the page in a shell; `mixfuse` is this project's."""
    define = f'mixfuse() {{ "{sys.executable}" -m mixfuse "$@"; }}\n'
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", define + script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert hub_server.TOKEN not in done.stdout + done.stderr
    return done.stdout


@contextmanager
def server(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """`mixfuse serve serve.yaml`, on a free port."""
    command = [
        sys.executable,
        "-m",
        "mixfuse",
        "serve",
        "serve.yaml",
        "gateway.port=0",
        "engine.start_timeout_s=900",
    ]
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"ready: (http://[\d.:]+)/v1", line):
                try:
                    yield found[1]
                finally:
                    process.send_signal(signal.SIGTERM)
                break
        else:
            pytest.fail("".join(lines))
        process.communicate(timeout=60)
        assert process.returncode == 0
