"""Collecting pool responses: every task to every member, several times, each answer marked by its verifier.

The rows are what `mixfuse pairs build` makes preference pairs from.
"""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from rich.console import Console

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import write_jsonl
from mixfuse.contracts.progress import bar as progress_bar
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import Ledger
from mixfuse.fusion.calls.pool import HttpRoles, Pool, RoleSource
from mixfuse.fusion.calls.upstream import Purpose
from mixfuse.fusion.config import FusionConfig, Member


class Task(Protocol):
    """A question with a checkable answer."""

    @property
    def id(self) -> str:
        """Unique among the tasks."""
        ...

    @property
    def prompt(self) -> str:
        """What members are asked."""
        ...

    @property
    def reference(self) -> str:
        """The reference answer."""
        ...


AnyTask = TypeVar("AnyTask", bound=Task)


@dataclass
class CollectReport:
    """What a collection came to.

    Attributes:
        rows: Rows written.
        resumed: How many of them an earlier run had finished.
        answers: Answers by member.
        correct: Correct answers by member.
        failures: Failed calls by member and type.
    """

    rows: int = 0
    resumed: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    correct: Counter[str] = field(default_factory=Counter)
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)

    def count(self, row: dict[str, Any]) -> None:
        """Adds a row's answers and failures."""
        for response in row["responses"]:
            self.answers[response["model"]] += 1
            self.correct[response["model"]] += bool(response["correct"])
        for failure in row.get("failed", []):
            self.failures[failure["model"], failure["type"]] += 1

    def lines(self) -> list[str]:
        """The report for the terminal, a line a member."""
        told = [f"{self.rows} rows ({self.resumed} from an earlier run)"]
        for member in sorted({*self.answers, *(name for name, _ in self.failures)}):
            failed = ", ".join(
                f"{count} {kind}" for (name, kind), count in sorted(self.failures.items()) if name == member
            )
            told.append(
                f"{member}: {self.correct[member]} of {self.answers[member]} correct"
                + (f"; failed: {failed}" if failed else "")
            )
        return told


def run(
    config: FusionConfig,
    url: str | None,
    tasks: Sequence[AnyTask],
    *,
    samples: int,
    temperature: float,
    max_tokens: int,
    out: Path,
    concurrency: int,
    verify: Callable[[AnyTask, str], bool],
    seed: int = 0,
) -> CollectReport:
    """Collects as `collect` does, with roles reached at the gateway `url`, and prints what came of it.

    Raises:
        MixfuseError: As `collect`.
    """
    report = asyncio.run(
        collect(
            config,
            None if url is None else f"{url.rstrip('/')}/v1",
            tasks,
            samples=samples,
            temperature=temperature,
            max_tokens=max_tokens,
            out=out,
            concurrency=concurrency,
            verify=verify,
            seed=seed,
        )
    )
    console = Console()
    for line in report.lines():
        console.print(line, markup=False)
    return report


async def collect(
    config: FusionConfig,
    roles: RoleSource | str | None,
    tasks: Sequence[AnyTask],
    *,
    samples: int,
    temperature: float,
    max_tokens: int,
    out: Path,
    concurrency: int,
    verify: Callable[[AnyTask, str], bool],
    seed: int = 0,
    progress: bool = True,
) -> CollectReport:
    """Has every member answer every task and writes pool responses.

    Rows go to `OUT.partial` as they are finished and survive an interrupted run; the next one with the same
    settings goes on from there. A row in which every member failed is not kept, so that the next run tries it
    again; one in which some failed is, with its failures.

    Args:
        config: The pool.
        roles: Where members that are roles are served: a role table, or the URL of a running gateway
            (`…/v1`).
        tasks: What to ask.
        samples: Answers of each member to each task.
        temperature: For sampling.
        max_tokens: The longest answer.
        out: The file to write, one JSON object a line in the tasks' order:
            `{id, prompt, reference, responses: [{model, text, correct}]}`.
        concurrency: Calls under way at once.
        verify: Whether an answer to a task is correct.
        seed: Sent with each call, moved on from sample to sample.
        progress: Show a bar on stderr.

    Raises:
        MixfuseError: `out` exists, `OUT.partial` is of other settings, or a task was answered by nobody.
    """
    if not tasks:
        raise MixfuseError("there are no tasks to collect answers to")
    parameters = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    members = [member.model_dump(mode="json", exclude_defaults=True) for member in config.members]
    settings = {"members": members, "samples": samples, **parameters}
    report = CollectReport()
    # A job that asks thousands of questions would rather try each than skip those after a bad spell.
    asked = [member.model_copy(update={"breaker": None}) for member in config.members]
    unanswered: list[dict[str, Any]] = []
    free = asyncio.Semaphore(concurrency)
    source = HttpRoles(roles) if isinstance(roles, str) else roles
    with _partial(out, settings) as (finished, stream), progress_bar(progress) as bar:
        report.resumed = sum(task.id in finished for task in tasks)
        shown = bar.add_task("pool answers", total=len(tasks), completed=report.resumed)

        async def work(pool: Pool, task: AnyTask) -> None:
            row = await _row(pool, asked, task, free=free, samples=samples, parameters=parameters, verify=verify)
            if row["responses"]:
                finished[task.id] = row
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                stream.flush()
            else:
                unanswered.append(row)
            bar.advance(shown)

        async with Pool(source) as pool, asyncio.TaskGroup() as group:
            for task in tasks:
                if task.id not in finished:
                    group.create_task(work(pool, task))
    if unanswered:
        first = unanswered[0]
        reasons = "; ".join(f"{one['model']}: {one['type']} ({one['message']})" for one in first["failed"])
        raise MixfuseError(
            f"{len(unanswered)} of {len(tasks)} tasks were answered by no member, {first['id']} because of "
            f"{reasons}; run again to go on from here",
            kind="too_few_answers",
        )
    rows = [finished[task.id] for task in tasks]
    for row in rows:
        report.count(row)
    report.rows = write_jsonl(out, rows)
    _partial_path(out).unlink()
    return report


async def _row(
    pool: Pool,
    members: Sequence[Member],
    task: AnyTask,
    *,
    free: asyncio.Semaphore,
    samples: int,
    parameters: dict[str, Any],
    verify: Callable[[AnyTask, str], bool],
) -> dict[str, Any]:
    """Has every member answer one task `samples` times."""

    async def one(member: Member, sample: int) -> str | CallError:
        async with free:
            try:
                reply = await pool.ask(
                    member,
                    [{"role": "user", "content": task.prompt}],
                    {**parameters, "seed": parameters["seed"] + sample},
                    purpose=Purpose.of(member, "answer", member.name),
                    ledger=Ledger(),
                )
            except CallError as error:
                return error
            return reply.text

    asked = [(member, sample) for member in members for sample in range(samples)]
    results = await asyncio.gather(*(one(member, sample) for member, sample in asked))
    responses, failed = [], []
    for (member, _), result in zip(asked, results, strict=True):
        if isinstance(result, CallError):
            failed.append({"model": member.name, "type": result.kind, "message": str(result)})
        else:
            responses.append({"model": member.name, "text": result, "correct": verify(task, result)})
    row = {"id": task.id, "prompt": task.prompt, "reference": task.reference, "responses": responses}
    return {**row, "failed": failed} if failed else row


def _partial_path(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@contextmanager
def _partial(out: Path, settings: dict[str, Any]) -> Iterator[tuple[dict[str, dict[str, Any]], TextIO]]:
    """Yields the rows an earlier run finished, by id, and the file to add to.

    Its first line holds the settings; a row a killed run left torn is cut off.
    """
    if out.exists():
        raise MixfuseError(f"{out} exists already; choose another place or remove it first")
    path = _partial_path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as stream:
        stream.seek(0)
        text = stream.read()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            stream.truncate(len(whole.encode()))
            stream.seek(0, os.SEEK_END)
        lines = whole.split("\n")[:-1]  # not splitlines: answers may hold U+2028
        if not lines:
            stream.write(json.dumps({"settings": settings}) + "\n")
        elif json.loads(lines[0]) != {"settings": json.loads(json.dumps(settings))}:
            raise MixfuseError(f"{path} was begun with other settings; remove it to start over")
        yield {row["id"]: row for row in map(json.loads, lines[1:])}, stream
