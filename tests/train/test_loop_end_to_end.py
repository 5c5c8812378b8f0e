"""One round of the loop with nothing made up: feedback in a trace database, training, export, parity, evaluation.

The tiny base learns nothing; that the judge it makes is not promoted is what has to come of it.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import train_harness as harness
import yaml
from train_harness import WORDS, write_jsonl

from mixfuse.contracts.database import opened
from mixfuse.contracts.files import read_json
from mixfuse.contracts.trace import Call, Trace
from mixfuse.fusion.config import TraceConfig
from mixfuse.fusion.store.traces import TraceStore


def trace(number: int) -> Trace:
    texts = (WORDS[number % len(WORDS)], f"{WORDS[(number + 3) % len(WORDS)]} {number}")
    calls = [Call(stage="answer", member="m", model="m", candidate=n, text=text) for n, text in enumerate(texts)]
    return Trace(
        model="fusion/best-of",
        mode="best_of",
        messages=[{"role": "user", "content": f"Repeat {number}: {texts[0]}"}],
        candidates=["a", "b"],
        calls=calls,
        winner=0,
        reason="judged",
        answer=texts[0],
        feedback=[{"best": 0}],
    )


async def store(place: Path, traces: list[Trace]) -> None:
    with opened(place) as database:
        kept = TraceStore(database, TraceConfig())
        for one in traces:
            await kept.add(one)
        await kept.close()


def label(number: int) -> dict[str, Any]:
    right, wrong = {"text": WORDS[number % len(WORDS)]}, {"text": f"not {number}"}
    a, b = (right, wrong) if number % 2 else (wrong, right)
    return {
        "prompt": f"Say {number}: {right['text']}",
        "response_a": a,
        "response_b": b,
        "label": "A" if number % 2 else "B",
    }


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.zero3
def test_a_round_from_feedback_to_a_decision_killed_on_the_way(tiny_base: Path, tmp_path: Path) -> None:
    asyncio.run(store(tmp_path / "traces.sqlite3", [trace(number) for number in range(80)]))
    write_jsonl(tmp_path / "frozen.jsonl", [label(number) for number in range(60)])
    recipe = harness.judge_recipe(tmp_path, tiny_base)
    path = tmp_path / "loop.yaml"
    keys = {
        "rounds": str(tmp_path / "rounds"),
        "traces": {"database": str(tmp_path / "traces.sqlite3"), "min_rows": 50, "settle_s": 0},
        "frozen": [str(tmp_path / "frozen.jsonl")],
        "recipe": str(recipe),
        "pairs": {"near": None, "balance": []},
        "promote": {"min_fresh": 5},
        "server": None,
    }
    path.write_text(yaml.safe_dump(keys))
    command = [sys.executable, "-m", "mixfuse", "loop", str(path), "--json"]
    folder = tmp_path / "rounds" / "0001"
    with subprocess.Popen(command, env=harness.ENVIRONMENT) as process:
        while not (folder / "logs" / "train.log").exists() and process.poll() is None:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    assert not (folder / "decision.json").exists()
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        done = subprocess.run(command, env=harness.ENVIRONMENT, capture_output=True, text=True, check=False)
        if "another mixfuse loop is at work" not in done.stderr:
            break
        time.sleep(1)  # the training that outlived its loop
    assert done.returncode == 0, done.stderr
    decision = read_json(folder / "decision.json")
    assert not decision["promoted"], "noise was promoted"
    assert decision["reason"].startswith(("not better by enough", "worse"))
    assert "kept the serving judge" in done.stdout
    assert decision["frozen"]["n"] == 60
    assert decision["fresh"]["prompts"] >= 5
    manifest = read_json(folder / "adapter" / "manifest.json")
    assert manifest["role"] == "judge"
    assert manifest["parity"]["max_abs_logprob_difference"] < 1e-3
    steps = {path.stem for path in (folder / "steps").glob("*.json")}
    assert steps == {"pairs", "train", "export", "frozen", "fresh"}
