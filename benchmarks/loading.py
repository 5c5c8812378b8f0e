"""Loading a base under ZeRO-3: each process reads its part, beside rank 0 reading all and the others receiving it.

    python benchmarks/loading.py [--processes 2 4] [--layers 8] [--hidden 512]

writes a random Mixtral to a temporary folder and loads it both ways, each in processes of its own. Before a load, the
kernel drops the file from its cache. Printed as shares of the checkpoint, for each process: bytes of the tensors that
it read; bytes that came from the disk (`/proc/self/io`; not what another process has read or the kernel read ahead for
it); and how far its anonymous memory rose above what it was before. Last the slowest process's time, as a ratio.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from anonymous_memory import AnonymousMemory


def main() -> None:
    """Runs the benchmark, or with `--probe` one process of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--probe", nargs=3, metavar=("BASE", "WAY", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        _probe(*arguments.probe)
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        base = Path(folder) / "base"
        size = _write_base(base, arguments.layers, arguments.hidden)
        print(f"checkpoint: {size / 2**20:.0f} MiB, {arguments.layers} layers of 8 experts, bfloat16")
        for processes in arguments.processes:
            ways = {way: _load(base, way, processes, Path(folder)) for way in ("broadcast", "slices")}
            for way, ranks in ways.items():
                read = ", ".join(f"{rank['read'] / size:.2f}" for rank in ranks)
                peak = ", ".join(f"{rank['peak'] / size:.2f}" for rank in ranks)
                check = ", ".join(f"{rank['peak_checked'] / size:.2f}" for rank in ranks)
                total = sum(rank["read"] for rank in ranks) / size
                seconds = max(rank["seconds"] for rank in ranks) / max(rank["seconds"] for rank in ways["broadcast"])
                asked = ", ".join(f"{rank['asked'] / size:.2f}" for rank in ranks)
                print(f"{processes} processes, {way}: read {asked} of the checkpoint;")
                print(f"    from disk {read}, together {total:.2f};")
                print(f"    memory {peak}, with the check {check}; time {seconds:.2f} of the broadcast's")


def _write_base(base: Path, layers: int, hidden: int) -> int:
    """Writes a random Mixtral of 8 experts in two files; returns its bytes."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=8,
        vocab_size=8192,
    )
    model = MixtralForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(base, max_shard_size="100MB")
    return sum(file.stat().st_size for file in base.glob("*.safetensors"))


def _load(base: Path, way: str, processes: int, folder: Path) -> list[dict[str, Any]]:
    for file in base.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={processes}", __file__, "--probe", str(base), way, str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def _probe(base: str, way: str, out: str) -> None:
    import torch

    from mixfuse.contracts.families import family_of
    from mixfuse.train.model import expert_lora, load
    from mixfuse.train.processes import worker

    worker.prepare(1, wandb="disabled", timeout_minutes=5)
    from transformers.integrations import HfDeepSpeedConfig

    zero3 = {"zero_optimization": {"stage": 3}, "train_batch_size": 12, "bf16": {"enabled": True}}
    config = HfDeepSpeedConfig(zero3)
    expert_lora.register()
    settings = {
        "dtype": torch.bfloat16,
        "attn_implementation": "sdpa",
        "experts_implementation": expert_lora.EXPERTS_IMPLEMENTATION,
    }
    torch.distributed.barrier()
    before, began = _bytes_read(), time.monotonic()
    plain, asked = load.has_plain_partition, [0]

    def counting(read: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            tensor = read(*arguments)
            asked[0] += tensor.nbytes
            return tensor

        return counted

    load.Checkpoint.tensor = counting(load.Checkpoint.tensor)
    load.Checkpoint.elements = counting(load.Checkpoint.elements)
    with (
        AnonymousMemory(every_s=0.002, children=False) as memory,
        patch.object(load, "has_plain_partition", plain if way == "slices" else lambda _: False),
    ):
        model = load._partitioned(Path(base), family_of(Path(base)), settings, None)
        seconds, read, peak = time.monotonic() - began, _bytes_read() - before, memory.peak
        load.check_loaded(model, Path(base))
    found = {"read": read, "asked": asked[0], "peak": peak, "peak_checked": memory.peak, "seconds": seconds}
    rank = torch.distributed.get_rank()
    (Path(out) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    del config


def _bytes_read() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


if __name__ == "__main__":
    main()
