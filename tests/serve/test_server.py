"""`mixfuse serve` as a user runs it: one process, asked over HTTP, changed by `mixfuse roles`, ended by Ctrl-C."""

import asyncio
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from mixfuse.contracts import adapter

MIXFUSE = [sys.executable, "-m", "mixfuse"]
HANGS_S = 600
"""Nothing here takes so long on a busy machine; what does hangs."""
# Random weights may end an answer before it has begun, which is no answer.
SPEAKS = {"extra_body": {"min_tokens": 4}, "timeout_s": HANGS_S}


def mixfuse(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MIXFUSE, *map(str, arguments)], capture_output=True, text=True, timeout=HANGS_S, check=False
    )


def one_line_error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mixfuse: error: ")]
    assert "Traceback" not in done.stderr
    return line


def serve_config(tiny, folder: Path, **changes) -> Path:
    config = {
        "engine": {
            "base": str(tiny.base),
            "max_loras": 2,
            "max_loaded": 2,
            "max_num_seqs": 16,
            "max_lora_rank": 8,
            "start_timeout_s": 900,
            "restart": {"hung_after_s": HANGS_S},
        },
        "gateway": {"port": 0},
        "roles": {"domain": str(tiny.served["one"]), "judge": None, "spare": None},
        "roles_poll_s": 0.2,
        "watch": str(folder / "watched"),
        "fusion": {
            "members": [
                {"name": "base", "role": "base", **SPEAKS},
                {"name": "expert", "role": "domain", "samples": 2, **SPEAKS},
            ],
            "judge": {"role": "judge", "timeout_s": HANGS_S},
            "synthesizer": {"role": "domain", **SPEAKS},
            "modes": {"deadline_ms": HANGS_S * 1000},
            "trace_db": str(folder / "traces.sqlite3"),
        },
        "logs": str(folder / "logs"),
        **changes,
    }
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[str]
    watched: Path


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("serve")
    process = subprocess.Popen([*MIXFUSE, "serve", serve_config(tiny, folder)], stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"ready: (http://[\d.:]+)/v1", line):
            # Read on, or the pipe fills and the server stands still.
            reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
            reader.start()
            assert f"domain={revision(tiny.served['one'])} from the config" in line
            yield Server(found[1], process, folder / "watched")
            break
    else:
        pytest.fail("".join(lines))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=HANGS_S) == 0
    reader.join()
    process.stderr.close()
    assert not [line for line in lines if "Traceback" in line], "".join(lines)


@pytest.fixture
def client(server: Server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=HANGS_S) as made:
        yield made


def fetched(server: Server, path: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", timeout=HANGS_S).raise_for_status()


def serving(server: Server) -> dict[str, str | None]:
    rows = fetched(server, "/admin/roles").json()["roles"]
    return {row["role"]: row["revision"] for row in rows}


def revision(directory: Path) -> str:
    return json.loads((directory / "manifest.json").read_text())["revision"]


pytestmark = pytest.mark.engine


def test_every_mode_and_member_answers(client: openai.OpenAI):
    names = {model.id for model in client.models.list()}
    assert {"fusion/best-of", "fusion/merge", "fusion/debate", "base", "expert", "domain", "judge"} <= names
    for model in ("fusion/best-of", "fusion/merge", "fusion/debate", "base", "expert", "judge"):
        answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=4)
        assert answer.choices[0].message.content is not None, model  # random weights may say an empty token
        assert answer.usage.total_tokens > 0, model


def test_the_fused_answer_says_which_revision_gave_it(client: openai.OpenAI, server: Server, tiny):
    answer = client.chat.completions.create(
        model="fusion/best-of", messages=[{"role": "user", "content": "hello"}], max_tokens=4
    )
    trace = fetched(server, f"/v1/traces/{answer.model_extra['fusion']['trace_id']}").json()
    domain = {call["revision"] for call in trace["calls"] if call["member"] == "expert"}
    assert domain <= set(serving(server).values()) - {None}
    assert domain


async def test_a_swap_under_load_loses_no_request(server: Server, tiny):
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=HANGS_S)
    first, second = tiny.served["one"], tiny.served["experts"]
    stop = asyncio.Event()
    answered = 0

    async def keep_asking(model: str) -> None:
        nonlocal answered
        while not stop.is_set():
            answer = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "count to ten"}], max_tokens=12
            )
            assert answer.choices[0].finish_reason
            answered += 1

    async def more_answers(wanted: int) -> None:
        while answered < wanted:  # noqa: ASYNC110 - a counter of several tasks
            await asyncio.sleep(0.01)

    async def swap_to_and_fro() -> None:
        try:
            for directory in (second, first):  # probes make pauses: each takes a minute beside other tests
                before = answered
                done = await asyncio.to_thread(mixfuse, "roles", "swap", "domain", directory, "--url", server.url)
                assert done.returncode == 0, done.stderr
                assert serving(server)["domain"] == revision(directory)
                await asyncio.wait_for(more_answers(before + 3), timeout=HANGS_S)
        finally:
            stop.set()

    async with client, asyncio.TaskGroup() as group:
        group.create_task(swap_to_and_fro())
        for model in ("domain", "domain", "expert", "base", "fusion/best-of"):
            group.create_task(keep_asking(model))
    assert answered >= 12


def test_the_judge_role_is_swapped_listed_and_evaluated(server: Server, tiny, tmp_path: Path):
    done = mixfuse("roles", "swap", "judge", tiny.served["two"], "--url", server.url)
    assert done.returncode == 0, done.stderr
    listed = mixfuse("roles", "list", "--url", server.url)
    assert revision(tiny.served["two"]) in listed.stdout
    again = mixfuse("roles", "swap", "judge", tiny.served["two"], "--url", server.url)
    assert "serving already" in again.stdout

    data = tmp_path / "pairs.jsonl"
    rows = [
        {"id": str(n), "prompt": f"{n} + 1 =", "response_a": {"model": "x", "text": str(n + 1)},
         "response_b": {"model": "y", "text": "no idea"}, "label": "A", "votes": ["A"]}
        for n in range(3)
    ]  # fmt: skip
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = mixfuse("eval", "judge", "--judge", "judge", "--data", data, "--url", server.url, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["n"] == 3
    assert {"both_orders_correct", "first_order", "consistency", "parse_failures"} <= figures.keys()


def history(server: Server, role: str) -> list[dict]:
    return fetched(server, f"/admin/roles/{role}/history").json()["history"]


def test_a_role_goes_back_and_its_history_says_so(server: Server, tiny):
    before = serving(server)["domain"]
    other = next(tiny.served[name] for name in ("one", "experts") if revision(tiny.served[name]) != before)
    assert mixfuse("roles", "swap", "domain", other, "--url", server.url).returncode == 0
    done = mixfuse("roles", "rollback", "domain", "--json", "--url", server.url)
    assert json.loads(done.stdout) == {"role": "domain", "old": revision(other), "new": before, "drained": 0}
    assert serving(server)["domain"] == before
    newest, swap, *_ = json.loads(mixfuse("roles", "history", "domain", "--json", "--url", server.url).stdout)
    assert (newest["why"], newest["old"], newest["new"]) == ("rollback", revision(other), before)
    assert (swap["why"], swap["outcome"], swap["directory"]) == ("swap", "ok", str(other))


def test_more_adapters_than_places(server: Server, client: openai.OpenAI, tiny):
    """Three roles in an engine of two places: each answers by its own adapter, the pinned one stays."""
    for role, name in (("spare", "chosen"), ("judge", "two")):
        assert mixfuse("roles", "swap", role, tiny.served[name], "--url", server.url).returncode == 0

    def loaded() -> set[str]:
        rows = fetched(server, "/admin/roles").json()["roles"]
        return {row["role"] for row in rows if row["loaded"] and row["revision"]}

    assert mixfuse("roles", "pin", "domain", "--url", server.url).returncode == 0
    for role in ("spare", "judge", "domain", "spare", "judge"):
        trace = client.chat.completions.create(
            model=role, messages=[{"role": "user", "content": "hi"}], max_tokens=2
        ).model_extra["fusion"]["trace_id"]
        (call,) = fetched(server, f"/v1/traces/{trace}").json()["calls"]
        assert call["revision"] == serving(server)[role]
        assert {"domain", role} <= loaded()
        assert len(loaded()) == 2
    assert "could not be served" in one_line_error(mixfuse("roles", "pin", "judge", "--url", server.url))
    assert mixfuse("roles", "unpin", "domain", "--url", server.url).returncode == 0
    metrics = fetched(server, "/metrics").text
    assert float(re.search(r"^mixfuse_adapter_evictions_total (\S+)", metrics, re.MULTILINE)[1]) >= 3
    assert f'mixfuse_role_revision{{revision="{serving(server)["spare"]}",role="spare"}} 1.0' in metrics


def test_what_is_put_into_the_watched_folder_is_swapped_in(server: Server, tiny):
    place = server.watched / "spare" / "new"
    shutil.copytree(tiny.served["experts"], place)
    wanted, deadline = revision(place), time.monotonic() + HANGS_S
    while serving(server)["spare"] != wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    assert serving(server)["spare"] == wanted
    assert history(server, "spare")[0]["why"] == "watch"


async def test_a_swap_goes_through_shadow_and_canary_and_another_is_refused(server: Server, tiny):
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=HANGS_S)
    stop = asyncio.Event()

    async def keep_asking() -> None:
        while not stop.is_set():
            await client.chat.completions.create(
                model="domain", messages=[{"role": "user", "content": "count to ten"}], max_tokens=4
            )

    async def swap(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(
            mixfuse, "roles", "swap", "domain", directory, "--url", server.url, "--limit", "max_latency_ratio=null",
            *arguments,
        )  # fmt: skip

    async def swaps() -> None:
        try:
            before = serving(server)["domain"]
            new = next(tiny.served[name] for name in ("one", "chosen") if revision(tiny.served[name]) != before)
            # Random adapters do not answer alike.
            done = await swap(new, "--shadow", "2", "--limit", "min_answer_agreement=1")
            assert "no swap: in the shadow of 2 requests, the share of like answers was 0" in one_line_error(done)
            assert serving(server)["domain"] == before
            done = await swap(new, "--shadow", "2", "--canary", "50%", "--requests", "3")
            assert done.returncode == 0, done.stderr
            assert f"domain: {before} -> {revision(new)} (within its limits" in done.stdout
            assert serving(server)["domain"] == revision(new)
        finally:
            stop.set()

    async with client, asyncio.TaskGroup() as group:
        group.create_task(swaps())
        for _ in range(2):
            group.create_task(keep_asking())
    promoted, refused, *_ = history(server, "domain")
    assert (promoted["why"], promoted["outcome"]) == ("canary", "ok")
    assert (refused["why"], refused["outcome"]) == ("shadow-rollback", "refused")
    assert "min_answer_agreement" in refused["error"]


def test_refused_swaps_leave_the_old_revision_serving(server: Server, client: openai.OpenAI, tiny, tmp_path: Path):
    from mixfuse.train.adapters.export import export

    tampered = tmp_path / "tampered"
    shutil.copytree(tiny.served["experts"], tampered)
    weights = tampered / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    foreign = tmp_path / "foreign"
    shutil.copytree(tiny.served["experts"], foreign)
    manifest = json.loads((foreign / "manifest.json").read_text())
    manifest["base"]["weights"] = "0" * 64
    (foreign / "manifest.json").write_text(json.dumps(manifest))

    wide = _with_rank(tiny, tmp_path, rank=16)
    export(wide, tmp_path / "wide", base=tiny.base)

    silent = _changed(tiny.served["experts"], tmp_path / "silent", lambda name, w: w * ("lora_A" in name))
    faint = _changed(tiny.served["experts"], tmp_path / "faint", lambda name, w: w if "lora_A" in name else w * 1e-9)
    broken = _changed(tiny.served["experts"], tmp_path / "broken", lambda name, w: w * math.nan)

    before = serving(server)
    refusals = {
        ("domain", tampered): "was changed after export",
        ("domain", foreign): "another base model",
        ("domain", tmp_path / "wide"): "rank 16 is above the engine's max_lora_rank 8",
        ("domain", tmp_path / "nothing"): "no such adapter directory",
        ("domain", tiny.fused["one"]): "mixfuse adapter export",
        ("domain", silent): "so the adapter does nothing",
        ("domain", faint): "too small for float32, so the adapter does nothing",
        ("domain", broken): "holds NaN or infinity",
        ("judge", tiny.served["experts"]): "judge protocol",
        ("nobody", tiny.served["one"]): "unknown role 'nobody'",
        ("base", tiny.served["one"]): "cannot be swapped",
    }
    for (role, directory), words in refusals.items():
        done = mixfuse("roles", "swap", role, directory, "--url", server.url)
        assert words in one_line_error(done)
        if role == "domain":
            newest = history(server, role)[0]
            assert newest["outcome"] == "refused"
            assert words in newest["error"]
    assert serving(server) == before
    answer = client.chat.completions.create(
        model="domain", messages=[{"role": "user", "content": "still there?"}], max_tokens=4
    )
    assert answer.choices[0].finish_reason


def test_ask_prints_the_answer_and_why(server: Server):
    done = mixfuse("ask", "hello", "--mode", "best_of", "--max-tokens", "4", "--url", server.url)
    assert done.returncode == 0, done.stderr
    assert "candidates ─" in done.stdout
    assert "trace-" in done.stdout


def test_a_gateway_port_in_use_is_named_before_the_engine_starts(tiny, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = mixfuse("serve", serve_config(tiny, tmp_path), f"gateway.port={port}")
    assert f"cannot listen on 127.0.0.1:{port}" in one_line_error(done)
    assert not (tmp_path / "logs").exists()


def test_a_role_nobody_serves_is_named(tiny, tmp_path: Path):
    done = mixfuse("serve", serve_config(tiny, tmp_path, roles={"judge": None}))
    assert "names the role 'domain'" in one_line_error(done)


def test_beyond_loopback_an_admin_key_is_demanded(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MIXFUSE_ADMIN_KEY", raising=False)
    done = mixfuse("serve", serve_config(tiny, tmp_path), "gateway.host=0.0.0.0")
    assert "MIXFUSE_ADMIN_KEY" in one_line_error(done)


def test_no_server_is_one_line(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert "no mixfuse server answers" in one_line_error(mixfuse("roles", "list", "--url", url))
        assert url.rsplit("/", 1)[1] in one_line_error(mixfuse("ask", "hello", "--url", url))


def _with_rank(tiny, folder: Path, *, rank: int) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(tiny.base, dtype=torch.float32)
    config = LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder / "rank")
    return folder / "rank"


def _changed(source: Path, target: Path, change: Callable[[str, Any], Any]) -> Path:
    """A whole adapter directory with other weights."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, target)
    weights = load_file(target / adapter.WEIGHTS)
    save_file({name: change(name, weight) for name, weight in weights.items()}, target / adapter.WEIGHTS)
    files = adapter.file_hashes(target)
    manifest = adapter.read_manifest(source).model_copy(update={"files": files, "revision": adapter.revision_of(files)})
    (target / adapter.MANIFEST).write_text(manifest.model_dump_json())
    return target
