"""An engine that crashes or hangs comes back with its adapters, several are one, and who asks waits or is told why."""

import asyncio
import inspect
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
from pydantic import ValidationError
from role_harness import table
from safetensors.numpy import save_file
from stand_in import StandIn
from test_engine import alive, until

from mixfuse.app.gates import GateConfig, Gates
from mixfuse.app.roles_routes import routes
from mixfuse.app.server import LeasedRoles
from mixfuse.contracts.adapter import Fingerprint
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import validate
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import Ledger
from mixfuse.fusion.calls.pool import Pool
from mixfuse.fusion.calls.upstream import Endpoint, Purpose, call
from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.http.gateway import create_app
from mixfuse.serve import engine as engine_module
from mixfuse.serve import supervisor
from mixfuse.serve.admission import Admission
from mixfuse.serve.engine import EngineConfig, Restart
from mixfuse.serve.engine_group import EngineGroup, per_replica
from mixfuse.serve.roles import RoleTable
from mixfuse.serve.supervisor import OwnEngine, Replica, Wanted
from mixfuse.serve.swap import Swapper
from mixfuse.serve.vllm_api import VllmApi

PROGRAM = [sys.executable, str(Path(__file__).parent / "stand_in.py")]
SOON = Restart(first_delay_s=0.01, check_s=0.05, hung_after_s=5, wait_s=120)


def adapter(folder: Path, name: str, *, value: float = 0) -> Path:
    path = folder / name
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text("{}")
    weight = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({weight: np.full((1, 1), value, np.float32)}, path / "adapter_model.safetensors")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def in_place_of_vllm(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Puts a program in vLLM's place."""
    monkeypatch.setattr(engine_module, "find_spec", lambda name: name)
    monkeypatch.setattr(engine_module, "_STOP_GRACE_S", 0.2)

    def put(program: list[str]) -> None:
        monkeypatch.setattr(engine_module, "command", lambda config, port, template: [*program, str(port)])

    put(PROGRAM)
    return put


@pytest_asyncio.fixture
async def group(base: Path, in_place_of_vllm) -> AsyncIterator[EngineGroup]:
    """An engine that is a child of ours, with two adapters."""
    async with EngineGroup(EngineConfig(base=base, restart=SOON), logs=base / "logs") as running:
        for name in ("a", "b"):
            await running.load_adapter(name, adapter(base, name))
        yield running


def server_pid(group: EngineGroup) -> int:
    return int((group.config.base / "logs" / "engine.log").read_text().split()[0])


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110 - other processes set no events
            await asyncio.sleep(0.01)


async def away(group: EngineGroup) -> None:
    await eventually(lambda: not group.running)


@pytest.mark.parametrize(
    "end", [signal.SIGKILL, signal.SIGSTOP, signal.SIGUSR1], ids=["it crashes", "it hangs", "its core hangs"]
)
async def test_requests_wait_for_an_engine_that_comes_back_with_its_adapters(group: EngineGroup, end: signal.Signals):
    first = server_pid(group)
    async with group.at("a") as before:
        pass
    os.kill(first, end)
    await away(group)
    async with group.at("a") as after:
        assert after.url != before.url
        _, names = await group.replicas[0].api.models()
        assert set(names) == {"a", "b"}
    assert not alive(first)
    assert str(first) in (group.config.base / "logs" / "engine.log.1").read_text()


async def test_an_adapter_unloaded_meanwhile_does_not_come_back(group: EngineGroup):
    os.kill(server_pid(group), signal.SIGKILL)
    await away(group)
    await group.unload_adapter("a")
    async with group.at("base"):
        assert set((await group.replicas[0].api.models())[1]) == {"b"}


async def test_an_adapter_whose_files_were_changed_does_not_come_back_under_its_name(group: EngineGroup):
    adapter(group.config.base, "a", value=1)
    os.kill(server_pid(group), signal.SIGKILL)
    await away(group)
    async with group.at("b"):
        pass
    with pytest.raises(MixfuseError, match="a was changed after it was loaded") as caught:
        async with group.at("a"):
            pass
    assert caught.value.kind == "engine"
    await group.unload_adapter("a")
    await group.load_adapter("a", adapter(group.config.base, "a", value=1))
    async with group.at("a"):
        pass


async def test_who_waits_too_long_is_told_so(base: Path, in_place_of_vllm):
    never = SOON.model_copy(update={"first_delay_s": 600, "max_delay_s": 600, "wait_s": 0.1})
    async with EngineGroup(EngineConfig(base=base, restart=never), logs=base / "logs") as group:
        os.kill(server_pid(group), signal.SIGKILL)
        await away(group)
        with pytest.raises(MixfuseError, match=r"no engine was ready within 0\.1 s \(the engine died") as caught:
            async with group.at("base"):
                pass
        assert caught.value.kind == "engine"
        with pytest.raises(MixfuseError, match=r"no engine was ready within 0\.1 s \(the engine died"):
            await group.ready()
        with pytest.raises(MixfuseError, match="no engine is ready"):
            await group.load_adapter("a", adapter(base, "a"))


async def test_an_engine_that_crashes_again_and_again_is_given_up(group: EngineGroup, in_place_of_vllm):
    in_place_of_vllm([sys.executable, "-c", "raise ValueError('no memory left')"])
    os.kill(server_pid(group), signal.SIGKILL)
    async with asyncio.timeout(60):
        failure = await group.failed()
    assert "given up after 5 crashes in a row, without 300 s of health between them; the last: " in str(failure)
    assert "ValueError: no memory left" in str(failure)
    with pytest.raises(MixfuseError, match="given up after 5 crashes"):
        async with group.at("base"):
            pass


def test_pauses_double_to_a_limit_and_differ(base: Path):
    restart = Restart(first_delay_s=1, max_delay_s=8)
    replica = EngineGroup(EngineConfig(base=base, restart=restart), logs=base)._own_replicas()[0]
    for longest in (1, 2, 4, 8, 8):
        replica._crashes += 1
        pauses = {replica._pause() for _ in range(50)}
        assert len(pauses) > 1
        assert longest / 2 <= min(pauses)
        assert longest / 2 * 1.2 < max(pauses) <= longest


def test_a_killed_parent_leaves_no_process_amid_a_restart(base: Path):
    """The parent is killed while the engine that is to replace a crashed one starts."""
    script = inspect.cleandoc(f"""
        import asyncio, os, sys
        from pathlib import Path
        from mixfuse.serve import engine
        from mixfuse.serve.engine_group import EngineGroup
        base = Path(sys.argv[1])
        once = "import os, time; os.write(1, b'%d' % os.getpid()); time.sleep(600)"
        programs = [{PROGRAM}, [sys.executable, "-c", once]]
        engine.find_spec = lambda name: name
        engine.command = lambda config, port, template: [*(programs.pop(0)), str(port)]
        async def main():
            config = engine.EngineConfig(base=base, restart=engine.Restart(first_delay_s=0))
            async with EngineGroup(config, logs=base) as group:
                print("up", flush=True)
                await group.failed()
        asyncio.run(main())
    """)
    log = base / "engine.log"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(base)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == "up\n"
        first = int(log.read_text())
        os.kill(first, signal.SIGKILL)
        until(lambda: log.with_name("engine.log.1").exists() and log.exists() and log.read_text())
        second = int(log.read_text())
        assert alive(second)
        parent.kill()
        until(lambda: not alive(first) and not alive(second))


@pytest.fixture
def others() -> Iterator[list[StandIn]]:
    """Two engines that someone else runs."""
    made = [StandIn(api_key="secret"), StandIn(api_key="secret")]
    yield made
    for stand_in in made:
        stand_in.stop()


@pytest.fixture
def external(base: Path, others: list[StandIn], monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    monkeypatch.setenv("ENGINE_KEY", "secret")
    return EngineConfig(base=base, urls=[stand_in.url for stand_in in others], api_key_env="ENGINE_KEY", restart=SOON)


async def test_an_adapter_reaches_all_engines_or_none(external: EngineConfig, others: list[StandIn]):
    async with EngineGroup(external, logs=external.base) as group:
        others[1].refused.add("a")
        with pytest.raises(MixfuseError, match="a is not welcome") as caught:
            await group.load_adapter("a", adapter(external.base, "a"))
        assert caught.value.kind == "adapter"
        assert [stand_in.adapters for stand_in in others] == [{}, {}]

        others[1].refused.clear()
        await group.load_adapter("a", adapter(external.base, "a"))
        await group.probe("a")
        assert [set(stand_in.adapters) for stand_in in others] == [{"a"}, {"a"}]
        await group.unload_adapter("a")
        assert [stand_in.adapters for stand_in in others] == [{}, {}]
        with pytest.raises(MixfuseError, match="no adapter 'a' is loaded"):
            await group.unload_adapter("a")


async def test_requests_go_where_the_least_is_under_way(external: EngineConfig):
    async with EngineGroup(external, logs=external.base) as group:
        async with group.at("base") as first, group.at("base") as second:
            assert {first.url, second.url} == set(external.external)
            assert first.api_key == "secret"
        async with group.at("base") as held:
            for _ in range(3):
                async with group.at("base") as other:
                    assert other.url != held.url
        idle = set()
        for _ in range(2):
            async with group.at("base") as address:
                idle.add(address.url)
        assert idle == set(external.external)


async def test_an_engine_that_comes_back_takes_requests_once_it_has_every_adapter(
    external: EngineConfig, others: list[StandIn]
):
    async with EngineGroup(external, logs=external.base) as group:
        await group.load_adapter("a", adapter(external.base, "a"))
        others[0].stop()
        others[0].adapters.clear()
        replica = group.replicas[0]
        await eventually(lambda: not replica.ready)
        for _ in range(3):
            async with group.at("a") as address:
                assert address.url == external.external[1]
        await group.load_adapter("b", adapter(external.base, "b"))
        await group.unload_adapter("a")
        others[0].start()
        seen: list[set[str]] = []
        await eventually(lambda: seen.append(set(others[0].adapters)) or replica.ready)
        assert {"a"} not in seen
        assert set(others[0].adapters) == {"b"}


class Failing(OwnEngine):
    """An engine whose starts, or lives, take half an hour each and then fail."""

    def __init__(self, restart: Restart, pass_time: Callable[[float], None], *, starts: bool) -> None:
        self.api = StandInApi()
        self._restart, self._pass_time, self._starts, self.ups = restart, pass_time, starts, 0

    async def up(self) -> None:
        self.ups += 1
        if not self._starts:
            self._pass_time(1800)
            raise MixfuseError("no memory left", kind="engine")

    async def gone(self, last_load: Callable[[], float]) -> str:
        self._pass_time(1800)
        return "the engine died"

    async def down(self) -> None:
        pass


class StandInApi(VllmApi):
    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:9/v1", None, base_model_name="base", hint="")

    async def models(self, *, timeout_s: float = 10) -> tuple[str, dict[str, str | None]]:
        return "base", {}


@pytest.mark.parametrize("starts", [False, True], ids=["fails at each start", "crashes after half an hour of health"])
async def test_failures_are_counted_however_far_apart_they_are(monkeypatch: pytest.MonkeyPatch, starts: bool):
    loop, passed = asyncio.get_running_loop(), [0.0]
    real = loop.time
    monkeypatch.setattr(loop, "time", lambda: real() + passed[0])

    def pass_time(seconds: float) -> None:
        passed[0] += seconds

    restart = SOON.model_copy(update={"crashes": 3, "first_delay_s": 0})
    source = Failing(restart, pass_time, starts=starts)
    replica = Replica(source, Wanted(), restart, 4, lambda: None)
    if starts:
        await replica.start()
    replica.supervise()
    for _ in range(10_000):
        await asyncio.sleep(0)  # a limit in seconds would be over at once
        if replica.failure or source.ups > 20:
            break
    assert (replica.failure is None) == starts
    assert starts or "given up after 3 crashes in a row" in str(replica.failure)
    await replica.stop()


async def test_the_load_of_a_large_adapter_is_no_hang(group: EngineGroup):
    first, large = server_pid(group), adapter(group.config.base, "large")
    (large / "seconds").write_text(str(1.5 * SOON.hung_after_s))
    await group.load_adapter("large", large)
    await group.probe("large")
    assert group.running
    assert server_pid(group) == first
    os.kill(first, signal.SIGUSR1)  # and after it, a hang is one
    await away(group)


async def test_an_adapter_that_was_deleted_in_the_engine_comes_back(group: EngineGroup, caplog):
    await group.replicas[0].api.unload_adapter("a")
    await eventually(lambda: "'a' again" in caplog.text)
    assert re.search(r"the engine at \S+ has lost 'a'; it is loaded again", caplog.text)
    assert set((await group.replicas[0].api.models())[1]) == {"a", "b"}
    assert group.trouble("a") is None
    async with group.at("a"):
        pass


async def test_an_adapter_that_was_refused_is_tried_again(
    external: EngineConfig, others: list[StandIn], monkeypatch: pytest.MonkeyPatch, caplog
):
    monkeypatch.setattr(supervisor, "RETRY_S", 0.3)
    async with EngineGroup(external, logs=external.base) as group:
        await group.load_adapter("a", adapter(external.base, "a"))
        others[0].refused.add("a")
        del others[0].adapters["a"]
        await eventually(lambda: "not welcome" in group.replicas[0].lost.get("a", ""))
        await asyncio.sleep(10 * SOON.check_s)
        assert caplog.text.count("is not served by") == 1, "it is said once"
        others[0].refused.clear()
        await eventually(lambda: "a" in others[0].adapters)
        await eventually(lambda: not group.replicas[0].lost)


async def test_requests_wait_for_an_adapter_that_is_loaded_again(external: EngineConfig, others: list[StandIn]):
    others[1].stop()
    async with EngineGroup(external, logs=external.base) as group:
        large = adapter(external.base, "a")
        await group.load_adapter("a", large)
        (large / "seconds").write_text("0.5")
        others[0].adapters.clear()
        await eventually(lambda: group.replicas[0].mending)
        async with group.at("a"):
            assert "a" in others[0].adapters


async def test_a_load_that_ends_after_the_gateway_is_not_left_in_the_engine(
    external: EngineConfig, others: list[StandIn]
):
    """It had lost the adapter; vLLM cannot stop a load half-way."""
    async with EngineGroup(external, logs=external.base) as group:
        large = adapter(external.base, "a~me")
        await group.load_adapter("a~me", large)
        (large / "seconds").write_text("1")
        others[0].adapters.clear()
        async with asyncio.timeout(60):
            while others[0].works.is_set():  # noqa: ASYNC110 - the engine's work
                await asyncio.sleep(0.01)
    assert await group.unload_of("me")
    await asyncio.to_thread(others[0].works.wait, 60)
    await asyncio.sleep(0.1)
    assert [other.adapters for other in others] == [{}, {}]


async def test_another_adapter_under_the_name_is_replaced(external: EngineConfig, others: list[StandIn]):
    async with EngineGroup(external, logs=external.base) as group:
        await group.load_adapter("a", adapter(external.base, "a"))
        ours = dict(others[0].adapters)
        others[0].adapters["a"] = "/elsewhere"
        await eventually(lambda: others[0].adapters == ours)


async def test_a_role_that_an_engine_cannot_serve_is_said_and_a_swap_to_the_same_directory_mends_it(
    external: EngineConfig, others: list[StandIn], made, caplog
):
    async with EngineGroup(external, logs=external.base) as group:
        engine = SayingEngines(group)
        swapper = table(engine, "domain", "judge")
        await swapper.swap("domain", made(1))
        model = swapper.table.serving()["domain"].model
        fusion = validate(
            {"members": [{"name": "one", "role": "domain"}], "trace_db": str(external.base / "t.sqlite3")},
            FusionConfig,
            source="x",
        )
        admin = routes(swapper, None, Gates(swapper, LeasedRoles(swapper.table, group), fusion, GateConfig()))
        app = create_app(fusion, LeasedRoles(swapper.table, group), extra_routes=admin, troubles=swapper.table.troubles)

        async def get(path: str) -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                return await client.get(path)

        async def row() -> dict[str, Any]:
            rows = (await get("/admin/roles")).json()["roles"]
            return next(row for row in rows if row["role"] == "domain")

        assert (await row())["loaded"]
        assert (await get("/readyz")).json() == {"status": "ok", "problems": []}
        for stand_in, replica in zip(others, group.replicas, strict=True):
            stand_in.refused.add(model)
            stand_in.adapters.clear()
            await eventually(lambda replica=replica: "welcome" in replica.lost.get(model, ""))
            assert not (await row())["loaded"]
            assert "is not welcome" in (await row())["problem"]
            ready = await get("/readyz")
            assert ready.status_code == (200 if stand_in is others[0] else 503), ready.text
            assert any(f"role domain: vLLM refused load_lora_adapter of '{model}'" in said
                       for said in ready.json()["problems"])  # fmt: skip
        assert f"'{model}' is not served by" in caplog.text
        with pytest.raises(MixfuseError, match="is not welcome"):
            await swapper.swap("domain", made(1))
        for stand_in in others:
            stand_in.refused.clear()
        await swapper.swap("domain", made(1))
        assert (await row())["loaded"]
        assert (await get("/readyz")).status_code == 200
        assert all(set(stand_in.adapters) == {model} for stand_in in others)


async def test_a_request_that_finds_its_adapter_deleted_is_answered_all_the_same(external, others: list[StandIn], made):
    """Between two comparisons, which are five seconds apart by default."""
    seldom = external.model_copy(update={"restart": Restart(check_s=3600)})
    async with EngineGroup(seldom, logs=external.base) as group:
        swapper = table(SayingEngines(group), "domain")
        await swapper.swap("domain", made(1))
        model = swapper.table.serving()["domain"].model
        roles = LeasedRoles(swapper.table, group)
        purpose = Purpose("answer", "domain", timeout_s=20)
        async with Pool(roles) as pool, roles.lease("domain") as endpoint:
            for stand_in in others:
                stand_in.adapters.clear()
            ledger = Ledger()
            answer = await call(
                pool.client, endpoint, [{"role": "user", "content": "x"}], {}, purpose=purpose, ledger=ledger
            )
            assert answer.text == f"said by {model}"
            assert [line.outcome for line in ledger.calls] == ["upstream_error", "ok"]
            assert all(set(stand_in.adapters) == {model} for stand_in in others)
            for stand_in in others:
                stand_in.adapters.clear()
                stand_in.refused.add(model)
            with pytest.raises(CallError, match="does not exist"):
                await call(
                    pool.client, endpoint, [{"role": "user", "content": "x"}], {}, purpose=purpose, ledger=ledger
                )


class SayingEngines:
    """Engines without a model, whose adapters say something else than their base."""

    started = None

    def __init__(self, group: EngineGroup) -> None:
        self._group = group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    async def prompt_logprobs(self, name: str, prompt: list[int]) -> list[float]:
        return [-1.0 if name == "base" else -2.0] * (len(prompt) - 1)

    async def busy(self) -> bool:
        return False

    def each(self) -> "list[SayingEngines]":
        return [self]

    async def ranks(self) -> "list[SayingEngines]":
        return [self]

    async def max_model_len(self) -> None:
        return None

    async def decode(self, name: str, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
        return [7] * tokens, (await self.prompt_logprobs(name, [*prompt, *[7] * tokens]))[-tokens:]


async def test_a_restart_waits_for_every_process_of_the_last_start(base: Path, in_place_of_vllm):
    """A worker that left its process group outlives the engine's end."""
    worker = "import os, time; os.write(1, b'worker %d\\n' % os.getpid()); time.sleep(600)"
    script = (
        f"import subprocess, sys, os; subprocess.Popen([sys.executable, '-c', {worker!r}], start_new_session=True); "
    )
    script += f"os.execv(sys.executable, {PROGRAM} + sys.argv[1:])"
    in_place_of_vllm([sys.executable, "-c", script])
    log = base / "logs" / "engine.log"

    def workers() -> list[int]:
        return [int(pid) for pid in re.findall(r"worker (\d+)\n", log.read_text())]

    async with EngineGroup(EngineConfig(base=base, restart=SOON), logs=base / "logs") as group:
        await eventually(workers)
        (first,) = workers()
        (server,) = re.findall(r"^(\d+)$", log.read_text(), re.MULTILINE)
        os.kill(int(server), signal.SIGKILL)
        await away(group)
        async with group.at("base"):
            assert not alive(first)
        await eventually(workers)
    for pid in workers():
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


async def test_a_restart_waits_for_the_memory_of_the_gpus(base: Path, in_place_of_vllm, monkeypatch):
    monkeypatch.setattr(engine_module, "cpu_build", lambda: False)
    program, used = base / "nvidia-smi", base / "used"
    program.write_text(f"#!/bin/sh\ncat {used}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{base}:{os.environ['PATH']}")
    used.write_text("10\n20\n")
    async with EngineGroup(EngineConfig(base=base, restart=SOON), logs=base / "logs") as group:
        used.write_text("10\n70000\n")
        os.kill(server_pid(group), signal.SIGKILL)
        await away(group)
        await asyncio.sleep(1)
        assert not group.running
        used.write_text("10\n30\n")
        async with group.at("base"):
            pass


async def test_an_engine_that_was_started_anew_between_two_looks_gets_its_adapters(
    external: EngineConfig, others: list[StandIn]
):
    async with EngineGroup(external, logs=external.base) as group:
        await group.load_adapter("a", adapter(external.base, "a"))
        others[0].adapters.clear()
        await eventually(lambda: others[0].adapters)


async def test_an_engine_without_an_adapter_that_cannot_be_given_back_serves_the_others(
    external: EngineConfig, others: list[StandIn]
):
    async with EngineGroup(external, logs=external.base) as group:
        for name in ("a", "b"):
            await group.load_adapter(name, adapter(external.base, name))
        adapter(external.base, "a", value=1)
        others[0].adapters.clear()
        await eventually(lambda: "a" in group.replicas[0].lost)
        await eventually(lambda: set(others[0].adapters) == {"b"})
        assert group.replicas[0].ready
        for _ in range(3):
            async with group.at("a") as address:
                assert address.url == external.external[1]


async def test_an_engine_that_lets_anybody_in_is_named(external: EngineConfig, others: list[StandIn], caplog):
    others[1].doors = True
    async with EngineGroup(external, logs=external.base):
        pass
    (warning,) = [record.message for record in caplog.records if "without a key" in record.message]
    assert external.external[1] in warning
    assert "(POST /adapters, DELETE /adapters/mixfuse-no-such-adapter, POST /invocations)" in warning
    assert "--middleware mixfuse.serve.vllm_key.EveryRouteNeedsTheKey" in warning


async def test_an_adapter_left_from_before_is_replaced(external: EngineConfig, others: list[StandIn]):
    others[0].adapters["a"] = "/elsewhere"
    async with EngineGroup(external, logs=external.base) as group:
        await group.load_adapter("a", adapter(external.base, "a"))
    assert others[0].adapters["a"] == str((external.base / "a").resolve())


async def test_each_data_parallel_copy_is_asked_alone_and_uses_what_its_cache_must_keep(
    external: EngineConfig, others: list[StandIn]
):
    """Each has a cache of its own, and without the header vLLM chooses one."""
    config = external.model_copy(update={"max_loras": 1, "max_cpu_loras": 1})
    async with EngineGroup(config, logs=external.base) as group:
        others[0].ranks = 3
        asked = [await rank.prompt_logprobs("base", [1, 2]) for one in group.each() for rank in await one.ranks()]
        assert asked == [[-1.0]] * 4
        assert others[0].asked == [(str(rank), "base") for rank in range(3)]
        assert others[1].asked == [(None, "base")]
        await group.load_adapter("a", adapter(external.base, "a"))
        others[0].asked.clear()
        await group.load_adapter("b", adapter(external.base, "b"))
        assert sorted(others[0].asked) == [(str(rank), "a") for rank in range(3)]


async def test_a_role_that_has_to_be_loaded_waits_for_an_engine(
    external: EngineConfig, others: list[StandIn], made: Callable[..., Path]
):
    """As a role that is loaded does: a request may not hang on which of them had a place when the engines went away."""
    async with EngineGroup(external, logs=external.base) as group:
        swapper = table(SayingEngines(group), "domain", "judge", max_loaded=1)
        for role in ("domain", "judge"):
            await swapper.swap(role, made(1, role))
        for stand_in in others:
            stand_in.stop()
        await eventually(lambda: not group.running)
        waiting = []
        for role in ("domain", "judge"):  # `judge` has the place, and makes room
            waiting.append(asyncio.create_task(answering(swapper, role)))
            done, _ = await asyncio.wait(waiting, timeout=0.3)
            assert not done
        others[1].start()
        assert [(await task).partition("@")[0] for task in waiting] == ["domain", "judge"]
        others[1].stop()
        await eventually(lambda: not group.running)
        waiting = [asyncio.create_task(answering(swapper, "domain"))]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(30):
            await swapper.close()  # the server ends now, not after wait_s
        waiting[0].cancel()
        await asyncio.wait(waiting)


async def answering(swapper: Swapper, role: str) -> str:
    """The model that answers for a role, once it can."""
    async with swapper.table.lease(role) as revision, swapper.table.engine.at(revision.model):
        return revision.model


async def test_one_engine_of_someone_else_is_enough_to_begin(external: EngineConfig, others: list[StandIn]):
    others[1].stop()
    async with EngineGroup(external, logs=external.base) as group:
        await group.load_adapter("a", adapter(external.base, "a"))
        others[1].start()
        await eventually(lambda: group.replicas[1].ready)
        assert set(others[1].adapters) == {"a"}
    others[0].stop()
    others[1].stop()
    with pytest.raises(MixfuseError, match="does not answer"):
        await EngineGroup(external, logs=external.base).start()


async def test_engines_of_different_models_are_told_apart(external: EngineConfig, others: list[StandIn]):
    async with EngineGroup(external, logs=external.base) as group:
        others[1].logprob = -3.0
        with pytest.raises(MixfuseError, match="do both serve the same base"):
            await group.prompt_logprobs("base", [1, 2])
        others[1].logprob = -1.01
        assert await group.prompt_logprobs("base", [1, 2]) == [-1.0]
    others[1].name = "another"
    async with EngineGroup(external, logs=external.base) as group:
        assert [replica.ready for replica in group.replicas] == [True, False]
        assert "serves 'another'" in group.replicas[1].away


async def test_a_lease_of_a_role_waits_for_the_engine(group: EngineGroup):
    fingerprint = Fingerprint(config="", tokenizer="", chat_template="", weights="")
    roles = LeasedRoles(RoleTable(group, ["domain"], Admission(fingerprint, max_rank=8)), group)
    os.kill(server_pid(group), signal.SIGKILL)
    await away(group)
    async with roles.lease("domain") as endpoint:
        assert endpoint == Endpoint(group.replicas[0].api.url, "base", group.replicas[0].api.api_key, None)


async def test_a_missing_key_of_an_external_engine_is_named(external: EngineConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ENGINE_KEY")
    with pytest.raises(MixfuseError, match="ENGINE_KEY is not set"):
        await EngineGroup(external, logs=external.base).start()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"url": "10.0.0.5:8000"}, "not a URL"),
        ({"url": "http://a", "urls": ["http://b"]}, "not both"),
        ({"urls": ["http://a/v1", "http://a"]}, "twice"),
        ({"url": "http://a", "replicas": 2}, "started here"),
        ({"api_key_env": "X"}, "api_key_env"),
        ({"port": 8000, "replicas": 2}, "share one port"),
        ({"extra_args": ["--disable-log-stats"]}, "a long queue from a hang"),
        ({"max_cpu_loras": 2, "max_loras": 4}, "at least `max_loras`"),
    ],
)
def test_contradictions_are_refused(base: Path, changes: dict[str, object], words: str):
    with pytest.raises(ValidationError, match=words):
        EngineConfig(base=base, **changes)


def test_each_replica_has_its_own_gpus(base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = EngineConfig(base=base, replicas=2, extra_args=["--tensor-parallel-size=2"])
    assert [one.env["CUDA_VISIBLE_DEVICES"] for one in per_replica(config, cpu=False)] == ["0,1", "2,3"]
    copies = EngineConfig(base=base, replicas=2, extra_args=["-dp", "2"])
    assert [one.env["CUDA_VISIBLE_DEVICES"] for one in per_replica(copies, cpu=False)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with pytest.raises(MixfuseError, match="need 4 GPUs"):
        per_replica(config, cpu=False)
