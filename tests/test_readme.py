"""The README's commands, links and table, so that they cannot rot; `scripts/demo` does its first session."""

import asyncio
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fake_upstream import Script, fake_upstream, serving

from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.http.gateway import create_app

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line for _, block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]


def command_line(start: str) -> list[str]:
    """The one command of the README that starts so."""
    (line,) = [line for line in COMMANDS if line.startswith(start)]
    return shlex.split(line)


def run(*arguments: str) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_files_it_names_are_there():
    files = re.findall(r"`((?:configs|scripts|docs)/[\w./-]+)`", TEXT)
    assert len(files) > 3
    assert not [name for name in files if not (ROOT / name).exists()]


def test_the_plan_needs_neither_gpu_nor_weights():
    command = command_line("mixfuse plan ")
    printed = run(sys.executable, "-m", *command)
    assert "140.63 B parameters" in printed
    assert printed.rstrip().endswith("fits")


def test_the_launch_is_one_that_launch_writes():
    command = command_line("scripts/launch --torchrun")
    command[command.index("my_sft.yaml")] = "configs/tiny/domain_sft.yaml"
    printed = run(sys.executable, "-m", "mixfuse", "launch", "--dry-run", *command[1:])
    assert "--nnodes=2" in printed
    assert "--nproc-per-node=8" in printed


async def test_the_example_runs_against_a_gateway(tmp_path: Path):
    (example,) = [block for language, block in BLOCKS if language == "python"]
    async with fake_upstream(
        first=Script("six"),
        second=Script("There are 24 legs."),
        judge=Script(verdict=lambda first, second: 0.5 + 0.4 * (("24" in first) - ("24" in second))),
    ) as upstream:
        members = [{"name": name, "base_url": upstream.base_url, "model": name} for name in ("first", "second")]
        judge = {"base_url": upstream.base_url, "model": "judge"}
        config = FusionConfig.model_validate(
            {"members": members, "judge": judge, "trace_db": str(tmp_path / "traces.sqlite3")}
        )
        async with serving(create_app(config, None)) as url:
            script = example.replace("http://127.0.0.1:8080", url)
            assert url in script
            printed = await asyncio.to_thread(run, sys.executable, "-W", "error", "-c", script)
    assert printed == "There are 24 legs. judged\n"


@pytest.mark.parametrize("cell", re.findall(r"^\| (`mixfuse .*?) \|(?<!\\\|) ", TEXT, re.MULTILINE))
def test_every_command_of_the_table_is_one(cell: str):
    for number, code in enumerate(re.findall(r"`([^`]+)`", cell)):
        words = code.replace("\\|", "|").removeprefix("mixfuse ").split()
        names: list[str] = []
        for word in words:
            if not re.fullmatch(r"[a-z]+", word):
                break
            names.append(word)
        assert names, code
        printed = run(sys.executable, "-m", "mixfuse", *names, "--help")
        assert printed.startswith(f"usage: mixfuse {' '.join(names)}"), (number, code)


def test_the_figures_that_it_leads_with_are_those_of_the_page_that_explains_them():
    page = (ROOT / "docs" / "fusing.md").read_text(encoding="utf-8")
    explained = {row[0]: row[1:5] for row in map(cells, page.splitlines()) if len(row) == 5}
    shown = [row for row in map(cells, TEXT.splitlines()) if len(row) == 6 and row[0] in explained]
    assert len(shown) > 3
    for pool, *figures, _ in shown:
        assert figures == explained[pool]


def cells(line: str) -> list[str]:
    """The cells of a table's row; of another line one."""
    return [cell.strip() for cell in line.strip("| ").split("|")]
