"""`mixfuse traces export`: traces as pool responses, from which `mixfuse pairs build` makes preference pairs."""

import hashlib
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

from sqlalchemy import text

from mixfuse.contracts.database import Database
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import write_jsonl
from mixfuse.contracts.mode_names import SINGLE_MODEL_MODE
from mixfuse.contracts.trace import Trace
from mixfuse.fusion.messages import as_question

logger = logging.getLogger(__name__)

Label = Literal["feedback", "judge"]

_PAGE = 100
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
    """Writes the rows of `stream` to a file, as they are read.

    Args:
        database: The gateway's database.
        out: The file to write.
        label: See `stream`.
        tasks: See `stream`.
        days: Only traces of the last this many days.
        min_agreement: See `stream`.

    Returns:
        The counts of `stream`.

    Raises:
        MixfuseError: No answer is known to be right or wrong, or `out` cannot be written.
    """
    since = 0.0 if days is None else time.time() - days * 86400
    counts: Counter[str] = Counter()
    rows = stream(database, counts, label=label, tasks=tasks, since=since, min_agreement=min_agreement)
    first = next(rows, None)
    if first is None:
        raise MixfuseError(
            f"{database.name}: none of {counts['traces']} traces says which answers are right; send feedback to "
            "/v1/traces/ID/feedback, or give tasks with verifiers (--tasks)"
        )
    write_jsonl(out, chain([first], rows))
    return dict(counts)


def read(
    database: Database,
    *,
    label: Label = "feedback",
    tasks: Sequence[Task] | None = None,
    since: float = 0.0,
    until: float = math.inf,
    min_agreement: float | None = None,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Returns all rows of `stream`, and its counts."""
    counts: Counter[str] = Counter()
    rows = stream(database, counts, label=label, tasks=tasks, since=since, until=until, min_agreement=min_agreement)
    return list(rows), dict(counts)


def stream(
    database: Database,
    counts: Counter[str],
    *,
    label: Label = "feedback",
    tasks: Sequence[Task] | None = None,
    since: float = 0.0,
    until: float = math.inf,
    min_agreement: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields traces as rows `{id, prompt, reference, responses: [{model, text, correct}]}`, one a trace.

    A trace of more than one message also has its `messages`, so that a judge is trained on them in their roles.
    `responses` holds only the answers that are known to be right or wrong; traces without such answers, or without
    stored text, give no row. For a combiner's fit, `unmarked` holds the other answers, `verdicts` what the judge said
    (places count `responses`, then `unmarked`), and rows of mode `auto` have `propensities` and `domain`. A trace that
    cannot be read is skipped and named in the log.

    Args:
        database: The gateway's database.
        counts: Takes the numbers of `traces` read, `rows`, `right` and `wrong` answers in them; of `unreadable` traces,
            if there are any; with `min_agreement` also `users` who were compared, `users_not_heard` (ignored) and their
            `marks_not_heard`.
        label: What decides which answers are right. `feedback`: the users, see `by_feedback`. `judge`: the winning
            answer is right, and those that lost to it in both orders are wrong. This teaches a judge its own opinion;
            it helps if another, better judge gave the verdicts.
        tasks: Tasks with verifiers; for traces with their prompts the verifier decides, whatever `label` is.
        since: Only traces made after this time, in seconds since 1970.
        until: Only traces made up to this time, likewise.
        min_agreement: Users who agree with the others less often than this are ignored, see `_ignored_users`.
    """
    by_prompt = {task.prompt: task for task in tasks or ()}
    counts.update({"traces": 0, "rows": 0, "right": 0, "wrong": 0})
    ignored: frozenset[str] = frozenset()
    if min_agreement is not None:
        ignored = _ignored_users(_traces(database, since, until), by_prompt, min_agreement, counts)
    for trace in _traces(database, since, until, counts):
        counts["traces"] += 1
        row = _row(trace, label, by_prompt, ignored) if trace.messages else None
        if row is None:
            continue
        counts["rows"] += 1
        for response in row["responses"]:
            counts["right" if response["correct"] else "wrong"] += 1
        yield row


def _row(trace: Trace, label: Label, by_prompt: Mapping[str, Task], ignored: Container[str]) -> dict[str, Any] | None:
    """Returns a trace's row; None if no answer is known to be right or wrong."""
    prompt = as_question(trace.messages)
    task = by_prompt.get(prompt)
    answers = _answers(trace)
    if task is not None:
        known = {index: task.verify(text) for index, text in answers.items()}
    elif label == "feedback":
        known = by_feedback(trace, ignored)
    else:
        known = _by_judge(trace)
    if not known.keys() & answers.keys():
        return None
    # The marked ones first.
    places = sorted(
        (index for index in answers if index < len(trace.candidates)), key=lambda index: (index not in known, index)
    )
    said = [{"model": trace.candidates[index], "text": answers[index]} for index in places]
    responses = [{**one, "correct": known[index]} for one, index in zip(said, places, strict=True) if index in known]
    row: dict[str, Any] = {
        "id": trace.id,
        "prompt": prompt,
        "reference": task.reference if task is not None else "",
        "responses": responses,
        **_messages(trace),
    }
    if unmarked := said[len(responses) :]:
        row["unmarked"] = unmarked
    # Where the judge's word is the mark, it is no evidence for it.
    verdicts = _verdicts(trace, places) if task is not None or label == "feedback" else []
    return row | ({"verdicts": verdicts} if verdicts else {}) | _weighing(trace)


def _verdicts(trace: Trace, places: Sequence[int]) -> list[dict[str, Any]]:
    """Returns the judge's verdicts on answers in a row, by their places in it; a combiner takes them as evidence."""
    judge = next((call.member for call in trace.calls if call.stage == "verdict"), "judge")
    return [
        {
            "judge": judge,
            "first": places.index(verdict.first),
            "second": places.index(verdict.second),
            "score": verdict.score,
        }
        for verdict in trace.verdicts
        if verdict.first in places and verdict.second in places and verdict.first != verdict.second
    ]


def _messages(trace: Trace) -> dict[str, Any]:
    """Returns the messages of a conversation; a lone question is its prompt."""
    lone = len(trace.messages) == 1 and trace.messages[0].get("role") == "user"
    return {} if lone else {"messages": trace.messages}


def _weighing(trace: Trace) -> dict[str, Any]:
    """Returns what a combiner's fit needs of a trace of mode `auto`: the domain, and who was asked how probably."""
    if trace.weighing is None:
        return {}
    row: dict[str, Any] = {"propensities": trace.weighing.propensities} if trace.weighing.propensities else {}
    return row | ({"domain": trace.weighing.domain} if trace.weighing.domain else {})


def _traces(database: Database, since: float, until: float, counts: Counter[str] | None = None) -> Iterator[Trace]:
    """Yields all fused traces with an answer that can be read, oldest first; reads a page at a time.

    With `counts` it counts the others as `unreadable` and names them in the log.
    """
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
        for _, trace_id, record in page:
            try:
                trace = Trace.model_validate_json(record)
                as_question(trace.messages)  # of messages it knows only that they are objects
            except (ValueError, LookupError, TypeError, AttributeError):
                if counts is not None:
                    counts["unreadable"] += 1
                    logger.warning("trace %s cannot be read; it is skipped", trace_id)
                continue
            yield trace
        since, after = page[-1][0], page[-1][1]


def _answers(trace: Trace) -> dict[int, str]:
    """Returns each candidate's last text: in a debate its last revision."""
    calls = [call for call in trace.calls if call.outcome == "ok" and call.stage in ("answer", "revision")]
    return {call.candidate: call.text for call in calls if call.candidate is not None and call.text}


def by_feedback(trace: Trace, ignored: Container[str] = ()) -> dict[int, bool]:
    """Returns which candidates users marked as right or wrong; later feedback overrides earlier."""
    known: dict[int, bool | None] = {}
    for user, marks in _marks(trace):
        if user not in ignored:
            known |= marks
    return {index: right for index, right in known.items() if right is not None}


def _marks(trace: Trace) -> Iterator[tuple[str, dict[int, bool | None]]]:
    """Yields (user, the user's marks by candidate) for each feedback, oldest first; None takes a mark back.

    Feedback takes these forms: `{"correct": [candidates]}` with or without `{"wrong": [candidates]}` and
    `{"unmarked": [candidates]}`, `{"best": candidate}` (the others are then not right), and `{"score": number}` for the
    answer that was returned (right above 0, wrong below). The user is the feedback's `user`, or else the request's API
    key.
    """
    every = range(len(trace.candidates))
    for feedback in trace.feedback:
        marks: dict[int, bool | None] = {}
        for name, right in (("unmarked", None), ("correct", True), ("wrong", False)):
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
    marks: dict[bytes, dict[str, bool]] = defaultdict(dict)  # the hash of (prompt, answer) → user → mark
    references: dict[bytes, bool] = {}  # likewise → the verifier's mark, or else the judge's
    verified: set[bytes] = set()
    for trace in traces:
        prompt, answers, judged = as_question(trace.messages), _answers(trace), _by_judge(trace)
        for user, user_marks in _marks(trace):
            for index in user_marks.keys() & answers.keys():
                answer = _digest(prompt, answers[index])
                mark = user_marks[index]
                if mark is None:
                    marks[answer].pop(user, None)
                    continue
                marks[answer][user] = mark
                if (task := tasks.get(prompt)) is not None:
                    references[answer] = task.verify(answers[index])
                    verified.add(answer)
                elif index in judged:
                    references.setdefault(answer, judged[index])
    agreed: dict[str, list[bool]] = defaultdict(list)
    for answer, by_user in marks.items():
        for user, right in by_user.items():
            others = [mark for other, mark in by_user.items() if other != user]
            if answer not in verified and others and 2 * sum(others) != len(others):
                agreed[user].append(right == (2 * sum(others) > len(others)))
            elif answer in references:
                agreed[user].append(right == references[answer])
    compared = {user: results for user, results in agreed.items() if len(results) >= _MIN_COMPARED}
    ignored = frozenset(user for user, results in compared.items() if sum(results) < min_agreement * len(results))
    counts["users"] = len(compared)
    counts["users_not_heard"] = len(ignored)
    counts["marks_not_heard"] = sum(user in ignored for by_user in marks.values() for user in by_user)
    return ignored


def _digest(prompt: str, answer: str) -> bytes:
    return hashlib.sha256(f"{len(prompt)} {prompt}{answer}".encode(errors="surrogatepass")).digest()


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
