"""Sheet: a row for each trace, a column for each candidate, each answer right, wrong or unmarked."""

import re
from collections import defaultdict
from collections.abc import Sequence
from urllib.parse import urlencode

from sqlalchemy import Connection
from starlette.responses import Response

from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.http.statuses import RequestError, status_of
from mixfuse.fusion.store.trace_facts import Found, find, traces_of
from mixfuse.fusion.ui.frame import Page, Visit
from mixfuse.fusion.ui.marking import MARKS, Row, changes, columns_of, feedback_of, row_of, spread
from mixfuse.fusion.ui.trace_filters import FilterForm, filter_form, filters_of, place_of, written
from mixfuse.fusion.ui.trace_view import candidates
from mixfuse.fusion.ui.votes import person

_ROWS = 20
# The first view is to be small: so many characters of answers on a page, shared by its cells.
_MOST_CHARS, _FEWEST, _MOST_IN_CELL = 20_000, 200, 2000
_FIELD = re.compile(r"(trace|shown|mark)-(\d{1,3})(?:-(\d{1,4}))?")


async def show(visit: Visit) -> Response:
    """Shows a page of the sheet."""
    owner, given, config = visit.owner(), visit.request.query_params, visit.inside.config
    filters, after = filters_of(given, owner), place_of(given.get("after"))

    def read(connection: Connection) -> tuple[Found, list[Row], FilterForm]:
        found = find(connection, filters, after=after, limit=_ROWS)
        traces = traces_of(connection, [row["id"] for row in found.rows])
        rows = [row_of(trace, config) for trace in traces]
        return found, rows, filter_form(connection, given, owner, config)

    found, rows, form = await visit.read(read)
    shown = [row for row in rows if row.cells]
    cells = sum(len(row.cells) for row in shown)
    return await visit.page(
        "sheet.html.jinja",
        rows=shown,
        columns=columns_of(shown, [member.name for member in config.members]),
        marks=MARKS,
        left_out=len(found.rows) - len(shown),
        most=min(_MOST_IN_CELL, max(_FEWEST, _MOST_CHARS // max(1, cells))),
        filters=form,
        partial=found.partial,
        next=written(found.next),
        paged=after is not None,
        name=person(given["name"]) if given.get("name", "").strip() else "",
        saved=given.get("saved", "") if given.get("saved", "").isdecimal() else "",
    )


async def save(visit: Visit) -> Response:
    """Takes the marks that were changed, as feedback of each trace."""
    visit.owner()
    form = await visit.form()
    name = person(form["name"]) if form.get("name", "").strip() else ""
    traces, shown, marks = _sent(list(form.items()))
    kept, refused = 0, []
    for row, trace_id in traces.items():
        changed = changes(marks[row], shown.get(row, ""))
        if not changed:
            continue
        try:
            kept += await _keep(visit, trace_id, changed, name, together=form.get("together") == "1")
        except MixfuseError as error:
            refused.append(error)
    if refused:
        message = f"{kept} marks are kept, those of {len(refused)} traces are not: {refused[0]}"
        raise RequestError(message, code="refused", status=status_of(refused[0]))
    query = {key: value for key, value in visit.request.query_params.items() if key not in ("saved", "name")}
    if form.get("go") == "older" and form.get("older"):
        query["after"] = form["older"]
    query |= {"name": name} if name else {}
    return visit.to(f"/sheet?{urlencode(query | {'saved': kept})}")


async def _keep(visit: Visit, trace_id: str, changed: dict[int, str], name: str, *, together: bool) -> int:
    """Keeps the marks of one trace; returns how many."""
    trace = await visit.trace(trace_id)
    if together:
        changed = spread(changed, candidates(trace, visit.inside.config))
    await visit.call("POST", f"/v1/traces/{trace.id}/feedback", feedback_of(changed, name))
    return len(changed)


def _sent(fields: Sequence[tuple[str, str]]) -> tuple[dict[str, str], dict[str, str], dict[str, dict[int, str]]]:
    """Reads the fields of the sheet: row → trace, row → the marks it showed, row → candidate → mark."""
    traces: dict[str, str] = {}
    shown: dict[str, str] = {}
    marks: dict[str, dict[int, str]] = defaultdict(dict)
    for name, value in fields:
        found = _FIELD.fullmatch(name)
        if found is None:
            continue
        kind, row, index = found.groups()
        if kind == "mark" and index is not None:
            marks[row][int(index)] = value
        elif kind == "trace":
            traces[row] = value
        elif kind == "shown":
            shown[row] = value
    return traces, shown, marks


PAGE = Page("Sheet", order=35, gets={"": show}, posts={"": save})
