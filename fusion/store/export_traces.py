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
from mixfuse.contracts.trace import Trace
from mixfuse.fusion.messages import question

Label = Literal["feedback", "judge"]

_PAGE = 500
_COMPARED = 10
"""So many marks of a user must have been compared before the user can be found not to be worth hearing."""


class Task(Protocol):
    """A question whose answers can be checked."""

    @property
    def prompt(self) -> str:
        """What was asked."""
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
    """Writes what `read` reads to a file.

    Args:
        database: The gateway's.
        out: The file to write.
        label: As `read`'s.
        tasks: As `read`'s.
        days: Only traces of the last so many days.
        min_agreement: As `read`'s.

    Returns:
        `read`'s counts.

    Raises:
        MixfuseError: Nothing is known of any answer, or `out` cannot be written.
    """
    since = 0.0 if days is None else time.time() - days * 86400
    rows, counts = read(database, label=label, tasks=tasks, since=since, min_agreement=min_agreement)
    if not rows:
        raise MixfuseError(
            f"{database.name}: of {counts['traces']} traces none says which answers are right; send feedback to "
            "/v1/traces/ID/feedback, or name tasks with verifiers (--tasks)"
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
    """Reads one row a trace: `{id, prompt, reference, responses: [{model, text, correct}]}`.

    Only answers of which something is known are in it; traces without any are left out, as are those whose text was
    not stored.

    Args:
        database: The gateway's.
        label: Whose word says which answers are right. `feedback`: users', see `by_feedback`. `judge`: the answer
            that won is right, those that lost to it in both orders are wrong. That teaches a judge its own opinion;
            it is of use where another, better judge spoke.
        tasks: Tasks with verifiers; they say of traces with their prompts which answers are right, whatever `label`.
        since: Only traces made after this time, in seconds since 1970.
        until: Only traces made up to this time.
        min_agreement: Users who agree with everyone else less often than this are not heard, see `_not_heard`.

    Returns:
        The rows, and counts: `traces` read, `rows`, `right` and `wrong` answers in them; with `min_agreement` also
        `users` who were compared, `users_not_heard` and their `marks_not_heard`.
    """
    by_prompt = {task.prompt: task for task in tasks or ()}
    counts: Counter[str] = Counter({"traces": 0, "rows": 0, "right": 0, "wrong": 0})
    not_heard: frozenset[str] = frozenset()
    if min_agreement is not None:
        traces = (trace for trace in _traces(database, since, until) if trace.messages)
        not_heard = _not_heard(traces, by_prompt, min_agreement, counts)
    rows = []
    for trace in _traces(database, since, until):
        counts["traces"] += 1
        if not trace.messages:
            continue
        prompt = question(trace.messages)
        task = by_prompt.get(prompt)
        answers = _answers(trace)
        if task is not None:
            known = {index: task.verify(text) for index, text in answers.items()}
        elif label == "feedback":
            known = by_feedback(trace, not_heard)
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
        rows.append({"id": trace.id, "prompt": prompt, "reference": reference, "responses": responses})
    return rows, dict(counts)


def _traces(database: Database, since: float, until: float) -> Iterator[Trace]:
    """All traces that gave an answer, oldest first, a page at a time."""
    query = text(
        "SELECT created_at, id, record FROM traces WHERE outcome = 'ok' AND mode != 'pass_through' AND "
        "created_at <= :until AND (created_at > :since OR (created_at = :since AND id > :after)) "
        "ORDER BY created_at, id LIMIT :page"
    )
    since, after = math.nextafter(since, math.inf), ""  # those made at `since` itself were of the time before
    while True:
        bound = {"since": since, "until": min(until, 1e18), "after": after, "page": _PAGE}
        page = database.run_now(lambda connection, bound=bound: connection.execute(query, bound).all())  # type: ignore[misc]
        if not page:
            return
        for _, _, record in page:
            yield Trace.model_validate_json(record)
        since, after = page[-1][0], page[-1][1]


def _answers(trace: Trace) -> dict[int, str]:
    """Each candidate's last text; a debate's revisions take the place of the first answers."""
    calls = [call for call in trace.calls if call.outcome == "ok" and call.stage in ("answer", "revision")]
    return {call.candidate: call.text for call in calls if call.candidate is not None and call.text}


def by_feedback(trace: Trace, not_heard: Container[str] = ()) -> dict[int, bool]:
    """What users said, by candidate; later feedback overrides earlier."""
    known: dict[int, bool] = {}
    for user, marks in _marks(trace):
        if user not in not_heard:
            known |= marks
    return known


def _marks(trace: Trace) -> Iterator[tuple[str, dict[int, bool]]]:
    """Who said what of the candidates, in the order in which it came.

    Understood are `{"correct": [candidates]}` with or without `{"wrong": [candidates]}`, `{"best": candidate}` (the
    others are worse, so not right), and `{"score": number}` of the answer that was returned: right above 0, wrong
    below. Who said it is the feedback's `user`, where it has one, and otherwise the key the request came with.
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


def _not_heard(
    traces: Iterable[Trace], tasks: Mapping[str, Task], min_agreement: float, counts: Counter[str]
) -> frozenset[str]:
    """Users whose marks are borne out less often than `min_agreement`, of at least `_COMPARED`.

    A mark of an answer is compared with what a verifier says of it, or else with what the other users said of the same
    answer to the same prompt, or else with the judge: of the winner and those that lost to it in both orders. The last
    is the weakest witness, but it is there for most traces; so nobody is silenced for a few marks against it.
    """
    marks: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)  # (prompt, answer) → user → mark
    others: dict[tuple[str, str], bool] = {}  # what a verifier, or else the judge, says of it
    for trace in traces:
        prompt, answers, judged = question(trace.messages), _answers(trace), _by_judge(trace)
        for user, said in _marks(trace):
            for index in said.keys() & answers.keys():
                answer = (prompt, answers[index])
                marks[answer][user] = said[index]
                if (task := tasks.get(prompt)) is not None:
                    others[answer] = task.verify(answers[index])
                elif index in judged:
                    others.setdefault(answer, judged[index])
    borne_out: dict[str, list[bool]] = defaultdict(list)
    for answer, by_user in marks.items():
        for user, right in by_user.items():
            rest = [said for other, said in by_user.items() if other != user]
            if answer[0] not in tasks and rest and 2 * sum(rest) != len(rest):
                borne_out[user].append(right == (2 * sum(rest) > len(rest)))
            elif answer in others:
                borne_out[user].append(right == others[answer])
    compared = {user: found for user, found in borne_out.items() if len(found) >= _COMPARED}
    silent = frozenset(user for user, found in compared.items() if sum(found) < min_agreement * len(found))
    counts["users"] = len(compared)
    counts["users_not_heard"] = len(silent)
    counts["marks_not_heard"] = sum(user in silent for by_user in marks.values() for user in by_user)
    return silent


def _by_judge(trace: Trace) -> dict[int, bool]:
    """The winner of a judged trace, and those that lost to it in both orders."""
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
