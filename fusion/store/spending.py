"""What was spent, in sums: by day, API key, mode, member and the purpose of the calls.

The sums are written with the trace, in the same transaction, and stay when traces expire: they hold no text. A table of
sums is read in milliseconds where a hundred thousand traces are not.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import sqrt
from typing import Any, NamedTuple

from sqlalchemy import Connection, text

from mixfuse.contracts.trace import Trace, time_in_utc

_REQUEST = ("day", "key_id", "mode")
_CALL = (*_REQUEST, "member", "stage")
_REQUEST_SUMS = ("requests", "cost")
_CALL_SUMS = ("calls", "asked", "spared", "prompt_tokens", "completion_tokens", "cost")
# The normal quantile of a 95 % interval.
_Z = 1.959964


def _adding(table: str, keys: Sequence[str], sums: Sequence[str]) -> Any:
    names = (*keys, *sums)
    added = ", ".join(f"{name} = {table}.{name} + excluded.{name}" for name in sums)
    return text(
        f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join(':' + name for name in names)}) "  # noqa: S608
        f"ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {added}"
    )


_ADD_REQUESTS = _adding("spent_on_requests", _REQUEST, _REQUEST_SUMS)
_ADD_CALLS = _adding("spent_on_calls", _CALL, _CALL_SUMS)


_Totals = dict[tuple[str, ...], dict[str, float]]


class Sums(NamedTuple):
    """What traces add to the sums.

    Attributes:
        requests: (day, key, mode) → number and dollars.
        calls: (day, key, mode, member, stage) → the sums of `_CALL_SUMS`.
    """

    requests: Mapping[tuple[str, ...], Mapping[str, float]]
    calls: Mapping[tuple[str, ...], Mapping[str, float]]


def sums_of(trace: Trace) -> Sums:
    """Returns what one trace adds.

    A member is spared where mode `auto` could have asked it and did not.
    """
    at = (time_in_utc(trace.created_at).date().isoformat(), trace.key or "", trace.mode)
    calls: _Totals = {}
    answered = {(call.member, call.candidate) for call in trace.calls if call.stage == "answer"}
    for call in trace.calls:
        used = call.usage
        spent = {"prompt_tokens": used.prompt_tokens, "completion_tokens": used.completion_tokens, "cost": call.cost}
        _add(calls, (*at, call.member, call.stage), {"calls": 1, **spent})
    for member, _ in answered:
        _add(calls, (*at, member, "answer"), {"asked": 1})
    if trace.weighing is not None and trace.cached_from is None:
        asked = {*trace.weighing.asked, *(member for member, _ in answered)}
        for member in trace.candidates:
            if member not in asked:
                _add(calls, (*at, member, "answer"), {"spared": 1})
    return Sums({at: {"requests": 1, "cost": trace.cost}}, calls)


def _add(totals: _Totals, place: tuple[str, ...], values: Mapping[str, float]) -> None:
    there = totals.setdefault(place, {})
    for name, value in values.items():
        there[name] = there.get(name, 0) + value


def add(connection: Connection, all_sums: Iterable[Sums]) -> None:
    """Adds to the sums in the database."""
    requests: _Totals = {}
    calls: _Totals = {}
    for sums in all_sums:
        for total, more in ((requests, sums.requests), (calls, sums.calls)):
            for place, values in more.items():
                _add(total, place, values)
    for statement, names, columns, total in (
        (_ADD_REQUESTS, _REQUEST, _REQUEST_SUMS, requests),
        (_ADD_CALLS, _CALL, _CALL_SUMS, calls),
    ):
        # In one order, so that two gateways that write the same rows of PostgreSQL wait for each other only one way.
        rows = [
            {**dict(zip(names, place, strict=True)), **{column: values.get(column, 0) for column in columns}}
            for place, values in sorted(total.items())
        ]
        if rows:
            connection.execute(statement, rows)


@dataclass(frozen=True)
class Slice:
    """Which spending to show.

    Attributes:
        since: The first day, in UTC, as ISO 8601 writes it.
        until: The last day.
        key_id: Of this API key alone; "" for requests without a key, None for all.
        mode: Of this mode alone; None for all.
    """

    since: str
    until: str
    key_id: str | None = None
    mode: str | None = None

    def where(self) -> tuple[str, dict[str, Any]]:
        """Returns the condition in SQL, and the values bound in it."""
        named = {name: value for name in ("key_id", "mode") if (value := getattr(self, name)) is not None}
        conditions = ["day >= :since", "day <= :until", *(f"{name} = :{name}" for name in named)]
        return " AND ".join(conditions), {"since": self.since, "until": self.until, **named}


@dataclass(frozen=True)
class Part:
    """The spending of one day, key or mode.

    Attributes:
        name: Which.
        requests: The number of requests.
        cost: Dollars.
    """

    name: str
    requests: int
    cost: float


@dataclass(frozen=True)
class Calls:
    """The spending on one member's calls of one purpose.

    Attributes:
        member: Its name in the config.
        stage: What the calls were for.
        calls: Their number, retries and cancelled calls included.
        asked: How many answers were asked for.
        spared: How many answers `auto` could have asked for and did not.
        prompt_tokens: What was sent.
        completion_tokens: What was written.
        cost: Dollars.
    """

    member: str
    stage: str
    calls: int
    asked: int
    spared: int
    prompt_tokens: int
    completion_tokens: int
    cost: float

    @property
    def unpriced(self) -> bool:
        """Whether tokens were used and cost nothing: the member is free, or its price is in no config."""
        return self.cost == 0 and self.prompt_tokens + self.completion_tokens > 0


@dataclass(frozen=True)
class Saved:
    """What mode `auto` cost, beside what it would have cost to ask everybody.

    Attributes:
        requests: The number of requests in that mode.
        paid: Dollars for all of their calls, the judge's included.
        spared: How many answers were not asked for.
        unasked: Dollars that those answers would have cost, at their members' mean price in the same days.
        unknown: Members without such a mean, since nobody asked them in these days; their share is in no sum.
        unpriced: Members that were asked and cost nothing; likewise.
    """

    requests: int
    paid: float
    spared: int
    unasked: float
    unknown: Sequence[str]
    unpriced: Sequence[str]

    @property
    def share(self) -> float | None:
        """What was paid, over what asking everybody would have cost with the same verdicts; None where all is free."""
        return self.paid / (self.paid + self.unasked) if self.paid + self.unasked > 0 else None


@dataclass(frozen=True)
class Right:
    """What a right answer cost, where somebody has marked the answer that was returned.

    Attributes:
        mode: The mode.
        marked: How many answers are marked.
        right: How many of them are right.
        cost: Dollars for all of the marked.
    """

    mode: str
    marked: int
    right: int
    cost: float

    @property
    def each(self) -> float | None:
        """Dollars for a right answer; None where none is right."""
        return self.cost / self.right if self.right else None

    @property
    def interval(self) -> tuple[float, float | None]:
        """The 95 % interval of `each`, from Wilson's interval (JASA 22, 1927) of the share that is right.

        The upper end is None where that share may be 0. The mean cost of a request is taken as it was.
        """
        n, share = self.marked, self.right / self.marked
        middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
        low, high = max(0.0, middle - half), min(1.0, middle + half)
        mean = self.cost / n
        return mean / high, mean / low if self.right else None


def by(connection: Connection, column: str, part: Slice) -> list[Part]:
    """Returns the spending by "day", "key_id" or "mode"; days in their order, the others by cost."""
    where, bound = part.where()
    order = "1" if column == "day" else "3 DESC, 2 DESC, 1"
    rows = connection.execute(
        text(
            f"SELECT {column}, SUM(requests), SUM(cost) FROM spent_on_requests WHERE {where} "  # noqa: S608 - ours
            f"GROUP BY {column} ORDER BY {order}"
        ),
        bound,
    )
    return [Part(str(name), int(requests), float(cost)) for name, requests, cost in rows]


def by_member(connection: Connection, part: Slice) -> list[Calls]:
    """Returns the spending by member and purpose, the greatest first."""
    where, bound = part.where()
    sums = ", ".join(f"SUM({name}) AS {name}" for name in _CALL_SUMS)
    rows = connection.execute(
        text(
            f"SELECT member, stage, {sums} FROM spent_on_calls WHERE {where} GROUP BY member, stage "  # noqa: S608
            "ORDER BY SUM(cost) DESC, SUM(calls) DESC, member, stage"
        ),
        bound,
    )
    return [
        Calls(
            member=row.member,
            stage=row.stage,
            calls=int(row.calls),
            asked=int(row.asked),
            spared=int(row.spared),
            prompt_tokens=int(row.prompt_tokens),
            completion_tokens=int(row.completion_tokens),
            cost=float(row.cost),
        )
        for row in rows
    ]


def saved(connection: Connection, part: Slice) -> Saved | None:
    """Returns what `auto` saved; None if it was not used, or another mode is asked for."""
    if part.mode not in (None, "auto"):
        return None
    auto = Slice(part.since, part.until, part.key_id, "auto")
    used = by(connection, "mode", auto)
    if not used:
        return None
    # A price is that of all requests of these days: of one key's there may be few.
    means = {
        row.member: (row.cost / row.asked, row.unpriced)
        for row in by_member(connection, Slice(part.since, part.until))
        if row.stage == "answer" and row.asked
    }
    spared = {row.member: row.spared for row in by_member(connection, auto) if row.spared}
    known = [member for member in spared if member in means]
    return Saved(
        requests=used[0].requests,
        paid=used[0].cost,
        spared=sum(spared.values()),
        unasked=sum(spared[member] * means[member][0] for member in known),
        unknown=sorted(spared.keys() - means.keys()),
        unpriced=sorted(member for member in known if means[member][1]),
    )


def right_answers(connection: Connection, part: Slice) -> list[Right]:
    """Returns what right answers cost by mode, where answers are marked."""
    first = datetime.fromisoformat(part.since).replace(tzinfo=UTC).timestamp()
    end = datetime.fromisoformat(part.until).replace(tzinfo=UTC).timestamp() + 86400
    conditions = ["marked_right IS NOT NULL", "created_at >= :first", "created_at < :end"]
    bound: dict[str, Any] = {"first": first, "end": end}
    if part.key_id is not None:
        conditions.append("COALESCE(key_id, '') = :key_id")
        bound["key_id"] = part.key_id
    if part.mode is not None:
        conditions.append("mode = :mode")
        bound["mode"] = part.mode
    rows = connection.execute(
        text(
            "SELECT mode, COUNT(*), SUM(marked_right), SUM(cost) FROM trace_facts "  # noqa: S608 - our own words
            f"WHERE {' AND '.join(conditions)} GROUP BY mode ORDER BY mode"
        ),
        bound,
    )
    return [Right(mode, int(marked), int(right), float(cost)) for mode, marked, right, cost in rows]


def first_day_of_all(connection: Connection, key_id: str | None) -> str | None:
    """Returns the first day with any request, of one key if one is named; None if there is none."""
    where, bound = ("WHERE key_id = :key_id", {"key_id": key_id}) if key_id is not None else ("", {})
    found = connection.execute(text(f"SELECT MIN(day) FROM spent_on_requests {where}"), bound).scalar()  # noqa: S608
    return None if found is None else str(found)
