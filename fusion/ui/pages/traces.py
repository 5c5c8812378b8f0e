"""Traces: a list with filters, one trace with all that was sent and judged, two beside each other, and feedback."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, text
from starlette.responses import Response

from mixfuse.fusion.http.statuses import RequestError
from mixfuse.fusion.store.trace_facts import Filters, Found, Place, find, values_of
from mixfuse.fusion.ui.frame import Page, Visit, number_of
from mixfuse.fusion.ui.texts import dollars, duration
from mixfuse.fusion.ui.trace_view import difference, prompts, view

_MARKS = (
    ("failed", "something failed"),
    ("disagreement", "disagreement"),
    ("flipped", "the judge flipped"),
    ("unsure", "low confidence"),
    ("feedback", "has feedback"),
)
_FILTERS = ("words", "mode", "member", "key", "reason", "outcome", "min_cost", "min_s", "since", "until")


async def show(visit: Visit) -> Response:
    """Shows a page of the list."""
    owner, given = visit.owner(), visit.request.query_params
    filters, after = _filters(given, owner), _place(given.get("after"))

    def read(connection: Connection) -> tuple[Found, dict[str, list[str]], list[tuple[str, str]]]:
        found, values = find(connection, filters, after=after), values_of(connection, owner)
        if owner is not None:
            return found, values, []
        keys = connection.execute(text("SELECT id, name FROM api_keys ORDER BY name"))
        return found, values, [(key_id, name) for key_id, name in keys]

    found, values, keys = await visit.read(read)
    members = [(member.name, member.name) for member in visit.inside.config.members]
    menus = [("mode", "Mode", _options(values["mode"])), ("member", "Member", members)]
    menus += [("key", "Key", keys)] if keys else []
    menus += [("reason", "Reason", _options(values["reason"])), ("outcome", "Outcome", _options(values["outcome"]))]
    asked = {name: given.get(name) for name in (*_FILTERS, *(name for name, _ in _MARKS))}
    return await visit.page(
        "traces.html.jinja",
        rows=found.rows,
        partial=found.partial,
        next=f"{found.next.at!r}~{found.next.id}" if found.next is not None else None,
        paged=after is not None,
        menus=menus,
        marks=_MARKS,
        given=asked,
        filtered=any(asked.values()),
    )


async def one(visit: Visit) -> Response:
    """Shows a trace."""
    trace = await visit.trace(visit.request.path_params["id"])
    config = visit.inside.config
    return await visit.page("trace.html.jinja", trace=trace, view=view(trace, config), prompts=prompts(trace, config))


async def compare(visit: Visit) -> Response:
    """Shows two traces beside each other."""
    ids = visit.request.query_params.getlist("id")
    if len(ids) != 2:
        raise RequestError(f"tick two traces to compare them, not {len(ids)}", code="invalid_value", param="id")
    traces = [await visit.trace(trace_id) for trace_id in ids]
    one, other = traces
    rows = [
        ("Model", [trace.model for trace in traces]),
        ("Mode", [trace.mode for trace in traces]),
        ("Members", [", ".join(dict.fromkeys(trace.candidates)) for trace in traces]),
        ("Outcome", [trace.outcome for trace in traces]),
        ("Reason", [trace.reason for trace in traces]),
        ("Confidence", [f"{trace.weighing.confidence:.2f}" if trace.weighing else "none" for trace in traces]),
        ("Calls", [str(len(trace.calls)) for trace in traces]),
        ("Tokens", [str(trace.usage.total_tokens) for trace in traces]),
        ("Cost", [dollars(trace.cost) for trace in traces]),
        ("Took", [duration(trace.duration_ms) for trace in traces]),
    ]
    return await visit.page(
        "compare.html.jinja",
        views=[view(trace, visit.inside.config) for trace in traces],
        table=rows,
        same=one.messages == other.messages,
        difference=difference(one.answer or "", other.answer or ""),
    )


async def feedback(visit: Visit) -> Response:
    """Adds feedback to a trace, as the API does."""
    form, trace_id = await visit.form(), visit.request.path_params["id"]
    marks = {name.removeprefix("mark-"): value for name, value in form.items() if name.startswith("mark-")}
    said: dict[str, Any] = {
        "correct": [int(index) for index, value in marks.items() if value == "right" and index.isdecimal()],
        "wrong": [int(index) for index, value in marks.items() if value == "wrong" and index.isdecimal()],
    }
    said = {name: value for name, value in said.items() if value}
    if form.get("best", "").isdecimal():
        said["best"] = int(form["best"])
    if form.get("score") in ("1", "-1"):
        said["score"] = float(form["score"])
    if form.get("comment", "").strip():
        said["comment"] = form["comment"].strip()
    if not said:
        raise RequestError("mark something, or write a comment", code="invalid_value")
    await visit.call("POST", f"/v1/traces/{trace_id}/feedback", said)
    return visit.to(f"/traces/{trace_id}")


def _filters(given: Mapping[str, str], owner: str | None) -> Filters:
    """Reads the filters; with an API key only its own traces are looked through."""
    said = {name: given.get(name) or None for name in _FILTERS}
    seconds = _number(said["min_s"], "min_s")
    return Filters(
        mode=said["mode"],
        member=said["member"],
        key_id=said["key"] if owner is None else owner,
        reason=said["reason"],
        outcome=said["outcome"],
        min_cost=_number(said["min_cost"], "min_cost"),
        min_ms=None if seconds is None else 1000 * seconds,
        since=_time(said["since"], "since"),
        until=_time(said["until"], "until"),
        words=said["words"],
        **{name: given.get(name) == "1" for name, _ in _MARKS},
    )


def _number(value: str | None, name: str) -> float | None:
    return None if value is None else number_of(value, name)


def _time(value: str | None, name: str) -> float | None:
    if value is None:
        return None
    try:
        return datetime.fromisoformat(value).replace(tzinfo=UTC).timestamp()
    except ValueError:
        message = f"{name!r} must be a day and a time such as 2026-05-01T12:00, not {value[:100]!r}"
        raise RequestError(message, code="invalid_value", param=name) from None


def _place(value: str | None) -> Place | None:
    if value is None:
        return None
    at, _, trace_id = value.partition("~")
    return Place(number_of(at, "after"), trace_id.replace("\0", ""))


def _options(values: list[str]) -> list[tuple[str, str]]:
    return [(value, value) for value in values]


PAGE = Page(
    "Traces",
    order=20,
    gets={"": show, "/compare": compare, "/{id}": one},
    posts={"/{id}/feedback": feedback},
    alone=True,
)
