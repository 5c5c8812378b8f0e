"""Sequence parallelism: losses of two processes that divide each row, beside those of one that holds it whole.

    python benchmarks/sequence_parallel.py

Both runs train the random two-layer base on a CPU with gloo: packed rows, two micro batches a step, and the router's
loss. `docs/parallelism.md` reports the result.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]
KEYS = {
    "packing": "true",
    "max_length": 64,
    "optimizer.steps": 8,
    "optimizer.batch_size": 4,
    "optimizer.micro_batch": 2,
    "router_aux_loss_coef": 0.01,
    "save_every": 0,
}


def main() -> None:
    """Runs both trainings and compares their steps."""
    from mixfuse.contracts.files import write_jsonl
    from mixfuse.train.model.embedded_base import build

    words = ["river", "stone", "apple", "cloud", "tiger", "lamp"]
    with tempfile.TemporaryDirectory(prefix="sequence-parallel-") as name:
        folder = Path(name)
        build(folder / "base", tiny=True)
        chats = []
        for number in range(32):
            said = " ".join(words[(number + place) % len(words)] for place in range(1 + number % 5))
            turns = [{"role": "user", "content": f"Repeat: {said}"}, {"role": "assistant", "content": said}]
            chats.append({"id": str(number), "messages": turns})
        write_jsonl(folder / "chats.jsonl", chats)
        one, two = (_train(folder, processes) for processes in (1, 2))
    for number, (alone, both) in enumerate(zip(one, two, strict=True), 1):
        print(
            f"step {number}: loss {alone['loss']:.6f}, {both['loss']:.6f}; gradient {alone['grad_norm']:.6f}, "
            f"{both['grad_norm']:.6f}"
        )
    for key, what in {"loss": "a loss", "grad_norm": "a gradient's norm"}.items():
        worst = max(abs(both[key] / alone[key] - 1) for alone, both in zip(one, two, strict=True))
        print(f"largest difference of {what}: {worst:.1e} of it")


def _train(folder: Path, processes: int) -> list[dict[str, Any]]:
    """The steps of a run in which so many processes divide each row."""
    out = folder / str(processes)
    keys: dict[str, Any] = {"base": folder / "base", "data": folder / "chats.jsonl", "out": out}
    keys |= {"deepspeed": PROJECT / "configs" / "deepspeed" / "zero3.json", **KEYS}
    keys |= {"processes": processes, "parallel.sequences": processes}
    command = [sys.executable, "-m", "mixfuse", "train", "sft", str(PROJECT / "configs" / "tiny" / "domain_sft.yaml")]
    command += [f"{key}={value}" for key, value in keys.items()]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


if __name__ == "__main__":
    main()
