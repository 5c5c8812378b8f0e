"""Verifiers mark answers right or wrong: by the reference, a task's own verifier, a Python function or unit tests."""

import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.paths import FilePath
from mixfuse.contracts.strict_yaml import Strict
from mixfuse.fusion.measure.questions import Question, matches
from mixfuse.fusion.measure.questions import Verifier as Comparing

Check = Callable[[Mapping[str, Any], str], bool | None]
"""(a pool row, an answer) → whether the answer is right; None if the verifier cannot tell."""

_CODE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


class ByTasks(Strict):
    """The verifiers of a task file (`mixfuse tasks make`); a row belongs to the task with its prompt.

    Attributes:
        tasks: The task file.
        split: The split of the task file.
        count: The number of tasks to make.
        seed: The seed of the tasks.
    """

    tasks: FilePath
    split: Literal["train", "pool", "heldout"] = "pool"
    count: PositiveInt = 100
    seed: int = 0


class ByFunction(Strict):
    """A user's function: `function(prompt, answer, reference) -> bool`. It runs in this process.

    Attributes:
        python: `module:function`; the module must be importable.
    """

    python: str = Field(pattern=r"^[\w.]+:\w+$")


class ByTests(Strict):
    """Unit tests in the row's `tests`: Python that raises if the answer is wrong. See `mixfuse.sandbox.runner`.

    Attributes:
        tests: The language; only "python" is supported.
        timeout_s: The most seconds for one answer.
        memory_mib: The most address space for one answer, in MiB.
    """

    tests: Literal["python"]
    timeout_s: PositiveFloat = 10.0
    memory_mib: PositiveInt = 512


Verifier = Literal["marked"] | Comparing | ByTasks | ByFunction | ByTests
"""`marked`: the rows have the marks. `exact`, `number` (the last one), `json`: the answer equals the reference.
`regex`: the reference, a pattern, matches a part of the answer."""


def check_of(verifier: Verifier) -> Check:
    """Returns the verifier as a function.

    Raises:
        MixfuseError: The task file or the function is missing. The returned function raises it for a row without the
            key that the verifier needs.
    """
    if isinstance(verifier, ByTasks):
        return _by_tasks(verifier)
    if isinstance(verifier, ByFunction):
        return _by_function(verifier)
    if isinstance(verifier, ByTests):
        return _by_tests(verifier)
    if verifier == "marked":
        return _marked
    return _by_reference(verifier)


def _marked(row: Mapping[str, Any], answer: str) -> bool | None:
    marks = {
        response["correct"]
        for response in row["responses"]
        if response["text"] == answer and isinstance(response.get("correct"), bool)
    }
    return marks.pop() if len(marks) == 1 else None


def _by_reference(comparison: Comparing) -> Check:
    def check(row: Mapping[str, Any], answer: str) -> bool:
        reference = _text(row, "reference")
        return matches(Question(str(row.get("id")), str(row.get("prompt")), reference), answer, comparison)

    return check


def _by_tasks(verifier: ByTasks) -> Check:
    from mixfuse.contracts.tasks import make

    tasks = {task.prompt: task for task in make(verifier.tasks, verifier.split, verifier.count, seed=verifier.seed)}

    def check(row: Mapping[str, Any], answer: str) -> bool | None:
        task = tasks.get(row["prompt"])
        return None if task is None else task.verify(answer)

    return check


def _by_function(verifier: ByFunction) -> Check:
    module, _, name = verifier.python.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise MixfuseError(f"verifier {verifier.python}: {error}; it must be importable (PYTHONPATH)") from None

    def check(row: Mapping[str, Any], answer: str) -> bool:
        right = function(row["prompt"], answer, row.get("reference"))
        if not isinstance(right, bool):
            raise MixfuseError(f"verifier {verifier.python} returned {right!r} for row {row.get('id')!r}, not a bool")
        return right

    return check


def _by_tests(verifier: ByTests) -> Check:
    from mixfuse.sandbox.runner import Limits, run

    limits = Limits(timeout_s=verifier.timeout_s, memory_bytes=verifier.memory_mib << 20)

    def check(row: Mapping[str, Any], answer: str) -> bool:
        return run(f"{program(answer)}\n\n{_text(row, 'tests')}\n", limits).passed

    return check


def program(answer: str) -> str:
    """Returns the program in an answer: the content of its code fences, or the whole answer if it has none."""
    return "\n\n".join(_CODE.findall(answer)) or answer


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise MixfuseError(f"row {row.get('id')!r}: the verifier needs {key!r} as text")
    return value
