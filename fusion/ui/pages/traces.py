"""Traces: a list with filters, one trace with all that was sent and judged, two beside each other, and feedback."""

from typing import Any

from sqlalchemy import Connection
from starlette.responses import Response

from mixfuse.fusion.http.statuses import RequestError
from mixfuse.fusion.store.trace_facts import Found, find
from mixfuse.fusion.ui.frame import Page, Visit
from mixfuse.fusion.ui.texts import dollars, duration
from mixfuse.fusion.ui.trace_filters import FilterForm, filter_form, filters_of, place_of, written
from mixfuse.fusion.ui.trace_view import difference, prompts, view


async def show(visit: Visit) -> Response:
    """Shows a page of the list."""
    owner, given = visit.owner(), visit.request.query_params
    filters, after = filters_of(given, owner), place_of(given.get("after"))

    def read(connection: Connection) -> tuple[Found, FilterForm]:
        return find(connection, filters, after=after), filter_form(connection, given, owner, visit.inside.config)

    found, form = await visit.read(read)
    return await visit.page(
        "traces.html.jinja",
        rows=found.rows,
        partial=found.partial,
        next=written(found.next),
        paged=after is not None,
        filters=form,
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


PAGE = Page(
    "Traces",
    order=20,
    gets={"": show, "/compare": compare, "/{id}": one},
    posts={"/{id}/feedback": feedback},
    alone=True,
)
