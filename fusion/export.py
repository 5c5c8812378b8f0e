"""`mixfuse traces export`: traces as pool responses, from which `mixfuse pairs build` makes preference pairs."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from sqlalchemy import text

from fusion.run import question
from mixfuse.database import Database
from mixfuse.errors import MixfuseError
from mixfuse.files import write_jsonl
from mixfuse.trace import Trace

_PAGE = 500


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
    label: Literal["feedback", "judge"] = "feedback",
    tasks: Sequence[Task] | None = None,
    days: float | None = None,
) -> dict[str, int]:
    """Writes one row a trace: `{id, prompt, reference, responses: [{model, text, correct}]}`.

    Only answers of which something is known are in it; traces without any are left out, as are those whose text was
    not stored.

    Args:
        database: The gateway's.
        out: The file to write.
        label: Whose word says which answers are right. `feedback`: users', see `by_feedback`. `judge`: the answer
            that won is right, those that lost to it in both orders are wrong. That teaches a judge its own opinion;
            it is of use where another, better judge spoke.
        tasks: Tasks with verifiers; they say of traces with their prompts which answers are right, whatever `label`.
        days: Only traces of the last so many days.

    Returns:
        Counts: `traces` read, `rows` written, `right` and `wrong` answers in them.

    Raises:
        MixfuseError: Nothing is known of any answer, or `out` cannot be written.
    """
    by_prompt = {task.prompt: task for task in tasks or ()}
    counts: Counter[str] = Counter({"traces": 0, "rows": 0, "right": 0, "wrong": 0})

    def rows() -> Iterator[dict[str, Any]]:
        for trace in _traces(database, 0.0 if days is None else time.time() - days * 86400):
            counts["traces"] += 1
            if not trace.messages:
                continue
            prompt = question(trace.messages)
            task = by_prompt.get(prompt)
            answers = _answers(trace)
            if task is not None:
                known = {index: task.verify(text) for index, text in answers.items()}
            else:
                known = by_feedback(trace) if label == "feedback" else _by_judge(trace)
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
            yield {"id": trace.id, "prompt": prompt, "reference": reference, "responses": responses}

    found = list(rows())
    if not found:
        raise MixfuseError(
            f"{database.name}: of {counts['traces']} traces none says which answers are right; send feedback to "
            "/v1/traces/ID/feedback, or name tasks with verifiers (--tasks)"
        )
    write_jsonl(out, found)
    return dict(counts)


def _traces(database: Database, since: float) -> Iterator[Trace]:
    """All traces that gave an answer, oldest first, a page at a time."""
    query = text(
        "SELECT created_at, id, record FROM traces WHERE outcome = 'ok' AND mode != 'pass_through' AND "
        "(created_at > :since OR (created_at = :since AND id > :after)) ORDER BY created_at, id LIMIT :page"
    )
    after = ""
    while True:
        bound = {"since": since, "after": after, "page": _PAGE}
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


def by_feedback(trace: Trace) -> dict[int, bool]:
    """What users said, by candidate; later feedback overrides earlier.

    Understood are `{"correct": [candidates]}` with or without `{"wrong": [candidates]}`, `{"best": candidate}` (the
    others are worse, so not right), and `{"score": number}` of the answer that was returned: right above 0, wrong
    below.
    """
    known: dict[int, bool] = {}
    every = range(len(trace.candidates))
    for feedback in trace.feedback:
        for name, right in (("correct", True), ("wrong", False)):
            known |= {index: right for index in _indices(feedback.get(name)) if index in every}
        best = feedback.get("best")
        if isinstance(best, int) and best in every:
            known |= {index: index == best for index in every}
        score = feedback.get("score")
        if isinstance(score, int | float) and score != 0 and trace.winner is not None:
            known[trace.winner] = score > 0
    return known


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
