"""The files that the pages name exist, and docs/architecture.md draws the folders that there are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
FOLDERS = ("contracts", "train", "serve", "fusion", "mixfuse", "benchmarks", "tests", "scripts", "configs", "docs")
FILE = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*-]+\.(?:py|md|yaml|json)\b")
# A file of ours by its name alone, as in the tree of docs/architecture.md.
BARE = re.compile(r"(?<![\w./*-])([a-z_*]+\.py)\b")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def missing_files(text: str) -> list[str]:
    """The files of the project that a text names by their path, and that do not exist."""
    return [name for name in FILE.findall(text) if not any(ROOT.glob(name))]


def tree() -> dict[str, str]:
    """Each folder in the tree of docs/architecture.md, with its lines."""
    match = re.search(r"^## The rooms\n\n```\n(.*?)^```", ARCHITECTURE, re.MULTILINE | re.DOTALL)
    assert match
    lines: dict[str, str] = {}
    room = folder = ""
    for line in match[1].splitlines():
        if named := re.match(r"( {2})?([a-z_]+/) ", line):
            room = room if named[1] else named[2]
            folder = room + named[2] if named[1] else room
        lines[folder] = f"{lines.get(folder, '')}{line}\n"
    return lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not missing_files(text)
    assert not [link for link in LINK.findall(text) if not (page.parent / link).exists()]


def test_a_file_that_does_not_exist_is_noticed() -> None:
    assert missing_files("`train/run.py`, `train/runner.py` and configs/*/nothing.yaml") == [
        "train/runner.py",
        "configs/*/nothing.yaml",
    ]
    assert len(FILE.findall(ARCHITECTURE)) > 30


def test_the_tree_of_the_architecture_is_the_folders() -> None:
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    folders = {
        f"{path.parent.parent.name}/{path.parent.name}/"
        for room in rooms - {"contracts"}
        for path in (ROOT / room).glob("*/__init__.py")
        if not path.parent.is_symlink()
    }
    assert set(tree()) == {f"{room}/" for room in rooms} | folders


def test_the_files_in_the_tree_are_in_their_folders() -> None:
    named = [(folder, name) for folder, lines in tree().items() for name in BARE.findall(lines)]
    assert len(named) > 5
    assert not [(folder, name) for folder, name in named if not any((ROOT / folder).glob(name))]


def test_every_page_is_listed_on_the_first() -> None:
    listed = set(LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= listed
