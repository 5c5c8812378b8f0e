"""Measurements that need an engine or a server for a moment: `adapter verify`, `eval judge` and `eval fusion`.

Composes `train` (PEFT's side), `serve` (the engine) and `fusion` (the judging).
"""

import asyncio
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from rich.console import Console

from mixfuse.app.admin_api import RoleRow
from mixfuse.app.client import AdminClient, RefusedError
from mixfuse.app.trial_engine import EngineChoice, Trial, trial
from mixfuse.contracts import adapter, agreement, judge_protocol
from mixfuse.contracts.adapter import Fingerprint, Manifest, Parity
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import sha256_json
from mixfuse.contracts.judge_protocol import Calibration
from mixfuse.contracts.preferences import KEYS
from mixfuse.contracts.strict_yaml import load
from mixfuse.contracts.tasks import Split, Task, TaskSet, make
from mixfuse.fusion.batch import Results, Target
from mixfuse.fusion.calls.dialect import Dialect
from mixfuse.fusion.calls.upstream import Endpoint
from mixfuse.fusion.config import FusionConfig, Judge
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
from mixfuse.serve.admission import check_template
from mixfuse.serve.engine import BASE_MODEL_NAME, served_template
from mixfuse.serve.precision import precision
from mixfuse.serve.probes import ask_verdicts
from mixfuse.serve.roles import BASE
from mixfuse.serve.vllm_api import VllmApi

if TYPE_CHECKING:
    from mixfuse.train.adapters.parity import Reference, Said

UNTRAINED = "untrained"
"""The name of the base as a judge to compare with."""


@dataclass(frozen=True)
class Judges:
    """The judges of one evaluation: adapter directories, or roles of a running server.

    Attributes:
        judge: The judge that the report is about. A name that ends in `.yaml` is a judge's config: any endpoint, also a
            reward model's.
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

    def configs(self) -> dict[str, Judge]:
        """The judges that are named by a config file.

        Raises:
            MixfuseError: A config is wrong, or cannot be used here.
        """
        found = {name: load(Path(name), Judge) for name in self.names if name.endswith((".yaml", ".yml"))}
        for name, model in found.items():
            if model.base_url is None:
                raise MixfuseError(f"{name}: a judge's config needs 'base_url' and 'model'; name a role by itself")
            if self.untrained and name == self.judge:
                raise MixfuseError(
                    f"--baseline untrained is for adapters and roles; {name} is another endpoint's model"
                )
        return found


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


class Verified(NamedTuple):
    """What a comparison of an adapter in vLLM with the same adapter in PEFT found.

    Attributes:
        parity: The comparison; of several engines, of the one that is farthest from PEFT.
        verdicts: The largest difference of a judge's verdicts there; None if none were compared.
        stored: What was stored of it, or why nothing was, for people.
    """

    parity: Parity
    verdicts: float | None
    stored: str


def verify_parity(directory: Path, base: Path | None, choice: EngineChoice) -> Verified:
    """Checks an adapter directory, then compares vLLM with PEFT on it; the figure goes into its manifest.

    What an engine of another number format than float32 said is stored with PEFT's answers, unless that format is not
    known: later swaps are held to it.

    Args:
        directory: The adapter directory.
        base: The base model; None: the serve config's.
        choice: The engine. Of several running ones, each is compared.

    Raises:
        MixfuseError: The directory, the base or the choice is wrong, the engine does not start, the parity gate fails,
            or engines of one config differ from each other.
    """
    manifest = adapter.read_manifest(directory)
    if choice.config is None:
        named = manifest.recipe.get("chat_template")
        choice = replace(choice, chat_template=str(named) if named else None)
    config = choice.engine(base, rank=manifest.rank)
    adapter.verify(directory, base=_fingerprint(config.base))
    from mixfuse.train.adapters import parity

    wanted = parity.reference(directory, config.base, length=choice.probe_length(config))
    if wanted.verdicts:
        check_template(directory, manifest, served_template(config))

    async def compare() -> tuple[str, list[_Compared]]:
        async with trial(choice, config.base, {directory: manifest}) as on:
            fitting = wanted.within(on.probe_length)
            if on.precision == "float32":
                fitting = fitting.without_repeats()
            found = [await _compared(engine, directory, fitting, on) for engine in on.engines]
            found.sort(key=lambda one: one.parity.max_abs_logprob_difference, reverse=True)
            for other in found[1:]:
                _check_alike(directory, found[0], other, fitting.prompts)
            return on.precision, found

    format_, found = asyncio.run(compare())
    farthest = found[0]
    kept, stored = {}, f"stored: PEFT's answers, and the engine's as those of {format_}, which swaps there compare with"
    if manifest.signature is not None:
        stored = "nothing is stored, because the manifest is signed"
    elif format_ == "float32":
        stored = "stored: PEFT's answers"
    elif choice.url is not None:
        stored = (
            "stored: PEFT's answers; the engine's are not, because its number format is not known (name it and its URL "
            "in a serve config, and use --config)"
        )
    else:
        kept = {format_: farthest.said}
    parity.check(directory, farthest.parity, wanted, measured=kept)
    off = [abs(p - probe.p) for p, probe in zip(farthest.said.verdicts, wanted.verdicts, strict=True)]
    return Verified(farthest.parity, max(off, default=None), stored)


class _Compared(NamedTuple):
    """One engine's answers, beside PEFT's."""

    name: str
    parity: Parity
    said: "Said"


async def _compared(engine: VllmApi, directory: Path, wanted: "Reference", on: Trial) -> _Compared:
    """Asks an engine, and compares it with PEFT.

    Raises:
        MixfuseError: It does not answer, or they differ.
    """
    from mixfuse.train.adapters import parity

    model, name = on.names[directory], f"vllm at {engine.url}" if on.external else _vllm()
    answers = await parity.measure(
        wanted, partial(engine.prompt_logprobs, model), partial(engine.prompt_logprobs, engine.base_model_name)
    )
    found = parity.compared(wanted, answers, engine_name=name, precision=on.precision)
    parity.check_agrees(directory, found)
    verdicts = await ask_verdicts(engine, model, wanted.verdicts)
    limit = agreement.verdict_limit(found.tolerance, found.base_deviation)
    known = [probe.p for probe in wanted.verdicts]
    if wrong := agreement.verdict_fault(verdicts, known, limit=limit, when="in PEFT"):
        raise MixfuseError(f"{directory}: parity failed in {on.precision}: {name}: {wrong}", kind="parity")
    return _Compared(name, found, parity.Said(answers, [p for p in verdicts if p is not None]))


def _check_alike(directory: Path, first: _Compared, other: _Compared, prompts: Sequence[Sequence[int]]) -> None:
    """Refuses engines of one config of which a swap would refuse one, held to what another said.

    Raises:
        MixfuseError: They serve different bases (kind "engine") or adapters, or differ more than their number format
            explains.
    """
    format_, tolerance = other.parity.dtype, other.parity.tolerance
    allowed = agreement.batch_tolerance(format_, tolerance)
    one, two = first.said.answers, other.said.answers
    if wrong := agreement.base_fault(one.base, two.base, allowed=allowed):
        raise MixfuseError(f"{first.name} and {other.name}: {wrong}", kind="engine")
    if format_ == "float32":  # both were compared with PEFT, which nothing rounds
        return
    found = agreement.compare(one, two, prompts)
    limit = agreement.verdict_limit(allowed, found.drift)
    wrong = agreement.fault(found, tolerance=tolerance) or agreement.verdict_fault(
        other.said.verdicts, first.said.verdicts, limit=limit, when=f"in {first.name}"
    )
    if wrong:
        raise MixfuseError(f"{directory}: {other.name} differs from {first.name} in {format_}: {wrong}", kind="parity")


def server_at(url: str) -> Target:
    """The server at `url`, with the API key of the environment."""
    return Target(url, os.environ.get(API_KEY))


def eval_judge(
    judges: Judges,
    data: Sequence[Path],
    target: Target,
    results: Results,
    *,
    limit: int | None,
    concurrency: int,
    choice: EngineChoice | None = None,
) -> JudgeReport:
    """Evaluates a judge beside others; prints a table. Adapter directories are served by an engine of their own.

    Args:
        judges: The judges.
        data: Files of labelled pairs, taken together.
        target: The running server, for roles.
        results: Where the report, every verdict and the cache go.
        limit: Read only this many rows of each file.
        concurrency: Calls in flight at once.
        choice: The engine for adapter directories; None: one with the default settings.

    Raises:
        MixfuseError: A judge or the data is wrong, or a judge cannot be reached.
    """
    found = {path: comparisons.load_all(path, limit=limit, rows=_other_files(path)) for path in data}
    for path, read in found.items():
        _notify(f"{path}: {read.described()}")
    rows = [row for read in found.values() for row in read.pairs]
    configs = judges.configs()
    paths = [name for name in judges.names if name not in configs and ("/" in name or Path(name).is_dir())]
    directories = {name: Path(name) for name in paths}
    if choice not in (None, EngineChoice()) and not directories:
        raise MixfuseError("--config, --dtype, --tensor-parallel-size and --engine-url are for adapter directories")
    by_base = _by_base(judges, directories)
    roles = [name for name in judges.names if name not in directories and name not in configs]
    with results.open_cache() as cache:
        asking = _Asking(rows, cache, concurrency, choice or EngineChoice())
        reports = asyncio.run(_evaluate_all(asking, judges, roles, by_base, target))
        asked, known = cache.added, cache.hits
    report = compared(rows, reports[judges.judge], {name: reports[name] for name in judges.rivals})
    Console(markup=False, emoji=False).print(report.table())
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
    choice: EngineChoice

    async def of(self, endpoint: Endpoint, name: str, model: Judge | None = None) -> JudgeReport:
        """One judge's report."""
        return await judging.evaluate(
            endpoint, self.rows, concurrency=self.concurrency, cache=self.cache, name=name, model=model
        )

    def all_cached(self, revision: str) -> bool:
        """Whether every verdict of a revision is known."""
        return judging.all_cached(revision, self.rows, self.cache)


def _other_files(path: Path) -> Iterator[tuple[str, dict[str, Any]]] | None:
    """The rows of Parquet, CSV, a folder of shards or a pattern; None for a JSON file, which needs no training code."""
    if not path.is_dir() and path.suffix in (".jsonl", ".json", ".gz"):
        return None
    from mixfuse.train.data.sources import rows
    from mixfuse.train.recipe import DataSource

    return rows(DataSource(path=path), wanted=KEYS)


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
    reports = await _evaluate_configs(asking, judges)
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


async def _evaluate_configs(asking: _Asking, judges: Judges) -> dict[str, JudgeReport]:
    reports = {}
    for name, model in judges.configs().items():
        endpoint = Endpoint(str(model.base_url), str(model.model), model.api_key, headers=model.headers)
        reports[name] = await asking.of(replace(endpoint, dialect=Dialect(model)), name, model)
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
    asking: _Asking,
    base: Path,
    on_base: Mapping[str, tuple[Path, Manifest]],
    *,
    untrained: bool,
) -> dict[str, JudgeReport]:
    """Judges of one base, on one engine, which is started only where a verdict is missing."""
    fingerprint = _fingerprint(base)
    for directory, _ in on_base.values():
        adapter.verify(directory, base=fingerprint)
    config = asking.choice.engine(base, rank=max(manifest.rank for _, manifest in on_base.values()))
    # What another number format said is no answer of this one; of a running engine it is not known.
    said_in = f" at {config.external[0]}" if config.external else f" in {precision(config)}"
    suffix = "" if said_in == " in float32" else said_in
    endpoints = {
        name: Endpoint("", manifest.revision, None, manifest.revision + suffix, calibration=manifest.calibration)
        for name, (_, manifest) in on_base.items()
    }
    if untrained:
        revision = f"base {sha256_json(fingerprint.model_dump())}{suffix}"
        endpoints[UNTRAINED] = Endpoint("", BASE_MODEL_NAME, None, revision)
    async with AsyncExitStack() as stack:
        if not all(asking.all_cached(str(endpoint.revision)) for endpoint in endpoints.values()):
            on = await stack.enter_async_context(trial(asking.choice, base, dict(on_base.values())))
            engine = on.engines[0]
            models = {name: on.names[directory] for name, (directory, _) in on_base.items()}
            models[UNTRAINED] = engine.base_model_name
            endpoints = {
                name: replace(endpoint, model=models[name], base_url=engine.url, api_key=engine.api_key)
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
    console = Console(markup=False, emoji=False)
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


def judge_at(name: str, target: Target) -> Endpoint:
    """Returns a role or a member of a running server as a judge, with the calibration of its adapter.

    Raises:
        MixfuseError: Nothing answers there.
    """
    revision, calibration = _served(target.url).get(name, (None, None))
    return Endpoint(f"{target.url}/v1", name, target.key, revision=revision, calibration=calibration)


def _fingerprint(base: Path) -> Fingerprint:
    if not (base / "config.json").is_file():
        raise MixfuseError(f"{base} is no model folder (no config.json); name the base with --base")
    return adapter.fingerprint(base)


def _vllm() -> str:
    import vllm

    return f"vllm {vllm.__version__}"
