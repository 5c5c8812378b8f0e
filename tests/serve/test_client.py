"""The admin client before a real server: what it returns, and the one line for each way the server can fail it."""

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from role_harness import FakeEngine, revision, table
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from mixfuse.app.admin_api import SwapRequest
from mixfuse.app.client import AdminClient, RefusedError, ServerFailedError
from mixfuse.app.evaluate import _served
from mixfuse.app.gates import GateConfig, Gates
from mixfuse.app.roles_commands import list_roles, show_history, swap_role
from mixfuse.app.roles_routes import routes
from mixfuse.app.server import LeasedRoles
from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.config import FusionConfig
from mixfuse.serve.following import RecordFollower


@contextmanager
def running(app: Starlette) -> Iterator[str]:
    """Serves an app from another thread, since the client blocks; yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class SlowEngine(FakeEngine):
    """Loads a further adapter only once a test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.may_load = threading.Event()
        self.may_load.set()

    async def load_adapter(self, name: str, path: Path) -> None:
        await asyncio.to_thread(self.may_load.wait)
        await super().load_adapter(name, path)


@pytest.fixture
def slow_engine() -> SlowEngine:
    return SlowEngine()


@pytest.fixture
def client(made: Callable[..., Path], stores, slow_engine: SlowEngine) -> Iterator[AdminClient]:
    """The client of a server whose role `domain` is served by adapter 1."""
    swapper = table(slow_engine, store=stores())
    fusion = FusionConfig.model_validate({"members": [{"name": "a", "role": "domain"}], "trace_db": "unused"})
    gates = Gates(swapper, LeasedRoles(swapper.table, FakeEngine()), fusion, GateConfig())

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        await RecordFollower(swapper).start({"domain": made(1)})
        yield
        await gates.close()

    app = Starlette(routes=routes(swapper, stores(), gates), lifespan=lifespan)
    with running(app) as url:
        yield AdminClient(url)


def test_the_client_reads_what_the_routes_write(client: AdminClient, made: Callable[..., Path]):
    base, domain = client.roles()
    assert (base.role, base.revision, domain.revision) == ("base", None, revision(made(1)))
    swap = client.swap("domain", made(2))
    assert (swap.role, swap.old, swap.new, swap.drained) == ("domain", revision(made(1)), revision(made(2)), 0)
    assert client.pin("domain", True).pinned
    assert not client.pin("domain", False).pinned
    assert client.rollback("domain").new == revision(made(1))
    assert client.role("domain").version == 3
    assert [event.why for event in client.history("domain", limit=2)] == ["rollback", "unpin"]


def test_a_swap_says_what_it_does_and_goes_on_without_its_caller(
    client: AdminClient, made: Callable[..., Path], slow_engine: SlowEngine
):
    """The command shows it on a terminal; Ctrl-C ends the command alone."""
    slow_engine.may_load.clear()
    directory = made(2)
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "mixfuse", "roles", "swap", "domain", str(directory), "--url", client.url]
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, start_new_session=True) as swapping:
        os.close(terminal)
        shown = ""
        while not re.search(r"domain: loading \(\d+ s\)", shown):
            shown += os.read(master, 1 << 16).decode()
        assert client.role("domain").doing == "loading"
        swapping.send_signal(signal.SIGINT)
        while "the server goes on with the swap; see: mixfuse roles list" not in shown:
            shown += os.read(master, 1 << 16).decode()
    os.close(master)
    assert swapping.returncode == 130
    slow_engine.may_load.set()
    until = time.monotonic() + 60
    while client.role("domain").revision != revision(directory):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert client.role("domain").doing is None


def test_a_gate_is_begun_seen_and_stopped(client: AdminClient, made: Callable[..., Path]):
    limits = {"max_latency_ratio": None}  # null is a limit of its own: not checked
    begun = client.begin_gate("domain", SwapRequest(directory=made(2), shadow=5, limits=limits))
    assert (begun.state, begun.new, begun.under_way) == ("shadow", revision(made(2)), True)
    assert begun.asked == {"directory": str(made(2)), "shadow": 5, "timeout_s": 600.0, "limits": limits}
    assert "max_latency_ratio" not in begun.limits
    row = client.role("domain")
    assert row.gate == begun
    assert (row.staged.revision, row.staged.share) == (revision(made(2)), 0.0)
    stopped = client.stop_gate("domain")
    assert (stopped.state, stopped.under_way) == ("stopped", False)
    assert client.role("domain").staged is None
    assert client.role("base").gate is client.stop_gate("base") is None


def test_the_json_of_the_commands_is_the_servers(
    client: AdminClient,
    made: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
):
    def printed() -> Any:
        return json.loads(capsys.readouterr().out)

    swap_role(client.url, "domain", made(2), as_json=True)
    assert printed() == {"role": "domain", "old": revision(made(1)), "new": revision(made(2)), "drained": 0}
    client.begin_gate("domain", SwapRequest(directory=made(3), shadow=5))
    list_roles(client.url, as_json=True)
    assert printed() == httpx.get(f"{client.url}/admin/roles", timeout=60).json()["roles"]
    show_history(client.url, "domain", as_json=True)
    assert printed() == httpx.get(f"{client.url}/admin/roles/domain/history", timeout=60).json()["history"]


def test_a_refusal_is_the_servers_own_line(client: AdminClient, tmp_path: Path):
    with pytest.raises(RefusedError, match="no such adapter directory"):
        client.swap("domain", tmp_path / "nowhere")
    with pytest.raises(RefusedError, match="unknown role 'nobody'") as caught:
        client.rollback("nobody")
    assert caught.value.kind == "role"
    with pytest.raises(MixfuseError, match="serves no role 'nobody'"):
        client.role("nobody")


def answering(response: Callable[[], Response]) -> Starlette:
    async def answer(_request: Request) -> Response:
        return response()

    return Starlette(routes=[Route("/admin/roles{rest:path}", answer, methods=["GET", "PUT", "POST", "DELETE"])])


def failed() -> Response:
    return Response("Internal Server Error", status_code=500)


def away() -> Response:
    return JSONResponse({"error": {"type": "engine", "message": "no engine is ready"}}, status_code=503)


def no_roles() -> Response:
    return JSONResponse({"error": {"type": "not_found", "message": "no"}}, status_code=404)


@pytest.mark.parametrize(
    ("response", "kind", "words"),
    [
        (failed, ServerFailedError, r"the server at http\S+ failed \(status 500\); see its log"),
        (away, ServerFailedError, "no engine is ready"),
        (no_roles, RefusedError, r"serves no roles \(it answered with status 404\)"),
        (lambda: Response("<html>"), MixfuseError, "is no mixfuse server of this version"),
        (lambda: JSONResponse({"roles": [{"role": "x"}]}), MixfuseError, "is no mixfuse server of this version"),
    ],
)
def test_each_failure_of_the_list_is_one_line(response: Callable[[], Response], kind: type[MixfuseError], words: str):
    with running(answering(response)) as url, pytest.raises(MixfuseError, match=words) as caught:
        AdminClient(url).roles()
    assert type(caught.value) is kind


def test_a_redirect_is_not_followed_with_the_admin_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MIXFUSE_ADMIN_KEY", "secret")
    seen = []

    async def elsewhere(request: Request) -> Response:
        seen.append(request.headers.get("authorization"))
        return JSONResponse({"roles": []})

    with ExitStack() as stack:
        other = stack.enter_context(running(Starlette(routes=[Route("/admin/roles", elsewhere)])))
        url = stack.enter_context(running(answering(lambda: RedirectResponse(f"{other}/admin/roles"))))
        with pytest.raises(MixfuseError, match=r"it answered with status 307"):
            AdminClient(url).roles()
    assert not seen


def test_an_evaluation_takes_404_for_no_roles_and_nothing_else():
    with running(answering(no_roles)) as url:
        assert _served(url) == {}
    with running(answering(failed)) as url, pytest.raises(ServerFailedError):
        _served(url)
    with pytest.raises(MixfuseError, match=r"no mixfuse server answers at http://127\.0\.0\.1:1 "):
        _served("http://127.0.0.1:1")
