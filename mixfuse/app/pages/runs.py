"""Runs: training runs as they go, compared with a baseline; evaluation reports and the combiner's curve."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlencode

from starlette.responses import Response

from mixfuse.app import run_charts
from mixfuse.app.report_text import parts
from mixfuse.app.runs import PICTURES, REPORT, Found, Run, RunsFolder
from mixfuse.fusion.http.statuses import RequestError
from mixfuse.fusion.ui.frame import ROOT, Page, Visit

# A picture opened by itself is a page: it gets no scripts and no requests, and may style itself.
_PICTURE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
_MOST_READ = 60


@dataclass(frozen=True)
class _Line:
    """A line of the list; `run` where it is one of the newest runs."""

    found: Found
    run: Run | None


async def show(visit: Visit) -> Response:
    """Shows what is in the folder, newest first."""
    folder = _folder(visit)

    def read() -> tuple[list[_Line], bool]:
        found, whole = folder.listing()
        runs = [one for one in found if one.kind == "run"][:_MOST_READ]
        return [_Line(one, _brief(folder, one) if one in runs else None) for one in found], whole

    lines, whole = await asyncio.to_thread(read)
    return await visit.page("runs.html.jinja", lines=lines, whole=whole, folder=str(folder.root))


async def one(visit: Visit) -> Response:
    """Shows a run, beside a baseline if one is named."""
    folder, path, other = _folder(visit), _asked(visit, "path"), visit.request.query_params.get("with", "")

    def read() -> tuple[Run, Run | None, Sequence[str]]:
        run = folder.run(path)
        others = [found.path for found in folder.listing()[0] if found.kind == "run" and found.path != path]
        return run, folder.run(other) if other else None, others

    if await asyncio.to_thread(folder.kind, path) == "report":
        return visit.to(f"/runs/report?{visit.request.url.query}")
    run, baseline, others = await asyncio.to_thread(read)
    return await visit.page(
        "run.html.jinja",
        others=others,
        **run_charts.page_values(run, baseline),
    )


async def report(visit: Visit) -> Response:
    """Shows a report."""
    folder, path = _folder(visit), _asked(visit, "path")
    found = parts(await asyncio.to_thread(folder.text, path, REPORT))
    files = {part.file for part in found if part.file}
    pictures = {file: f"{ROOT}/runs/picture?{urlencode({'path': path, 'file': file})}" for file in files}
    return await visit.page("report.html.jinja", path=path, parts=found, pictures=pictures)


async def picture(visit: Visit) -> Response:
    """Returns a picture of a report."""
    folder, path, name = _folder(visit), _asked(visit, "path"), _asked(visit, "file")
    kind = PICTURES.get(PurePosixPath(name).suffix)
    if kind is None:
        raise RequestError("a picture's name ends in .svg or .png", code="not_found", status=404)
    content = await asyncio.to_thread(folder.content, path, name)
    return Response(content, media_type=kind, headers={"content-security-policy": _PICTURE_POLICY})


def _folder(visit: Visit) -> RunsFolder:
    """Returns the folder, for those who may see it.

    Raises:
        RequestError: The visitor has an API key: runs are not of one key.
    """
    visit.admin_only("runs and reports")
    assert visit.inside.config.ui_runs is not None  # noqa: S101 - else there is no page
    return RunsFolder(visit.inside.config.ui_runs)


def _asked(visit: Visit, name: str) -> str:
    return str(visit.request.query_params.get(name, ""))


def _brief(folder: RunsFolder, found: Found) -> Run | None:
    try:
        return folder.run(found.path, brief=True)
    except RequestError:  # it was removed meanwhile
        return None


PAGE = Page(
    "Runs",
    order=50,
    gets={"": show, "/run": one, "/report": report, "/picture": picture},
    shown=lambda inside: inside.config.ui_runs is not None,
    alone=True,
    for_admin=True,
)
