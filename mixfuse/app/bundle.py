"""`mixfuse report bundle`: one HTML file of a trace, a run or a report, to keep and to send on.

It loads nothing. Its policy allows no script, the one style sheet in it by its digest, and pictures within the file.
"""

import asyncio
import base64
import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mixfuse.app.report_text import Part, parts
from mixfuse.app.run_charts import page_values
from mixfuse.app.runs import PICTURES, REPORT, RunsFolder
from mixfuse.app.viewer import nobody
from mixfuse.contracts.database import opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import write_text
from mixfuse.fusion.config import TraceConfig
from mixfuse.fusion.store.traces import TraceStore

_PAGES = Path(__file__).parent / "pages"


def bundle_folder(folder: Path, baseline: Path | None, out: Path) -> None:
    """Writes a training run or a report as one HTML file.

    Args:
        folder: The run's or the report's folder.
        baseline: Another run to compare with; None for none.
        out: The HTML file.

    Raises:
        MixfuseError: The folder holds neither, there is no such baseline, or the file cannot be written.
    """
    where, name = _split(folder)
    if where.kind(name) == "report":
        if baseline is not None:
            raise MixfuseError(f"{folder} is a report, and --with compares runs; leave --with out")
        found = parts(where.text(name, REPORT))
        pictures = {part.file: uri for part in found if (uri := _picture(where, name, part))}
        _write(out, "bundle_report.html.jinja", {"parts": found, "pictures": pictures, "title": folder.name})
        return
    run = where.run(name)
    other = None
    if baseline is not None:
        beside, other_name = _split(baseline)
        if beside.kind(other_name) == "report":
            raise MixfuseError(f"--with {baseline}: it is a report; name a run")
        other = beside.run(other_name)
    _write(out, "bundle_run.html.jinja", {**page_values(run, other), "title": run.path})


def bundle_trace(trace_id: str, where: str, out: Path) -> None:
    """Writes a trace as one HTML file.

    Args:
        trace_id: Its id.
        where: The trace database, a SQLite file or a URL; it is only read.
        out: The HTML file.

    Raises:
        MixfuseError: There is no such trace, or the database or the file cannot be used.
    """
    from mixfuse.fusion.ui.trace_view import prompts, view

    with opened(where, create=False, reads=True) as database, tempfile.TemporaryDirectory() as folder:
        store = TraceStore(database, TraceConfig(spool=Path(folder)))
        trace = asyncio.run(store.get(trace_id))
    if trace is None:
        raise MixfuseError(f"{database.name} has no trace {trace_id[:100]!r}; its id stands in the answer's x-trace-id")
    config = nobody()
    values = {"trace": trace, "view": view(trace, config), "prompts": prompts(trace, config), "title": "Trace"}
    _write(out, "bundle_trace.html.jinja", values)


def _split(folder: Path) -> tuple[RunsFolder, str]:
    """Returns the folder above and the name in it; the folder that a person names may be a link."""
    whole = folder.resolve()
    if not whole.is_dir():
        raise MixfuseError(f"{folder}: there is no such folder")
    return RunsFolder(whole.parent), whole.name


def _picture(where: RunsFolder, name: str, part: Part) -> str | None:
    """Returns a picture as a data URL; None if it is missing or too large, and its words stand in its place."""
    if part.kind != "picture":
        return None
    try:
        content = where.content(name, part.file)
    except MixfuseError:
        return None
    return f"data:{PICTURES[PurePosixPath(part.file).suffix]};base64,{base64.b64encode(content).decode()}"


def _write(out: Path, template: str, values: Mapping[str, Any]) -> None:
    from mixfuse.fusion.ui import texts

    room = Path(texts.__file__).parent
    style = "".join((room / "assets" / name).read_text(encoding="utf-8") for name in ("ui.css", "charts.css"))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    # Links within the page stay within the file.
    page = texts.environment([_PAGES]).get_template(template).render(style=style, digest=digest, root="#", **values)
    write_text(out, page)
