"""The structure that docs/architecture.md promises: lazy imports, rooms that do not know one another, and no circle.

The import graph is read from the files. What counts as an import of a file, and so as an arrow of the graph:

- `import` and `from ... import` anywhere in it, at its top, in a function or under `if TYPE_CHECKING`: each of them
  means that the file cannot be understood, moved or tested without the other;
- a string that is the whole name of one of our modules, such as the target of `python -m` or of an entry point.
"""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Set
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mixfuse"
HEAVY = ("torch", "transformers", "vllm", "deepspeed", "datasets", "peft", "trl", "wandb")
# Light enough for a room, but the gateway and the command line start without them.
LAZY = (*HEAVY, "matplotlib", "scipy", "jinja2")
GROUND = "contracts"
# The links under mixfuse/ lead to the contracts and the rooms; the folders beside them are the roof.
LINKED = {path.name for path in PACKAGE.iterdir() if path.is_symlink() and (path / "__init__.py").exists()}
ROOMS = LINKED - {GROUND}
ROOF = {path.name for path in PACKAGE.iterdir() if path.is_dir() and not path.is_symlink()} - {"__pycache__"}
# Folders with Python files that are no part of the package.
OUTSIDE = {"tests", "benchmarks", "scripts"}

Graph = Mapping[str, Set[str]]
"""Each module with the modules that it imports."""


def module_files() -> dict[str, Path]:
    """Module name to file, of the whole package."""
    files: dict[str, Path] = {}
    for folder in [PACKAGE, *(PACKAGE / name for name in LINKED)]:
        for path in folder.rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = module_files()


def known(name: str) -> str | None:
    """The module that has this name or, as for a function in it, the longest beginning of the name."""
    while name not in FILES:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return None
    return name


def imports(module: str, source: str) -> Iterator[str]:
    """The modules of ours that a module with this source imports, by the rules at the top of this file."""
    package = module if FILES.get(module, Path()).stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                start = f"{above}.{start}" if start else above
            names = [f"{start}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            names = [name] if known(name) == name and name != "mixfuse" else []
        for name in names:
            target = known(name) if name.partition(".")[0] == "mixfuse" else None
            if target is not None and target != module:
                yield target


GRAPH: Graph = {module: set(imports(module, path.read_text(encoding="utf-8"))) for module, path in FILES.items()}


def part(module: str) -> str:
    """The ground, room or folder of the roof that a module is in; "" for `mixfuse` and `mixfuse.__main__`."""
    name = module.split(".")[1] if "." in module else ""
    return name if name in LINKED | ROOF else ""


def folder(module: str) -> str:
    """The folder of the roof or of a room that a module is in, or the module itself where it is in none."""
    parts = module.split(".")
    if part(module) in ROOF:
        return ".".join(parts[:2])
    inside = ".".join(parts[:3])
    return inside if len(parts) > 3 or (module in FILES and FILES[module].stem == "__init__") else module


def folder_graph() -> Graph:
    arrows: dict[str, set[str]] = {}
    for module, targets in GRAPH.items():
        arrows.setdefault(folder(module), set()).update(folder(target) for target in targets)
    return {name: targets - {name} for name, targets in arrows.items()}


def circle(graph: Graph) -> list[str]:
    """One circle of the graph, as the modules along it; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def arrows(source: Set[str], target: Set[str]) -> list[str]:
    """The imports that lead from one set of parts to another, from a part to itself left out."""
    return [
        f"{module} imports {other}"
        for module, targets in sorted(GRAPH.items())
        for other in sorted(targets)
        if part(module) in source and part(other) in target and part(module) != part(other)
    ]


def test_the_parts_are_those_of_the_architecture() -> None:
    assert sorted(ROOMS) == ["fusion", "serve", "train"]
    assert sorted(ROOF) == ["app", "cli", "sandbox"]
    for name in LINKED:
        assert (PACKAGE / name).resolve() == ROOT / name


def _listed(pattern: str) -> list[str]:
    """The files that git tracks, and new ones that it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


def test_nothing_that_a_command_leaves_is_in_the_tree() -> None:
    """A key and a project, made by commands of the docs, were committed once."""
    folders = {name.partition("/")[0] for name in _listed("*") if "/" in name and (ROOT / name).exists()}
    assert folders == {".ci", "benchmarks", "configs", "contracts", "docs", "mixfuse", "scripts", "tests", *ROOMS}


def test_every_python_file_belongs_to_a_part() -> None:
    listed = _listed("*.py")
    ours = {name for name in listed if name.partition("/")[0] not in OUTSIDE and (ROOT / name).exists()}
    assert {str(path.resolve().relative_to(ROOT)) for path in FILES.values()} == ours
    assert {module for module in FILES if not part(module)} == {"mixfuse", "mixfuse.__main__"}
    # Without an __init__.py a folder is left out of the wheel.
    assert not [path for path in FILES.values() if not (path.parent / "__init__.py").exists()]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("import mixfuse.fusion.config", "mixfuse.fusion.config"),
        ("import mixfuse.fusion.config as c, os", "mixfuse.fusion.config"),
        ("from mixfuse.fusion import config", "mixfuse.fusion.config"),
        ("from mixfuse import fusion", "mixfuse.fusion"),
        ("from mixfuse.fusion.config import Price as P", "mixfuse.fusion.config"),
        ("from mixfuse.fusion.config import *", "mixfuse.fusion.config"),
        ("from ..fusion import config", "mixfuse.fusion.config"),
        ("from ..fusion.config import Price", "mixfuse.fusion.config"),
        ("from . import errors", "mixfuse.contracts.errors"),
        ("from .errors import MixfuseError", "mixfuse.contracts.errors"),
        ("def f():\n    from mixfuse.fusion import config", "mixfuse.fusion.config"),
        ("if TYPE_CHECKING:\n    from mixfuse.fusion.config import Price", "mixfuse.fusion.config"),
        ("run(['-m', 'mixfuse.fusion.config'])", "mixfuse.fusion.config"),
        ("import_module('mixfuse.fusion.config')", "mixfuse.fusion.config"),
        ("PLUGIN = 'mixfuse.fusion.config:Price'", "mixfuse.fusion.config"),
    ],
)
def test_an_import_is_seen_in_any_form(source: str, target: str) -> None:
    assert list(imports("mixfuse.contracts.trace", source)) == [target]


@pytest.mark.parametrize("source", ["import json", "from os import path", "'mixfuse.trace_id'", "from . import trace"])
def test_nothing_else_is_taken_for_an_import(source: str) -> None:
    assert list(imports("mixfuse.contracts.trace", source)) == []


def test_the_graph_has_the_imports() -> None:
    """A graph without arrows would pass every test below."""
    assert sum(map(len, GRAPH.values())) > len(FILES)
    for room in sorted(ROOMS):
        assert arrows({room}, {GROUND})
        assert arrows(ROOF, {room})


def test_the_contracts_import_no_room_and_no_roof() -> None:
    assert not arrows({GROUND}, ROOMS | ROOF)


def test_the_rooms_import_the_contracts_only() -> None:
    assert not arrows(ROOMS, ROOMS | ROOF)


def test_only_the_roof_imports_rooms() -> None:
    """`mixfuse` itself is imported by everything, so it imports nothing; `python -m mixfuse` leads to the roof."""
    assert not GRAPH["mixfuse"]
    assert {part(target) for target in GRAPH["mixfuse.__main__"]} == {"cli"}
    importers = {module for module, targets in GRAPH.items() if {part(target) for target in targets} & ROOMS}
    assert {part(module) for module in importers} <= ROOF | ROOMS


def test_the_programs_outside_the_package_are_not_imported_by_it() -> None:
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            tops = {name.partition(".")[0] for name in names}
            # A room by its folder's name would be found in a checkout only.
            assert not tops & (OUTSIDE | LINKED), module


def test_no_circle_between_files() -> None:
    assert not circle(GRAPH)


def test_no_circle_between_folders() -> None:
    assert not circle(folder_graph())


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_circle_is_found(length: int) -> None:
    names = [f"m{place}" for place in range(length + 1)]
    chain = {name: {follower} for name, follower in pairwise(names)}
    assert not circle(chain)
    assert set(circle(chain | {names[-1]: {names[0]}})) == set(names)


def test_entry_points_name_functions_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    targets = [*project["scripts"].values()]
    targets += [target for group in project["entry-points"].values() for target in group.values()]
    assert len(targets) >= 2
    for target in targets:
        module, function = target.split(":")
        tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, target


def imported_by(statement: str) -> set[str]:
    """What a fresh Python has imported after a statement: packages by their first name, rooms by their own."""
    code = f"{statement}\nimport sys; print(' '.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = set(done.stderr.split())
    return {name.partition(".")[0] for name in names} | {room for room in ROOMS if f"mixfuse.{room}" in names}


@pytest.mark.parametrize(
    "module",
    [
        "mixfuse.cli.entry",
        "mixfuse.app.server",
        "mixfuse.contracts.adapter",
        "mixfuse.app.planning",
        "mixfuse.fusion.http.gateway",
    ],
)
def test_the_command_and_the_gateway_start_without_the_ml_stack(module: str) -> None:
    names = imported_by(f"import {module}")
    assert "mixfuse" in names
    assert not names & set(LAZY)


def test_the_help_imports_no_room() -> None:
    names = imported_by("import mixfuse.cli.entry\ntry: mixfuse.cli.entry.main(['--help'])\nexcept SystemExit: pass")
    assert "argparse" in names
    assert not names & {*HEAVY, *ROOMS, "httpx", "aiohttp", "numpy"}


def test_the_fusion_room_imports_no_ml_stack() -> None:
    for module, path in FILES.items():
        if part(module) == "fusion":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                assert not {name.partition(".")[0] for name in names} & set(HEAVY), module


def test_nothing_unpickles_or_runs_remote_code() -> None:
    for path in [*FILES.values(), *(ROOT / "scripts").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert "pickle" not in [alias.name for alias in node.names], path
            elif isinstance(node, ast.ImportFrom):
                assert node.module != "pickle", path
            elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "weights_only"):
                pytest.fail(f"{path}:{node.value.lineno}: {node.arg}")
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) != "torch.load", path
