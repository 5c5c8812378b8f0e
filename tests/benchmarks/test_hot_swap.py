"""The benchmark of swaps: its reckoning finds what it is there to find, and it runs. Nothing is timed."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

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
        house = hot_swap.House.__new__(hot_swap.House)
        asked: list[Any] = []

        def ask(self, began: float, revision: str, *, took: float = 1.0, **keys: Any) -> None:
            one = hot_swap.Asked("domain", began, began + took, revisions=[("domain", revision)], **keys)
            self.asked = [*self.asked, one]

        def report(self, **memory: list[float]) -> dict[str, Any]:
            return hot_swap.report(self.house, self.asked, memory, planned=len(self.house.steps))

    seen = Seen()
    seen.house.outage = None
    seen.house.times = {"domain": [("a", -math.inf, math.inf)]}
    seen.house.steps = []
    for to, began in (("b", 10.0), ("c", 20.0)):
        step = hot_swap.Step("good", "domain", began, began + 2, sham=(began - 3, began - 1), done=True)
        seen.house._flipped(step, to)
        seen.house.steps.append(step)
    for began, revision in ((7.5, "a"), (8.0, "a"), (11.0, "a"), (11.0, "b"), (18.0, "b"), (21.5, "b"), (22.5, "c")):
        seen.ask(began, revision)
    return seen


def test_all_is_well_where_nothing_went_wrong(hot_swap: ModuleType, seen: Any, capsys: pytest.CaptureFixture[str]):
    found = seen.report(gateway=[100.0, 100.1, 99.9, 100.0])
    assert found["strangers"] == found["failed"] == found["failed_calls"] == []
    assert found["latency"]["ratio"] == 1.0
    assert found["swap_s"] == {"p50": 2.0, "p95": 2.0, "max": 2.0}
    assert hot_swap.show(found) == []
    assert "MISSED" not in capsys.readouterr().out


@pytest.mark.parametrize(("began", "revision"), [(12.5, "a"), (8.5, "b"), (22.5, "b"), (15.0, "x"), (15.0, None)])
def test_an_answer_of_a_revision_that_did_not_serve_is_found(
    hot_swap: ModuleType, seen: Any, began: float, revision: str
):
    seen.ask(began, revision)
    found = seen.report()
    assert len(found["strangers"]) == 1
    assert hot_swap.show(found) == ["answers from a revision not in the table"]


def test_slow_requests_while_a_swap_goes_on_are_found(hot_swap: ModuleType, seen: Any):
    seen.ask(10.5, "b", took=3.0)
    found = seen.report()
    assert found["latency"]["ratio"] == 3.0
    assert hot_swap.show(found) == ["p95 during a swap over p95 without"]


def test_only_what_the_killed_engine_took_with_it_may_fail(hot_swap: ModuleType, seen: Any):
    seen.house.outage = (30.0, 40.0)
    seen.ask(29.5, "c", error="HTTP 503 engine: gone")
    assert hot_swap.show(seen.report()) == []
    seen.ask(35.0, "c", error="ServerDisconnectedError", typed=False)
    assert hot_swap.show(seen.report()) == ["requests of the killed engine that failed"]
    seen.ask(41.0, "c", error="HTTP 503 engine: gone")
    seen.ask(42.0, "c", failed_calls=["judge: timeout: late"])
    found = seen.report()
    assert found["failed"] == ["HTTP 503 engine: gone"]
    assert found["failed_calls"] == ["judge: timeout: late"]
    assert len(hot_swap.show(found)) == 3


def test_memory_that_grows_with_each_swap_is_found(hot_swap: ModuleType, seen: Any):
    noisy = [100 + 0.5 * swap + (-1) ** swap * 0.3 for swap in range(40)]
    found = seen.report(engine=noisy, gateway=[100 + (-1) ** swap * 0.3 for swap in range(40)])
    assert found["memory_mib"]["engine"]["slope"] == pytest.approx(0.5, abs=0.02)
    assert hot_swap.show(found) == ["engine's memory a swap, MiB"]


def test_the_plan_is_twenty_swaps_and_five_rollbacks(hot_swap: ModuleType):
    kinds = [kind for kind, _ in hot_swap.PLAN]
    assert (len(kinds) - kinds.count("rollback"), kinds.count("rollback")) == (20, 5)
    assert set(kinds) == {"good", "rollback", "full disk", "engine killed", *hot_swap.REFUSED}
    # Each is rolled back to what a good swap of the same role replaced.
    assert all(hot_swap.PLAN[place - 1] == ("good", role) for place, (kind, role) in enumerate(hot_swap.PLAN)
               if kind == "rollback")  # fmt: skip


@pytest.mark.engine
@pytest.mark.slow
def test_the_benchmark_of_swaps_finds_nothing_lost():
    command = [sys.executable, str(BENCHMARKS / "hot_swap.py"), "--smoke", "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["steps"] == {"good": 2, "tampered file": 1, "rollback": 1}
    assert "was changed after export" in report["refused"]["tampered file"]
    assert report["failed"] == report["failed_calls"] == report["strangers"] == []
    assert report["memory_mib"].keys() == {"gateway", "engine"}
