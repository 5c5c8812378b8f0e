"""requirements.lock holds all that is asked for, and nothing that is compiled: see scripts/setup, scripts/lock."""

import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
LOCKED = {
    canonicalize_name(name): Version(version)
    for name, version in re.findall(r"^([a-z0-9-]+)==([^\s;]+)", LOCK, re.MULTILINE)
}
# What the lock leaves out on purpose; its header says why.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "pycosat", "llama-cpp-python", "llm"}
EXTRAS = ("train", "serve-cpu", "demo", "dev", "postgres", "otel")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def holding(lines: Iterable[str], extras: Iterable[str] = ()) -> list[Requirement]:
    """The requirements that hold on this machine, with these extras, less what the lock leaves out."""
    requirements = [
        requirement
        for requirement in map(Requirement, lines)
        if not requirement.marker or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]
    return [item for item in requirements if canonicalize_name(item.name) not in LEFT_OUT | {PROJECT["name"]}]


def unmet(requirements: Iterable[Requirement]) -> list[str]:
    """The requirements that the lock does not meet."""

    def meets(requirement: Requirement) -> bool:
        version = LOCKED.get(canonicalize_name(requirement.name))
        return version is not None and requirement.specifier.contains(version, prereleases=True)

    return [str(requirement) for requirement in requirements if not meets(requirement)]


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_the_lock_meets_pyproject(extra: str | None) -> None:
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    assert unmet(holding(lines)) == [], "run: scripts/lock"


def test_the_lock_meets_what_its_packages_ask_for() -> None:
    """`--no-deps` makes pip blind to that."""
    installed = {package: lines for package in LOCKED if (lines := requirements_of(package)) is not None}
    assert len(installed) > len(LOCKED) / 2
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra])]
    requirements = holding(lines)
    extras: dict[str, set[str]] = defaultdict(set)
    for _ in range(4):  # an extra may ask for an extra: fastapi[standard] for uvicorn[standard]
        for requirement in requirements:
            extras[canonicalize_name(requirement.name)] |= requirement.extras
        requirements = [item for package, lines in installed.items() for item in holding(lines, extras[package])]
    assert any(extras.values())
    assert unmet(requirements) == [], "run: scripts/lock"


def requirements_of(package: str) -> list[str] | None:
    """What an installed package asks for; None if it is not installed."""
    try:
        return requires(package) or []
    except PackageNotFoundError:
        return None


def test_no_package_may_be_compiled() -> None:
    """`scripts/setup` fails where a package has no wheel, but for those named here, which are pure Python."""
    assert "\n--only-binary :all:\n" in LOCK
    assert re.findall(r"^--no-binary (.*)$", LOCK, re.MULTILINE) == ["cellpylib,deepspeed,zss"]
    assert LEFT_OUT.isdisjoint(LOCKED)


WITHOUT_PYCOSAT = """
import sys
from importlib import util
from pathlib import Path

find_spec = util.find_spec
util.find_spec = lambda name, package=None: None if name == "pycosat" else find_spec(name, package)
from mixfuse.contracts.tasks import make

print(make(Path(sys.argv[1]), "train", 1))
"""


@pytest.mark.parametrize(
    ("kind", "said"), [("chain_sum", "Task("), ("letter_counting", "Task("), ("zebra_puzzles", "pip install pycosat")]
)
def test_only_zebra_puzzles_need_pycosat(kind: str, said: str, tmp_path: Path) -> None:
    """It has no wheel, so the lock leaves it out."""
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(f"tasks: [{{name: {kind}}}]")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PYCOSAT, tasks], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert said in done.stdout + done.stderr
