"""One process of a run: its settings before the libraries are imported, and how it joins the others."""

import os
import warnings
from typing import TypeVar

T = TypeVar("T")

LAUNCHED = "WORLD_SIZE"  # a launcher (torchrun, deepspeed) has started this process


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return LAUNCHED in os.environ


def world_size(default: int) -> int:
    """The number of processes of the run; `default` if no launcher has started this process."""
    return int(os.environ.get(LAUNCHED, default))


def local_world_size() -> int:
    """The number of processes on this machine; torchrun and deepspeed name it differently."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ[LAUNCHED])


def threads(count: int | None, processes: int) -> int:
    """CPU threads for each of a machine's processes."""
    return count or max(1, (os.cpu_count() or 1) // processes)


def prepare(recipe_threads: int | None, *, wandb: str) -> None:
    """Prepares this process for training and joins it with the others.

    Args:
        recipe_threads: CPU threads; by default the cores divided by the machine's processes.
        wandb: Weights & Biases' mode.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ["WANDB_MODE"] = wandb
    # DeepSpeed 0.19.8 calls collectives that torch 2.13 has renamed: a warning a step that the user cannot fix.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
    count = threads(recipe_threads, local_world_size())
    os.environ.setdefault("OMP_NUM_THREADS", str(count))  # unset, accelerate would choose another number
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(count)
    import deepspeed

    # An op for inference only. DeepSpeed compiles it when distributed starts, and fails without ninja and a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Before the model is loaded: ZeRO-3's partitioned loading takes the world size from the process group.
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def agree(value: T) -> T:
    """Rank 0's value, on every rank. For a moment, a shared folder may look different on another machine."""
    from torch import distributed

    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]
