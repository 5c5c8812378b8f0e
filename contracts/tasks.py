"""Tasks with verifiers, from the package `reasoning-gym` (Apache-2.0), split by prompt.

A task file names the kinds of task and their settings. The hash of a prompt decides its split, so a prompt of the
training tasks can never appear among the held-out ones, even if the generator repeats itself.
"""

import hashlib
import itertools
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, Literal, Protocol, TypeVar

from pydantic import PositiveFloat

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import Strict, load

Split = Literal["train", "pool", "heldout"]
SPLITS: dict[str, range] = {"train": range(6), "pool": range(6, 8), "heldout": range(8, 10)}
ATTEMPTS_PER_TASK = 400


class Checkable(Protocol):
    """A question whose answers can be checked."""

    @property
    def id(self) -> str:
        """Unique among the tasks."""
        ...

    @property
    def prompt(self) -> str:
        """The question."""
        ...

    @property
    def reference(self) -> str:
        """The reference answer."""
        ...

    @property
    def domain(self) -> str | None:
        """The kind of question, where it is known."""
        ...


AnyTask = TypeVar("AnyTask", bound=Checkable)


@dataclass(frozen=True)
class TaskSet(Generic[AnyTask]):
    """Tasks, and how their answers are checked.

    Attributes:
        tasks: The questions.
        verify: Whether an answer to a task is right.
    """

    tasks: Sequence[AnyTask]
    verify: Callable[[AnyTask, str], bool]


class TaskKind(Strict):
    """One reasoning-gym data set.

    Attributes:
        name: Its name in reasoning-gym.
        weight: Its share of the tasks, relative to the other kinds.
        settings: Passed to reasoning-gym unchanged.
    """

    name: str
    weight: PositiveFloat = 1.0
    settings: dict[str, Any] = {}


class TaskFile(Strict):
    """The kinds of task a model is tuned and measured on.

    Attributes:
        tasks: The kinds, each with its weight.
    """

    tasks: list[TaskKind]


@dataclass(frozen=True)
class Task:
    """One task: the prompt, and the data for its verifier.

    Attributes:
        id: The hash of the prompt; stable.
        prompt: The question.
        reference: A right answer.
        kind: The data set's name in reasoning-gym.
        entry: reasoning-gym's own record, for its verifier.
    """

    id: str
    prompt: str
    reference: str
    kind: str
    entry: dict[str, Any] = field(repr=False)

    @property
    def domain(self) -> str | None:
        """The kind of question: the data set's name."""
        return self.kind

    def chat(self) -> dict[str, Any]:
        """The task with its reference answer, as a row to train on."""
        user, assistant = {"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.reference}
        return {"id": self.id, "messages": [user, assistant]}

    def verify(self, text: str) -> bool:
        """Whether reasoning-gym's verifier gives the text full marks; white space around it is ignored."""
        return bool(_scorer(self.kind).score_answer(text.strip(), self.entry) >= 1.0)

    def verify_lenient(self, text: str) -> bool:
        """As `verify`, but also accepts an answer in a sentence: its last number or word may get full marks."""
        words = re.findall(r"-?\d+|[A-Za-z]+", text)
        return self.verify(text) or (bool(words) and self.verify(words[-1]))


def make(path: Path, split: Split, count: int, *, seed: int = 0, only: Collection[str] = ()) -> list[Task]:
    """Makes `count` distinct tasks of one split; equal arguments give equal tasks.

    Args:
        path: A task file.
        split: The split.
        count: Number of tasks; the result is shorter if a kind has no more distinct prompts.
        seed: Seed of the generators.
        only: Names of the kinds to make; all of the file's where it is empty.

    Raises:
        MixfuseError: The file is wrong, has no kind that `only` names, a kind is unknown, or reasoning-gym refuses its
            settings.
    """
    kinds = load(path, TaskFile).tasks
    if not kinds:
        raise MixfuseError(f"{path}: no tasks are listed")
    names = list(dict.fromkeys(kind.name for kind in kinds))
    if missing := [name for name in only if name not in names]:
        raise MixfuseError(f"{path}: there is no kind {missing[0]!r}; its kinds are {', '.join(names)}")
    kinds = [kind for kind in kinds if not only or kind.name in only]
    total = sum(kind.weight for kind in kinds)
    # Cumulative rounding, so that the shares add up to `count`.
    ends = [round(count * sum(kind.weight for kind in kinds[:end]) / total) for end in range(len(kinds) + 1)]
    shares = [end - start for start, end in itertools.pairwise(ends)]
    by_kind = [list(_of_kind(path, kind, split, share, seed)) for kind, share in zip(kinds, shares, strict=True)]
    # Interleaved, so that every prefix of the list holds all kinds.
    tasks = [task for place in range(count) for tasks in by_kind for task in tasks[place : place + 1]]
    if not tasks:
        raise MixfuseError(f"{path}: the settings leave no prompt for the split {split!r}; widen them")
    return tasks


def _of_kind(path: Path, kind: TaskKind, split: Split, count: int, seed: int) -> Iterator[Task]:
    reasoning_gym = _import_reasoning_gym()
    try:
        size = max(1, count) * ATTEMPTS_PER_TASK
        dataset = reasoning_gym.create_dataset(kind.name, seed=seed, size=size, **kind.settings)
    except (ValueError, AssertionError, TypeError) as error:
        raise MixfuseError(f"{path}: reasoning-gym refuses {kind.name!r}: {error}") from None
    seen: set[str] = set()
    misses = 0
    for entry in dataset:
        digest = hashlib.sha256(entry["question"].encode()).hexdigest()
        if len(seen) >= count or misses >= ATTEMPTS_PER_TASK:
            return
        if int(digest, 16) % 10 not in SPLITS[split] or digest in seen:
            misses += 1
            continue
        misses = 0
        seen.add(digest)
        yield Task(digest[:16], entry["question"], str(entry["answer"]), kind.name, entry)


_scorers: dict[str, Any] = {}


def _scorer(kind: str) -> Any:
    """The verifier of a kind. It is a method of reasoning-gym's data set; any instance serves."""
    if kind not in _scorers:
        _scorers[kind] = _import_reasoning_gym().create_dataset(kind, size=1, seed=0)
    return _scorers[kind]


def _import_reasoning_gym() -> Any:
    """The package, also where pycosat is missing.

    reasoning-gym imports that SAT solver at once and uses it for zebra puzzles alone. pycosat has no wheel, so
    scripts/setup leaves it out: compiling it would be the only reason to need a compiler.
    """
    if "pycosat" not in sys.modules and find_spec("pycosat") is None:
        stand_in = ModuleType("pycosat")
        stand_in.__dict__["itersolve"] = _no_sat_solver
        sys.modules["pycosat"] = stand_in
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise MixfuseError(
            f"tasks need the package reasoning-gym ({error}); run scripts/setup, or: pip install 'mixfuse[demo]'"
        ) from None
    return reasoning_gym


def _no_sat_solver(*_: Any) -> Any:
    raise MixfuseError("zebra puzzles need the package pycosat; install it (pip compiles it): pip install pycosat")
