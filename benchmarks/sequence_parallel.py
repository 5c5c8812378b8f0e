"""DeepSpeed's sequence parallelism (Ulysses) under this project's SFT trainer: losses beside those of one process.

    python benchmarks/sequence_parallel.py

No recipe has a key for it; this is the trial that `docs/parallelism.md` reports. Two CPU processes share each chat of
the random two-layer base: accelerate's `ParallelismConfig` is handed to the trainer, and every batch gets
`position_ids` and is padded to one length, which the exchange needs. A step takes the same four chats in both runs.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]
LENGTH = 64
KEYS = {
    "max_length": LENGTH,
    "optimizer.steps": 8,
    "optimizer.micro_batch": 4,
    "router_aux_loss_coef": 0,
    "save_every": 0,
}


def main() -> None:
    """Runs both trainings, or, with arguments, is one process of the parallel one."""
    if len(sys.argv) > 1:
        _process(Path(sys.argv[1]), sys.argv[2:])
        return
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
        # Two processes see four chats together; the trainer counts its batch over processes that share nothing.
        for out, batch, start in (
            ("one", 4, ["-m", "mixfuse", "train", "sft"]),
            ("two", 8, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]),
        ):
            keys: dict[str, Any] = {"base": folder / "base", "data": folder / "chats.jsonl", "out": folder / out}
            keys |= {"deepspeed": PROJECT / "configs" / "deepspeed" / "zero3.json", **KEYS}
            keys |= {"optimizer.batch_size": batch, "processes": 1 if out == "one" else 2}
            command = [*start, str(PROJECT / "configs" / "tiny" / "domain_sft.yaml")]
            overrides = [f"{key}={value}" for key, value in keys.items()]
            environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
            subprocess.run([sys.executable, *command, *overrides], check=True, stdout=sys.stderr, env=environment)
        one, two = (_rows(folder / out) for out in ("one", "two"))
    for number, (alone, both) in enumerate(zip(one, two, strict=True), 1):
        print(
            f"step {number}: loss {alone['loss']:.6f}, {both['loss']:.6f}; gradient {alone['grad_norm']:.6f}, "
            f"{both['grad_norm']:.6f}"
        )
    worst = max(abs(both["loss"] / alone["loss"] - 1) for alone, both in zip(one, two, strict=True))
    print(f"largest difference of a loss: {worst:.1e} of it")


def _rows(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def _process(recipe: Path, overrides: list[str]) -> None:
    import torch
    from accelerate import ParallelismConfig
    from accelerate.utils import DeepSpeedSequenceParallelConfig
    from torch.nn.functional import pad

    from mixfuse.train.run import start
    from mixfuse.train.stages import sft

    arguments, collator = sft.trainer_arguments, sft.Collator
    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")

    class Padded(collator):  # type: ignore[misc, valid-type]
        """Batches of one length, with positions and without a mask: what pads is behind what it could change."""

        def __call__(self, rows: Any) -> dict[str, Any]:
            batch = super().__call__(rows)
            more = LENGTH - batch["input_ids"].shape[1]
            ids = pad(batch["input_ids"], (0, more))
            positions = torch.arange(LENGTH).expand(len(rows), -1).contiguous()
            return {"input_ids": ids, "labels": pad(batch["labels"], (0, more), value=-100), "position_ids": positions}

    sft.Collator = Padded
    sft.trainer_arguments = lambda *given: {
        **arguments(*given),
        "parallelism_config": ParallelismConfig(sp_size=2, sp_backend="deepspeed", sp_handler=handler),
    }
    start("sft", recipe, overrides)


if __name__ == "__main__":
    main()
