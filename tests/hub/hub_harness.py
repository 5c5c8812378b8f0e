"""Adapter directories to send, made of numbers alone, and the shell that a command is given."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from hub_server import TOKEN, Hub
from safetensors.numpy import save_file

from mixfuse.contracts import adapter, judge_protocol, model_card
from mixfuse.contracts.adapter import CONFIG, MANIFEST, WEIGHTS, Manifest
from mixfuse.contracts.files import write_json

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def shell(hub: Hub, home: Path) -> dict[str, str]:
    """A user's environment, with nothing of this machine's own cache, login or proxies.

    The client reads it once, when it is imported: so every command is a process of its own.
    """
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    kept = {
        name: value
        for name, value in os.environ.items()
        if "proxy" not in name.lower() and not name.startswith(("HF_", "TRANSFORMERS_"))
    }
    return {**kept, **ours, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def make(folder: Path, *, seed: int = 0, fused: bool = True, **keys: Any) -> Path:
    """An adapter directory of rank 2, about 60 kB: attention and one expert, and PEFT's fused file."""
    folder.mkdir()
    random = numpy.random.default_rng(seed)
    stem = "base_model.model.model.layers.0"
    tensors = {
        f"{stem}.{module}.lora_{side}.weight": random.normal(size=shape).astype(numpy.float32)
        for module in ("self_attn.q_proj", "block_sparse_moe.experts.0.w1")
        for side, shape in (("A", (2, 1200)), ("B", (1200, 2)))
    }
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]})
    )
    if fused:
        (folder / "peft").mkdir()
        save_file({"fused": random.normal(size=(2, 1000)).astype(numpy.float32)}, folder / "peft" / WEIGHTS)
        (folder / "peft" / CONFIG).write_text(
            json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]})
        )
    files = adapter.file_hashes(folder)
    role = keys.get("role", "judge")
    defaults = {
        "role": role,
        "revision": adapter.revision_of(files),
        "base": {part: part[0] * 64 for part in ("config", "tokenizer", "chat_template", "weights")},
        "base_path": "runs/base",
        "rank": 2,
        "experts_trained": True,
        "files": files,
        "judge_protocol": judge_protocol.describe() if role == "judge" else None,
    }
    manifest = Manifest.model_validate(defaults | keys)
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    model_card.renew(folder, manifest)
    return folder


def one_line(done: "subprocess.CompletedProcess[str]") -> str:
    """The one line that a refused command ends with."""
    assert done.returncode == 2, done.stdout + done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("mixfuse: error: ")
    return line
