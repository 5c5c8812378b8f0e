"""The modes: each is one file, and a new one needs no other change."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_upstream import FakeUpstream, Script
from fusion_harness import Gateway, StartGateway

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.mode_names import FUSED_MODES, MODES, SINGLE_MODEL_MODE, descriptions, model_name
from mixfuse.fusion.modes.registry import mode_named

ROOT = Path(__file__).parents[2]
VOTE = '''"""vote: the answer that most members gave is returned unchanged."""

from collections import Counter

from mixfuse.fusion.answering.agreement import candidate_key
from mixfuse.fusion.answering.request import FusionRequest
from mixfuse.fusion.modes.registry import Mode


async def count_votes(request: FusionRequest) -> str:
    """Returns the answer that most members gave."""
    keys = [candidate_key(candidate, request.agreement) for candidate in request.candidates]
    (most, _), *_ = Counter(keys).most_common(1)
    return await request.select(request.candidates[keys.index(most)], "majority")


async def vote(request: FusionRequest) -> str:
    """Answers a request in mode `vote`."""
    await request.ask_members()
    return await count_votes(request)


MODE = Mode(answer=vote, finish=count_votes)
'''


def test_every_mode_is_declared_and_described() -> None:
    assert {mode_named(name).needs for name in MODES} == {None, "judge", "synthesizer"}
    assert SINGLE_MODEL_MODE in MODES
    assert SINGLE_MODEL_MODE not in FUSED_MODES
    assert [name for name, text in descriptions().items() if not text.startswith(f"{name}: ")] == []
    with pytest.raises(MixfuseError, match=r"no mode 'vote'.*best_of"):
        mode_named("vote")


async def test_a_debate_ends_only_with_a_mode_that_can_end_one(start_gateway: StartGateway) -> None:
    with pytest.raises(MixfuseError, match=r"no debate can end with 'debate'; use one of best_of, merge"):
        await start_gateway(modes={"debate_ending": "debate"})


@pytest.fixture
async def extended(upstream: FakeUpstream, tmp_path: Path) -> AsyncIterator[tuple[Gateway, Path]]:
    """A gateway of a copy of the program whose only difference is the file `fusion/modes/vote.py`."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "mixfuse", copy / "mixfuse", ignore=shutil.ignore_patterns("__pycache__"))  # follows links
    (copy / "mixfuse" / "fusion" / "modes" / "vote.py").write_text(VOTE)
    config = {
        "members": [
            {"name": name, "base_url": upstream.base_url, "model": name} for name in ("alpha", "beta", "gamma")
        ],
        "modes": {"agreement": "number", "debate_ending": "vote", "max_rounds": 1},
        "trace_db": str(tmp_path / "traces.sqlite3"),
    }
    (tmp_path / "fusion.yaml").write_text(yaml.safe_dump(config))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mixfuse", "gateway", tmp_path / "fusion.yaml", "--port", "0"),
        stderr=asyncio.subprocess.PIPE,
        cwd=copy,
        env=environment(copy),
    )
    try:
        assert process.stderr is not None
        async with asyncio.timeout(60):
            ready = (await process.stderr.readline()).decode()
        found = re.search(r"http://[\d.:]+", ready)
        assert found, ready
        gateway = Gateway(found[0])
        yield gateway, copy
        await gateway.close()
    finally:
        process.terminate()
        await process.wait()


def environment(copy: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "200"}


async def test_a_new_mode_is_one_file(extended: tuple[Gateway, Path], upstream: FakeUpstream) -> None:
    gateway, copy = extended
    for name, text in {"alpha": "It is 41", "beta": "6 * 7 = 42", "gamma": "42"}.items():
        upstream.models[name] = Script(text)
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": "6 * 7?"}]}

    body = (await gateway.post(model=model_name("vote"), **ask)).json()
    assert body["choices"][0]["message"]["content"] == "6 * 7 = 42"
    assert (body["fusion"]["mode"], body["fusion"]["reason"], body["fusion"]["winner"]) == ("vote", "majority", 1)
    assert (await gateway.trace(body["fusion"]))["mode"] == "vote"

    debated = (await gateway.post(model="fusion/debate", **ask)).json()
    assert (debated["fusion"]["mode"], debated["fusion"]["reason"]) == ("debate", "majority")
    assert "fusion/vote" in [model["id"] for model in (await gateway.http.get("/v1/models")).json()["data"]]

    asked = await run(copy, "ask", "6 * 7?", "--mode", "vote", "--url", gateway.url)
    assert asked.startswith("6 * 7 = 42\n")
    assert "beta's answer: majority." in asked
    help_text = " ".join((await run(copy, "ask", "--help")).split())
    assert "vote: the answer that most members gave is returned unchanged" in help_text
    assert "vote" in await run(copy, "eval", "fusion", "--help")


async def run(copy: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "mixfuse", *arguments]
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=copy, env=environment(copy), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
