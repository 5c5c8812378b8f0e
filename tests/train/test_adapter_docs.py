"""The commands of docs/adapter-directory.md, run from top to bottom."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import train_harness as harness

from mixfuse.cli.entry import main

PAGE = (harness.PROJECT / "docs" / "adapter-directory.md").read_text(encoding="utf-8")


def test_its_commands_do_what_they_say(
    peft_adapter: Callable[..., Path],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for role in ("judge", "domain"):
        run = tmp_path / "runs" / role
        shutil.copytree(peft_adapter(experts=role == "judge"), run / "adapter")
        (run / "recipe.json").write_text("{}")
        (run / "run.json").write_text(json.dumps({"base": str(tiny_base), "role": role}))
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```\n(mixfuse adapter .*?)```", PAGE, re.DOTALL)
    commands = block.splitlines()
    assert len(commands) == 8
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, (command, capsys.readouterr().err)
    for path in ("heat.png", "models/domain/config.json", "keys/release.pub"):
        assert Path(path).is_file()


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links
    assert not [link for link in links if not (harness.PROJECT / "docs" / link).exists()]
