"""Real training runs on a synthetic base with few layers: what the checks `four-layers`, `loading` and `vllm` share.

The base has random weights in the layout of Mixtral's checkpoints, and a tokenizer of bytes. A run is one process, as
`mixfuse train sft` would start it, with `train_probe.py` watching.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpu_checks.checking import Report, Skipped

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("transformers", "peft", "trl", "deepspeed", "safetensors", "pydantic", "datasets")
KILLED = 9  # the status of a run that the probe ends at once
SECONDS = 900  # the longest that a run may take


class Base(NamedTuple):
    """A base on disk.

    Attributes:
        folder: Its folder.
        config: Its `config.json`.
        bytes: Bytes of its weights.
    """

    folder: Path
    config: dict[str, Any]
    bytes: int


class Ran(NamedTuple):
    """A run that ended.

    Attributes:
        out: Its folder.
        steps: The rows of `metrics.jsonl` that have a loss.
        facts: What the probe saw: `load_s`, `batch` (B, S), and for each step `peaks` in bytes and `step_s`.
    """

    out: Path
    steps: list[dict[str, Any]]
    facts: dict[str, Any]

    def series(self, key: str) -> list[float]:
        """One figure of all steps."""
        return [float(row[key]) for row in self.steps]


def require_packages() -> None:
    """Skips the check where a package that training needs is missing."""
    for name in PACKAGES:
        try:
            __import__(name)
        except ImportError as missing:
            raise Skipped(f"training needs {name}: {missing}; run scripts/setup --gpu") from None


def make_base(folder: Path, report: Report) -> Base:
    """Writes four layers of Mixtral 8x22B with random weights, or two tiny ones."""
    from plan import save_tokenizer
    from safetensors.torch import save_file

    config = json.loads((ROOT / "configs" / "mixtral-8x22b" / "model" / "config.json").read_text())
    config |= {"num_hidden_layers": 4}
    if report.small:
        config |= {
            "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 4, "vocab_size": 520,
        }  # fmt: skip
    dtype = dtype_of(report)
    config |= {"dtype": str(dtype).removeprefix("torch."), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config.pop("torch_dtype", None)
    folder.mkdir(parents=True)
    random = torch.Generator(report.device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        weight = torch.empty(shape, dtype=dtype, device=report.device).normal_(0, 0.02, generator=random)
        return weight.cpu()

    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    names: dict[str, str] = {}
    total = 0

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())

    layers = config["num_hidden_layers"]
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        tensors = {
            f"{stem}.input_layernorm.weight": torch.ones(hidden, dtype=dtype),
            f"{stem}.post_attention_layernorm.weight": torch.ones(hidden, dtype=dtype),
            f"{stem}.self_attn.q_proj.weight": normal(queries, hidden),
            f"{stem}.self_attn.k_proj.weight": normal(keys, hidden),
            f"{stem}.self_attn.v_proj.weight": normal(keys, hidden),
            f"{stem}.self_attn.o_proj.weight": normal(hidden, queries),
            f"{stem}.block_sparse_moe.gate.weight": normal(config["num_local_experts"], hidden),
        }
        for expert in range(config["num_local_experts"]):
            inside = f"{stem}.block_sparse_moe.experts.{expert}"
            tensors |= {
                f"{inside}.w1.weight": normal(inner, hidden),
                f"{inside}.w2.weight": normal(hidden, inner),
                f"{inside}.w3.weight": normal(inner, hidden),
            }
        save(f"model-{layer + 1:05}-of-{layers + 1:05}.safetensors", tensors)
    ends = {
        "model.embed_tokens.weight": normal(vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
        "lm_head.weight": normal(vocabulary, hidden),
    }
    save(f"model-{layers + 1:05}-of-{layers + 1:05}.safetensors", ends)
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)
    return Base(folder, config, total)


def dtype_of(report: Report) -> torch.dtype:
    """The dtype of 8x22B's recipes on a GPU; float32 on a CPU, where comparisons are exact."""
    return torch.bfloat16 if report.device.type == "cuda" else torch.float32


def make_recipe(base: Base, report: Report, **keys: Any) -> Path:
    """A recipe beside the base, with chats of many lengths that are packed into full rows."""
    folder = base.folder.parent
    length = 256 if report.small else 8192
    chats = []
    for number in range(64):
        asked, answered = "ab " * (1 + number % 7 * length // 60), "xyz " * (1 + number % 5 * length // 80)
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        chats.append({"id": str(number), "messages": messages})
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    recipe = {
        "base": base.folder, "out": folder / "run", "data": folder / "chats.jsonl", "max_length": length,
        "packing": True, "lora": {"r": 16, "alpha": 32}, "dtype": str(dtype_of(report)).removeprefix("torch."),
        "optimizer": {"steps": 20, "batch_size": 1, "micro_batch": 1, "learning_rate": 1e-4, "warmup_steps": 0},
        "deepspeed": ROOT / "configs" / "deepspeed" / "zero3.json", "gradient_checkpointing": True,
        "router_aux_loss_coef": 0,
    }  # fmt: skip
    if report.device.type == "cpu":
        recipe["threads"] = 1
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe | keys, default=str))  # JSON is YAML
    return path


def train(recipe: Path, name: str, *overrides: str, kill_after: int = 0) -> Ran:
    """Trains in a process of its own.

    Args:
        recipe: The recipe.
        name: The run's folder, beside the recipe. A run that was killed goes on if it has the same name.
        overrides: `key=value`.
        kill_after: The step after which the process ends at once, as if it had been killed; 0 for never.

    Raises:
        RuntimeError: It failed; the end of what it wrote is the message.
    """
    out, facts = recipe.parent / name, recipe.parent / f"{name}.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        **place,
        "PYTHONPATH": os.pathsep.join(paths),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, str(Path(__file__).with_name("train_probe.py")), str(recipe), str(facts)]
    command += [str(kill_after), f"out={out}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment, check=False)
    if done.returncode != (KILLED if kill_after else 0):
        raise RuntimeError(f"the run {name} ended with status {done.returncode}: {done.stderr[-1500:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return Ran(out, [row for row in rows if "loss" in row], json.loads(facts.read_text()))


def relative(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference; infinite if the lengths differ."""
    if len(ours) != len(theirs):
        return float("inf")
    return max((abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours, theirs, strict=True)), default=0.0)
