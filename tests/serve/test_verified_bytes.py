"""What a real engine answers under a role's name is what was verified, whatever becomes of the directories.

vLLM's unload only forgets a name: the adapter stays in the cache of its workers, and pushes out others that serve.
"""

import asyncio
import json
import shutil
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry
from role_harness import revision
from transformers import AutoTokenizer

from mixfuse.app.engine_metrics import EngineMetrics
from mixfuse.contracts.adapter import (
    CONFIG,
    MANIFEST,
    PROBES,
    Effect,
    Probes,
    file_hashes,
    fingerprint,
    read_manifest,
    revision_of,
)
from mixfuse.contracts.agreement import effect_in
from mixfuse.contracts.errors import MixfuseError
from mixfuse.serve.admission import Admission
from mixfuse.serve.copies import AdapterCopies
from mixfuse.serve.engine import EngineConfig, Restart
from mixfuse.serve.engine_group import EngineGroup
from mixfuse.serve.roles import RoleTable
from mixfuse.serve.swap import Swapper
from mixfuse.train.adapters import parity

TEXT = "The quick brown fox jumps over 13 lazy dogs."
SWAPS = ("one", "attention", "rank 3", "chosen", "one", "attention")
pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group(tiny, tmp_path_factory: pytest.TempPathFactory):
    """An engine with fewer slots than roles."""
    often = Restart(check_s=0.5)
    config = EngineConfig(base=tiny.base, max_loras=2, max_num_seqs=8, threads=1, start_timeout_s=600, restart=often)
    config = config.for_roles(2)
    async with EngineGroup(config, logs=tmp_path_factory.mktemp("logs")) as running:
        yield running


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory):
    """They last as long as the engine, which may use an adapter of one test again in the next."""
    return AdapterCopies(tmp_path_factory.mktemp("copies"))


def distance(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


async def test_every_route_needs_the_key(group: EngineGroup):
    api = group.replicas[0].api
    root = api.url.removesuffix("/v1")
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        described = await client.get(f"{root}/openapi.json", headers={"Authorization": f"Bearer {api.api_key}"})
        routes = [(method, path) for path, methods in described.json()["paths"].items() for method in methods]
        assert {("post", "/adapters"), ("delete", "/adapters/{adapter_name}"), ("post", "/invocations")} <= set(routes)
        for method, path in [*routes, ("get", "/openapi.json"), ("get", "/docs"), ("get", "/metrics"), ("get", "/no")]:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {api.api_key}"}):
                answer = await client.request(method, root + path, headers=headers)
                assert answer.status_code == (200 if path == "/health" else 401), (method, path)
        assert (
            await client.get(f"{root}/metrics", headers={"Authorization": f"bearer {api.api_key}"})
        ).status_code == 200
    assert await api.open_doors() == []


async def test_the_engines_metrics_are_the_gateways(group: EngineGroup, tiny, copies: AdapterCopies):
    admission = Admission(fingerprint(tiny.base), max_rank=16, copies=copies)
    swapper = Swapper(RoleTable(group, ["judge"], admission))
    await swapper.swap("judge", tiny.served["two"])
    name = swapper.table.serving()["judge"].revision
    registry = CollectorRegistry()
    registry.register(EngineMetrics(group, swapper.table))
    api, asked = group.replicas[0].api, {"model": f"judge@{name}", "prompt": "x", "max_tokens": 900, "ignore_eos": True}

    def value(metric: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"mixfuse_engine_{metric}", {"engine": "0", **labels})

    def while_it_writes() -> bool:
        """Whether one look at the engine's metrics shows the adapter's request under way."""
        look = {
            (sample.name.removeprefix("mixfuse_engine_"), sample.labels.get("revision", name)): sample.value
            for metric in registry.collect()
            for sample in metric.samples
        }
        active, running = look.get(("adapter_active", name)), look.get(("requests_running", name))
        return active == running == 1 and 0 < look["kv_cache_usage", name] < 1

    seen = asyncio.Event()

    async def write_until_seen() -> None:
        while not seen.is_set():
            await api._post("completions", asked)  # it may end between two looks at the metrics

    writing = asyncio.create_task(write_until_seen())
    async with asyncio.timeout(300):
        while not while_it_writes():  # noqa: ASYNC110 - vLLM sets no events
            await asyncio.sleep(0.01)
    seen.set()
    assert value("ready") == 1
    await writing
    async with asyncio.timeout(60):
        while not value("generation_tokens_total", core="0") >= 900:  # noqa: ASYNC110 - vLLM sets no events
            await asyncio.sleep(0.2)
    assert value("time_to_first_token_seconds_count", core="0") > 0
    assert value("time_to_first_token_seconds_sum", core="0") > 0
    assert value("requests_waiting", core="0") == 0


async def test_a_worker_refuses_a_copy_that_is_not_what_it_is_named_after(group: EngineGroup, tiny, tmp_path: Path):
    copies = AdapterCopies(tmp_path / "copies")  # its own: what is changed here, no other test reads
    copy = copies.keep(tiny.served["one"], read_manifest(tiny.served["one"]).files)
    api = group.replicas[0].api
    await api.load_adapter("whole", copy)
    (copy / "adapter_config.json").chmod(0o600)
    (copy / "adapter_config.json").write_text((copy / "adapter_config.json").read_text() + " ")
    with pytest.raises(MixfuseError, match="is not what was verified"):
        await api.load_adapter("changed", copy)
    await api.unload_adapter("whole")
    assert await api.working(timeout_s=60)


def remade(source: Path, out: Path, *, alpha: float = 1, probes: Probes | None = None, effect: Effect | None = None):
    """An adapter directory with another alpha, with probes or the size of the effect alone, and right hashes."""
    shutil.copytree(source, out)
    settings = json.loads((out / CONFIG).read_text())
    (out / CONFIG).write_text(json.dumps(settings | {"lora_alpha": alpha * settings["lora_alpha"]}))
    if probes is not None:
        (out / PROBES).write_text(probes.model_dump_json())
    files = file_hashes(out)
    changes = {"files": files, "revision": revision_of(files), "effect": effect}
    (out / MANIFEST).write_text(read_manifest(source).model_copy(update=changes).model_dump_json())
    return out


async def test_a_swap_probes_the_engine(group: EngineGroup, tiny, copies: AdapterCopies, tmp_path: Path):
    """Short and long, alone and in a batch, read and written; the right adapter passes, one applied twice does not."""
    source = tiny.served["one"]
    probes = parity.reference(source, tiny.base, length=1000).probes()
    assert max(len(probe.tokens) for probe in probes.logprobs) == 1000
    effect = effect_in(probes.logprobs)
    admission = Admission(fingerprint(tiny.base), max_rank=16, copies=copies)
    swapper = Swapper(RoleTable(group, ["probed", "sized"], admission))
    await swapper.swap("probed", remade(source, tmp_path / "right", probes=probes))
    await swapper.swap("sized", remade(source, tmp_path / "sized", effect=effect))
    with pytest.raises(MixfuseError, match="its log-probabilities are off by"):
        await swapper.swap("probed", remade(source, tmp_path / "twice", alpha=2, probes=probes))
    with pytest.raises(MixfuseError, match="times as large as when the adapter was made"):
        await swapper.swap("sized", remade(source, tmp_path / "twice sized", alpha=2, effect=effect))
    tokens, written = await group.replicas[0].api.decode("base", probes.logprobs[0].tokens, 5)
    assert len(tokens) == len(written) == 5
    for role in ("probed", "sized"):
        await swapper.table.slots.remove(swapper.table.serving()[role])


async def test_an_idle_role_answers_with_its_verified_revision(
    group: EngineGroup, tiny, copies: AdapterCopies, tmp_path: Path
):
    idle, other = tmp_path / "idle", tiny.served["one"]
    shutil.copytree(tiny.served["experts"], idle)
    admission = Admission(fingerprint(tiny.base), max_rank=16, copies=copies)
    swapper = Swapper(RoleTable(group, ["idle", "domain"], admission))
    tokens = AutoTokenizer.from_pretrained(tiny.base)(TEXT).input_ids

    log = group.replicas[0]._source._engine.log_path
    before = log.read_text().count("Traceback")

    async def answer(role: str) -> list[float]:
        async with swapper.table.lease(role) as leased:
            return await group.prompt_logprobs(leased.model, tokens)

    await swapper.swap("idle", idle)
    verified = tiny.logprobs("experts", TEXT)
    assert distance(await answer("idle"), verified) < 1e-3
    for name in SWAPS[:3]:
        await swapper.swap("domain", tiny.served[name])
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(other / file, idle / file)
    assert distance(await answer("idle"), verified) < 1e-3
    assert distance(tiny.logprobs("one", TEXT), verified) > 0.1, "the other adapter answers otherwise"

    shutil.rmtree(idle)
    for name in SWAPS[3:]:
        await swapper.swap("domain", tiny.served[name])
        assert swapper.table.serving()["domain"].revision == revision(tiny.served[name])
        assert distance(await answer("domain"), tiny.logprobs(name, TEXT)) < 1e-3
    assert distance(await answer("idle"), verified) < 1e-3
    assert group.running
    assert log.read_text().count("Traceback") == before, "the engine failed meanwhile"
