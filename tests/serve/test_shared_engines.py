"""Gateways share engines that someone else runs: none touches another's adapters, and all swap together."""

import asyncio
import random
import re
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import pytest_asyncio
import yaml
from role_harness import BASE, FakeEngine, revision, table
from sqlalchemy import text
from stand_in import StandIn
from test_engine import until
from test_server import MIXFUSE
from test_supervisor import SayingEngines

from mixfuse.app import engine_lease
from mixfuse.app.engine_lease import EngineLease
from mixfuse.app.roles_store import StoredRoles
from mixfuse.app.server import LeasedRoles
from mixfuse.contracts.database import Database, opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import Ledger
from mixfuse.fusion.calls.pool import Pool
from mixfuse.fusion.calls.upstream import Purpose, call
from mixfuse.serve.admission import Admission
from mixfuse.serve.copies import AdapterCopies
from mixfuse.serve.engine import EngineConfig, Restart
from mixfuse.serve.engine_group import EngineGroup
from mixfuse.serve.following import RecordFollower
from mixfuse.serve.role_record import Proposal
from mixfuse.serve.roles import RoleTable
from mixfuse.serve.swap import Swapper

ENGINES = ["http://10.0.0.5:8000/v1", "http://10.0.0.6:8000/v1"]
PURPOSE = Purpose("answer", "domain", timeout_s=60)


@pytest.fixture
def database(place: str):
    with opened(place) as made:
        yield made


@pytest.fixture(autouse=True)
def soon_fenced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_lease, "_GRACE_S", 0)


def expire(database: Database, owner: str) -> None:
    """As if the owner had not renewed its row for long."""
    statement = text("UPDATE gateways SET expires_at = expires_at - 60 WHERE owner = :owner AND expires_at > 0")
    database.run_now(lambda connection: connection.execute(statement, {"owner": owner}))


def rows(database: Database) -> set[str]:
    return set(
        database.run_now(lambda connection: connection.execute(text("SELECT owner FROM gateways")).scalars().all())
    )


async def nothing_left(_owner: str) -> bool:
    return True


async def test_a_gateway_that_stood_still_is_fenced_and_ends(database: Database, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_lease, "_RENEW_S", 0.01)
    one, two = EngineLease(database, "one", ENGINES), EngineLease(database, "two", ENGINES[1:])
    await one.take()
    await two.take()
    assert one.valid
    assert one.owner != two.owner
    unloaded = []

    async def unload(owner: str) -> bool:
        unloaded.append(owner)
        return True

    await two.bury(unload)
    assert unloaded == []
    one._renewing.cancel()  # it stands still
    await asyncio.wait({one._renewing})
    expire(database, one.owner)
    await two.bury(unload)
    assert unloaded == [one.owner]
    assert one.owner in rows(database), "the other engine of that gateway is not two's to look at"
    one._renewing = asyncio.create_task(one._renew())
    async with asyncio.timeout(60):
        assert "stood still for more than 30 s" in str(await one.lost())
    assert not one.valid
    await one.release(nothing_left)
    await two.release(nothing_left)
    assert rows(database) == set()


async def test_a_gateway_that_cannot_renew_stops_answering_before_it_is_fenced(database: Database, monkeypatch):
    monkeypatch.setattr(engine_lease, "_LASTS_S", 0.2)
    lease = EngineLease(database, "one", ENGINES)
    await lease.take()
    async with asyncio.timeout(60):
        while lease.valid:  # noqa: ASYNC110 - a clock decides
            await asyncio.sleep(0.02)
    roles = LeasedRoles(table(FakeEngine()).table, None, lambda: lease.valid)
    with pytest.raises(MixfuseError, match="cannot reach the database by which it shares its engines"):
        async with roles.lease("base"):
            pass
    await lease.release(nothing_left)


async def test_gateways_whose_database_was_away_go_on_once_they_know_what_was_swapped(database: Database, monkeypatch):
    """All their rows have run out, and the first to be back fences none that has not had the time to renew its own."""
    for name, seconds in (("_LASTS_S", 1.0), ("_RENEW_S", 0.1), ("_GRACE_S", 600.0)):
        monkeypatch.setattr(engine_lease, name, seconds)
    leases = [EngineLease(database, name, ENGINES) for name in ("one", "two")]
    for lease in leases:
        await lease.take()

    async def away(*_: object) -> None:
        raise MixfuseError("it is away", kind="trace_db")

    async def follow() -> None:
        pass

    for lease in leases:
        lease._run = away
    await eventually(lambda: not any(lease.valid for lease in leases))
    for lease in leases:
        await lease.bury(nothing_left)  # it does not ask
        back = time.monotonic()
        del lease._run
        await eventually(lambda lease=lease, back=back: lease._back_at > back)
        assert not lease.valid, "what was swapped meanwhile has not been read"
        with pytest.raises(MixfuseError, match="it is away"):
            await lease.catch_up(away)
        assert not lease.valid
        await lease.catch_up(follow)
        assert lease.valid
        await lease.bury(nothing_left)
    assert rows(database) == {lease.owner for lease in leases}
    await asyncio.sleep(0.5)
    assert all(lease.valid for lease in leases)
    for lease in leases:
        await lease.release(nothing_left)


async def test_an_own_engine_needs_no_row(database: Database):
    lease = EngineLease(database, "one", [])
    await lease.take()
    assert lease.valid
    assert (lease.owner, rows(database)) == ("", set())
    await lease.followed("domain", 3)
    await lease.release(nothing_left)


async def test_a_swap_waits_for_the_gateways_that_live_and_serve_the_role(database: Database):
    one, two, three = (EngineLease(database, name, ENGINES) for name in ("one", "two", "three"))
    for lease in (one, two, three):
        await lease.take()
    await two.say({"domain": 6})
    await three.say({"judge": 1})
    waiting = asyncio.create_task(one.followed("domain", 7))
    done, _ = await asyncio.wait({waiting}, timeout=0.5)
    assert not done
    await two.say({"domain": 7})
    await asyncio.wait_for(waiting, 60)
    waiting = asyncio.create_task(one.followed("domain", 8))
    expire(database, two.owner)
    await asyncio.wait_for(waiting, 60)
    for lease in (one, two, three):
        await lease.release(nothing_left)


class Gateway:
    """A gateway without its HTTP server: what it loads, answers, swaps and follows."""

    def __init__(self, name: str, folder: Path, place: str, config: EngineConfig) -> None:
        self.name, self.folder, self.place, self.config = name, folder, place, config
        self.alive = False

    async def start(self, seed: Path) -> "Gateway":
        self.stack = AsyncExitStack()
        self.database = self.stack.enter_context(opened(self.place))
        self.lease = EngineLease(self.database, self.name, self.config.external)
        self.group = EngineGroup(self.config, logs=self.folder)
        copies = AdapterCopies(self.folder / "state", others_read=True)
        admission = Admission(BASE, 8, copies=copies, owner=self.lease.owner)
        store = StoredRoles(self.database, self.name, self.lease)
        roles = RoleTable(SayingEngines(self.group), ["domain"], admission, record=store)
        self.swapper = Swapper(roles)
        self.follower = RecordFollower(self.swapper)
        self.roles = LeasedRoles(roles, self.group, lambda: self.lease.valid)
        await self.lease.take()
        await self.group.start()
        await self.lease.bury(self.group.unload_of)
        await self.follower.start({"domain": seed})
        await self.lease.say(self.follower.versions())
        await self.follower.follow()
        self.pool = await self.stack.enter_async_context(Pool(self.roles))
        self.tasks = [asyncio.create_task(self._follow())]
        self.alive = True
        return self

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            await self.lease.catch_up(self.follower.follow)
            await self.lease.say(self.follower.versions(), self.follower.answers())
            await self.lease.bury(self.group.unload_of)

    async def ask(self) -> str:
        """The revision that answers."""
        async with self.roles.lease("domain") as endpoint:
            messages = [{"role": "user", "content": "x"}]
            answer = await call(self.pool.client, endpoint, messages, {}, purpose=PURPOSE, ledger=Ledger())
        return answer.text.removeprefix("said by domain@").partition("~")[0]

    async def kill(self) -> None:
        """Ends at once, with nothing unloaded, released or said."""
        self.alive = False
        ending = [*self.tasks, *self.swapper._tasks, *self.swapper.table.slots._tasks, self.lease._renewing]
        ending += [task for replica in self.group.replicas for task in replica._tasks]
        for task in ending:
            task.cancel()
        await asyncio.wait(ending)
        await self.stack.aclose()

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)
        await self.swapper.close()
        await self.group.stop()
        await self.lease.release(self.group.unload_of)
        await self.stack.aclose()


@pytest_asyncio.fixture
async def engines() -> AsyncIterator[list[StandIn]]:
    made = [StandIn(api_key="secret"), StandIn(api_key="secret")]
    yield made
    for stand_in in made:
        stand_in.stop()


@pytest.fixture
def gateway(
    tmp_path: Path, place: str, engines: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Gateway]:
    monkeypatch.setenv("ENGINE_KEY", "secret")
    (tmp_path / "config.json").write_text("{}")
    soon = Restart(first_delay_s=0.01, check_s=0.05, wait_s=60)
    urls = [engine.url for engine in engines]
    config = EngineConfig(base=tmp_path, urls=urls, api_key_env="ENGINE_KEY", restart=soon)
    return lambda name: Gateway(name, tmp_path, place, config)


async def test_gateways_leave_one_anothers_adapters_alone(gateway, engines: list[StandIn], made, database: Database):
    one = await gateway("one").start(made(1))
    two = await gateway("two").start(made(1))
    name = f"domain@{revision(made(1))}"
    both = {f"{name}~{each.lease.owner}" for each in (one, two)}
    assert [set(engine.adapters) for engine in engines] == [both, both]
    await two.stop()
    assert [set(engine.adapters) for engine in engines] == [{f"{name}~{one.lease.owner}"}] * 2
    assert await one.ask() == revision(made(1))
    assert rows(database) == {one.lease.owner}
    await one.stop()
    assert [engine.adapters for engine in engines] == [{}, {}]


async def test_what_a_killed_gateway_left_is_unloaded_by_another(gateway, engines: list[StandIn], made, database):
    one = await gateway("one").start(made(1))
    two = await gateway("two").start(made(1))
    await one.kill()
    assert all(len(engine.adapters) == 2 for engine in engines)
    expire(database, one.lease.owner)
    async with asyncio.timeout(30):
        while rows(database) != {two.lease.owner}:  # noqa: ASYNC110 - another task's work
            await asyncio.sleep(0.02)
    assert all(set(engine.adapters) == {f"domain@{revision(made(1))}~{two.lease.owner}"} for engine in engines)
    await two.stop()


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110 - other tasks' work
            await asyncio.sleep(0.02)


def names_of(number: int, made, *gateways: Gateway) -> set[str]:
    return {f"domain@{revision(made(number))}~{each.lease.owner}" for each in gateways}


async def test_what_one_gateway_cannot_load_is_swapped_in_at_none(gateway, engines: list[StandIn], made, database):
    """One engine refuses it to the other gateway: both serve the old revision on, and the engines have only that."""
    one, two = [await gateway(name).start(made(1)) for name in ("one", "two")]
    (wanted,) = names_of(2, made, two)
    engines[1].refused.add(wanted)
    with pytest.raises(MixfuseError, match=f"the gateway two cannot serve it: .*{wanted} is not welcome") as refused:
        await one.swapper.swap("domain", made(2))
    assert refused.value.kind == "adapter"
    await eventually(lambda: all(set(engine.adapters) == names_of(1, made, one, two) for engine in engines))
    assert [await each.ask() for each in (one, two)] == [revision(made(1))] * 2
    newest = (await one.swapper.table.record.history("domain"))[0]
    assert (newest.outcome, newest.new) == ("refused", revision(made(2)))
    # Once the engine takes it, the same swap goes through, from either gateway.
    engines[1].refused.clear()
    await two.swapper.swap("domain", made(2))
    assert [await each.ask() for each in (one, two)] == [revision(made(2))] * 2
    assert all(set(engine.adapters) == names_of(2, made, one, two) for engine in engines)
    for each in (one, two):
        await each.stop()


class BetweenPhases:
    """A gateway's record, which does something once all have the adapter ready, before it records the change."""

    def __init__(self, of: Gateway, do: Callable[[], Any]) -> None:
        self._record, self._do = of.swapper.table.record, do
        of.swapper.table.record = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._record, name)

    async def change(self, *arguments: Any) -> Any:
        await self._do()
        return await self._record.change(*arguments)


async def test_nobody_answers_with_it_before_all_have_it_and_a_dead_engine_gets_it_later(
    gateway, engines: list[StandIn], made, database
):
    """An engine ends between the two phases: the other one answers for both gateways, with the new revision."""
    one, two = [await gateway(name).start(made(1)) for name in ("one", "two")]

    async def end_an_engine() -> None:
        assert all(
            set(engine.adapters) == names_of(1, made, one, two) | names_of(2, made, one, two) for engine in engines
        )
        assert [await each.ask() for each in (one, two)] == [revision(made(1))] * 2
        engines[1].stop()
        engines[1].adapters.clear()

    BetweenPhases(one, end_an_engine)
    await one.swapper.swap("domain", made(2))
    await eventually(lambda: not any(each.group.replicas[1].ready for each in (one, two)))
    assert [await each.ask() for each in (one, two)] == [revision(made(2))] * 2
    engines[1].start()
    await eventually(lambda: all(each.group.replicas[1].ready for each in (one, two)))
    assert set(engines[1].adapters) == names_of(2, made, one, two)
    for each in (one, two):
        await each.stop()


async def test_a_gateway_that_ends_between_the_phases_leaves_the_others_on_the_old_revision(
    gateway, engines: list[StandIn], made, database
):
    one, two = [await gateway(name).start(made(1)) for name in ("one", "two")]
    stopped = asyncio.Event()

    async def stand_still() -> None:
        stopped.set()
        await asyncio.Event().wait()

    BetweenPhases(one, stand_still)
    swapping = asyncio.create_task(one.swapper.swap("domain", made(2)))
    await asyncio.wait_for(stopped.wait(), 60)
    await one.kill()
    swapping.cancel()
    await asyncio.wait({swapping})
    expire(database, one.lease.owner)
    await eventually(lambda: rows(database) == {two.lease.owner})
    await eventually(lambda: all(set(engine.adapters) == names_of(1, made, two) for engine in engines))
    assert await two.ask() == revision(made(1))
    await two.swapper.swap("domain", made(3))
    assert await two.ask() == revision(made(3))
    await two.stop()


async def test_a_gateway_that_stood_still_between_the_phases_changes_nothing(
    gateway, engines: list[StandIn], made, database
):
    """The other one has given its proposal up and taken its adapters out of the engines, before it goes on."""
    one, two = [await gateway(name).start(made(1)) for name in ("one", "two")]

    async def fenced() -> None:
        expire(database, one.lease.owner)
        await eventually(lambda: rows(database) == {two.lease.owner})
        await eventually(lambda: two.swapper.table.state("domain").prepared is None)

    BetweenPhases(one, fenced)
    with pytest.raises(MixfuseError, match="count it as gone") as refused:
        await one.swapper.swap("domain", made(2))
    assert refused.value.kind == "engine"
    assert (await two.swapper.table.record.read())["domain"].revision == revision(made(1))
    assert await two.ask() == revision(made(1))
    await one.stop()
    assert all(set(engine.adapters) == names_of(1, made, two) for engine in engines)
    await two.stop()


async def waiting_for_an_answer(
    database: Database, proposal: Proposal
) -> tuple[EngineLease, EngineLease, "asyncio.Task[None]"]:
    """Two gateways' leases; the first waits for the second's answer to what it proposes."""
    one, two = (EngineLease(database, name, ENGINES) for name in ("one", "two"))
    for lease in (one, two):
        await lease.take()
        await lease.say({"domain": 1})
    waiting = asyncio.create_task(one.propose(proposal))
    async with asyncio.timeout(60):
        while not await two.proposals():  # noqa: ASYNC110 - another task's work
            await asyncio.sleep(0.02)
    return one, two, waiting


async def test_a_gateway_that_stood_still_while_it_waits_for_others_gives_up(database: Database):
    """They do not answer what somebody proposes who is gone."""
    one, two, waiting = await waiting_for_an_answer(database, Proposal("first", "domain", "first", "/first"))
    assert not waiting.done()
    expire(database, one.owner)
    with pytest.raises(MixfuseError, match="count it as gone"):
        await asyncio.wait_for(waiting, 60)
    for lease in (one, two):
        await lease.release(nothing_left)


async def test_what_was_given_up_is_prepared_again_for_a_gateway_that_comes_back(
    gateway, engines: list[StandIn], made, database
):
    """It renewed its row late, and before another one fenced it."""
    one, two = [await gateway(name).start(made(1)) for name in ("one", "two")]
    two.lease.bury = nothing_left
    prepared = two.swapper.table.state("domain")

    async def late() -> None:
        expire(database, one.lease.owner)
        await eventually(lambda: prepared.prepared is None)
        statement = text("UPDATE gateways SET expires_at = expires_at + 60 WHERE owner = :owner")
        database.run_now(lambda connection: connection.execute(statement, {"owner": one.lease.owner}))
        await eventually(lambda: prepared.prepared is not None)

    BetweenPhases(one, late)
    await one.swapper.swap("domain", made(2))
    assert [await each.ask() for each in (one, two)] == [revision(made(2))] * 2
    for each in (one, two):
        await each.stop()


async def test_of_two_proposals_for_a_role_the_second_is_refused(database: Database):
    first, second = (Proposal(name, "domain", name, f"/{name}") for name in ("first", "second"))
    one, two, waiting = await waiting_for_an_answer(database, first)
    assert await two.proposals() == {"domain": first}
    assert await one.proposals() == {}
    with pytest.raises(MixfuseError, match="another gateway is about to swap role 'domain'") as refused:
        await two.propose(second)
    assert refused.value.kind == "conflict"
    await two.say({"domain": 1}, {"domain": ("first", None)})
    await asyncio.wait_for(waiting, 60)
    await one.withdraw(first)
    await two.say({"domain": 1}, {"domain": ("first", "it has no room")})
    proposing = asyncio.create_task(two.propose(second))
    await one.say({"domain": 1}, {"domain": ("second", "it has no room")})
    with pytest.raises(MixfuseError, match="the gateway one cannot serve it: it has no room"):
        await asyncio.wait_for(proposing, 60)
    expire(database, two.owner)  # what a gateway proposed ends with it
    third = Proposal("third", "domain", "third", "/third")
    await asyncio.wait_for(one.propose(third), 60)
    for lease in (one, two):
        await lease.release(nothing_left)


@pytest.mark.parametrize("seed", range(2))
async def test_three_gateways_on_two_engines_with_one_of_each_killed(
    gateway, engines: list[StandIn], made, database: Database, seed: int
):
    """No request fails but those in the killed process; after a swap no gateway answers with the old revision."""
    draw = random.Random(seed)
    gateways = [await gateway(name).start(made(0)) for name in ("one", "two", "three")]
    serving = [(revision(made(0)), float("-inf"), float("inf"))]  # revision, from and until when it may answer
    answers: list[tuple[float, float, str]] = []
    failures: list[tuple[float, str]] = []

    async def client(asked: Gateway) -> None:
        while asked.alive:
            began = time.monotonic()
            try:
                answers.append((began, time.monotonic(), await asked.ask()))
            except (MixfuseError, CallError) as error:
                if asked.alive:
                    failures.append((time.monotonic(), str(error)))
            await asyncio.sleep(0.005)

    async def swap(by: Gateway, number: int, *, killed_after: float | None = None) -> None:
        began, new = time.monotonic(), revision(made(number))
        swapping = asyncio.create_task(by.swapper.swap("domain", made(number)))
        if killed_after is None:
            await swapping
        else:
            await asyncio.sleep(killed_after)
            await by.kill()
            swapping.cancel()
            await asyncio.wait({swapping})
            expire(database, by.lease.owner)
            other = next(each for each in gateways if each.alive)
            recorded = (await other.swapper.table.record.read())["domain"]
            if recorded.revision != new:
                return
            await other.swapper.table.record.followed("domain", recorded.version)
            async with asyncio.timeout(60):
                while min(each.follower.versions()["domain"] for each in gateways if each.alive) < recorded.version:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        old, since, _ = serving.pop()
        serving.extend([(old, since, time.monotonic()), (new, began, float("inf"))])

    clients = [asyncio.create_task(client(each)) for each in gateways]
    numbers = iter(range(1, 99))
    for _ in range(3):
        await swap(draw.choice(gateways), next(numbers))
    victim = gateways[draw.randrange(3)]
    await swap(victim, next(numbers), killed_after=draw.uniform(0, 0.4))
    left = [each for each in gateways if each.alive]
    await swap(draw.choice(left), next(numbers))
    killed_engine, stand_in = time.monotonic(), engines[draw.randrange(2)]
    dead = stand_in.url
    stand_in.stop()
    await asyncio.sleep(draw.uniform(0, 0.3))
    await swap(draw.choice(left), next(numbers))
    await swap(draw.choice(left), next(numbers))
    count = len(answers)
    async with asyncio.timeout(60):
        while len(answers) < count + 20:  # noqa: ASYNC110 - the clients' work
            await asyncio.sleep(0.02)
    for each in left:
        each.alive = False
    await asyncio.gather(*clients)
    wrong = [
        (began, ended, said)
        for began, ended, said in answers
        if not any(said == name and since < ended and began < until for name, since, until in serving)
    ]
    assert wrong == []
    assert all(ended >= killed_engine and dead.removeprefix("http://") in why for ended, why in failures), failures
    for each in left:
        await each.stop()


@pytest.mark.engine
def test_servers_on_one_engine_answer_on_when_one_is_killed(
    tiny, tmp_path: Path, place: str, database: Database, monkeypatch
):
    """`mixfuse serve` as it is run, on an engine without a model."""
    monkeypatch.setenv("ENGINE_KEY", "secret")
    stand_in = StandIn(api_key="secret")
    config = {
        "engine": {"base": str(tiny.base), "url": stand_in.url, "api_key_env": "ENGINE_KEY"},
        "gateway": {"port": 0},
        "fusion": {"members": [{"name": "a", "role": "base"}], "trace_db": place},
        "state": str(tmp_path / "state"),
    }
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    logs = [tmp_path / "one.log", tmp_path / "two.log"]
    servers = []
    try:
        for log in logs:
            with log.open("wb") as stream:
                servers.append(subprocess.Popen([*MIXFUSE, "serve", path], stderr=stream, stdout=stream))
        found: dict[Path, str] = {}

        def ready(log: Path) -> bool:
            assert all(server.poll() is None for server in servers), log.read_text()
            if line := re.search(r"ready: (http://[\d.:]+/v1)", log.read_text()):
                found[log] = line[1]
            return log in found

        def ask(log: Path) -> int:
            body = {"model": "a", "messages": [{"role": "user", "content": "x"}]}
            return httpx.post(f"{found[log]}/chat/completions", json=body, timeout=60, trust_env=False).status_code

        until(lambda: all([ready(log) for log in logs]), seconds=240)
        assert [ask(log) for log in logs] == [200, 200]
        assert len(rows(database)) == 2
        servers[0].kill()
        servers[0].wait()
        assert ask(logs[1]) == 200
        query = text("SELECT owner FROM gateways WHERE name LIKE :port")
        port = {"port": f"%:{urlsplit(found[logs[0]]).port}"}
        expire(database, database.run_now(lambda connection: connection.execute(query, port).scalar()))
        until(lambda: len(rows(database)) == 1, seconds=60)
        assert ask(logs[1]) == 200
    finally:
        for server in servers:
            server.kill()
            server.wait()
        stand_in.stop()
