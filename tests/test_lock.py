"""requirements.lock holds all that is asked for, and nothing that is compiled: see scripts/setup, scripts/lock."""

import re
import subprocess
import sys
import tomllib
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


def unmet(lines: list[str], extras: set[str]) -> list[str]:
    """The requirements that hold here and that the lock does not meet."""
    wrong = []
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            continue
        if name in LEFT_OUT or name == PROJECT["name"]:
            continue
        if name not in LOCKED or not requirement.specifier.contains(LOCKED[name], prereleases=True):
            wrong.append(str(requirement))
    return wrong


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_the_lock_meets_pyproject(extra: str | None) -> None:
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    assert unmet(lines, set()) == [], "run: scripts/lock"


def test_the_lock_meets_what_its_packages_ask_for() -> None:
    """As `--no-deps` makes pip blind to that."""
    checked = 0
    wrong = {}
    for name in LOCKED:
        try:
            asked = unmet(requires(name) or [], set())
        except PackageNotFoundError:
            continue
        checked += 1
        if asked:
            wrong[name] = asked
    assert checked > len(LOCKED) / 2
    assert wrong == {}, "run: scripts/lock"


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
