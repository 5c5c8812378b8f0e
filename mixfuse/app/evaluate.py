"""Measurements that need an engine or a server for a moment: `adapter verify`, `eval judge` and `eval fusion`.

Composes `train` (PEFT's side), `serve` (the engine) and `fusion` (the judging).
"""

import asyncio
import os
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from rich.console import Console

from mixfuse.app.admin_api import RoleRow
from mixfuse.app.client import AdminClient, RefusedError
from mixfuse.contracts import adapter, judge_protocol
from mixfuse.contracts.adapter import LORA_RANKS, Fingerprint, Manifest, Parity
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import sha256_json
from mixfuse.contracts.judge_protocol import Calibration
from mixfuse.contracts.strict_yaml import load
from mixfuse.contracts.tasks import Split, Task, TaskSet, make
from mixfuse.fusion.batch import Results, Target
from mixfuse.fusion.calls.upstream import Endpoint
from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.http.keys import API_KEY
from mixfuse.fusion.measure import comparisons, fusion_page, judge_page
from mixfuse.fusion.measure import eval_fusion as fusing
from mixfuse.fusion.measure import eval_judge as judging
from mixfuse.fusion.measure.comparisons import Comparison
from mixfuse.fusion.measure.eval_fusion import Design
from mixfuse.fusion.measure.fusion_report import FusionReport
from mixfuse.fusion.measure.judge_report import JudgeReport, compared
from mixfuse.fusion.measure.questions import Question, Verifier, matches, read_questions
from mixfuse.fusion.store.cache import Cache
from mixfuse.serve.engine import BASE_MODEL_NAME, Engine, EngineConfig
from mixfuse.serve.roles import BASE

UNTRAINED = "untrained"
"""The name of the base as a judge to compare with."""


@dataclass(frozen=True)
class Judges:
    """The judges of one evaluation: adapter directories, or roles of a running server.

    Attributes:
        judge: The judge that the report is about.
        against: Other judges to compare it with.
        untrained: Compare it with its base as well.
        base: The base of adapter directories; None: the base that each was made on.
    """

    judge: str
    against: Sequence[str] = ()
    untrained: bool = False
    base: Path | None = None

    @property
    def names(self) -> list[str]:
        """Every judge but the base, each once."""
        return list(dict.fromkeys([self.judge, *self.against]))

    @property
    def rivals(self) -> list[str]:
        """The judges that the first one is compared with."""
        return [name for name in (*self.against, *([UNTRAINED] if self.untrained else [])) if name != self.judge]


@dataclass(frozen=True)
class TaskSource:
    """Where the tasks of an evaluation of fusing come from, and who checks the answers.

    Attributes:
        tasks: A task file, whose verifiers are reasoning-gym's; None: `data` is read.
        split: The split of the task file.
        count: How many of its tasks.
        data: Files of questions with references.
        limit: Read only this many rows of each data file.
        verifier: `exact`, `number`, `json` or `regex` for `data`; None or `reasoning-gym` for `tasks`.
    """

    tasks: Path | None = None
    split: Split = "heldout"
    count: int = 100
    data: Sequence[Path] = ()
    limit: int | None = None
    verifier: Verifier | Literal["reasoning-gym"] | None = None

    def read(self, seed: int) -> TaskSet[Any]:
        """The tasks with their verifier.

        Args:
            seed: Of the tasks that a task file makes.

        Raises:
            MixfuseError: The verifier does not fit the source, or a file is wrong.
        """
        verifier = self.verifier
        if self.tasks is not None and verifier in (None, "reasoning-gym"):
            return TaskSet(make(self.tasks, self.split, self.count, seed=seed), Task.verify)
        if self.tasks is not None or verifier is None or verifier == "reasoning-gym":
            raise MixfuseError(
                f"--data needs --verifier {', '.join(get_args(Verifier))}; --tasks brings its own, reasoning-gym"
            )

        def verify(question: Question, text: str) -> bool:
            return matches(question, text, verifier)

        return TaskSet(read_questions(self.data, limit=self.limit), verify)

    def described(self) -> dict[str, Any]:
        """The source, for the report."""
        source = {"tasks": str(self.tasks), "split": self.split} if self.tasks else {}
        return {**(source or {"data": ", ".join(map(str, self.data))}), "verifier": self.verifier or "reasoning-gym"}


def verify_parity(directory: Path, base: Path) -> Parity:
    """Checks an adapter directory, then compares vLLM with PEFT on it; the figure goes into its manifest.

    Raises:
        MixfuseError: The directory or the base is wrong, the engine does not start, or the parity gate fails.
    """
    manifest = adapter.verify(directory, base=_fingerprint(base))
    from mixfuse.train.adapters import parity

    wanted = parity.reference(directory, base)

    async def compare() -> Parity:
        async with _engine(base, {directory: manifest}) as engine:
            return await parity.compare(
                wanted, lambda prompt: engine.prompt_logprobs(manifest.revision, prompt), engine_name=_vllm()
            )

    measured = asyncio.run(compare())
    parity.check(directory, measured, wanted)
    return measured


def server_at(url: str) -> Target:
    """The server at `url`, with the API key of the environment."""
    return Target(url, os.environ.get(API_KEY))


def eval_judge(
    judges: Judges, data: Sequence[Path], target: Target, results: Results, *, limit: int | None, concurrency: int
) -> JudgeReport:
    """Evaluates a judge beside others; prints a table. Adapter directories are served by an engine of their own.

    Args:
        judges: The judges.
        data: Files of labelled pairs, taken together.
        target: The running server, for roles.
        results: Where the report, every verdict and the cache go.
        limit: Read only this many rows of each file.
        concurrency: Calls in flight at once.

    Raises:
        MixfuseError: A judge or the data is wrong, or a judge cannot be reached.
    """
    rows = [row for path in data for row in comparisons.load(path, limit=limit)]
    directories = {name: Path(name) for name in judges.names if "/" in name or Path(name).is_dir()}
    by_base = _by_base(judges, directories)
    roles = [name for name in judges.names if name not in directories]
    with results.open_cache() as cache:
        asking = _Asking(rows, cache, concurrency)
        reports = asyncio.run(_evaluate_all(asking, judges, roles, by_base, target))
        asked, known = cache.added, cache.hits
    report = compared(rows, reports[judges.judge], {name: reports[name] for name in judges.rivals})
    Console().print(report.table())
    if results.out:
        judge_page.write(results.out, report, rows, judge=judges.judge)
        _notify(
            f"{results.out}/report.html, report.md, report.json, verdicts.jsonl "
            f"({asked} verdicts asked for, {known} known)"
        )
    return report


class _Asking(NamedTuple):
    """What all judges of an evaluation are asked, and how."""

    rows: Sequence[Comparison]
    cache: Cache
    concurrency: int

    async def of(self, endpoint: Endpoint, name: str) -> JudgeReport:
        """One judge's report."""
        return await judging.evaluate(endpoint, self.rows, concurrency=self.concurrency, cache=self.cache, name=name)

    def all_cached(self, revision: str) -> bool:
        """Whether every verdict of a revision is known."""
        return judging.all_cached(revision, self.rows, self.cache)


def _by_base(judges: Judges, directories: Mapping[str, Path]) -> dict[Path, dict[str, tuple[Path, Manifest]]]:
    """Base → name of a judge on it → (adapter directory, manifest)."""
    by_base: dict[Path, dict[str, tuple[Path, Manifest]]] = defaultdict(dict)
    for name, directory in directories.items():
        manifest = _judge_manifest(directory)
        by_base[judges.base or Path(manifest.base_path)][name] = (directory, manifest)
    return by_base


async def _evaluate_all(
    asking: _Asking,
    judges: Judges,
    roles: Sequence[str],
    by_base: Mapping[Path, Mapping[str, tuple[Path, Manifest]]],
    target: Target,
) -> dict[str, JudgeReport]:
    """Name of a judge → its report."""
    reports: dict[str, JudgeReport] = {}
    if roles:
        base_too = judges.untrained and judges.judge in roles
        reports |= await _evaluate_roles(asking, [*roles, BASE] if base_too and BASE not in roles else roles, target)
        if base_too:
            reports[UNTRAINED] = reports[BASE]
    for base, on_base in by_base.items():
        reports |= await _evaluate_directories(
            asking, base, on_base, untrained=judges.untrained and judges.judge in on_base
        )
    return reports


async def _evaluate_roles(asking: _Asking, roles: Sequence[str], target: Target) -> dict[str, JudgeReport]:
    served = _served(target.url)
    reports = {}
    for role in roles:
        revision, calibration = served.get(role, (None, None))
        endpoint = Endpoint(target.v1, role, target.key, revision, calibration=calibration)
        reports[role] = await asking.of(endpoint, role)
    return reports


async def _evaluate_directories(
    asking: _Asking, base: Path, on_base: Mapping[str, tuple[Path, Manifest]], *, untrained: bool
) -> dict[str, JudgeReport]:
    """Judges of one base, on one engine, which is started only where a verdict is missing."""
    fingerprint = _fingerprint(base)
    for directory, _ in on_base.values():
        adapter.verify(directory, base=fingerprint)
    endpoints = {
        name: Endpoint("", manifest.revision, None, manifest.revision, calibration=manifest.calibration)
        for name, (_, manifest) in on_base.items()
    }
    if untrained:
        revision = f"base {sha256_json(fingerprint.model_dump())}"
        endpoints[UNTRAINED] = Endpoint("", BASE_MODEL_NAME, None, revision)
    async with AsyncExitStack() as stack:
        if not all(asking.all_cached(str(endpoint.revision)) for endpoint in endpoints.values()):
            engine = await stack.enter_async_context(_engine(base, dict(on_base.values())))
            endpoints = {
                name: replace(endpoint, base_url=engine.url, api_key=engine.api_key)
                for name, endpoint in endpoints.items()
            }
        return {name: await asking.of(endpoint, name) for name, endpoint in endpoints.items()}


def eval_fusion(
    config_path: Path, source: TaskSource, target: Target, design: Design, results: Results
) -> FusionReport:
    """Evaluates fusing at a running gateway or server; prints a table and the verdict.

    Args:
        config_path: The fusion config it runs with.
        source: The tasks. They are made with the sampling's seed.
        target: The gateway.
        design: What is compared; `same` is set here, by the verifier or else the config.
        results: Where the report, every answer and the cache go.

    Raises:
        MixfuseError: The config or the tasks are wrong or too few, or the gateway cannot be reached or refuses.
    """
    config = load(config_path, FusionConfig)
    tasks = source.read(design.sampling.seed or 0)
    same = source.verifier if source.verifier in ("exact", "number", "json") else config.modes.agreement
    design = replace(design, same="exact" if same == "never" else same)
    served = {role: revision for role, (revision, _) in _served(target.url).items()}
    with results.open_cache() as cache:
        report, answers = asyncio.run(fusing.evaluate(config, target, tasks, design, cache=cache, served=served))
        asked, known = cache.added, cache.hits
    console = Console()
    console.print(report.table())
    console.print(report.verdict.words, markup=False, highlight=False, soft_wrap=True)
    if results.out:
        settings = {**source.described(), **design.sampling.parameters(), "concurrency": design.concurrency}
        fusion_page.write(results.out, report, tasks, answers, settings=settings)
        _notify(
            f"{results.out}/report.html, report.md, report.json, answers.jsonl ({asked} requests made, {known} known)"
        )
    return report


def _notify(message: str) -> None:
    Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)


def _judge_manifest(directory: Path) -> Manifest:
    manifest = adapter.read_manifest(directory)
    if manifest.judge_protocol != judge_protocol.describe():
        raise MixfuseError(f"{directory} is no judge of this version's judge protocol (role {manifest.role!r})")
    return manifest


def _served(url: str) -> dict[str, tuple[str | None, Calibration | None]]:
    """Role → (revision, calibration) of the server at `url`; empty for a gateway that has no roles.

    Raises:
        MixfuseError: Nothing answers there, or the server fails.
    """
    try:
        rows = AdminClient(url).roles()
    except RefusedError:
        return {}
    return {row.role: (row.revision, _calibration(row)) for row in rows}


def _calibration(row: RoleRow) -> Calibration | None:
    """A served role's calibration, if its adapter directory can be read on this machine."""
    directory = Path(row.directory) if row.directory else None
    if directory is None or not (directory / adapter.MANIFEST).is_file():
        return None
    manifest = adapter.read_manifest(directory)
    return manifest.calibration if manifest.revision == row.revision else None


@asynccontextmanager
async def _engine(base: Path, adapters: Mapping[Path, Manifest]) -> AsyncIterator[Engine]:
    """An engine on `base`, float32, with adapters under the names of their revisions, for as long as the block runs."""
    rank, directory = max((manifest.rank, directory) for directory, manifest in adapters.items())
    fitting = next((known for known in LORA_RANKS if known >= rank), None)
    if fitting is None:
        raise MixfuseError(f"{directory}: rank {rank} is above the largest that vLLM serves, {LORA_RANKS[-1]}")
    with tempfile.TemporaryDirectory(prefix="mixfuse-") as folder:
        config = EngineConfig(base=base, dtype="float32", max_lora_rank=fitting, max_loras=1, max_model_len=2048)
        engine = Engine(config, log_path=Path(folder) / "engine.log")
        with Console(stderr=True).status("starting vLLM"):
            await engine.start()
        try:
            for directory, manifest in adapters.items():
                await engine.load_adapter(manifest.revision, directory)
            yield engine
        finally:
            await engine.stop()


def _fingerprint(base: Path) -> Fingerprint:
    if not (base / "config.json").is_file():
        raise MixfuseError(f"{base} is no model folder (no config.json); name the base with --base")
    return adapter.fingerprint(base)


def _vllm() -> str:
    import vllm

    return f"vllm {vllm.__version__}"
