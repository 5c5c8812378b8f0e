"""Swapping adapters under load: failures, answers of wrong revisions, latencies, and memory that is left behind.

    nice python benchmarks/hot_swap.py [--base DIR] [--swaps 200] [--still 0] [--slots 2] [--json] [--smoke]

Runs the real `mixfuse serve` (vLLM and the gateway) with three roles and fewer places for adapters, and keeps the roles
busy without pause: each by its name, `judge` also through `best_of`, `synthesizer` through `merge`. Meanwhile it makes
20 swaps and 5 rollbacks. Some swaps must be refused: a tampered file, a wrong base, a tensor that is not finite, an
adapter that vLLM would load and ignore. Two meet a failure: a full disk under the trace database, and an engine killed
in mid-swap. Between them, another role's file is copied over a serving directory, a serving directory is removed, and
an adapter is deleted in the engine. Before each swap, the same time is measured without a swap, so that both latencies
have the same load and length. Then memory is looked at: `--still` times with nothing swapped, and after each of
`--swaps` good swaps that follow without pause, until `--minutes` have passed.

An answer by a role's name is checked: its log-probabilities must be those that PEFT computed for the revision that is
said to have answered, before the server was started.

The disk is a file system of its own (`unshare -Urm`). Without user namespaces that case is left out.
"""

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import uvloop
from aiohttp import ClientError, ClientSession
from harness import ROOT, BenchmarkError, note, open_session, process, rss_mib, table

INSIDE = "MIXFUSE_BENCH_NAMESPACE"
_START_S = 1000  # an engine may take; on a busy machine it does
_PAUSE_S = 0.5  # before and after a time with nothing swapped
_FIRST_S = 10.0  # a time with nothing swapped before the first swap
_FAULT_S = 4.0  # a fault of a role's files or of its adapter in the engine lasts
DEADLINE_S = 90
ROLES = ("domain", "judge", "synthesizer")
KINDS = {**{role: role for role in ROLES}, "fusion/best-of": "judge", "fusion/merge": "synthesizer"}
"""The model that is requested → the role that it keeps busy."""
ROLE_OF = {"expert": "domain", **{role: role for role in ROLES}}
"""The member of a trace's call → its role."""

WITHIN_NATS = 0.01
"""How far a log-probability may be from PEFT's: both compute in float32. Those of other revisions are further away."""
PROMPTS = [f"Question {number}: what comes next, and why?" for number in range(4)]

PLAN = (
    *(("good", "domain"), ("good", "judge"), ("good", "synthesizer"), ("tampered file", "domain")),
    *(("file copied over", "judge"), ("directory removed", "synthesizer"), ("deleted in the engine", "domain")),
    *(("good", "domain"), ("rollback", "domain"), ("wrong base", "judge"), ("good", "judge"), ("rollback", "judge")),
    *(("tensor not finite", "synthesizer"), ("good", "synthesizer"), ("rollback", "synthesizer")),
    *(("ignored by the engine", "domain"), ("good", "domain"), ("good", "judge"), ("full disk", "synthesizer")),
    *(("good", "synthesizer"), ("good", "domain"), ("rollback", "domain"), ("engine killed", "domain")),
    *(("good", "judge"), ("good", "synthesizer"), ("good", "domain"), ("good", "judge"), ("rollback", "judge")),
)
SMOKE = (
    *(("good", "domain"), ("tampered file", "domain"), ("good", "judge"), ("file copied over", "judge")),
    *(("directory removed", "synthesizer"), ("deleted in the engine", "domain"), ("rollback", "judge")),
)
FAULTS = ("file copied over", "directory removed", "deleted in the engine")
"""What befalls a role that serves; nothing is swapped."""
STILL = ", still"
"""Ends the names of memory that was looked at while nothing was swapped."""
REFUSED = ("tampered file", "wrong base", "tensor not finite", "ignored by the engine")


# --- adapters --------------------------------------------------------------------------------------------------------


def make_adapters(base: Path, folder: Path, each: int, max_tokens: int) -> None:
    """Writes `each` good adapter directories a role, and the bad ones; random LoRA factors, attention and experts.

    `references.json` has, for each revision, the log-probabilities of the greedy answer to each prompt. Run in a
    process of its own, which takes torch with it when it ends.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, MixtralForCausalLM

    from mixfuse.train.adapters.export import export

    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = get_peft_model(MixtralForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    torch.manual_seed(0)
    fused = folder / "fused"
    tokenizer = AutoTokenizer.from_pretrained(base)
    references: dict[str, list[list[float]]] = {}
    for role in ROLES:
        for number in range(each):
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(weight, std=0.1)
            model.save_pretrained(fused)
            export(fused, folder / f"{role}-{number}", base=base, role=role)
            chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
            references[revision(folder / f"{role}-{number}")] = [
                _greedy(model, tokenizer, chat, max_tokens) for chat in chats
            ]
    (folder / "references.json").write_text(json.dumps(references))
    # As PEFT saved them, with a manifest that finds nothing wrong: what `export` exists to prevent.
    ignored = folder / "ignored by the engine"
    shutil.copytree(folder / "domain-0", ignored)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(fused / file, ignored / file)
    _rehash(ignored, experts_trained=False)
    for name, role in (("tampered file", "domain"), ("wrong base", "judge"), ("tensor not finite", "synthesizer")):
        shutil.copytree(folder / f"{role}-1", folder / name)
    weights = folder / "tampered file" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    _spoil(folder / "tensor not finite")
    manifest = json.loads((folder / "wrong base" / "manifest.json").read_text())
    manifest["base"]["weights"] = "0" * 64
    (folder / "wrong base" / "manifest.json").write_text(json.dumps(manifest))


def _greedy(model: Any, tokenizer: Any, chat: list[dict[str, str]], max_tokens: int) -> list[float]:
    """The log-probability of each token of the greedy answer to a chat."""
    import torch

    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        made = model.generate(
            **prompt, do_sample=False, max_new_tokens=max_tokens, return_dict_in_generate=True, output_logits=True
        )
    return [float(logits[0].log_softmax(-1).max()) for logits in made.logits]


def far_apart(references: dict[str, list[list[float]]]) -> float:
    """The least distance between two revisions' answers to one prompt, in nats.

    Raises:
        BenchmarkError: It is so small that one revision's answer could pass for another's.
    """
    least = min(
        distance(first, second)
        for one, other in itertools.combinations(references.values(), 2)
        for first, second in zip(one, other, strict=True)
    )
    if least < 3 * WITHIN_NATS:
        raise BenchmarkError(f"two revisions answer alike ({least:.3f} nats apart): the check would see nothing")
    return least


def distance(first: Sequence[float], second: Sequence[float]) -> float:
    """The largest difference of two answers' log-probabilities; infinite if their lengths differ by more than a token.

    One of them may count the token that ends the answer.
    """
    if abs(len(first) - len(second)) > 1:
        return math.inf
    return max((abs(a - b) for a, b in zip(first, second, strict=False)), default=math.inf)


def _spoil(adapter: Path) -> None:
    """Puts a NaN into one tensor, and the hashes right again."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    next(weight for name, weight in weights.items() if "lora_B" in name)[0, 0] = torch.nan
    save_file(weights, adapter / "adapter_model.safetensors")
    _rehash(adapter)


def _rehash(adapter: Path, **changes: Any) -> None:
    from mixfuse.contracts.adapter import file_hashes, revision_of

    manifest = json.loads((adapter / "manifest.json").read_text())
    manifest["files"] = file_hashes(adapter)
    manifest |= {"revision": revision_of(manifest["files"]), **changes}
    (adapter / "manifest.json").write_text(json.dumps(manifest))


def revision(adapter: Path) -> str:
    return json.loads((adapter / "manifest.json").read_text())["revision"]


# --- traffic ---------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """One request: its model, when it ran, how it ended, and the revisions that answered its calls.

    `apart` is the distance of its log-probabilities from those of its revision, in nats; None if they are not checked.
    """

    kind: str
    began: float
    ended: float
    error: str | None = None
    typed: bool = True
    revisions: list[tuple[str, str | None]] = field(default_factory=list)
    failed_calls: list[str] = field(default_factory=list)
    apart: float | None = None


class Traffic:
    """Clients that send requests without pause, `each` per role; an async context manager."""

    def __init__(
        self,
        session: ClientSession,
        url: str,
        references: dict[str, list[list[float]]],
        *,
        each: int,
        max_tokens: int,
        end: int,
    ) -> None:
        self._session, self._url, self._references = session, url, references
        self._max_tokens, self._end = max_tokens, end
        self._each = each
        self._tasks: list[asyncio.Task[None]] = []
        self.requests: list[Request] = []
        self._numbers = itertools.count()

    async def __aenter__(self) -> "Traffic":
        self._tasks = [asyncio.create_task(self._client(kind)) for kind in KINDS for _ in range(self._each)]
        return self

    async def __aexit__(self, *_error: object) -> None:
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended

    async def _client(self, kind: str) -> None:
        while True:
            request = await self._ask(kind)
            self.requests.append(request)
            if request.error:
                await asyncio.sleep(0.25)  # as a client would; not to count one outage a thousand times

    async def _ask(self, kind: str) -> Request:
        request = Request(kind, time.monotonic(), 0.0)
        number = next(self._numbers)
        prompt = number % len(PROMPTS) if kind in ROLES else None
        text = f"Question {number}: what comes next, and why?" if prompt is None else PROMPTS[prompt]
        body = {
            "model": kind,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self._max_tokens,
            "fusion": {"expose": "full"},
            # Random weights may end an answer at once, and an empty one is none.
            **(
                {"temperature": 0.8, "logit_bias": {str(self._end): -100}}
                if prompt is None
                else {"temperature": 0, "logprobs": True}
            ),
        }
        try:
            async with self._session.post(f"{self._url}/chat/completions", json=body) as response:
                answer = await response.json(content_type=None)
        except (ClientError, TimeoutError, ValueError) as error:
            request.error, request.typed = f"{type(error).__name__}: {error}", False
        else:
            if response.status == 200:
                self._read(answer["fusion"]["calls"], request)
                if prompt is not None:
                    said = [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]
                    known = self._references.get(str(request.revisions[-1][1]) if request.revisions else "")
                    request.apart = distance(said, known[prompt]) if known else math.inf
            else:
                failure = answer.get("error") or {}
                request.typed = bool(failure.get("type"))
                request.error = f"HTTP {response.status} {failure.get('type')}: {failure.get('message')}"
        request.ended = time.monotonic()
        return request

    @staticmethod
    def _read(calls: list[dict[str, Any]], request: Request) -> None:
        for call in calls:
            role = ROLE_OF.get(call["member"])
            if call["outcome"] == "ok" and role:
                request.revisions.append((role, call["revision"]))
            elif not call["outcome"].startswith("cancelled") and call["outcome"] != "ok":
                request.failed_calls.append(f"{call['member']}: {call['outcome']}: {call['error']}")


class Engine(NamedTuple):
    """Where the engine is, for what is done behind the server's back."""

    url: str
    key: str


KEYED = """
import secrets, sys, types
from mixfuse.cli.entry import main
from mixfuse.serve import engine
key = sys.argv.pop(1)
engine.secrets = types.SimpleNamespace(token_urlsafe=lambda _: key, token_hex=secrets.token_hex)
sys.exit(main(sys.argv[1:]))
"""
"""`mixfuse`, whose engine has a key that this script knows."""


# --- swaps -----------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """One swap or rollback. `began` and `ended` are monotonic seconds; `sham` is the time without a swap before it."""

    kind: str
    role: str
    began: float = 0.0
    ended: float = 0.0
    sham: tuple[float, float] = (0.0, 0.0)
    refusal: str = ""
    done: bool = False


class ServerUnderLoad:
    """A running server, the revision that must serve each role, and when each revision may have answered."""

    def __init__(
        self,
        session: ClientSession,
        url: str,
        server: psutil.Process,
        adapters: Path,
        disk: Path | None,
        *,
        engine: "Engine | None" = None,
    ) -> None:
        self.session, self.admin, self.server = session, url.removesuffix("/v1") + "/admin/roles", server
        self.adapters, self.disk, self.engine = adapters, disk, engine
        self.serving = {role: revision(adapters / f"{role}-0") for role in ROLES}
        self.before: dict[str, str] = {}
        self.times = {role: [(first, -math.inf, math.inf)] for role, first in self.serving.items()}
        self._next = {role: itertools.cycle(self._good(role)) for role in ROLES}
        self.steps: list[Step] = []
        self.outage: tuple[float, float] | None = None

    def _good(self, role: str) -> list[Path]:
        return sorted(self.adapters.glob(f"{role}-[0-9]*"))

    def usual_s(self) -> float:
        """The median length of a swap."""
        return statistics.median([past.ended - past.began for past in self.steps if past.done] or [_FIRST_S])

    async def step(self, kind: str, role: str, *, sham: bool = False) -> Step:
        """Makes a step of the plan. With `sham`, it first measures the median length of a swap without a swap."""
        step = Step(kind, role)
        if sham:
            await asyncio.sleep(_PAUSE_S)
            began = time.monotonic()
            await asyncio.sleep(self.usual_s())
            step.sham = (began, time.monotonic())
            await asyncio.sleep(_PAUSE_S)
        actions: dict[str, Callable[[Step], Awaitable[None]]] = {
            "rollback": self._roll_back,
            "full disk": self._on_full_disk,
            "engine killed": self._killed,
            "file copied over": self._copied_over,
            "directory removed": self._removed,
            "deleted in the engine": self._deleted,
        }
        await actions.get(kind, self._swap)(step)
        self.steps.append(step)
        actual = await self.actual()
        if step.done:
            self._flipped(step, actual[role])
        if actual != self.serving:
            raise BenchmarkError(
                f"after {kind!r} the roles are {actual}, they should be {self.serving}: {step.refusal}"
            )
        note(f"{kind}, {role}: {step.ended - step.began:.2f} s {step.refusal}")
        return step

    async def actual(self) -> dict[str, str | None]:
        """The revisions that the server reports as serving."""
        async with self.session.get(self.admin) as response:
            rows = (await response.json())["roles"]
        return {row["role"]: row["revision"] for row in rows if row["role"] in self.serving}

    async def _swap(self, step: Step) -> None:
        directory = self.adapters / step.kind
        if step.kind not in REFUSED:
            directory = self._another(step.role)
        await self._send(step, self.session.put(f"{self.admin}/{step.role}", json={"directory": str(directory)}))
        if step.done == (step.kind in REFUSED):
            raise BenchmarkError(
                f"{step.kind}, {step.role}: it should {'not ' * step.done}have gone well: {step.refusal}"
            )
        if step.done:
            self.before[step.role], self.serving[step.role] = self.serving[step.role], revision(directory)

    def _another(self, role: str) -> Path:
        """The next good adapter directory of a role, other than the serving one."""
        return next(path for path in self._next[role] if revision(path) != self.serving[role])

    async def _roll_back(self, step: Step) -> None:
        await self._send(step, self.session.post(f"{self.admin}/{step.role}/rollback", json={}))
        if not step.done:
            raise BenchmarkError(f"rollback of {step.role}: {step.refusal}")
        self.serving[step.role] = self.before[step.role]

    async def _on_full_disk(self, step: Step) -> None:
        """Fills the trace database's file system first, and empties it after; either outcome of the swap is fine."""
        assert self.disk is not None
        filler = self.disk / "filler"
        with filler.open("wb", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(1 << 20))
            except OSError:
                note("the disk is full")
        directory = self._another(step.role)
        await self._send(step, self.session.put(f"{self.admin}/{step.role}", json={"directory": str(directory)}))
        await asyncio.sleep(1)
        filler.unlink()
        if step.done:
            self.before[step.role], self.serving[step.role] = self.serving[step.role], revision(directory)

    async def _killed(self, step: Step) -> None:
        """Kills the engine while the adapter is being loaded; waits until all roles answer again."""
        directory = self._another(step.role)
        put = self.session.put(f"{self.admin}/{step.role}", json={"directory": str(directory)})
        swapping = asyncio.create_task(self._send(step, put))
        await asyncio.sleep(0.02)
        killed = time.monotonic()
        for child in engine_processes(self.server):
            child.kill()
        await swapping
        async with asyncio.timeout(_START_S):
            while not await self._ready():  # noqa: ASYNC110 - it is another process's
                await asyncio.sleep(0.25)
        self.outage = (killed, time.monotonic())
        if step.done:
            self.before[step.role], self.serving[step.role] = self.serving[step.role], revision(directory)

    def _directory(self, role: str) -> Path:
        """The directory that serves a role."""
        return next(path for path in self._good(role) if revision(path) == self.serving[role])

    async def _copied_over(self, step: Step) -> None:
        """Copies another role's weights over those of the serving directory, for a while."""
        weights = self._directory(step.role) / "adapter_model.safetensors"
        other = next(role for role in ROLES if role != step.role)
        kept = weights.with_name("kept")
        step.began = time.monotonic()
        shutil.copy(weights, kept)
        shutil.copy(self._directory(other) / weights.name, weights)
        await asyncio.sleep(_FAULT_S)
        kept.replace(weights)
        self._went_on(step)

    async def _removed(self, step: Step) -> None:
        """Takes the serving directory away, for a while."""
        directory = self._directory(step.role)
        away = directory.with_name(f"away-{directory.name}")
        step.began = time.monotonic()
        directory.rename(away)
        await asyncio.sleep(_FAULT_S)
        away.rename(directory)
        self._went_on(step)

    async def _deleted(self, step: Step) -> None:
        """Deletes the serving adapter in the engine, behind the server's back."""
        assert self.engine is not None
        body = {"lora_name": f"{step.role}@{self.serving[step.role]}"}
        headers = {"Authorization": f"Bearer {self.engine.key}"}
        step.began = time.monotonic()
        async with asyncio.timeout(60):
            while True:  # it may have made room for another at this moment
                url = f"{self.engine.url}/v1/unload_lora_adapter"
                async with self.session.post(url, json=body, headers=headers) as response:
                    if response.status == 200:
                        break
                await asyncio.sleep(0.05)
        await asyncio.sleep(_FAULT_S)
        self._went_on(step)

    @staticmethod
    def _went_on(step: Step) -> None:
        step.ended = time.monotonic()
        step.refusal = "nothing: the role answered on"

    async def _ready(self) -> bool:
        async with self.session.get(self.admin.removesuffix("/admin/roles") + "/readyz") as response:
            return response.status == 200

    async def _send(self, step: Step, call: Any) -> None:
        step.began = time.monotonic()
        async with call as response:
            answer = await response.json(content_type=None)
        step.ended = time.monotonic()
        step.done = response.status == 200
        failure = answer.get("error") or {}
        step.refusal = "" if step.done else f"HTTP {response.status} {failure.get('type')}: {failure.get('message')}"
        if not step.done and not failure.get("type"):
            raise BenchmarkError(f"{step.kind}: an untyped refusal: {answer}")

    def _flipped(self, step: Step, to: str | None) -> None:
        """Records when each revision may have answered: both may, from the swap's request to its answer."""
        spans = self.times[step.role]
        last, since, _ = spans[-1]
        spans[-1] = (last, since, step.ended)
        spans.append((str(to), step.began, math.inf))

    def may_have_answered(self, role: str, revision_: str | None, request: Request) -> bool:
        """Whether a revision may have served the role at some time while the request was under way."""
        return any(
            served == revision_ and since < request.ended and request.began < until
            for served, since, until in self.times[role]
        )


def engine_processes(server: psutil.Process) -> list[psutil.Process]:
    """All processes of vLLM: those below the server."""
    return server.children(recursive=True)


# --- figures ---------------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def slope(values: Sequence[float]) -> tuple[float, float]:
    """(least-squares slope a step, its standard error)."""
    n = len(values)
    steps = range(n)
    fit = statistics.linear_regression(steps, values)
    rest = sum((value - fit.intercept - fit.slope * step) ** 2 for step, value in zip(steps, values, strict=True))
    return fit.slope, math.sqrt(rest / (n - 2) / (n * (n * n - 1) / 12))


def latencies(steps: Sequence[Step], requests: Sequence[Request]) -> dict[str, Any]:
    """p95 of requests that a swap fell into, over p95 of those that an equal time without one fell into.

    Each request counts relative to the median of its kind without a swap, so that kinds can be taken together. The
    interval is of 1000 draws of the windows, with replacement: 5th to 95th percentile.
    """
    good = [request for request in requests if not request.error]

    def within(began: float, ended: float) -> list[Request]:
        return [request for request in good if request.began < ended and request.ended > began]

    windows = [(within(*step.sham), within(step.began, step.ended)) for step in steps]
    usual = {
        kind: statistics.median(
            [request.ended - request.began for sham, _ in windows for request in sham if request.kind == kind] or [1]
        )
        for kind in KINDS
    }

    def ratio(chosen: Sequence[tuple[list[Request], list[Request]]], kind: str | None = None) -> float | None:
        """None where there was no request on one of the two sides."""
        sham, swapping = (
            [(request.ended - request.began) / usual[request.kind] for request in side if kind in (None, request.kind)]
            for side in (list(itertools.chain(*requests_)) for requests_ in zip(*chosen, strict=True))
        )
        return percentile(swapping, 95) / percentile(sham, 95) if sham and swapping else None

    draws = random.Random(0)
    drawn = [ratio(draws.choices(windows, k=len(windows))) for _ in range(1000)]
    ratios = [value for value in drawn if value is not None]
    return {
        "ratio": ratio(windows),
        "interval": [percentile(ratios, 5), percentile(ratios, 95)] if ratios else None,
        "requests": [sum(len(pair[side]) for pair in windows) for side in (0, 1)],
        "by_kind": {kind: ratio(windows, kind) for kind in KINDS},
        "median_s": usual,
    }


def report(
    server: ServerUnderLoad, requests: list[Request], memory: dict[str, list[float]], planned: int
) -> dict[str, Any]:
    """All figures."""
    strangers = [
        f"{role}@{revision_} in a {request.kind} request"
        for request in requests
        for role, revision_ in request.revisions
        if not server.may_have_answered(role, revision_, request)
    ]
    killed, back = server.outage or (math.inf, -math.inf)
    failed = [request for request in requests if request.error]
    by_kill = [request for request in failed if request.ended > killed and request.began < back]
    others = [request for request in failed if request not in by_kill]
    lost = [
        line
        for request in requests
        for line in request.failed_calls
        if not request.error and not (request.ended > killed and request.began < back)
    ]
    deleted = [step for step in server.steps if step.kind == "deleted in the engine"]
    repeated = [line for line in lost if deleted and "does not exist" in line]
    checked = [request.apart for request in requests if request.apart is not None]
    smooth = [step for step in server.steps if step.kind in ("good", "rollback")]
    took = [step.ended - step.began for step in smooth]
    refused = {step.kind: step.refusal for step in server.steps[:planned] if not step.done}
    return {
        "steps": dict(Counter(step.kind for step in server.steps[:planned])),
        "further_swaps": len(server.steps) - planned,
        "requests": dict(Counter(request.kind for request in requests)),
        "refused": refused,
        "failed": [request.error for request in others],
        "failed_calls": [line for line in lost if line not in repeated],
        "repeated_calls": len(repeated),
        "checked": len(checked),
        "wrong": sum(apart > WITHIN_NATS for apart in checked),
        "furthest": max(checked, default=0.0),
        "failed_by_kill": dict(Counter((request.error or "")[:80] for request in by_kill)),
        "failed_by_kill_untyped": sum(not request.typed for request in by_kill),
        "failed_by_kill_longest_s": max((request.ended - request.began for request in by_kill), default=0.0),
        "outage_s": back - killed if server.outage else None,
        "strangers": strangers,
        "swap_s": {"p50": statistics.median(took), "p95": percentile(took, 95), "max": max(took)},
        "latency": latencies([step for step in smooth if step.sham[1]], requests),
        "memory_mib": {
            name: {
                "first": values[0],
                "last": values[-1],
                "slope": slope(values)[0],
                "standard_error": slope(values)[1],
            }
            for name, values in memory.items()
            if len(values) > 2
        },
    }


def show(figures: dict[str, Any]) -> list[str]:
    """Prints the tables; returns the goals that were missed."""
    latency, swap = figures["latency"], figures["swap_s"]
    goals: list[tuple[str, str, str, bool]] = [
        ("failed requests, but for the killed engine's", "0", str(len(figures["failed"])), not figures["failed"]),
        (
            "failed calls in requests that were answered",
            "0",
            str(len(figures["failed_calls"])),
            not figures["failed_calls"],
        ),
        (
            "answers whose log-probabilities are not their revision's",
            "0",
            f"{figures['wrong']} of {figures['checked']}, the furthest {figures['furthest']:.1e} nats away",
            not figures["wrong"],
        ),
        ("answers from a revision not in the table", "0", str(len(figures["strangers"])), not figures["strangers"]),
        (
            "requests of the killed engine that failed",
            f"typed, within {DEADLINE_S} s",
            f"{sum(figures['failed_by_kill'].values())}, {figures['failed_by_kill_untyped']} untyped, the longest "
            f"{figures['failed_by_kill_longest_s']:.1f} s",
            not figures["failed_by_kill_untyped"] and figures["failed_by_kill_longest_s"] < DEADLINE_S + 5,
        ),
        (
            "p95 during a swap over p95 without",
            "≤ 1.2",
            "not measured: too few requests"
            if latency["ratio"] is None
            else "{ratio:.2f} [{interval[0]:.2f}..{interval[1]:.2f}]".format(**latency),
            latency["ratio"] is not None and latency["ratio"] <= 1.2,
        ),
    ]
    for name, memory in figures["memory_mib"].items():
        spread = 2 * memory["standard_error"]
        slope_ = f"{memory['slope']:+.3f} ± {spread:.3f} ({memory['first']:.0f} → {memory['last']:.0f})"
        if name.endswith(STILL):
            goals.append((f"{name.removesuffix(STILL)}'s memory in as long without a swap, MiB", "", slope_, True))
        else:
            goals.append((f"{name}'s memory a swap, MiB", "flat", slope_, memory["slope"] - spread <= 0.02))
    table(
        "Hot swap",
        ["", "goal", "measured", ""],
        [[what, goal, value, ("met" if met else "MISSED") if goal else ""] for what, goal, value, met in goals],
    )
    rows = [[kind, count, figures["refused"].get(kind, "swapped")] for kind, count in figures["steps"].items()]
    table("What was swapped", ["", "times", "the server said"], rows)
    print(
        f"\nA swap took {swap['p50']:.2f} s (median), {swap['max']:.2f} s at most, over "
        f"{figures['steps'].get('good', 0) + figures['further_swaps'] + figures['steps'].get('rollback', 0)}. "
        f"{sum(figures['requests'].values())} requests; medians without a swap, s: "
        + ", ".join(f"{kind} {value:.2f}" for kind, value in latency["median_s"].items())
        + "; p95 ratio by kind: "
        + ", ".join(f"{kind} {'-' if value is None else f'{value:.2f}'}" for kind, value in latency["by_kind"].items())
        + (f". The engine was back {figures['outage_s']:.0f} s after it was killed." if figures["outage_s"] else ".")
    )
    return [what for what, _, _, met in goals if not met]


# --- the run ---------------------------------------------------------------------------------------------------------


async def measure(
    url: str,
    server: psutil.Process,
    adapters: Path,
    disk: Path | None,
    *,
    engine: "Engine",
    base: Path,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    plan = [step for step in (SMOKE if arguments.smoke else PLAN) if disk or step[0] != "full disk"]
    more = 3 if arguments.smoke else arguments.swaps
    memory: dict[str, list[float]] = {
        name: [] for phase in (STILL, "") for name in (f"gateway{phase}", f"engine{phase}")
    }

    def remember(phase: str) -> None:
        memory["gateway" + phase].append(server.memory_info().rss / 2**20)
        memory["engine" + phase].append(sum(rss_mib(child) for child in server.children()))

    began = time.monotonic()
    async with open_session() as session:
        loaded = ServerUnderLoad(session, url, server, adapters, disk, engine=engine)
        references = json.loads((adapters / "references.json").read_text())
        note(f"two revisions' answers are at least {far_apart(references):.2f} nats apart")
        traffic = Traffic(
            session, url, references, each=arguments.clients, max_tokens=arguments.max_tokens, end=end_token(base)
        )
        async with traffic:
            await asyncio.sleep(0.5 if arguments.smoke else 10)  # caches fill, the first requests are the slowest
            warm = len(traffic.requests)
            for number, (kind, role) in enumerate(plan):
                note(f"{number + 1} of {len(plan)}, {len(traffic.requests)} requests")
                await loaded.step(kind, role, sham=True)
            for number in range(arguments.still):
                await asyncio.sleep(loaded.usual_s())
                remember(STILL)
                if number % 10 == 9:
                    note(f"{number + 1} of {arguments.still} times with nothing swapped")
            for number, role in zip(range(more), itertools.cycle(ROLES), strict=False):
                if time.monotonic() - began > arguments.minutes * 60:
                    break
                await loaded.step("good", role)
                remember("")
                if number % 10 == 9:
                    note(f"{number + 1} of {more} further swaps, {len(traffic.requests)} requests")
            requests = traffic.requests[warm:]
    return report(loaded, requests, memory, len(plan))


def end_token(base: Path) -> int:
    """The id of the token that ends an answer."""
    end = json.loads((base / "config.json").read_text())["eos_token_id"]
    return end[0] if isinstance(end, list) else end


def serve_config(
    base: Path, folder: Path, adapters: Path, disk: Path | None, *, port: int, arguments: argparse.Namespace
) -> Path:
    limits = {"max_tokens": arguments.max_tokens, "timeout_s": DEADLINE_S}
    config = {
        "engine": {
            "base": str(base),
            "max_model_len": 1024,
            "max_lora_rank": 16,
            "max_loras": arguments.slots,
            "max_loaded": arguments.slots,
            "port": port,
            "threads": 1,
            "start_timeout_s": _START_S,
        },
        "gateway": {"port": 0},
        "roles": {role: str(adapters / f"{role}-0") for role in ROLES},
        "fusion": {
            "members": [{"name": "plain", "role": "base", **limits}, {"name": "expert", "role": "domain", **limits}],
            "judge": {"role": "judge", "timeout_s": DEADLINE_S, "max_tokens": 64},  # it says nonsense, at length
            "synthesizer": {"role": "synthesizer", **limits},
            "modes": {"min_responses": 2, "deadline_ms": DEADLINE_S * 1000},
            "trace_db": str((disk or folder) / "traces.sqlite3"),
        },
        "logs": str(folder),
        "state": str(folder / "state"),
    }
    path = folder / "serve.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Builds a base where none is given, and adapters; serves, measures."""
    with tempfile.TemporaryDirectory(prefix="mixfuse-bench-") as name, small_disk(Path(name)) as disk:
        folder = Path(name)
        base: Path = arguments.base or folder / "base"
        if arguments.base is None:
            build = [sys.executable, "-m", "mixfuse", "base", "build", str(base), "--tiny"]
            subprocess.run(build, cwd=ROOT, check=True)
        adapters = folder / "adapters"
        note("making adapters")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(make_adapters, base, adapters, 2 if arguments.smoke else 4, arguments.max_tokens).result()
        note("starting the server")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        engine = Engine(f"http://127.0.0.1:{port}", secrets.token_urlsafe())
        config = serve_config(base, folder, adapters, disk, port=port, arguments=arguments)
        command = [sys.executable, "-c", KEYED, engine.key, "serve", str(config)]
        with process(command, folder / "serve.log", wait_s=_START_S) as (url, server):
            try:
                return uvloop.run(measure(url, server, adapters, disk, engine=engine, base=base, arguments=arguments))
            except Exception:
                print((folder / "serve.log").read_text(errors="replace")[-4000:], file=sys.stderr)
                raise


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of 256 MiB, where this process has a mount namespace of its own; else None."""
    if INSIDE not in os.environ:
        yield None
        return
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "none", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def enter_namespace() -> None:
    """Begins anew in a mount namespace of its own, where that is allowed."""
    unshare = shutil.which("unshare")
    if INSIDE in os.environ or unshare is None:
        return
    if subprocess.run([unshare, "-Urm", "true"], capture_output=True, check=False).returncode == 0:
        os.execve(unshare, [unshare, "-Urm", sys.executable, *sys.argv], {**os.environ, INSIDE: "1"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, help="the base model (default: a random two-layer one)")
    parser.add_argument("--swaps", type=int, default=200, help="further good swaps, for memory (default 200)")
    parser.add_argument(
        "--still", type=int, default=0, help="before them, times as long as a swap with nothing swapped (default 0)"
    )
    parser.add_argument("--slots", type=int, default=2, help="places for adapters in the engine (default 2)")
    parser.add_argument("--minutes", type=float, default=60, help="no further swap after so long (default 60)")
    parser.add_argument("--clients", type=int, default=1, help="that ask at once, for each role (default 1)")
    parser.add_argument("--max-tokens", type=int, default=16, help="of an answer (default 16)")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--smoke", action="store_true", help="few swaps: to see that it runs")
    options = parser.parse_args()
    enter_namespace()
    try:
        figures = main(options)
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    missed = show(figures)
    if options.json:
        print(json.dumps({**figures, "missed": missed}))
