"""Does the judge learn? The recipe and its ablations on the embedded base, beside rules that read nothing.

    .venv/bin/python benchmarks/judge.py --data ../shared/data [--base DIR] [--work DIR] [--rows NAME,…] [--minutes N]

Each row trains a judge with `mixfuse train judge` and measures it on labelled pairs it has not seen, both orders of
each, in this process and in batches; what follows from the verdicts is `judge_report.report`'s. Shares
carry 95 % intervals (bootstrap over prompts). Finished trainings and verdicts are kept in --work, a training that was
cut off goes on from its checkpoint, and the table (`table.md`, `table.json` there) is written anew after every row.

The embedded base is upcycled: its four experts are copies of one, so it computes what a Mixtral with one of them
does, at half the work. Rows marked `one expert` are trained and measured on that one, which is cut out of the base.

Data: PandaLM (people's votes), the GSM8K pool (checked answers), LLMBar Natural (experts' labels, never trained on),
and with --domain ADAPTER the demo's reasoning-gym tasks: four answers of the demo's domain adapter
(`runs/demo/sft/adapter`) to each, sampled here and checked by the verifiers. All four are of one member, so no style
tells which is right. There the judge also picks the best of the four, and the table says how much of the way from one
answer to the oracle it goes.
"""

import argparse
import itertools
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from mixfuse.contracts import calibration, judge_protocol
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import (
    atomic_directory,
    read_json,
    read_jsonl,
    sha256_json,
    write_json,
    write_jsonl,
    write_text,
)
from mixfuse.contracts.tasks import make
from mixfuse.contracts.trace import Verdict
from mixfuse.fusion.answering.candidate import Candidate
from mixfuse.fusion.answering.pairwise_judge import ranking
from mixfuse.fusion.config import Member
from mixfuse.fusion.measure.comparisons import Comparison, load
from mixfuse.fusion.measure.judge_report import report
from mixfuse.fusion.measure.marks import Views

PROJECT = Path(__file__).parents[1]
HELD_OUT = 0.12  # of the training prompts: fits temperature and tie margin
MAX_LENGTH = 320
LEAD = "\nVerdict:"
MEASURED = {"pandalm": "PandaLM dev", "gsm8k": "GSM8K dev", "llmbar": "LLMBar Natural", "tasks": "tasks, held out"}


@dataclass(frozen=True)
class Row:
    """One judge of the table.

    Attributes:
        what: What is different about it, in words.
        data: What it is trained on.
        steps: Optimiser steps of `batch` comparisons.
        recipe: Keys of the recipe that differ from `recipe_of`'s.
        share: Of the training prompts.
        on: The sets it is measured on; by default the one it is trained on.
        one_expert: Trained and measured on the base cut down to one of its equal experts.
    """

    what: str
    data: str
    steps: int
    recipe: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    on: tuple[str, ...] = ()
    one_expert: bool = True
    batch: int = 8

    @property
    def explains(self) -> bool:
        """Whether the judge writes a rationale before its verdict."""
        return self.recipe.get("completion") == "rationale"


ATTENTION = {"r": 16, "alpha": 32, "experts": "none"}
MLP = {"r": 16, "alpha": 32, "experts": "all"}
ROWS: dict[str, Row] = {
    "main": Row(
        "DPO, both orders, attention and the MLP", "pandalm", 256, {"lora": MLP, "evaluation": {"every": 64}},
        on=("pandalm", "llmbar"),
    ),
    "untrained": Row("the base as it is", "pandalm", 0, on=("pandalm", "llmbar")),
    "attention": Row(
        "DPO, attention alone, half as long", "pandalm", 128, {"evaluation": {"every": 40}}, on=("pandalm", "llmbar")
    ),
    "consistent": Row(
        "DPO and a penalty on preferring a position", "pandalm", 256, on=("pandalm", "llmbar"),
        recipe={"consistency": 0.25, "lora": MLP, "evaluation": {"every": 64}},
    ),
    "with sft": Row("DPO and half an SFT term, attention alone", "pandalm", 96, {"sft_weight": 0.5}),
    "tasks": Row("DPO, attention and the MLP, the penalty", "tasks", 120, {"consistency": 0.25, "lora": MLP}),
    "tasks untrained": Row("the base as it is", "tasks", 0),
    # One change each, on the tasks: their comparisons are short, so a row takes minutes.
    "dpo": Row("DPO, both orders", "tasks", 48),
    "one order": Row("DPO, one order", "tasks", 48, {"orders": "one"}),
    "sft": Row("SFT on the verdict, no DPO", "tasks", 48, {"warm_start": 48}),
    "sft+dpo": Row("a third SFT, then DPO", "tasks", 48, {"warm_start": 16}),
    "dpo+sft": Row("DPO and half an SFT term", "tasks", 48, {"sft_weight": 0.5}),
    "ipo": Row("IPO instead of DPO", "tasks", 48, {"loss": "ipo"}),
    "experts": Row("DPO, attention and the MLP", "tasks", 48, {"lora": MLP}),
    "penalty": Row(
        "DPO, attention and the MLP, the penalty", "tasks", 48, {"consistency": 0.25, "lora": MLP}
    ),
    "25 %": Row("DPO, a quarter of the prompts", "tasks", 48, share=0.25),
    "50 %": Row("DPO, half of the prompts", "tasks", 48, share=0.5),
    "auto": Row(
        "DPO, attention and half of the experts' load", "tasks", 48, one_expert=False,
        recipe={"lora": {**MLP, "experts": "auto", "expert_share": 0.5}},
    ),
    "rationale": Row("DPO on rationales that end in a verdict", "tasks", 24, {"completion": "rationale"}),
    "rationale untrained": Row("the base as it is, after a rationale", "tasks", 0, {"completion": "rationale"}),
    "gsm8k": Row(
        "DPO on checked answers, attention and the MLP", "gsm8k", 16,
        {"lora": MLP, "max_length": 640, "evaluation": {"limit": 64}},
    ),
}  # fmt: skip


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    ends = time.monotonic() + 60 * arguments.minutes
    bench = Bench(arguments)
    results: dict[str, Any] = {}
    for name in arguments.rows.split(",") if arguments.rows else ROWS:
        if name not in ROWS:
            raise SystemExit(f"no row {name!r}; there are {', '.join(ROWS)}")
        print(f"{time.strftime('%H:%M:%S')} {name}: {ROWS[name].what}", flush=True)
        try:
            result = bench.row(name, ROWS[name], ends)
        except MixfuseError as error:
            print(f"  left out: {error}", flush=True)
            continue
        if result is None:
            print("  the time is over; the same command goes on from here", flush=True)
            break
        results[name] = result
        stored = read_json(bench.work / "table.json") if (bench.work / "table.json").is_file() else {}
        write_json(bench.work / "table.json", stored | results)
        write_text(bench.work / "table.md", table(stored | results))
    print(table(results))


class Bench:
    """The data, the bases and what has been measured, in the work folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.work: Path = arguments.work
        self.data: Path = arguments.data
        self.domain: Path | None = arguments.domain
        self.threads: int = arguments.threads
        self.work.mkdir(parents=True, exist_ok=True)
        self.base: Path = arguments.base or self.work / "base"
        if not (self.base / "config.json").is_file():
            from mixfuse.train.model.embedded_base import build

            build(self.base)

    def row(self, name: str, row: Row, ends: float) -> dict[str, Any] | None:
        """Trains where it is not trained, measures where it is not measured; None where the time is over."""
        base = self.one_expert() if row.one_expert else self.base
        out = self.work / "runs" / name
        adapter = None
        if row.steps:
            self.train(name, row, base, out, ends)
            if not (out / "run.json").is_file():
                return None
            adapter = out / "adapter"
        measured = {}
        for on in row.on or (row.data,):
            if time.monotonic() > ends:
                return None
            measured[on] = self.measure(base, adapter, on, row.explains)
        # A rationale for each of the best-of's comparisons would take longer than all other rows.
        best_of = self.best_of(base, adapter) if "tasks" in measured and not row.explains else None
        record = read_json(out / "run.json") if row.steps else {}
        fitted = judge_protocol.Calibration() if row.explains else self.fitted(base, adapter, row.data)
        result = {
            "what": row.what,
            "one_expert": row.one_expert,
            "data": row.data,
            "share": row.share,
            "comparisons_trained": row.steps * row.batch,
            "seconds": record.get("metrics", {}).get("seconds"),
            "calibration": fitted.model_dump(),
            "best_of": best_of,
            "measured": {on: figures(rows, views, fitted) for on, (rows, views) in measured.items()},
        }
        for on, shown in result["measured"].items():
            print(f"  {MEASURED[on]}: " + ", ".join(f"{key} {_figure(shown[key])}" for key in COLUMNS), flush=True)
        if best_of:
            print(f"  best of four: {_best_of(best_of)}", flush=True)
        return result

    def train(self, name: str, row: Row, base: Path, out: Path, ends: float) -> None:
        """Runs `mixfuse train judge`, or goes on with it; stops it, saved, when the time is over."""
        if (out / "run.json").is_file():
            return
        recipe = self.recipe_of(name, row, base, out)
        path = self.work / "recipes" / f"{name}.yaml"
        write_text(path, yaml.safe_dump(recipe, sort_keys=False))
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
        with (self.work / "recipes" / f"{name}.log").open("a") as log:
            command = [sys.executable, "-m", "mixfuse", "train", "judge", str(path)]
            running = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=PROJECT)
            try:
                running.wait(timeout=max(1.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                running.send_signal(signal.SIGTERM)  # it saves its step and ends
                running.wait()
        if running.returncode and not (running.returncode == 75 and time.monotonic() > ends):
            raise MixfuseError(f"{name}: training failed, see {path.with_suffix('.log')}")

    def recipe_of(self, name: str, row: Row, base: Path, out: Path) -> dict[str, Any]:
        """The main recipe with the row's changes."""
        optimizer = {
            "steps": row.steps,
            "batch_size": row.batch,
            "micro_batch": 8,
            "learning_rate": 5e-4,
            "warmup_ratio": 0.1,
            "schedule": "cosine",
            "betas": [0.9, 0.95],
        }
        recipe: dict[str, Any] = {
            "base": str(base),
            "out": str(out),
            "data": str(self.pairs(row.data, row.share)),
            "max_length": MAX_LENGTH,
            "lora": ATTENTION,
            "evaluation": {"data": str(self.pairs(row.data, held_out=True)), "every": max(1, row.steps)},
            "reference_cache": str(self.work / f"reference-{'one' if row.one_expert else 'all'}.json"),
            "dtype": "bfloat16",
            "deepspeed": str(self.deepspeed()),
            "threads": self.threads,
            "save_every": 10,
        }
        changes = dict(row.recipe)
        if row.explains:
            recipe["data"] = str(self.rationales(row.data, base))
            del recipe["evaluation"], recipe["reference_cache"]
        recipe["optimizer"] = optimizer | changes.pop("optimizer", {})
        if evaluation := changes.pop("evaluation", None):
            recipe["evaluation"] |= evaluation
        return recipe | changes

    def deepspeed(self) -> Path:
        """ZeRO-3 for one process, which has every partition: what is gathered may stay so."""
        config = read_json(PROJECT / "configs" / "deepspeed" / "zero3.json")
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 10**9}
        path = self.work / "zero3.json"
        write_json(path, config)
        return path

    def pairs(self, data: str, share: float = 1.0, *, held_out: bool = False) -> Path:
        """The pairs file of a share of the training prompts, or of those that are held out of it for calibration."""
        path = self.work / "pairs" / f"{data}-{'held-out' if held_out else f'{share:.2f}'}.jsonl"
        if path.is_file():
            return path
        kept = []
        for comparison in self.comparisons(data, training=True):
            place = _place(comparison.prompt)
            if (place < HELD_OUT) if held_out else (HELD_OUT <= place < HELD_OUT + share * (1 - HELD_OUT)):
                kept.append(comparison)
        write_jsonl(path, (row for comparison in kept for row in preference_rows(comparison)))
        return path

    def rationales(self, data: str, base: Path, pairs: int = 128, samples: int = 3) -> Path:
        """Rationales of the untrained base, kept by whether their verdict is right, as `mixfuse pairs rationales` does.

        This base hardly ever writes the line with the verdict (that command would keep next to nothing), so the
        line's beginning is added to each rationale and the letter drawn from what the base says comes next.
        """
        path = self.work / "pairs" / f"{data}-rationales.jsonl"
        if path.is_file():
            return path
        rows = read_jsonl(self.pairs(data))[: 2 * pairs]
        prompts = [judge_protocol.explained(row["prompt"]) for row in rows]
        rng, halves = random.Random(0), []
        written = _rationales(base, None, prompts, samples)
        for row, prompt, said in zip(rows, prompts, written, strict=True):
            right, wrong = row["chosen"][0]["content"], row["rejected"][0]["content"]
            drawn = [
                (text, "A" if rng.random() < judge_protocol.probability(log_odds) else "B") for text, log_odds in said
            ]
            kept = [
                [{"role": "assistant", "content": f"{text}{LEAD} {letter}"} for text, letter in drawn if letter == one]
                for one in (right, wrong)
            ]
            halves.append(
                {**row, "prompt": prompt, "chosen": kept[0][:1], "rejected": kept[1][:1]} if all(kept) else None
            )
        twins = [both for both in zip(halves[::2], halves[1::2], strict=True) if all(both)]
        print(
            f"  rationales: {len(twins)} of {len(rows) // 2} pairs have right and wrong ones in both orders", flush=True
        )
        write_jsonl(path, (row for both in twins for row in both))
        return path

    def comparisons(self, data: str, *, training: bool) -> list[Comparison]:
        """Labelled pairs, ties left out; of a prompt's checked answers at most two pairs are trained on, one measured.

        Raises:
            MixfuseError: The data is not there.
        """
        split = "train" if training else "dev"
        if data == "tasks":
            path = self.task_pool(training=training)
        elif data == "llmbar":
            path = self.data / "llmbar" / "natural.jsonl"
        else:
            path = self.data / {"pandalm": "pandalm", "gsm8k": "gsm8k_pool"}[data] / f"{split}.jsonl"
        rows = load(path, pairs_per_prompt=4 if data == "tasks" else 2 if training else 1)
        return [row for row in rows if row.label != "tie"]

    def task_pool(self, *, training: bool) -> Path:
        """Pool answers to the demo's tasks; for training the reference and a wrong number near it stand among them.

        Raises:
            MixfuseError: There is no domain adapter to ask.
        """
        path = self.work / "tasks" / ("pool.jsonl" if training else "heldout.jsonl")
        if path.is_file():
            return path
        if self.domain is None:
            raise MixfuseError("the tasks need the demo's domain adapter: --domain runs/demo/sft/adapter")
        file = PROJECT / "configs" / "tiny" / "tasks.yaml"
        asked = make(file, "pool", 240) if training else make(file, "heldout", 100)
        answers = _answers(self.base, self.domain, [task.prompt for task in asked])
        rng = random.Random(0)
        rows = []
        for task, texts in zip(asked, answers, strict=True):
            said = [{"model": "domain", "text": text, "correct": task.verify(text)} for text in texts]
            rows.append({"id": task.id, "prompt": task.prompt, "responses": said})
        for task in make(file, "train", 600) if training else ():
            near = str(max(0, int(task.reference) + rng.choice((-3, -2, -1, 1, 2, 3))))
            said = [{"model": "near", "text": text, "correct": task.verify(text)} for text in (task.reference, near)]
            rows.append({"id": task.id, "prompt": task.prompt, "responses": said})
        write_jsonl(path, rows)
        return path

    def best_of(self, base: Path, adapter: Path | None) -> dict[str, Any]:
        """Best of four on the held-out tasks: one answer, the judge's choice, the oracle; and the share of the gap."""
        pool = read_jsonl(self.task_pool(training=False))
        pairs, where = [], []
        for number, row in enumerate(pool):
            texts = list(dict.fromkeys(answer["text"] for answer in row["responses"] if answer["text"].strip()))
            for one, other in itertools.combinations(texts, 2):
                pairs.append(Comparison(row["prompt"], one, other, "first"))
                where.append((number, one, other))
        views = self.views(base, adapter, "best-of", pairs)
        heard: dict[int, list[tuple[str, str, judge_protocol.Outcome]]] = {}
        for (number, one, other), view in zip(where, views, strict=True):
            heard.setdefault(number, []).append((one, other, judge_protocol.combine(view.forward, view.backward)))
        single, chosen, oracle = [], [], []
        for number, row in enumerate(pool):
            right = {answer["text"]: answer["correct"] for answer in row["responses"]}
            marks = [answer["correct"] for answer in row["responses"]]
            single.append(sum(marks) / len(marks))
            oracle.append(float(any(marks)))
            texts = [text for text in right if text.strip()] or list(right)
            candidates = [
                Candidate(index, Member(name="m", role="r"), text, "stop") for index, text in enumerate(texts)
            ]
            verdicts = [
                Verdict(first=texts.index(one), second=texts.index(other), winner=outcome.winner, score=outcome.score,
                        consistent=outcome.consistent)
                for one, other, outcome in heard.get(number, ())
            ]  # fmt: skip
            chosen.append(float(right[ranking(verdicts, candidates)[0].text]))
        generator = random.Random(0)
        draws = [generator.choices(range(len(pool)), k=len(pool)) for _ in range(1000)]

        def share(tasks: Sequence[int]) -> float:
            one, judge, best = (sum(values[task] for task in tasks) for values in (single, chosen, oracle))
            return (judge - one) / (best - one) if best > one else 0.0

        drawn = sorted(map(share, draws))
        return {
            "tasks": len(pool),
            "one_answer": sum(single) / len(pool),
            "judge": sum(chosen) / len(pool),
            "oracle": sum(oracle) / len(pool),
            "gap_closed": {"value": share(range(len(pool))), "low": drawn[25], "high": drawn[-26]},
        }

    def one_expert(self) -> Path:
        """The base with one expert a layer and no choice between them; equal to it, since its experts are equal."""
        path = self.work / "one-expert"
        if path.is_dir():
            return path
        from transformers import MixtralForCausalLM

        whole = MixtralForCausalLM.from_pretrained(self.base, dtype=torch.float32, local_files_only=True)
        state = whole.state_dict()
        for key in list(state):
            if ".mlp.experts." in key or key.endswith(".mlp.gate.weight"):
                if ".experts." in key and not all(torch.equal(state[key][0], expert) for expert in state[key]):
                    raise SystemExit(
                        f"{self.base}: its experts are not equal; rows with one expert need the embedded base"
                    )
                state[key] = state[key][:1]
        config = whole.config
        config.num_local_experts = config.num_experts_per_tok = 1
        cut = MixtralForCausalLM(config)
        cut.load_state_dict(state)
        cut.generation_config = whole.generation_config
        with atomic_directory(path) as temporary:
            cut.save_pretrained(temporary)
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(self.base / file, temporary)
        return path

    def measure(
        self, base: Path, adapter: Path | None, on: str, explains: bool
    ) -> tuple[list[Comparison], list[Views]]:
        """A judge's verdicts on a set, each pair both ways round; kept by the hash of everything they hang on."""
        rows = self.comparisons(on, training=False)
        return rows, self.views(base, adapter, on, rows, explains)

    def fitted(self, base: Path, adapter: Path | None, data: str) -> judge_protocol.Calibration:
        """Temperature and tie margin, from the prompts that are held out of the training data."""
        rows = [one for one in self.comparisons(data, training=True) if _place(one.prompt) < HELD_OUT]
        rows = rows[:64]  # of GSM8K's there are many, and long ones
        return calibration.fit(_of_the_better(rows, self.views(base, adapter, f"{data}-held-out", rows)))

    def views(
        self, base: Path, adapter: Path | None, on: str, rows: Sequence[Comparison], explains: bool = False
    ) -> list[Views]:
        """What the judge says of pairs, each way round; kept."""
        trained = read_json(adapter.parent / "run.json")["recipe"] if adapter else None
        parts = [str(base), trained, judge_protocol.digest(), [asdict(row) for row in rows]]
        digest = sha256_json([*parts, "explains"] if explains else parts)[:16]
        path = self.work / "verdicts" / f"{adapter.parent.name if adapter else 'untrained'}-{on}-{digest}.json"
        if not path.is_file():
            write_json(path, _verdicts(base, adapter, rows, explains))
        return [Views(*both) for both in read_json(path)]


def preference_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Both orders, as `mixfuse pairs build` writes them."""
    draw = random.Random(comparison.prompt).randbytes
    nonce = judge_protocol.new_nonce(comparison.prompt, comparison.first, comparison.second, draw=draw)
    rows = []
    for first, second, label in (
        (comparison.first, comparison.second, comparison.label == "first"),
        (comparison.second, comparison.first, comparison.label == "second"),
    ):
        right, wrong = judge_protocol.VERDICTS if label else judge_protocol.VERDICTS[::-1]
        rows.append(
            {
                "id": sha256_json(comparison.prompt)[:16],
                "prompt": judge_protocol.comparison(comparison.prompt, first, second, nonce=nonce),
                "chosen": [{"role": "assistant", "content": right}],
                "rejected": [{"role": "assistant", "content": wrong}],
                "protocol": judge_protocol.digest(),
            }
        )
    return rows


def _place(prompt: str) -> float:
    """Where a prompt stands between 0 and 1, by hash: smaller shares are parts of larger ones."""
    return int(sha256_json(["judge", prompt])[:8], 16) / 16**8


def _loaded(base: Path, adapter: Path | None) -> Any:
    """The base, in bfloat16, under an adapter."""
    from peft import LoraConfig, PeftModel

    from mixfuse.train.model import expert_lora
    from mixfuse.train.model.load import load_base

    model: Any = load_base(base, torch.bfloat16)
    if adapter:
        config = LoraConfig.from_pretrained(adapter)
        if config.target_parameters:
            expert_lora.attach(config)
        model = PeftModel.from_pretrained(model, adapter, config=config, autocast_adapter_dtype=False)
    return model.eval()


@torch.no_grad()
def _verdicts(
    base: Path, adapter: Path | None, rows: Sequence[Comparison], explains: bool
) -> list[tuple[float, float]]:
    """P(the answer shown first is better), both ways round."""
    from mixfuse.train.model.tokenizer import load_tokenizer

    prompts = [row["prompt"] for comparison in rows for row in preference_rows(comparison)]
    if explains:
        prompts = [judge_protocol.explained(prompt) for prompt in prompts]
        found = [said[0][1] for said in _rationales(base, adapter, prompts)]
    else:
        tokenizer, model = load_tokenizer(base), _loaded(base, adapter)
        tokens = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]
        found = _letters(tokenizer, model, tokens, "")
    p = [judge_protocol.probability(log_odds) for log_odds in found]
    return list(zip(p[::2], p[1::2], strict=True))


def _letters(tokenizer: Any, model: Any, tokens: Sequence[Sequence[int]], before: str) -> list[float]:
    """The log-odds of A over B as the next token."""
    from mixfuse.train.stages.one_pass_dpo import VerdictRow, logprobs

    letters = [tokenizer.encode(before + letter, add_special_tokens=False)[0] for letter in judge_protocol.VERDICTS]
    rows = [VerdictRow(ids, *letters) for ids in tokens]
    found = logprobs(model, rows, micro_batch=8, pad=tokenizer.pad_token_id)
    return [first - second for first, second in found]


def _answers(base: Path, adapter: Path, prompts: Sequence[str], samples: int = 4) -> list[list[str]]:
    """Samples answers at temperature 1; the tasks' are a few tokens long."""
    from mixfuse.train.model.tokenizer import load_tokenizer

    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return _written(load_tokenizer(base), _loaded(base, adapter), chats, samples=samples, tokens=8)


def _rationales(
    base: Path, adapter: Path | None, prompts: Sequence[list[dict[str, str]]], samples: int = 0, tokens: int = 40
) -> list[list[tuple[str, float]]]:
    """Rationales, up to their last whole sentence and without a verdict of their own, and the log-odds of A after each.

    Args:
        base: The model.
        adapter: The judge, or none.
        prompts: Comparisons that ask for a rationale.
        samples: Of each, at temperature 1; 0 writes one, the likeliest.
        tokens: The most of one.
    """
    from mixfuse.train.model.tokenizer import load_tokenizer

    tokenizer, model = load_tokenizer(base), _loaded(base, adapter)
    written = _written(tokenizer, model, prompts, samples=samples, tokens=tokens)
    texts = [[_sentences(text) for text in several] for several in written]
    asked = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        + tokenizer.encode(text + LEAD, add_special_tokens=False)
        for prompt, several in zip(prompts, texts, strict=True)
        for text in several
    ]
    found = iter(_letters(tokenizer, model, asked, " "))
    return [[(text, next(found)) for text in several] for several in texts]


def _sentences(text: str) -> str:
    text = text.partition("Verdict")[0].strip()
    ends = [place for place, letter in enumerate(text) if letter in ".!?"]
    return text[: ends[-1] + 1] if ends else text


@torch.no_grad()
def _written(
    tokenizer: Any, model: Any, chats: Sequence[list[dict[str, str]]], *, samples: int, tokens: int
) -> list[list[str]]:
    """What the model writes, at temperature 1; with no samples asked for, the one likeliest answer."""
    tokenizer.padding_side = "left"
    torch.manual_seed(0)
    found: list[list[str]] = []
    count = max(1, samples)
    for start in range(0, len(chats), 16):
        inputs = tokenizer.apply_chat_template(
            list(chats[start : start + 16]),
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            padding=True,
        )
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=samples > 0, num_return_sequences=count)
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [[text.strip() for text in texts[n : n + count]] for n in range(0, len(texts), count)]
    return found


COLUMNS = ("both_orders_correct", "first_order", "consistency", "order_averaged", "ece_before", "ece")


def figures(rows: Sequence[Comparison], views: Sequence[Views], fitted: judge_protocol.Calibration) -> dict[str, Any]:
    """What `judge_report` says of the verdicts, and the calibration error without and with what was fitted."""
    found = report(rows, views).to_json()
    pairs = _of_the_better(rows, views)
    return {
        **found,
        "ece_before": calibration.expected_error(pairs),
        "ece": calibration.expected_error(pairs, fitted),
        "ece_interval": _ece_interval(rows, pairs, fitted),
    }


def _of_the_better(rows: Sequence[Comparison], views: Sequence[Views]) -> list[calibration.LogOdds]:
    """The log-odds of each pair's better answer, both ways round."""
    pairs = []
    for row, view in zip(rows, views, strict=True):
        sign = 1 if row.label == "first" else -1
        pairs.append((sign * _log_odds(view.forward), -sign * _log_odds(view.backward)))
    return pairs


def _ece_interval(rows: Sequence[Comparison], pairs: Sequence[Any], fitted: Any) -> tuple[float, float]:
    """95 % of the calibration error, prompts drawn with replacement; of few pairs it is above zero by chance alone."""
    by_prompt: dict[str, list[Any]] = {}
    for row, pair in zip(rows, pairs, strict=True):
        by_prompt.setdefault(row.prompt, []).append(pair)
    clusters, generator = list(by_prompt.values()), random.Random(0)
    draws = sorted(
        calibration.expected_error(
            [pair for cluster in generator.choices(clusters, k=len(clusters)) for pair in cluster], fitted
        )
        for _ in range(200)
    )
    return draws[5], draws[-6]


def _log_odds(p: float | None) -> float:
    p = min(max(p or 0.0, 1e-12), 1 - 1e-12)
    return math.log(p) - math.log1p(-p)


def _figure(value: Any) -> str:
    return (
        f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]" if isinstance(value, dict) else f"{value:.2f}"
    )


def table(results: dict[str, Any]) -> str:
    """Markdown: a table for each set that was measured, the rules that read nothing at its end."""
    text = []
    for on, title in MEASURED.items():
        rows = {name: result for name, result in results.items() if on in result["measured"]}
        if not rows:
            continue
        first = next(iter(rows.values()))["measured"][on]
        text += [
            f"### {title}: {first['n']} pairs of {first['prompts']} prompts",
            "",
            "| judge | comparisons trained | right in both orders | first order | consistent | orders averaged | "
            "ECE raw → calibrated |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, result in rows.items():
            shown = result["measured"][on]
            mark = ", one expert" if result["one_expert"] else ""
            cells = " | ".join(_figure(shown[key]) for key in COLUMNS[:4])
            text.append(
                f"| {name}: {result['what']}{mark} | {result['comparisons_trained']} | {cells} | "
                f"{shown['ece_before']:.2f} → {shown['ece']:.2f} |"
            )
        for rule in ("longer", "shorter", "strongest_member"):
            if rule in first["baselines"]:
                cell = _figure(first["baselines"][rule]["both_orders_correct"])
                text.append(f"| always the {rule.replace('_', ' ')} | | {cell} | {cell} | 1 | {cell} | |")
        text.append("")
        if on == "tasks":
            text += [
                f"- best of four by {name}: {_best_of(row['best_of'])}" for name, row in rows.items() if row["best_of"]
            ]
            text.append("")
    return "\n".join(text)


def _best_of(found: dict[str, Any]) -> str:
    return (
        f"one answer {found['one_answer']:.2f}, the judge's choice {found['judge']:.2f}, oracle {found['oracle']:.2f} "
        f"of {found['tasks']} tasks: {_figure(found['gap_closed'])} of the gap"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=PROJECT.parent / "shared" / "data")
    parser.add_argument("--domain", type=Path, help="a demo's domain adapter (PEFT): runs/demo/sft/adapter")
    parser.add_argument("--base", type=Path, help="the embedded base; built there where it is missing")
    parser.add_argument("--work", type=Path, default=Path("runs/bench/judge"))
    parser.add_argument("--rows", help="of the table, comma-separated; by default all")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
