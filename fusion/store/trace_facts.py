"""What lists of traces are filtered by: a few facts of each trace, in a table of its own, and the search in them.

A trace's record has kilobytes of JSON, which no search can read a hundred thousand times. Its facts are written with
it, as is what it adds to the sums of spending. Traces that an earlier version wrote get theirs when somebody first asks
(`backfill`).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, text

from mixfuse.contracts.judge_protocol import text_of
from mixfuse.contracts.trace import Trace
from mixfuse.fusion.store import spending
from mixfuse.fusion.store.export_traces import by_feedback

CUT_OFF = frozenset({"cancelled", "cancelled_straggler", "cancelled_hedge"})
"""Outcomes of calls that nobody waited for any more: they are no failures."""

_SHOWN, _SEARCHED = 200, 1000  # characters
# A search for words reads so many rows at a time, and ends after so long even if it has not found enough.
_ROWS = 4000
_SEARCH_S = 0.15
_MOST_BYTES = 32 << 20
_RECORDS = text("SELECT id, record FROM traces WHERE id IN :ids").bindparams(bindparam("ids", expanding=True))

_NAMES = (
    "id", "created_at", "mode", "key_id", "reason", "outcome", "members", "failed", "disagreement", "flipped", "unsure",
    "confidence", "cost", "duration_ms", "feedback", "marked_right", "question", "words",
)  # fmt: skip

INSERT = text(
    f"INSERT INTO trace_facts ({', '.join(_NAMES)}) VALUES ({', '.join(':' + name for name in _NAMES)}) "  # noqa: S608
    "ON CONFLICT (id) DO NOTHING"
)


def facts(trace: Trace) -> dict[str, Any]:
    """Returns the facts of a trace: the columns of its row."""
    asked = question(trace)
    answers = {call.candidate: call.text for call in trace.calls if call.stage == "answer" and call.outcome == "ok"}
    weighing = trace.weighing
    ways = len(weighing.classes) if weighing else len({" ".join((given or "").split()) for given in answers.values()})
    failed = any(call.outcome != "ok" and call.outcome not in CUT_OFF for call in trace.calls)
    aimed = weighing.target if weighing else None
    unsure = weighing is not None and (weighing.low_confidence or (aimed is not None and weighing.confidence < aimed))
    return {
        "id": trace.id,
        "created_at": trace.created_at,
        "mode": trace.mode,
        "key_id": trace.key,
        "reason": trace.reason,
        "outcome": trace.outcome,
        "members": f"|{'|'.join(dict.fromkeys(trace.candidates))}|",
        "failed": int(failed or trace.outcome != "ok"),
        "disagreement": int(ways > 1),
        "flipped": int(any(not verdict.consistent for verdict in trace.verdicts)),
        "unsure": int(unsure),
        "confidence": weighing.confidence if weighing else None,
        "cost": trace.cost,
        "duration_ms": trace.duration_ms,
        "feedback": len(trace.feedback),
        "marked_right": marked_right(trace),
        "question": storable(asked[:_SHOWN]),
        "words": storable(f"{asked[:_SEARCHED]}\n{(trace.answer or '')[:_SEARCHED]}".lower()),
    }


def marked_right(trace: Trace) -> int | None:
    """Returns 1 if users say that the answer that was returned is right, 0 if wrong, None where nobody says either.

    A score is for that answer. Marks of candidates count where it is one of them; later feedback overrides earlier.
    """
    known = by_feedback(trace)
    if trace.winner is not None:
        mark = known.get(trace.winner)
        return None if mark is None else int(mark)
    if len(trace.candidates) == 1 and 0 in known:
        return int(known[0])
    scores = [score for said in trace.feedback if isinstance(score := said.get("score"), int | float) and score]
    return int(scores[-1] > 0) if scores else None


def question(trace: Trace) -> str:
    """Returns the last thing that the user said; "" if there is none, or none that can be read."""
    last = next((turn.get("content") for turn in reversed(trace.messages) if turn.get("role") == "user"), "")
    try:
        return text_of(last)
    except (KeyError, TypeError):  # parts of another API's form
        return ""


def storable(value: str) -> str:
    """Returns a text that every database takes: PostgreSQL refuses NUL, and both refuse lone surrogates."""
    return value.replace("\0", "").encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class Filters:
    """Which traces to find; what is unset filters nothing.

    Attributes:
        mode: The mode.
        member: A member that could have been asked.
        key_id: The id of the API key.
        reason: How the answer was chosen.
        outcome: "ok", or the kind of the failure.
        failed: The request or one of its calls failed.
        disagreement: The members gave more than one answer.
        flipped: The judge's two orders disagreed in a pair.
        unsure: The answer's confidence was below the target, or it is marked `low_confidence`.
        feedback: Somebody has given feedback.
        no_feedback: Nobody has.
        min_cost: Dollars.
        min_ms: Milliseconds.
        since: Seconds since 1970; and until, exclusive.
        until: …
        words: In the beginning of the question or of the answer, in any case.
    """

    mode: str | None = None
    member: str | None = None
    key_id: str | None = None
    reason: str | None = None
    outcome: str | None = None
    failed: bool = False
    disagreement: bool = False
    flipped: bool = False
    unsure: bool = False
    feedback: bool = False
    no_feedback: bool = False
    min_cost: float | None = None
    min_ms: float | None = None
    since: float | None = None
    until: float | None = None
    words: str | None = None

    def conditions(self) -> tuple[list[str], dict[str, Any]]:
        """Returns SQL conditions, less the one for `words`, and the values bound in them."""
        found: list[str] = []
        bound: dict[str, Any] = {}
        for name in ("mode", "key_id", "reason", "outcome"):
            if (value := getattr(self, name)) is not None:
                found.append(f"{name} = :{name}")
                bound[name] = storable(value)
        found += [f"{name} = 1" for name in ("failed", "disagreement", "flipped", "unsure") if getattr(self, name)]
        found += ["feedback > 0"] if self.feedback else []
        found += ["feedback = 0"] if self.no_feedback else []
        for name, column, sign in (
            ("min_cost", "cost", ">="), ("min_ms", "duration_ms", ">="),
            ("since", "created_at", ">="), ("until", "created_at", "<"),
        ):  # fmt: skip
            if (value := getattr(self, name)) is not None:
                found.append(f"{column} {sign} :{name}")
                bound[name] = value
        if self.member is not None:
            found.append("members LIKE :member ESCAPE '!'")
            bound["member"] = f"%|{_escaped(storable(self.member))}|%"
        return found, bound


class Place(NamedTuple):
    """Where a page of a list ends: the time and the id of its last trace."""

    at: float
    id: str


class Found(NamedTuple):
    """A page of a list.

    Attributes:
        rows: The facts, newest first.
        next: Where the next page goes on; None at the end.
        partial: The search for words took too long and was stopped at `next`.
    """

    rows: list[dict[str, Any]]
    next: Place | None
    partial: bool = False


def find(connection: Connection, filters: Filters, *, after: Place | None = None, limit: int = 50) -> Found:
    """Returns a page of the traces that pass the filters.

    Args:
        connection: The database.
        filters: Which traces.
        after: The page's place in the list; None for the newest.
        limit: The most rows.
    """
    conditions, bound = filters.conditions()
    if filters.words is None:
        ids = _ids(connection, conditions, bound, after, limit + 1)
        rows = _rows(connection, ids[:limit])
        return Found(rows, _place(rows) if len(ids) > limit else None)
    words = storable(filters.words.lower())
    end = time.monotonic() + _SEARCH_S
    rows = []
    while True:
        ids = _ids(connection, conditions, bound, after, _ROWS)
        found = [row for row in _rows(connection, ids, containing=words)][: limit + 1 - len(rows)]
        rows += found
        if len(rows) > limit:
            return Found(rows[:limit], _place(rows[:limit]))
        if len(ids) < _ROWS:
            return Found(rows, None)
        after = Place(*ids[-1])
        if time.monotonic() > end:
            return Found(rows, after, partial=True)


def values_of(connection: Connection, key_id: str | None) -> dict[str, list[str]]:
    """Returns the values that modes, reasons and outcomes have among the newest traces, for menus."""
    where, bound = ("WHERE key_id = :key_id", {"key_id": key_id}) if key_id is not None else ("", {})
    query = f"SELECT mode, reason, outcome FROM trace_facts {where} ORDER BY created_at DESC LIMIT 2000"  # noqa: S608
    rows = connection.execute(text(query), bound).all()
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    return {
        name: sorted({value for value in column if value})
        for name, column in zip(("mode", "reason", "outcome"), columns, strict=True)
    }


def traces_of(connection: Connection, ids: Sequence[str]) -> list[Trace]:
    """Returns those traces, in that order; those that cannot be read, and what exceeds 32 MB in all, are left out."""
    if not ids:
        return []
    found: dict[str, Trace] = {}
    size = 0
    for trace_id, record in connection.execute(_RECORDS, {"ids": list(ids)}):
        size += len(record)
        if size > _MOST_BYTES and found:
            break
        try:
            found[trace_id] = Trace.model_validate_json(record)
        except ValueError:  # `TraceStore` names traces that cannot be read
            continue
    return [found[trace_id] for trace_id in ids if trace_id in found]


def backfill(connection: Connection, before: Place | None, count: int) -> Place | None:
    """Writes the facts of traces that have none, the newest first, and adds them to the sums of spending.

    Args:
        connection: The database.
        before: Where the call before this one ended; None for the newest trace.
        count: How many traces to look at.

    Returns:
        Where to go on; None at the end.
    """
    later = "" if before is None else "WHERE (t.created_at, t.id) < (:at, :id)"
    query = text(
        "SELECT t.created_at, t.id, CASE WHEN f.id IS NULL THEN t.record END "  # noqa: S608
        f"FROM traces t LEFT JOIN trace_facts f ON f.id = t.id {later} ORDER BY t.created_at DESC, t.id DESC LIMIT :n"
    )
    found = connection.execute(query, {"n": count, **({} if before is None else before._asdict())}).all()
    missing = []
    for _, _, record in found:
        if record is None:
            continue
        try:
            trace = Trace.model_validate_json(record)
        except ValueError:  # `TraceStore` names traces that cannot be read
            continue
        if connection.execute(INSERT, facts(trace)).rowcount:  # no other gateway was faster
            missing.append(spending.sums_of(trace))
    spending.add(connection, missing)
    return Place(found[-1][0], found[-1][1]) if len(found) == count else None


def _ids(
    connection: Connection, conditions: Sequence[str], bound: dict[str, Any], after: Place | None, limit: int
) -> list[tuple[float, str]]:
    """Finds by an index that has all columns of the conditions: no row is read for a trace that does not pass."""
    every = [*conditions, *(["(created_at, id) < (:at, :id)"] if after is not None else [])]
    where = f"WHERE {' AND '.join(every)}" if every else ""
    query = f"SELECT created_at, id FROM trace_facts {where} ORDER BY created_at DESC, id DESC LIMIT :limit"  # noqa: S608
    found = connection.execute(text(query), {**bound, "limit": limit, **(after._asdict() if after is not None else {})})
    return [(at, trace_id) for at, trace_id in found]


def _rows(
    connection: Connection, ids: Sequence[tuple[float, str]], *, containing: str | None = None
) -> list[dict[str, Any]]:
    if not ids:
        return []
    # Between the first and the last of them, rather than a list of thousands of ids.
    query = f"SELECT {', '.join(_NAMES[:-1])} FROM trace_facts WHERE created_at <= :newest AND created_at >= :oldest"  # noqa: S608
    bound: dict[str, Any] = {"newest": ids[0][0], "oldest": ids[-1][0]}
    if len(ids) <= 500:
        query += f" AND id IN ({', '.join(f':i{place}' for place in range(len(ids)))})"
        bound |= {f"i{place}": trace_id for place, (_, trace_id) in enumerate(ids)}
    if containing is not None:
        query += " AND words LIKE :words ESCAPE '!'"
        bound["words"] = f"%{_escaped(containing)}%"
    wanted = {trace_id for _, trace_id in ids}
    rows = connection.execute(text(f"{query} ORDER BY created_at DESC, id DESC"), bound).mappings()
    return [dict(row) for row in rows if row["id"] in wanted]


def _place(rows: Sequence[dict[str, Any]]) -> Place:
    return Place(rows[-1]["created_at"], rows[-1]["id"])


def _escaped(words: str) -> str:
    return words.replace("!", "!!").replace("%", "!%").replace("_", "!_")
