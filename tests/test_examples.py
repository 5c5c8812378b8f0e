"""Every command that the README, the docs and the configs show is one that the parser takes.

The Python examples run against a gateway: the README's in test_readme.py, those of docs/api.md in
fusion/test_fusion_docs.py.
"""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from mixfuse.cli import entry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class _ParsedError(Exception):
    """Raised instead of running the command."""


def arguments_of(line: str) -> list[str] | None:
    """The arguments of a line that calls `mixfuse`, directly or by scripts/launch; None for another program."""
    words = shlex.split(line.removeprefix("$ "), comments=True)
    for end in (">", "|", "&&", ";", "&"):
        words = words[: words.index(end)] if end in words else words
    if words[:3] == ["python", "-m", "mixfuse"]:
        return words[3:]
    if words[:1] == ["mixfuse"]:
        return words[1:]
    if words[:1] == ["scripts/launch"]:
        return ["launch", *words[1:]]
    return None


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.replace("\\\n", " ").splitlines()]


def examples() -> Iterator[tuple[str, str]]:
    """File and command line, for every command in a code block of a page and in the header of a config."""
    for path in PAGES:
        for language, block in BLOCK.findall(path.read_text(encoding="utf-8")):
            if language in ("", "bash", "console", "text"):
                for line in lines_of(block):
                    if re.match(r"(\$ )?(mixfuse|python -m mixfuse|scripts/launch) ", line):
                        yield str(path.relative_to(ROOT)), line
    for path in CONFIGS:
        header = path.read_text(encoding="utf-8").split("\n\n")[0]
        for line in re.findall(r"^#(?: Launch:)? +((?:mixfuse|scripts/launch) .*)$", header, re.MULTILINE):
            yield str(path.relative_to(ROOT)), line.split(", ")[0]


EXAMPLES = list(dict.fromkeys(examples()))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The arguments as the command line's own parser takes them; nothing is run."""
    real = entry.read_words
    parsed: list[argparse.Namespace] = []

    def stop(parser: argparse.ArgumentParser, words: list[str]) -> None:
        parsed.append(real(parser, words))
        raise _ParsedError

    with patch.object(entry, "read_words", stop), pytest.raises(_ParsedError):
        entry.main(arguments)
    return parsed[0]


def test_the_examples_are_found() -> None:
    pages = {page for page, _ in EXAMPLES}
    assert {"README.md", "docs/operations.md", "docs/training.md", "docs/launching.md"} <= pages
    assert {str(path.relative_to(ROOT)) for path in CONFIGS if path.stem != "tasks"} <= pages


@pytest.mark.parametrize(("page", "line"), EXAMPLES)
def test_a_command_is_one_that_the_parser_takes(page: str, line: str) -> None:
    arguments = arguments_of(line)
    assert arguments, f"{page}: {line!r} is no command of mixfuse"
    parsed = parse(arguments)
    assert callable(parsed.command)
    # Paths into the project's own folders exist.
    for word in arguments:
        if re.match(r"(configs|scripts|docs)/", word):
            assert (ROOT / word).exists(), f"{page}: {word} does not exist"
    # What is launched is a command of its own.
    if arguments[0] == "launch":
        assert callable(parse(parsed.arguments).command)


def test_a_wrong_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("mixfuse roles swop judge adapters/judge", "mixfuse plan configs/tiny/serve.yaml --node 2x"):
        with pytest.raises(SystemExit):
            parse(arguments_of(line) or [])
    assert "swop" in capsys.readouterr().err


def test_every_python_example_is_run_by_a_test() -> None:
    pages = {path.name for path in PAGES for language, _ in BLOCK.findall(path.read_text()) if language == "python"}
    assert pages == {"README.md", "api.md"}
