"""How right the plan is: `mixfuse plan`'s formulas beside what real ZeRO-3 processes hold, on small Mixtrals on a CPU.

    python benchmarks/plan.py [--only NAME …] [--worlds 1 2 4] [--json]

For each model and world size, `plan_probe.py` trains a few steps as `mixfuse train` does and counts every byte a tensor
holds; the third step is compared with the plan for the batch that step really had. Some models gather ahead as the plan
chooses; for others, DeepSpeed's own defaults are scaled with the model, so that what decides at 8x22B under them (a MoE
block is larger than `stage3_max_live_parameters`) decides here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from mixfuse.contracts.strict_yaml import load
from mixfuse.train.planning.training_plan import Batch, Hardware, Plan, plan
from mixfuse.train.recipe import RECIPES

ROOT = Path(__file__).resolve().parent.parent
TARGET = 0.05


class Case(NamedTuple):
    """One model and recipe."""

    name: str
    layers: int
    hidden: int
    inner: int
    experts: int
    stage: str = "sft"
    dtype: str = "float32"
    checkpointing: bool = False
    vocabulary: int = 520
    scaled: bool = True  # DeepSpeed's default thresholds in proportion to 8x22B; else the plan's own
    heads: int = 4
    keys: int = 2
    micro: int = 2  # examples; of the judge four, two pairs in both orders


CASES = (
    Case("a", layers=2, hidden=64, inner=224, experts=4, scaled=False),
    Case("b", layers=6, hidden=128, inner=448, experts=8, dtype="bfloat16", checkpointing=True),
    # Wide experts, as at 8x22B where they outweigh the output layer.
    Case("c", layers=4, hidden=96, inner=3072, experts=4, dtype="bfloat16", vocabulary=4096),
    Case("d", layers=3, hidden=128, inner=4096, experts=2, checkpointing=True),
    Case("ahead", layers=4, hidden=96, inner=3072, experts=4, dtype="bfloat16", checkpointing=True, scaled=False),
    Case(
        "judge",
        layers=4,
        hidden=96,
        inner=2560,
        experts=4,
        stage="judge",
        dtype="bfloat16",
        checkpointing=True,
        micro=4,
    ),
)


def make_base(case: Case, out: Path) -> None:
    """A random Mixtral with a tokenizer."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.inner,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.keys,
        num_local_experts=case.experts,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    MixtralForCausalLM(config).to(getattr(torch, case.dtype)).save_pretrained(out)
    save_tokenizer(out)


def save_tokenizer(out: Path) -> None:
    """A tokenizer of 259 bytes and marks, with the simplest chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{letter: number for number, letter in enumerate(letters, start=3)}}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    fast.save_pretrained(out)


def make_recipe(case: Case, folder: Path) -> Path:
    """The base, data of different lengths (so every batch is padded), DeepSpeed's JSON and the recipe."""
    make_base(case, folder / "base")
    if case.stage == "sft":
        rows: list[dict[str, Any]] = [
            {"messages": [{"role": "user", "content": "ab " * (40 + n)}, {"role": "assistant", "content": "xyz " * 4}]}
            for n in range(48)
        ]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        from mixfuse.train.data.pairs import build

        pool = [
            {
                "id": str(n),
                "prompt": "ab " * (10 + n),
                "responses": [
                    {"model": "a", "text": "good", "correct": True},
                    {"model": "b", "text": "bad", "correct": False},
                ],
            }
            for n in range(24)
        ]
        (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pool))
        build(folder / "pool.jsonl", folder / "data.jsonl", dev_share=0.0)
    config = json.loads((ROOT / "configs" / "deepspeed" / "zero3.json").read_text())
    if case.scaled:
        block = 3 * case.experts * case.hidden * case.inner
        config["zero_optimization"] |= {
            "stage3_max_live_parameters": int(0.4 * block),
            "stage3_max_reuse_distance": int(0.4 * block),
            "stage3_prefetch_bucket_size": int(0.9 * case.hidden**2),
        }
    (folder / "deepspeed.json").write_text(json.dumps(config))
    recipe = {
        "base": folder / "base",
        "out": folder / "out",
        "data": folder / "data.jsonl",
        "max_length": 2048,
        "lora": {"r": 8, "alpha": 16},
        "optimizer": {"steps": 3, "batch_size": 16, "micro_batch": case.micro, "warmup_steps": 0},
        "deepspeed": folder / "deepspeed.json",
        "threads": 1,
        "dtype": case.dtype,
        "gradient_checkpointing": case.checkpointing,
    }
    if case.stage == "judge":
        recipe["reference_batch"] = 1  # its pass comes before training, and would be the peak of a model so small
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, default=str))  # JSON is YAML
    return path


def measure(case: Case, recipe: Path, world: int, facts: Path) -> dict[str, Any]:
    """Trains in real processes and reads what rank 0 saw.

    Raises:
        SystemExit: Training failed; its output says why.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    # One pass a step, so that the batch that made the peak is the batch that was noted.
    batch = f"optimizer.batch_size={case.micro * world}"
    command += [str(ROOT / "benchmarks" / "plan_probe.py"), case.stage, str(recipe), str(facts), batch]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{case.name} on {world} processes failed:\n{done.stderr[-4000:]}")
    return dict(json.loads(facts.read_text()))


def planned(case: Case, recipe_path: Path, world: int, shape: list[int]) -> Plan:
    """The plan for the batch that was measured."""
    recipe = load(recipe_path, RECIPES[case.stage])
    hardware = Hardware(nodes=1, gpus=world, gpu_bytes=1 << 40, cuda=False)
    base = json.loads((recipe.base / "config.json").read_text())
    return plan(recipe, base, json.loads(recipe.deepspeed.read_text()), hardware, batch=Batch(*shape))


def compare(made: Plan, seen: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Part → planned and measured bytes."""
    held = seen["held"]
    body = seen["body"]
    saved = made.saved["planned"]
    rows = {name: (made.held[name], held[name]) for name in held}
    if made.hardware.world > 1:  # one process gathers nothing
        read = made.host["loading"] if made.shape.I > made.shape.V else 2 * made.shape.I * made.shape.H * made.w
        rows["loading, peak"] = (made.loading + read, seen["loaded"]["peak"])
    rows["gathered, most"] = (made.largest_gather, seen["whole"]["peaks"].get("gather", 0))
    rows["activations kept"] = (saved, body["after"]["train"] - body["before"]["train"])
    rows["total, peak"] = (made.gpu_total, seen["whole"]["peak"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the plan with what real processes hold.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=", ".join(case.name for case in CASES))
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    found = []
    for case in CASES:
        if arguments.only and case.name not in arguments.only:
            continue
        with tempfile.TemporaryDirectory(prefix="plan-") as folder:
            recipe = make_recipe(case, Path(folder))
            for world in arguments.worlds:
                seen = measure(case, recipe, world, Path(folder) / "facts.json")
                made = planned(case, recipe, world, seen["body"]["shape"])
                rows = compare(made, seen)
                errors = {name: plan / real - 1 for name, (plan, real) in rows.items() if real}
                found.append({"model": case.name, "world": world, "rows": rows, "errors": errors})
                settings = ", ".join(f"{name} {value}" for name, value in case._asdict().items())
                print(f"{settings} on {world}: batch {seen['body']['shape']}, peak at {made.peak.name}", flush=True)
                for name, (plan_bytes, real) in rows.items():
                    error = f"{errors[name]:+.1%}" if real else ("" if not plan_bytes else "planned, not seen")
                    print(f"  {name:18} plan {plan_bytes:>12,}  measured {real:>12,}  {error}", flush=True)
    worst = max((abs(error) for entry in found for error in entry["errors"].values()), default=0.0)
    print(f"worst {worst:.1%} (target {TARGET:.0%})")
    if arguments.json:
        print(json.dumps({"worst_error": worst, "target": TARGET, "cases": found}))


if __name__ == "__main__":
    main()
