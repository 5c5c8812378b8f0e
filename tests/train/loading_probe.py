"""Loads bases into ZeRO-3's partitions both ways, and writes down where they differ (`OUT/RANK.json`).

Started by torchrun: `loading_probe.py OUT BASE:DTYPE[+QUANTIZATION] …`. Not a test: the tests read what it found.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mixfuse.train.model import load
from mixfuse.train.processes import worker

ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000}, "train_batch_size": 6}


def parts(base: Path, dtype: torch.dtype, quantization: Any) -> dict[str, Any]:
    model = load.load_base(base, dtype, quantization=quantization)
    rank = torch.distributed.get_rank()

    def held(parameter: Any) -> torch.Tensor:
        """This process's part, without the padding, which nobody writes."""
        part: torch.Tensor = parameter.ds_tensor
        return part[: max(0, parameter.ds_numel - rank * part.numel())].clone()

    return {name: held(parameter) for name, parameter in model.named_parameters()}


def main() -> None:
    out, *cases = sys.argv[1:]
    worker.prepare(1, wandb="disabled", timeout_minutes=5)
    from transformers.integrations import HfDeepSpeedConfig

    found = {}
    for case in cases:
        base, _, kind = case.rpartition(":")
        dtype, _, packed = kind.partition("+")
        # transformers partitions a model while this lives.
        config = HfDeepSpeedConfig({**ZERO3, "bf16": {"enabled": dtype == "bfloat16"}})
        asked: list[str] = []
        read = load.Checkpoint.tensor

        def note(checkpoint: Any, key: str, asked: list[str] = asked, read: Any = read) -> Any:
            asked.append(key)
            return read(checkpoint, key)

        with patch.object(load.Checkpoint, "tensor", note):
            ours = parts(Path(base), getattr(torch, dtype), packed or None)
            whole = len(asked)
            with patch.object(load, "has_plain_partition", lambda parameter: False):
                gathered = parts(Path(base), getattr(torch, dtype), packed or None)
        found[case] = {
            "weights": len(ours),
            "different": [
                name
                for name in sorted(ours.keys() | gathered.keys())
                if name not in ours
                or name not in gathered
                or not torch.equal(ours[name].view(torch.uint8), gathered[name].view(torch.uint8))
            ],
            "dtypes": sorted({str(part.dtype) for part in ours.values()}),
            "zero": [name for name, part in ours.items() if part.numel() and not part.view(torch.uint8).any()],
            "whole_tensors_read": [whole, len(asked) - whole],
        }
        del config
    rank = torch.distributed.get_rank()
    (Path(out) / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
