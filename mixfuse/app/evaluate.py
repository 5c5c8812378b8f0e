"""What needs an engine or a server for a moment: the parity gate of `adapter verify`, `eval judge` and `eval fusion`.

Composes `train` (PEFT's side), `serve` (the engine) and `fusion` (the judging).
"""

import asyncio
import os
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console

from mixfuse.app.admin_api import RoleRow
from mixfuse.app.client import AdminClient, RefusedError
from mixfuse.contracts import adapter, judge_protocol
from mixfuse.contracts.adapter import LORA_RANKS, Fingerprint, Manifest, Parity
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import sha256_json
from mixfuse.contracts.judge_protocol import Calibration
from mixfuse.contracts.strict_yaml import load
from mixfuse.contracts.tasks import Split, Task, make
from mixfuse.fusion.calls.upstream import Endpoint
from mixfuse.fusion.config import Agreement, FusedMode, FusionConfig
from mixfuse.fusion.http.keys import API_KEY
from mixfuse.fusion.measure import eval_fusion as fusing
from mixfuse.fusion.measure import eval_judge as judging
from mixfuse.fusion.measure import fusion_page, judge_page
from mixfuse.fusion.measure.eval_fusion import FusionReport
from mixfuse.fusion.measure.eval_judge import JudgeReport
from mixfuse.fusion.measure.questions import Question, Verifier, matches, read_questions
from mixfuse.fusion.store.cache import Cache
from mixfuse.serve.engine import BASE_MODEL_NAME, Engine, EngineConfig
from mixfuse.serve.roles import BASE

UNTRAINED = "untrained"
"""What the base is called as a judge to compare with."""


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


def eval_judge(
    judge: str,
    data: Sequence[Path],
    *,
    base: Path | None,
    url: str,
    limit: int | None,
    concurrency: int,
    against: Sequence[str] = (),
    untrained: bool = False,
    out: Path | None = None,
    cache: Path | None = None,
) -> JudgeReport:
    """Evaluates judges, adapter directories (on an engine of their own) or roles of a running server; prints a table.

    Args:
        judge: The judge the report is about.
        data: Files of labelled pairs, taken together.
        base: The base of adapter directories; unset: the one each was made on.
        url: The running server, for roles.
        limit: Only the first so many rows of each file.
        concurrency: Calls under way at once.
        against: Other judges to compare it with.
        untrained: Compare it with its base as well.
        out: Where to write the report, and every verdict.
        cache: A file that keeps verdicts; unset: in `out`, or none.

    Raises:
        MixfuseError: A reference or the data is wrong, or a judge cannot be reached.
    """
    rows = [row for path in data for row in judging.load(path, limit=limit)]
    refs = list(dict.fromkeys([judge, *against]))
    directories = {ref: Path(ref) for ref in refs if "/" in ref or Path(ref).is_dir()}
    roles = [ref for ref in refs if ref not in directories]
    base_of_a_role = untrained and judge in roles
    by_base: dict[Path, dict[str, tuple[Path, Manifest]]] = defaultdict(dict)
    for ref, directory in directories.items():
        manifest = _judge_manifest(directory)
        by_base[base or Path(manifest.base_path)][ref] = (directory, manifest)
    served = _served(url) if roles else {}

    async def measure(kept: Cache) -> dict[str, JudgeReport]:
        async def one(endpoint: Endpoint, name: str) -> JudgeReport:
            return await judging.evaluate(endpoint, rows, concurrency=concurrency, cache=kept, name=name)

        reports: dict[str, JudgeReport] = {}
        for role in [*roles, *([BASE] if base_of_a_role and BASE not in roles else [])]:
            revision, calibration = served.get(role, (None, None))
            place = f"{url.rstrip('/')}/v1"
            endpoint = Endpoint(place, role, os.environ.get(API_KEY), revision, calibration=calibration)
            reports[role] = await one(endpoint, role)
        if base_of_a_role:
            reports[UNTRAINED] = reports[BASE]
        for model, judges in by_base.items():
            fingerprint = _fingerprint(model)
            for directory, _ in judges.values():
                adapter.verify(directory, base=fingerprint)
            wanted = {
                ref: (manifest.revision, manifest.revision, manifest.calibration)
                for ref, (_, manifest) in judges.items()
            }
            if untrained and judge in judges:
                wanted[UNTRAINED] = (BASE_MODEL_NAME, f"base {sha256_json(fingerprint.model_dump())}", None)
            async with AsyncExitStack() as stack:
                place, key = "", None  # of nobody, where every verdict is known
                if not all(judging.known(revision, rows, kept) for _, revision, _ in wanted.values()):
                    engine = await stack.enter_async_context(_engine(model, dict(judges.values())))
                    place, key = engine.url, engine.api_key
                for ref, (name, revision, calibration) in wanted.items():
                    endpoint = Endpoint(place, name, key, revision, calibration=calibration)
                    reports[ref] = await one(endpoint, ref)
        return reports

    with Cache(cache or (out / "cache.sqlite3" if out else None)) as kept:
        reports = asyncio.run(measure(kept))
        asked, found = kept.added, kept.hits
    own = reports[judge]
    others = {ref: reports[ref] for ref in [*against, *([UNTRAINED] if untrained else [])] if ref != judge}
    report = judging.compared(rows, own, others)
    Console().print(report.table())
    if out:
        judge_page.write(out, report, rows, judge=judge)
        _say(f"{out}/report.html, report.md, report.json, verdicts.jsonl ({asked} verdicts asked for, {found} known)")
    return report


def eval_fusion(
    config_path: Path,
    *,
    tasks: Path | None,
    data: Sequence[Path] | None,
    verifier: Verifier | Literal["reasoning-gym"] | None,
    split: Split,
    count: int,
    limit: int | None,
    modes: Sequence[FusedMode],
    choose_share: float,
    temperature: float | None,
    max_tokens: int | None,
    seed: int,
    concurrency: int,
    url: str,
    out: Path | None,
    cache: Path | None,
) -> FusionReport:
    """Evaluates fusing at a running gateway or server; prints a table and the verdict.

    Args:
        config_path: The fusion config it runs with.
        tasks: A task file, whose verifiers are reasoning-gym's; else `data`.
        data: Files of questions with references.
        verifier: `exact`, `number`, `json` or `regex` for `data`; unset or `reasoning-gym` for `tasks`.
        split: Of the task file.
        count: How many tasks of it.
        limit: Only the first so many rows of each data file.
        modes: Those to evaluate.
        choose_share: The share of the tasks to choose the best member on.
        temperature: Sent with every request; unset: each member's own.
        max_tokens: Likewise.
        seed: Of the tasks and the answers.
        concurrency: Requests under way at once.
        url: Where it runs.
        out: Where to write the report, and every answer.
        cache: A file that keeps answers; unset: in `out`, or none.

    Raises:
        MixfuseError: The config or the tasks are wrong or too few, or the gateway cannot be reached or refuses.
    """
    config = load(config_path, FusionConfig)
    sent = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    parameters = {name: value for name, value in sent.items() if value is not None}
    questions, right = _questions(tasks, data, verifier, split=split, count=count, limit=limit, seed=seed)
    same: Agreement = verifier if verifier in ("exact", "number", "json") else config.modes.agreement
    served = {role: revision for role, (revision, _) in _served(url).items()}
    with Cache(cache or (out / "cache.sqlite3" if out else None)) as kept:
        measuring = fusing.evaluate(
            config,
            url,
            questions,
            verify=right,
            same="exact" if same == "never" else same,
            modes=modes,
            choose_share=choose_share,
            parameters=parameters,
            concurrency=concurrency,
            cache=kept,
            served=served,
            api_key=os.environ.get(API_KEY),
        )
        report, answers = asyncio.run(measuring)
        asked, found = kept.added, kept.hits
    console = Console()
    console.print(report.table())
    console.print(report.verdict.words, markup=False, highlight=False, soft_wrap=True)
    if out:
        source = {"tasks": str(tasks), "split": split} if tasks else {"data": ", ".join(map(str, data or ()))}
        about = {**source, "verifier": verifier or "reasoning-gym", **parameters, "concurrency": concurrency}
        fusion_page.write(out, report, questions, answers, verify=right, about=about)
        _say(f"{out}/report.html, report.md, report.json, answers.jsonl ({asked} requests made, {found} known)")
    return report


def _questions(
    tasks: Path | None,
    data: Sequence[Path] | None,
    verifier: Verifier | Literal["reasoning-gym"] | None,
    *,
    split: Split,
    count: int,
    limit: int | None,
    seed: int,
) -> tuple[Sequence[Any], Callable[[Any, str], bool]]:
    """(what to ask, whether an answer to it is right).

    Raises:
        MixfuseError: The verifier does not go with what is asked, or the file is wrong.
    """
    if tasks is not None and verifier in (None, "reasoning-gym"):
        return make(tasks, split, count, seed=seed), Task.verify
    if tasks is not None or verifier is None or verifier == "reasoning-gym":
        raise MixfuseError(
            f"--data needs --verifier {', '.join(get_args(Verifier))}; --tasks brings its own, reasoning-gym"
        )

    def right(question: Question, text: str) -> bool:
        return matches(question, text, verifier)

    return read_questions(data or (), limit=limit), right


def _say(words: str) -> None:
    Console(stderr=True).print(words, markup=False, highlight=False, soft_wrap=True)


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
