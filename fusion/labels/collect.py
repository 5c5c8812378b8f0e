"""Collects pool responses: every member answers every task several times, and a verifier marks each answer.

`mixfuse pairs build` makes preference pairs from the rows.
"""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import write_jsonl
from mixfuse.contracts.progress import bar as progress_bar
from mixfuse.contracts.tasks import AnyTask, TaskSet
from mixfuse.fusion.batch import Sampling, Target
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import Ledger
from mixfuse.fusion.calls.pool import HttpRoles, Pool, RoleSource
from mixfuse.fusion.calls.upstream import Purpose
from mixfuse.fusion.config import FusionConfig, Member


@dataclass
class CollectReport:
    """The counts of a collection.

    Attributes:
        rows: Rows written.
        resumed: How many of them come from an earlier run.
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
        """The report for the terminal, one line for each member."""
        lines = [f"{self.rows} rows ({self.resumed} from an earlier run)"]
        for member in sorted({*self.answers, *(name for name, _ in self.failures)}):
            failed = ", ".join(
                f"{count} {kind}" for (name, kind), count in sorted(self.failures.items()) if name == member
            )
            lines.append(
                f"{member}: {self.correct[member]} of {self.answers[member]} correct"
                + (f"; failed: {failed}" if failed else "")
            )
        return lines


def collect_answers(
    config: FusionConfig,
    server: Target,
    tasks: TaskSet[AnyTask],
    sampling: Sampling,
    out: Path,
    *,
    samples: int,
    concurrency: int,
) -> CollectReport:
    """Collects as `collect` does, with the pool's roles reached at a running server, and prints the report.

    Raises:
        MixfuseError: As `collect`.
    """
    roles = HttpRoles(server.v1, server.key)
    report = asyncio.run(collect(config, roles, tasks, sampling, out, samples=samples, concurrency=concurrency))
    console = Console(markup=False, emoji=False)
    for line in report.lines():
        console.print(line, markup=False)
    return report


async def collect(
    config: FusionConfig,
    roles: RoleSource | None,
    tasks: TaskSet[AnyTask],
    sampling: Sampling,
    out: Path,
    *,
    samples: int,
    concurrency: int,
    progress: bool = True,
) -> CollectReport:
    """Has every member answer every task and writes pool responses.

    Rows are appended to `OUT.partial` as they are finished. An interrupted run can be repeated with the same settings
    and continues there. A row in which every member failed is not written, so that the next run tries it again; a row
    in which some members failed is written with its failures.

    Args:
        config: The pool.
        roles: Where members that are roles are served: a role table, or a running gateway; None: none is.
        tasks: The questions, and how answers are checked.
        sampling: Sent with every call.
        out: The file to write, one JSON object a line in the tasks' order:
            `{id, prompt, reference, domain?, responses: [{model, text, correct}]}`.
        samples: Answers of each member to each task.
        concurrency: Calls in flight at once.
        progress: Show a bar on stderr.

    Raises:
        MixfuseError: `out` exists, `OUT.partial` has other settings, no member can be reached, or a task was
            answered by no member.
    """
    if not tasks.tasks:
        raise MixfuseError("there are no tasks to collect answers to")
    members = [member.model_dump(mode="json", exclude_defaults=True) for member in config.members]
    report = CollectReport()
    # A batch job tries every question; a member's circuit breaker would skip the questions after a bad spell.
    pool_members = [member.model_copy(update={"breaker": None}) for member in config.members]
    unanswered: list[dict[str, Any]] = []
    unreachable: dict[str, None] = {}
    slots = asyncio.Semaphore(concurrency)
    settings = {"members": members, "samples": samples, **sampling.parameters()}
    with _partial(out, settings) as (finished, stream), progress_bar(progress) as bar:
        report.resumed = sum(task.id in finished for task in tasks.tasks)
        bar_task = bar.add_task("pool answers", total=len(tasks.tasks), completed=report.resumed)

        async def answer(pool: Pool, task: AnyTask) -> None:
            replies = await _replies(
                pool, pool_members, task.prompt, sampling, samples=samples, slots=slots, given_up=unreachable
            )
            row = _row(task, replies, tasks.verify)
            if row["responses"]:
                finished[task.id] = row
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                stream.flush()
            else:
                unanswered.append(row)
                if not unreachable and all(failure["type"] == "unreachable" for failure in row["failed"]):
                    unreachable.update(_reasons(row))
            bar.advance(bar_task)

        async with Pool(roles) as pool, asyncio.TaskGroup() as group:
            for task in tasks.tasks:
                if task.id not in finished:
                    group.create_task(answer(pool, task))
    if unreachable:
        raise MixfuseError(
            f"no member of the pool can be reached ({'; '.join(unreachable)}): is the server running, and is its "
            "address (--url) right? Run again to continue",
            kind="unreachable",
        )
    if unanswered:
        first = unanswered[0]
        raise MixfuseError(
            f"{len(unanswered)} of {len(tasks.tasks)} tasks were answered by no member, {first['id']} because of "
            f"{'; '.join(_reasons(first))}; run again to continue",
            kind="too_few_answers",
        )
    rows = [finished[task.id] for task in tasks.tasks]
    for row in rows:
        report.count(row)
    report.rows = write_jsonl(out, rows)
    _partial_path(out).unlink()
    return report


async def _replies(
    pool: Pool,
    members: Sequence[Member],
    prompt: str,
    sampling: Sampling,
    *,
    samples: int,
    slots: asyncio.Semaphore,
    given_up: Sized,
) -> list[tuple[str, str | CallError]]:
    """(member, its answer or its failure), `samples` of each member; once `given_up` holds something, none is asked."""

    async def ask(member: Member, sample: int) -> str | CallError:
        async with slots:
            if given_up:  # the next thousand calls would not reach the pool either
                return CallError("unreachable", "not asked, since the pool cannot be reached")
            try:
                reply = await pool.ask(
                    member,
                    [{"role": "user", "content": prompt}],
                    sampling.parameters(sample),
                    purpose=Purpose.of(member, "answer", member.name),
                    ledger=Ledger(),
                )
            except CallError as error:
                return error
            return reply.text

    calls = [(member, sample) for member in members for sample in range(samples)]
    results = await asyncio.gather(*(ask(member, sample) for member, sample in calls))
    return [(member.name, result) for (member, _), result in zip(calls, results, strict=True)]


def _row(
    task: AnyTask, replies: Sequence[tuple[str, str | CallError]], verify: Callable[[AnyTask, str], bool]
) -> dict[str, Any]:
    """One row of pool responses, with its failures where there are some."""
    responses, failed = [], []
    for member, reply in replies:
        if isinstance(reply, CallError):
            failed.append({"model": member, "type": reply.kind, "message": str(reply)})
        else:
            responses.append({"model": member, "text": reply, "correct": verify(task, reply)})
    known = {} if task.domain is None else {"domain": task.domain}
    row = {"id": task.id, "prompt": task.prompt, "reference": task.reference, **known, "responses": responses}
    return {**row, "failed": failed} if failed else row


def _reasons(row: dict[str, Any]) -> dict[str, None]:
    """Why no member answered a row, each reason once: a member's samples fail alike, as do roles of one server."""
    members: dict[str, list[str]] = {}
    for failure in row["failed"]:
        members.setdefault(f"{failure['type']} ({failure['message']})", []).append(failure["model"])
    return dict.fromkeys(f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in members.items())


def _partial_path(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@contextmanager
def _partial(out: Path, settings: dict[str, Any]) -> Iterator[tuple[dict[str, dict[str, Any]], TextIO]]:
    """Yields the rows of an earlier run by id, and the file to append to.

    The first line of the file holds the settings. A row that a killed run left incomplete is cut off.
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
