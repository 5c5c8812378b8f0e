"""A machine with GPUs where there is none: the one place in which tests fake CUDA.

    python tests/train/fake_cuda.py FACTS mixfuse-arguments …

runs a mixfuse command as one rank of a launcher. torch says that there are `FAKE_GPUS` GPUs. Tensors meant for one are
made on the CPU, and carry the number of the GPU as a mark, which results of operations on them inherit. Groups of
NCCL are gloo's. DeepSpeed runs its own CPU code. What is seen is written to FACTS:

- `devices`: the GPUs that tensors were meant for; a bare "cuda" is the current one, which is 0 until it is set;
- `groups`: for each process group its backend, the current GPU when it was made, and its time-out in seconds;
- `collectives`: for each collective that our own code starts on a group of NCCL, the GPU that its tensor is on (None:
  it is on the CPU), or for one without a tensor the current GPU.

Not a test: the tests read what it found.
"""

import atexit
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed
from torch.overrides import TorchFunctionMode

GPUS = int(os.environ.get("FAKE_GPUS", "2"))
PROJECT = str(Path(__file__).parents[2])
FACTS: dict[str, list[Any]] = {"devices": [], "groups": [], "collectives": []}
BACKENDS: dict[Any, str] = {}
CURRENT = [0]


def note(kind: str, fact: Any) -> None:
    if fact not in FACTS[kind]:
        FACTS[kind].append(fact)


def set_device(device: Any) -> None:
    CURRENT[0] = number(device) if isinstance(device, torch.device | str) else int(device)
    assert 0 <= CURRENT[0] < GPUS, f"invalid device ordinal {CURRENT[0]}"


def number(device: Any) -> int:
    index = torch.device(device).index
    return CURRENT[0] if index is None else index


def fake_cuda() -> None:
    """Makes torch say that there are GPUs."""
    answers: dict[str, Any] = {
        "is_available": True, "device_count": GPUS, "is_initialized": True, "get_device_capability": (9, 0),
        "get_device_name": "Fake GPU", "mem_get_info": (80 << 30, 80 << 30), "can_device_access_peer": True,
        "is_bf16_supported": True, "synchronize": None, "empty_cache": None, "memory_allocated": 0, "ipc_collect": None,
        "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0, "reset_peak_memory_stats": None,
        "manual_seed": None, "manual_seed_all": None, "get_rng_state_all": [], "set_rng_state_all": None,
        "get_device_properties": SimpleNamespace(total_memory=80 << 30, name="Fake GPU", major=9, minor=0),
    }  # fmt: skip
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda.set_device = set_device
    torch.cuda.current_device = lambda: CURRENT[0]
    torch.cuda.get_rng_state = lambda device="cuda": (note("devices", number(device)), torch.get_rng_state())[1]
    torch.cuda.set_rng_state = lambda *_: None
    torch.cuda.nccl.version = lambda: (2, 27, 0)
    torch.cuda.random.get_rng_state_all, torch.cuda.random.set_rng_state_all = list, lambda *_: None
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]


class OnGpus(TorchFunctionMode):
    """Makes tensors on the CPU that are meant for a GPU, and marks them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        meant = [number(value) for value in (*args, *kwargs.values()) if on_gpu(value)]
        args = tuple(torch.device("cpu") if on_gpu(value) else value for value in args)
        kwargs = {name: torch.device("cpu") if on_gpu(value) else value for name, value in kwargs.items()}
        if getattr(func, "__name__", "") == "cuda":
            meant, func, args = [number(args[1]) if len(args) > 1 else CURRENT[0]], torch.Tensor.to, (args[0], "cpu")
        for gpu in meant:
            if gpu != int(os.environ["LOCAL_RANK"]):
                FACTS["devices"].append({"gpu": gpu, "by": callers()})
            note("devices", gpu)
        marks = meant or [tensor.gpu for tensor in tensors((args, kwargs)) if hasattr(tensor, "gpu")]
        # NCCL's collectives are no part of a gradient; gloo's all-gather makes views that would be.
        by_nccl = str(getattr(func, "__module__", "")).startswith("torch.distributed")
        with torch.no_grad() if by_nccl else nullcontext():
            result = func(*args, **kwargs)
        moved_away = getattr(func, "__name__", "") in ("cpu", "numpy", "tolist", "item")
        if marks and not moved_away:
            for tensor in tensors(result):
                tensor.gpu = marks[0]
        return result


def on_gpu(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.startswith("cuda")
    )


def tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def callers() -> list[str]:
    """Where our own code is, the innermost call first."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PROJECT) and "site-packages" not in path and path != __file__:
            found.append(f"{Path(path).name}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return found


def fake_nccl() -> None:
    """Makes groups of NCCL out of gloo's, and looks at every group and at our own collectives."""

    def wrap(name: str, around: Callable[..., Any]) -> None:
        inner = getattr(distributed, name)
        for module in (distributed, distributed.distributed_c10d):
            setattr(module, name, lambda *args, **kwargs: around(inner, *args, **kwargs))

    def group_made(inner: Any, *args: Any, **kwargs: Any) -> Any:
        is_first = inner.__name__ == "init_process_group"
        asked = (args[0] if args and is_first else kwargs.get("backend")) or BACKENDS[None]
        kwargs.pop("device_id", None)
        args = () if is_first else args
        made = inner(*args, **{**kwargs, "backend": "gloo"})
        BACKENDS[made] = asked
        group = distributed.group.WORLD if is_first else made
        timeout = group._get_backend(torch.device("cpu")).options._timeout.total_seconds() if group else None
        FACTS["groups"].append({"backend": asked, "gpu": CURRENT[0], "timeout": timeout})
        return made

    def collective(inner: Any, *args: Any, **kwargs: Any) -> Any:
        direct = sys._getframe(2).f_code.co_filename
        group = kwargs.get("group")
        ours = direct.startswith(PROJECT) and "site-packages" not in direct and direct != __file__
        if ours and BACKENDS[group] == "nccl":
            found = [getattr(tensor, "gpu", None) for tensor in tensors(list(args))]
            note("collectives", {"name": inner.__name__, "by": callers()[0], "gpu": found[0] if found else CURRENT[0]})
        return inner(*args, **kwargs)

    for name in ("init_process_group", "new_group"):
        wrap(name, group_made)
    for name in ("all_reduce", "broadcast", "barrier", "broadcast_object_list", "all_gather_object"):
        wrap(name, collective)


def main() -> None:
    facts = Path(sys.argv.pop(1))
    os.environ["DS_ACCELERATOR"] = "cpu"
    atexit.register(lambda: facts.write_text(json.dumps(FACTS)))
    fake_cuda()
    fake_nccl()
    from mixfuse.cli.entry import main as mixfuse

    with OnGpus():
        sys.exit(mixfuse(sys.argv[1:]))


if __name__ == "__main__":
    main()
