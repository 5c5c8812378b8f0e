"""The memory that the docs and the headers of the configs name is what `mixfuse plan` prints."""

import re
import shlex
from pathlib import Path

import pytest

from mixfuse.cli.entry import main

ROOT = Path(__file__).parent.parent
DOC = ROOT / "docs" / "planning.md"
# Other configs (members of a fusion, sources of pairs, tasks) take no memory that can be planned.
PLANNED = sorted(path for stem in ("domain_sft", "judge_dpo", "serve*") for path in ROOT.glob(f"configs/*/{stem}.yaml"))
HEADER = re.compile(r"^# Memory: +(.*)$", re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    """Each command of the docs' console blocks, with the output shown below it."""
    shown = []
    for block in re.findall(r"^```console\n(.*?)^```", DOC.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            joined = part.replace("\\\n", " ")
            command, _, printed = joined.partition("\n")
            shown.append((command, printed.rstrip()))
    return shown


def printed(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    program, *arguments = shlex.split(command)
    assert program == "mixfuse"
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out.rstrip()


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


def test_each_model_has_recipes_and_a_serve_config() -> None:
    assert {path.parent.name for path in PLANNED} == {"tiny", "mixtral-8x7b", "mixtral-8x22b"}
    for path in PLANNED:
        assert {"domain_sft.yaml", "judge_dpo.yaml", "serve.yaml"} <= {file.name for file in path.parent.iterdir()}


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_header_names_the_planned_memory(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To renew a header, run its command with --header."""
    (memory,) = HEADER.findall(path.read_text(encoding="utf-8"))
    command = re.search(r"GiB.*`(mixfuse plan .*)`", memory)
    assert command, "the line names no memory or no `mixfuse plan` command"
    assert str(path.relative_to(ROOT)) in command[1]
    assert printed(f"{command[1]} --header", capsys, monkeypatch) == memory
