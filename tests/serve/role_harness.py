"""A role table in a test: a fake engine that the test holds up or lets fail, and complete adapter directories."""

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from mixfuse.app.roles_store import StoredRoles
from mixfuse.contracts import adapter, judge_protocol
from mixfuse.contracts.adapter import CONFIG, MANIFEST, PROBES, WEIGHTS, Fingerprint, Manifest, Probes
from mixfuse.contracts.database import opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.serve.admission import Admission
from mixfuse.serve.probes import Terms
from mixfuse.serve.roles import RoleTable
from mixfuse.serve.slots import Trouble
from mixfuse.serve.swap import Swapper

BASE = Fingerprint(**dict.fromkeys(("config", "tokenizer", "chat_template", "weights"), "0" * 64))

LORA = {"peft_type": "LORA", "lora_alpha": 2, "target_modules": ["q_proj"]}


class FakeEngine:
    """Keeps the names that are loaded; a test makes its calls wait or fail."""

    base_model_name = "base"
    started: str | None = None

    def __init__(self) -> None:
        self.loaded: set[str] = set()
        self.paths: dict[str, Path] = {}
        self.troubles: dict[str, Trouble] = {}
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

    async def ready(self) -> None:
        pass

    async def load_adapter(self, name: str, path: Path) -> None:
        await self._step("load", name)
        assert name not in self.loaded, "vLLM refuses a name that is loaded"
        self.loaded.add(name)
        self.paths[name] = path

    async def unload_adapter(self, name: str) -> None:
        await self._step("unload", name)
        if name not in self.loaded:
            raise MixfuseError("it cannot be found", kind="adapter")
        self.loaded.remove(name)

    def trouble(self, name: str) -> Trouble | None:
        return self.troubles.get(name)

    async def repair(self, name: str) -> None:
        await self._step("repair", name)
        self.troubles.pop(name, None)

    async def probe(self, name: str) -> None:
        await self._step("probe", name)
        assert name in {"base", *self.loaded}

    async def prompt_logprobs(self, name: str, prompt: list[int]) -> list[float]:
        assert name in {"base", *self.loaded}
        return [self.says.get(name, -2.0)] * (len(prompt) - 1)

    async def busy(self) -> bool:
        return False

    def each(self) -> "list[FakeEngine]":
        return [self]

    async def ranks(self) -> "list[FakeEngine]":
        return [self]

    async def max_model_len(self) -> int:
        return 1024

    async def decode(self, name: str, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
        return [7] * tokens, (await self.prompt_logprobs(name, [*prompt, *[7] * tokens]))[-tokens:]

    async def first_token_logprobs(self, name: str, messages: list[dict[str, str]]) -> dict[str, float]:
        p = self.prefers.get(name, 0.5)
        return {" A": math.log(p), "B": math.log(1 - p)}


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """Makes complete adapter directories, each once; equal numbers make equal revisions."""
    done: set[Path] = set()

    def make(
        number: int,
        role: str = "domain",
        *,
        probes: Probes | None = None,
        at: Path | None = None,
        rank: int = 2,
        **facts,
    ) -> Path:
        folder = at or tmp_path / f"{role}-{number}"
        if folder in done and at is None:
            return folder
        done.add(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stem = "base_model.model.model.layers.0.self_attn.q_proj"
        weights = {
            f"{stem}.lora_A.weight": numpy.full((rank, 8), number + 1, numpy.float32),
            f"{stem}.lora_B.weight": numpy.ones((8, rank), numpy.float32),
        }
        save_file(weights, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(LORA | {"r": rank}))
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
            **facts,
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json())
        return folder

    return make


@pytest.fixture
def stores(tmp_path: Path):
    """Makes records of gateways on one database."""
    with opened(tmp_path / "traces.sqlite3") as database:
        yield lambda gateway="one": StoredRoles(database, gateway)


def revision(directory: Path) -> str:
    return adapter.read_manifest(directory).revision


def table(
    engine: FakeEngine,
    *roles: str,
    probe_tolerance: float | None = None,
    precision: str = "float32",
    unprobed: bool = True,
    chat_template: str | None = None,
    store: StoredRoles | None = None,
    **keys,
) -> Swapper:
    """The swapper of a fresh role table."""
    terms = Terms(probe_tolerance, precision)
    admission = Admission(BASE, 8, terms=terms, unprobed=unprobed, chat_template=chat_template)
    return Swapper(RoleTable(engine, list(roles) or ["domain"], admission, record=store, **keys))


async def leased(roles: Swapper, role: str = "domain") -> str:
    async with roles.table.lease(role) as held:
        return held.model
