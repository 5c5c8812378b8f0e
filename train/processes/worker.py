"""One process of a run: its settings before the libraries are imported, and how it joins the others."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from mixfuse.contracts.errors import MixfuseError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

LAUNCHED = "WORLD_SIZE"  # a launcher (torchrun, deepspeed) has started this process
PORTS = "MIXFUSE_PORTS"
"""The first of two ports on rank 0's machine: the store of the process group, and the one after it for the heartbeat.

Unset, the launcher chooses the first and the kernel the second."""
# Long contexts and gathered blocks come and go in many sizes: fixed segments would leave memory that fits none of them.
GPU_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return LAUNCHED in os.environ


def world_size(default: int) -> int:
    """The number of processes of the run; `default` if no launcher has started this process."""
    return int(os.environ.get(LAUNCHED, default))


def local_world_size() -> int:
    """The number of processes on this machine, 1 without a launcher; torchrun and deepspeed name it differently."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size(1))


def local_rank() -> int:
    """The number of this process on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def cores() -> int:
    """The cores that this process may use: Slurm and containers often give a process fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def threads(count: int | None, processes: int) -> int:
    """CPU threads for each of a machine's processes."""
    return count or max(1, cores() // processes)


def ports() -> tuple[int, int] | None:
    """The ports that the user chose for the store and for the heartbeat (`PORTS`), or None.

    Raises:
        MixfuseError: The variable is no port with another after it.
    """
    text = os.environ.get(PORTS)
    if text is None:
        return None
    if not text.isdecimal() or not 0 < int(text) < 65535:
        raise MixfuseError(f"{PORTS} is {text!r}; it must be the first of two ports, 1 to 65534")
    return int(text), int(text) + 1


def device() -> "torch.device":
    """The device of this process: the GPU that has its `LOCAL_RANK`, or the CPU."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def bind_device() -> "torch.device":
    """Makes this process's GPU the one that "cuda" means, and returns the device.

    It must come before the process group: NCCL binds a group to the current device, and until it is set that is GPU 0
    for every process of a machine.

    Raises:
        MixfuseError: This process has no GPU of its own.
    """
    import torch

    mine = device()
    if mine.type == "cuda":
        if mine.index >= torch.cuda.device_count():
            raise MixfuseError(
                f"process {mine.index} of this machine needs GPU {mine.index}, but there are "
                f"{torch.cuda.device_count()}; start at most one process a GPU, and let each see all of the job's GPUs "
                "(CUDA_VISIBLE_DEVICES; for Slurm --gpus-per-node, not --gpus-per-task)"
            )
        torch.cuda.set_device(mine)
    return mine


def prepare(recipe_threads: int | None, *, wandb: str, timeout_minutes: int) -> None:
    """Prepares this process for training and joins it with the others.

    Args:
        recipe_threads: CPU threads; by default the cores divided by the machine's processes.
        wandb: Weights & Biases' mode.
        timeout_minutes: How long a collective waits for a process, in every group that the run makes.

    Raises:
        MixfuseError: This process has no GPU of its own, or `PORTS` names none that can be used.
    """
    count = set_environment(recipe_threads, wandb=wandb)
    store_port = choose_store_port()
    import torch

    mine = bind_device()
    if mine.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(count)
    import deepspeed

    # An op for inference only. DeepSpeed compiles it when distributed starts, and fails without ninja and a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Before the model is loaded: ZeRO-3's partitioned loading takes the world size from the process group. accelerate
    # and TRL find the group made, so no later time-out counts.
    limit = timedelta(minutes=timeout_minutes)
    _limit_later_groups(limit)
    with opening(store_port):
        deepspeed.init_distributed(dist_backend="gloo" if mine.type == "cpu" else "nccl", timeout=limit, verbose=False)


def set_environment(recipe_threads: int | None, *, wandb: str) -> int:
    """Sets what libraries read when they are imported; returns the number of CPU threads.

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
    # accelerate warns that its own count of micro batches is not DeepSpeed's, to which Trainer leaves it.
    logging.getLogger("accelerate.accelerator").addFilter(_is_no_mismatch)
    allocate_in_segments()
    return count


def _is_no_mismatch(record: logging.LogRecord) -> bool:
    return "Gradient accumulation steps mismatch" not in record.getMessage()


def choose_store_port() -> int:
    """Makes the process group's store listen where the user chose, and returns that port, or 0.

    A launcher has a store at a port that nobody chose; with `PORTS`, rank 0 opens another.
    """
    chosen = ports()
    if chosen is None:
        return 0
    os.environ |= {"MASTER_PORT": str(chosen[0]), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return chosen[0]


@contextmanager
def opening(port: int) -> Iterator[None]:
    """Turns a chosen port that cannot be opened or reached into one line.

    Raises:
        MixfuseError: In place of torch's error, where the user chose the port.
    """
    from torch.distributed import DistNetworkError

    try:
        yield
    except DistNetworkError as error:
        if not port:
            raise
        raise MixfuseError(
            f"port {port}, which {PORTS} names, cannot be used on {os.environ['MASTER_ADDR']}: "
            f"{str(error).splitlines()[0][:200]}; choose other ports, or open these between the machines"
        ) from None


def allocate_in_segments() -> None:
    """Sets CUDA's allocator, which reads the variable when the first tensor is made; a user's own setting stays."""
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer name of the same variable
        os.environ.setdefault(*GPU_ALLOCATOR)


def _limit_later_groups(limit: timedelta) -> None:
    """Sets the time-out of groups made later: DeepSpeed names none for its own, such as those of hpZ."""
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_timeout = limit
    distributed_c10d.default_pg_nccl_timeout = limit


def say_once(text: str) -> None:
    """Prints on process 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def agree(value: T) -> T:
    """Rank 0's value, on every rank. For a moment, a shared folder may look different on another machine."""
    from torch import distributed

    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]
