"""`mixfuse ui`: the page at `/ui` alone, over a trace database, a folder of runs or a file of pairs.

It changes nothing of them; votes on the pairs go into a file of their own.
"""

import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from rich.console import Console
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route

from mixfuse.app.pairs_file import pairs_at
from mixfuse.app.server import UI_PAGES, GatewayConfig, listen
from mixfuse.contracts.database import Database, opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.config import FusionConfig, TraceConfig
from mixfuse.fusion.http.browsers import BrowserGuard
from mixfuse.fusion.http.inside import Inside
from mixfuse.fusion.http.keys import ADMIN_KEY, KeyRing, UnauthorizedError, is_admin
from mixfuse.fusion.store.traces import TraceStore
from mixfuse.fusion.ui.mount import PAGES, LazyUi

# A config names a member, and here nobody asks one.
_NOBODY = {"name": "nobody", "base_url": "http://127.0.0.1:9/v1", "model": "nobody"}


def run_viewer(traces: str | None, runs: Path | None, pairs: Path | None, port: int) -> None:
    """Serves the page on loopback until Ctrl-C or SIGTERM.

    Args:
        traces: The trace database: a SQLite file or a URL; None to show no traces.
        runs: The folder of runs and reports; None to show none.
        pairs: A file of pairs to vote on; None for none.
        port: Where it listens; 0 for any free port.

    Raises:
        MixfuseError: Nothing is named, something is not there, the database needs another version, the file holds no
            pairs, or the port is in use.
    """
    if traces is None and runs is None and pairs is None:
        raise MixfuseError("name what the page shows: --traces DB, --runs FOLDER or --pairs FILE, or several of them")
    votes = None if pairs is None else pairs_at(pairs).votes_path
    if runs is not None and not runs.is_dir():
        raise MixfuseError(f"--runs {runs}: there is no such folder")
    with tempfile.TemporaryDirectory(prefix="mixfuse-ui-") as folder:
        where = str(Path(folder, "none.sqlite3")) if traces is None else traces
        with opened(where, create=traces is None, reads=traces is not None) as database:
            app = viewer(database, Path(folder), runs, pairs, with_traces=traces is not None)
            address = GatewayConfig(port=port)
            with listen(address, nobody(), port="--port") as listener:
                server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, proxy_headers=False))
                host, found = listener.getsockname()[:2]
                changed = "nothing" if votes is None else f"nothing but {votes}"
                shown = f"page: http://{host}:{found}/ui (it changes {changed})"
                Console(stderr=True).print(shown, markup=False, highlight=False, soft_wrap=True)
                try:
                    asyncio.run(server.serve(sockets=[listener]))
                except KeyboardInterrupt:
                    print("stopped", file=sys.stderr)


def viewer(
    database: Database, folder: Path, runs: Path | None, pairs: Path | None = None, *, with_traces: bool = True
) -> Starlette:
    """Returns the page as an application.

    Args:
        database: Open for reading.
        folder: Empty; for what is needed while it runs.
        runs: The folder of runs and reports; None to show none.
        pairs: The file of pairs to vote on; None for none.
        with_traces: Whether the database is somebody's, and its traces and roles are shown.
    """
    config = nobody().model_copy(update={"ui_runs": runs and runs.resolve(), "ui_pairs": pairs and pairs.absolute()})
    inside = Inside(
        config=config,
        database=database,
        keys=KeyRing(database, "off"),
        traces=TraceStore(database, TraceConfig(spool=folder / "spool")),
        owner=_owner,
        models=list,
        reads=True,
    )
    packages: Sequence[str] = [PAGES, UI_PAGES] if with_traces else [UI_PAGES]

    async def start(_request: Request) -> Response:
        return RedirectResponse("/ui/")

    return Starlette(
        routes=[Route("/", start), Mount("/ui", LazyUi(inside, packages))],
        middleware=[Middleware(BrowserGuard, allowed_hosts=(), cors_origins=(), protected=lambda _path: False)],
    )


def nobody() -> FusionConfig:
    """Returns a config for what only shows: it names a member, as it must, and nobody asks it."""
    return FusionConfig.model_validate({"members": [_NOBODY]})


def _owner(authorization: str | None) -> str | None:
    """Everybody on this machine sees all, or, where an admin key is set, who has it."""
    if os.environ.get(ADMIN_KEY) and not is_admin(authorization):
        raise UnauthorizedError(f"log in with the admin key ({ADMIN_KEY})")
    return None
