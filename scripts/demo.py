"""The main job, end to end, through the `mixfuse` command: see scripts/demo.

Each step is skipped when what it leaves is there, so a second run resumes. Everything lies under runs/demo (or
runs/demo-quick). The held-out tasks are only ever used to measure; nothing is tuned on them.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

from mixfuse.app.client import AdminClient
from mixfuse.contracts.files import read_json, read_jsonl, write_json, write_text
from mixfuse.contracts.tasks import Task, make
from mixfuse.train.data.pairs import dev_path

TASKS = Path("configs/tiny/tasks.yaml")
MIXFUSE = [str(Path(sys.executable).with_name("mixfuse"))]
console = Console()


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `quick` shows every step, the other is meant to learn."""

    out: Path
    base: tuple[str, ...]
    train: int
    sft: tuple[str, ...]
    pool: int
    heldout: int
    dpo: tuple[str, ...]
    fused: int


FULL = Sizes(Path("runs/demo"), (), 512, (), 100, 100, (), 60)
QUICK = Sizes(
    Path("runs/demo-quick"),
    ("--tiny",),
    128,
    # The tiny base is random: a high rate makes it answer something, so that every step has work to do.
    ("optimizer.steps=14", "optimizer.learning_rate=0.02", "save_every=0"),
    16,
    16,
    ("optimizer.steps=4", "optimizer.learning_rate=0.02", "optimizer.warmup_steps=0", "save_every=0"),
    6,
)


def main() -> int:
    """Runs the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/demo")
    parser.add_argument("--quick", action="store_true", help="every step on the tiny random base, in minutes")
    parser.add_argument("--fresh", action="store_true", help="start over")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else FULL
    if arguments.fresh:
        shutil.rmtree(sizes.out, ignore_errors=True)
    sizes.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        results = Demo(sizes, quick=arguments.quick).run()
    except subprocess.CalledProcessError as error:
        console.print(f"[red]scripts/demo: the step failed: {' '.join(error.cmd)}[/]; run again to resume")
        return 1
    except KeyboardInterrupt:
        console.print("scripts/demo: interrupted; run again to resume")
        return 130
    show(results)
    minutes = (time.monotonic() - began) / 60
    console.print(f"{sizes.out}/results.json, {sizes.out}/report.md ({minutes:.1f} minutes)")
    return 0


class Demo:
    """The steps, in order; each knows the file that says it is finished."""

    def __init__(self, sizes: Sizes, *, quick: bool) -> None:
        self.sizes, self.quick, self.out = sizes, quick, sizes.out
        self.base = sizes.out / "base"
        self.data = sizes.out / "data"
        self.adapters = sizes.out / "adapters"
        self.fusion = sizes.out / "fusion.yaml"
        self.url = f"http://127.0.0.1:{free_port()}"

    def run(self) -> dict[str, Any]:
        """Runs what is not finished yet and returns the results."""
        step("1/8", "the base: SmolLM2-135M upcycled into a Mixtral" if not self.quick else "the tiny random base")
        if not self.base.exists():
            mixfuse("base", "build", self.base, *self.sizes.base)

        step("2/8", "the domain model: SFT on reasoning-gym tasks, 2 ZeRO-3 processes, LoRA on attention and experts")
        if not (self.data / "train.jsonl").exists():
            mixfuse("tasks", "make", TASKS, "--count", self.sizes.train, "--out", self.data / "train.jsonl")
        self.train("sft", "domain_sft", self.data / "train.jsonl", self.sizes.sft)
        self.export("sft", "domain")

        step("3/8", "serve base and domain")
        write_text(self.fusion, self.here("configs/tiny/fusion.yaml"))
        with self.server():
            step("4/8", "ask the pool, mark the answers with the tasks' verifiers")
            self.collect("pool", "pool", self.sizes.pool, samples=4, temperature=0.9, max_tokens=16)
            self.collect("heldout", "heldout", self.sizes.heldout, samples=1, temperature=0.0, max_tokens=24)
            self.collect("judging", "heldout", self.sizes.fused, samples=3, temperature=0.9, max_tokens=16)

            step("5/8", "the judge: DPO on preference pairs, both orders of each")
            if not (self.data / "pairs.jsonl").exists():
                spec = self.out / "pairs.yaml"
                write_text(spec, self.here("configs/tiny/pairs.yaml"))
                mixfuse("pairs", "build", spec, "--out", self.data / "pairs.jsonl")
            untrained = self.eval_judge("untrained")
            self.train("judge", "judge_dpo", self.data / "pairs.jsonl", self.sizes.dpo)
            self.export("judge", "judge")

            step("6/8", "hot-swap the judge into the running server while requests flow")
            swap = self.saved("swap.json", lambda: asyncio.run(self.swap_under_load()))
            if self.revision("judge") is None:  # a resumed run: the server is a new one
                mixfuse("roles", "swap", "judge", self.adapters / "judge", "--url", self.url)
            mixfuse("roles", "list", "--url", self.url)

            step("7/8", "a question in the three modes")
            question = self.heldout()[0].prompt
            for mode in ("best_of", "merge", "debate"):
                mixfuse("ask", question, "--mode", mode, "--url", self.url)

            step("8/8", "evaluate on held-out tasks")
            trained = self.eval_judge("judge")
            fused = self.saved("fusion.json", self.fuse)
        results = self.results(untrained, trained, swap, fused)
        write_json(self.out / "results.json", results)
        report(self.out, results, quick=self.quick)
        return results

    def train(self, stage: str, recipe: str, data: Path, overrides: tuple[str, ...]) -> None:
        """Trains unless that run is finished; an interrupted run resumes from its checkpoint."""
        run = self.out / stage
        if (run / "run.json").exists():
            return
        paths = [f"base={self.base}", f"out={run}", f"data={data}"]
        if stage == "judge":
            dev = dev_path(data)
            # The quick demo has so few pairs that none may be held out.
            paths.append(f"evaluation.data={dev if dev.exists() and dev.stat().st_size else data}")
        mixfuse("train", stage, f"configs/tiny/{recipe}.yaml", *paths, *overrides)

    def export(self, run: str, role: str) -> None:
        """Exports and verifies; the manifest has the parity figure once it passed."""
        out = self.adapters / role
        if not out.exists():
            mixfuse("adapter", "export", self.out / run, out)
        if read_json(out / "manifest.json")["parity"] is None:
            mixfuse("adapter", "verify", out, "--base", self.base)

    @contextmanager
    def server(self) -> Iterator[None]:
        """`mixfuse serve` for as long as the block runs."""
        port = self.url.rsplit(":", 1)[1]
        overrides = [
            f"engine.base={self.base}",
            f"gateway.port={port}",
            f"roles.domain={self.adapters / 'domain'}",
            f"fusion={self.fusion}",
            f"logs={self.out / 'logs'}",
        ]
        process = subprocess.Popen([*MIXFUSE, "serve", "configs/tiny/serve.yaml", *overrides])
        try:
            self.wait_until_ready(process)
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)

    def wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        """Returns when the gateway answers."""
        while True:
            if process.poll() is not None:
                raise subprocess.CalledProcessError(process.returncode, [*MIXFUSE, "serve"])
            try:
                if httpx.get(f"{self.url}/healthz", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.5)

    def here(self, config: str) -> str:
        """A config's text, with this demo's folder."""
        return Path(config).read_text(encoding="utf-8").replace("runs/demo", str(self.out))

    def collect(self, name: str, split: str, count: int, *, samples: int, temperature: float, max_tokens: int) -> None:
        """Collects pool answers unless the file is there."""
        out = self.data / f"{name}.jsonl"
        if out.exists():
            return
        options: dict[str, object] = {
            "--tasks": TASKS,
            "--split": split,
            "--count": count,
            "--samples": samples,
            "--temperature": temperature,
            "--max-tokens": max_tokens,
            "--concurrency": 32,  # vLLM's batch: on a CPU a step costs nearly the same for 1 sequence as for 32
            "--out": out,
            "--url": self.url,
        }
        mixfuse("pool", "collect", self.fusion, *(part for option in options.items() for part in option))

    def eval_judge(self, which: str) -> dict[str, Any]:
        """Evaluates the base as a judge ("untrained") or the role `judge` on held-out pool answers."""
        role = "base" if which == "untrained" else "judge"
        data = self.data / "judging.jsonl"

        def measure() -> dict[str, Any]:
            return figures("eval", "judge", "--judge", role, "--data", data, "--url", self.url)

        return self.saved(f"judge_{which}.json", measure)

    def saved(self, name: str, make_it: Any) -> dict[str, Any]:
        """The JSON a step left, or left now."""
        path = self.data / name
        if not path.exists():
            write_json(path, make_it())
        value: dict[str, Any] = read_json(path)
        return value

    def revision(self, role: str) -> str | None:
        """The adapter revision that serves the role now; None for the base."""
        return AdminClient(self.url).role(role).revision

    def heldout(self) -> list[Task]:
        """The held-out tasks."""
        return make(TASKS, "heldout", self.sizes.heldout)

    async def swap_under_load(self) -> dict[str, Any]:
        """Swaps the judge while clients keep asking; counts what was asked and what failed meanwhile."""
        client = AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=900)
        flowing, swapped = asyncio.Event(), asyncio.Event()
        prompts = [task.prompt for task in self.heldout()]
        done = failed = 0

        async def ask_until_swapped(model: str) -> None:
            nonlocal done, failed
            rng = random.Random(model)  # noqa: S311 - which question is no secret
            while not swapped.is_set() or done < 24:
                try:
                    answer = await client.chat.completions.create(
                        model=model, messages=[{"role": "user", "content": rng.choice(prompts)}], max_tokens=16
                    )
                    failed += answer.choices[0].message.content is None
                except Exception as error:
                    console.print(f"a request failed during the swap: {error}")
                    failed += 1
                done += 1
                if done >= 8:
                    flowing.set()

        async def swap() -> None:
            await flowing.wait()
            command = [*MIXFUSE, "roles", "swap", "judge", str(self.adapters / "judge"), "--url", self.url]
            process = await asyncio.create_subprocess_exec(*command)
            code = await process.wait()
            swapped.set()
            if code:
                raise subprocess.CalledProcessError(code, command)

        models = ("judge", "judge", "domain", "base", "fusion/best-of")
        await asyncio.gather(swap(), *(ask_until_swapped(model) for model in models))
        console.print(f"{done} requests during the swap, {failed} failed")
        return {"requests_during": done, "failed": failed}

    def fuse(self) -> dict[str, Any]:
        """Evaluates best_of on held-out tasks beside each member, equal compute and the oracle."""
        options: dict[str, object] = {
            "--tasks": TASKS,
            "--count": self.sizes.fused,
            "--modes": "best_of",
            "--choose-share": 0,  # few tasks: the best single member is chosen on all of them, which flatters it
            "--concurrency": 8,
            "--out": self.out / "fused",
            "--url": self.url,
        }
        return figures("eval", "fusion", self.fusion, *(part for option in options.items() for part in option))

    def results(
        self, untrained: dict[str, Any], trained: dict[str, Any], swap: dict[str, Any], fused: dict[str, Any]
    ) -> dict[str, Any]:
        """Puts the figures together."""
        tasks = {task.id: task for task in self.heldout()}
        marks: dict[str, list[bool]] = {}
        lenient: dict[str, list[bool]] = {}
        for row in read_jsonl(self.data / "heldout.jsonl"):
            for response in row["responses"]:
                marks.setdefault(response["model"], []).append(response["correct"])
                lenient.setdefault(response["model"], []).append(tasks[row["id"]].verify_lenient(response["text"]))
        best_single, n = fused["best_member"], fused["tasks"]
        best_of = fused["modes"]["best_of"]["accuracy"]["value"]
        parity = {
            role: read_json(self.adapters / role / "manifest.json")["parity"]["max_abs_logprob_difference"]
            for role in ("domain", "judge")
        }
        return {
            "base_accuracy": mean(marks["base"]),
            "base_accuracy_interval": wilson(marks["base"]),
            "base_accuracy_lenient": mean(lenient["base"]),
            "domain_accuracy": mean(marks["domain"]),
            "domain_accuracy_interval": wilson(marks["domain"]),
            "domain_accuracy_lenient": mean(lenient["domain"]),
            "heldout_tasks": len(tasks),
            "judge": {
                "untrained_both_orders": untrained["both_orders_correct"]["value"],
                "untrained_consistency": untrained["consistency"]["value"],
                "trained_both_orders": trained["both_orders_correct"]["value"],
                "trained_both_orders_interval": [
                    trained["both_orders_correct"]["low"],
                    trained["both_orders_correct"]["high"],
                ],
                "consistency": trained["consistency"]["value"],
                "first_order": trained["first_order"]["value"],
                "random": trained["baselines"]["random"]["both_orders_correct"],
                "baselines": trained["baselines"],
                "n": trained["n"],
            },
            "fusion": {
                "best_of_accuracy": best_of,
                "best_of_interval": wilson([place < round(best_of * n) for place in range(n)]),
                "best_single_accuracy": fused["members"][best_single]["accuracy"]["value"],
                "best_single": best_single,
                "self_fusion_accuracy": fused["self_fusion"]["best_of"]["accuracy"]["value"],
                "oracle_accuracy": fused["baselines"]["oracle"]["accuracy"]["value"],
                "gap_closed": fused["gap_closed"]["best_of"],
                "verdict": fused["verdict"]["words"],
                "n": n,
            },
            "swap": swap,
            "parity": parity,
        }


def mixfuse(*arguments: object) -> None:
    """Runs one `mixfuse` command and shows it."""
    command = [*MIXFUSE, *map(str, arguments)]
    console.print(f"$ mixfuse {' '.join(command[1:])}", style="dim", markup=False, highlight=False, soft_wrap=True)
    subprocess.run(command, check=True)


def figures(*arguments: object) -> dict[str, Any]:
    """Runs one `mixfuse` command with `--json`, shows what it prints, and returns its last line."""
    command = [*MIXFUSE, *map(str, arguments), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    *shown, last = done.stdout.splitlines()
    print("\n".join(shown))
    told: dict[str, Any] = json.loads(last)
    return told


def step(number: str, words: str) -> None:
    """Prints a step's heading."""
    console.rule(f"[bold]{number}[/] {words}", align="left")


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def mean(values: list[Any]) -> float:
    """The mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def wilson(marks: list[bool], z: float = 1.96) -> list[float]:
    """Wilson's 95 % interval of a share (JASA 22, 1927): sound for shares near 0 and 1, where the tiny base is."""
    n, p = len(marks), mean(marks)
    if not n:
        return [0.0, 1.0]
    centre, spread = p + z * z / (2 * n), z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
    return [max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))]


def show(results: dict[str, Any]) -> None:
    """Prints the results table."""
    judge, fusion = results["judge"], results["fusion"]
    table = Table("what", "value", "beside", title="results")
    table.add_row("domain accuracy", pct(results["domain_accuracy"]), f"base {pct(results['base_accuracy'])}")
    table.add_row(
        "judge, right in both orders",
        pct(judge["trained_both_orders"]),
        f"untrained {pct(judge['untrained_both_orders'])}, random {pct(judge['random'])}",
    )
    table.add_row("judge, consistent", pct(judge["consistency"]), f"untrained {pct(judge['untrained_consistency'])}")
    table.add_row(
        "best_of accuracy",
        pct(fusion["best_of_accuracy"]),
        f"best single ({fusion['best_single']}) {pct(fusion['best_single_accuracy'])}, "
        f"oracle {pct(fusion['oracle_accuracy'])}",
    )
    swap = results["swap"]
    table.add_row("hot swap", f"{swap['failed']} failed", f"of {swap['requests_during']} requests")
    parity = results["parity"]
    table.add_row("parity vLLM / PEFT", f"{max(parity.values()):.1e} nats", "must stay within 1e-3")
    console.print(table)


def pct(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.0f} %"


def report(out: Path, results: dict[str, Any], *, quick: bool) -> None:
    """Writes report.md and its two plots; says what did not improve."""
    plots(out, results)
    judge, fusion = results["judge"], results["fusion"]
    shorter = judge["baselines"]["shorter"]["both_orders_correct"]["value"]
    rows = [
        ("base accuracy", results["base_accuracy"], interval(results["base_accuracy_interval"])),
        ("base accuracy, answer taken out of the sentence", results["base_accuracy_lenient"], ""),
        ("domain accuracy", results["domain_accuracy"], interval(results["domain_accuracy_interval"])),
        ("domain accuracy, answer taken out of the sentence", results["domain_accuracy_lenient"], ""),
        ("judge right in both orders, untrained", judge["untrained_both_orders"], ""),
        ("judge right in both orders, trained", judge["trained_both_orders"],
         interval(judge["trained_both_orders_interval"])),
        ("judge consistent, trained", judge["consistency"], ""),
        ("a coin, both orders", judge["random"], ""),
        ("always the shorter answer, both orders", shorter, ""),
        (f"best single member ({fusion['best_single']}), asked once", fusion["best_single_accuracy"], ""),
        ("that member, sampled as often as the pool and judged", fusion["self_fusion_accuracy"], ""),
        ("best_of", fusion["best_of_accuracy"], interval(fusion["best_of_interval"])),
        ("oracle: some candidate is right", fusion["oracle_accuracy"], ""),
    ]  # fmt: skip
    table = "\n".join(f"| {name} | {pct(value)} | {spread} |" for name, value, spread in rows)
    base_high, domain_low = results["base_accuracy_interval"][1], results["domain_accuracy_interval"][0]
    claims = [
        (domain_low > base_high, "the domain model is better than the base by more than the intervals"),
        (results["domain_accuracy_lenient"] > results["base_accuracy_lenient"],
         "the domain model is better than the base also where the answer is taken out of the sentence"),
        (judge["trained_both_orders"] > judge["untrained_both_orders"], "the trained judge beats the untrained one"),
        (judge["trained_both_orders"] > judge["random"], "the trained judge beats a coin"),
        (judge["trained_both_orders"] > shorter, "the trained judge beats always taking the shorter answer"),
        (fusion["best_of_accuracy"] > fusion["best_single_accuracy"], "best_of beats the best single member"),
    ]  # fmt: skip
    verdicts = "\n".join(f"- {'Yes' if holds else 'No'}: {words}." for holds, words in claims)
    swap = results["swap"]
    text = f"""# The demo's report

{
        "On the tiny random base: this shows the steps, it learns nothing."
        if quick
        else "On the embedded base (SmolLM2-135M upcycled into a Mixtral of 373 M parameters)."
    }
{results["heldout_tasks"]} held-out tasks for base and domain (greedy), {judge["n"]} held-out pairs for the judge,
{fusion["n"]} held-out tasks for fusion. Tasks are split by prompt; nothing was tuned on the held-out ones.
Intervals are 95 %.

| what | value | interval |
| --- | --- | --- |
{table}

Hot swap: {swap["requests_during"]} requests, {swap["failed"]} failed.
Parity of vLLM and PEFT (worst log-prob difference, nats): domain {results["parity"]["domain"]:.1e},
judge {results["parity"]["judge"]:.1e}.

## What improved, and what did not

{verdicts}

{fusion["verdict"]}

![Training curves](curves.png)
![Accuracy](accuracy.png)
"""
    write_text(out / "report.md", text)


def interval(pair: list[float]) -> str:
    """An interval in per cent."""
    return f"{100 * pair[0]:.0f}-{100 * pair[1]:.0f} %"


def plots(out: Path, results: dict[str, Any]) -> None:
    """Draws curves.png and accuracy.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for axis, stage, title in ((axes[0], "sft", "SFT: loss"), (axes[1], "judge", "judge (DPO): loss")):
        rows = [row for row in read_jsonl(out / stage / "metrics.jsonl") if "loss" in row]
        axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], marker=".")
        axis.set(title=title, xlabel="optimiser step", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=120)
    pyplot.close(figure)

    fusion = results["fusion"]
    bars = {
        "base": (results["base_accuracy"], results["base_accuracy_interval"]),
        "domain": (results["domain_accuracy"], results["domain_accuracy_interval"]),
        "best_of": (fusion["best_of_accuracy"], fusion["best_of_interval"]),
        "oracle": (fusion["oracle_accuracy"], [fusion["oracle_accuracy"]] * 2),
    }
    figure, axis = pyplot.subplots(figsize=(5, 3.5))
    errors = [[v - i[0] for v, i in bars.values()], [i[1] - v for v, i in bars.values()]]
    axis.bar(list(bars), [v for v, _ in bars.values()], yerr=errors, capsize=4, color="#4878a8")
    axis.set(title="accuracy on held-out tasks (95 % intervals)", ylim=(0, 1))
    figure.tight_layout()
    figure.savefig(out / "accuracy.png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
