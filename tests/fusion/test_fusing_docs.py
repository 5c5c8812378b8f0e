"""docs/fusing.md: its commands run, and its table names figures that there are."""

import json
import re
import shlex
from pathlib import Path

import pytest
from combiner_pools import pool, write_pool

from mixfuse.cli.entry import main

PAGE = (Path(__file__).parents[2] / "docs" / "fusing.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^mixfuse (.*)$", PAGE, re.MULTILINE)


def test_the_commands_run_and_print_the_figures_that_the_page_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    accuracies = {"a": 0.7, "b": 0.65, "c": 0.65}
    write_pool(Path("pool.jsonl"), pool(150, accuracies))
    write_pool(Path("other.jsonl"), pool(150, accuracies, seed=1))
    assert [command.split()[:2] for command in COMMANDS] == [
        ["combiner", "report"],
        ["combiner", "fit"],
        ["eval", "fusion"],
    ]
    printed = []
    for command in COMMANDS:
        assert main(shlex.split(command)) == 0, command
        printed.append(capsys.readouterr().out.splitlines()[-1])
    fitted = json.loads(printed[1])
    named = [
        name for cells in re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE) for name in re.findall(r"`(\w+)`", cells)
    ]
    assert len(named) == 12
    assert set(named) <= fitted.keys()


def test_the_row_of_the_page_is_read(tmp_path: Path) -> None:
    from mixfuse.fusion.combiner.evidence import read_pool

    example = re.search(r"```json\n(.*?)\n```", PAGE, re.DOTALL)
    assert example
    (tmp_path / "pool.jsonl").write_text(example[1] + "\n")
    (question,), _ = read_pool([tmp_path / "pool.jsonl"])
    assert [(answer.member, answer.right) for answer in question.answers] == [("a", True), ("b", False)]
