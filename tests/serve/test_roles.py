"""The role table's order of things and its races, before a made-up engine that does as it is told.

What a real engine does with adapters is in test_server.py and test_engine.py; here it is when which call is made.
"""

import asyncio
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from safetensors.numpy import save_file
from starlette.applications import Starlette

from mixfuse.app.gates import GateConfig, Gates
from mixfuse.app.roles_routes import RoleMetrics, routes
from mixfuse.app.roles_store import StoredRoles, roll_back
from mixfuse.app.server import ServeConfig
from mixfuse.contracts import adapter, judge_protocol
from mixfuse.contracts.adapter import (
    CONFIG,
    MANIFEST,
    PROBES,
    WEIGHTS,
    Fingerprint,
    LogprobProbe,
    Manifest,
    Probes,
    VerdictProbe,
)
from mixfuse.contracts.database import opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import validate
from mixfuse.serve.admission import Admission
from mixfuse.serve.following import RecordFollower
from mixfuse.serve.roles import RoleTable
from mixfuse.serve.swap import Swapper
from mixfuse.serve.watch import Folder, Watcher

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
        if name not in self.loaded:
            raise MixfuseError("it cannot be found", kind="adapter")
        self.loaded.remove(name)

    async def probe(self, name: str) -> None:
        await self._step("probe", name)
        assert name in {"base", *self.loaded}

    async def prompt_logprobs(self, name: str, prompt: list[int]) -> list[float]:
        assert name in {"base", *self.loaded}
        return [self.says.get(name, -2.0)] * (len(prompt) - 1)

    async def first_token_logprobs(self, name: str, messages: list[dict[str, str]]) -> dict[str, float]:
        p = self.prefers.get(name, 0.5)
        return {" A": math.log(p), "B": math.log(1 - p)}


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """Makes a whole adapter directory, once; equal numbers make equal revisions."""
    done: set[Path] = set()

    def make(
        number: int, role: str = "domain", *, probes: Probes | None = None, at: Path | None = None, rank: int = 2
    ) -> Path:
        folder = at or tmp_path / f"{role}-{number}"
        if folder in done and at is None:
            return folder
        done.add(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stem = "base_model.model.model.layers.0.self_attn.q_proj"
        weights = {
            f"{stem}.lora_A.weight": numpy.full((rank, 8), number, numpy.float32),
            f"{stem}.lora_B.weight": numpy.ones((8, rank), numpy.float32),
        }
        save_file(weights, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank}))
        if probes is not None:
            (folder / PROBES).write_text(probes.model_dump_json())
        files = adapter.file_hashes(folder)
        manifest = Manifest(
            role=role,
            revision=adapter.revision_of(files),
            base=BASE,
            base_path="base",
            rank=rank,
            experts_trained=False,
            files=files,
            judge_protocol=judge_protocol.describe() if role == "judge" else None,
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json())
        return folder

    return make


def revision(directory: Path) -> str:
    return adapter.read_manifest(directory).revision


def table(
    engine: FakeEngine, *roles: str, probe_tolerance: float | None = None, store: StoredRoles | None = None, **keys
) -> Swapper:
    """The swapper of a fresh role table."""
    admission = Admission(BASE, 8, probe_tolerance=probe_tolerance)
    return Swapper(RoleTable(engine, list(roles) or ["domain"], admission, record=store, **keys))


async def leased(roles: Swapper, role: str = "domain") -> str:
    async with roles.table.lease(role) as held:
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
    async with roles.table.lease("domain") as held:
        swapping = asyncio.create_task(roles.swap("domain", made(2)))
        while roles.table.serving()["domain"] is held:  # noqa: ASYNC110
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
    assert engine.loaded == {roles.table.serving()[role].model for role in ("domain", "judge")}


async def test_a_canary_gets_its_share_and_nothing_once_it_is_discarded(made):
    engine = FakeEngine()
    drawn = [number / 10 for number in range(10)]
    roles = table(engine, draw=lambda: drawn[0])
    await roles.swap("domain", made(1))
    canary = await roles.stage("domain", made(2))
    roles.table.set_canary("domain", canary, 0.3)
    given = []
    while drawn:
        given.append(await leased(roles))
        drawn.pop(0)
    assert given.count(canary.model) == 3
    drawn.append(0.0)
    async with roles.table.lease("domain") as held:
        assert held is canary
        discarding = asyncio.create_task(roles.discard(canary))
        await asyncio.sleep(0)
        assert await leased(roles) == f"domain@{revision(made(1))}"
        assert canary.model in engine.loaded
    await discarding
    assert canary.model not in engine.loaded


async def test_going_back_to_a_revision_that_still_drains_does_not_load_it_again(made):
    engine = FakeEngine()
    roles = table(engine)
    await roles.swap("domain", made(1))
    async with roles.table.lease("domain") as held:
        swapping = asyncio.create_task(roles.swap("domain", made(2)))
        while roles.table.serving()["domain"] is held:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await roles.swap("domain", made(1))
        await swapping  # it waits for a revision no more that stays on
        assert roles.table.serving()["domain"] is held
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
        (-2.1, stored(-2.0), r"off by 0.1 nats .* 0.001 are allowed"),
    ],
)
async def test_an_adapter_the_engine_does_not_apply_is_refused(made, says: float, probes: Probes | None, words: str):
    engine = FakeEngine()
    directory = made(1, probes=probes)
    engine.says[f"domain@{revision(directory)}"] = says
    roles = table(engine)
    with pytest.raises(MixfuseError, match=words) as caught:
        await roles.swap("domain", directory)
    assert caught.value.kind == "adapter"
    assert engine.loaded == set()
    assert await leased(roles) == "base"


@pytest.mark.parametrize(("lost", "kind"), [("probe", "engine"), ("probe domain", "adapter")])
async def test_an_engine_that_is_gone_is_told_from_an_adapter_it_cannot_answer_with(made, lost: str, kind: str):
    engine = FakeEngine()
    roles = table(engine)
    away = MixfuseError("no answer", kind="engine")

    async def probe(name: str) -> None:
        if f"probe {name}".startswith(lost):
            raise away

    engine.probe = probe
    with pytest.raises(MixfuseError, match="no answer") as caught:
        await roles.swap("domain", made(1))
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
    roles = table(engine, "judge")
    if refused:
        with pytest.raises(MixfuseError, match=r"stored comparison 1 is 0\.750; it was 0\.800"):
            await roles.swap("judge", directory)
    else:
        await roles.swap("judge", directory)


# --- more adapters than places --------------------------------------------------------------------------------------


async def three(engine: FakeEngine, made, **keys) -> Swapper:
    """Roles a, b, c, each with an adapter, in an engine of two places."""
    roles = table(engine, "a", "b", "c", max_loaded=2, **keys)
    for number, role in enumerate("abc"):
        await roles.swap(role, made(number, role))
    await roles.close()  # what was too much is out
    return roles


def present(engine: FakeEngine) -> set[str]:
    return {name[0] for name in engine.loaded}


async def test_the_least_recently_used_makes_room(made):
    engine = FakeEngine()
    roles = await three(engine, made)
    assert present(engine) == {"b", "c"}
    await leased(roles, "b")
    await leased(roles, "a")
    assert present(engine) == {"a", "b"}
    await leased(roles, "c")
    assert present(engine) == {"a", "c"}
    assert (roles.table.counts.loads, roles.table.counts.evictions) == (5, 3)


async def test_one_load_for_all_who_wait_and_none_for_who_is_there(made):
    engine = FakeEngine()
    roles = await three(engine, made)
    before = roles.table.counts.loads
    assert set(await asyncio.gather(*(leased(roles, "a") for _ in range(20)))) == {roles.table.serving()["a"].model}
    assert roles.table.counts.loads == before + 1


async def test_who_is_busy_is_not_unloaded_and_cannot_keep_the_others_out(made):
    engine = FakeEngine()
    roles = await three(engine, made)
    order = []

    async def use(role: str, *, until: asyncio.Event | None = None) -> None:
        async with roles.table.lease(role) as held:
            assert held.model in engine.loaded
            order.append(role)
            if until:
                await until.wait()
            assert held.model in engine.loaded

    end = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for role in "bc":
            group.create_task(use(role, until=end))
        await asyncio.sleep(0.01)
        group.create_task(use("a"))
        await asyncio.sleep(0.01)
        for role in "bbcc":  # new ones of the busy: those of the one that has to go come after
            group.create_task(use(role))
        await asyncio.sleep(0.01)
        assert "a" not in order
        end.set()
    assert order.index("a") < len(order) - 1
    assert sorted(order) == sorted("bcabbcc")


async def test_pinned_roles_stay_and_some_place_is_left(made):
    engine = FakeEngine()
    roles = await three(engine, made)
    await roles.table.pin("a", True)
    for role in "bcbc":
        await leased(roles, role)
        assert "a" in present(engine)
    with pytest.raises(MixfuseError, match="could not be served") as caught:
        await roles.table.pin("b", True)
    assert caught.value.kind == "conflict"
    await roles.table.pin("a", False)
    await leased(roles, "b")
    assert present(engine) == {"b", "c"}


async def test_an_adapter_that_changed_on_the_disk_does_not_come_back(made):
    engine = FakeEngine()
    roles = await three(engine, made)
    (made(0, "a") / "extra.json").write_text("{}")
    with pytest.raises(MixfuseError, match=r"extra\.json is not in the manifest"):
        await leased(roles, "a")
    (made(0, "a") / "extra.json").unlink()
    assert (await leased(roles, "a")).startswith("a@")


async def test_a_swap_of_a_role_that_is_not_loaded_needs_no_place_of_the_others(made):
    engine = FakeEngine()
    roles = await three(engine, made)
    async with roles.table.lease("b"), roles.table.lease("c"):
        await roles.swap("a", made(7, "a"))
        await roles.close()
        assert present(engine) == {"b", "c"}, "they are in use; the new one waits on the disk for its first request"
    assert await leased(roles, "a") == f"a@{revision(made(7, 'a'))}"


async def test_requests_swaps_and_evictions_at_once_all_come_to_their_end(made, stores):
    engine, chance = FakeEngine(), random.Random(0)
    step = engine._step

    async def slowly(what: str, name: str) -> None:
        await asyncio.sleep(chance.random() / 500)
        await step(what, name)

    engine._step = slowly
    roles = table(engine, *"abcd", max_loaded=2, store=stores())
    await RecordFollower(roles).start({role: made(number, role) for number, role in enumerate("abcd")})
    await roles.table.pin("d", True)

    async def ask() -> None:
        for _ in range(30):
            async with roles.table.lease(chance.choice("abcd")) as held:
                for _ in range(2):
                    assert held.model in engine.loaded
                    await asyncio.sleep(chance.random() / 500)

    async def swap(role: str, first: int) -> None:
        for number in range(4):
            await roles.swap(role, made(first + number % 2, role))

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(ask())
        group.create_task(swap("a", 10))
        group.create_task(swap("d", 20))
    await roles.close()
    assert len(engine.loaded) == 2
    assert roles.table.serving()["d"].model in engine.loaded


# --- what outlives the process --------------------------------------------------------------------------------------


@pytest.fixture
def stores(tmp_path: Path):
    """Makes records of gateways on one database."""
    with opened(tmp_path / "traces.sqlite3") as database:
        yield lambda gateway="one": StoredRoles(database, gateway)


async def test_the_base_is_called_what_the_engine_calls_it_once_it_is_reached(made):
    engine = FakeEngine()
    roles = table(engine)
    engine.base_model_name = "mixtral"
    await RecordFollower(roles).start({"domain": None})
    assert await leased(roles) == await leased(roles, "base") == "mixtral"


async def test_a_restart_comes_back_to_the_same_revisions(made, stores):
    roles = table(FakeEngine(), "domain", "judge", store=stores())
    assert await RecordFollower(roles).start({"domain": made(1), "judge": None}) == {
        "domain": "config",
        "judge": "config",
    }
    await roles.swap("domain", made(2))
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
    roles = table(FakeEngine(), store=stores())
    await RecordFollower(roles).start({"domain": made(1)})
    await roles.swap("domain", made(2))
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
    roles = table(engine, store=stores())
    await RecordFollower(roles).start({"domain": None})
    for number in (1, 2, 3):
        await roles.swap("domain", made(number))
    went = [(await roles.rollback("domain")).new for _ in range(2)]
    assert went == [revision(made(2)), revision(made(1))]
    await roles.swap("domain", made(4))
    assert (await roles.rollback("domain")).new == revision(made(1))
    assert (await roles.rollback("domain")).new is None
    assert engine.loaded == set()
    with pytest.raises(MixfuseError, match="nothing served 'domain' before"):
        await roles.rollback("domain")
    events = await stores().history("domain")
    assert [event.why for event in reversed(events)] == [
        *("config", "swap", "swap", "swap", "rollback", "rollback", "swap", "rollback", "rollback")
    ]
    assert [event.version for event in reversed(events)] == list(range(1, 10))


async def test_a_rollback_to_an_adapter_that_is_gone_leaves_the_present_one(made, stores, tmp_path):
    roles = table(FakeEngine(), store=stores())
    await RecordFollower(roles).start({"domain": made(1)})
    await roles.swap("domain", made(2))
    gone = revision(made(1))
    made(1).rename(tmp_path / "elsewhere")
    with pytest.raises(MixfuseError, match="no such adapter directory"):
        await roles.rollback("domain")
    assert roles.table.serving()["domain"].revision == revision(made(2))
    newest, *_ = await stores().history("domain")
    assert (newest.why, newest.outcome, newest.new) == ("rollback", "refused", gone)
    assert "no such adapter directory" in newest.error


async def test_of_two_gateways_that_swap_at_once_one_is_told_and_follows(made, stores):
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


async def test_a_commit_that_cannot_be_recorded_is_none(made, stores, tmp_path):
    engine = FakeEngine()
    with opened(tmp_path / "other.sqlite3") as database:
        roles = table(engine, store=StoredRoles(database, "one"))
        await RecordFollower(roles).start({"domain": made(1)})
        staged = await roles.stage("domain", made(2))
        database.run_now(lambda connection: connection.exec_driver_sql("DROP TABLE role_history"))
        with pytest.raises(MixfuseError, match="cannot be reached") as caught:
            await roles.commit("domain", staged)
    assert caught.value.kind == "trace_db"
    assert await leased(roles) == f"domain@{revision(made(1))}"
    assert engine.loaded == {f"domain@{revision(made(1))}"}


async def test_who_goes_away_in_a_commit_has_committed(made, stores):
    engine = FakeEngine()
    roles = table(engine, store=stores())
    await RecordFollower(roles).start({"domain": made(1)})
    async with roles.table.lease("domain"):
        swapping = asyncio.create_task(roles.swap("domain", made(2)))
        while roles.table.serving()["domain"].revision != revision(made(2)):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        swapping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await swapping
    await asyncio.sleep(0.01)
    assert engine.loaded == {f"domain@{revision(made(2))}"}, "the old one was unloaded once it was drained"


async def test_refusals_and_pins_are_in_the_history_and_pins_last(made, stores):
    roles = table(FakeEngine(), store=stores())
    await RecordFollower(roles).start({"domain": made(1)})
    with pytest.raises(MixfuseError):
        await roles.swap("domain", made(2, rank=9))
    canary = await roles.stage("domain", made(3))
    await roles.discard(canary, reason="agreement 0.3 is below 0.5")
    await roles.table.pin("domain", True)
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


# --- a folder that is watched ---------------------------------------------------------------------------------------


async def test_the_newest_adapter_of_a_folder_is_swapped_in_once_it_is_whole(made, stores, tmp_path, caplog):
    roles = table(FakeEngine(), store=stores())
    await RecordFollower(roles).start({"domain": None})
    watcher = Watcher(roles, Folder(tmp_path / "watched"), "domain")
    place = tmp_path / "watched" / "domain"
    await watcher.poll()

    made(1, at=place / "first")
    await watcher.poll()
    assert roles.table.serving()["domain"].revision is None, "it may still be written"
    await watcher.poll()
    assert roles.table.serving()["domain"].revision == revision(place / "first")

    made(2, at=place / ".half")
    made(3, at=place / "second")
    whole = (place / "second" / WEIGHTS).read_bytes()
    (place / "second" / WEIGHTS).write_bytes(whole[:-4])
    for _ in range(4):
        await watcher.poll()
    assert roles.table.serving()["domain"].revision == revision(place / "first")
    assert len([record for record in caplog.records if "was changed after export" in record.message]) == 1
    (place / "second" / WEIGHTS).write_bytes(whole)
    for _ in range(2):
        await watcher.poll()
    assert roles.table.serving()["domain"].revision == revision(place / "second")

    await roles.rollback("domain")
    for _ in range(2):
        await Watcher(roles, Folder(tmp_path / "watched"), "domain").poll()
        await watcher.poll()
    assert roles.table.serving()["domain"].revision == revision(place / "first"), "a rollback lasts"
    assert [event.why for event in await stores().history("domain") if event.outcome == "ok"] == [
        *("rollback", "watch", "watch", "config")
    ]


async def test_an_engine_that_is_away_is_waited_for_but_not_for_ever(made, stores, tmp_path):
    engine = FakeEngine()
    roles = table(engine, store=stores())
    await RecordFollower(roles).start({"domain": None})
    watcher = Watcher(roles, Folder(tmp_path / "watched"), "domain")
    made(1, at=tmp_path / "watched" / "domain" / "first")
    engine.fail["load"] = MixfuseError("no answer", kind="engine")
    for _ in range(6):
        await watcher.poll()
    assert len([call for call in engine.calls if call.startswith("load")]) == 3
    engine.fail.clear()
    await watcher.poll()
    assert roles.table.serving()["domain"].revision is None
    made(2, at=tmp_path / "watched" / "domain" / "second")
    for _ in range(2):
        await watcher.poll()
    assert roles.table.serving()["domain"].revision == revision(tmp_path / "watched" / "domain" / "second")


# --- over HTTP ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def admin(made, stores):
    """A role table behind its routes, and the client that asks them."""
    roles = table(FakeEngine(), store=stores())
    await RecordFollower(roles).start({"domain": made(1)})
    app = Starlette(routes=routes(roles, stores(), Gates(roles, None, None, GateConfig())))  # none is begun
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://admin/admin/roles") as client:
        yield roles, client


async def test_every_way_is_there_over_http(admin, made):
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
    roles, client = admin
    staged = await roles.stage("domain", made(3))
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
    await roles.discard(staged)
    assert (await client.put("/domain", json={"directory": "nowhere"})).status_code == 400
    assert (await client.post("/domain/rollback")).status_code == 409  # nothing served it before


async def test_changes_want_the_admin_key(admin, monkeypatch: pytest.MonkeyPatch):
    _, client = admin
    monkeypatch.setenv("MIXFUSE_ADMIN_KEY", "secret")
    assert (await client.get("http://admin/admin/roles")).status_code == 200
    ways = (("PUT", "/domain"), ("POST", "/domain/rollback"), ("GET", "/domain/history"), ("PUT", "/domain/pin"))
    for method, path in (*ways, ("DELETE", "/domain/pin")):
        assert (await client.request(method, path)).status_code == 401, path
    allowed = await client.put("/domain/pin", headers={"authorization": "Bearer secret"})
    assert allowed.status_code == 200


async def test_the_metrics_tell_what_serves_and_who_is_behind(admin, made):
    roles, _ = admin
    registry = CollectorRegistry()
    registry.register(RoleMetrics(roles.table))
    roles.table.state("domain").problem = "it is not here"
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
