"""Paths that people write: expanded in one place, and no output takes the place of an input."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixfuse.cli import options
from mixfuse.cli.entry import build_parser, main
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.paths import check_output, expand, keep_apart


def test_home_and_variables_are_expanded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/a")
    monkeypatch.setenv("MODELS", "/m")
    assert expand("~/x") == "/home/a/x"
    assert expand("$MODELS/${MODELS}/y") == "/m//m/y"
    assert expand("a$$b/c$5") == "a$b/c$5"


@pytest.mark.parametrize("text", ["$NOT_SET_HERE/x", "${NOT_SET_HERE}", "~no-such-user/x", "a\0b", "${}", "\udc80"])
def test_what_cannot_be_expanded_is_refused(text: str):
    with pytest.raises(ValueError):
        expand(text)


@pytest.mark.parametrize("spelling", ["same", "dots", "link", "hard", "inside"])
def test_an_output_that_is_an_input_is_refused(spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "in.jsonl"
    source.write_text("{}\n")
    (tmp_path / "folder").mkdir()
    out, known = source, source
    if spelling == "dots":
        out = Path("folder/../in.jsonl")
    elif spelling == "link":
        out = tmp_path / "link"
        out.symlink_to(source)
    elif spelling == "hard":
        out = tmp_path / "hard"
        os.link(source, out)
    elif spelling == "inside":
        out, known = tmp_path / "folder" / "new" / "out", tmp_path / "folder"
    with pytest.raises(MixfuseError, match="another output path"):
        keep_apart([out], [known])
    keep_apart([tmp_path / "other"], [known])


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path: Path):
    file = tmp_path / "file"
    file.touch()
    for out, folder in ((file / "x", False), (file / "x" / "y", True), (tmp_path, False), (file, True)):
        with pytest.raises(MixfuseError, match="cannot write"):
            check_output(out, folder=folder)
    with pytest.raises(MixfuseError, match="no regular file"):
        check_output(Path("/dev/null"), folder=False)
    check_output(tmp_path / "new" / "x", folder=False)


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _parsers(below)


def test_every_output_of_every_command_is_known_as_one():
    outs = [
        action for parser in _parsers(build_parser()) for action in parser._actions if action.dest in ("out", "cache")
    ]
    assert len(outs) > 10
    assert all(action.type in (options.out_file, options.out_folder) for action in outs)


@pytest.mark.parametrize(
    "command",
    [
        ["pairs", "build", "in.jsonl", "--out", "./in.jsonl"],
        ["pairs", "build", "in.dev.jsonl", "--out", "in.jsonl"],
        ["tasks", "make", "in.jsonl", "--out", "in.jsonl"],
        ["combiner", "fit", "in.jsonl", "--out", "in.jsonl"],
        ["traces", "export", "--db", "in.jsonl", "--out", "in.jsonl"],
        ["adapter", "export", "folder", "folder/out"],
        ["eval", "judge", "--judge", "folder", "--data", "in.jsonl", "--cache", "in.jsonl"],
        ["combiner", "swap", "in.jsonl", "in.jsonl"],
        ["tasks", "make", "$NOT_SET_HERE/x.yaml", "--out", "new.jsonl"],
        ["tasks", "make", "in.jsonl", "--out", "in.jsonl/new.jsonl"],
    ],
    ids=" ".join,
)
def test_a_command_refuses_before_it_touches_anything(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    content = '{"prompt": "q", "responses": []}\n'
    for name in ("in.jsonl", "in.dev.jsonl"):
        Path(name).write_text(content)
    Path("folder").mkdir()
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "output" in said or "NOT_SET_HERE" in said or "is a file" in said
    assert Path("in.jsonl").read_text() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "in.dev.jsonl", "in.jsonl"]
