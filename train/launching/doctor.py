"""`mixfuse doctor`: checks each machine and the network between them, before a run hangs because of either.

Alone it checks this machine. Under a launcher (`mixfuse launch … doctor`) every process checks its own, the machines
are compared, and a real all-reduce goes over the network that training will use. Each check is one line, and a failed
one says how to fix it.
"""

import json
import os
import platform
import resource
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import read_json, sha256_file
from mixfuse.contracts.strict_yaml import load
from mixfuse.train.data.data_files import files_of
from mixfuse.train.processes import worker
from mixfuse.train.processes.checkpoint import KEEP
from mixfuse.train.recipe import TrainRecipe, kind_of, lora_parameters

STACK = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "deepspeed", "mixfuse")
GIB = 1 << 30
JOIN_SECONDS = 120  # how long to wait for the other processes
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - NCCL uses this path
PROBE_BYTES = 64 << 20  # size of the all-reduce
MASKED_TOKENS = 8192  # from here on, a mask over all pairs of a row's tokens has more than 64 MiB at one byte each
# Bytes of a trainable parameter in a checkpoint beside the optimizer's state: the float32 master, the adapter itself.
CHECKPOINT_BYTES = 8

Status = Literal["ok", "note", "FAIL"]


class Check(NamedTuple):
    """The result of one check.

    Attributes:
        name: What was checked.
        status: `note` is worth reading but not a failure.
        found: The finding. The name is a key of `--json`.
        mend: How to fix a failure.
    """

    name: str
    status: Status
    found: str
    mend: str = ""


class Machine(NamedTuple):
    """What one process sees of its machine; compared between machines.

    Attributes:
        host: The machine's name.
        rank: The rank of the process.
        versions: Versions of the libraries in `STACK`, of Python, and of CUDA and NCCL.
        gpus: Names of the GPUs.
        gpu_memory: Bytes of the smallest GPU, 0 without one.
        driver: Version of NVIDIA's driver, or an empty string.
        memory: Bytes of main memory available now.
        infiniband: Number of active InfiniBand ports.
    """

    host: str
    rank: int
    versions: dict[str, str]
    gpus: list[str]
    gpu_memory: int
    driver: str
    memory: int
    infiniband: int


def examine_machines(recipe_path: Path | None, overrides: Sequence[str], *, nodes: int | None, as_json: bool) -> int:
    """Runs `mixfuse doctor`.

    Args:
        recipe_path: A training recipe; its base, `out` and processes are checked, too.
        overrides: `key=value` strings.
        nodes: The expected number of machines.
        as_json: Print one JSON object instead of a line for each check.

    Returns:
        0, or 1 if a check failed; only rank 0 prints and fails.

    Raises:
        MixfuseError: The recipe is bad, or the other processes cannot be reached.
    """
    recipe = load(recipe_path, kind_of(recipe_path, list(overrides)), overrides) if recipe_path else None
    worker.bind_device()
    with _joined() as (rank, world):
        machines = _gather(inspect_machine(rank))
        # The first process of a machine looks at all of its GPUs. If each did, their own contexts would fill the GPUs.
        checks = _gather(local_checks(recipe) if worker.local_rank() == 0 else [])
        shared = [*_compared(machines, nodes), *_same_files(recipe, rank, world), *_network(rank, world)]
    if rank:
        return 0
    lines = [*_by_host(machines, checks), *shared]
    failed = [check for check in lines if check.status == "FAIL"]
    if as_json:
        hosts = [entry._asdict() for entry in _by_hostname(machines)]
        print(json.dumps({"ok": not failed, "machines": hosts, "checks": [check._asdict() for check in lines]}))
    else:
        width = max(len(check.name) for check in lines)
        for check in lines:
            fix = f"; {check.mend}" if check.mend and check.status != "ok" else ""
            print(f"{check.status:4}  {check.name:{width}}  {check.found}{fix}")
        print(f"{len(failed)} of {len(lines)} checks failed" if failed else "all is well")
    return 1 if failed else 0


@contextmanager
def _joined() -> Iterator[tuple[int, int]]:
    """Joins the processes of a launcher; yields rank and world size, (0, 1) without a launcher.

    Raises:
        MixfuseError: The other processes cannot be reached.
    """
    if not worker.launched():
        yield 0, 1
        return
    from torch import distributed

    worker.choose_store_port()
    try:
        # gloo even with GPUs, because the compared values are in main memory. `_network` tests NCCL.
        distributed.init_process_group("gloo", timeout=timedelta(seconds=JOIN_SECONDS))
        distributed.monitored_barrier()
    except (RuntimeError, ValueError) as error:
        raise MixfuseError(
            f"rank {os.environ['RANK']} on {socket.gethostname()} cannot join the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}; check that the "
            "machines reach each other (firewall, host names) and choose the interface: GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME"
        ) from None
    try:
        yield distributed.get_rank(), distributed.get_world_size()
    finally:
        distributed.destroy_process_group()


def _gather(value: Any) -> list[Any]:
    """The values of all ranks, in the order of ranks."""
    from torch import distributed

    if not worker.launched():
        return [value]
    box: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(box, value)
    return box


def _cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def inspect_machine(rank: int) -> Machine:
    """Collects what there is to know about this machine."""
    import torch

    versions = {"python": platform.python_version()}
    for name in STACK:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    count = torch.cuda.device_count() if _cuda() else 0
    if count:
        versions["cuda"] = str(torch.version.cuda)
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return Machine(
        host=socket.gethostname(),
        rank=rank,
        versions=versions,
        gpus=[torch.cuda.get_device_name(index) for index in range(count)],
        gpu_memory=min((torch.cuda.get_device_properties(index).total_memory for index in range(count)), default=0),
        driver=_smi("driver_version") if count else "",
        memory=_available_memory(),
        infiniband=sum(
            "ACTIVE" in state.read_text() for state in Path("/sys/class/infiniband").glob("*/ports/*/state")
        ),
    )


def _smi(field: str) -> str:
    """A field of nvidia-smi for the first GPU, or an empty string."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def _available_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def local_checks(recipe: TrainRecipe | None) -> list[Check]:
    """The checks that need no other process; the same on every process of a machine."""
    checks = [_stack(), *_gpus(), *_attention(recipe), _memory(recipe), _files()]
    if recipe is not None:
        checks += [_base(recipe), _data(recipe), _deepspeed(recipe), _disk(recipe)]
    return checks


def _stack() -> Check:
    try:
        import deepspeed
        import peft
        import transformers
        import trl
    except Exception as error:
        return Check("stack", "FAIL", f"does not import: {type(error).__name__}: {error}", "run scripts/setup again")
    names = [f"{module.__name__} {module.__version__}" for module in (transformers, peft, trl, deepspeed)]
    return Check("stack", "ok", ", ".join(names))


def _gpus() -> list[Check]:
    import torch

    if not _cuda():
        if Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi"):
            return [
                Check(
                    "GPU",
                    "FAIL",
                    f"an NVIDIA driver is installed, but torch {torch.__version__} sees no GPU",
                    "install the CUDA build (scripts/setup --gpu), check CUDA_VISIBLE_DEVICES and nvidia-smi",
                )
            ]
        return [Check("GPU", "note", "no GPU: CPU run")]
    checks = []
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    checks.append(Check("GPU", "ok", f"{count} x {', '.join(names)}, driver {_smi('driver_version') or 'unknown'}"))
    local = worker.local_world_size() if worker.launched() else 1
    if local > count:
        checks.append(Check("processes", "FAIL", f"{local} on {count} GPUs", "start one a GPU: --processes"))
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        if free < 0.9 * total:
            checks.append(
                Check(
                    f"GPU {index} memory",
                    "FAIL",
                    f"{free / GIB:.0f} of {total / GIB:.0f} GiB free",
                    "another process uses it: nvidia-smi names it",
                )
            )
    no_access = [
        f"{a}-{b}" for a in range(count) for b in range(a + 1, count) if not torch.cuda.can_device_access_peer(a, b)
    ]
    if count > 1:
        words = "all GPUs reach one another"
        if no_access:
            words = f"no peer access between GPUs {', '.join(no_access)}"
        checks.append(Check("peer access", "note" if no_access else "ok", words))
    shared = shutil.disk_usage(SHARED_MEMORY).total
    if count > 1 and shared < GIB:
        checks.append(
            Check(
                "shared memory",
                "FAIL",
                f"{SHARED_MEMORY} has {shared / GIB:.2f} GiB, NCCL needs 1",
                "start the container with --shm-size=16g or --ipc=host",
            )
        )
    return checks


def _attention(recipe: TrainRecipe | None) -> list[Check]:
    """Which attention implementation a run would take; without a recipe, a packed one in bfloat16 on a GPU."""
    import torch

    try:
        from mixfuse.train.model import attention
    except ImportError:
        return []  # the check of the stack says why
    if recipe is None:
        choice = attention.fastest(torch.bfloat16, packing=True)
        return [Check("attention", "ok", f"auto takes {choice.name} for packed chats: {choice.why}")] if _cuda() else []
    try:
        config = read_json(recipe.base / "config.json")
    except MixfuseError:
        return []  # the check of the base says why
    packing = getattr(recipe, "packing", False)
    try:
        choice = attention.choose(
            recipe.attention,
            SimpleNamespace(**config),
            getattr(torch, recipe.dtype),
            packing=packing,
            sequences=recipe.parallel.sequences,
        )
    except MixfuseError as error:
        return [Check("attention", "FAIL", str(error), "correct `attention` in the recipe")]
    if choice.name == "sdpa" and packing and recipe.max_length > MASKED_TOKENS:
        found = f"sdpa makes a mask of {recipe.max_length}² tokens in each layer"
        return [Check("attention", "note", found, "attention: auto takes a kernel without one where there is one")]
    return [Check("attention", "ok", f"{choice.name}: {choice.why}")]


def _memory(recipe: TrainRecipe | None) -> Check:
    import psutil

    total, available = psutil.virtual_memory().total, _available_memory()
    found = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available, {worker.cores()} cores"
    if recipe is not None and not _cuda():
        # On a CPU the base is in main memory, divided among the machines; with one machine, all of it.
        need = sum(file.stat().st_size for file in recipe.base.glob("*.safetensors"))
        if need > available:
            return Check(
                "memory",
                "FAIL",
                f"{found}; the base alone has {need / GIB:.1f} GiB",
                "use more machines, or a smaller base",
            )
    return Check("memory", "ok", found)


def _files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        return Check("open files", "FAIL", f"at most {soft}", f"ulimit -n {min(hard, 65536)}")
    return Check("open files", "ok", f"at most {soft}")


def _base(recipe: TrainRecipe) -> Check:
    if not (recipe.base / "config.json").is_file():
        return Check(
            "base",
            "FAIL",
            f"{recipe.base} is not a model folder on this machine",
            "copy it here, or mount the shared path",
        )
    try:
        lora_parameters(read_json(recipe.base / "config.json"), recipe.lora)
    except MixfuseError as error:
        return Check("base", "FAIL", f"{recipe.base}: {error}", "name another base, or correct the recipe")
    size = sum(file.stat().st_size for file in recipe.base.glob("*.safetensors"))
    if not size:
        return Check("base", "FAIL", f"{recipe.base} holds no .safetensors", "download the weights as safetensors")
    return Check("base", "ok", f"{recipe.base}, {size / GIB:.2f} GiB of weights")


def _data(recipe: TrainRecipe) -> Check:
    """Whether each file of the recipe's data is there, can be opened and holds something; none is read whole."""
    held_out = recipe.evaluation.data or () if recipe.evaluation is not None else ()
    files: list[Path] = []
    problems, size = [], 0
    for source in (*recipe.data, *held_out):
        try:
            files += files_of(source.path) if source.path is not None else []
        except MixfuseError as error:
            problems.append(str(error))
    for file in dict.fromkeys(files):
        try:
            with file.open("rb") as stream:
                size += os.fstat(stream.fileno()).st_size
                if not stream.read(1):
                    problems.append(f"{file} is empty")
        except OSError as error:
            problems.append(f"{file}: {(error.strerror or str(error)).lower()}")
    if problems:
        return Check("data", "FAIL", "; ".join(problems), "make the file, or correct its path in the recipe")
    hub = sum(source.path is None for source in (*recipe.data, *held_out))
    found = [f"{len(dict.fromkeys(files))} files, {size / (1 << 20):.1f} MiB"] if files else []
    found += [f"{hub} data sets on the Hub, which are not checked"] if hub else []
    return Check("data", "ok", "; ".join(found))


def _deepspeed(recipe: TrainRecipe) -> Check:
    try:
        read_json(recipe.deepspeed)
    except MixfuseError as error:
        return Check("deepspeed", "FAIL", str(error), "correct the path of `deepspeed` in the recipe, or the file")
    return Check("deepspeed", "ok", str(recipe.deepspeed))


def _disk(recipe: TrainRecipe) -> Check:
    folder = next(folder for folder in (recipe.out, *recipe.out.absolute().parents) if folder.is_dir())
    probe = folder / f".mixfuse-doctor-{secrets.token_hex(8)}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        return Check("disk", "FAIL", f"{folder} cannot be written: {error.strerror}", "choose another `out`")
    free = shutil.disk_usage(folder).free
    need = (KEEP + 1) * (CHECKPOINT_BYTES + recipe.optimizer.entry.state_bytes) * _trainable(recipe)
    found = f"{free / GIB:.1f} GiB free at {folder}; checkpoints take up to {need / GIB:.2f}"
    return Check("disk", "ok" if free > need else "FAIL", found, "free some space, or choose another `out`")


def _trainable(recipe: TrainRecipe) -> int:
    """The number of trainable parameters; 0 if the base is not on this machine, or does not fit the recipe."""
    try:
        parameters = lora_parameters(read_json(recipe.base / "config.json"), recipe.lora)
    except MixfuseError:
        return 0  # the check of the base says why
    return sum(layer.attention + layer.experts for layer in parameters)


def _by_hostname(machines: list[Machine]) -> list[Machine]:
    """The first rank's entry of each host."""
    return list({entry.host: entry for entry in reversed(machines)}.values())[::-1]


def _by_host(machines: list[Machine], checks: list[list[Check]]) -> list[Check]:
    """Each machine's checks once; with several machines, the host's name in front."""
    hosts = _by_hostname(machines)
    lines: list[Check] = []
    for entry in hosts:
        front = f"{entry.host}: " if len(hosts) > 1 else ""
        lines += [check._replace(name=front + check.name) for check in checks[entry.rank]]
    return lines


def _compared(machines: list[Machine], nodes: int | None) -> list[Check]:
    """Checks that the machines are alike, and as many as expected."""
    hosts = _by_hostname(machines)
    checks = []
    if nodes is not None:
        fits = len(hosts) == nodes
        found = f"{len(hosts)} of {nodes}: {', '.join(entry.host for entry in hosts)}"
        checks.append(
            Check("machines", "ok" if fits else "FAIL", found, "start doctor with the launcher, on every machine")
        )
    if len(hosts) == 1:
        return checks
    first = hosts[0]
    read: dict[str, Callable[[Machine], Any]] = {
        **{f"{name} version": lambda entry, name=name: entry.versions.get(name) for name in first.versions},  # type: ignore[misc]
        "GPUs": lambda entry: entry.gpus,
        "driver": lambda entry: entry.driver,
    }
    differing = 0
    for name, value_of in read.items():
        values = {entry.host: value_of(entry) for entry in hosts}
        other = next((host for host, value in values.items() if value != values[first.host]), None)
        if other is not None:
            differing += 1
            found = f"{values[first.host]} on {first.host}, {values[other]} on {other}"
            checks.append(Check(name, "FAIL", found, "make the machines alike: scripts/setup on each"))
    if not differing:
        checks.append(Check("machines alike", "ok", f"{len(hosts)} with the same stack, GPUs and driver"))
    if first.gpus and not all(entry.infiniband for entry in hosts):
        without = next(entry.host for entry in hosts if not entry.infiniband)
        checks.append(
            Check("interconnect", "note", f"no active InfiniBand port on {without}: gathers go over Ethernet")
        )
    return checks


def _same_files(recipe: TrainRecipe | None, rank: int, world: int) -> list[Check]:
    """Checks that all processes see the same `out` and the same base."""
    if recipe is None or world == 1:
        return []
    checks = []
    token = f".mixfuse-doctor-{worker.agree(secrets.token_hex(8))}"
    folder = worker.agree(next(str(f) for f in (recipe.out, *recipe.out.absolute().parents) if f.is_dir()))
    file = Path(folder) / token
    if rank == 0:
        file.touch()
    _gather(None)
    failing = _failing_hosts(file.exists)
    if rank == 0:
        file.unlink()
    fix = "training needs one path that all machines share: put `out` on it"
    checks.append(_shared("shared out", folder, failing, fix))
    digest = worker.agree(_digest(recipe.base))
    failing = _failing_hosts(lambda: _digest(recipe.base) == digest)
    checks.append(
        _shared("same base", str(recipe.base), failing, "copy the same weights everywhere, or share the path")
    )
    return checks


def _failing_hosts(test: Callable[[], bool]) -> list[str]:
    """The hosts on which a test fails on some process."""
    results = _gather((socket.gethostname(), test()))
    return sorted({host for host, passed in results if not passed})


def _shared(name: str, path: str, failing: list[str], fix: str) -> Check:
    if failing:
        return Check(name, "FAIL", f"{path} is not the same on {', '.join(failing)}", fix)
    return Check(name, "ok", f"every process sees {path}")


def _digest(base: Path) -> str:
    """A digest of the config and of the weights' names and sizes: enough to tell models, or half a copy, apart."""
    config = base / "config.json"
    sizes = [(file.name, file.stat().st_size) for file in sorted(base.glob("*.safetensors"))]
    return f"{sha256_file(config) if config.is_file() else None} {sizes}"


def _network(rank: int, world: int) -> list[Check]:
    """Runs, checks and times an all-reduce over all processes, on the GPUs if there are any."""
    if world == 1:
        return [Check("network", "note", "one process, so nothing to test; `mixfuse launch` tests it")]
    import torch
    from torch import distributed

    device = worker.device()
    name = "NCCL all-reduce" if device.type == "cuda" else "gloo all-reduce"
    fix = "see NCCL_DEBUG=INFO; choose the interface: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME"
    seconds = []
    try:
        group = distributed.new_group(backend="nccl" if device.type == "cuda" else "gloo")
        for _ in range(3):
            values = torch.full((PROBE_BYTES // 4,), float(rank + 1), device=device)
            began = time.monotonic()
            distributed.all_reduce(values, group=group)
            right = bool((values == world * (world + 1) / 2).all())  # waits for the device, too
            seconds.append(time.monotonic() - began)
    except RuntimeError as error:
        return [Check(name, "FAIL", str(error).splitlines()[0], fix)]
    if _failing_hosts(lambda: right):
        return [Check(name, "FAIL", "the sum is wrong on some rank", "a GPU or its link is broken: dcgmi diag -r 3")]
    moved = 2 * (world - 1) / world * PROBE_BYTES / min(seconds)  # bus bandwidth, as nccl-tests count it
    return [Check(name, "ok", f"{world} processes, {PROBE_BYTES >> 20} MiB at {moved / 1e9:.2f} GB/s (bus)")]
