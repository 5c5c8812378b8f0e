"""The structure that docs/architecture.md promises: lazy imports, and rooms that do not know one another."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("train", "serve", "fusion")
HEAVY = ("torch", "transformers", "vllm", "deepspeed", "datasets", "peft", "trl", "wandb")
# Light enough for a room, but the gateway and the command line start without them.
LAZY = (*HEAVY, "matplotlib", "scipy", "jinja2")
COMMANDS = (
    "base build",
    "train sft",
    "train judge",
    "launch",
    "doctor",
    "plan",
    "tasks make",
    "pool collect",
    "pairs build",
    "adapter export",
    "adapter verify",
    "adapter card",
    "adapter push",
    "adapter pull",
    "adapter keygen",
    "adapter sign",
    "adapter diff",
    "adapter merge",
    "adapter compose",
    "adapter prune",
    "serve",
    "gateway",
    "keys add",
    "keys list",
    "keys revoke",
    "traces export",
    "roles list",
    "roles swap",
    "roles rollback",
    "roles history",
    "roles pin",
    "roles unpin",
    "ask",
    "eval judge",
    "loop",
    "eval fusion",
)


def imported_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = set(done.stdout.split())
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
def test_the_command_and_the_gateway_start_without_the_ml_stack(module: str):
    assert not imported_by(f"import {module}") & set(LAZY)


def test_the_help_needs_not_even_a_room():
    assert not imported_by("import mixfuse.cli.entry; mixfuse.cli.entry._parser()") & {
        *HEAVY,
        "train",
        "serve",
        "fusion",
        "httpx",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str):
    arguments = [sys.executable, "-m", "mixfuse", *command.split(), "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: mixfuse {command}")


@pytest.mark.parametrize(
    ("room", "others"),
    [("train", {"serve", "fusion"}), ("serve", {"train", "fusion"}), ("fusion", {"train", "serve", *HEAVY})],
)
def test_a_room_does_not_know_the_others(room: str, others: set[str]):
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            parts = [name.split(".") for name in names]
            assert not {name[name[0] == "mixfuse" and len(name) > 1] for name in parts} & others, path


def test_nothing_unpickles_or_runs_remote_code():
    for room in ("contracts", "mixfuse", "train", "serve", "fusion", "scripts"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    assert "pickle" not in [alias.name for alias in node.names], path
                elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "weights_only"):
                    pytest.fail(f"{path}:{node.value.lineno}: {node.arg}")
                elif isinstance(node, ast.Call):
                    assert ast.unparse(node.func) != "torch.load", path
