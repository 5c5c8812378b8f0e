"""Gates before a swap: a staged revision beside the serving one, through the real gateway and role table.

The engine is made up: it knows which adapters are loaded, and the fake upstream answers under their names.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml
from fake_upstream import FakeUpstream, Script, serving
from fusion_harness import Gateway, prefers
from safetensors.numpy import save_file

from mixfuse.app.gates import Gate, GateConfig, Gates, SwapRequest, broken
from mixfuse.app.roles_commands import seconds
from mixfuse.app.roles_commands import share as share_of
from mixfuse.app.roles_routes import routes
from mixfuse.app.roles_store import StoredRoles
from mixfuse.app.server import LeasedRoles
from mixfuse.contracts import adapter, judge_protocol
from mixfuse.contracts.adapter import CONFIG, MANIFEST, WEIGHTS, Fingerprint, Manifest
from mixfuse.contracts.database import Database, opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.trace import Call, Trace, Usage, Verdict
from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.http.gateway import create_app
from mixfuse.fusion.measure.shadow import Comparison, Part, Side, watch
from mixfuse.serve.admission import Admission
from mixfuse.serve.copies import copy_name
from mixfuse.serve.engine_group import Address
from mixfuse.serve.roles import RoleTable
from mixfuse.serve.swap import Swapper
from mixfuse.serve.watch import Folder, Watcher

BASE = Fingerprint(**dict.fromkeys(("config", "tokenizer", "chat_template", "weights"), "0" * 64))


class ScriptedEngine:
    """An engine whose adapters answer by the script of the copy they were loaded from, by its name."""

    base_model_name = "base"
    started = None

    def __init__(self, upstream: FakeUpstream, scripts: dict[str, Script]) -> None:
        self._upstream, self._scripts = upstream, scripts
        upstream.models["base"] = Script("the base's answer")
        self.loaded: set[str] = set()

    @asynccontextmanager
    async def at(self, model: str) -> AsyncIterator[Address]:
        yield Address(self._upstream.base_url, None)

    async def ready(self) -> None:
        pass

    async def load_adapter(self, name: str, path: Path) -> None:
        self.loaded.add(name)
        self._upstream.models[name] = self._scripts[path.name]

    async def unload_adapter(self, name: str) -> None:
        self.loaded.remove(name)
        del self._upstream.models[name]  # a request that still went there would break the server

    def trouble(self, name: str) -> None:
        return None

    async def repair(self, name: str) -> None:
        assert name in self.loaded

    async def probe(self, name: str) -> None:
        assert name in self.loaded

    async def prompt_logprobs(self, name: str, prompt: list[int]) -> list[float]:
        return [-2.0 if name in self.loaded else -1.0] * (len(prompt) - 1)

    async def busy(self) -> bool:
        return False

    def each(self) -> "list[ScriptedEngine]":
        return [self]

    async def ranks(self) -> "list[ScriptedEngine]":
        return [self]

    async def max_model_len(self) -> None:
        return None

    async def decode(self, name: str, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
        return [7] * tokens, (await self.prompt_logprobs(name, [*prompt, *[7] * tokens]))[-tokens:]

    async def first_token_logprobs(self, name: str, messages: list[dict[str, str]]) -> dict[str, float]:
        raise AssertionError("these adapters have no stored verdicts")


class House:
    """A gateway with a judge and a domain role, and the gates before them."""

    def __init__(
        self, gateway: Gateway, gates: Gates, swapper: Swapper, engine: ScriptedEngine, make: Callable[..., Path]
    ) -> None:
        self.gateway, self.gates, self.engine, self.make = gateway, gates, engine, make
        self.swapper, self.table = swapper, swapper.table

    async def ask(self, model: str = "fusion/best-of", **keys: Any) -> dict[str, Any]:
        response = await self.gateway.post(model=model, messages=[{"role": "user", "content": "why?"}], **keys)
        assert response.status_code == 200, response.text
        return response.json()

    async def through(self, role: str, request: SwapRequest, model: str = "fusion/best-of") -> Gate:
        """Begins a gate and asks until it has ended."""
        gate = await self.gates.begin(role, request)
        async with asyncio.timeout(60):
            while gate.under_way:
                await self.ask(model)
        return gate

    def serving(self, role: str) -> str | None:
        return self.table.serving()[role].revision


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with opened(tmp_path / "traces.sqlite3") as database:
        yield database


def house_config() -> dict[str, Any]:
    """The keys of the house's config."""
    return {
        "members": ["alpha", "beta", {"name": "expert", "role": "domain"}],
        "judge": {"role": "judge", "breaker": None},
        "synthesizer": {"role": "domain"},
    }


@pytest.fixture
async def house(
    upstream: FakeUpstream, config: Callable[..., FusionConfig], database: Database, tmp_path: Path
) -> AsyncIterator[House]:
    async with a_house(upstream, config(**house_config()), database, tmp_path) as built:
        yield built


@asynccontextmanager
async def a_house(
    upstream: FakeUpstream, fusion: FusionConfig, database: Database, tmp_path: Path, **more: Any
) -> AsyncIterator[House]:
    """Builds the house; keywords are more arguments of the gateway."""
    scripts: dict[str, Script] = {}
    numbers: Iterator[int] = iter(range(1, 100))

    def make(role: str, script: Script) -> Path:
        """An adapter directory, whose adapter will behave so."""
        number = next(numbers)
        folder = tmp_path / f"{role}-{number}"
        folder.mkdir()
        stem = "base_model.model.model.layers.0.self_attn.q_proj"
        weights = {f"{stem}.lora_{side}.weight": numpy.full(shape, number, numpy.float32) for side, shape in
                   (("A", (2, 8)), ("B", (8, 2)))}  # fmt: skip
        save_file(weights, folder / WEIGHTS)
        (folder / CONFIG).write_text(
            json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]})
        )
        files = adapter.file_hashes(folder)
        manifest = Manifest(
            role=role, revision=adapter.revision_of(files), base=BASE, base_path="base", rank=2,
            experts_trained=False, files=files, judge_protocol=judge_protocol.describe(),
        )  # fmt: skip
        (folder / MANIFEST).write_text(manifest.model_dump_json())
        scripts[copy_name(files)] = script
        return folder

    engine = ScriptedEngine(upstream, scripts)
    halves = cycle([0.1, 0.9])  # of a canary's share of a half: every other lease
    store = StoredRoles(database, "here")
    admission = Admission(BASE, max_rank=8)
    table = RoleTable(engine, ["domain", "judge"], admission, record=store, draw=lambda: next(halves))
    swapper = Swapper(table)
    await swapper.swap("judge", make("judge", Script(verdict=prefers("beta"))))
    await swapper.swap("domain", make("domain", Script("the expert's answer")))
    roles = LeasedRoles(table, engine)
    async with AsyncExitStack() as stack:
        gates = Gates(swapper, roles, fusion, GateConfig(max_latency_ratio=None))
        app = create_app(fusion, roles, observers=[gates.observe], extra_routes=routes(swapper, store, gates), **more)
        gateway = Gateway(await stack.enter_async_context(serving(app)))
        stack.push_async_callback(gateway.close)
        stack.push_async_callback(gates.close)
        yield House(gateway, gates, swapper, engine, make)


async def test_a_watched_adapter_passes_the_gate_that_is_asked_for(house: House, tmp_path: Path, caplog) -> None:
    watched = tmp_path / "watched" / "judge"
    watched.mkdir(parents=True)
    asked: dict[str, Any] = {"shadow": 2, "timeout_s": 30}

    async def through(role: str, directory: Path) -> None:
        await house.gates.through(role, SwapRequest(directory=directory, **asked))

    watcher = Watcher(house.swapper, Folder(tmp_path / "watched"), "judge", through)
    before = house.serving("judge")
    for name, script, promoted in (
        ("bad", Script(verdict=prefers("alpha")), False),
        ("good", Script(verdict=prefers("beta")), True),
    ):
        house.make("judge", script).rename(watched / name)
        await watcher.poll()
        polling = asyncio.create_task(watcher.poll())
        async with asyncio.timeout(60):
            while not polling.done():
                await house.ask()
        await polling
        assert (house.serving("judge") != before) == promoted, name
    assert "watch: role judge:" in caplog.text
    assert "min_agreement" in caplog.text


# Observers


async def test_an_observer_is_told_of_each_trace_with_texts_and_cannot_break_a_request(
    config: Callable[..., FusionConfig], caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Trace] = []

    def broken_one(_trace: Trace) -> None:
        raise RuntimeError("not today")

    app = create_app(config(traces={"store_text": False}), None, observers=[broken_one, told.append])
    async with serving(app) as url:
        gateway = Gateway(url)
        response = await gateway.post(model="fusion/best-of", messages=[{"role": "user", "content": "why?"}])
        assert response.status_code == 200
        failed = await gateway.post(model="nobody", messages=[{"role": "user", "content": "why?"}])
        assert failed.status_code == 404
        (stored,) = await gateway.first_traces()
        await gateway.http.post(f"/v1/traces/{stored['id']}/feedback", json={"score": 1})
        await gateway.close()
    assert not stored["messages"]
    first, again = told
    assert first.id == again.id == stored["id"]
    assert first.messages[0]["content"] == "why?"
    assert first.answer == "the answer of beta"
    assert {call.text for call in first.calls if call.stage == "answer"} >= {"the answer of alpha", first.answer}
    assert not first.feedback
    assert again.feedback == [{"score": 1}]
    assert sum("an observer failed" in record.message for record in caplog.records) == 2


# Shadow


async def test_a_judge_that_agrees_in_the_shadow_is_swapped_in(house: House, upstream: FakeUpstream) -> None:
    old = house.serving("judge")
    new = house.make("judge", Script(verdict=prefers("beta")))
    gate = await house.through("judge", SwapRequest(directory=new, shadow=3))
    assert (gate.state, house.serving("judge")) == ("promoted", gate.new)
    report = gate.report().shadow
    # beta against both others is decided; alpha against the expert is a tie
    assert (report["agreement"], report["decided"]) == (1.0, 6)
    assert report["old"]["pairs"] == report["new"]["pairs"] == 9
    assert report["new"]["consistency"] == pytest.approx(2 / 3)
    assert report["new"]["calls"] == 18
    assert report["new"]["tokens"] == report["spent_tokens"] == 18 * 15
    # Before the flip no client met it: what it was asked beyond the shadow, it was asked by those that came later.
    traces = (await house.gateway.http.get("/v1/traces")).json()["data"]
    judged = [call["revision"] for trace in traces for call in trace["calls"] if call["stage"] == "verdict"]
    assert judged.count(gate.new) == len(upstream.asked(f"judge@{gate.new}")) - 18
    assert old in judged
    assert house.engine.loaded == {f"judge@{gate.new}", f"domain@{house.serving('domain')}"}


@pytest.mark.parametrize(
    ("script", "limit"),
    [
        (Script(verdict=prefers("alpha")), "min_agreement"),
        (Script(verdict=lambda _first, _second: 0.9), "min_consistency"),
        (Script(logprobs={"C": -0.1}), "max_parse_failures"),
        (Script(status=500), "max_failures"),
    ],
)
async def test_a_judge_that_breaks_a_limit_in_the_shadow_is_given_up(house: House, script: Script, limit: str) -> None:
    old = house.serving("judge")
    gate = await house.through("judge", SwapRequest(directory=house.make("judge", script), shadow=4))
    assert gate.state == "refused"
    assert gate.reason.startswith("no swap: in the shadow of 4 requests, ")
    assert f"({limit})" in gate.reason
    assert house.serving("judge") == old
    assert house.engine.loaded == {f"judge@{old}", f"domain@{house.serving('domain')}"}


async def test_a_limit_of_the_swap_takes_the_place_of_the_configs(house: House) -> None:
    new = house.make("judge", Script(verdict=prefers("alpha")))
    request = SwapRequest(directory=new, shadow=2, limits={"min_agreement": 0.0})
    assert (await house.through("judge", request)).state == "promoted"
    with pytest.raises(MixfuseError, match="did you mean 'min_agreement'"):
        await house.gates.begin("judge", SwapRequest(directory=new, shadow=2, limits={"min_agrement": 0.0}))


async def test_both_revisions_of_a_member_and_synthesizer_are_asked_alike(house: House, upstream: FakeUpstream) -> None:
    old = house.serving("domain")
    new = house.make("domain", Script("another answer, which alpha would not give"))
    request = SwapRequest(directory=new, shadow=1, limits={"min_preference": 0.4})
    gate = await house.through("domain", request, "fusion/merge")
    assert gate.state == "promoted", gate.reason
    report = gate.report().shadow
    assert (report["answer_agreement"], report["preference"]) == (0.0, 0.5)
    assert report["old"]["calls"] == report["new"]["calls"] == 2  # as a member and as the synthesizer
    assert report["spent_tokens"] == (4 + 4) * 15  # and each pair of answers judged in both orders
    before = upstream.asked(f"domain@{old}")
    for asked in upstream.asked(f"domain@{gate.new}")[:2]:
        twin = {**asked, "model": f"domain@{old}"}
        assert twin in before  # word for word, nonces too


async def test_too_few_live_requests_are_no_swap(house: House) -> None:
    old = house.serving("judge")
    request = SwapRequest(directory=house.make("judge", Script()), shadow=50, timeout_s=0.2)
    gate = await house.through("judge", request)
    assert gate.state == "refused"
    assert "of 50 live requests used role 'judge'" in gate.reason
    assert house.serving("judge") == old


async def test_one_gate_a_role_and_it_can_be_stopped(house: House) -> None:
    old = house.serving("judge")
    new = house.make("judge", Script(verdict=prefers("beta")))
    gate = await house.gates.begin("judge", SwapRequest(directory=new, shadow=3))
    with pytest.raises(MixfuseError, match="under way") as refused:
        await house.gates.begin("judge", SwapRequest(directory=new, shadow=3))
    assert refused.value.kind == "conflict"
    assert await house.gates.stop("judge") is gate
    assert gate.state == "stopped"
    assert house.engine.loaded == {f"judge@{old}", f"domain@{house.serving('domain')}"}
    assert (await house.through("judge", SwapRequest(directory=new, shadow=1))).state == "promoted"


# Canary


async def test_a_canary_that_does_well_takes_over(house: House) -> None:
    new = house.make("domain", Script("another answer"))
    request = SwapRequest(directory=new, canary=0.5, requests=5)
    gate = await house.through("domain", request, "domain")
    assert gate.state == "promoted", gate.reason
    report = gate.report().canary
    assert report["new"]["requests"] == 5
    assert report["old"]["requests"] in (4, 5)
    assert house.serving("domain") == gate.new


@pytest.mark.parametrize("requests", [None, 40])
async def test_a_canary_that_fails_is_rolled_back_by_itself(house: House, requests: int | None) -> None:
    old = house.serving("domain")
    request = SwapRequest(
        directory=house.make("domain", Script(status=500)),
        canary=0.5,
        for_s=None if requests else 600,
        requests=requests,
        limits={"min_requests": 4},
    )
    gate = await house.through("domain", request)  # alpha and beta still answer
    assert gate.state == "refused"
    assert gate.reason.startswith("rolled back: as a canary")
    assert "(max_failures)" in gate.reason
    assert house.serving("domain") == old
    for _ in range(4):
        await house.ask("domain")
    assert house.engine.loaded == {f"judge@{house.serving('judge')}", f"domain@{old}"}


async def test_a_judge_is_watched_as_a_canary_after_its_shadow(house: House) -> None:
    new = house.make("judge", Script(verdict=prefers("beta")))
    request = SwapRequest(directory=new, shadow=2, canary=0.5, requests=3)
    gate = await house.through("judge", request)
    assert gate.state == "promoted", gate.reason
    assert gate.report().shadow["new"]["requests"] == 2
    report = gate.report().canary
    assert report["new"]["consistency"] == report["old"]["consistency"] == pytest.approx(2 / 3)


async def test_a_canary_that_nobody_meets_is_rolled_back(house: House) -> None:
    new = house.make("domain", Script())
    gate = await house.gates.begin("domain", SwapRequest(directory=new, canary=0.5, for_s=0.05))
    while gate.under_way:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert gate.state == "refused"
    assert "0 requests reached the canary, 20 are needed" in gate.reason


async def test_the_end_of_the_server_ends_a_canary_and_the_old_one_serves(house: House) -> None:
    old = house.serving("domain")
    new = house.make("domain", Script("another answer"))
    gate = await house.gates.begin("domain", SwapRequest(directory=new, canary=0.5, requests=1000))
    await house.ask("domain")
    await house.gates.close()
    assert gate.state == "stopped"
    assert {(await house.ask("domain"))["choices"][0]["message"]["content"] for _ in range(4)} == {
        "the expert's answer"
    }
    assert house.serving("domain") == old


# Over HTTP, on the command line, in the docs


async def test_a_gate_over_http_is_begun_seen_stopped_and_told(house: House) -> None:
    http, one = house.gateway.http, "/admin/roles/domain"
    new = str(house.make("domain", Script("another answer")))
    old = house.serving("domain")
    begun = await http.put(one, json={"directory": new, "shadow": 5})
    assert (begun.status_code, begun.json()["gate"]["state"]) == (202, "shadow")
    await house.ask("domain")
    rows = (await http.get("/admin/roles")).json()["roles"]
    (gate,) = [row["gate"] for row in rows if row["gate"]]
    assert (gate["old"], gate["new"]) == (old, begun.json()["gate"]["new"])
    for another in (http.put(one, json={"directory": new}), http.post(f"{one}/rollback")):
        assert (await another).status_code == 409
    stopped = await http.delete(f"{one}/gate")
    assert stopped.json()["gate"]["state"] == "stopped"
    lines = (await http.get(f"{one}/history")).json()["history"]
    line = next(line for line in lines if line["why"] == "shadow-rollback")
    assert (line["outcome"], line["old"], line["new"]) == ("refused", old, gate["new"])
    assert "stopped" in line["error"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"directory": "x", "shadows": 5}, "did you mean 'shadow'"),
        ({"shadow": 5}, "missing key 'directory'"),
        ({"directory": "x", "canary": 0.1}, "how long"),
        ({"directory": "x", "shadow": 5, "limits": {"max_failure": 1}}, "did you mean 'max_failures'"),
        ([], "the body"),
    ],
)
async def test_a_swap_asked_for_wrongly_over_http_is_a_typed_400(house: House, body: Any, words: str) -> None:
    response = await house.gateway.http.put("/admin/roles/domain", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request"
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(("text", "wanted"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("10x", None)])
def test_lengths_of_time(text: str, wanted: float | None) -> None:
    if wanted is None:
        with pytest.raises(MixfuseError, match="10m"):
            seconds(text)
    else:
        assert seconds(text) == wanted


@pytest.mark.parametrize(("text", "wanted"), [("10%", 0.1), ("0.25", 0.25), ("ten", None)])
def test_shares(text: str, wanted: float | None) -> None:
    if wanted is None:
        with pytest.raises(MixfuseError, match="10%"):
            share_of(text)
    else:
        assert share_of(text) == pytest.approx(wanted)


def test_the_docs_limits_are_the_defaults() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```text\n(gate: .*?)^```$", page, re.MULTILINE | re.DOTALL)
    documented = yaml.safe_load(block)["gate"]
    assert documented.keys() == GateConfig.model_fields.keys()
    assert GateConfig(**documented) == GateConfig()


# What traces say


def call(model: str, member: str = "expert", outcome: str = "ok", stage: Any = "answer", **keys: Any) -> Call:
    return Call(stage=stage, member=member, model=model, outcome=outcome, usage=Usage(prompt_tokens=1), **keys)


def trace(*calls: Call, **keys: Any) -> Trace:
    return Trace(model="m", mode="best_of", messages=[], calls=list(calls), **keys)


@pytest.fixture
def part(config: Callable[..., FusionConfig]) -> Part:
    members = [{"name": "plain", "role": "base"}, {"name": "expert", "role": "domain"}]
    return Part.of("domain", config(members, judge={"role": "domain"}))


def test_only_faults_of_its_own_count_and_only_its_own_calls(part: Part) -> None:
    seen = Comparison()
    watch(
        trace(
            call("base", "plain"),
            call("base", duration_ms=5),
            call("base", outcome="queue_full"),
            call("base", outcome="cancelled_straggler"),
            call("domain@2", outcome="timeout"),
            call("domain@2", outcome="upstream_error"),
            call("domain@2", duration_ms=7),
        ),
        part,
        "base",
        "domain@2",
        seen,
    )
    assert (seen.old.calls, seen.old.failures, seen.old.percentile_ms(95)) == (1, 0, 5)
    assert (seen.new.calls, seen.new.failures, seen.new.percentile_ms(50)) == (3, 2, 7)
    assert (seen.old.requests, seen.new.requests) == (1, 1)


def test_verdicts_of_a_request_that_both_judged_are_nobodys(part: Part) -> None:
    verdict = Verdict(first=0, second=1, winner="tie", score=0.5, consistent=False, parse_failures=1)
    by_old, by_new = (call(model, "judge", stage="verdict") for model in ("domain@1", "domain@2"))
    seen = Comparison()
    for calls in ([by_old], [by_new], [by_old, by_new]):
        watch(trace(*calls, verdicts=[verdict]), part, "domain@1", "domain@2", seen)
    assert (seen.old.pairs, seen.new.pairs) == (1, 1)
    assert (seen.old.parse_failures, seen.new.requests) == (1, 2)


@pytest.mark.parametrize(
    ("feedback", "winner", "liked", "disliked"),
    [
        ({"score": 1}, 0, 1, 0),
        ({"score": -1}, 0, 0, 1),
        ({"correct": [0]}, 0, 1, 0),
        ({"wrong": [0], "correct": [1]}, 0, 0, 1),
        ({"best": 1}, 0, 0, 1),
        ({"score": 1}, 1, 0, 0),  # the answer returned was another's
        ({"comment": "hm"}, 0, 0, 0),
    ],
)
def test_feedback_is_of_who_gave_the_answer(
    part: Part, feedback: dict[str, Any], winner: int, liked: int, disliked: int
) -> None:
    seen = Comparison()
    told = trace(
        call("domain@2", candidate=0), call("x", "plain", candidate=1), candidates=["expert", "plain"],
        winner=winner, feedback=[feedback],
    )  # fmt: skip
    watch(told, part, "domain@1", "domain@2", seen)
    assert (seen.new.liked, seen.new.disliked, seen.new.requests) == (liked, disliked, 0)


# Limits


def side(**keys: Any) -> Side:
    return Side(**{"requests": 20, "calls": 20, "latencies_ms": [10.0] * 20, "pairs": 50, "consistent": 40, **keys})


@pytest.mark.parametrize(
    ("met", "limit"),
    [
        (Comparison(side(), side()), None),
        (Comparison(side(), side(failures=1)), None),
        (Comparison(side(), side(failures=2)), "max_failures"),
        (Comparison(side(), side(latencies_ms=[10.0] * 19 + [1000.0])), None),  # one slow call decides nothing
        (Comparison(side(), side(latencies_ms=[10.0] * 18 + [30.0] * 2)), "max_latency_ratio"),
        (Comparison(side(), side(latencies_ms=[90.0] * 19)), None),  # too few calls
        (Comparison(side(), side(consistent=35)), None),  # within chance
        (Comparison(side(), side(consistent=25)), "min_consistency"),
        (Comparison(side(), side(parse_failures=3)), "max_parse_failures"),
        (Comparison(side(), side(), decided=10, agreed=4), "min_agreement"),
        (Comparison(side(), side(liked=10, disliked=10)), "max_disliked"),
        (Comparison(side(liked=10, disliked=10), side(liked=10, disliked=10)), None),
        (Comparison(side(), side(liked=0, disliked=3)), None),
        (Comparison(side(), side(requests=19, failures=20)), None),
        (Comparison(side(requests=2), side(latencies_ms=[90.0] * 20, consistent=0)), None),  # beside too little
    ],
)
def test_which_limit_is_broken(met: Comparison, limit: str | None) -> None:
    said = broken(GateConfig(), met, least=20)
    assert (said is None) if limit is None else said.endswith(f"({limit})")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"canary": 0.1}, "how long"),
        ({"canary": 0.1, "for_s": 5, "requests": 5}, "not both"),
        ({"requests": 5}, "go with a canary"),
        ({"limits": {"max_failures": 0}}, "go with shadow or canary"),
        ({"canary": 1}, "less than 1"),
        ({"shadow": 0}, "greater than or equal to 1"),
    ],
)
def test_a_swap_asked_for_by_halves_is_refused(body: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SwapRequest.model_validate({"directory": "x", **body})
