"""The demo's steps, in order. Each is skipped when the file that it leaves is there, so a second run resumes.

The held-out tasks are only ever used to measure; nothing is tuned on them.
"""

import asyncio
import json
import re
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from demo_app.results import Measured, results
from demo_app.server import MIXFUSE, served, swap_under_load
from demo_app.usage import Usage
from mixfuse.app.client import AdminClient
from mixfuse.contracts.files import read_json, write_json, write_text
from mixfuse.contracts.tasks import Task, make
from mixfuse.train.data.pairs import dev_path

TASKS = Path("configs/tiny/tasks.yaml")
CONFIGS = Path("configs/tiny")
CONCURRENCY = 64  # as many as the engine works on at once: on a CPU a step costs little more for 64 than for 8
SPECIALISTS = {"sums": "chain_sum", "letters": "letter_counting"}
"""Role → the kind of task that it is tuned on."""
MEMBERS = ("domain", *SPECIALISTS, "base")
console = Console()


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        out: The folder for all that the demo makes.
        base: Arguments of `mixfuse base build`.
        train: Tasks to tune on.
        sft: Overrides of the SFT recipe.
        specialists: Specialist → tasks of its kind to tune it on, and steps.
        specialist_sft: More overrides of the SFT recipe for them.
        pool: Tasks to collect answers to, for the judge's pairs and the combiner.
        heldout: Tasks to measure base and domain model on.
        judged: Tasks of those whose sampled answers the judge is measured on.
        dpo: Overrides of the judge's recipe.
        fused: Tasks of those to measure fusion on.
        minutes: What each step takes on 2 cores, roughly; scaled by what the steps so far have taken.
    """

    out: Path
    base: tuple[str, ...]
    train: int
    sft: tuple[str, ...]
    specialists: dict[str, tuple[int, int]]
    specialist_sft: tuple[str, ...]
    pool: int
    heldout: int
    judged: int
    dpo: tuple[str, ...]
    fused: int
    minutes: dict[str, float]


FULL = Sizes(
    out=Path("runs/demo"),
    base=(),
    train=512,
    # Few enough that a specialist can be better at its kind: sums take more steps to learn than letters do.
    sft=("optimizer.steps=12",),
    specialists={"sums": (640, 40), "letters": (192, 12)},
    specialist_sft=("processes=1", "optimizer.micro_batch=16"),
    pool=200,
    heldout=160,
    judged=40,
    dpo=(),
    fused=12,
    minutes={
        "base": 0.5, "sft": 3, "specialists": 8, "verify-domain": 1, "pool": 4, "combiner": 0.2, "judge": 7,
        "verify-judge": 1, "swap": 1.5, "ask": 1, "evaluate": 5,
    },
)  # fmt: skip
QUICK = Sizes(
    out=Path("runs/demo-quick"),
    base=("--tiny",),
    train=128,
    # The tiny base is random: a high rate makes it answer something, so that every step has work to do.
    sft=("optimizer.steps=14", "optimizer.learning_rate=0.02", "save_every=0"),
    specialists={"sums": (64, 6), "letters": (64, 6)},
    specialist_sft=("processes=1", "optimizer.learning_rate=0.02", "save_every=0"),
    pool=48,
    heldout=32,
    judged=6,
    dpo=("optimizer.steps=4", "optimizer.learning_rate=0.02", "optimizer.warmup_steps=0", "save_every=0"),
    fused=6,
    minutes={
        "base": 0.1, "sft": 0.5, "specialists": 0.6, "verify-domain": 0.5, "pool": 0.7, "combiner": 0.1, "judge": 0.5,
        "verify-judge": 0.5, "swap": 0.7, "ask": 0.2, "evaluate": 0.3,
    },
)  # fmt: skip
WORDS = {
    "base": "the base: SmolLM2-135M upcycled into a Mixtral",
    "sft": "the domain model: SFT on reasoning-gym tasks, 2 ZeRO-3 processes, LoRA on attention and experts",
    "specialists": "two specialists: SFT on one kind of task each",
    "verify-domain": "export the domain adapter; compare vLLM with PEFT on it",
    "pool": "serve base, domain model and specialists, ask the pool, mark the answers with the tasks' verifiers",
    "combiner": "the combiner: whom to believe and whom to ask, fitted on the marked answers",
    "judge": "the judge: DPO on preference pairs, both orders of each",
    "verify-judge": "export the judge; compare vLLM with PEFT on it",
    "swap": "serve again; hot-swap the judge into the running server while requests flow",
    "ask": "a question in each mode",
    "evaluate": "measure judge and fusion on held-out tasks",
}


class Demo:
    """The steps; each knows the file that says it is finished.

    Args:
        sizes: How much of everything.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.out = sizes, sizes.out
        self.base = sizes.out / "base"
        self.data = sizes.out / "data"
        self.adapters = sizes.out / "adapters"
        self.fusion = sizes.out / "fusion.yaml"
        self.usage = Usage(sizes.out / "usage.json")

    def run(self) -> dict[str, Any]:
        """Runs what is not finished yet; returns the results, which `results.json` holds too."""
        with self.step("base"):
            if not self.base.exists():
                mixfuse("base", "build", self.base, *self.sizes.base)
        with self.step("sft"):
            train = self.data / "train.jsonl"
            if not train.exists():
                mixfuse("tasks", "make", TASKS, "--count", self.sizes.train, "--out", train)
            self.train("sft", "domain_sft", self.sizes.sft, data=train)
        with self.step("specialists"):
            for name, kind in SPECIALISTS.items():
                self.train_specialist(name, kind)
        with self.step("verify-domain"):
            self.export("sft", "domain")
        with self.step("pool"):
            write_text(self.fusion, self.here("fusion.yaml"))
            self.ask_the_pool()
        with self.step("combiner"):
            self.saved("combiner.json", self.fit_combiner)
            write_text(self.fusion, with_combiner(self.here("fusion.yaml")))
        # The engine is stopped while the judge trains: beside it, both would take some 16 GB.
        with self.step("judge"):
            self.train_judge()
        with self.step("verify-judge"):
            self.export("judge", "judge")
        measured = self.swap_and_measure()
        found = results(measured) | {"usage": self.usage.to_json()}
        write_json(self.out / "results.json", found)
        return found

    def step(self, name: str) -> AbstractContextManager[None]:
        """Prints a step's heading, with how long it and all that is left may take; measures the step."""
        minutes, names = self.sizes.minutes, list(WORDS)
        number = names.index(name) + 1
        console.rule(f"[bold]step {number} of {len(names)}[/] {WORDS[name]}", align="left")
        done = [step for step in names if self.usage.finished(step)]
        if name in done:
            console.print("done before", style="dim")
        else:
            # This machine's pace: what the finished steps took, beside what they took where `Sizes` was measured.
            pace = self.usage.wall_s(done) / 60 / sum(minutes[step] for step in done) if done else 1.0
            left = sum(minutes[step] for step in names if step not in done)
            console.print(f"about {_rounded(pace * minutes[name])}, of {_rounded(pace * left)} left", style="dim")
        return self.usage.step(name)

    def train(
        self,
        stage: str,
        recipe: str,
        overrides: tuple[str, ...],
        *,
        data: Path,
        dev: Path | None = None,
        run: str | None = None,
    ) -> None:
        """Trains unless that run is finished; an interrupted run resumes from its checkpoint."""
        out = self.out / (run or stage)
        if (out / "run.json").exists():
            return
        paths = [f"base={self.base}", f"out={out}", f"data={data}"]
        if dev:
            paths.append(f"evaluation.data={dev}")
        mixfuse("train", stage, CONFIGS / f"{recipe}.yaml", *paths, *overrides)

    def train_specialist(self, name: str, kind: str) -> None:
        """Tunes an adapter on one kind of task, and exports it."""
        data, adapter = self.data / f"train_{name}.jsonl", self.adapters / name
        tasks, steps = self.sizes.specialists[name]
        if not data.exists():
            mixfuse("tasks", "make", TASKS, "--kind", kind, "--count", tasks, "--out", data)
        overrides = (f"role={name}", f"optimizer.steps={steps}", *self.sizes.specialist_sft)
        self.train("sft", "domain_sft", overrides, data=data, run=name)
        if not adapter.exists():
            mixfuse("adapter", "export", self.out / name, adapter)

    def fit_combiner(self) -> dict[str, Any]:
        """Fits the combiner to the pool's marked answers; returns its figures, cross-validated."""
        prices = [part for name in MEMBERS for part in ("--price", f"{name}=1")]
        return mixfuse_json("combiner", "fit", self.data / "pool.jsonl", "--out", self.out / "combiner.json", *prices)

    def train_judge(self) -> None:
        """Builds the preference pairs from the pool's answers, and trains on them."""
        pairs = self.data / "pairs.jsonl"
        if not pairs.exists():
            spec = self.out / "pairs.yaml"
            write_text(spec, self.here("pairs.yaml"))
            mixfuse("pairs", "build", spec, "--out", pairs)
        dev = dev_path(pairs)
        # The quick demo has so few pairs that none may be held out.
        has_dev = dev.exists() and dev.stat().st_size
        self.train("judge", "judge_dpo", self.sizes.dpo, data=pairs, dev=dev if has_dev else pairs)

    def export(self, run: str, role: str) -> None:
        """Exports and verifies; the manifest has the parity figure once it passed."""
        out = self.adapters / role
        if not out.exists():
            mixfuse("adapter", "export", self.out / run, out)
        if read_json(out / "manifest.json")["parity"] is None:
            mixfuse("adapter", "verify", out, "--base", self.base)

    def ask_the_pool(self) -> None:
        """Collects the members' answers, and what the base says as a judge, unless all of it is there."""
        wanted = [self.data / f"{name}.jsonl" for name in ("pool", "heldout", "judging")]
        if all(path.exists() for path in (*wanted, self.data / "judge_untrained.json")):
            return
        with self.server() as url:
            pool, heldout, judging = wanted
            # Greedy, as the members answer later: a combiner must be fitted to answers like those it will weigh.
            self.collect(url, pool, "pool", self.sizes.pool, samples=1, temperature=0.0, max_tokens=12)
            self.collect(url, heldout, "heldout", self.sizes.heldout, samples=1, temperature=0.0, max_tokens=12)
            self.collect(url, judging, "heldout", self.sizes.judged, samples=2, temperature=0.9, max_tokens=12)
            self.eval_judge(url, "untrained")

    def swap_and_measure(self) -> Measured:
        """Swaps the trained judge in under load, asks in every mode, and measures judge and fusion."""
        with ExitStack() as stack:
            with self.step("swap"):
                url = stack.enter_context(self.server())
                self.swap(url)
            with self.step("ask"):
                question = self.heldout()[0].prompt
                for mode in ("auto", "best_of", "merge", "debate"):
                    mixfuse("ask", question, "--mode", mode, "--url", url)
            with self.step("evaluate"):
                trained = self.eval_judge(url, "judge")
                fusion = self.saved("fusion.json", lambda: self.eval_fusion(url))
                auto = self.saved("auto.json", self.replay_auto)
        return Measured(
            heldout=self.heldout(),
            answers=self.data / "heldout.jsonl",
            untrained=read_json(self.data / "judge_untrained.json"),
            trained=trained,
            fusion=fusion,
            auto=auto,
            swap=read_json(self.data / "swap.json"),
            parity={
                role: read_json(self.adapters / role / "manifest.json")["parity"]["max_abs_logprob_difference"]
                for role in ("domain", "judge")
            },
        )

    def swap(self, url: str) -> None:
        """Swaps the trained judge in while clients keep asking."""
        judge = self.adapters / "judge"
        prompts = [task.prompt for task in self.heldout()]
        self.saved("swap.json", lambda: asyncio.run(swap_under_load(url, judge, prompts)))
        if AdminClient(url).role("judge").revision is None:  # a resumed run: the server is a new one
            mixfuse("roles", "swap", "judge", judge, "--url", url)
        mixfuse("roles", "list", "--url", url)

    def server(self) -> AbstractContextManager[str]:
        """`mixfuse serve` on the demo's base, with its domain adapter; the judge is the base until it is swapped."""
        overrides = [
            f"engine.base={self.base}",
            *(f"roles.{role}={self.adapters / role}" for role in ("domain", *SPECIALISTS)),
            f"fusion={self.fusion}",
            f"logs={self.out / 'logs'}",
        ]
        return served(CONFIGS / "serve.yaml", overrides)

    def here(self, config: str) -> str:
        """A config's text, with this demo's folder."""
        return (CONFIGS / config).read_text(encoding="utf-8").replace("runs/demo", str(self.out))

    def collect(
        self, url: str, out: Path, split: str, count: int, *, samples: int, temperature: float, max_tokens: int
    ) -> None:
        """Collects the members' answers unless the file is there."""
        if out.exists():
            return
        options: dict[str, object] = {
            "--tasks": TASKS,
            "--split": split,
            "--count": count,
            "--samples": samples,
            "--temperature": temperature,
            "--max-tokens": max_tokens,
            "--concurrency": CONCURRENCY,
            "--out": out,
            "--url": url,
        }
        mixfuse("pool", "collect", self.fusion, *(part for option in options.items() for part in option))

    def eval_judge(self, url: str, which: str) -> dict[str, Any]:
        """Measures the base as a judge ("untrained"), or the role `judge`, on held-out answers."""
        role = "base" if which == "untrained" else "judge"
        options = ("--data", self.data / "judging.jsonl", "--url", url)
        return self.saved(f"judge_{which}.json", lambda: mixfuse_json("eval", "judge", "--judge", role, *options))

    def eval_fusion(self, url: str) -> dict[str, Any]:
        """Measures best_of and auto on held-out tasks beside each member, votes, equal compute and the oracle."""
        options: dict[str, object] = {
            "--tasks": TASKS,
            "--count": self.sizes.fused,
            "--choose-share": 0,  # few tasks: the best single member is chosen on all of them, which flatters it
            "--concurrency": 8,
            "--out": self.out / "fused",
            "--url": url,
        }
        parts = [part for option in options.items() for part in option]
        return mixfuse_json("eval", "fusion", self.fusion, *parts, "--modes", "best_of", "auto")

    def replay_auto(self) -> dict[str, Any]:
        """Replays `auto` on all held-out answers, which were collected before: no model is asked."""
        options = ("--combiner", self.out / "combiner.json", "--out", self.out / "auto")
        return mixfuse_json("eval", "fusion", "--pool", self.data / "heldout.jsonl", *options)

    def saved(self, name: str, make_it: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The JSON that a step left, or leaves now."""
        path = self.data / name
        if not path.exists():
            write_json(path, make_it())
        value: dict[str, Any] = read_json(path)
        return value

    def heldout(self) -> list[Task]:
        """The held-out tasks."""
        return make(TASKS, "heldout", self.sizes.heldout)


def with_combiner(config: str) -> str:
    """A fusion config's text with the mark taken from its `combiner`."""
    text, changed = re.subn("(?m)^#combiner:", "combiner:", config)
    if changed != 1:
        raise ValueError(f"the fusion config names {changed} combiners; the demo fits one")
    return text


def _rounded(minutes: float) -> str:
    return f"{max(1, round(minutes))} min"


def mixfuse(*arguments: object) -> None:
    """Runs one `mixfuse` command and shows it."""
    command = [*MIXFUSE, *map(str, arguments)]
    console.print(f"$ mixfuse {' '.join(command[1:])}", style="dim", markup=False, highlight=False, soft_wrap=True)
    subprocess.run(command, check=True)


def mixfuse_json(*arguments: object) -> dict[str, Any]:
    """Runs one `mixfuse` command with `--json`, shows what it prints, and returns its last line."""
    command = [*MIXFUSE, *map(str, arguments), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    *shown, last = done.stdout.splitlines()
    print("\n".join(shown))
    value: dict[str, Any] = json.loads(last)
    return value
