"""`mixfuse loop`: from the traces since the last round to a better judge, or to the reason why not.

A round is a folder, `ROUNDS/0001`, with everything in it: the config it began with, the traces as they were read, the
pairs and their data card, the recipe, the run, the adapter, the evaluations with every verdict, and `decision.json`. A
step is done once its result stands in `steps/`; the round that was killed is gone on with from there.

People's feedback can be wrong, and be meant to be. So what was learned from it is measured on a set that feedback never
reaches, and only that set can promote a judge: the fresh traces, whose labels come from the same people, can only speak
against it.
"""

import fcntl
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from rich.console import Console

from mixfuse.app.admin_api import SwapRequest
from mixfuse.app.client import AdminClient, RefusedError
from mixfuse.app.preferences import PairsSpec, Source, refuse_password
from mixfuse.app.preferences import build as build_pairs
from mixfuse.app.verifiers import ByTasks
from mixfuse.contracts.database import opened
from mixfuse.contracts.errors import PREEMPTED, MixfuseError, Preempted
from mixfuse.contracts.files import atomic_directory, read_json, read_jsonl, write_json, write_jsonl, write_text
from mixfuse.contracts.strict_yaml import Strict, validate
from mixfuse.fusion.measure.statistics import Difference
from mixfuse.fusion.store.export_traces import read as read_traces
from mixfuse.train.data.pair_filters import Filters
from mixfuse.train.data.pairs import dev_path, is_dev

DECISION = "decision.json"
ROUND = "round.json"
FEEDBACK = "feedback"
"""What the round's own pairs are called."""
_POLL_S = 1.0


class Traces(Strict):
    """What is taken from the traces.

    Attributes:
        database: The gateway's `trace_db`: a path or a URL.
        tasks: Tasks whose verifiers outweigh feedback for traces with their prompts.
        min_agreement: Users who agree with everyone else less often are not heard; see `mixfuse traces export`.
        settle_s: Only traces at least this old, in seconds: people need time to say what they think, and a request that
            is still under way, or waits in a gateway's spool, would otherwise be in no round.
        min_rows: Fewer new traces of which something is known make no round; they wait for the next.
    """

    database: str
    tasks: ByTasks | None = None
    min_agreement: float | None = Field(default=0.5, ge=0, le=1)
    settle_s: float = Field(default=600.0, ge=0)
    min_rows: PositiveInt = 100


class Pairs(Filters):
    """How the round's pairs are filtered, see `train/data/pair_filters.py`, and what is trained on beside the feedback.

    Attributes:
        dev_share: Share of the prompts that are not trained on; the fresh traces' are what is evaluated on.
        sources: Further sources, as in a spec of `mixfuse pairs build`: an anchor against bad feedback.
        weight: Of the round's own pairs, where the sources have weights.
        seed: Of every choice.
    """

    dev_share: float = Field(default=0.25, gt=0, lt=1)
    sources: tuple[Source, ...] = ()
    weight: PositiveFloat | None = None
    seed: int = 0


class Promote(Strict):
    """What a new judge has to show.

    Attributes:
        measure: Of the pairs that people did not call a tie; see `mixfuse eval judge`.
        margin: On the frozen set, the new judge must be better by more than this: the lower end of the 95 % interval of
            the paired difference lies above it.
        alpha: And the paired test's p-value must not be above this.
        min_prompts: A frozen set of fewer prompts decides nothing.
        min_fresh: Fresh traces of fewer prompts are not looked at.
    """

    measure: Literal["both_orders_correct", "order_averaged"] = "both_orders_correct"
    margin: float = Field(default=0.0, ge=0, lt=1)
    alpha: float = Field(default=0.05, gt=0, le=0.5)
    min_prompts: PositiveInt = 50
    min_fresh: PositiveInt = 20


class Server(Strict):
    """The running server whose judge it is.

    Attributes:
        url: Of the server.
        role: The judge's role.
        shadow: So many live requests are judged by both before the swap; null: it is swapped at once.
        timeout_s: The longest to wait for them, in seconds.
    """

    url: str = "http://127.0.0.1:8080"
    role: str = "judge"
    shadow: PositiveInt | None = None
    timeout_s: PositiveFloat = 3600.0


class LoopConfig(Strict):
    """What `mixfuse loop` reads.

    Attributes:
        rounds: Folder of the rounds.
        traces: Where feedback comes from.
        frozen: Files of labelled pairs that decide; in any shape `mixfuse eval judge` reads. Nothing that they ask is
            trained on.
        recipe: Of the judge; its `data`, `evaluation.data` and `out` are the round's.
        overrides: `key=value` for the recipe.
        pairs: Filters and further sources.
        promote: What a new judge has to show.
        server: The server to swap on. null: a judge that is promoted is named in the decision, nothing is swapped.
        judge: Without a server: the adapter directory that serves; null: the base. Once a round has promoted one, that.
        parity: Compare the new adapter in vLLM with PEFT before it is evaluated.
    """

    rounds: Path
    traces: Traces
    frozen: tuple[Path, ...] = Field(min_length=1)
    recipe: Path
    overrides: tuple[str, ...] = ()
    pairs: Pairs = Pairs()
    promote: Promote = Promote()
    server: Server | None = Server()
    judge: Path | None = None
    parity: bool = True

    @model_validator(mode="after")
    def _names(self) -> Self:
        if any(source.called == FEEDBACK for source in self.pairs.sources):
            raise ValueError(f"pairs.sources: {FEEDBACK!r} is what the round's own pairs are called")
        if self.server is not None and self.judge is not None:
            raise ValueError("'judge' goes without a server, which says itself what serves (server: null)")
        return self


class Decision(NamedTuple):
    """What becomes of a round's judge.

    Attributes:
        promote: Whether it is to serve.
        reason: Why, in a sentence.
    """

    promote: bool
    reason: str


@dataclass(frozen=True)
class Tools:
    """What a round has done elsewhere; each leaves what it makes in the round's folder.

    Attributes:
        train: (recipe file, overrides, log file) → trains to the recipe's `out`, or goes on where it was cut off.
        export: (run, adapter directory, log file) → writes and checks the adapter directory.
        evaluate: (new judge, serving judge or None for the base, data files, folder, log file) → writes
            `FOLDER/report.json` as `mixfuse eval judge --against` does.
    """

    train: Callable[[Path, Sequence[str], Path], None]
    export: Callable[[Path, Path, Path], None]
    evaluate: Callable[[Path, Path | None, Sequence[Path], Path, Path], None]


def run(config: LoopConfig, tools: Tools | None = None) -> dict[str, Any] | None:
    """Goes on with the round that was cut off, or makes one of the traces since the last.

    Args:
        config: What to do; a round that was cut off goes on with the config it began with.
        tools: By default the `mixfuse` commands, each in a process of its own.

    Returns:
        The round's decision as in `decision.json`; None where there are too few traces for a round.

    Raises:
        MixfuseError: A step failed; the round goes on from it the next time.
    """
    refuse_password(config.traces.database)
    with _alone(config.rounds) as lock:
        folder = _unfinished(config.rounds) or _begin(config)
        if folder is None:
            return None
        begun = validate(read_json(folder / ROUND)["config"], LoopConfig, source=str(folder / ROUND))
        return _Round(folder, begun, tools or commands(begun, lock)).finish()


def decide(frozen: Mapping[str, Any], fresh: Mapping[str, Any] | None, promote: Promote) -> Decision:
    """Decides by two evaluations of the new judge against the serving one on the same pairs.

    Args:
        frozen: Its `prompts`, and the paired `difference` on the frozen set.
        fresh: Likewise on fresh traces, or None where there are too few.
        promote: What has to be shown.
    """
    difference = Difference(**frozen["difference"])
    words = promote.measure.replace("_", " ")
    shown = f"{words} on the frozen set {difference}"
    if frozen["prompts"] < promote.min_prompts:
        return Decision(False, f"the frozen set has {frozen['prompts']} prompts, {promote.min_prompts} are needed")
    if difference.low <= promote.margin:
        verdict = "worse" if difference.high < 0 else "not better by enough"
        return Decision(False, f"{verdict}: {shown}; the lower end must be above {promote.margin:g}")
    if difference.p > promote.alpha:
        return Decision(False, f"not significant at {promote.alpha:g}: {shown}")
    if fresh is not None and (on_fresh := Difference(**fresh["difference"])).high < 0:
        return Decision(False, f"worse on fresh traces ({on_fresh}), though better: {shown}")
    return Decision(True, f"better: {shown}")


def commands(config: LoopConfig, lock: int) -> Tools:
    """The steps as `mixfuse` commands, their output in a log.

    Args:
        config: The round's.
        lock: The rounds' lock. The commands hold it as well: what outlives a killed loop keeps the next one waiting.
    """
    command = partial(_run_command, lock)

    def train(recipe: Path, overrides: Sequence[str], log: Path) -> None:
        command(log, "train", "judge", recipe, *overrides)

    def export(run_folder: Path, adapter: Path, log: Path) -> None:
        if not adapter.exists():  # written whole or not at all
            command(log, "adapter", "export", run_folder, adapter)
        base = ("--base", read_json(adapter / "manifest.json")["base_path"]) if config.parity else ()
        command(log, "adapter", "verify", adapter, *base)

    def evaluate(judge: Path, serving: Path | None, data: Sequence[Path], out: Path, log: Path) -> None:
        beside = ("--baseline", "untrained") if serving is None else ("--against", serving)
        command(log, "eval", "judge", "--judge", judge, *beside, "--data", *data, "--out", out)

    return Tools(train, export, evaluate)


class _Round:
    """One round, step by step.

    Args:
        folder: Its folder.
        config: The one it began with.
        tools: What it has done elsewhere.
    """

    def __init__(self, folder: Path, config: LoopConfig, tools: Tools) -> None:
        self._folder, self._config, self._tools = folder, config, tools
        self._facts = read_json(folder / ROUND)
        self._out = folder.resolve()
        serving = self._facts["serving"]["directory"]
        self._serving = Path(serving) if serving else None

    def finish(self) -> dict[str, Any]:
        """Does what is not done yet."""
        pairs = self._step("pairs", self._pairs)
        if "nothing" in pairs:
            return self._decided(Decision(False, pairs["nothing"]), {})
        self._step("train", self._train)
        adapter = self._step("export", self._export)
        frozen = self._step("frozen", lambda: self._evaluated("frozen", self._config.frozen))
        fresh = self._step("fresh", self._fresh)
        shown = {"adapter": adapter["directory"], "frozen": frozen, "fresh": fresh}
        decision = decide(frozen, fresh if "difference" in fresh else None, self._config.promote)
        if not decision.promote or self._config.server is None:
            return self._decided(decision, shown)
        gate = self._step("swap", self._swap)
        if gate["state"] == "promoted":
            return self._decided(decision, {**shown, "swap": gate})
        return self._decided(Decision(False, f"the server did not take it: {gate['reason']}"), {**shown, "swap": gate})

    def _step(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The step's result; it is done where there is none yet."""
        path = self._folder / "steps" / f"{name}.json"
        if not path.is_file():
            began = time.time()
            with Console(stderr=True).status(f"{self._folder}: {name}"):
                result = work()
            write_json(path, {**result, "seconds": round(time.time() - began, 1)})
        result = read_json(path)
        return result if isinstance(result, dict) else {}

    def _pairs(self) -> dict[str, Any]:
        settings, data = self._config.pairs, self._out / "data"
        own = Source(path=str(data / "traces.jsonl"), name=FEEDBACK, weight=settings.weight)
        keys = settings.model_dump(include=set(Filters.model_fields))
        spec = PairsSpec(**keys, sources=(own, *settings.sources), against=self._config.frozen, seed=settings.seed)
        try:
            card = build_pairs(spec, data / "pairs.jsonl")
        except MixfuseError as error:
            if error.kind != "no_pairs":
                raise
            return {"nothing": str(error)}
        return {name: card[name] for name in ("train_pairs", "dev_pairs", "by_source", "left_out", "auc")}

    def _train(self) -> dict[str, Any]:
        config, data = self._config, self._out / "data"
        path, recipe = self._out / "recipe.yaml", _mapping(config.recipe)
        recipe |= {"data": str(data / "pairs.jsonl"), "out": str(self._out / "run")}
        evaluation = recipe.get("evaluation")
        if isinstance(evaluation, dict) and "share" not in evaluation:
            recipe["evaluation"] = {**evaluation, "data": str(dev_path(data / "pairs.jsonl"))}
        write_text(path, yaml.safe_dump(recipe, sort_keys=False))
        if not (self._out / "run" / "run.json").is_file():  # a run's last file
            self._tools.train(path, config.overrides, self._log("train"))
        return {"run": str(self._out / "run")}

    def _export(self) -> dict[str, Any]:
        adapter = self._out / "adapter"
        self._tools.export(self._out / "run", adapter, self._log("export"))
        return {"directory": str(adapter)}

    def _fresh(self) -> dict[str, Any]:
        """On the fresh traces that were not trained on, as far as people said both good and bad of them."""
        rows = [
            row
            for row in read_jsonl(self._folder / "data" / "traces.jsonl")
            if is_dev(row["prompt"], self._config.pairs.dev_share)
            and len({response["correct"] for response in row["responses"]}) == 2
        ]
        prompts = len({row["prompt"] for row in rows})
        if prompts < self._config.promote.min_fresh:
            return {"nothing": f"{prompts} prompts of fresh traces, {self._config.promote.min_fresh} are needed"}
        path = self._out / "data" / "fresh.jsonl"
        write_jsonl(path, rows)
        return self._evaluated("fresh", [path])

    def _evaluated(self, name: str, data: Sequence[Path]) -> dict[str, Any]:
        """What the decision needs of an evaluation against the serving judge."""
        out, measure = self._out / "evaluation" / name, self._config.promote.measure
        self._tools.evaluate(self._out / "adapter", self._serving, data, out, self._log(name))
        report = read_json(out / "report.json")
        (beside,) = report["against"].values()
        return {
            "n": report["n"],
            "prompts": report["prompts"],
            "new": report[measure],
            "serving": beside[measure],
            "difference": beside["difference"][measure],
        }

    def _swap(self) -> dict[str, Any]:
        """Has the server take it, after its own gate; waits for that to end."""
        server, adapter = self._config.server, str(self._out / "adapter")
        if server is None:
            raise AssertionError("asked only where there is a server")
        client = AdminClient(server.url)
        row = client.role(server.role)
        if row.directory == adapter:  # flipped before the step was written down
            return {"state": "promoted", "reason": "it serves already"}
        if row.directory != self._facts["serving"]["directory"]:
            now = row.directory or "the base"
            return {"state": "refused", "reason": f"{now} serves since the round began; it was not compared with that"}
        if row.gate is None or row.gate.asked.get("directory") != adapter:
            try:
                if server.shadow is None:
                    swap = client.swap(server.role, Path(adapter))
                    return {"state": "promoted", "reason": "", **asdict(swap)}
                request = SwapRequest(directory=Path(adapter), shadow=server.shadow, timeout_s=server.timeout_s)
                client.begin_gate(server.role, request)
            except RefusedError as error:
                return {"state": "refused", "reason": str(error)}
        while True:
            gate = client.role(server.role).gate
            if gate is None:
                raise MixfuseError(f"{server.url} was restarted during the gate; run mixfuse loop again to go on")
            if not gate.under_way:
                return asdict(gate)
            time.sleep(_POLL_S)

    def _decided(self, decision: Decision, shown: Mapping[str, Any]) -> dict[str, Any]:
        facts = {
            "round": self._folder.name,
            "promoted": decision.promote,
            "reason": decision.reason,
            "serving_before": self._facts["serving"],
            "traces": self._facts["traces"],
            **shown,
        }
        write_json(self._folder / DECISION, facts)
        return facts

    def _log(self, name: str) -> Path:
        return self._out / "logs" / f"{name}.log"


def _begin(config: LoopConfig) -> Path | None:
    """Makes the next round's folder, with the traces since the last round in it; None where they are too few.

    Its name stands for the traces: the folder is there whole or not at all, so none is read twice or left out.
    """
    before = _rounds(config.rounds)
    serving = _serves(config, before)
    since = float(read_json(before[-1] / ROUND)["until"]) if before else 0.0
    until = time.time() - config.traces.settle_s
    tasks = None
    if config.traces.tasks is not None:
        from mixfuse.contracts.tasks import make

        asked = config.traces.tasks
        tasks = make(asked.tasks, asked.split, asked.count, seed=asked.seed)
    with opened(config.traces.database, create=False) as database:
        rows, counts = read_traces(
            database, tasks=tasks, since=since, until=until, min_agreement=config.traces.min_agreement
        )
    if len(rows) < config.traces.min_rows:
        said = f"{len(rows)} new traces of which something is known, {config.traces.min_rows} make a round"
        Console(stderr=True).print(said, markup=False, highlight=False)
        return None
    number = int(before[-1].name) + 1 if before else 1
    folder = config.rounds / f"{number:04}"
    facts = {
        "config": config.model_dump(mode="json", exclude_unset=True),
        "since": since,
        "until": until,
        "traces": counts,
        "serving": serving,
    }
    with atomic_directory(folder) as temporary:
        write_json(temporary / ROUND, facts)
        write_jsonl(temporary / "data" / "traces.jsonl", rows)
    return folder


def _serves(config: LoopConfig, before: Sequence[Path]) -> dict[str, Any]:
    """Which judge serves now: its adapter directory, None for the base."""
    if config.server is not None:
        row = AdminClient(config.server.url).role(config.server.role)
        return {"directory": row.directory, "revision": row.revision}
    promoted = [found for folder in before if (found := read_json(folder / DECISION))["promoted"]]
    directory = promoted[-1]["adapter"] if promoted else config.judge and str(config.judge.resolve())
    return {"directory": directory, "revision": None}


def _rounds(folder: Path) -> list[Path]:
    """The rounds there are, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if re.fullmatch(r"\d{4,}", path.name) and (path / ROUND).is_file())


def _unfinished(folder: Path) -> Path | None:
    return next((one for one in _rounds(folder) if not (one / DECISION).is_file()), None)


@contextmanager
def _alone(rounds: Path) -> Iterator[int]:
    """Holds the rounds' lock, which ends with the process and those it started; yields its file descriptor.

    Raises:
        MixfuseError: Another process has it.
    """
    rounds.mkdir(parents=True, exist_ok=True)
    with (rounds / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MixfuseError(f"{rounds}: another mixfuse loop is at work there; wait for it") from None
        yield lock.fileno()


def _mapping(path: Path) -> dict[str, Any]:
    """A recipe as it stands; training checks its keys."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MixfuseError(f"{path}: no recipe can be read: {error}") from None
    if not isinstance(recipe, dict):
        raise MixfuseError(f"{path}: expected a mapping of keys, found {type(recipe).__name__}")
    return recipe


def _run_command(lock: int, log: Path, *arguments: str | Path) -> None:
    """Runs a mixfuse command, its output added to a log.

    Raises:
        MixfuseError: It failed; the message is its last line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        begin = stream.tell()
        command = [sys.executable, "-m", "mixfuse", *map(str, arguments)]
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, pass_fds=(lock,), check=False)
    if done.returncode == 0:
        return
    with log.open("rb") as stream:
        stream.seek(begin)
        said = stream.read().decode(errors="replace").strip().splitlines()
    last = next((line for line in reversed(said) if line.startswith("mixfuse: ")), said[-1] if said else "nothing said")
    message = f"mixfuse {arguments[0]} {arguments[1]} ended with {done.returncode} (log: {log}): {last}"
    raise Preempted(message) if done.returncode == PREEMPTED else MixfuseError(message)


def lines(decision: Mapping[str, Any]) -> list[str]:
    """What `mixfuse loop` prints of a decision."""
    verdict = "promoted" if decision["promoted"] else "kept the serving judge"
    said = [f"round {decision['round']}: {verdict}; {decision['reason']}"]
    for name in ("frozen", "fresh"):
        found = decision.get(name) or {}
        if "difference" in found:
            new, serving = found["new"]["value"], found["serving"]["value"]
            said.append(
                f"{name}: {new:.3f} against {serving:.3f} on {found['n']} pairs, {Difference(**found['difference'])}"
            )
        elif "nothing" in found:
            said.append(f"{name}: {found['nothing']}")
    return said
