"""Gateways share one real vLLM that someone else runs: each answer is its revision's, by what PEFT computes.

The processes are a user's: vLLM by the command that `mixfuse serve --dry-run` prints, and `mixfuse serve` itself.
`test_shared_engines.py` has more gateways, engines and times of death, on engines without a model.
"""

import asyncio
import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from hot_swap import PROMPTS, WITHIN_NATS, _greedy, distance, far_apart
from role_harness import revision
from sqlalchemy import text
from test_engine import alive, descendants, until
from test_server import HANGS_S, MIXFUSE
from test_verified_bytes import remade

from mixfuse.contracts.adapter import Effect
from mixfuse.contracts.database import opened
from mixfuse.serve.vllm_key import KEY_FILE

GATEWAYS = 3
ASKED = ("domain", "synthesizer")
"""The roles that are asked all the time. `domain` is swapped."""
SEEDS = {"domain": "one", "synthesizer": "chosen", "idle": "rank 3"}
"""Role → what serves it first."""
SWAPPED_IN = ("experts", "two", "attention")
TOKENS = 12
PAUSE_S = 0.3
"""Between a client's requests: an engine that is never idle makes the probes of a swap wait."""
UNLOADED_S = 120
"""A killed gateway's adapters are unloaded after its 30 seconds and a look of 5; the rest is for a busy machine."""

pytestmark = [pytest.mark.engine, pytest.mark.slow]


class Owner:
    """Runs vLLM on one port, as someone else does."""

    def __init__(self, base: Path, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url, self.key, self.log = f"http://127.0.0.1:{port}", secrets.token_urlsafe(), folder / "vllm.log"
        (folder / "key").write_text(self.key)
        config = {
            "engine": {"base": str(base), "port": port, "threads": 1, "max_num_seqs": 16},
            "roles": dict.fromkeys(SEEDS),
            "fusion": {"members": [{"name": "a", "role": "base"}]},
        }
        path = folder / "serve.yaml"
        path.write_text(json.dumps(config))
        shown = subprocess.run([*MIXFUSE, "serve", path, "--dry-run"], capture_output=True, text=True, check=True)
        words = shlex.split(shown.stdout.splitlines()[0])
        words[words.index(f"{KEY_FILE}=FILE")] = f"{KEY_FILE}={folder / 'key'}"
        cached = words.index("--max-cpu-loras") + 1
        words[cached] = str(GATEWAYS * int(words[cached]))
        self._command = ["env", *words]

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until(self._healthy, seconds=HANGS_S)

    def _healthy(self) -> bool:
        assert self._process.poll() is None, self.log.read_text()[-4000:]
        try:
            return httpx.get(f"{self.url}/health", trust_env=False).is_success
        except httpx.TransportError:
            return False

    def stop(self, number: signal.Signals) -> None:
        """Sends the server a signal, and kills what is left of it, as a container's end does."""
        processes = [self._process.pid, *descendants(self._process.pid)]
        self._process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()
        until(lambda: not any(map(alive, processes)))

    async def adapters(self, client: httpx.AsyncClient) -> set[str]:
        answer = await client.get(f"{self.url}/v1/models", headers={"Authorization": f"Bearer {self.key}"})
        return {row["id"] for row in answer.json()["data"] if row["parent"] is not None}


@pytest.fixture(scope="module")
def owner(tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owner]:
    made = Owner(tiny.base, tmp_path_factory.mktemp("owner"))
    try:
        made.start()
        yield made
    finally:
        made.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def references(tiny) -> dict[str, list[list[float]]]:
    """Revision → the log-probabilities of PEFT's greedy answer to each prompt."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer, MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny.base)
    found = {}
    for name in (*SEEDS.values(), *SWAPPED_IN):
        base = MixtralForCausalLM.from_pretrained(tiny.base, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, tiny.fused[name]).eval()
        chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        found[revision(tiny.served[name])] = [_greedy(model, tokenizer, chat, TOKENS) for chat in chats]
    assert far_apart(found) > 10 * WITHIN_NATS
    return found


class Gateway:
    """A running `mixfuse serve`."""

    def __init__(self, name: str, config: Path, *overrides: str) -> None:
        self.name, self.url = name, ""
        self.log = config.with_name(f"{name}.log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*MIXFUSE, "serve", config, *overrides], stdout=log, stderr=log)

    async def ready(self, place: str) -> "Gateway":
        """Returns once it serves; knows its token then."""
        async with asyncio.timeout(HANGS_S):
            while not (line := re.search(r"ready: (http://[\d.]+:(\d+))/v1", self.log.read_text())):
                assert self.process.poll() is None, self.log.read_text()
                await asyncio.sleep(0.05)
        self.url = line[1]
        query = text("SELECT owner FROM gateways WHERE name LIKE :port AND expires_at > 0")
        with opened(place) as database:
            self.token = database.run_now(lambda db: db.execute(query, {"port": f"%:{line[2]}"}).scalar_one())
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class Answer:
    """One answer, or `error`. `apart` is how far it is from PEFT's of the revision that is said to have answered."""

    gateway: str
    role: str
    began: float
    ended: float
    revision: str | None = None
    apart: float = float("inf")
    error: str | None = None
    typed: bool = True


@dataclass
class Traffic:
    """Clients that ask each gateway for each role without pause, and when each revision may have answered."""

    client: httpx.AsyncClient
    references: dict[str, list[list[float]]]
    serving: dict[str, list[tuple[str, float, float]]]
    answers: list[Answer] = field(default_factory=list)
    asked: dict[str, list["asyncio.Task[None]"]] = field(default_factory=dict)
    checked: int = 0

    def ask(self, gateway: Gateway) -> None:
        """From now on."""
        self.asked[gateway.name] = [asyncio.create_task(self._keep_asking(gateway, role)) for role in ASKED]

    async def leave(self, gateway: Gateway) -> None:
        """Asks it no more. What is under way is not counted."""
        tasks = self.asked.pop(gateway.name)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def _keep_asking(self, gateway: Gateway, role: str) -> None:
        number = 0
        while True:
            number += 1
            self.answers.append(await self.once(gateway, role, number % len(PROMPTS)))
            await asyncio.sleep(PAUSE_S)

    async def once(self, gateway: Gateway, role: str, prompt: int) -> Answer:
        body = {
            "model": role,
            "messages": [{"role": "user", "content": PROMPTS[prompt]}],
            "max_tokens": TOKENS,
            "temperature": 0,
            "logprobs": True,
            "fusion": {"expose": "full"},
        }
        began = time.monotonic()
        response = await self.client.post(f"{gateway.url}/v1/chat/completions", json=body)
        ended, said = time.monotonic(), response.json()
        if response.status_code != 200:
            typed = bool(said.get("error", {}).get("type"))
            return Answer(gateway.name, role, began, ended, error=response.text, typed=typed)
        by = said["fusion"]["calls"][-1]["revision"]
        tokens = [token["logprob"] for token in said["choices"][0]["logprobs"]["content"]]
        known = self.references.get(by)
        apart = distance(tokens, known[prompt]) if known else float("inf")
        return Answer(gateway.name, role, began, ended, by, apart)

    async def more(self, *gateways: Gateway, count: int = 4) -> None:
        """Returns once each gateway has answered this many requests of after this call, and one for the idle role."""
        now = time.monotonic()
        self.answers += [await self.once(gateway, "idle", 0) for gateway in gateways]

        def enough(gateway: Gateway, role: str) -> bool:
            after = [
                answer
                for answer in self.answers
                if (answer.gateway, answer.role) == (gateway.name, role) and answer.began > now and not answer.error
            ]
            return len(after) >= count

        async def all_have() -> bool:
            return all(enough(gateway, role) for gateway in gateways for role in ASKED)

        await eventually(all_have)

    async def swap(self, gateway: Gateway, directory: Path, role: str = "domain") -> httpx.Response:
        """Both revisions may answer from the request to its answer; a refused one never."""
        began = time.monotonic()
        answer = await self.client.put(f"{gateway.url}/admin/roles/{role}", json={"directory": str(directory)})
        print(f"swap of {role} by {gateway.name}: {answer.status_code} after {time.monotonic() - began:.1f} s")
        if answer.status_code == 200:
            spans = self.serving[role]
            old, since, _ = spans.pop()
            spans += [(old, since, time.monotonic()), (revision(directory), began, float("inf"))]
        return answer

    def names(self, *gateways: Gateway) -> set[str]:
        """What must be in the engine for these gateways, and nothing else."""
        return {
            f"{role}@{spans[-1][0]}~{gateway.token}" for role, spans in self.serving.items() for gateway in gateways
        }

    def check(self, *, outage: tuple[float, float] | None = None) -> None:
        """No request failed, but for those that an outage fell into; each answer is its revision's, and that served."""
        new, self.checked = self.answers[self.checked :], len(self.answers)
        assert new
        assert not [task for tasks in self.asked.values() for task in tasks if task.done()], "a client has ended"
        for answer in new:
            if answer.error is not None:
                assert outage, answer
                assert answer.typed, answer
                assert answer.ended > outage[0], answer
                assert answer.began < outage[1], answer
                continue
            assert answer.apart < WITHIN_NATS, answer
            assert any(
                answer.revision == by and since < answer.ended and answer.began < until_
                for by, since, until_ in self.serving[answer.role]
            ), (answer, self.serving)


async def eventually(holds: Callable[[], Awaitable[bool]], seconds: float = HANGS_S) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():  # noqa: ASYNC110 - other processes' work
            await asyncio.sleep(0.02)


def serve_config(tiny, folder: Path, place: str, owner: Owner) -> Path:
    config: dict[str, Any] = {
        "engine": {
            "base": str(tiny.base),
            "dtype": "float32",
            "url": owner.url,
            "api_key_env": "ENGINE_KEY",
            "restart": {"check_s": 1, "max_delay_s": 2},
        },
        "gateway": {"port": 0},
        "roles": {role: str(tiny.served[name]) for role, name in SEEDS.items()},
        "fusion": {"members": [{"name": "expert", "role": "domain"}], "trace_db": place},
        "logs": str(folder / "logs"),
        "state": str(folder / "state"),
    }
    path = folder / "serve.yaml"
    path.write_text(json.dumps(config))
    return path


@dataclass
class Case:
    """Gateways on the owner's engine, and the steps of the tests."""

    traffic: Traffic
    owner: Owner
    tiny: Any
    place: str
    config: Path
    gateways: list[Gateway] = field(default_factory=list)
    swapping: dict[str, "asyncio.Task[httpx.Response]"] = field(default_factory=dict)

    async def started(self, **overrides: str) -> list[Gateway]:
        """Gateways of these names, which are asked from now on; each with a key of the config that is its own."""
        new = [Gateway(name, self.config, *filter(None, [key])) for name, key in overrides.items()]
        self.gateways += new
        for gateway in new:
            self.traffic.ask(await gateway.ready(self.place))
        return new

    async def stopped(self, *gateways: Gateway) -> None:
        """They leave nothing in the engine."""
        for gateway in gateways:
            await self.traffic.leave(gateway)
            gateway.process.send_signal(signal.SIGINT)
        for gateway in gateways:
            assert await asyncio.to_thread(gateway.process.wait, HANGS_S) == 0
            assert "Traceback" not in gateway.log.read_text()
        assert await self.owner.adapters(self.traffic.client) == set()
        print(f"{len(self.traffic.answers)} answers were checked")

    async def settled(self, *gateways: Gateway, seconds: float = HANGS_S) -> None:
        """The engine has what serves these gateways and nothing else; they answer, and all were right meanwhile."""

        async def loaded() -> bool:
            return await self.owner.adapters(self.traffic.client) == self.traffic.names(*gateways)

        await eventually(loaded, seconds)
        await self.traffic.more(*gateways)
        self.traffic.check()

    async def swapped_in(self, by: Gateway, name: str, *gateways: Gateway) -> None:
        answer = await self.traffic.swap(by, self.tiny.served[name])
        assert answer.status_code == 200, answer.text
        assert answer.json()["new"] == revision(self.tiny.served[name])
        await self.settled(*gateways)

    async def swapped_in_at_all(self, *gateways: Gateway) -> None:
        """By whichever gateway: once the swap has answered, all answer by the new revision only."""
        for by, name in zip(gateways, SWAPPED_IN[:2], strict=False):
            await self.swapped_in(by, name, *gateways)

    async def refused_at_one_and_swapped_in_at_none(self, folder: Path, *gateways: Gateway) -> None:
        """By the probes of the gateway that is asked, and by another gateway once the first has loaded it."""
        grown = remade(self.tiny.served["one"], folder / "grown", effect=Effect(median=0.001, tokens=24))
        for directory, words in (
            (grown, "times as large as when the adapter was made"),
            (self.tiny.served["rank 12"], "cannot serve it: .*rank 12 is above the engine's max_lora_rank 8"),
        ):
            answer = await self.traffic.swap(gateways[0], directory)
            assert answer.status_code == 400, answer.text
            assert re.search(words, answer.json()["error"]["message"])
            await self.settled(*gateways)

    async def _begin(self, role: str, name: str, by: Gateway, *, until_loaded_by: Gateway) -> None:
        """Begins a swap, and returns once a gateway has the adapter in the engine; it has not been probed then."""
        model = f"{role}@{revision(self.tiny.served[name])}~{until_loaded_by.token}"

        async def loaded() -> bool:
            return model in await self.owner.adapters(self.traffic.client)

        self.swapping[by.name] = asyncio.create_task(self.traffic.swap(by, self.tiny.served[name], role))
        await eventually(loaded)

    async def gone_in_mid_swap(
        self, one: Gateway, two: Gateway, three: Gateway, *, killed_once_loaded_by: Gateway
    ) -> None:
        """One is killed, another stands still; each has a swap under way, of a role of its own."""
        await self._begin("synthesizer", "one", three, until_loaded_by=two)
        await self.traffic.leave(three)
        three.process.send_signal(signal.SIGSTOP)
        await self._begin("domain", "attention", one, until_loaded_by=killed_once_loaded_by)
        await self.traffic.leave(one)
        one.kill()
        with pytest.raises(httpx.TransportError):
            await self.swapping["one"]
        await self.traffic.more(two)
        self.traffic.check()

    async def left_by_the_gone_is_unloaded(self, two: Gateway, four: Gateway) -> None:
        """What they had prepared in other gateways, too."""
        since = time.monotonic()
        await self.settled(two, four, seconds=UNLOADED_S)
        print(f"what the gone left was unloaded {time.monotonic() - since:.1f} s after another one was ready")

    async def what_stood_still_ends_and_changes_nothing(self, three: Gateway, *others: Gateway) -> None:
        """Its swap goes on where it stood: the others are ready, as far as it knows."""
        three.process.send_signal(signal.SIGCONT)
        with suppress(httpx.TransportError):  # it may have ended
            answer = await self.traffic.once(three, "domain", 0)
            assert answer.error, answer
        with suppress(httpx.TransportError):
            assert (await self.swapping["three"]).status_code >= 400
        assert await asyncio.to_thread(three.process.wait, HANGS_S) == 2
        assert "this gateway stood still for more than 30 s" in three.log.read_text()
        await self.settled(*others)

    async def the_engine_ends_and_is_started_again(
        self, *gateways: Gateway, by: signal.Signals, in_mid_swap: bool
    ) -> None:
        """All serve again what the table says; what failed meanwhile says why."""
        if in_mid_swap:
            await self._begin("domain", "experts", gateways[0], until_loaded_by=gateways[1])
        ended = time.monotonic()
        await asyncio.to_thread(self.owner.stop, by)
        await asyncio.to_thread(self.owner.start)
        if in_mid_swap:
            answer = await self.swapping[gateways[0].name]
            assert answer.status_code == 200 or answer.json()["error"]["type"], answer.text

        async def ready() -> bool:
            answers = [await self.traffic.client.get(f"{gateway.url}/readyz") for gateway in gateways]
            loaded = await self.owner.adapters(self.traffic.client)
            return all(answer.status_code == 200 for answer in answers) and loaded == self.traffic.names(*gateways)

        await eventually(ready)
        back = time.monotonic()
        failed = {answer.error for answer in self.traffic.answers[self.traffic.checked :] if answer.error}
        print(f"after {by.name} the engine was away for {back - ended:.0f} s; {len(failed)} requests failed: {failed}")
        await self.traffic.more(*gateways)
        self.traffic.check(outage=(ended, back))


@pytest_asyncio.fixture
async def case(
    place: str, owner: Owner, references, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Case]:
    monkeypatch.setenv("ENGINE_KEY", owner.key)
    monkeypatch.delenv("MIXFUSE_ADMIN_KEY", raising=False)
    always = (float("-inf"), float("inf"))
    serving = {role: [(revision(tiny.served[name]), *always)] for role, name in SEEDS.items()}
    async with httpx.AsyncClient(trust_env=False, timeout=HANGS_S) as client:
        made = Case(
            Traffic(client, references, serving), owner, tiny, place, serve_config(tiny, tmp_path, place, owner)
        )
        try:
            yield made
        finally:
            tasks = [task for asked in made.traffic.asked.values() for task in asked]
            for task in (*tasks, *made.swapping.values()):
                task.cancel()
            for gateway in made.gateways:
                gateway.kill()


async def test_gateways_come_swap_refuse_and_go(case: Case, tmp_path: Path):
    # The second takes small adapters only, so that it refuses one that the first has loaded and probed.
    one, two, three = await case.started(one="", two="engine.max_lora_rank=8", three="")
    await case.settled(one, two, three)
    await case.swapped_in_at_all(one, two, three)
    await case.refused_at_one_and_swapped_in_at_none(tmp_path, one, two, three)
    await case.gone_in_mid_swap(one, two, three, killed_once_loaded_by=one if case.place.startswith("post") else two)
    (four,) = await case.started(four="")
    await case.left_by_the_gone_is_unloaded(two, four)
    await case.what_stood_still_ends_and_changes_nothing(three, two, four)
    await case.swapped_in(four, "attention", two, four)
    await case.stopped(two, four)


async def test_an_engine_ends_and_is_started_again(case: Case):
    one, two = await case.started(one="", two="")
    await case.settled(one, two)
    in_mid_swap = case.place.startswith("post")
    by = signal.SIGKILL if in_mid_swap else signal.SIGTERM
    await case.the_engine_ends_and_is_started_again(one, two, by=by, in_mid_swap=in_mid_swap)
    await case.stopped(one, two)
