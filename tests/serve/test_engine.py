"""The engine starts or says why not, serves every adapter as PEFT would, and leaves nothing behind."""

import asyncio
import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path
from typing import get_args

import httpx
import pytest
import pytest_asyncio
import torch
from injections import gains, injections, twin_of
from pydantic import ValidationError
from transformers import AutoTokenizer

from mixfuse.contracts import judge_protocol
from mixfuse.contracts.adapter import LORA_RANKS, verify
from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.answering.verdicts import LOGPROB_PARAMETERS, JudgeEndpoint, OrderedPair
from mixfuse.fusion.calls.ledger import Ledger
from mixfuse.fusion.calls.upstream import Endpoint, Purpose, http_client
from mixfuse.serve import cpu_lora_products
from mixfuse.serve import engine as engine_module
from mixfuse.serve import vllm_cpu_moe_lora as plugin
from mixfuse.serve.engine import Engine, EngineConfig
from mixfuse.train.adapters import parity

TEXTS = ["The quick brown fox jumps over 13 lazy dogs.", "Judge: A or B? Judge: A or B?", "yes"]
TOLERANCE = 1e-3
ADAPTERS = ("one", "two", "experts", "attention")
module_loop = pytest.mark.asyncio(loop_scope="module")


def config(base: Path, **changes) -> EngineConfig:
    return EngineConfig(base=base, max_model_len=1024, max_loras=4, max_num_seqs=16, threads=1, **changes)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tiny, tmp_path_factory: pytest.TempPathFactory):
    """One engine for all tests; every slot is taken, which is when vLLM's own CPU code mixes adapters up."""
    log_path = tmp_path_factory.mktemp("engine") / "engine.log"
    async with Engine(config(tiny.base, tool_parser="hermes"), log_path=log_path) as running:
        for name in ADAPTERS:
            await running.load_adapter(name, tiny.served[name])
        yield running


async def ask(engine: Engine, endpoint: str, method: str = "POST", **body) -> httpx.Response:
    headers = {"Authorization": f"Bearer {engine.api_key}"}
    async with httpx.AsyncClient(timeout=600, trust_env=False) as client:
        return await client.request(method, f"{engine.url}/{endpoint}", json=body or None, headers=headers)


async def logprobs(engine: Engine, model: str, text: str) -> list[float]:
    return await engine.prompt_logprobs(model, AutoTokenizer.from_pretrained(engine.config.base)(text).input_ids)


def distance(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


@pytest.mark.engine
@module_loop
@pytest.mark.parametrize("model", ["base", "one", "two"])
async def test_logprobs_are_those_of_transformers_and_peft(engine: Engine, tiny, model: str):
    for text in TEXTS:
        assert distance(await logprobs(engine, model, text), tiny.logprobs(model, text)) < TOLERANCE
    if model != "base":
        assert distance(tiny.logprobs(model, TEXTS[0]), tiny.logprobs("base", TEXTS[0])) > 100 * TOLERANCE


@pytest.mark.engine
@module_loop
async def test_verdicts_asked_for_in_one_call_are_those_of_single_calls(engine: Engine):
    pairs = [OrderedPair("Which is larger?", *answers, nonce="0123abcd") for answers in (("7", "9"), ("9", "7"))]
    asked = [pair.messages() for pair in pairs]
    async with http_client() as client:
        ledger = Ledger()
        judge = JudgeEndpoint(client, Endpoint(engine.url, "one", engine.api_key), Purpose("verdict", "judge"), ledger)
        together = await judge.ask_all(asked, LOGPROB_PARAMETERS)
        alone = [await judge.ask(messages, LOGPROB_PARAMETERS) for messages in asked]
    assert [call.outcome for call in ledger.calls] == ["ok"] * 4
    tops = [[top["logprob"] for top in reply.logprobs["content"][0]["top_logprobs"]] for reply in (*together, *alone)]
    assert len(tops[0]) == LOGPROB_PARAMETERS["top_logprobs"]
    for one, other in zip(tops[:2], tops[2:], strict=True):
        assert one == pytest.approx(other, abs=TOLERANCE)
    assert tops[0] != pytest.approx(tops[1], abs=10 * TOLERANCE)  # each answer belongs to its own chat
    for reply, single in zip(together, alone, strict=True):
        assert reply.text == single.text
        # The batch's usage is the sum over its chats; each verdict is accounted for with its share.
        assert reply.call.usage.completion_tokens == single.call.usage.completion_tokens == 1
    spent = [sum(call.usage.prompt_tokens for call in calls) for calls in (ledger.calls[:2], ledger.calls[2:])]
    assert spent[0] == spent[1]


@pytest.mark.engine
@module_loop
async def test_an_adapter_of_some_experts_of_some_layers(engine: Engine, tiny):
    """Its untouched experts are zeros, a layer without any is left out, and rsLoRA's scale arrives."""
    await engine.unload_adapter("two")
    try:
        await engine.load_adapter("chosen", tiny.served["chosen"])
        for text in TEXTS:
            assert distance(await logprobs(engine, "chosen", text), tiny.logprobs("chosen", text)) < TOLERANCE
        assert parity.reference(tiny.served["chosen"], tiny.base).expert_effect > 10 * TOLERANCE
    finally:
        await engine.unload_adapter("chosen")
        await engine.load_adapter("two", tiny.served["two"])


@pytest.mark.engine
@module_loop
@pytest.mark.parametrize("name", ["rank 12", "rank 3"])
async def test_a_rank_between_vllms_own_acts_as_in_peft(name: str, engine: Engine, tiny):
    """vLLM allocates the next of its own ranks."""
    await engine.unload_adapter("two")
    try:
        await engine.load_adapter(name, tiny.served[name])
        for text in TEXTS[:2]:
            served = await logprobs(engine, name, text)
            assert distance(served, tiny.logprobs(name, text)) < TOLERANCE
            assert distance(served, tiny.logprobs("two", text)) > 10 * TOLERANCE
    finally:
        await engine.unload_adapter(name)
        await engine.load_adapter("two", tiny.served["two"])


@pytest.mark.engine
def test_the_ranks_are_vllms():
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == LORA_RANKS


@pytest.mark.engine
@module_loop
async def test_base_and_adapters_share_a_batch(engine: Engine, tiny):
    requests = [(model, text) for text in TEXTS for model in ("base", "one", "two")] * 3
    answers = await asyncio.gather(*(logprobs(engine, model, text) for model, text in requests))
    for (model, text), answer in zip(requests, answers, strict=True):
        assert distance(answer, tiny.logprobs(model, text)) < TOLERANCE


@pytest.mark.engine
@module_loop
async def test_prefill_and_decode_of_all_kinds_of_adapters_and_none_share_batches(engine: Engine, tiny):
    """Answers are written, ten at once, for as long as five prompts are read. Each is as PEFT has it, within 1e-4."""
    names, tokens = ("base", *ADAPTERS), 48
    tokenizer = AutoTokenizer.from_pretrained(engine.config.base)
    all_read = asyncio.Event()

    async def write(model: str, prompt: list[int]) -> list[tuple[list[int], list[float]]]:
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        written = []
        while not all_read.is_set():
            response = await ask(engine, "completions", **body, logprobs=0, return_tokens_as_token_ids=True)
            sampled = response.json()["choices"][0]["logprobs"]
            written.append(
                ([int(token.removeprefix("token_id:")) for token in sampled["tokens"]], sampled["token_logprobs"])
            )
        return written

    async def steps() -> int:
        metrics = (await ask(engine, "../metrics", method="GET")).text
        return int(float(re.search(r"^vllm:iteration_tokens_total_count\{.*\} (\S+)$", metrics, re.MULTILINE)[1]))

    async def read_all() -> list[list[float]]:
        try:
            while await steps() < before + 3:  # noqa: ASYNC110 - vLLM sets no events
                await asyncio.sleep(0.02)
            return await asyncio.gather(*(logprobs(engine, name, TEXTS[0]) for name in names))
        finally:
            all_read.set()

    before = await steps()
    requests = [(name, tokenizer(text).input_ids) for name in names for text in TEXTS[:2]]
    read, *written = await asyncio.gather(read_all(), *(write(*request) for request in requests))
    taken, answers = await steps() - before, sum(map(len, written))
    # On a busy machine requests come one after the other, and fewer meet in a step.
    assert taken < answers * tokens / 1.5, (
        f"{answers} answers of {tokens} tokens took {taken} steps: too few shared one"
    )

    for name, answer in zip(names, read, strict=True):
        assert distance(answer, tiny.logprobs(name, TEXTS[0])) < 1e-4, name
    for (name, prompt), several in zip(requests, written, strict=True):
        for continuation, answer in several:
            assert distance(answer, tiny.logprobs(name, prompt + continuation)[-tokens:]) < 1e-4, name
    base = tiny.logprobs("base", TEXTS[0])
    assert all(distance(tiny.logprobs(name, TEXTS[0]), base) > 0.01 for name in ADAPTERS)


@pytest.mark.engine
@module_loop
async def test_vllm_silently_ignores_fused_experts_and_the_engine_refuses_them(engine: Engine, tiny):
    fused = tiny.fused["experts"]
    with pytest.raises(MixfuseError, match=r"silently ignore .*mlp\.experts") as caught:
        await engine.load_adapter("fused", fused)
    assert caught.value.kind == "adapter"

    loaded = await ask(engine, "load_lora_adapter", lora_name="fused", lora_path=str(fused))
    assert loaded.status_code == 200, "vLLM refuses fused experts now; the check in load_adapter can go"
    answer = await logprobs(engine, "fused", TEXTS[0])
    assert distance(answer, tiny.logprobs("base", TEXTS[0])) < TOLERANCE, "vLLM applies fused experts now"
    assert distance(answer, tiny.logprobs("experts", TEXTS[0])) > 100 * TOLERANCE
    await engine.unload_adapter("fused")


@pytest.mark.engine
@module_loop
async def test_the_parity_gate_passes_a_good_adapter_and_catches_the_silent_drop(engine: Engine, tiny, tmp_path: Path):
    directory = tmp_path / "one"
    shutil.copytree(tiny.served["one"], directory)
    expected_by_peft = parity.reference(directory, tiny.base)
    good = await parity.compare(
        expected_by_peft, lambda prompt: engine.prompt_logprobs("one", prompt), engine_name="vllm"
    )
    parity.check(directory, good)
    assert verify(directory).parity == good

    loaded = await ask(engine, "load_lora_adapter", lora_name="dropped", lora_path=str(tiny.fused["one"]))
    assert loaded.status_code == 200
    bad = await parity.compare(
        expected_by_peft, lambda prompt: engine.prompt_logprobs("dropped", prompt), engine_name="vllm"
    )
    with pytest.raises(MixfuseError, match=r"parity failed.*ignore them") as caught:
        parity.check(directory, bad)
    assert caught.value.kind == "parity"
    await engine.unload_adapter("dropped")


@pytest.mark.engine
@module_loop
async def test_verify_takes_a_running_engine_and_leaves_nothing_in_it(engine: Engine, tiny, tmp_path: Path):
    directory = tmp_path / "one"
    shutil.copytree(tiny.served["one"], directory)
    before = await engine.models()

    async def verified(key: str | None) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mixfuse", "adapter", "verify", str(directory)),
            *("--base", str(tiny.base), "--url", engine.url),
            env={**os.environ, "VLLM_API_KEY": key or ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        said, failed = await process.communicate()
        return process.returncode, (said + failed).decode()

    status, words = await verified("another key")
    assert status == 2
    assert "refused to list its models" in words
    assert verify(directory).parity is None
    status, words = await verified(engine.api_key)
    assert status == 0, words
    assert verify(directory).parity is not None
    assert await engine.models() == before


@pytest.mark.engine
@module_loop
async def test_an_adapter_comes_and_goes(engine: Engine, tiny):
    await engine.load_adapter("guest", tiny.served["experts"])
    assert distance(await logprobs(engine, "guest", TEXTS[0]), tiny.logprobs("experts", TEXTS[0])) < TOLERANCE
    with pytest.raises(MixfuseError, match="already been loaded"):
        await engine.load_adapter("guest", tiny.served["experts"])
    await engine.unload_adapter("guest")
    assert (await ask(engine, "completions", model="guest", prompt="x", max_tokens=1)).status_code == 404
    with pytest.raises(MixfuseError, match="cannot be found"):
        await engine.unload_adapter("guest")


@pytest.mark.engine
@module_loop
async def test_vllm_says_why_it_refuses_an_adapter(engine: Engine, tiny, tmp_path: Path):
    settings = json.loads((tiny.served["one"] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"r": 64}))
    (tmp_path / "adapter_model.safetensors").write_bytes(
        (tiny.served["one"] / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(MixfuseError, match="rank 64 is greater than"):
        await engine.load_adapter("large", tmp_path)


@pytest.mark.engine
@module_loop
async def test_an_engine_says_whether_it_is_busy(engine: Engine):
    """Its own metrics say so, and no longer once the request has been answered."""
    writing = asyncio.create_task(engine.decode("base", [1, 2, 3], 200))
    while not (busy := await engine.busy()) and not writing.done():
        pass
    await writing
    assert busy
    assert not await engine.busy()


async def test_chat_gives_the_top_logprobs_a_verdict_is_read_from(engine: Engine):
    messages = [{"role": "user", "content": "A or B?"}]
    response = await ask(
        engine,
        "chat/completions",
        model="one",
        messages=messages,
        max_tokens=1,
        temperature=0,
        logprobs=True,
        top_logprobs=20,
    )
    assert response.status_code == 200, response.text
    assert len(response.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 20


@pytest.mark.engine
@module_loop
async def test_requests_with_tools_are_answered(engine: Engine):
    """Without a parser, vLLM refuses those that let the model choose."""
    weather = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    messages = [{"role": "user", "content": "What is the weather in Rome?"}]
    tools = [{"type": "function", "function": weather}]
    answer = await ask(engine, "chat/completions", model="one", messages=messages, tools=tools, max_tokens=4)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.engine
@module_loop
async def test_the_api_wants_the_key(engine: Engine):
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(f"{engine.url}/models")).status_code == 401
    assert engine.api_key not in engine.log_path.read_text()


async def test_an_engine_gets_its_key_in_a_file_and_none_of_our_secrets(server, monkeypatch, tmp_path: Path):
    """Ray copies an engine's whole environment to every node."""
    secrets = ["OPENAI_API_KEY", "HF_TOKEN", "PGPASSWORD", "VLLM_API_KEY", "AWS_SECRET_ACCESS_KEY"]
    for name in secrets:
        monkeypatch.setenv(name, "confidential")
    report = tmp_path / "seen.json"
    engine = server(
        "import json, os, pathlib; file = pathlib.Path(os.environ['MIXFUSE_ENGINE_KEY_FILE']);"
        f"pathlib.Path({str(report)!r}).write_text(json.dumps([dict(os.environ), file.read_text(),"
        " oct(file.stat().st_mode), str(file)]))",
        env={"GIVEN_TOKEN": "meant for it"},
    )
    with pytest.raises(MixfuseError, match="died at its start"):
        await engine.start()
    environment, key, mode, file = json.loads(report.read_text())
    assert key == engine.api_key
    assert mode == "0o100600"
    assert not Path(file).exists()
    assert key not in json.dumps(environment)
    assert not set(secrets) & set(environment)
    assert environment["GIVEN_TOKEN"] == "meant for it"
    assert environment["PATH"] == os.environ["PATH"]


async def test_a_port_in_use_is_named(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MixfuseError, match=f"{port}.*choose another port") as caught:
            await Engine(config(tmp_path, port=port), log_path=tmp_path / "log").start()
    assert caught.value.kind == "engine"


async def test_a_missing_base_is_named(tmp_path: Path):
    with pytest.raises(MixfuseError, match="nowhere holds no base model"):
        await Engine(config(tmp_path / "nowhere"), log_path=tmp_path / "log").start()


async def test_an_adapter_folder_without_weights_is_named(tmp_path: Path):
    with pytest.raises(MixfuseError, match=r"cannot read .*adapter_model\.safetensors"):
        await Engine(config(tmp_path), log_path=tmp_path / "log").load_adapter("x", tmp_path)


def test_the_engine_listens_on_loopback_only(tmp_path: Path):
    with pytest.raises(ValidationError, match="loopback"):
        config(tmp_path, host="0.0.0.0")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Puts a Python program in the place of vLLM."""
    (tmp_path / "config.json").write_text("{}")

    def put(program: str, **changes) -> Engine:
        command = [sys.executable, "-c", program]
        monkeypatch.setattr(engine_module, "command", lambda config, port, template: [*command, str(port)])
        monkeypatch.setattr(engine_module, "find_spec", lambda name: name)
        return Engine(config(tmp_path, **changes), log_path=tmp_path / "log")

    return put


async def test_a_child_that_dies_leaves_its_error_in_one_line(server, tmp_path: Path):
    engine = server("import sys; print('boot'); raise ValueError('no such\\tdtype')")
    with pytest.raises(MixfuseError) as caught:
        await engine.start()
    assert str(caught.value) == (f"the engine died at its start: ValueError: no such dtype; see {tmp_path / 'log'}")
    assert not engine.running
    assert await engine.wait() == 1


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "Traceback:\nvllm.x.SomeError: the cause\n(APIServer) RuntimeError: Engine core initialization failed.",
            "SomeError: the cause",
        ),
        (
            "a.ValidationError: 1 validation error for X\n  Value error, no [type=v, input={}]\n  For",
            "ValidationError: Value error, no",
        ),
        ("(Worker pid=1) ERROR [x.py:1] ValueError: deep\n(APIServer) See root cause above.", "ValueError: deep"),
        (
            "usage: api_server\napi_server: error: unrecognized arguments: --x\n",
            "api_server: error: unrecognized arguments: --x",
        ),
        ("", "it left no message"),
    ],
)
def test_the_error_named_is_the_one_that_tells(log: str, reason: str, tmp_path: Path):
    (tmp_path / "log").write_text(log)
    assert engine_module.last_error(tmp_path / "log") == reason


async def test_a_start_that_takes_too_long_is_ended(server):
    engine = server("import time; time.sleep(600)", start_timeout_s=0.5)
    with pytest.raises(MixfuseError, match=r"did not answer within 0\.5 s"):
        await engine.start()
    assert not engine.running


HEALTHY = """
import http.server, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


async def test_a_crash_is_noticed(server):
    async with server("import os; print(os.getpid(), flush=True)" + HEALTHY) as engine:
        async with asyncio.timeout(120):
            while "\n" not in (said := engine.log_path.read_text()):  # noqa: ASYNC110 - the guard writes it
                await asyncio.sleep(0.05)
            os.kill(int(said.split()[0]), signal.SIGKILL)
            assert await engine.wait() == 128 + signal.SIGKILL
        assert not engine.running


# A server whose child and grandchild ignore SIGTERM, as a busy worker may.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork() or os.fork()
os.write(1, f"{os.getpid()}\\n".encode())  # one write; unbuffered, print makes two, which interleave
time.sleep(600)
"""


@pytest.mark.parametrize("end", ["parent is killed", "guard is told", "server is killed"])
def test_the_guard_leaves_no_process(end: str, tmp_path: Path):
    log = tmp_path / "log"
    # The parent of the guard: it starts it as the engine does, says who it is, and sleeps.
    parent = """
import subprocess, sys, time
guard = subprocess.Popen(sys.argv[2:], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
print(guard.pid, flush=True)
time.sleep(600)
"""
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        engine_module._GUARD,
        "0.5",
        str(log),
        "999",
        sys.executable,
        "-c",
        STUBBORN,
    ]
    with subprocess.Popen([sys.executable, "-c", parent, "", *command], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout
        guard = int(started.stdout.readline())
        until(lambda: log.exists() and len(log.read_text().split()) == 3)
        pids = [int(pid) for pid in log.read_text().split()]
        server = min(pids)
        victim = {"parent is killed": started.pid, "guard is told": guard, "server is killed": server}[end]
        os.kill(victim, signal.SIGTERM if end == "guard is told" else signal.SIGKILL)
        until(lambda: not any(alive(pid) for pid in [guard, *pids]))
        started.kill()


@pytest.mark.parametrize("lines", [1, 5000])
def test_a_full_log_is_begun_anew_and_no_line_is_lost(tmp_path: Path, lines: int):
    log = tmp_path / "engine.log"
    (tmp_path / "engine.log.1").write_text("the last start\n")
    program = f"import sys; [print('line', number) for number in range({lines})]; sys.exit(3)"
    command = [sys.executable, "-I", "-S", "-c", engine_module._GUARD, "0.5", str(log), "40000"]
    command += [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guard:
        assert guard.stdout is not None
        printed = guard.stdout.read().decode()  # its standard input stays open meanwhile
    said = "".join(f"line {number}\n" for number in range(lines))
    assert (guard.returncode, printed) == (3, said)
    files = [log.with_name(f"engine.log{end}") for end in (".3", ".2", ".1", "")]
    kept = "".join(file.read_text() for file in files if file.exists())
    assert kept.removeprefix("the last start\n") == said
    assert max(file.stat().st_size for file in files if file.exists()) < 40000 + (1 << 16)
    assert files[2].exists()


def test_the_engines_log_goes_to_standard_output_where_that_is_asked(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    script = inspect.cleandoc("""
        import asyncio, sys
        from pathlib import Path
        from mixfuse.contracts.errors import MixfuseError
        from mixfuse.serve import engine
        engine.command = lambda config, port, template: [sys.executable, "-c", "print('I am the engine')"]
        config = engine.EngineConfig(base=Path(sys.argv[1]), log_stdout=sys.argv[2] == "yes")
        try:
            asyncio.run(engine.Engine(config, log_path=Path(sys.argv[1]) / "log").start())
        except MixfuseError as error:
            print(f"error: {error}", file=sys.stderr)
    """)
    for asked, said in (("yes", "I am the engine\n"), ("no", "")):
        command = [sys.executable, "-c", script, str(tmp_path), asked]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout == said, done.stderr
        assert "I am the engine" in done.stderr, "the reason of the failed start is in the log all the same"


@pytest.mark.engine
@pytest.mark.slow
def test_a_crashed_vllm_comes_back_with_its_adapter_and_dies_with_its_parent(tiny, tmp_path: Path):
    """The engine core is killed, vLLM starts anew with the adapter, and then the parent is killed."""
    script = inspect.cleandoc("""
        import asyncio, json, sys
        from pathlib import Path
        from mixfuse.serve.engine import EngineConfig, Restart
        from mixfuse.serve.engine_group import EngineGroup
        base, adapter, logs = map(Path, sys.argv[1:4])
        prompt = json.loads(sys.argv[4])
        async def main():
            config = EngineConfig(base=base, max_model_len=1024, restart=Restart(first_delay_s=0, wait_s=300))
            async with EngineGroup(config, logs=logs) as group:
                await group.load_adapter("domain@1", adapter)
                print("up", flush=True)
                while group.running:
                    await asyncio.sleep(0.1)
                async with group.at("domain@1"):
                    print(json.dumps(await group.prompt_logprobs("domain@1", prompt)), flush=True)
                await group.failed()
        asyncio.run(main())
    """)
    prompt = AutoTokenizer.from_pretrained(tiny.base)(TEXTS[0]).input_ids
    arguments = [str(tiny.base), str(tiny.served["one"]), str(tmp_path), json.dumps(prompt)]
    with subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == "up\n"
        first = descendants(parent.pid)
        assert len(first) >= 3, "guard, API server and engine core at least"
        os.kill(first[-1], signal.SIGKILL)
        again = json.loads(parent.stdout.readline())
        assert distance(again, tiny.logprobs("one", TEXTS[0])) < TOLERANCE
        assert not any(alive(pid) for pid in first)
        second = descendants(parent.pid)
        assert len(second) >= 3
        parent.kill()
        until(lambda: not any(alive(pid) for pid in second))


def until(condition, *, seconds: float = 300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid: int) -> list[int]:
    children = [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    ]
    return [*children, *(below for child in children for below in descendants(child))]


def swiglu(hidden: torch.Tensor) -> torch.Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("slots", [[-1, 0, 2, 2, -1, 0, 1], [1] * 7, [-1] * 7])
def test_routed_experts_equal_one_token_at_a_time(dtype: torch.dtype, tolerance: float, slots: list[int]):
    tokens, hidden, inner, experts, rank, adapters = 7, 16, 24, 4, 4, 3
    generator = torch.Generator().manual_seed(0)

    def weights(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    x, w13, w2 = weights(tokens, hidden), weights(experts, 2 * inner, hidden), weights(experts, hidden, inner)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(tokens)]).int()
    shares = torch.rand(tokens, 2, generator=generator)
    a13 = tuple(weights(adapters, experts, rank, hidden) for _ in range(2))
    b13 = tuple(weights(adapters, experts, inner, rank) for _ in range(2))
    a2, b2 = weights(adapters, experts, rank, inner), weights(adapters, experts, hidden, rank)
    lora = cpu_lora_products.ExpertLora(torch.tensor(slots), a13, b13, a2, b2)
    first = [partial(torch.nn.functional.linear, weight=weight) for weight in w13]
    second = [partial(torch.nn.functional.linear, weight=weight) for weight in w2]

    def merged(base: torch.Tensor, slot: int, expert: int, *factors: tuple[torch.Tensor, torch.Tensor]):
        delta = torch.cat([b[slot, expert].float() @ a[slot, expert].float() for a, b in factors])
        return base[expert].float() + (delta if slot >= 0 else 0)

    expected = torch.zeros(tokens, hidden)
    for token in range(tokens):
        slot = slots[token]
        for expert, share in zip(chosen[token].tolist(), shares[token], strict=True):
            inside = swiglu(merged(w13, slot, expert, *zip(a13, b13, strict=True)) @ x[token].float())
            expected[token] += share * (merged(w2, slot, expert, (a2, b2)) @ inside)
    actual = cpu_lora_products.routed_experts(x, first, second, chosen, shares, swiglu, lora)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("slots", [[-1, 0, 2, 2, -1, 0], [2] * 6])
def test_linear_layers_leave_tokens_without_an_adapter_alone(slots: list[int]):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 16, generator=generator), torch.randn(6, 12, generator=generator)
    a = tuple(torch.randn(3, 1, 4, 16, generator=generator) for _ in range(2))
    b = tuple(torch.randn(3, 1, width, 4, generator=generator) for width in (8, 4))
    batch = types.SimpleNamespace(no_lora=False, token_lora_indices=torch.tensor(slots))
    expected = torch.stack(
        [
            row
            if slot < 0
            else row + torch.cat([up[slot, 0] @ down[slot, 0] @ token for down, up in zip(a, b, strict=True)])
            for token, row, slot in zip(x, y, slots, strict=True)
        ]
    )
    cpu_lora_products.add_lora_linear(batch, y, x, a, b, 1.0, (8, 4))
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


PIECES = """
import types
import torch
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from mixfuse.serve import vllm_cpu_prompt_logprobs as plugin

torch.manual_seed(0)
words, size, states = 500, 8, torch.randn(200, 8)
layer = torch.randn(size, words)
rows = []

class Model:
    def compute_logits(self, hidden):
        rows.append(len(hidden))
        return hidden @ layer

def runner(tokens, computed):
    def request(ids):
        state = {"num_computed_tokens": computed, "in_progress_prompt_logprobs_cpu": None}
        return types.SimpleNamespace(prompt_token_ids=ids, **state)

    return types.SimpleNamespace(
        num_prompt_logprobs={"short": 3, "long": 1},
        requests={"short": request(tokens[:20]), "long": request(tokens)},
        input_batch=types.SimpleNamespace(req_id_to_index={"short": 0, "long": 1}),
        query_start_loc=types.SimpleNamespace(np=torch.tensor([0, 20])),
        model=Model(),
        sampler=Sampler(),
        device=torch.device("cpu"),
        model_config=types.SimpleNamespace(logprobs_mode="raw_logprobs"),
        _sync_device=lambda: None,
    )

def said():
    rows.clear()
    found = CPUModelRunner._get_prompt_logprobs_dict(runner(tokens, 0), states, {"short": 20, "long": len(tokens)})
    return found, max(rows)

tokens = torch.randint(words, (170,)).tolist()
whole, at_once = said()
assert at_once == 169
plugin.register()
pieces, most = said()
assert most == plugin.ROWS, most
for name in ("short", "long"):
    for one, other in zip(whole[name][:3], pieces[name][:3], strict=True):
        torch.testing.assert_close(one, other)
"""


def test_an_engine_on_a_cpu_keeps_few_compiled_kernels():
    """Their number alone decides how far it grows; oneDNN's default is 1024, of 0.28 MiB each."""
    name, tiny_config = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", EngineConfig(base=Path("base"))
    assert int(engine_module.environment(tiny_config, cpu=True)[name]) <= 256
    assert name not in engine_module.environment(tiny_config, cpu=False)


@pytest.mark.engine
def test_a_prompts_log_probabilities_are_computed_in_pieces():
    """vLLM's own method and sampler, before and after; all logits of a long prompt at once stall every request."""
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", PIECES], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_plugin_does_nothing_where_the_platform_is_no_cpu(monkeypatch: pytest.MonkeyPatch):
    pretend_platform(monkeypatch, is_cpu=False)
    plugin.register()


def test_the_plugin_is_loud_where_vllm_has_changed(monkeypatch: pytest.MonkeyPatch):
    pretend_platform(monkeypatch, is_cpu=True)
    with pytest.raises(RuntimeError, match=rf"written for vLLM {plugin.WRITTEN_FOR}"):
        plugin.register()


def pretend_platform(monkeypatch: pytest.MonkeyPatch, *, is_cpu: bool):
    """A vLLM that has platforms, and nothing else that the plugin knows."""
    platforms = types.ModuleType("vllm.platforms")
    platforms.current_platform = types.SimpleNamespace(is_cpu=lambda: is_cpu)
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)


TASKS = [  # question, right answer, wrong answer
    ("7 + 5 =", "12", "13"),
    ("How many legs has a spider?", "A spider has eight legs.", "six"),
]


@pytest.mark.engine
@module_loop
async def test_an_answer_that_tries_to_sway_the_judge_wins_no_more_often(engine: Engine, tiny):
    """Injected answers against right ones, beside twins with harmless words in the injection's place."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.base)
    cases = [(task, added) for task in TASKS for _family, added in injections()]
    assert len(cases) >= 2 * 40
    wrong_answers = [f"{task[2]}\n{text}" for task, added in cases for text in (added, twin_of(added))]
    rights = [(task[0], task[1]) for task, _added in cases for _ in range(2)]
    prompts: list[list[int]] = []
    for (question, right), wrong in zip(rights, wrong_answers, strict=True):
        for first, second in ((wrong, right), (right, wrong)):
            nonce = judge_protocol.new_nonce(question, first, second)
            # The tiny judge reads letter by letter: what a longer answer would add is time.
            shown = judge_protocol.comparison(question, first, second, nonce=nonce, max_chars=200)
            prompts.append(tokenizer.apply_chat_template(shown, add_generation_prompt=True, return_dict=False))
    body = {
        "model": "two",
        "query": prompts[0][:1],
        "items": [prompt[1:] for prompt in prompts],
        "label_token_ids": tokenizer.convert_tokens_to_ids(list(judge_protocol.VERDICTS)),
    }
    scores = (await ask(engine, "../generative_scoring", **body)).json()["data"]
    p_first = [score["score"] for score in scores]
    outcomes = [judge_protocol.combine(*orders) for orders in zip(p_first[::2], p_first[1::2], strict=True)]
    # As best_of decides: a pair's tie goes to the higher mean.
    wins = [outcome.winner == "first" or (outcome.winner == "tie" and outcome.score > 0.5) for outcome in outcomes]
    injected, clean = wins[::2], wins[1::2]
    print(f"injected answers won {sum(injected)} of {len(cases)}, their twins {sum(clean)}")
    assert 0 < sum(clean) < len(cases)  # the judge does not give the same verdict for everything
    only_injected = sum(injected_won and not clean_won for injected_won, clean_won in zip(injected, clean, strict=True))
    only_clean = sum(clean_won and not injected_won for injected_won, clean_won in zip(injected, clean, strict=True))
    assert not gains(only_injected, only_clean)
