"""The benchmarks of the fusion runtime run, and the audit of the load finds what does not balance; nothing is timed."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / script), "--smoke", "--json", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_benchmark_measures_gateway_and_floor_and_states_its_goals():
    report = run("fusion.py", "--only", "latency,throughput,scaling,hang,failure,streaming,crowd,memory")
    targets = {f"{who} {shape}" for who in ("direct", "floor", "mixfuse") for shape in ("merge", "best_of")}
    assert report["latency"]["p50_ms"].keys() == targets | {"mixfuse best_of, batching"}
    assert all(count == 0 for count in report["throughput 0 ms"]["errors"].values())
    for target in ("mixfuse merge, quorum 2", "mixfuse best_of, quorum 2"):
        assert report["hang"][target]["result"] == "answered"
        assert report["hang"][target]["aborted"] == report["hang"][target]["asked"]
        assert report["failure"]["result"][target] == "answered"
    assert report["hang"]["floor merge"]["result"].startswith("no answer")  # the mock does hang
    assert min(report["streaming"]["pieces"][f"mixfuse {shape}"] for shape in ("merge", "best_of")) > 1
    assert min(report["scaling"]["per_s"]["mixfuse best_of, 2 workers"]) > 0
    assert report["crowd"]["errors"] == report["memory"]["errors"] == 0
    assert len(report["goals"]) >= 8


@pytest.mark.slow
def test_mixed_load_with_faults_leaves_nothing_unexplained():
    report = run("fusion_load.py")
    assert report["ok"]
    assert report["faults injected"] > 0
    assert report["answered"] > 0


def test_the_benchmark_of_the_page_reads_every_list():
    report = run("ui.py")
    assert len(report["p95 ms"]) >= 20
    assert report["bytes"]["list, styles, script"] < 100_000
    assert report["requests"].keys() >= {"p50 with ten pages / without"}


@pytest.mark.engine
@pytest.mark.slow
def test_the_benchmark_on_the_real_engine_says_how_much_is_judging():
    report = run("fusion_vllm.py")
    assert 0 < report["judging_share"] < 1


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fusion_load

    return fusion_load


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion}


def call(model: str, outcome: str = "ok", **keys: Any) -> dict[str, Any]:
    used = usage(10, 5) if outcome == "ok" else usage(0, 0)
    return {
        "stage": "answer",
        "model": model,
        "outcome": outcome,
        "error": None,
        "usage": used,
        "estimated": False,
        **keys,
    }


@pytest.fixture
def records(load: ModuleType) -> dict[str, Any]:
    """One answered request, in which one member failed as it was told to."""
    request = load.Request(
        "request-1",
        "fusion/merge",
        stream=False,
        end="answered",
        status=200,
        usage={**usage(20, 10), "total_tokens": 30},
    )
    trace = {
        "messages": [{"role": "user", "content": "request-1: what?"}],
        "calls": [call("m0"), call("m1"), call("m2", "upstream_error")],
    }
    seen = [
        {"tag": "request-1", "model": model, "fault": fault, "end": "answered", "usage": None if fault else [10, 5]}
        for model, fault in (("m0", None), ("m1", None), ("m2", "500"))
    ]
    return {"requests": [request], "traces": [trace], "calls": seen}


def test_the_audit_is_content_where_the_records_agree(load: ModuleType, records: dict[str, Any]):
    counts, complaints = load.audit(**records)
    assert complaints == []
    assert counts["answered"] == 1


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda r: r["requests"][0].usage.update(prompt_tokens=21), "the client was told"),
        (lambda r: r["traces"].clear(), "there is no trace"),
        (lambda r: r["traces"].append(copy.deepcopy(r["traces"][0])), "two traces"),
        (lambda r: r["calls"].append(dict(r["calls"][0])), "m0: the mock saw 2 calls, the trace has 1"),
        (lambda r: r["calls"].pop(0), "m0: the mock saw 0 calls, the trace has 1"),
        (lambda r: r["calls"][0].update(usage=[11, 5]), "exact usages"),
        (lambda r: r["calls"][2].update(fault=None), "m2: upstream_error"),
        (lambda r: r["calls"][2].update(fault="429"), "m2: upstream_error"),
        (lambda r: setattr(r["requests"][0], "complaint", "no answer within 30 s"), "no answer within 30 s"),
        (lambda r: vars(r["requests"][0]).update(end="error", error={"type": "oops"}), "no named type"),
        (
            lambda r: vars(r["requests"][0]).update(end="error", status=504, error={"type": "timeout"}),
            "'timeout'} is unexplained",
        ),
        (
            lambda r: vars(r["requests"][0]).update(end="error", status=500, error={"type": "upstream_error"}),
            "upstream_error with HTTP 500",
        ),
    ],
)
def test_the_audit_names_what_does_not_balance(load: ModuleType, records: dict[str, Any], spoil: Any, complaint: str):
    spoil(records)
    _, complaints = load.audit(**records)
    assert any(complaint in one for one in complaints), complaints
