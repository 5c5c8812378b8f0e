"""Experts chosen by load against all of them, and against attention alone, at equal steps.

    .venv/bin/python benchmarks/expert_choice.py [--base DIR] [--steps N] [--share S] [--json]
    .venv/bin/python benchmarks/expert_choice.py --control [--experts-only] [--steps N] [--share S] [--seeds N]

The first trains `configs/tiny/domain_sft.yaml` once each with `lora.experts` all, auto and none, from the same seed on
the same tasks of `configs/tiny/tasks.yaml`, and prints the loss on held-out tasks (mean over the answer's tokens),
trainable parameters, the bytes of the trained factors, and those of the exported directory's weights. The last two
differ: vLLM 0.32 takes all or none of a layer's experts (`PackedLoRALayerWeights.pack_moe`), so an untouched expert of
a layer that has others is written as zeros, and only layers without any are left out.

The embedded base has random routers, whose load is near even: there is little to choose by, and `auto` leaves out only
what a lower --share makes it leave out. Finished runs are kept in --out and not trained again.

The second is the control: equally many experts of each layer, drawn at random. A random two-layer Mixtral with 8
experts is trained whole on both kinds of tasks, so that its routers specialise. It is then adapted to longer tasks of
one kind, with all experts, the chosen ones, random ones and none, for each kind and seed on the same batches. Ratios of
the held-out loss are within a kind and seed, with a 95 % interval (Student's t).
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from scipy.stats import t
from torch import Tensor
from transformers import MixtralForCausalLM

from mixfuse.contracts import adapter as contract
from mixfuse.contracts.families import family_of
from mixfuse.contracts.files import read_json, write_jsonl
from mixfuse.contracts.tasks import make
from mixfuse.train.adapters.export import export
from mixfuse.train.data.loss_mask import IGNORED, Encoded, encode
from mixfuse.train.model.choose_experts import Chosen, choose, measure
from mixfuse.train.model.embedded_base import build
from mixfuse.train.model.load import load_base, lora_config
from mixfuse.train.model.tokenizer import load_tokenizer
from mixfuse.train.recipe import Lora

PROJECT = Path(__file__).parents[1]
TASKS = PROJECT / "configs" / "tiny" / "tasks.yaml"
LONGER = """tasks:
  - {name: chain_sum, weight: 1, settings: {min_terms: 4, max_terms: 5, min_digits: 1, max_digits: 1}}
  - {name: letter_counting, weight: 1, settings: {min_words: 5, max_words: 6}}
"""
"""The control's domains: the kinds of `TASKS` with longer questions."""
KINDS = ("chain_sum", "letter_counting")
ARMS = ("all", "auto", "random", "none")
EXPERTS, BATCH = 8, 8


def main() -> None:
    arguments = _arguments()
    if arguments.control:
        control(arguments)
        return
    out: Path = arguments.out
    base = arguments.base or out / "base"
    if not (base / "config.json").is_file():
        build(base)
    write_jsonl(out / "train.jsonl", (task.chat() for task in make(TASKS, "train", 400, seed=0)))
    heldout = [task.chat() for task in make(TASKS, "heldout", arguments.heldout, seed=0)]
    rows = {"untrained": {"heldout_loss": loss(base, None, heldout)}}
    for experts in ("all", "auto", "none"):
        rows[experts] = train(experts, base, out / f"{experts}-{arguments.steps}-{arguments.share}", heldout, arguments)
    print(f"{arguments.steps} steps; auto carries {arguments.share:.0%} of each layer's gate weight")
    print(f"{'experts':10} {'held-out loss':>13} {'trainable':>11} {'trained bytes':>14} {'exported bytes':>14}")
    for name, row in rows.items():
        sizes = [f"{row[key]:,}" if key in row else "-" for key in ("trainable", "trained_bytes", "exported_bytes")]
        print(f"{name:10} {row['heldout_loss']:13.4f} {sizes[0]:>11} {sizes[1]:>14} {sizes[2]:>14}")
    every, auto = rows["all"], rows["auto"]
    ratios = {key: auto[key] / every[key] for key in ("trainable", "trained_bytes", "exported_bytes")}
    print(
        f"auto against all: held-out loss {auto['heldout_loss'] - every['heldout_loss']:+.4f}, trainable parameters "
        f"{ratios['trainable']:.2f}x, exported bytes {ratios['exported_bytes']:.2f}x"
    )
    if arguments.json:
        print(json.dumps({"steps": arguments.steps, "share": arguments.share, "rows": rows, "auto_vs_all": ratios}))


def train(experts: str, base: Path, out: Path, heldout: list[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains and exports one adapter, unless that was done before, and measures it."""
    if not (out / "run.json").is_file():
        overrides = {
            "base": base,
            "out": out,
            "data": arguments.out / "train.jsonl",
            "deepspeed": PROJECT / "configs" / "deepspeed" / "zero3.json",
            "lora.experts": experts,
            "lora.expert_share": arguments.share,
            "optimizer.steps": arguments.steps,
            "optimizer.batch_size": 8,
            "processes": arguments.processes,
            "save_every": 0,
        }
        command = [
            sys.executable,
            "-m",
            "mixfuse",
            "train",
            "sft",
            str(PROJECT / "configs" / "tiny" / "domain_sft.yaml"),
        ]
        subprocess.run([*command, *(f"{key}={value}" for key, value in overrides.items())], check=True)
    exported = out / "exported"
    if not exported.is_dir():
        export(out, exported)
    trainable = read_json(out / "run.json")["metrics"]["trainable_parameters"]
    return {
        "heldout_loss": loss(base, out / "adapter", heldout),
        "trainable": trainable,
        "trained_bytes": 4 * trainable,
        "exported_bytes": (exported / contract.WEIGHTS).stat().st_size,
    }


@torch.no_grad()
def loss(base: Path, adapter: Path | None, chats: list[Any]) -> float:
    """Mean negative log-likelihood of the answers' tokens, in nats."""
    tokenizer = load_tokenizer(base)
    model: Any = MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    total, count = 0.0, 0
    for chat in chats:
        messages = chat["messages"]
        whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        for place in range(len(prompt), len(whole)):
            total -= float(scores[place - 1, whole[place]])
            count += 1
    return total / count


def control(arguments: argparse.Namespace) -> None:
    """Compares the chosen experts with equally many random ones, on a base whose routers have specialised."""
    with tempfile.TemporaryDirectory(prefix="expert-choice-") as name:
        base, longer = Path(name) / "base", Path(name) / "longer.yaml"
        longer.write_text(LONGER)
        _specialised(base, arguments.specialise)
        rows = [_adapted(base, longer, kind, seed, arguments) for kind in KINDS for seed in range(arguments.seeds)]
    print(
        f"{arguments.steps} steps, share {arguments.share}, {len(rows)} trainings of each arm; "
        f"an even share would be {1 / EXPERTS:.3f}"
    )
    for kind in KINDS:
        row = next(row for row in rows if row["kind"] == kind)
        print(f"{kind}: experts chosen {row['chosen']}; busiest expert by layer {row['busiest']}")
    for arm in ("untrained", *ARMS):
        print(f"{arm:>10}  held-out loss {statistics.fmean(row[arm] for row in rows):.4f}")
    for first, second in (("auto", "random"), ("auto", "all"), ("random", "all"), ("none", "all")):
        print(f"{first} / {second}: {_interval([row[first] / row[second] for row in rows])}")
    if arguments.json:
        print(json.dumps(rows))


def _specialised(base: Path, steps: int) -> None:
    """Writes a small base that was trained whole, with its routers, on both kinds of tasks."""
    build(base, experts=EXPERTS, tiny=True)
    model = load_base(base, torch.float32)
    model.requires_grad_(True)
    rows = _rows(base, TASKS, "train", KINDS, seed=0)
    _steps(model, rows, steps, 1e-3, seed=0)
    # Only the weights are replaced: the tokenizer stays as it is.
    model.save_pretrained(base)


def _adapted(base: Path, tasks: Path, kind: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains each arm on one kind with one seed; returns the held-out losses and what was chosen."""
    rows, heldout = (_rows(base, tasks, split, (kind,), seed) for split in ("train", "heldout"))
    model = load_base(base, torch.float32)
    load = measure(model, [row.input_ids for row in rows[:64]], micro_batch=BATCH)
    auto = choose(load, arguments.share)
    draw = random.Random(seed)
    drawn = tuple(tuple(sorted(draw.sample(range(EXPERTS), len(experts)))) for experts in auto)
    chosen: dict[str, Chosen | None] = {"all": None, "auto": auto, "random": drawn, "none": None}
    found: dict[str, Any] = {
        "kind": kind,
        "seed": seed,
        "chosen": auto,
        "random experts": drawn,
        "busiest": [round(max(shares), 3) for shares in load.gate_share],
        "untrained": _mean_loss(model, heldout),
    }
    for arm in ARMS:
        if arm == "none" and arguments.experts_only:
            found[arm] = found["untrained"]
            continue
        torch.manual_seed(seed)
        lora = Lora(
            r=8,
            alpha=16,
            attention=not arguments.experts_only,
            experts="none" if arm == "none" else "all",
        )
        adapted = get_peft_model(load_base(base, torch.float32), lora_config(family_of(base), lora, chosen[arm]))
        _steps(adapted, rows, arguments.steps, 3e-3, seed)
        found[arm] = _mean_loss(adapted, heldout)
    print(f"{kind}, seed {seed}: " + ", ".join(f"{arm} {found[arm]:.4f}" for arm in ARMS), flush=True)
    return found


def _rows(base: Path, tasks: Path, split: Any, kinds: Sequence[str], seed: int) -> list[Encoded]:
    tokenizer = load_tokenizer(base)
    count = 400 if split == "train" else 128
    return [
        encode(task.chat()["messages"], tokenizer, "all") for task in make(tasks, split, count, seed=seed, only=kinds)
    ]


def _steps(model: Any, rows: Sequence[Encoded], steps: int, rate: float, seed: int) -> None:
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        total, count = _loss(model, draw.sample(rows, BATCH))
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def _mean_loss(model: Any, rows: Sequence[Encoded]) -> float:
    model.eval()
    parts = [_loss(model, rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    return sum(float(total) for total, _ in parts) / sum(count for _, count in parts)


def _loss(model: Any, rows: Sequence[Encoded]) -> tuple[Tensor, int]:
    """The negative log-likelihood of the answers' tokens, summed, in nats; and how many they are."""
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([[*row.input_ids, *[0] * (longest - len(row.input_ids))] for row in rows])
    labels = torch.tensor([[*row.labels, *[IGNORED] * (longest - len(row.labels))] for row in rows])[:, 1:]
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (longest - len(row.input_ids)) for row in rows])
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = whole.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    learned = labels != IGNORED
    logits = whole.lm_head(hidden[learned]).float()  # of the answers' tokens alone
    return torch.nn.functional.cross_entropy(logits, labels[learned], reduction="sum"), int(learned.sum())


def _interval(ratios: Sequence[float]) -> str:
    """The mean, with its 95 % interval by Student's t."""
    mean = statistics.fmean(ratios)
    half = float(t.ppf(0.975, len(ratios) - 1)) * statistics.stdev(ratios) / len(ratios) ** 0.5
    return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="the base model; by default the embedded one is built below --out")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/expert_choice"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--share", type=float, default=0.8, help="lora.expert_share (default 0.8)")
    parser.add_argument("--heldout", type=int, default=64, help="held-out tasks (default 64)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--control", action="store_true", help="beside random experts, where routers have specialised")
    parser.add_argument("--experts-only", action="store_true", help="of the control: no LoRA on attention")
    parser.add_argument("--seeds", type=int, default=3, help="of the control: its seeds (default 3)")
    parser.add_argument(
        "--specialise", type=int, default=300, metavar="N", help="of the control: steps before it (default 300)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
