"""Spend: what was spent, by day, key, member and mode; budgets left; what a right answer cost; what `auto` saved."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from sqlalchemy import Connection
from starlette.responses import Response

from mixfuse.fusion.calls.ledger import NOTHING, Spend
from mixfuse.fusion.http import keys
from mixfuse.fusion.http.keys import ApiKey
from mixfuse.fusion.http.statuses import RequestError
from mixfuse.fusion.store.spending import (
    Calls,
    Part,
    Right,
    Saved,
    Slice,
    by,
    by_member,
    first_day_of_all,
    right_answers,
    saved,
)
from mixfuse.fusion.store.trace_facts import storable
from mixfuse.fusion.ui.frame import Page, Visit
from mixfuse.fusion.ui.texts import dollars

_DAYS = 30
# More days than this are drawn by month.
_MOST_BARS = 92
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 180, 64, 22, 10, 10
_PURPOSES = {
    "answer": "answers",
    "revision": "revisions in debates",
    "verdict": "verdicts",
    "analysis": "analyses before merging",
    "synthesis": "merged texts",
}


@dataclass(frozen=True)
class Bar:
    """A bar of the chart, in the SVG's units.

    Attributes:
        x: Its left edge.
        y: Its upper edge.
        width: Its width.
        height: Its height.
    """

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Budget:
    """What is left of an API key's budget.

    Attributes:
        name: The key's name.
        period: The period of its limits.
        limit: Its limits in words; empty if it has none.
        used: What it used in this period, in words.
        left: What is left, in words; empty if it has no limit.
        share: The share of the tighter limit that is used; None if it has none.
        state: "revoked" or "expired"; empty while it is valid.
    """

    name: str
    period: str
    limit: str
    used: str
    left: str
    share: float | None
    state: str


@dataclass(frozen=True)
class _Found:
    """What the page shows, as the database has it."""

    days: Sequence[Part]
    keys: Sequence[Part]
    modes: Sequence[Part]
    members: Sequence[Calls]
    saved: Saved | None
    right: Sequence[Right]
    known: Sequence[ApiKey]
    usage: dict[str, dict[Any, Spend]]
    all_modes: Sequence[str]
    begin: str | None


async def show(visit: Visit) -> Response:
    """Shows the spending of some days."""
    owner, given = visit.owner(), visit.request.query_params
    today = datetime.now(UTC).date()
    until = _day(given.get("until"), "until") or today
    since = _day(given.get("since"), "since") or _before(min(today, until), _DAYS - 1)
    if since > until:
        raise RequestError("'since' is after 'until'", code="invalid_value", param="since")
    key = given.get("key", "")
    key_id = owner if owner is not None else {"": None, "any": None, "none": ""}.get(key, key)
    mode = given.get("mode") or None
    part = Slice(since.isoformat(), until.isoformat(), key_id and storable(key_id), mode and storable(mode))

    def read(connection: Connection) -> _Found:
        known, usage = keys.read(connection)
        days = by(connection, "day", part)
        return _Found(
            days=days,
            keys=by(connection, "key_id", part) if owner is None else [],
            modes=by(connection, "mode", part),
            members=by_member(connection, part),
            saved=saved(connection, part),
            right=right_answers(connection, part),
            known=[key for key in known if owner in (None, key.id)],
            usage=usage,
            all_modes=[one.name for one in by(connection, "mode", Slice("", "9999", owner))],
            begin=None if days else first_day_of_all(connection, owner),
        )

    found = await visit.read(read)
    names = {"": "no key", **{key.id: key.name for key in found.known}}
    bars = _by_month(found.days) if (until - since).days >= _MOST_BARS else _every_day(found.days, since, until)
    return await visit.page(
        "spend.html.jinja",
        found=found,
        total=sum(one.cost for one in found.days),
        requests=sum(one.requests for one in found.days),
        names=names,
        purposes=_PURPOSES,
        bars=bars,
        chart=_chart(bars),
        size=(WIDTH, HEIGHT, LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT),
        budgets=[_budget(key, found.usage.get(key.id, {}).get(key.period, NOTHING)) for key in found.known],
        given={"since": part.since, "until": part.until, "key": given.get("key"), "mode": mode},
        choose_key=owner is None and bool(found.known),
    )


def _day(value: str | None, name: str) -> date | None:
    if not value:
        return None
    try:
        return date.fromisoformat(value)
    except ValueError:
        message = f"{name!r} must be a day such as 2026-05-01, not {value[:100]!r}"
        raise RequestError(message, code="invalid_value", param=name) from None


def _before(day: date, days: int) -> date:
    return day - timedelta(days=min(days, day.toordinal() - 1))


def _every_day(days: Sequence[Part], since: date, until: date) -> list[Part]:
    known = {one.name: one for one in days}
    every = [(since + timedelta(days=number)).isoformat() for number in range((until - since).days + 1)]
    return [known.get(day, Part(day, 0, 0.0)) for day in every]


def _by_month(days: Sequence[Part]) -> list[Part]:
    months: dict[str, Part] = {}
    for one in days:
        sum_of = months.get(one.name[:7], Part(one.name[:7], 0, 0.0))
        months[one.name[:7]] = Part(sum_of.name, sum_of.requests + one.requests, sum_of.cost + one.cost)
    return list(months.values())


def _chart(parts: Sequence[Part]) -> list[Bar]:
    most = max((one.cost for one in parts), default=0.0)
    if most <= 0:
        return []
    step = (WIDTH - LEFT - RIGHT) / len(parts)
    tall = HEIGHT - TOP - BOTTOM
    return [
        Bar(
            round(LEFT + number * step, 2),
            round(TOP + tall * (1 - one.cost / most), 2),
            round(max(0.5, step * 0.8), 2),
            round(tall * one.cost / most, 2),
        )
        for number, one in enumerate(parts)
    ]


def _budget(key: ApiKey, used: Spend) -> Budget:
    limits: list[tuple[str, str, float]] = []
    if key.max_cost is not None:
        left = max(0.0, key.max_cost - used.cost)
        limits.append((dollars(key.max_cost), dollars(left), used.cost / key.max_cost if key.max_cost else 1.0))
    if key.max_tokens is not None:
        tokens = max(0, key.max_tokens - used.tokens)
        share = used.tokens / key.max_tokens if key.max_tokens else 1.0
        limits.append((f"{key.max_tokens} tokens", f"{tokens} tokens", share))
    return Budget(
        name=key.name,
        period=key.period,
        limit=" and ".join(limit for limit, _, _ in limits),
        used=f"{dollars(used.cost)}, {used.tokens} tokens",
        left=" and ".join(left for _, left, _ in limits),
        share=max((share for _, _, share in limits), default=None),
        state="" if key.valid else "revoked" if key.revoked_at is not None else "expired",
    )


PAGE = Page("Spend", order=60, gets={"": show}, alone=True)
