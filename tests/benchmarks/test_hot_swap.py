"""The benchmark of swaps: its figures show each fault, and it runs. Nothing is timed."""

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def hot_swap(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import hot_swap

    return hot_swap


@pytest.fixture
def seen(hot_swap: ModuleType) -> Any:
    """What was seen of two swaps of `domain`, a → b at 10..12 s and b → c at 20..22 s; requests take a second."""

    class Seen:
        server = hot_swap.ServerUnderLoad.__new__(hot_swap.ServerUnderLoad)
        requests: list[Any] = []

        def ask(self, began: float, revision: str, *, took: float = 1.0, **keys: Any) -> None:
            request = hot_swap.Request("domain", began, began + took, revisions=[("domain", revision)], **keys)
            self.requests = [*self.requests, request]

        def report(self, **memory: list[float]) -> dict[str, Any]:
            return hot_swap.report(self.server, self.requests, memory, planned=len(self.server.steps))

    seen = Seen()
    seen.server.outage = None
    seen.server.times = {"domain": [("a", -math.inf, math.inf)]}
    seen.server.steps = []
    for to, began in (("b", 10.0), ("c", 20.0)):
        step = hot_swap.Step("good", "domain", began, began + 2, sham=(began - 3, began - 1), done=True)
        seen.server._flipped(step, to)
        seen.server.steps.append(step)
    for began, revision in ((7.5, "a"), (8.0, "a"), (11.0, "a"), (11.0, "b"), (18.0, "b"), (21.5, "b"), (22.5, "c")):
        seen.ask(began, revision)
    return seen


def test_all_is_well_where_nothing_went_wrong(hot_swap: ModuleType, seen: Any, capsys: pytest.CaptureFixture[str]):
    report = seen.report(gateway=[100.0, 100.1, 99.9, 100.0])
    assert report["strangers"] == report["failed"] == report["failed_calls"] == []
    assert report["latency"]["ratio"] == 1.0
    assert report["swap_s"] == {"p50": 2.0, "p95": 2.0, "max": 2.0}
    assert hot_swap.show(report) == []
    assert "MISSED" not in capsys.readouterr().out


@pytest.mark.parametrize(("began", "revision"), [(12.5, "a"), (8.5, "b"), (22.5, "b"), (15.0, "x"), (15.0, None)])
def test_an_answer_of_a_revision_that_did_not_serve_is_found(
    hot_swap: ModuleType, seen: Any, began: float, revision: str
):
    seen.ask(began, revision)
    report = seen.report()
    assert len(report["strangers"]) == 1
    assert hot_swap.show(report) == ["answers from a revision not in the table"]


def test_an_answer_with_another_revisions_log_probabilities_is_found(hot_swap: ModuleType, seen: Any):
    seen.ask(15.0, "b", apart=0.001)
    assert hot_swap.show(seen.report()) == []
    seen.ask(15.0, "b", apart=0.4)
    report = seen.report()
    assert (report["checked"], report["wrong"]) == (2, 1)
    assert hot_swap.show(report) == ["answers whose log-probabilities are not their revision's"]


def test_answers_that_could_pass_for_one_another_end_the_benchmark(hot_swap: ModuleType):
    assert hot_swap.far_apart({"a": [[-1.0, -2.0]], "b": [[-1.0, -2.5]]}) == 0.5
    assert hot_swap.distance([-1.0, -2.0, -3.0], [-1.0]) == math.inf
    with pytest.raises(hot_swap.BenchmarkError, match="the check would see nothing"):
        hot_swap.far_apart({"a": [[-1.0, -2.0]], "b": [[-1.0, -2.01]]})


def test_only_calls_that_met_a_deleted_adapter_may_be_repeated(hot_swap: ModuleType, seen: Any):
    said = ["domain: upstream_error: The model `domain@c` does not exist."]
    seen.ask(30.5, "c", failed_calls=said)
    assert seen.report()["failed_calls"] == said
    seen.server.steps.append(hot_swap.Step("deleted in the engine", "domain", 30.0, 31.0))
    assert seen.report()["failed_calls"] == []
    assert seen.report()["repeated_calls"] == 1


def test_slow_requests_while_a_swap_goes_on_are_found(hot_swap: ModuleType, seen: Any):
    seen.ask(10.5, "b", took=3.0)
    report = seen.report()
    assert report["latency"]["ratio"] == 3.0
    assert hot_swap.show(report) == ["p95 during a swap over p95 without"]


def test_only_what_the_killed_engine_took_with_it_may_fail(hot_swap: ModuleType, seen: Any):
    seen.server.outage = (30.0, 40.0)
    seen.ask(29.5, "c", error="HTTP 503 engine: gone")
    assert hot_swap.show(seen.report()) == []
    seen.ask(35.0, "c", error="ServerDisconnectedError", typed=False)
    assert hot_swap.show(seen.report()) == ["requests of the killed engine that failed"]
    seen.ask(41.0, "c", error="HTTP 503 engine: gone")
    seen.ask(42.0, "c", failed_calls=["judge: timeout: late"])
    report = seen.report()
    assert report["failed"] == ["HTTP 503 engine: gone"]
    assert report["failed_calls"] == ["judge: timeout: late"]
    assert len(hot_swap.show(report)) == 3


def test_memory_that_grows_with_each_swap_is_found(hot_swap: ModuleType, seen: Any):
    noisy = [100 + 0.5 * swap + (-1) ** swap * 0.3 for swap in range(40)]
    report = seen.report(engine=noisy, gateway=[100 + (-1) ** swap * 0.3 for swap in range(40)])
    assert report["memory_mib"]["engine"]["slope"] == pytest.approx(0.5, abs=0.02)
    assert hot_swap.show(report) == ["engine's memory a swap, MiB"]


class AdminServer:
    """The admin API over revisions in memory. It refuses what a server must, unless `fault` says otherwise."""

    def __init__(self, serving: dict[str, str], bad: set[str]) -> None:
        self.bad, self.fault = bad, ""
        self.history = {role: [revision] for role, revision in serving.items()}

    async def roles(self, _request: web.Request) -> web.Response:
        rows = [{"role": role, "revision": history[-1]} for role, history in self.history.items()]
        return web.json_response({"roles": [*rows, {"role": "base", "revision": None}]})

    async def swap(self, request: web.Request) -> web.Response:
        directory = Path((await request.json())["directory"])
        refused = self.fault == "refuses all" or (directory.name in self.bad and self.fault != "accepts all")
        if refused:
            error = {"message": "no"} if self.fault == "untyped" else {"type": "adapter", "message": "no"}
            return web.json_response({"error": error}, status=400)
        if self.fault != "does nothing":
            revision = json.loads((directory / "manifest.json").read_text())["revision"]
            self.history[request.match_info["role"]].append(revision)
        return web.json_response({})

    async def rollback(self, request: web.Request) -> web.Response:
        history = self.history[request.match_info["role"]]
        history.pop() if self.fault != "goes back too far" else history.append(history[0])
        return web.json_response({})


@pytest.fixture
async def under_load(hot_swap: ModuleType, tmp_path: Path) -> AsyncIterator[tuple[Any, AdminServer]]:
    """The benchmark's view of a server, and that server."""
    names = [f"{role}-{number}" for role in hot_swap.ROLES for number in range(4)]
    for name in (*names, *hot_swap.REFUSED):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"revision": f"revision of {name}"}))
    serving = {role: f"revision of {role}-0" for role in hot_swap.ROLES}
    admin = AdminServer(serving, set(hot_swap.REFUSED))
    app = web.Application()
    app.add_routes([
        web.get("/admin/roles", admin.roles),
        web.put("/admin/roles/{role}", admin.swap),
        web.post("/admin/roles/{role}/rollback", admin.rollback),
    ])  # fmt: skip
    async with TestServer(app) as server, ClientSession() as session:
        yield hot_swap.ServerUnderLoad(session, f"{server.make_url('/')}v1", None, tmp_path, None), admin


async def test_the_plan_runs_and_ends_as_it_says(hot_swap: ModuleType, under_load: tuple[Any, AdminServer]):
    server, admin = under_load
    real = ("full disk", "engine killed", *hot_swap.FAULTS)  # they need a real server
    plan = [step for step in hot_swap.PLAN if step[0] not in real]
    assert len(plan) == len(hot_swap.PLAN) - len(real)
    for kind, role in plan:
        before = admin.history[role][-2:]
        step = await server.step(kind, role)
        assert step.done == (kind not in hot_swap.REFUSED)
        now = admin.history[role][-1]
        if kind == "rollback":
            assert (now, len(before)) == (before[0], 2), "a rollback undoes a swap of the plan"
        else:
            assert (now != before[-1]) == step.done, "a good swap changes the revision, a refused one does not"
    counts = Counter(step.kind for step in server.steps)
    assert counts == {"good": 14, "rollback": 5, **dict.fromkeys(hot_swap.REFUSED, 1)}
    assert {role for kind, role in plan if kind == "good"} == set(hot_swap.ROLES)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("accepts all", "tampered file", "it should not have gone well"),
        ("refuses all", "good", "it should have gone well: HTTP 400 adapter: no"),
        ("untyped", "tampered file", "an untyped refusal"),
        ("does nothing", "good", "after 'good' the roles are"),
        ("goes back too far", "rollback", "after 'rollback' the roles are"),
    ],
)
async def test_a_server_that_swaps_wrongly_ends_the_benchmark(
    hot_swap: ModuleType, under_load: tuple[Any, AdminServer], fault: str, kind: str, words: str
):
    server, admin = under_load
    await server.step("good", "domain")
    await server.step("good", "domain")
    admin.fault = fault
    with pytest.raises(hot_swap.BenchmarkError, match=words):
        await server.step(kind, "domain")


async def test_both_revisions_may_answer_during_a_swap_and_one_of_them_outside(
    hot_swap: ModuleType, under_load: tuple[Any, AdminServer]
):
    server, _ = under_load
    step = await server.step("good", "domain")
    old, new = "revision of domain-0", server.serving["domain"]

    def may(revision: str, began: float, ended: float) -> bool:
        return server.may_have_answered("domain", revision, hot_swap.Request("domain", began, ended))

    assert may(old, step.began - 2, step.began - 1)
    assert not may(new, step.began - 2, step.began - 1)
    assert may(old, step.began, step.ended)
    assert may(new, step.began, step.ended)
    assert not may(old, step.ended + 1, step.ended + 2)
    assert may(new, step.ended + 1, step.ended + 2)


@pytest.mark.engine
@pytest.mark.slow
def test_the_benchmark_of_swaps_finds_nothing_lost(hot_swap: ModuleType):
    command = [sys.executable, str(BENCHMARKS / "hot_swap.py"), "--smoke", "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["checked"] > 0
    assert report["wrong"] == 0
    assert report["steps"] == {"good": 2, "tampered file": 1, "rollback": 1, **dict.fromkeys(hot_swap.FAULTS, 1)}
    assert "was changed after export" in report["refused"]["tampered file"]
    assert report["failed"] == report["failed_calls"] == report["strangers"] == []
    assert report["memory_mib"].keys() == {"gateway", "engine"}
