"""The role table's order of things and its races, before a made-up engine that does as it is told.

What a real engine does with adapters is in test_server.py and test_engine.py; here it is when which call is made.
"""

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from mixfuse import adapter, judge_protocol
from mixfuse.adapter import CONFIG, MANIFEST, WEIGHTS, Fingerprint, Manifest
from mixfuse.errors import MixfuseError
from serve.roles import RoleTable

BASE = Fingerprint(**dict.fromkeys(("config", "tokenizer", "chat_template", "weights"), "0" * 64))


class FakeEngine:
    """Keeps the names that are loaded; waits or fails where a test says so."""

    base_model_name = "base"

    def __init__(self) -> None:
        self.loaded: set[str] = set()
        self.calls: list[str] = []
        self.fail: dict[str, MixfuseError] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.begun = asyncio.Event()
        self.says: dict[str, float] = {"base": -1.0}
        self.prefers: dict[str, float] = {}

    async def _step(self, what: str, name: str) -> None:
        self.calls.append(f"{what} {name}")
        if gate := self.gates.get(what):
            self.begun.set()
            await gate.wait()
        if what in self.fail:
            raise self.fail[what]

    async def load_adapter(self, name: str, path: Path) -> None:
        await self._step("load", name)
        assert name not in self.loaded, "vLLM refuses a name that is loaded"
        self.loaded.add(name)

    async def unload_adapter(self, name: str) -> None:
        await self._step("unload", name)
        self.loaded.remove(name)

    async def probe(self, name: str) -> None:
        await self._step("probe", name)
        assert name in self.loaded

    async def prompt_logprobs(self, name: str, prompt: list[int]) -> list[float]:
        assert name in {"base", *self.loaded}
        return [self.says.get(name, -2.0)] * (len(prompt) - 1)

    async def first_token_logprobs(self, name: str, messages: list[dict[str, str]]) -> dict[str, float]:
        p = self.prefers.get(name, 0.5)
        return {" A": math.log(p), "B": math.log(1 - p)}


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """Makes a whole adapter directory; equal numbers make equal revisions."""

    def make(number: int, role: str = "domain", **keys) -> Path:
        folder = tmp_path / f"{role}-{number}"
        folder.mkdir(exist_ok=True)
        stem = "base_model.model.model.layers.0.self_attn.q_proj"
        weights = {
            f"{stem}.lora_A.weight": numpy.full((2, 8), number, numpy.float32),
            f"{stem}.lora_B.weight": numpy.ones((8, 2), numpy.float32),
        }
        save_file(weights, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2}))
        files = adapter.file_hashes(folder)
        manifest = Manifest(
            role=role,
            revision=adapter.revision_of(files),
            base=BASE,
            base_path="base",
            rank=2,
            experts_trained=False,
            files=files,
            judge_protocol=judge_protocol.describe() if role == "judge" else None,
            **keys,
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json())
        return folder

    return make


def revision(directory: Path) -> str:
    return adapter.read_manifest(directory).revision


def table(engine: FakeEngine, *roles: str, **keys) -> RoleTable:
    return RoleTable(engine, BASE, list(roles) or ["domain"], max_rank=8, **keys)


async def leased(roles: RoleTable, role: str = "domain") -> str:
    async with roles.lease(role) as held:
        return held.model


async def test_a_staged_revision_serves_nobody_until_it_is_committed(made):
    engine = FakeEngine()
    roles = table(engine)
    staged = await roles.stage("domain", made(1))
    assert await leased(roles) == "base"
    assert engine.loaded == {staged.model}
    swap = await roles.commit("domain", staged)
    assert (swap.old, swap.new) == (None, revision(made(1)))
    assert await leased(roles) == staged.model == f"domain@{revision(made(1))}"


async def test_requests_end_on_the_revision_they_began_with(made):
    engine = FakeEngine()
    roles = table(engine)
    await roles.swap("domain", made(1))
    async with roles.lease("domain") as held:
        swapping = asyncio.create_task(roles.swap("domain", made(2)))
        while roles.serving()["domain"] is held:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert await leased(roles) == f"domain@{revision(made(2))}"
        assert held.model in engine.loaded
        assert not swapping.done()
    assert (await swapping).drained == 1
    assert engine.loaded == {f"domain@{revision(made(2))}"}


@pytest.mark.parametrize("where", ["load", "probe"])
async def test_a_swap_that_is_cancelled_leaves_nothing_in_the_engine(made, where: str):
    engine = FakeEngine()
    roles = table(engine)
    engine.gates[where] = asyncio.Event()
    swapping = asyncio.create_task(roles.swap("domain", made(1)))
    await engine.begun.wait()
    swapping.cancel()
    await asyncio.sleep(0)
    engine.gates.pop(where).set()  # the engine goes on with what it was told, whoever has gone away
    with pytest.raises(asyncio.CancelledError):
        await swapping
    assert engine.loaded == set()
    assert await leased(roles) == "base"
    await roles.swap("domain", made(1))  # and the role can be swapped again


async def test_one_swap_of_a_role_at_a_time(made):
    engine = FakeEngine()
    roles = table(engine, "domain", "judge")
    staged = await roles.stage("domain", made(1))
    with pytest.raises(MixfuseError, match="under way") as caught:
        await roles.stage("domain", made(2))
    assert caught.value.kind == "conflict"
    await roles.swap("judge", made(3, "judge"))
    await roles.discard(staged)
    with pytest.raises(MixfuseError, match="not staged"):
        await roles.commit("domain", staged)
    swaps = await asyncio.gather(*(roles.swap("domain", made(number)) for number in (1, 2, 3)))
    assert {swap.new for swap in swaps} == {revision(made(number)) for number in (1, 2, 3)}
    assert engine.loaded == {roles.serving()[role].model for role in ("domain", "judge")}


async def test_a_canary_gets_its_share_and_nothing_once_it_is_discarded(made):
    engine = FakeEngine()
    drawn = [number / 10 for number in range(10)]
    roles = table(engine, draw=lambda: drawn[0])
    await roles.swap("domain", made(1))
    canary = await roles.stage("domain", made(2))
    roles.set_canary("domain", canary, 0.3)
    given = []
    while drawn:
        given.append(await leased(roles))
        drawn.pop(0)
    assert given.count(canary.model) == 3
    drawn.append(0.0)
    async with roles.lease("domain") as held:
        assert held is canary
        discarding = asyncio.create_task(roles.discard(canary))
        await asyncio.sleep(0)
        assert await leased(roles) == f"domain@{revision(made(1))}"
        assert canary.model in engine.loaded
    await discarding
    assert canary.model not in engine.loaded
