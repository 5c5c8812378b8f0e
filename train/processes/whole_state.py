"""What a run has learned, whole: the adapter's float32 weights and its optimizer's state, for any number of processes.

DeepSpeed's own checkpoint has a part for each process and can be loaded by as many only. Its universal checkpoint must
be converted by hand, and reads the frozen base too. What LoRA trains is small enough to be gathered: with AdamW 12
bytes a parameter in process 0's memory. So each checkpoint also holds one safetensors file of it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixfuse.contracts.errors import MixfuseError

FILE = "trained_state.safetensors"
_WEIGHT = "weight"


def write(model: Any, checkpoint: Path, *, leads: bool) -> None:
    """Writes `CHECKPOINT/trained_state.safetensors`; every process takes part.

    Nothing is written where the optimizer's state is on NVMe: then only as many processes can resume.

    Args:
        model: The model under ZeRO-3, after DeepSpeed has taken it.
        checkpoint: The checkpoint's folder.
        leads: Whether this is process 0, which writes.
    """
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    optimizer = _zero3(model).optimizer
    if not optimizer.state:  # swapped out
        return
    states, scalars = _states(optimizer)
    for name, parameter in _trained(model):
        for key in (_WEIGHT, *states):
            full = (
                safe_get_full_fp32_param(parameter) if key == _WEIGHT else safe_get_full_optimizer_state(parameter, key)
            )
            if leads:
                tensors[f"{name}:{key}"] = full.detach().to("cpu", torch.float32, copy=True).contiguous()
    if leads:
        facts = {"states": states, "scalars": scalars, "rates": [group["lr"] for group in optimizer.param_groups]}
        save_file(tensors, checkpoint / FILE, metadata={"facts": json.dumps(facts)})


@contextmanager
def loading() -> Iterator[None]:
    """Within it, transformers' trainer resumes from this file instead of DeepSpeed's checkpoint.

    transformers 5.19 calls one function of its module for that, and has no hook.
    """
    from transformers import trainer

    original = trainer.deepspeed_load_checkpoint
    trainer.deepspeed_load_checkpoint = _load
    try:
        yield
    finally:
        trainer.deepspeed_load_checkpoint = original


def _load(engine: Any, checkpoint: str, load_module_strict: bool = True) -> None:
    """Loads the file into an engine with any number of processes; every process takes part.

    Raises:
        MixfuseError: The file's tensors are not those of the run.
    """
    import deepspeed
    import torch
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state
    from safetensors import safe_open

    path = Path(checkpoint) / FILE
    rank, trained = torch.distributed.get_rank(), dict(_trained(engine.module))
    zero3 = _zero3(engine.module)
    with safe_open(str(path), framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        keys = (_WEIGHT, *facts["states"])
        wanted = {f"{name}:{key}" for name in trained for key in keys}
        if different := wanted.symmetric_difference(file.keys()):
            raise MixfuseError(
                f"{path} is not this run's: it differs in {min(different)}; remove the run to start over"
            )
        # The optimizer makes its state in its first step, which this run's was.
        for flat in zero3.fp32_partitioned_groups_flat:
            states = {key: torch.zeros_like(flat) for key in facts["states"]}
            zero3.optimizer.state[flat] = states | {
                key: torch.tensor(value) if is_tensor else value for key, (value, is_tensor) in facts["scalars"].items()
            }
        for name, parameter in trained.items():
            for key in keys:
                full = file.get_tensor(f"{name}:{key}")
                if tuple(full.shape) != tuple(parameter.ds_shape):
                    raise MixfuseError(f"{path}: {name} has shape {tuple(full.shape)}; the run's is another")
                # Partitions are equal in size, and the last one is padded.
                size = parameter.ds_tensor.numel()
                part = torch.zeros(size, dtype=torch.float32)
                mine = full.flatten()[rank * size : (rank + 1) * size]
                part[: mine.numel()] = mine
                if key == _WEIGHT:
                    safe_set_local_fp32_param(parameter, part)
                    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                        parameter.data.copy_(full)
                else:
                    safe_set_local_optimizer_state(parameter, part, key)
    for group, rate in zip(zero3.optimizer.param_groups, facts["rates"], strict=True):
        group["lr"] = rate


def _trained(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _zero3(model: Any) -> Any:
    """DeepSpeed's optimizer, which wraps the recipe's, found from a parameter of it."""
    _, parameter = next(iter(_trained(model)))
    return parameter._z3_optimizer


def _states(optimizer: Any) -> tuple[list[str], dict[str, tuple[float, bool]]]:
    """The names of the optimizer's states for each parameter; its scalars, and whether each is a tensor."""
    import torch

    partition, state = next(iter(optimizer.state.items()))
    keys = [key for key, value in state.items() if torch.is_tensor(value) and value.numel() == partition.numel() > 1]
    scalars = {key: (float(value), torch.is_tensor(value)) for key, value in state.items() if key not in keys}
    return sorted(keys), scalars
