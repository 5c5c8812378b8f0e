"""Imports inside the training room run one way: no circle between its files, and none between its folders."""

import ast
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from mixfuse.cli.launch import LAUNCHERS as LAUNCHER_FLAGS

ROOT = Path(__file__).parents[2]


def modules() -> dict[str, Path]:
    """Every module of the room by its import name without `mixfuse.`; a package is `NAME.__init__`."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "train").rglob("*.py")}


def imported_names(path: Path) -> Iterator[str]:
    """What a file imports, at its top or inside a function, as dotted names; imports for type checking do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    typing_only = {child for block in blocks for child in ast.walk(block)}
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph() -> dict[str, set[str]]:
    """Module → the modules of the room that it imports."""
    files = modules()

    def resolve(name: str) -> str | None:
        """The module that a dotted name is, or is defined in."""
        candidates = (name, f"{name}.__init__", name.rpartition(".")[0], f"{name.rpartition('.')[0]}.__init__")
        return next((candidate for candidate in candidates if candidate in files), None)

    edges: dict[str, set[str]] = {}
    for module, path in files.items():
        names = (name.removeprefix("mixfuse.") for name in imported_names(path) if name.startswith("mixfuse.train."))
        edges[module] = {found for name in names if (found := resolve(name)) and found != module}
    return edges


def folder(module: str) -> str:
    """`train.data.pairs` → `train.data`; a module directly in the room stands for itself."""
    parts = module.split(".")
    return module if len(parts) == 2 else ".".join(parts[:-1])


@pytest.mark.parametrize("node", [str, folder], ids=["files", "folders"])
def test_the_training_room_has_no_import_circle(node: Callable[[str], str]) -> None:
    edges: dict[str, set[str]] = {}
    for module, used in graph().items():
        edges.setdefault(node(module), set()).update(node(other) for other in used if node(other) != node(module))
    assert edges[node("train.stages.core")] >= {node("train.adapters.saving"), "train.recipe"}, "imports are not seen"
    TopologicalSorter(edges).prepare()  # raises CycleError


def test_the_flags_of_launch_are_the_launchers() -> None:
    from mixfuse.train.launching.launchers import LAUNCHERS

    assert set(LAUNCHER_FLAGS) == set(LAUNCHERS)
