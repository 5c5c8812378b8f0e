"""What the tests of the training room share: recipes and data for the tiny base, runs as a user starts them."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).parents[2]
ZERO3 = PROJECT / "configs" / "deepspeed" / "zero3.json"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}
WORDS = ("river", "stone", "apple", "cloud", "tiger", "lamp", "green", "winter")
SFT_STEPS = 8
PROBE = [40, 1719, 260, 2734, 28, 351, 253, 1205, 30]  # token ids of a fixed text


@dataclass(frozen=True)
class Run:
    """A finished run's folder, read."""

    out: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All of `metrics.jsonl`."""
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The rows of optimiser steps: those with a loss."""
        return [row for row in self.rows if "loss" in row]

    @property
    def record(self) -> dict[str, Any]:
        """`run.json`."""
        return dict(json.loads((self.out / "run.json").read_text()))

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations."""
        return [row for row in self.rows if "eval_loss" in row]

    def series(self, key: str) -> list[float]:
        return [row[key] for row in self.steps]

    def weights(self) -> dict[str, Any]:
        from safetensors.torch import load_file

        return dict(load_file(self.out / "adapter" / "adapter_model.safetensors"))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def mixfuse(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Runs the command line in a process of its own."""
    command = [sys.executable, "-m", "mixfuse", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT, check=False)


def evaluated(recipe: Path, **keys: Any) -> str:
    """The override that evaluates on the held-out chats beside an SFT recipe."""
    return f"evaluation={json.dumps({'data': str(recipe.with_name('held_out.jsonl')), **keys})}"


def train(stage: str, recipe: Path, *overrides: str) -> Run:
    """Trains to the end.

    Raises:
        AssertionError: It failed; what it wrote is the message.
    """
    done = mixfuse("train", stage, recipe, *overrides)
    assert done.returncode == 0, done.stderr[-20000:]
    out = next(text.removeprefix("out=") for text in overrides if text.startswith("out="))
    return Run(Path(out))


def sft_recipe(folder: Path, base: Path, **keys: Any) -> Path:
    """A recipe, and chats of different lengths, so that a loss averaged wrongly over tokens shows.

    Beside the training chats there are five others to evaluate on, `held_out.jsonl`: no multiple of any batch.
    """
    chats = []
    for number in range(21):
        words = " ".join(WORDS[(number + place) % len(WORDS)] for place in range(1 + number % 5))
        messages = [{"role": "user", "content": f"Repeat: {words}"}, {"role": "assistant", "content": words}]
        chats.append({"id": str(number), "messages": messages})
    write_jsonl(folder / "chats.jsonl", chats[:16])
    write_jsonl(folder / "held_out.jsonl", chats[16:])
    optimizer = {"steps": SFT_STEPS, "batch_size": 4, "micro_batch": 2, "learning_rate": 1e-2, "warmup_steps": 0}
    return _recipe(folder / "sft.yaml", base, data=folder / "chats.jsonl", optimizer=optimizer, **keys)


def judge_recipe(folder: Path, base: Path, **keys: Any) -> Path:
    """A recipe, and pairs whose better answer repeats the prompt's word."""
    from mixfuse.train.data.pairs import build

    pool = []
    for number in range(12):
        word, other = WORDS[number % len(WORDS)], WORDS[(number + 3) % len(WORDS)]
        responses = [
            {"model": "a", "text": word, "correct": True},
            {"model": "b", "text": f"{other} {other}", "correct": False},
        ]
        pool.append({"id": str(number), "prompt": f"Repeat {number}: {word}", "responses": responses})
    write_jsonl(folder / "pool.jsonl", pool)
    build(folder / "pool.jsonl", folder / "pairs.jsonl", dev_share=0.0)
    optimizer = {"steps": 4, "batch_size": 4, "micro_batch": 2, "learning_rate": 1e-2, "warmup_steps": 0}
    evaluation = {"data": folder / "pairs.jsonl", "every": 2, "limit": 8}
    keys = {"data": folder / "pairs.jsonl", "evaluation": evaluation, "beta": 1.0, **keys}
    return _recipe(folder / "judge.yaml", base, optimizer=optimizer, **keys)


def _recipe(path: Path, base: Path, **keys: Any) -> Path:
    defaults: dict[str, Any] = {
        "base": base,
        "out": path.with_suffix(""),
        "max_length": 256,
        "lora": {"r": 4, "alpha": 16},
        "deepspeed": ZERO3,
        "threads": 1,
    }
    text = json.dumps(defaults | keys, default=str)
    path.write_text(yaml.safe_dump(json.loads(text), sort_keys=False))
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mount_namespaces() -> str:
    """The program `unshare`; the test is skipped where it may not make a mount namespace."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs unprivileged mount namespaces (unshare -Urm) for a file system of its own")
    return unshare


def on_full_disk(mount: Path, command: list[str], *, kilobytes: int = 64) -> "subprocess.CompletedProcess[str]":
    """Runs a command that writes below `mount`, a real file system of that size; its standard output ends with a list
    of the files the command left there.
    """
    unshare = mount_namespaces()
    mount.mkdir(exist_ok=True)
    script = 'mount -t tmpfs -o size="$0"k none "$1" && shift && "$@"; code=$?; echo; find "$MOUNT" -type f; exit $code'
    return subprocess.run(
        [unshare, "-Urm", "sh", "-c", script, str(kilobytes), str(mount), *command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**ENVIRONMENT, "MOUNT": str(mount)},
        check=False,
    )


def alone() -> dict[str, str]:
    """The environment that a launcher gives to the only process of a run."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **address}


def probe_judge(recipe: Path, out: Path) -> Run:
    """Trains a judge on one process with `judge_probe.py` looking on; what it saw is in `out/probe.json`."""
    probe = Path(__file__).with_name("judge_probe.py")
    command = [sys.executable, str(probe), str(recipe), f"out={out}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**ENVIRONMENT, **alone()}, check=False
    )
    assert done.returncode == 0, done.stderr[-20000:]
    return Run(out)


def save_adapter(base: Path, out: Path, *, attention: bool, experts: bool, r: int = 4, std: float = 0.05) -> Path:
    """Saves a LoRA with random factors, B too, as plain PEFT saves it: nothing of this project's is used."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"] if attention else [],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if experts else None,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    model.save_pretrained(out)
    return out


def logits(base: Path, adapter: Path | None = None) -> Any:
    """What transformers and PEFT say of a fixed text under an adapter, or of the base alone."""
    import torch
    from peft import PeftModel
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([PROBE])).logits


def deltas(directory: Path, scale: float | None = None) -> dict[str, Any]:
    """The change an adapter of per-expert factors makes to each weight of the checkpoint, multiplied out.

    Args:
        directory: A folder with the factors and their config.
        scale: What B·A is multiplied with; by default the config's alpha / r.
    """
    from safetensors.torch import load_file

    config = json.loads((directory / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"] if scale is None else scale
    tensors = load_file(directory / "adapter_model.safetensors")
    stems = [name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name]
    return {
        f"{stem.removeprefix('base_model.model.')}.weight": scale
        * (tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double())
        for stem in stems
    }


def logits_of_weights(base: Path, changes: dict[str, Any]) -> Any:
    """What transformers says of the fixed text when these are added to the base's weights: neither PEFT nor ours."""
    import torch
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    inner = model.config.intermediate_size
    with torch.no_grad():
        for name, change in changes.items():
            layer, found, rest = name.partition(".block_sparse_moe.experts.")
            if not found:
                parameters[name] += change.float()
                continue
            expert, projection, _ = rest.split(".")
            parameter = "down_proj" if projection == "w2" else "gate_up_proj"
            rows = {"w1": slice(inner), "w2": slice(None), "w3": slice(inner, None)}[projection]
            parameters[f"{layer}.mlp.experts.{parameter}"][int(expert), rows] += change.float()
        return model.eval()(input_ids=torch.tensor([PROBE])).logits
