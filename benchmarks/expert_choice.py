"""Experts chosen by load against all of them, and against attention alone, at equal steps.

    .venv/bin/python benchmarks/expert_choice.py [--base DIR] [--steps N] [--share S] [--json]

Trains `configs/tiny/domain_sft.yaml` once each with `lora.experts` all, auto and none, from the same seed on the same
tasks of `configs/tiny/tasks.yaml`, and prints the loss on held-out tasks (mean over the answer's tokens), trainable
parameters, the bytes of the trained factors, and those of the exported directory's weights. The last two differ: vLLM
0.32 takes all or none of a layer's experts (`PackedLoRALayerWeights.pack_moe`), so an untouched expert of a layer that
has others is written as zeros, and only layers without any are left out.

The embedded base has random routers, whose load is near even: there is little to choose by, and `auto` leaves out only
what a lower --share makes it leave out. What it can do where routers have specialised, this base cannot show.
Finished runs are kept in --out and not trained again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import MixtralForCausalLM

from mixfuse.contracts import adapter as contract
from mixfuse.contracts.files import read_json, write_jsonl
from mixfuse.contracts.tasks import make
from mixfuse.train.adapters.export import export
from mixfuse.train.model.embedded_base import build
from mixfuse.train.model.tokenizer import load_tokenizer

PROJECT = Path(__file__).parents[1]
TASKS = PROJECT / "configs" / "tiny" / "tasks.yaml"


def main() -> None:
    arguments = _arguments()
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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="the base model; by default the embedded one is built below --out")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/expert_choice"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--share", type=float, default=0.8, help="lora.expert_share (default 0.8)")
    parser.add_argument("--heldout", type=int, default=64, help="held-out tasks (default 64)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
