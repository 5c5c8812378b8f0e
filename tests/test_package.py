"""What `pip install` brings: a wheel that works beside a user's own train.py, and with the base dependencies alone."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SHARED = Path(sysconfig.get_path("purelib"))
SOURCES = (
    *("pyproject.toml", "requirements.lock", "README.md", "LICENSE"),
    *("mixfuse", "contracts", "train", "serve", "fusion", "configs"),
)


def build(kind: str, source: Path, out: Path) -> Path:
    """Builds "wheel" or "sdist" with the installed setuptools, so that nothing is downloaded."""
    code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves `build/` beside its sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "runs")
            )
        else:
            shutil.copy(ROOT / name, source / name)
    return build("wheel", source, out)


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_the_wheel_holds_one_package_with_its_configs_and_no_tests(wheel: Path):
    names = names_in(wheel)
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"mixfuse"}
    assert not [name for name in names if "test" in name or name.endswith(".pyc")]
    for room in ("contracts", "train", "serve", "fusion", "configs"):
        here = {path for path in (ROOT / room).rglob("*") if path.is_file() and path.suffix != ".pyc"}
        assert {f"mixfuse/{path.relative_to(ROOT)}" for path in here} <= names


def test_the_sdist_makes_the_same_wheel(wheel: Path, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        symlinks=True,
        ignore=lambda folder, names: [
            name for name in names if name == "__pycache__" or (Path(folder) == ROOT and name not in SOURCES)
        ],
    )
    (tmp_path / "sdist").mkdir()
    (tmp_path / "wheel").mkdir()
    with tarfile.open(build("sdist", source, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert names_in(build("wheel", unpacked, tmp_path / "wheel")) == names_in(wheel)


class Installed:
    """A virtual environment with the wheel in it, and an empty folder of a user who has modules named as the rooms."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        self.python = folder / "venv" / "bin" / "python"
        self.packages = Path(
            subprocess.run(
                [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
        )
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(self.python)]
        install = [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        self.folder = folder / "user"
        self.folder.mkdir()
        for name in ("train.py", "serve.py", "fusion.py", "contracts.py"):
            (self.folder / name).write_text("raise RuntimeError('this is the user module')\n")
        (self.folder / "configs").mkdir()
        (self.folder / "configs" / "mine.yaml").write_text("mine: true\n")

    def run(self, *command: str | Path) -> "subprocess.CompletedProcess[str]":
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["PATH"] = f"{self.python.parent}{os.pathsep}{environment['PATH']}"
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """With every package of this environment."""
    installed = Installed(tmp_path_factory.mktemp("installed"), wheel)
    (installed.packages / "shared.pth").write_text(f"{SHARED}\n")
    return installed


def test_it_works_in_a_folder_without_the_checkout(installed: Installed):
    imported = installed.run("python", "-c", "import mixfuse; print(mixfuse.__file__)")
    assert imported.stdout.startswith(str(installed.packages))
    version = installed.run("mixfuse", "--version")
    assert version.stdout.startswith("mixfuse ")
    for folder in (".", "project"):
        written = installed.run("mixfuse", "init", folder, "--for", "tiny")
        assert written.returncode == 0, written.stderr
    assert (installed.folder / "configs" / "mine.yaml").read_text() == "mine: true\n"
    planned = installed.run(
        "mixfuse", "plan", "domain_sft.yaml", "--nodes", "1", "--gpus-per-node", "2", "--device", "cpu"
    )
    assert planned.stdout.rstrip().endswith("fits"), planned.stderr
    for command in (("mixfuse",), ("python", "-m", "mixfuse")):
        trained = installed.run(*command, "train", "sft", "domain_sft.yaml")
        assert trained.returncode == 2
        assert trained.stderr.splitlines()[-1].startswith("mixfuse: error: base: runs/base"), trained.stderr


def closure(requirements: list[str]) -> set[str]:
    """The names of all distributions that these requirements bring, without any extra."""
    names: set[str] = set()
    wanted = list(map(Requirement, requirements))
    while wanted:
        requirement = wanted.pop()
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name not in names:
            names.add(requirement.name)
            wanted += map(Requirement, metadata.requires(requirement.name) or ())
    return names


@pytest.fixture(scope="module")
def base_only(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """With the base dependencies and nothing else."""
    installed = Installed(tmp_path_factory.mktemp("base"), wheel)
    (information,) = installed.packages.glob("mixfuse-*.dist-info")
    for name in closure(metadata.Distribution.at(information).requires or []):
        for top in {file.parts[0] for file in metadata.files(name) or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (installed.packages / top).exists():
                (installed.packages / top).symlink_to(SHARED / top)
    return installed


def test_the_base_dependencies_suffice_for_help_init_and_completion(base_only: Installed):
    assert base_only.run("python", "-c", "import torch").returncode == 1
    for arguments in ((), ("--help",), ("init", "project", "--for", "mixtral-8x7b"), ("completion", "bash")):
        done = base_only.run("mixfuse", *arguments)
        assert done.returncode == 0, done.stderr


GATEWAY = """
import re, subprocess, sys, httpx
command = [sys.executable, "-m", "mixfuse", "gateway", "fusion.yaml", "--port", "0"]
with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
    lines = []
    for line in server.stdout:
        lines.append(line)
        if found := re.search(r"http://[\\d.]+:\\d+", line):
            break
    else:
        sys.exit("".join(lines))
    print(httpx.get(found[0] + "/v1/models").text)
    server.terminate()
"""


def test_the_base_dependencies_suffice_for_the_gateway(base_only: Installed):
    (base_only.folder / "fusion.yaml").write_text(
        "members:\n"
        "  - {name: first, base_url: 'http://127.0.0.1:9/v1', model: m}\n"
        "  - {name: second, base_url: 'http://127.0.0.1:9/v1', model: m}\n"
        "judge: {base_url: 'http://127.0.0.1:9/v1', model: m}\n"
        "trace_db: traces.sqlite3\n"
    )
    done = base_only.run("python", "-c", GATEWAY)
    assert "fusion/best-of" in done.stdout, done.stdout + done.stderr
