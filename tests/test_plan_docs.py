"""What the docs and the recipes' headers say of memory is what the planner says."""

import re
import shlex
from pathlib import Path

import pytest

from mixfuse.cli.entry import main

ROOT = Path(__file__).parent.parent
DOC = ROOT / "docs" / "planning.md"
WITHOUT_MEMORY = ("fusion", "pairs", "tasks")
"""Configs that need no memory of their own."""
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*/*.yaml") if path.stem not in WITHOUT_MEMORY)
HEADER = re.compile(r"^# Memory: +(.*)$", re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    """Returns each command of the docs' console blocks with its documented output."""
    examples = []
    for block in re.findall(r"^```console\n(.*?)^```", DOC.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            joined = part.replace("\\\n", " ")
            command, _, printed = joined.partition("\n")
            examples.append((command, printed.rstrip()))
    return examples


def printed(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    program, *arguments = shlex.split(command)
    assert program == "mixfuse"
    monkeypatch.chdir(ROOT)
    status = main(arguments)
    told = capsys.readouterr()
    assert status == ("does NOT fit" in told.out or "which does not fit" in told.out), told.err
    return told.out.rstrip()


def test_the_docs_show_what_the_commands_print(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = commands()
    for command, output in shown:
        assert printed(command, capsys, monkeypatch) == output, command
    text = "\n".join(output for _, output in shown)
    assert "base 140.63 B parameters (281.3 GB)" in text
    assert "trained 475.3 M (0.95 GB)" in text
    nodes = {re.search(r"--nodes (\d)", command) for command, _ in shown}
    assert {match[1] for match in nodes if match} == {"1", "2", "4"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipes_header_is_the_planners(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To renew a header, run its command with --header."""
    memory_line = HEADER.search(path.read_text(encoding="utf-8"))
    assert memory_line, f"{path}: the header has no memory line"
    command = re.search(r"`(mixfuse plan .*)`", memory_line[1])
    assert command, f"{path}: the header's memory names no `mixfuse plan` command"
    assert str(path.relative_to(ROOT)) in command[1]
    assert printed(f"{command[1]} --header", capsys, monkeypatch) == memory_line[1]
