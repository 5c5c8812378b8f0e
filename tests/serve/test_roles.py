"""The order of a swap's steps, and its races, with a fake engine that a test holds up or lets fail.

test_server.py and test_engine.py show what a real engine does with adapters.
"""

import asyncio
import json
import math
import os
import random
import re
import shutil
import sqlite3
import stat
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from role_harness import LORA, FakeEngine, leased, revision, table
from starlette.applications import Starlette

from mixfuse.app.gates import GateConfig, Gates
from mixfuse.app.roles_routes import RoleMetrics, routes
from mixfuse.app.roles_store import StoredRoles, roll_back
from mixfuse.app.server import ServeConfig, _terms
from mixfuse.cli.entry import main
from mixfuse.contracts import adapter
from mixfuse.contracts.adapter import (
    CONFIG,
    WEIGHTS,
    Effect,
    LogprobProbe,
    Measured,
    Probes,
    VerdictProbe,
)
from mixfuse.contracts.database import opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import validate
from mixfuse.serve import probes
from mixfuse.serve.copies import AdapterCopies, copy_name
from mixfuse.serve.following import RecordFollower
from mixfuse.serve.swap import Swapper
from mixfuse.serve.watch import Folder, Watcher


async def come_true(condition: Callable[[], bool]) -> None:
    """Lets the other tasks run until the condition holds."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - other tasks' work
            await asyncio.sleep(0.001)


async def test_a_staged_revision_serves_nobody_until_it_is_committed(made):
    engine = FakeEngine()
    swapper = table(engine)
    staged = await swapper.stage("domain", made(1))
    assert await leased(swapper) == "base"
    assert engine.loaded == {staged.model}
    swap = await swapper.commit("domain", staged)
    assert (swap.old, swap.new) == (None, revision(made(1)))
    assert await leased(swapper) == staged.model == f"domain@{revision(made(1))}"


async def test_requests_end_on_the_revision_they_began_with(made):
    engine = FakeEngine()
    swapper = table(engine)
    await swapper.swap("domain", made(1))
    async with swapper.table.lease("domain") as held:
        swapping = asyncio.create_task(swapper.swap("domain", made(2)))
        while swapper.table.serving()["domain"] is held:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert await leased(swapper) == f"domain@{revision(made(2))}"
        assert held.model in engine.loaded
        assert not swapping.done()
    assert (await swapping).drained == 1
    assert engine.loaded == {f"domain@{revision(made(2))}"}


@pytest.mark.parametrize("where", ["load", "probe"])
async def test_a_swap_that_is_cancelled_leaves_nothing_in_the_engine(made, where: str):
    engine = FakeEngine()
    swapper = table(engine)
    engine.gates[where] = asyncio.Event()
    swapping = asyncio.create_task(swapper.swap("domain", made(1)))
    await engine.begun.wait()
    swapping.cancel()
    await asyncio.sleep(0)
    engine.gates.pop(where).set()  # the engine goes on with what it was told, whoever has gone away
    with pytest.raises(asyncio.CancelledError):
        await swapping
    assert engine.loaded == set()
    assert await leased(swapper) == "base"
    await swapper.swap("domain", made(1))  # and the role can be swapped again


async def test_one_swap_of_a_role_at_a_time(made):
    engine = FakeEngine()
    swapper = table(engine, "domain", "judge")
    staged = await swapper.stage("domain", made(1))
    with pytest.raises(MixfuseError, match="under way") as caught:
        await swapper.stage("domain", made(2))
    assert caught.value.kind == "conflict"
    await swapper.swap("judge", made(3, "judge"))
    await swapper.discard(staged)
    with pytest.raises(MixfuseError, match="not staged"):
        await swapper.commit("domain", staged)
    swaps = await asyncio.gather(*(swapper.swap("domain", made(number)) for number in (1, 2, 3)))
    assert {swap.new for swap in swaps} == {revision(made(number)) for number in (1, 2, 3)}
    assert engine.loaded == {swapper.table.serving()[role].model for role in ("domain", "judge")}


async def test_a_canary_gets_its_share_and_nothing_once_it_is_discarded(made):
    engine = FakeEngine()
    drawn = [number / 10 for number in range(10)]
    swapper = table(engine, draw=lambda: drawn[0])
    await swapper.swap("domain", made(1))
    canary = await swapper.stage("domain", made(2))
    swapper.table.set_canary("domain", canary, 0.3)
    leases = []
    while drawn:
        leases.append(await leased(swapper))
        drawn.pop(0)
    assert leases.count(canary.model) == 3
    drawn.append(0.0)
    async with swapper.table.lease("domain") as held:
        assert held is canary
        discarding = asyncio.create_task(swapper.discard(canary))
        await asyncio.sleep(0)
        assert await leased(swapper) == f"domain@{revision(made(1))}"
        assert canary.model in engine.loaded
    await discarding
    assert canary.model not in engine.loaded


async def test_the_end_of_the_server_does_not_wait_for_a_drain(made):
    engine = FakeEngine()
    swapper = table(engine)
    await swapper.swap("domain", made(1))
    async with swapper.table.lease("domain") as held:
        swapping = asyncio.create_task(swapper.swap("domain", made(2)))
        while swapper.table.serving()["domain"] is held:  # noqa: ASYNC110
            await asyncio.sleep(0)
        async with asyncio.timeout(60):
            await swapper.close()
        assert held.model in engine.loaded, "its request goes on"
        with pytest.raises(asyncio.CancelledError):
            await swapping


async def test_a_canary_that_is_cleared_stays_staged_and_gets_no_lease(made):
    swapper = table(FakeEngine(), draw=lambda: 0.0)
    canary = await swapper.stage("domain", made(1))
    swapper.table.set_canary("domain", canary, 0.5)
    assert await leased(swapper) == canary.model
    swapper.table.clear_canary("domain")
    assert await leased(swapper) == "base"
    swapper.table.set_canary("domain", canary, 0.5)
    await swapper.commit("domain", canary)
    await swapper.stage("domain", made(2))
    assert await leased(swapper) == canary.model, "the next staged revision does not inherit a share"


async def test_going_back_to_a_revision_that_still_drains_does_not_load_it_again(made):
    engine = FakeEngine()
    swapper = table(engine)
    await swapper.swap("domain", made(1))
    async with swapper.table.lease("domain") as held:
        swapping = asyncio.create_task(swapper.swap("domain", made(2)))
        while swapper.table.serving()["domain"] is held:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await swapper.swap("domain", made(1))
        await swapping  # it waits for a revision no more that stays on
        assert swapper.table.serving()["domain"] is held
    assert engine.calls.count(f"load {held.model}") == 1
    assert engine.loaded == {held.model}


# --- probes ---------------------------------------------------------------------------------------------------------


def stored(value: float, tolerance: float = 1e-3, **keys) -> Probes:
    return Probes(tolerance=tolerance, logprobs=[LogprobProbe(tokens=[1, 2, 3], logprobs=[value] * 2)], **keys)


@pytest.mark.parametrize(
    ("says", "probes", "words"),
    [
        (-1.0, None, "it ignores the adapter"),
        (-1.0, stored(-2.0), "it ignores the adapter"),
        (math.nan, None, "not finite"),
        (-math.inf, stored(-2.0), "not finite"),
        (-2.1, stored(-2.0), r"off by median 0\.1.*; 0\.001 is allowed for the median"),
    ],
)
async def test_an_adapter_the_engine_does_not_apply_is_refused(made, says: float, probes: Probes | None, words: str):
    engine = FakeEngine()
    directory = made(1, probes=probes)
    engine.says[f"domain@{revision(directory)}"] = says
    swapper = table(engine)
    with pytest.raises(MixfuseError, match=words) as caught:
        await swapper.swap("domain", directory)
    assert caught.value.kind == "adapter"
    assert engine.loaded == set()
    assert await leased(swapper) == "base"


@pytest.mark.parametrize(("lost", "kind"), [("probe", "engine"), ("probe domain", "adapter")])
async def test_an_engine_that_is_gone_is_told_from_an_adapter_it_cannot_answer_with(made, lost: str, kind: str):
    engine = FakeEngine()
    swapper = table(engine)
    away = MixfuseError("no answer", kind="engine")

    async def probe(name: str) -> None:
        if f"probe {name}".startswith(lost):
            raise away

    engine.probe = probe
    with pytest.raises(MixfuseError, match="no answer") as caught:
        await swapper.swap("domain", made(1))
    assert caught.value.kind == kind
    assert engine.loaded == set()


async def test_a_less_precise_engine_is_allowed_more(made):
    engine = FakeEngine()
    directory = made(1, probes=stored(-2.0))
    engine.says[f"domain@{revision(directory)}"] = -2.1
    await table(engine, probe_tolerance=0.5).swap("domain", directory)


@pytest.mark.parametrize(("p", "refused"), [(0.8, False), (0.75, True)])
async def test_a_judge_gives_its_stored_verdicts(made, p: float, refused: bool):
    engine = FakeEngine()
    messages = [{"role": "user", "content": "A or B?"}]
    directory = made(1, "judge", probes=stored(-2.0, verdicts=[VerdictProbe(messages=messages, p=0.8)]))
    engine.prefers[f"judge@{revision(directory)}"] = p
    swapper = table(engine, "judge")
    if refused:
        with pytest.raises(MixfuseError, match=r"stored comparison 1 is 0\.750; it was 0\.800"):
            await swapper.swap("judge", directory)
    else:
        await swapper.swap("judge", directory)


@pytest.mark.parametrize(
    ("dtype", "off", "refused"), [("bfloat16", 0.4, False), ("bfloat16", 0.6, True), ("float32", 0.4, True)]
)
async def test_an_engine_below_float32_is_allowed_half_a_nat(made, dtype: str, off: float, refused: bool):
    config = ServeConfig.model_validate({"engine": {"base": "base", "dtype": dtype}, "fusion": "fusion.yaml"})
    engine = FakeEngine()
    directory = made(1, probes=stored(-2.0))
    engine.says[f"domain@{revision(directory)}"] = -2.0 - off
    swapper = table(engine, probe_tolerance=_terms(config).tolerance, precision=_terms(config).precision)
    if refused:
        with pytest.raises(MixfuseError, match="off by"):
            await swapper.swap("domain", directory)
    else:
        await swapper.swap("domain", directory)


@pytest.mark.parametrize(("tolerance", "p", "refused"), [(0.5, 0.69, False), (0.5, 0.5, True), (0.1, 0.69, True)])
async def test_how_far_a_verdict_may_be_off_follows_the_config(made, tolerance: float, p: float, refused: bool):
    engine = FakeEngine()
    messages = [{"role": "user", "content": "A or B?"}]
    directory = made(1, "judge", probes=stored(-2.0, verdicts=[VerdictProbe(messages=messages, p=0.8)]))
    engine.prefers[f"judge@{revision(directory)}"] = p
    swapping = table(engine, "judge", probe_tolerance=tolerance).swap("judge", directory)
    if refused:
        with pytest.raises(MixfuseError, match=rf"stored comparison 1 is {p:.3f}"):
            await swapping
    else:
        await swapping


class NoisyEngine(FakeEngine):
    """An engine that says something else each time, as other requests share its batches.

    `adapted` is what the adapter adds to the base's answer.
    """

    def __init__(self, adapted: float, noise: float) -> None:
        super().__init__()
        self.adapted, self.noise, self.random = adapted, noise, random.Random(3)
        self.asked: list[tuple[str, int]] = []
        self.under_way: list[str] = []
        self.together: set[tuple[str, ...]] = set()

    def value(self, name: str, place: int, size: int) -> float:
        said = -2.0 - place % 7 / 3 + self.random.gauss(0, self.noise)
        return said + (self.adapted * math.sin(place) if name != "base" else 0.0)

    async def prompt_logprobs(self, name: str, prompt: list[int]) -> list[float]:
        self.asked.append((name, len(prompt)))
        self.under_way.append(name)
        await asyncio.sleep(0.005)  # all of a batch have begun by then
        self.together.add(tuple(sorted(set(self.under_way))))
        said = [self.value(name, place, len(prompt)) for place in range(1, len(prompt))]
        self.under_way.remove(name)
        return said


@pytest.mark.parametrize(
    ("adapted", "noise", "refused"),
    [(0.0, 0.02, True), (0.2, 0.02, False), (1e-4, 0.0, False), (0.0, 0.0, True)],
    ids=["ignored in noise", "gentle in noise", "gentle without noise", "ignored without noise"],
)
async def test_an_effect_within_the_engines_own_noise_is_none(made, adapted: float, noise: float, refused: bool):
    """The verdict does not hang on one sample of the noise: whatever the engine's dice, it is the same."""
    for seed in range(10):
        engine = NoisyEngine(adapted, noise)
        engine.random = random.Random(seed)
        swapping = table(engine, precision="bfloat16" if noise else "float32").swap("domain", made(1))
        if refused:
            with pytest.raises(MixfuseError, match="it ignores the adapter"):
                await swapping
        else:
            await swapping


async def test_probes_are_short_and_long_alone_and_in_a_batch(made):
    engine = NoisyEngine(0.5, 0.0)
    directory = made(1)
    await table(engine).swap("domain", directory)
    model = f"domain@{revision(directory)}"
    for name in ("base", model):
        assert {16, 512, 1015} <= {size for asked, size in engine.asked if asked == name}
    assert ("base", model) in engine.together


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        (lambda size, place, decoded: size > 400 and place > 300, "not finite"),
        (lambda size, place, decoded: decoded, "not finite"),
    ],
    ids=["beyond 300 tokens", "in decoding"],
)
async def test_what_fails_only_there_is_seen(made, fails, words: str):
    class Broken(NoisyEngine):
        decoding = False

        def value(self, name: str, place: int, size: int) -> float:
            said = super().value(name, place, size)
            return math.nan if name != "base" and fails(size, place, self.decoding) else said

        async def decode(self, name: str, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
            said = [self.value(name, len(prompt) + place, 0) for place in range(tokens)]
            return [7] * tokens, [math.nan] * tokens if fails(0, 0, name != "base") else said

    engine = Broken(0.5, 0.0)
    with pytest.raises(MixfuseError, match=words):
        await table(engine).swap("domain", made(1))
    assert engine.loaded == set()


async def test_an_adapter_that_answers_otherwise_in_a_batch_is_refused(made):
    class Mixing(NoisyEngine):
        def value(self, name: str, place: int, size: int) -> float:
            said = super().value(name, place, size)
            return said - 1.0 if name != "base" and "base" in self.under_way else said

    with pytest.raises(MixfuseError, match="otherwise in a batch with other requests than alone"):
        await table(Mixing(0.5, 0.0)).swap("domain", made(1))


class BusyEngine(NoisyEngine):
    """An engine with other requests. By its clock each prompt takes `seconds`, and sleeping takes what it should."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, seconds: float = 0.1) -> None:
        super().__init__(0.5, 0.0)
        self.seconds, self.others = seconds, True
        self.now = self.worked = self.slept = 0.0
        monkeypatch.setattr(probes, "time", self)
        monkeypatch.setattr(probes.asyncio, "sleep", self.sleep)

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds

    async def busy(self) -> bool:
        return self.others

    async def prompt_logprobs(self, name: str, prompt: list[int]) -> list[float]:
        self.asked.append((name, len(prompt)))
        self.now += self.seconds
        self.worked += self.seconds
        return [self.value(name, place, len(prompt)) for place in range(1, len(prompt))]


@pytest.mark.parametrize(
    ("seconds", "others", "share"), [(0.1, True, 0.1), (0.1, False, 1.0), (10.0, True, None)], ids=str
)
async def test_probes_leave_a_busy_engines_time_to_its_requests(
    made, monkeypatch: pytest.MonkeyPatch, seconds: float, others: bool, share: float | None
):
    """A tenth of it is theirs, all of an idle one's; and a swap ends, however slow the engine is."""
    engine = BusyEngine(monkeypatch, seconds=seconds)
    engine.others = others
    await table(engine).swap("domain", made(1))
    if share is None:
        assert engine.slept == pytest.approx(120)
    else:
        assert engine.worked / (engine.worked + engine.slept) == pytest.approx(share, abs=0.01)


async def test_what_probes_wait_for_is_not_taken_for_their_cost(made, monkeypatch: pytest.MonkeyPatch):
    """A full queue makes each probe take ten times as long, and costs the other requests no more."""
    engine = BusyEngine(monkeypatch)
    engine.started, engine.others = "1", False
    swapper = table(engine)
    await swapper.swap("domain", made(1))
    engine.seconds, engine.others = 1.0, True
    worked = engine.worked
    await swapper.swap("domain", made(2))
    assert engine.slept == pytest.approx(9 * (engine.worked - worked) / 10, rel=0.01)


@pytest.mark.parametrize(("started", "longest"), [(("1", "1", "1"), 24), (("1", "1", "2"), 1015), ((None,) * 3, 1015)])
async def test_a_rollback_does_not_wait_for_requests(
    made, stores, monkeypatch: pytest.MonkeyPatch, started: tuple[str | None, ...], longest: int
):
    """What has passed all probes since the engine's start is asked the short ones."""
    engine = BusyEngine(monkeypatch)
    swapper = table(engine, store=stores())
    for number in (1, 2):
        engine.started = started[number - 1]
        await swapper.swap("domain", made(number))
    slept, engine.asked, engine.started = engine.slept, [], started[2]
    assert (await swapper.rollback("domain")).new == revision(made(1))
    assert engine.slept == slept > 0
    asked = [size for name, size in engine.asked if name != "base"]
    assert longest <= max(asked) < longest + 16  # with what it writes


async def test_a_rollback_compares_the_short_prompts_and_a_judges_verdicts(
    made, stores, monkeypatch: pytest.MonkeyPatch
):
    engine = BusyEngine(monkeypatch)
    engine.started = "1"
    said = {name: [engine.value(name, place, 0) for place in range(1, 700)] for name in ("base", "adapter")}
    known = [
        LogprobProbe(tokens=list(range(size)), logprobs=said["adapter"][: size - 1], base=said["base"][: size - 1])
        for size in (700, 20)
    ]
    verdicts = [VerdictProbe(messages=[{"role": "user", "content": "A or B?"}], p=0.5)]
    swapper = table(engine, "judge", store=stores())
    for number in (1, 2):
        probes_of = Probes(tolerance=1e-3, logprobs=known, verdicts=verdicts)
        await swapper.swap("judge", made(number, "judge", probes=probes_of))
    engine.asked = []
    assert (await swapper.rollback("judge")).new == revision(made(1, "judge"))
    assert max(size for _, size in engine.asked) < 64
    engine.prefers[f"judge@{revision(made(2, 'judge'))}"] = 0.9
    with pytest.raises(MixfuseError, match="its verdict on stored comparison 1"):
        await swapper.swap("judge", made(2, "judge"))


async def test_a_rollback_to_an_adapter_that_is_ignored_now_is_refused(made, stores, monkeypatch: pytest.MonkeyPatch):
    engine = BusyEngine(monkeypatch)
    engine.started = "1"
    swapper = table(engine, store=stores())
    for number in (1, 2):
        await swapper.swap("domain", made(number))
    engine.adapted = 0.0
    with pytest.raises(MixfuseError, match="it ignores the adapter"):
        await swapper.rollback("domain")
    assert engine.loaded == {f"domain@{revision(made(2))}"}


async def test_a_base_is_asked_for_long_prompts_once_a_start(made, monkeypatch: pytest.MonkeyPatch):
    engine = BusyEngine(monkeypatch)
    swapper = table(engine)
    long = []
    for number, started in ((1, "1"), (2, "1"), (3, "2"), (4, None), (5, None)):
        engine.asked, engine.started = [], started
        await swapper.swap("domain", made(number))
        assert any(name == "base" for name, _ in engine.asked)
        assert any(name != "base" and size > 1000 for name, size in engine.asked)
        long.append(sum(name == "base" and size > 64 for name, size in engine.asked))
    assert long == [2, 0, 2, 2, 2]


@pytest.mark.parametrize("which", ["each", "ranks"])
async def test_every_engine_and_each_of_its_copies_is_probed(made, monkeypatch: pytest.MonkeyPatch, which: str):
    """The second one ignores the adapter."""
    engine, other = NoisyEngine(0.5, 0.0), NoisyEngine(0.0, 0.0)
    other.loaded = engine.loaded

    async def ranks() -> list[FakeEngine]:
        return [engine, other]

    monkeypatch.setattr(engine, which, ranks if which == "ranks" else lambda: [engine, other])
    with pytest.raises(MixfuseError, match="it ignores the adapter"):
        await table(engine).swap("domain", made(1))


async def test_without_probes_the_effect_has_the_right_size(made):
    engine = NoisyEngine(0.5, 0.0)
    said = [[engine.value(name, place, 24) for place in range(1, 24)] for name in ("base", "adapter")]
    median = statistics.median(abs(a - b) for a, b in zip(*said, strict=True))
    directory = made(1, effect=Effect(median=median, tokens=69))
    await table(engine).swap("domain", directory)
    with pytest.raises(MixfuseError, match="its effect is 2 times as large as when the adapter was made"):
        await table(NoisyEngine(1.0, 0.0)).swap("domain", directory)
    with pytest.raises(MixfuseError, match=r"its effect is 0\.5 times as large"):
        await table(NoisyEngine(0.25, 0.0)).swap("domain", directory)


async def test_an_adapter_without_probes_is_served_only_where_the_config_allows_it(made):
    engine = FakeEngine()
    assert ServeConfig.model_validate({"engine": {"base": "b"}, "fusion": "f.yaml"}).adapters_without_probes == "serve"
    with pytest.raises(MixfuseError, match=r"has no probes\.json, and the serve config refuses") as caught:
        await table(engine, unprobed=False).swap("domain", made(1))
    assert "\n" not in str(caught.value)
    assert engine.calls == []
    await table(engine, unprobed=False).swap("domain", made(2, probes=stored(-2.0)))


async def test_a_quantised_engine_is_compared_with_what_it_said_when_it_was_verified(made):
    """Its weights are so coarse that the reference alone could not tell one adapter from the next."""
    tokens = list(range(1, 200))
    engine = NoisyEngine(0.3, 0.0)
    sides = {name: [engine.value(name, place, 199) for place in range(1, 199)] for name in ("base", "adapter")}
    coarse = random.Random(8)
    shift = [coarse.gauss(0, 0.5) for _ in tokens[1:]]
    reference = {name: [value + off for value, off in zip(row, shift, strict=True)] for name, row in sides.items()}
    probe = LogprobProbe(tokens=tokens, logprobs=reference["adapter"], base=reference["base"])
    exact = {"bfloat16 awq": Measured(logprobs=[sides["adapter"]], base=[sides["base"]])}
    for measured, refused in (({}, False), (exact, True)):
        other = NoisyEngine(0.3, 0.0)
        other.value = lambda name, place, size, value=other.value: (  # type: ignore[method-assign]
            value(name, place, size) + (0.1 * math.cos(5 * place) if name != "base" else 0.0)
        )
        number = 1 + bool(measured)
        directory = made(number, probes=Probes(tolerance=1e-3, logprobs=[probe], measured=measured))
        await table(engine, precision="bfloat16 awq").swap("domain", directory)
        if refused:
            with pytest.raises(MixfuseError, match="off by"):
                await table(other, precision="bfloat16 awq").swap("domain", directory)
        else:
            await table(other, precision="bfloat16 awq").swap("domain", directory)


class Coarse(NoisyEngine):
    """A judge's engine whose weights are so coarse that log-probabilities are off by half a nat, always alike."""

    def __init__(self, p: float, noise: float = 0.0) -> None:
        super().__init__(0.3, noise)
        self.p = p

    async def first_token_logprobs(self, name: str, messages: list[dict[str, str]]) -> dict[str, float]:
        return {"A": math.log(self.p), "B": math.log(1 - self.p)}


@pytest.mark.parametrize(
    ("kept", "noise", "p", "words"),
    [
        (None, 0.0, 0.1, None),
        ([], 0.0, 0.6, None),
        ([0.6], 0.0, 0.64, None),
        ([0.6], 0.0, 0.8, r"is 0\.800; it was 0\.600 when it was verified in bfloat16 awq, and 0\.05 is allowed"),
        ([0.6], 0.03, 0.66, None),
        ([0.6], 0.0, 0.66, r"0\.05 is allowed"),
        ([0.6], 0.03, 0.8, "when it was verified in bfloat16 awq"),
    ],
    ids=[
        "not measured",
        "measured without verdicts",
        "the same",
        "PEFT's",
        "within its noise",
        "not without",
        "beyond",
    ],
)
async def test_a_quantised_engines_verdicts_are_compared_with_what_it_said_itself(
    made, kept: list[float] | None, noise: float, p: float, words: str | None
):
    """PEFT's verdict is 0.8; the coarse weights make 0.6 of it, and another batch hardly moves that."""
    tokens = list(range(1, 400))
    exact, coarse = NoisyEngine(0.3, 0.0), random.Random(8)
    sides = {name: [exact.value(name, place, 399) for place in range(1, 399)] for name in ("base", "adapter")}
    shift = [coarse.gauss(0, 0.5) for _ in tokens[1:]]
    reference = {name: [value + off for value, off in zip(row, shift, strict=True)] for name, row in sides.items()}
    measured = {}
    if kept is not None:
        measured["bfloat16 awq"] = Measured(logprobs=[sides["adapter"]], base=[sides["base"]], verdicts=kept)
    probes = Probes(
        tolerance=1e-3,
        logprobs=[LogprobProbe(tokens=tokens, logprobs=reference["adapter"], base=reference["base"])],
        verdicts=[VerdictProbe(messages=[{"role": "user", "content": "A or B?"}], p=0.8)],
        measured=measured,
    )
    engine = Coarse(p, noise)
    swapping = table(engine, "judge", precision="bfloat16 awq").swap("judge", made(1, "judge", probes=probes))
    if words:
        with pytest.raises(MixfuseError, match=words):
            await swapping
    else:
        await swapping


async def test_an_adapter_of_another_chat_template_than_the_engines_is_refused_by_name(made, caplog):
    engine = FakeEngine()
    swapper = table(engine, chat_template="a" * 64)
    mine = made(1, chat_template="b" * 64, recipe={"chat_template": "mine.jinja"})
    with pytest.raises(
        MixfuseError, match=r"trained with chat_template mine\.jinja, .* name that one as engine\.chat_t"
    ):
        await swapper.swap("domain", mine)
    of_base = made(2, chat_template="c" * 64, recipe={"chat_template": None})
    with pytest.raises(
        MixfuseError, match=r"trained with the base's own chat template, .* leave engine\.chat_template out"
    ):
        await swapper.swap("domain", of_base)
    assert not engine.loaded
    await swapper.swap("domain", made(3, chat_template="a" * 64, recipe={"chat_template": "copy-of-it.jinja"}))
    await swapper.swap("domain", made(4))  # of an earlier version, or from elsewhere: not known
    assert "chat_template" not in caplog.text
    # What an external engine writes is not known here: said, not refused.
    await table(FakeEngine()).swap("domain", mine)
    assert "trained with chat_template mine.jinja; whether the engine writes chats with it is not known" in caplog.text


async def test_an_unfit_adapter_is_refused_before_it_is_loaded(made):
    engine = FakeEngine()
    swapper = table(engine, "domain", "judge")
    for role, directory, words in (
        ("domain", made(1, rank=9), "rank 9 is above the engine's max_lora_rank 8"),
        ("judge", made(2), r"its judge protocol \(version none\)"),
        ("domain", made(math.nan), "NaN|finite"),
    ):
        with pytest.raises(MixfuseError, match=words):
            await swapper.swap(role, directory)
    assert engine.calls == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("target_modules", ["k_proj"], "its targets leave out"),
        ("layers_to_transform", 1, "its targets leave out"),
        ("use_rslora", "false", "its use_rslora is 'false'; it must be true or false"),
        ("task_type", "SEQ_CLS", "its task_type is 'SEQ_CLS'"),
        ("lora_alpha", 1e-12, "too small for float32, so the adapter does nothing"),
    ],
)
async def test_an_adapter_whose_config_nobody_applies_whole_never_reaches_the_engine(
    key, value, message, made, monkeypatch
):
    engine = FakeEngine()
    monkeypatch.setitem(LORA, key, value)
    with pytest.raises(MixfuseError, match=message):
        await table(engine).swap("domain", made(1))
    assert engine.calls == []


# --- more adapters than places --------------------------------------------------------------------------------------


async def three(engine: FakeEngine, made, **keys) -> Swapper:
    """Roles a, b, c, each with an adapter, in an engine of two places."""
    swapper = table(engine, "a", "b", "c", max_loaded=2, **keys)
    for number, role in enumerate("abc"):
        await swapper.swap(role, made(number, role))
    await swapper.close()  # what was too much is out
    return swapper


def present(engine: FakeEngine) -> set[str]:
    return {name[0] for name in engine.loaded}


async def test_an_adapter_that_would_drown_the_base_never_reaches_the_engine(made):
    engine = FakeEngine()
    swapper = table(engine)
    await swapper.swap("domain", made(1))
    loaded = present(engine)
    for number, message in ((1e30, "more than any training does"), (-1, "does nothing")):
        with pytest.raises(MixfuseError, match=message):
            await swapper.swap("domain", made(number))
    assert present(engine) == loaded


async def test_the_least_recently_used_makes_room(made):
    engine = FakeEngine()
    swapper = await three(engine, made)
    assert present(engine) == {"b", "c"}
    await leased(swapper, "b")
    await leased(swapper, "a")
    assert present(engine) == {"a", "b"}
    await leased(swapper, "c")
    assert present(engine) == {"a", "c"}
    assert (swapper.table.counts.loads, swapper.table.counts.evictions) == (5, 3)


async def test_an_idle_adapter_makes_room_before_a_busy_one(made):
    engine = FakeEngine()
    swapper = await three(engine, made)
    await leased(swapper, "b")
    await leased(swapper, "c")
    async with swapper.table.lease("b"), asyncio.timeout(60):  # b was used less recently, but is in use
        await leased(swapper, "a")
        assert present(engine) == {"a", "b"}


async def test_an_adapter_loaded_by_an_engine_whose_answer_was_lost_does_not_stay(made):
    engine = FakeEngine()
    load = engine.load_adapter

    async def load_and_lose_the_answer(name: str, path: Path) -> None:
        await load(name, path)
        raise MixfuseError("no answer", kind="engine")

    engine.load_adapter = load_and_lose_the_answer
    swapper = table(engine)
    with pytest.raises(MixfuseError, match="no answer"):
        await swapper.swap("domain", made(1))
    assert engine.loaded == set()
    engine.load_adapter = load
    await swapper.swap("domain", made(1))


class RoundingEngine(FakeEngine):
    """Rounds as bfloat16 does, otherwise behind each beginning; its adapter is another's in part."""

    def __init__(self, other: float) -> None:
        super().__init__()
        self.other = other

    @staticmethod
    def effect(token: int) -> float:
        return random.Random(token).gauss(0, 0.1)

    async def prompt_logprobs(self, name: str, prompt: list[int]) -> list[float]:
        self.asked = [*getattr(self, "asked", []), prompt]
        rounding = [random.Random(str((name, prompt[: place + 1]))).gauss(0, 0.05) for place in range(1, len(prompt))]
        if name == "base":
            return [-2.0 + off for off in rounding]
        return [
            -2.0 + off + self.effect(token) + self.other * self.effect(-1 - token)
            for off, token in zip(rounding, prompt[1:], strict=True)
        ]


@pytest.mark.parametrize(("other", "precision"), [(0.0, "bfloat16"), (0.6, "bfloat16"), (0.0, "float32")])
async def test_another_revision_is_told_below_float32_by_texts_behind_several_beginnings(made, other, precision):
    beginnings = [[1000 + number] * 8 for number in range(12)]
    prompts = [[*beginning, *range(24 * text, 24 * text + 24)] for text in range(12) for beginning in beginnings]
    plain = list(range(2000, 2040))
    probes = [
        LogprobProbe(
            tokens=prompt,
            logprobs=[-2.0 + RoundingEngine.effect(token) for token in prompt[1:]],
            base=[-2.0] * (len(prompt) - 1),
        )
        for prompt in [plain, *prompts]
    ]
    engine = RoundingEngine(other)
    swapping = table(engine, precision=precision, probe_tolerance=0.2 if precision == "float32" else None).swap(
        "domain", made(1, probes=Probes(tolerance=1e-3, logprobs=probes))
    )
    if other:
        with pytest.raises(MixfuseError, match="is it another revision"):
            await swapping
    else:
        await swapping
    assert (prompts[0] in engine.asked) == (precision != "float32"), "float32 needs none of them"
    assert plain in engine.asked


async def test_requests_that_wait_for_one_adapter_share_one_load(made):
    engine = FakeEngine()
    swapper = await three(engine, made)
    before = swapper.table.counts.loads
    assert set(await asyncio.gather(*(leased(swapper, "a") for _ in range(20)))) == {swapper.table.serving()["a"].model}
    assert swapper.table.counts.loads == before + 1


async def test_a_busy_adapter_is_not_unloaded_and_cannot_keep_the_others_out(made):
    engine = FakeEngine()
    swapper = await three(engine, made)
    order = []

    async def use(role: str, *, until: asyncio.Event | None = None) -> None:
        async with swapper.table.lease(role) as held:
            assert held.model in engine.loaded
            order.append(role)
            if until:
                await until.wait()
            assert held.model in engine.loaded

    end = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for role in "bc":
            group.create_task(use(role, until=end))
        await come_true(lambda: sorted(order) == ["b", "c"])
        group.create_task(use("a"))
        busy = [swapper.table.state(role).serving for role in "bc"]
        await come_true(lambda: not all(revision_.loaded for revision_ in busy))  # one of them has to go
        for role in "bbcc":  # new ones of the busy: those of the one that has to go come after
            group.create_task(use(role))
        # The other two are served beside a busy one; these wait, as "a" does, until that one is out.
        await come_true(lambda: len(order) == 4 and max(revision_.in_flight for revision_ in busy) == 3)
        assert "a" not in order
        end.set()
    assert order.index("a") < len(order) - 1
    assert sorted(order) == sorted("bcabbcc")


async def test_pinned_roles_stay_and_some_place_is_left(made):
    engine = FakeEngine()
    swapper = await three(engine, made)
    await swapper.table.pin("a", True)
    for role in "bcbc":
        await leased(swapper, role)
        assert "a" in present(engine)
    with pytest.raises(MixfuseError, match="could not be served") as caught:
        await swapper.table.pin("b", True)
    assert caught.value.kind == "conflict"
    await swapper.table.pin("a", False)
    await leased(swapper, "b")
    assert present(engine) == {"b", "c"}


async def test_an_adapter_that_changed_on_the_disk_comes_back_as_it_was_verified(made):
    engine = FakeEngine()
    swapper = await three(engine, made)
    verified = (made(0, "a") / WEIGHTS).read_bytes()
    shutil.copyfile(made(1, "b") / WEIGHTS, made(0, "a") / WEIGHTS)
    model = await leased(swapper, "a")
    assert model == swapper.table.serving()["a"].model
    assert (engine.paths[model] / WEIGHTS).read_bytes() == verified
    shutil.rmtree(made(0, "a"))
    for role in "bca":
        await leased(swapper, role)
    assert (engine.paths[model] / WEIGHTS).read_bytes() == verified


async def test_a_copy_that_was_changed_does_not_come_back(made):
    engine = FakeEngine()
    swapper = await three(engine, made)
    copy = swapper.table.serving()["a"].copy
    (copy / WEIGHTS).chmod(0o600)
    (copy / WEIGHTS).write_bytes(b"another")
    with pytest.raises(MixfuseError, match=r"adapter_model\.safetensors was changed"):
        await leased(swapper, "a")


async def test_copies_last_as_long_as_a_role_needs_them(made):
    swapper = table(FakeEngine(), "domain", "judge", max_loaded=1)
    copies = swapper.table.admission.copies

    def kept() -> set[str]:
        return {path.name for path in copies.folder.iterdir()} - {".lock"}

    def copy_of(number: int, role: str = "domain") -> str:
        return copy_name(adapter.read_manifest(made(number, role)).files)

    await swapper.swap("domain", made(1))
    await swapper.swap("judge", made(2, "judge"))  # evicts the first, which its role still needs
    assert kept() == {copy_of(1), copy_of(2, "judge")}
    async with swapper.table.lease("domain"):
        swapping = asyncio.create_task(swapper.swap("domain", made(3)))
        while swapper.table.serving()["domain"].revision != revision(made(3)):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert kept() == {copy_of(1), copy_of(2, "judge"), copy_of(3)}
    await swapping
    assert kept() == {copy_of(2, "judge"), copy_of(3)}
    await swapper.swap("domain", made(3))
    swapper.table.engine.fail["probe"] = MixfuseError("no answer", kind="engine")
    with pytest.raises(MixfuseError):
        await swapper.swap("domain", made(4))
    assert kept() == {copy_of(2, "judge"), copy_of(3)}
    assert stat.S_IMODE(copies.folder.stat().st_mode) == 0o700
    for path in copies.folder.glob("*/*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o400


async def test_a_file_that_changes_after_it_was_verified_is_not_loaded(made, monkeypatch: pytest.MonkeyPatch):
    engine = FakeEngine()
    swapper = table(engine)
    directory, keep = made(1), AdapterCopies.keep

    def late(copies: AdapterCopies, *arguments) -> Path:
        shutil.copyfile(made(2) / WEIGHTS, directory / WEIGHTS)
        return keep(copies, *arguments)

    monkeypatch.setattr(AdapterCopies, "keep", late)
    with pytest.raises(MixfuseError, match="was changed while it was being read") as caught:
        await swapper.swap("domain", directory)
    assert caught.value.kind == "adapter"
    assert engine.calls == []


def test_what_a_killed_server_left_is_removed_and_a_running_ones_is_not(made, tmp_path: Path):
    files = adapter.read_manifest(made(1)).files
    program = "import sys; from pathlib import Path; from mixfuse.serve.copies import AdapterCopies as C; import json; "
    program += "c = C(Path(sys.argv[1])); c.keep(Path(sys.argv[2]), json.loads(sys.argv[3])); "
    program += "print(c.folder, flush=True); sys.stdin.read()"
    arguments = [sys.executable, "-c", program, str(tmp_path / "copies"), str(made(1)), json.dumps(files)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        theirs = Path(other.stdout.readline().strip())
        ours = AdapterCopies(tmp_path / "copies")
        assert list(theirs.glob("sha256-*/*.safetensors"))
        ours.close()
        other.kill()
        other.wait()
        assert theirs.exists()
        AdapterCopies(tmp_path / "copies").close()
        assert not theirs.exists()


def test_a_named_pipe_in_place_of_a_file_is_named(made, tmp_path: Path):
    files = adapter.read_manifest(made(1)).files
    (made(1) / WEIGHTS).unlink()
    os.mkfifo(made(1) / WEIGHTS)
    with pytest.raises(MixfuseError, match="is no regular file"):
        AdapterCopies(tmp_path / "copies").keep(made(1), files)


async def test_a_swap_of_a_role_that_is_not_loaded_needs_no_place_of_the_others(made):
    engine = FakeEngine()
    swapper = await three(engine, made)
    async with swapper.table.lease("b"), swapper.table.lease("c"):
        await swapper.swap("a", made(7, "a"))
        await swapper.close()
        assert present(engine) == {"b", "c"}, "they are in use; the new one waits on the disk for its first request"
    assert await leased(swapper, "a") == f"a@{revision(made(7, 'a'))}"


async def test_requests_swaps_and_evictions_at_once_all_end(made, stores):
    engine, chance = FakeEngine(), random.Random(0)
    step = engine._step

    async def slowly(what: str, name: str) -> None:
        await asyncio.sleep(chance.random() / 500)
        await step(what, name)

    engine._step = slowly
    swapper = table(engine, *"abcd", max_loaded=2, store=stores())
    await RecordFollower(swapper).start({role: made(number, role) for number, role in enumerate("abcd")})
    await swapper.table.pin("d", True)

    async def ask() -> None:
        for _ in range(30):
            async with swapper.table.lease(chance.choice("abcd")) as held:
                for _ in range(2):
                    assert held.model in engine.loaded
                    await asyncio.sleep(chance.random() / 500)

    async def swap(role: str, first: int) -> None:
        for number in range(4):
            await swapper.swap(role, made(first + number % 2, role))

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(ask())
        group.create_task(swap("a", 10))
        group.create_task(swap("d", 20))
    await swapper.close()
    assert len(engine.loaded) == 2
    assert swapper.table.serving()["d"].model in engine.loaded


# --- what outlives the process --------------------------------------------------------------------------------------


async def test_the_base_is_called_what_the_engine_calls_it_once_it_is_reached(made):
    engine = FakeEngine()
    swapper = table(engine)
    engine.base_model_name = "mixtral"
    await RecordFollower(swapper).start({"domain": None})
    assert await leased(swapper) == await leased(swapper, "base") == "mixtral"


async def test_a_restart_comes_back_to_the_same_revisions(made, stores):
    swapper = table(FakeEngine(), "domain", "judge", store=stores())
    assert await RecordFollower(swapper).start({"domain": made(1), "judge": None}) == {
        "domain": "config",
        "judge": "config",
    }
    await swapper.swap("domain", made(2))
    again = table(FakeEngine(), "domain", "judge", "new", store=stores())
    taken = await RecordFollower(again).start({"domain": made(1), "judge": made(3, "judge"), "new": None})
    assert taken == {"domain": "role table", "judge": "role table", "new": "config"}
    assert again.table.serving()["domain"].revision == revision(made(2))
    assert again.table.serving()["judge"].revision is None
    anew = table(FakeEngine(), "domain", store=stores())
    assert await RecordFollower(anew).start({"domain": made(1)}, from_config=True) == {"domain": "config"}
    await RecordFollower(again).follow()
    assert again.table.serving()["domain"].revision == revision(made(1))


@pytest.mark.parametrize("how", ["gone", "changed", "another"])
async def test_an_adapter_that_is_not_what_it_was_ends_the_start_with_the_way_out(made, stores, tmp_path, how: str):
    swapper = table(FakeEngine(), store=stores())
    await RecordFollower(swapper).start({"domain": made(1)})
    await swapper.swap("domain", made(2))
    directory = made(2)
    first = revision(made(1))
    if how == "gone":
        directory.rename(tmp_path / "elsewhere")
    elif how == "changed":
        (directory / CONFIG).write_text("{}")
    else:
        made(9, at=directory)
    with pytest.raises(MixfuseError, match=r"mixfuse roles rollback domain --db .*sqlite3\).*roles_from=config"):
        await RecordFollower(table(FakeEngine(), store=stores())).start({"domain": None})
    with opened(tmp_path / "traces.sqlite3") as database:
        assert roll_back(database, "domain", "by hand").revision == first
    again = table(FakeEngine(), store=stores())
    await RecordFollower(again).start({"domain": None})
    assert again.table.serving()["domain"].revision == first


async def test_rollbacks_walk_back_and_a_swap_after_one_is_undone_to_where_it_led(made, stores):
    engine = FakeEngine()
    swapper = table(engine, store=stores())
    await RecordFollower(swapper).start({"domain": None})
    for number in (1, 2, 3):
        await swapper.swap("domain", made(number))
    went = [(await swapper.rollback("domain")).new for _ in range(2)]
    assert went == [revision(made(2)), revision(made(1))]
    await swapper.swap("domain", made(4))
    assert (await swapper.rollback("domain")).new == revision(made(1))
    assert (await swapper.rollback("domain")).new is None
    assert engine.loaded == set()
    with pytest.raises(MixfuseError, match="nothing served 'domain' before"):
        await swapper.rollback("domain")
    events = await stores().history("domain")
    assert [event.why for event in reversed(events)] == [
        *("config", "swap", "swap", "swap", "rollback", "rollback", "swap", "rollback", "rollback")
    ]
    assert [event.version for event in reversed(events)] == list(range(1, 10))


async def test_a_rollback_to_an_adapter_that_is_gone_leaves_the_present_one(made, stores, tmp_path):
    swapper = table(FakeEngine(), store=stores())
    await RecordFollower(swapper).start({"domain": made(1)})
    await swapper.swap("domain", made(2))
    gone = revision(made(1))
    made(1).rename(tmp_path / "elsewhere")
    with pytest.raises(MixfuseError, match="no such adapter directory"):
        await swapper.rollback("domain")
    assert swapper.table.serving()["domain"].revision == revision(made(2))
    newest, *_ = await stores().history("domain")
    assert (newest.why, newest.outcome, newest.new) == ("rollback", "refused", gone)
    assert "no such adapter directory" in newest.error


async def test_of_two_gateways_that_swap_at_once_one_gets_a_conflict_and_follows(made, stores):
    engines = FakeEngine(), FakeEngine()
    one, two = (table(engine, store=stores(name)) for engine, name in zip(engines, ("one", "two"), strict=True))
    await RecordFollower(one).start({"domain": made(1)})
    await RecordFollower(two).start({"domain": made(1)})
    staged = await one.stage("domain", made(2)), await two.stage("domain", made(3))
    await one.commit("domain", staged[0])
    with pytest.raises(MixfuseError, match=f"one swapped it to {revision(made(2))}") as caught:
        await two.commit("domain", staged[1])
    assert caught.value.kind == "conflict"
    assert engines[1].loaded == {f"domain@{revision(made(1))}"}
    await RecordFollower(two).follow()
    assert two.table.serving()["domain"].revision == revision(made(2))
    await two.close()
    assert engines[1].loaded == {f"domain@{revision(made(2))}"}
    assert [event.gateway for event in await stores().history("domain")] == ["one", "one"]
    await two.swap("domain", made(3))  # nobody is in the way now
    await RecordFollower(one).follow()
    assert one.table.serving()["domain"].revision == revision(made(3))


async def test_a_gateway_that_cannot_follow_serves_on_and_says_so(made, stores):
    engines = FakeEngine(), FakeEngine()
    one, two = (table(engine, store=stores(name)) for engine, name in zip(engines, ("one", "two"), strict=True))
    await RecordFollower(one).start({"domain": made(1)})
    await RecordFollower(two).start({"domain": made(1)})
    await one.swap("domain", made(2))
    engines[1].fail["load"] = MixfuseError("no room", kind="adapter")
    follower = RecordFollower(two)
    await follower.follow()
    await follower.follow()
    assert await leased(two) == f"domain@{revision(made(1))}"
    assert "one swapped to" in two.table.state("domain").problem
    assert engines[1].calls.count(f"load domain@{revision(made(2))}") == 1, "it is not tried at every look"
    await two.rollback("domain")  # to what it serves anyway: only the record changes
    assert two.table.state("domain").problem is None
    await RecordFollower(one).follow()
    assert one.table.serving()["domain"].revision == revision(made(1))


async def test_a_failed_revision_is_tried_again_after_a_minute_and_a_newer_one_at_once(made, stores):
    engines = FakeEngine(), FakeEngine()
    one, two = (table(engine, store=stores(name)) for engine, name in zip(engines, ("one", "two"), strict=True))
    now = 1000.0
    follower = RecordFollower(two, clock=lambda: now)
    await RecordFollower(one).start({"domain": made(1)})
    await follower.start({"domain": made(1)})

    def loads(number: int) -> int:
        return engines[1].calls.count(f"load domain@{revision(made(number))}")

    await one.swap("domain", made(2))
    engines[1].fail["load"] = MixfuseError("no room", kind="adapter")
    for now, tries in ((1000.0, 1), (1059.0, 1), (1061.0, 2), (1100.0, 2), (1122.0, 3)):
        await follower.follow()
        assert loads(2) == tries, now
    await one.swap("domain", made(3))
    await follower.follow()
    assert loads(3) == 1
    engines[1].fail.clear()
    now = 1200.0
    await follower.follow()
    assert two.table.serving()["domain"].revision == revision(made(3))
    assert two.table.state("domain").problem is None


async def test_a_role_that_is_being_swapped_here_does_not_hold_up_the_others(made, stores):
    engines = FakeEngine(), FakeEngine()
    one, two = (
        table(engine, "a", "b", store=stores(name)) for engine, name in zip(engines, ("one", "two"), strict=True)
    )
    for swapper in (one, two):
        await RecordFollower(swapper).start({"a": made(1, "a"), "b": made(2, "b")})
    gate = engines[1].gates["load"] = asyncio.Event()
    swapping = asyncio.create_task(two.swap("a", made(3, "a")))
    await engines[1].begun.wait()
    await one.swap("a", made(4, "a"))
    await one.table.pin("b", True)
    async with asyncio.timeout(60):
        await RecordFollower(two).follow()
    assert two.table.state("b").pinned, "a pin at another gateway is followed"
    gate.set()
    with pytest.raises(MixfuseError, match="changed by another gateway"):
        await swapping


async def test_a_commit_that_cannot_be_recorded_changes_nothing(made, stores, tmp_path):
    engine = FakeEngine()
    with opened(tmp_path / "other.sqlite3") as database:
        swapper = table(engine, store=StoredRoles(database, "one"))
        await RecordFollower(swapper).start({"domain": made(1)})
        staged = await swapper.stage("domain", made(2))
        database.run_now(lambda connection: connection.exec_driver_sql("DROP TABLE role_history"))
        with pytest.raises(MixfuseError, match="cannot be reached") as caught:
            await swapper.commit("domain", staged)
    assert caught.value.kind == "trace_db"
    assert await leased(swapper) == f"domain@{revision(made(1))}"
    assert engine.loaded == {f"domain@{revision(made(1))}"}


async def test_a_commit_whose_caller_is_cancelled_completes(made, stores):
    engine = FakeEngine()
    swapper = table(engine, store=stores())
    await RecordFollower(swapper).start({"domain": made(1)})
    async with swapper.table.lease("domain"):
        swapping = asyncio.create_task(swapper.swap("domain", made(2)))
        while swapper.table.serving()["domain"].revision != revision(made(2)):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        swapping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await swapping
    await come_true(lambda: engine.loaded == {f"domain@{revision(made(2))}"})  # the old one drains and is unloaded


async def test_refusals_and_pins_are_in_the_history_and_pins_last(made, stores):
    swapper = table(FakeEngine(), store=stores())
    await RecordFollower(swapper).start({"domain": made(1)})
    with pytest.raises(MixfuseError, match="rank"):
        await swapper.swap("domain", made(2, rank=9))
    canary = await swapper.stage("domain", made(3))
    await swapper.discard(canary, reason="agreement 0.3 is below 0.5")
    await swapper.table.pin("domain", True)
    told = [(event.why, event.outcome, event.new) for event in await stores().history("domain")]
    assert told == [
        ("pin", "ok", revision(made(1))),
        ("canary-rollback", "refused", revision(made(3))),
        ("swap", "refused", None),
        ("config", "ok", revision(made(1))),
    ]
    again = table(FakeEngine(), store=stores())
    await RecordFollower(again).start({"domain": None})
    assert again.table.state("domain").pinned


async def test_the_history_is_ordered_by_version_whatever_the_clocks_say(made, stores, monkeypatch):
    swapper = table(FakeEngine(), store=stores())
    await RecordFollower(swapper).start({"domain": None})
    for number, hour in ((1, 5), (2, 3), (3, 4)):  # as by gateways whose clocks differ
        monkeypatch.setattr(time, "time", lambda hour=hour: 3600.0 * hour)
        await swapper.swap("domain", made(number))
    monkeypatch.setattr(time, "time", lambda: 3600.0 * 6)
    with pytest.raises(MixfuseError):
        await swapper.swap("domain", made(4, rank=64))
    events = await stores().history("domain")
    assert [event.version for event in events] == [None, 4, 3, 2, 1]
    assert [event.version for event in await stores().history("domain", 2)] == [None, 4]
    assert await stores().served("domain", 2) == [made(3), made(2)]


@pytest.mark.parametrize(
    "name", ["", "a/b", "..", ".", "a b", "x?", "a#b", "%41", "role\n", "-x", "a@b", "x" * 65, "\U0001d400" * 64]
)
def test_a_role_name_that_cannot_be_swapped_is_refused_at_the_start(name: str):
    config = {"engine": {"base": "base"}, "fusion": {"members": [{"name": "x", "role": "base"}]}, "roles": {name: None}}
    with pytest.raises(MixfuseError, match="cannot be a role's name"):
        validate(config, ServeConfig, source="serve.yaml")
    validate(config | {"roles": {"domain-2.b_ü": None}}, ServeConfig, source="serve.yaml")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"watch_gate": {"shadow": 5}}, "goes with `watch`"),
        ({"watch": "w", "watch_gate": {"timeout_s": 5}}, "needs `shadow` or `canary`"),
        ({"watch": "w", "watch_gate": {"canary": 0.1}}, "how long the canary lasts"),
        ({"watch": "w", "watch_gate": {"shadow": 5, "directory": "x"}}, "directory"),
    ],
)
def test_a_gate_of_watched_adapters_that_makes_no_sense_is_refused(changes, words: str):
    config = {"engine": {"base": "base"}, "fusion": {"members": [{"name": "x", "role": "base"}]}}
    with pytest.raises(MixfuseError, match=words):
        validate(config | changes, ServeConfig, source="serve.yaml")


# --- a folder that is watched ---------------------------------------------------------------------------------------


async def test_the_newest_adapter_of_a_folder_is_swapped_in_once_it_is_whole(made, stores, tmp_path, caplog):
    swapper = table(FakeEngine(), store=stores())
    await RecordFollower(swapper).start({"domain": None})
    watcher = Watcher(swapper, Folder(tmp_path / "watched"), "domain")
    place = tmp_path / "watched" / "domain"
    await watcher.poll()

    made(1, at=place / "first")
    await watcher.poll()
    assert swapper.table.serving()["domain"].revision is None, "it may still be written"
    await watcher.poll()
    assert swapper.table.serving()["domain"].revision == revision(place / "first")

    made(2, at=place / ".half")
    made(3, at=place / "second")
    whole = (place / "second" / WEIGHTS).read_bytes()
    (place / "second" / WEIGHTS).write_bytes(whole[:-4])
    for _ in range(4):
        await watcher.poll()
    assert swapper.table.serving()["domain"].revision == revision(place / "first")
    assert len([record for record in caplog.records if "was changed after export" in record.message]) == 1
    (place / "second" / WEIGHTS).write_bytes(whole)
    for _ in range(2):
        await watcher.poll()
    assert swapper.table.serving()["domain"].revision == revision(place / "second")

    await swapper.rollback("domain")
    for _ in range(2):
        await Watcher(swapper, Folder(tmp_path / "watched"), "domain").poll()
        await watcher.poll()
    assert swapper.table.serving()["domain"].revision == revision(place / "first"), "a rollback lasts"
    assert [event.why for event in await stores().history("domain") if event.outcome == "ok"] == [
        *("rollback", "watch", "watch", "config")
    ]


async def test_the_watcher_retries_an_engine_that_is_away_three_times(made, stores, tmp_path):
    engine = FakeEngine()
    swapper = table(engine, store=stores())
    await RecordFollower(swapper).start({"domain": None})
    watcher = Watcher(swapper, Folder(tmp_path / "watched"), "domain")
    made(1, at=tmp_path / "watched" / "domain" / "first")
    engine.fail["load"] = MixfuseError("no answer", kind="engine")
    for _ in range(6):
        await watcher.poll()
    assert len([call for call in engine.calls if call.startswith("load")]) == 3
    engine.fail.clear()
    await watcher.poll()
    assert swapper.table.serving()["domain"].revision is None
    made(2, at=tmp_path / "watched" / "domain" / "second")
    for _ in range(2):
        await watcher.poll()
    assert swapper.table.serving()["domain"].revision == revision(tmp_path / "watched" / "domain" / "second")


# --- over HTTP ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def admin(made, stores):
    """A role table behind its routes, and the client that asks them."""
    swapper = table(FakeEngine(), store=stores())
    await RecordFollower(swapper).start({"domain": made(1)})
    app = Starlette(routes=routes(swapper, stores(), Gates(swapper, None, None, GateConfig())))  # none is begun
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://admin/admin/roles") as client:
        yield swapper, client


async def test_every_action_works_over_http(admin, made):
    _, client = admin
    other = str(made(2))
    done = await client.put("/domain", json={"directory": other})
    assert done.json() == {"role": "domain", "old": revision(made(1)), "new": revision(made(2)), "drained": 0}
    assert (await client.put("/domain/pin")).json()["pinned"]
    assert not (await client.delete("/domain/pin")).json()["pinned"]
    assert (await client.post("/domain/rollback")).json()["new"] == revision(made(1))
    events = (await client.get("/domain/history", params={"limit": 2})).json()["history"]
    assert [(event["why"], event["new"]) for event in events] == [
        ("rollback", revision(made(1))),
        ("unpin", revision(made(2))),
    ]
    base, domain = (await client.get("http://admin/admin/roles")).json()["roles"]
    assert (base["role"], base["revision"], domain["revision"]) == ("base", None, revision(made(1)))
    assert domain["loaded"]


async def test_refusals_have_their_status(admin, made):
    swapper, client = admin
    staged = await swapper.stage("domain", made(3))
    statuses = {
        ("PUT", "/domain", '{"directory": "nowhere"}'): (409, "conflict"),
        ("PUT", "/nobody", '{"directory": "nowhere"}'): (404, "role"),
        ("PUT", "/domain", "{}"): (400, "invalid_request"),
        ("POST", "/nobody/rollback", ""): (404, "role"),
        ("GET", "/nobody/history", ""): (404, "role"),
        ("GET", "/domain/history?limit=x", ""): (400, "invalid_request"),
        ("PUT", "/base/pin", ""): (400, "invalid_request"),
    }
    for (method, path, body), (status, kind) in statuses.items():
        answer = await client.request(method, path, content=body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind), (method, path)
    await swapper.discard(staged)
    assert (await client.put("/domain", json={"directory": "nowhere"})).status_code == 400
    swapper.table.engine.fail["load"] = MixfuseError("no answer", kind="engine")
    assert (await client.put("/domain", json={"directory": str(made(4))})).status_code == 503
    assert (await client.post("/domain/rollback")).status_code == 409  # nothing served it before


@pytest.mark.parametrize(
    ("version", "since"), [("'x'", "0.0"), ("9223372036854775807", "0.0"), ("-1", "0.0"), ("1", "'x'"), ("1", "x'ff'")]
)
async def test_a_damaged_row_of_the_role_table_is_named(version: str, since: str, stores, tmp_path: Path):
    with sqlite3.connect(tmp_path / "traces.sqlite3") as connection:
        columns = "role, version, revision, directory, pinned, since, gateway"
        connection.execute(f"INSERT INTO roles ({columns}) VALUES ('domain', {version}, 'a', '/b', 0, {since}, 'g')")
    for work in (stores().read(), stores().rollback_target("domain")):
        with pytest.raises(MixfuseError, match="row of 'domain' is damaged") as caught:
            await work
        assert caught.value.kind == "trace_db"


NEVER_WORKS: dict[str, tuple[dict[str, object], str]] = {
    "a name that the Hub cannot have": ({"watch": {"domain": "no name"}}, "'no name' is no adapter on the Hub"),
    "no branch": ({"watch": {"domain": "org/name@"}}, "'org/name@' is no adapter on the Hub"),
    "an unknown limit": ({"watch": "w", "watch_gate": {"shadow": 1, "limits": {"nope": 1}}}, "unknown key 'nope'"),
    "a limit of 7": ({"watch": "w", "watch_gate": {"shadow": 1, "limits": {"min_agreement": 7}}}, "less than or equal"),
    "a day that is a number": ({"trusted_keys": [{"key": "k", "until": 86400}]}, "write a day as 2027-12-31"),
    "no pause": ({"roles_poll_s": 1e-300}, "greater than or equal to 0.01"),
    "a port beyond all": ({"engine": {"base": "b", "url": "http://a:99999"}}, "is not a URL"),
    "a port of letters": ({"engine": {"base": "b", "urls": ["http://a:b"]}}, "is not a URL"),
    "half a bracket": ({"engine": {"base": "b", "url": "http://[::1"}}, "is not a URL"),
    "a space": ({"engine": {"base": "b", "url": "http://a b"}}, "is not a URL"),
    "a query": ({"engine": {"base": "b", "url": "http://a/v1?x"}}, "is not a URL"),
    "a NUL in an argument": ({"engine": {"base": "b", "extra_args": ["--seed=\0"]}}, "holds no NUL"),
    "a NUL in a variable": ({"engine": {"base": "b", "env": {"A": "\0"}}}, "cannot be an environment variable"),
    "a variable with a sign": ({"engine": {"base": "b", "env": {"A=B": "x"}}}, "cannot be an environment variable"),
    "a billion engines": ({"engine": {"base": "b", "replicas": 10**9}}, "less than or equal to 1024"),
}


@pytest.mark.parametrize("case", NEVER_WORKS)
def test_a_config_that_cannot_work_is_refused_when_it_is_read(case: str):
    changes, message = NEVER_WORKS[case]
    plain = {
        "engine": {"base": "base", "url": "http://127.0.0.1:8000/v1"},
        "fusion": {"members": [{"name": "x", "role": "base"}]},
        "roles": {"domain": None},
        "watch": {"domain": "org/name@main"},
    }
    validate(plain, ServeConfig, source="serve.yaml")
    with pytest.raises(MixfuseError, match=message):
        validate({**plain, **changes}, ServeConfig, source="serve.yaml")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("trusted_keys: [none.pub]", "the key cannot be read: no such file"),
        ("revoked_keys: [serve.yaml]", "is no Ed25519 public key"),
        ("watch: serve.yaml", "is no folder"),
    ],
)
def test_a_server_with_keys_that_refuse_every_adapter_does_not_start(
    key: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    text = "engine: {base: base}\nfusion: {members: [{name: x, role: base}]}\nroles: {domain: null}\n"
    (tmp_path / "serve.yaml").write_text(text + key)
    assert main(["serve", "serve.yaml"]) == 2
    assert message in capsys.readouterr().err


async def test_a_watched_folder_that_cannot_be_read_says_so(made, tmp_path: Path):
    (tmp_path / "domain").symlink_to("domain")
    with pytest.raises(MixfuseError, match="Too many levels of symbolic links"):
        await Folder(tmp_path).newest("domain")
    (tmp_path / "domain").unlink()
    assert await Folder(tmp_path).newest("domain") is None
    made(1, at=tmp_path / "domain" / "good")
    for name in ("circle", "empty"):
        (tmp_path / "domain" / name).mkdir()
    (tmp_path / "domain" / "circle" / "manifest.json").symlink_to("manifest.json")
    (tmp_path / "domain" / "a file").touch()
    newest = await Folder(tmp_path).newest("domain")
    assert newest is not None
    assert newest.directory == tmp_path / "domain" / "good"
    shutil.rmtree(newest.directory)
    with pytest.raises(MixfuseError, match="Too many levels of symbolic links"):
        await Folder(tmp_path).newest("domain")


@pytest.mark.parametrize("kind", ["a NUL", "a long name", "a circle of links", "a name that is no UTF-8", "a sequence"])
async def test_a_directory_that_cannot_be_read_is_refused_by_name(kind: str, admin, made, tmp_path: Path):
    swapper, client = admin
    (tmp_path / "circle").symlink_to("circle")
    odd = {b"\xff.json": made(8), b"\x1b[2J.json": made(9)}
    for name, directory in odd.items():
        Path(os.fsdecode(os.fsencode(directory) + b"/" + name)).touch()
    path = {
        "a NUL": "/tmp/a\0b",
        "a long name": "/" + "x" * 5000,
        "a circle of links": str(tmp_path / "circle"),
        "a name that is no UTF-8": str(made(8)),
        "a sequence": str(made(9)),
    }[kind]
    answer = await client.put("/domain", json={"directory": path})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "adapter")
    message = answer.json()["error"]["message"]
    assert message.isprintable()
    assert len(message) < 500
    events = (await client.get("/domain/history")).json()["history"]
    assert events[0]["error"] == message
    assert swapper.table.serving()["domain"].revision == revision(made(1))


async def test_a_role_of_a_long_name_and_many_limits_are_short_refusals(admin, made):
    _, client = admin
    unknown = await client.put("/" + "x" * 20_000, json={"directory": str(made(2))})
    limits = await client.put(
        "/domain", json={"directory": str(made(2)), "shadow": 1, "limits": {"y" * 5000: 1} | dict.fromkeys("abc", 1)}
    )
    many = await client.put(
        "/domain", json={"directory": str(made(2)), "shadow": 1, "limits": {str(key): key for key in range(65)}}
    )
    assert (unknown.status_code, limits.status_code, many.status_code) == (404, 400, 400)
    assert "at most 64 items" in many.json()["error"]["message"]
    assert all(len(answer.text) < 800 for answer in (unknown, limits, many))


async def test_changes_want_the_admin_key(admin, monkeypatch: pytest.MonkeyPatch):
    _, client = admin
    monkeypatch.setenv("MIXFUSE_ADMIN_KEY", "secret")
    assert (await client.get("http://admin/admin/roles")).status_code == 200
    ways = (("PUT", "/domain"), ("POST", "/domain/rollback"), ("GET", "/domain/history"), ("PUT", "/domain/pin"))
    for method, path in (*ways, ("DELETE", "/domain/pin")):
        assert (await client.request(method, path)).status_code == 401, path
    allowed = await client.put("/domain/pin", headers={"authorization": "Bearer secret"})
    assert allowed.status_code == 200


async def test_the_metrics_show_what_serves_and_which_role_is_behind(admin, made):
    swapper, _ = admin
    registry = CollectorRegistry()
    registry.register(RoleMetrics(swapper.table))
    swapper.table.state("domain").problem = "it is not here"
    text = generate_latest(registry).decode()
    assert f'mixfuse_role_revision{{revision="{revision(made(1))}",role="domain"}} 1.0' in text
    assert 'mixfuse_role_behind{role="domain"} 1.0' in text
    assert "mixfuse_adapter_loads_total 1.0" in text


def test_the_documented_config_is_one():
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```text\n(engine:.*?)^```$", page, re.MULTILINE | re.DOTALL)
    config = validate(yaml.safe_load(text), ServeConfig, source="docs/operations.md")
    assert config.engine.max_loaded == 6
    documented = set(re.findall(r"`(?:GET|PUT|POST|DELETE) (/admin/[\w/]+)", page))
    assert documented <= {path.path.replace("{role}", "ROLE") for path in routes(table(FakeEngine()), None, None)}
