"""`mixfuse traces export`: traces as pool responses, from which `mixfuse pairs build` makes preference pairs."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from sqlalchemy import text

from mixfuse.contracts.database import Database
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import write_jsonl
from mixfuse.contracts.mode_names import SINGLE_MODEL_MODE
from mixfuse.contracts.trace import Trace
from mixfuse.fusion.messages import as_question

Label = Literal["feedback", "judge"]

_PAGE = 500
_MIN_COMPARED = 10
"""A user can be ignored only after this many marks have been compared."""


class Task(Protocol):
    """A question whose answers can be checked."""

    @property
    def prompt(self) -> str:
        """The question."""
        ...

    @property
    def reference(self) -> str:
        """The reference answer."""
        ...

    def verify(self, answer: str) -> bool:
        """Whether an answer is right."""
        ...


def export(
    database: Database,
    out: Path,
    *,
    label: Label = "feedback",
    tasks: Sequence[Task] | None = None,
    days: float | None = None,
    min_agreement: float | None = None,
) -> dict[str, int]:
    """Writes the rows that `read` returns to a file.

    Args:
        database: The gateway's database.
        out: The file to write.
        label: See `read`.
        tasks: See `read`.
        days: Only traces of the last this many days.
        min_agreement: See `read`.

    Returns:
        The counts of `read`.

    Raises:
        MixfuseError: No answer is known to be right or wrong, or `out` cannot be written.
    """
    since = 0.0 if days is None else time.time() - days * 86400
    rows, counts = read(database, label=label, tasks=tasks, since=since, min_agreement=min_agreement)
    if not rows:
        raise MixfuseError(
            f"{database.name}: none of {counts['traces']} traces says which answers are right; send feedback to "
            "/v1/traces/ID/feedback, or give tasks with verifiers (--tasks)"
        )
    write_jsonl(out, rows)
    return counts


def read(
    database: Database,
    *,
    label: Label = "feedback",
    tasks: Sequence[Task] | None = None,
    since: float = 0.0,
    until: float = math.inf,
    min_agreement: float | None = None,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Reads traces as rows `{id, prompt, reference, responses: [{model, text, correct}]}`, one a trace.

    A row holds only the answers that are known to be right or wrong; traces without such answers, or without stored
    text, give no row.

    Args:
        database: The gateway's database.
        label: What decides which answers are right. `feedback`: the users, see `by_feedback`. `judge`: the winning
            answer is right, and those that lost to it in both orders are wrong. This teaches a judge its own opinion;
            it helps if another, better judge gave the verdicts.
        tasks: Tasks with verifiers; for traces with their prompts the verifier decides, whatever `label` is.
        since: Only traces made after this time, in seconds since 1970.
        until: Only traces made up to this time, likewise.
        min_agreement: Users who agree with the others less often than this are ignored, see `_ignored_users`.

    Returns:
        The rows, and counts: `traces` read, `rows`, `right` and `wrong` answers in them; with `min_agreement` also
        `users` who were compared, `users_not_heard` (ignored) and their `marks_not_heard`.
    """
    by_prompt = {task.prompt: task for task in tasks or ()}
    counts: Counter[str] = Counter({"traces": 0, "rows": 0, "right": 0, "wrong": 0})
    ignored: frozenset[str] = frozenset()
    if min_agreement is not None:
        traces = (trace for trace in _traces(database, since, until) if trace.messages)
        ignored = _ignored_users(traces, by_prompt, min_agreement, counts)
    rows = []
    for trace in _traces(database, since, until):
        counts["traces"] += 1
        if not trace.messages:
            continue
        prompt = as_question(trace.messages)
        task = by_prompt.get(prompt)
        answers = _answers(trace)
        if task is not None:
            known = {index: task.verify(text) for index, text in answers.items()}
        elif label == "feedback":
            known = by_feedback(trace, ignored)
        else:
            known = _by_judge(trace)
        responses = [
            {"model": trace.candidates[index], "text": text, "correct": known[index]}
            for index, text in sorted(answers.items())
            if index in known
        ]
        if not responses:
            continue
        counts["rows"] += 1
        for response in responses:
            counts["right" if response["correct"] else "wrong"] += 1
        reference = task.reference if task is not None else ""
        rows.append(
            {"id": trace.id, "prompt": prompt, "reference": reference, "responses": responses, **_weighing(trace)}
        )
    return rows, dict(counts)


def _weighing(trace: Trace) -> dict[str, Any]:
    """Returns what a combiner's fit needs of a trace of mode `auto`: the domain, and who was asked how probably."""
    if trace.weighing is None:
        return {}
    row: dict[str, Any] = {"propensities": trace.weighing.propensities} if trace.weighing.propensities else {}
    return row | ({"domain": trace.weighing.domain} if trace.weighing.domain else {})


def _traces(database: Database, since: float, until: float) -> Iterator[Trace]:
    """Yields all fused traces with an answer, oldest first; reads a page at a time."""
    query = text(
        "SELECT created_at, id, record FROM traces WHERE outcome = 'ok' AND mode != :single_model AND "
        "created_at <= :until AND (created_at > :since OR (created_at = :since AND id > :after)) "
        "ORDER BY created_at, id LIMIT :page"
    )
    since, after = math.nextafter(since, math.inf), ""  # traces made at `since` itself belong to the time before
    while True:
        bound = {
            "single_model": SINGLE_MODEL_MODE,
            "since": since,
            "until": min(until, 1e18),
            "after": after,
            "page": _PAGE,
        }
        page = database.run_now(lambda connection, bound=bound: connection.execute(query, bound).all())  # type: ignore[misc]
        if not page:
            return
        for _, _, record in page:
            yield Trace.model_validate_json(record)
        since, after = page[-1][0], page[-1][1]


def _answers(trace: Trace) -> dict[int, str]:
    """Returns each candidate's last text: in a debate its last revision."""
    calls = [call for call in trace.calls if call.outcome == "ok" and call.stage in ("answer", "revision")]
    return {call.candidate: call.text for call in calls if call.candidate is not None and call.text}


def by_feedback(trace: Trace, ignored: Container[str] = ()) -> dict[int, bool]:
    """Returns which candidates users marked as right or wrong; later feedback overrides earlier."""
    known: dict[int, bool] = {}
    for user, marks in _marks(trace):
        if user not in ignored:
            known |= marks
    return known


def _marks(trace: Trace) -> Iterator[tuple[str, dict[int, bool]]]:
    """Yields (user, the user's marks by candidate) for each feedback, oldest first.

    Feedback takes these forms: `{"correct": [candidates]}` with or without `{"wrong": [candidates]}`,
    `{"best": candidate}` (the others are then not right), and `{"score": number}` for the answer that was returned
    (right above 0, wrong below). The user is the feedback's `user`, or else the request's API key.
    """
    every = range(len(trace.candidates))
    for feedback in trace.feedback:
        marks: dict[int, bool] = {}
        for name, right in (("correct", True), ("wrong", False)):
            marks |= {index: right for index in _indices(feedback.get(name)) if index in every}
        best = feedback.get("best")
        if isinstance(best, int) and best in every:
            marks |= {index: index == best for index in every}
        score = feedback.get("score")
        if isinstance(score, int | float) and score != 0 and trace.winner is not None:
            marks[trace.winner] = score > 0
        user = feedback.get("user")
        yield f"user {user}" if isinstance(user, str) else f"key {trace.key}", marks


def _ignored_users(
    traces: Iterable[Trace], tasks: Mapping[str, Task], min_agreement: float, counts: Counter[str]
) -> frozenset[str]:
    """Returns the users whose marks agree with the others' less often than `min_agreement`.

    A mark of an answer is compared with the verifier's, or else with the other users' marks of the same answer to the
    same prompt, or else with the judge's: the winner is right, and those that lost to it in both orders are wrong.
    The judge is the least reliable of the three, but it marks most traces; therefore no user is ignored before
    `_MIN_COMPARED` marks were compared.
    """
    marks: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)  # (prompt, answer) → user → mark
    references: dict[tuple[str, str], bool] = {}  # (prompt, answer) → the verifier's mark, or else the judge's
    for trace in traces:
        prompt, answers, judged = as_question(trace.messages), _answers(trace), _by_judge(trace)
        for user, user_marks in _marks(trace):
            for index in user_marks.keys() & answers.keys():
                answer = (prompt, answers[index])
                marks[answer][user] = user_marks[index]
                if (task := tasks.get(prompt)) is not None:
                    references[answer] = task.verify(answers[index])
                elif index in judged:
                    references.setdefault(answer, judged[index])
    agreed: dict[str, list[bool]] = defaultdict(list)
    for answer, by_user in marks.items():
        for user, right in by_user.items():
            others = [mark for other, mark in by_user.items() if other != user]
            if answer[0] not in tasks and others and 2 * sum(others) != len(others):
                agreed[user].append(right == (2 * sum(others) > len(others)))
            elif answer in references:
                agreed[user].append(right == references[answer])
    compared = {user: results for user, results in agreed.items() if len(results) >= _MIN_COMPARED}
    ignored = frozenset(user for user, results in compared.items() if sum(results) < min_agreement * len(results))
    counts["users"] = len(compared)
    counts["users_not_heard"] = len(ignored)
    counts["marks_not_heard"] = sum(user in ignored for by_user in marks.values() for user in by_user)
    return ignored


def _by_judge(trace: Trace) -> dict[int, bool]:
    """Returns the winner of a judged trace as right, and those that lost to it in both orders as wrong."""
    if trace.winner is None or trace.reason != "judged":
        return {}
    known: dict[int, bool] = {}
    for verdict in trace.verdicts:
        if verdict.winner == "tie" or not verdict.consistent:
            continue
        won, lost = (verdict.first, verdict.second) if verdict.winner == "first" else (verdict.second, verdict.first)
        if won == trace.winner:
            known |= {won: True, lost: False}
    return known


def _indices(value: object) -> list[int]:
    return [index for index in value if isinstance(index, int)] if isinstance(value, list) else []
