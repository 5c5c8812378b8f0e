"""`mixfuse loop`: one round trains a judge and fits a combiner from recorded feedback, and promotes what is better.

A round is a folder, `ROUNDS/0001`. It holds everything: the config at its beginning, the traces, the pairs and their
data card, the recipe, the training run, the adapter, the evaluations with every verdict, and `decision.json`. A step is
done once its result is in `steps/`; an interrupted round continues after its last finished step.

Feedback can be wrong, even on purpose. The judge is therefore measured on a frozen set that feedback never reaches, and
only that set can promote it. The labels of fresh traces come from the same people as the training data, so fresh traces
can only count against it.
"""

import fcntl
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from mixfuse.app import combiner_file, combiner_round
from mixfuse.app.admin_api import SwapRequest
from mixfuse.app.client import AdminClient, RefusedError
from mixfuse.app.loop_config import FEEDBACK, LoopConfig
from mixfuse.app.pairs_spec import PairsSpec, Source, refuse_password
from mixfuse.app.preferences import build as build_pairs
from mixfuse.app.promotion import Decision, decide
from mixfuse.contracts.database import opened
from mixfuse.contracts.errors import PREEMPTED, MixfuseError, Preempted
from mixfuse.contracts.files import atomic_directory, read_json, read_jsonl, write_json, write_jsonl, write_text
from mixfuse.contracts.strict_yaml import read_mapping, validate
from mixfuse.fusion.store.export_traces import read as read_traces
from mixfuse.train.data.pair_filters import Filters
from mixfuse.train.data.pairs import dev_path, is_dev

DECISION = "decision.json"
ROUND = "round.json"
_POLL_S = 1.0


@dataclass(frozen=True)
class Tools:
    """The long steps of a round. Each writes its result into the round's folder.

    Attributes:
        train: (recipe file, overrides, log file) → trains to the recipe's `out`, or continues an interrupted run.
        export: (run, adapter directory, log file) → writes and checks the adapter directory.
        evaluate: (new judge, serving judge or None for the base, data files, folder, log file) → writes
            `FOLDER/report.json` as `mixfuse eval judge --against` does.
    """

    train: Callable[[Path, Sequence[str], Path], None]
    export: Callable[[Path, Path, Path], None]
    evaluate: Callable[[Path, Path | None, Sequence[Path], Path, Path], None]


def run_round(config: LoopConfig, tools: Tools | None = None) -> dict[str, Any] | None:
    """Continues the interrupted round, or begins one with the traces since the last round.

    Args:
        config: The config. An interrupted round continues with the config at its beginning instead.
        tools: By default the `mixfuse` commands, each in a process of its own.

    Returns:
        The round's decision as in `decision.json`; None if there are too few traces for a round.

    Raises:
        MixfuseError: A step failed; the next call continues the round there.
    """
    refuse_password(config.traces.database)
    with _locked(config.rounds) as lock:
        folder = _unfinished(config.rounds) or _begin(config)
        if folder is None:
            return None
        begun = validate(read_json(folder / ROUND)["config"], LoopConfig, source=str(folder / ROUND))
        return _Round(folder, begun, tools or commands(begun, lock)).finish()


def commands(config: LoopConfig, lock: int) -> Tools:
    """The long steps as `mixfuse` commands whose output goes to a log.

    Args:
        config: The round's config.
        lock: The rounds' lock. The commands inherit it, so that a command that outlives a killed loop keeps the next
            loop waiting.
    """
    command = partial(_run_command, lock)

    def train(recipe: Path, overrides: Sequence[str], log: Path) -> None:
        command(log, "train", "judge", recipe, *overrides)

    def export(run_folder: Path, adapter: Path, log: Path) -> None:
        if not adapter.exists():  # an export is atomic: a directory that exists is complete
            command(log, "adapter", "export", run_folder, adapter)
        base = ("--base", read_json(adapter / "manifest.json")["base_path"]) if config.parity else ()
        command(log, "adapter", "verify", adapter, *base)

    def evaluate(judge: Path, serving: Path | None, data: Sequence[Path], out: Path, log: Path) -> None:
        other = ("--baseline", "untrained") if serving is None else ("--against", serving)
        command(log, "eval", "judge", "--judge", judge, *other, "--data", *data, "--out", out)

    return Tools(train, export, evaluate)


class _Round:
    """One round, step by step.

    Args:
        folder: The round's folder.
        config: The config at its beginning.
        tools: The long steps.
    """

    def __init__(self, folder: Path, config: LoopConfig, tools: Tools) -> None:
        self._folder, self._config, self._tools = folder, config, tools
        self._facts = read_json(folder / ROUND)
        self._out = folder.resolve()
        serving = self._facts["serving"]["directory"]
        self._serving = Path(serving) if serving else None

    def finish(self) -> dict[str, Any]:
        """Runs the steps that are not done yet; returns the decision."""
        combiner = self._step("combiner", self._combine) if self._config.combiner is not None else None
        evidence = {} if combiner is None else {"combiner": combiner}
        if self._config.recipe is None:
            return self._decided(Decision(False, "this loop trains no judge"), evidence)
        return self._judge(evidence)

    def _combine(self) -> dict[str, Any]:
        """Fits a combiner, compares it with the serving one, and swaps it in if it is better."""
        config = self._config.combiner
        if config is None:
            raise AssertionError("called only with a combiner")
        new = self._out / "combiner.json"
        rounds = [folder / "data" / "traces.jsonl" for folder in _rounds(self._folder.parent)]
        fitted = self._step("combiner-fit", lambda: combiner_round.fit_round(config, rounds, new))
        if "nothing" in fitted:
            return {"promoted": False, "reason": fitted["nothing"]}
        frozen = self._step("combiner-frozen", lambda: combiner_round.compare(config, new))
        live = self._step("combiner-live", lambda: combiner_round.shadow(config, new, rounds[-1]))
        decision = combiner_round.decide(frozen, live, config)
        facts = {"file": str(new), "frozen": frozen, "live": live, "reason": decision.reason}
        if not decision.promote:
            return {"promoted": False, **facts}
        swapped = combiner_file.swap(new, config.file)
        return {"promoted": True, "before": swapped.old, "revision": swapped.new, **facts}

    def _judge(self, evidence: Mapping[str, Any]) -> dict[str, Any]:
        """Trains a judge and promotes it if it is better; returns the round's decision."""
        pairs = self._step("pairs", self._pairs)
        if "nothing" in pairs:
            return self._decided(Decision(False, pairs["nothing"]), evidence)
        self._step("train", self._train)
        adapter = self._step("export", self._export)
        frozen = self._step("frozen", lambda: self._evaluation("frozen", self._config.frozen))
        fresh = self._step("fresh", self._fresh)
        evidence = {**evidence, "adapter": adapter["directory"], "frozen": frozen, "fresh": fresh}
        decision = decide(frozen, fresh if "difference" in fresh else None, self._config.promote)
        if not decision.promote or self._config.server is None:
            return self._decided(decision, evidence)
        gate = self._step("swap", self._swap)
        if gate["state"] != "promoted":
            decision = Decision(False, f"the server refused it: {gate['reason']}")
        return self._decided(decision, {**evidence, "swap": gate})

    def _step(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The step's result from `steps/`; runs the step if there is none yet."""
        path = self._folder / "steps" / f"{name}.json"
        if not path.is_file():
            began = time.time()
            with Console(stderr=True).status(Text(f"{self._folder}: {name}")):
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
        if config.recipe is None:
            raise AssertionError("called only with a recipe")
        path, recipe = self._out / "recipe.yaml", read_mapping(config.recipe)
        recipe |= {"data": str(data / "pairs.jsonl"), "out": str(self._out / "run")}
        evaluation = recipe.get("evaluation")
        if isinstance(evaluation, dict) and "share" not in evaluation:
            recipe["evaluation"] = {**evaluation, "data": str(dev_path(data / "pairs.jsonl"))}
        write_text(path, json.dumps(recipe, indent=2, ensure_ascii=False) + "\n")
        if not (self._out / "run" / "run.json").is_file():  # a run's last file
            self._tools.train(path, config.overrides, self._log("train"))
        return {"run": str(self._out / "run")}

    def _export(self) -> dict[str, Any]:
        adapter = self._out / "adapter"
        self._tools.export(self._out / "run", adapter, self._log("export"))
        return {"directory": str(adapter)}

    def _fresh(self) -> dict[str, Any]:
        """Evaluates on fresh traces that were held out from training and have both a right and a wrong answer."""
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
        return self._evaluation("fresh", [path])

    def _evaluation(self, name: str, data: Sequence[Path]) -> dict[str, Any]:
        """Evaluates the new judge beside the serving one; returns what the decision needs."""
        out, measure = self._out / "evaluation" / name, self._config.promote.measure
        self._tools.evaluate(self._out / "adapter", self._serving, data, out, self._log(name))
        report = read_json(out / "report.json")
        (serving,) = report["against"].values()
        return {
            "n": report["n"],
            "prompts": report["prompts"],
            "new": report[measure],
            "serving": serving[measure],
            "difference": serving["difference"][measure],
        }

    def _swap(self) -> dict[str, Any]:
        """Asks the server to swap the judge in, and waits for the end of its gate."""
        server, adapter = self._config.server, str(self._out / "adapter")
        if server is None:
            raise AssertionError("called only with a server")
        client = AdminClient(server.url)
        row = client.role(server.role)
        if row.directory == adapter:  # the swap happened before an interrupted step was recorded
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

    def _decided(self, decision: Decision, evidence: Mapping[str, Any]) -> dict[str, Any]:
        """Writes `decision.json`, which ends the round."""
        facts = {
            "round": self._folder.name,
            "promoted": decision.promote,
            "reason": decision.reason,
            "serving_before": self._facts["serving"],
            "traces": self._facts["traces"],
            **evidence,
        }
        write_json(self._folder / DECISION, facts)
        return facts

    def _log(self, name: str) -> Path:
        return self._out / "logs" / f"{name}.log"


def _begin(config: LoopConfig) -> Path | None:
    """Creates the next round's folder with the traces since the last round; None if there are too few.

    The folder is created in one step together with its traces, so no trace is read twice or left out.
    """
    earlier = _rounds(config.rounds)
    serving = _serving_judge(config, earlier) if config.recipe is not None else {"directory": None, "revision": None}
    since = float(read_json(earlier[-1] / ROUND)["until"]) if earlier else 0.0
    until = time.time() - config.traces.settle_s
    tasks = None
    if config.traces.tasks is not None:
        from mixfuse.contracts.tasks import make

        verifier = config.traces.tasks
        tasks = make(verifier.tasks, verifier.split, verifier.count, seed=verifier.seed)
    with opened(config.traces.database, create=False) as database:
        rows, counts = read_traces(
            database, tasks=tasks, since=since, until=until, min_agreement=config.traces.min_agreement
        )
    if len(rows) < config.traces.min_rows:
        message = f"{len(rows)} new traces with a label; a round needs {config.traces.min_rows}"
        Console(stderr=True).print(message, markup=False, highlight=False)
        return None
    number = int(earlier[-1].name) + 1 if earlier else 1
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


def _serving_judge(config: LoopConfig, earlier: Sequence[Path]) -> dict[str, Any]:
    """The judge that serves now: its adapter directory, None for the base."""
    if config.server is not None:
        row = AdminClient(config.server.url).role(config.server.role)
        return {"directory": row.directory, "revision": row.revision}
    decisions = [read_json(folder / DECISION) for folder in earlier]
    promoted = [decision for decision in decisions if decision["promoted"]]
    directory = promoted[-1]["adapter"] if promoted else config.judge and str(config.judge.resolve())
    return {"directory": directory, "revision": None}


def _rounds(folder: Path) -> list[Path]:
    """The folders of all rounds, oldest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in paths if re.fullmatch(r"\d{4,}", path.name) and (path / ROUND).is_file())


def _unfinished(folder: Path) -> Path | None:
    return next((path for path in _rounds(folder) if not (path / DECISION).is_file()), None)


@contextmanager
def _locked(rounds: Path) -> Iterator[int]:
    """Holds the rounds' lock until this process and its children have ended; yields its file descriptor.

    Raises:
        MixfuseError: Another process holds it.
    """
    rounds.mkdir(parents=True, exist_ok=True)
    with (rounds / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MixfuseError(f"{rounds}: another mixfuse loop is running there; wait for it") from None
        yield lock.fileno()


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
        output = stream.read().decode(errors="replace").strip().splitlines()
    errors = [line for line in output if line.startswith("mixfuse: ")]
    last = (errors or output or ["no output"])[-1]
    message = f"mixfuse {arguments[0]} {arguments[1]} ended with {done.returncode} (log: {log}): {last}"
    raise Preempted(message) if done.returncode == PREEMPTED else MixfuseError(message)
