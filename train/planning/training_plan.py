"""Plan before you pay: what one training step of a recipe takes, on each GPU and each host, before anything is loaded.

The formulas are in `memory.py`, the gathers are DeepSpeed's own rules replayed (`zero3_gathers.py`), and every figure
is explained in `docs/planning.md`. Nothing is downloaded and no weight is read: the model exists on the meta device
only, where its parameters are counted beside the formula's.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import shape_of
from mixfuse.contracts.family import Shape, active_parameters, base_parameters
from mixfuse.contracts.files import read_json
from mixfuse.train.planning import memory
from mixfuse.train.planning.memory import FP32, Batch, Moment
from mixfuse.train.planning.zero3_gathers import Gathered, Parameter, Thresholds, replay
from mixfuse.train.recipe import JudgeRecipe, TrainRecipe, lora_parameters

PAIR = 2  # DPO runs chosen and rejected in one batch
MODEL_FOLDER = "model"  # beside a recipe: the architecture that stands in for a base that is not on this disk


class Hardware(NamedTuple):
    """What there is to train on.

    Attributes:
        nodes: Hosts.
        gpus: GPUs a host; without a GPU, processes a host.
        gpu_bytes: Memory of one GPU.
        host_bytes: Memory of one host, or None where it is not to be checked.
        reserve_bytes: What is kept free on each GPU for what no formula covers: CUDA context, NCCL's buffers, cuBLAS
            workspaces, fragmentation.
        cuda: Whether kernels are CUDA's; torch's own on a CPU take more room for the output layer.
    """

    nodes: int
    gpus: int
    gpu_bytes: int
    host_bytes: int | None = None
    reserve_bytes: int = 0
    cuda: bool = True

    @property
    def world(self) -> int:
        """N, the number of processes."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Zero3:
    """What DeepSpeed's JSON says of memory.

    Attributes:
        thresholds: In elements, `auto` filled in as transformers does (`trainer_config_finalize`).
        reduce_bucket: `reduce_bucket_size`, elements.
        contiguous: `contiguous_gradients`: the bucket is allocated.
        offload_parameters: Where partitions lie: "none", "cpu" or "nvme".
        offload_optimizer: Where master weights, Adam's state and gradients lie.
        nvme_buffers: Elements of the host's staging buffers for parameters on NVMe.
        secondary: Processes that share a second partition (hpZ, `zero_hpz_partition_size`); 1 for none.
    """

    thresholds: Thresholds
    reduce_bucket: int
    contiguous: bool
    offload_parameters: str
    offload_optimizer: str
    nvme_buffers: int
    nvme_buffer: int
    secondary: int

    @classmethod
    def of(cls, config: Mapping[str, Any], hidden: int) -> "Zero3":
        """Reads DeepSpeed's JSON; what it leaves out has DeepSpeed 0.19.8's defaults (`runtime/zero/config.py`)."""
        zero = config.get("zero_optimization", {})

        def value(key: str, automatic: int, default: int) -> int:
            given = zero.get(key, default)
            return automatic if given == "auto" else int(given)

        parameters = zero.get("offload_param") or {}
        optimizer = zero.get("offload_optimizer") or {}
        return cls(
            thresholds=Thresholds(
                prefetch=value("stage3_prefetch_bucket_size", int(0.9 * hidden * hidden), 50_000_000),
                persistence=value("stage3_param_persistence_threshold", 10 * hidden, 100_000),
                max_live=value("stage3_max_live_parameters", 1_000_000_000, 1_000_000_000),
                max_reuse=value("stage3_max_reuse_distance", 1_000_000_000, 1_000_000_000),
            ),
            reduce_bucket=value("reduce_bucket_size", hidden * hidden, 500_000_000),
            contiguous=bool(zero.get("contiguous_gradients", True)),
            offload_parameters=str(parameters.get("device") or "none"),
            offload_optimizer=str(optimizer.get("device") or "none"),
            nvme_buffers=int(parameters.get("buffer_count", 5)) * int(parameters.get("buffer_size", 100_000_000)),
            nvme_buffer=int(parameters.get("buffer_size", 100_000_000)),
            secondary=int(zero.get("zero_hpz_partition_size", 1)),
        )


@dataclass(frozen=True)
class Plan:
    """What one recipe takes on one kind of hardware; bytes unless a name says otherwise.

    Attributes:
        recipe: Where the recipe is.
        stage: "sft" or "judge".
        shape: The base's sizes.
        hardware: What it is planned for.
        base_parameters: Of the base.
        active_parameters: Of the base, for one token.
        trainable_parameters: Of the LoRA.
        held: Per GPU, by part: what is there throughout.
        peak: Per GPU: the largest moment.
        loading: Per GPU: while the base is loaded, before training begins.
        host: Per host, by part; `loading` is over before training begins.
        disk: Per host, on NVMe.
        gathered_numel: Elements that one process gathers in a micro step.
        batch: One forward pass.
        checkpointing: Whether activations are checkpointed.
        saved: Activations with and without checkpointing.
        problems: What does not fit, in words; empty where all does.
    """

    recipe: str
    stage: str
    shape: Shape
    hardware: Hardware
    base_parameters: int
    active_parameters: int
    trainable_parameters: int
    w: int
    held: dict[str, int]
    peak: Moment
    loading: int
    largest_gather: int
    host: dict[str, int]
    disk: int
    gathered_numel: int
    batch: Batch
    checkpointing: bool
    saved: dict[str, int]
    problems: tuple[str, ...]

    @property
    def gpu_total(self) -> int:
        """The most one GPU holds."""
        return sum(self.held.values()) + self.peak.total

    @property
    def host_total(self) -> int:
        """The most one host holds: loading is over when the optimiser is made."""
        later = self.host.get("optimizer", 0)
        lasting = sum(self.host.values()) - later - self.host["loading"]
        return lasting + max(later, self.host["loading"])

    @property
    def fits(self) -> bool:
        """Whether nothing stands against it."""
        return not self.problems

    def per_gpu(self) -> dict[str, int]:
        """By part, at the peak; the parts add up to `total`."""
        parts = {
            **self.held,
            "gathered": self.peak.gathered,
            "activations": self.peak.activations,
            "workspace": self.peak.workspace,
        }
        return {**parts, "total": sum(parts.values())}


def plan(
    recipe: TrainRecipe,
    config: Mapping[str, Any],
    zero3: Mapping[str, Any],
    hardware: Hardware,
    *,
    source: str = "",
    batch: Batch | None = None,
) -> Plan:
    """Plans one recipe.

    Args:
        recipe: The recipe.
        config: The base's `config.json`.
        zero3: DeepSpeed's JSON.
        hardware: What there is.
        source: The recipe's path, for the report.
        batch: One forward pass; by default the recipe's micro batch, every sequence as long as `max_length`.

    Raises:
        MixfuseError: The base is of no known family, or the batch does not divide over the processes.
    """
    shape, lora = shape_of(config), recipe.lora
    judge = isinstance(recipe, JudgeRecipe)
    w = 2 if recipe.dtype == "bfloat16" else 4
    world = hardware.world
    zero = Zero3.of(zero3, shape.H)
    sequences = recipe.optimizer.micro_batch * (PAIR if judge else 1)
    batch = batch or Batch(sequences, recipe.max_length)
    groups = memory.modules(shape, lora)
    parameters = memory.all_parameters(groups)
    order = memory.visits(groups, checkpointing=recipe.gradient_checkpointing)
    replayed = replay(order, zero.thresholds, world, recorded=not judge)
    layer = memory.layer_saved(shape, batch, w, lora, cuda=hardware.cuda)
    kept = shape.L * (memory.checkpoint_saved(shape, batch, w) if recipe.gradient_checkpointing else layer)
    aux_loss = getattr(recipe, "router_aux_loss_coef", 0) > 0
    frozen = sum(p.per_rank(world) for p in parameters if not p.trainable)
    trained = sum(p.per_rank(world) for p in parameters if p.trainable)
    small = sum(p.numel for p in parameters if p.numel <= zero.thresholds.persistence) if world > 1 else 0
    on_gpu = {
        "parameters": 0 if zero.offload_parameters != "none" else frozen * w,
        "persistent": small * w,
        "lora": 0 if zero.offload_parameters != "none" else trained * w,
        "secondary": 0 if zero.secondary == 1 else sum(-(-p.numel // zero.secondary) for p in parameters) * w,
    }
    states = {
        "master": trained * FP32,
        "optimizer": trained * recipe.optimizer.entry.state_bytes,
        "gradients": trained * w,
    }
    if zero.offload_optimizer == "none":
        on_gpu |= states
    on_gpu["buckets"] = zero.reduce_bucket * w if zero.contiguous else 0
    step = max(
        memory.moments(
            shape, batch, w, lora, replayed=replayed, checkpointing=recipe.gradient_checkpointing,
            cuda=hardware.cuda, aux_loss=aux_loss,
        ),
        key=lambda moment: moment.total,
    )  # fmt: skip
    update = Moment("optimizer step", 0, 0, 2 * trained * FP32)
    peak = max(step, update, key=lambda moment: moment.total)
    # `train/model/load.py` reads one tensor and gathers one module at a time.
    largest = max(shape.I, shape.V) * shape.H * w
    host, disk = _host(zero, hardware.gpus, partition=(frozen + trained) * w, states=states, loading=2 * largest)
    made = Plan(
        recipe=source,
        stage="judge" if judge else "sft",
        shape=shape,
        hardware=hardware,
        base_parameters=base_parameters(shape),
        active_parameters=active_parameters(shape),
        trainable_parameters=sum(sum(layer) for layer in lora_parameters(config, lora)),
        w=w,
        held=on_gpu,
        peak=peak,
        loading=frozen * w + max(3 * shape.E * shape.I, shape.V) * shape.H * w,
        largest_gather=max((gathered.fetching for gathered in replayed), default=0) * w,
        host=host,
        disk=disk,
        # DPO's reference passes forward once more; nothing is kept from one to the other.
        gathered_numel=gathered_numel(replayed) + (sum(p.numel for p in parameters) if judge and world > 1 else 0),
        batch=batch,
        checkpointing=recipe.gradient_checkpointing,
        saved={
            "kept": kept + memory.final_body(shape, batch, w),
            "with_checkpointing": shape.L * memory.checkpoint_saved(shape, batch, w) + layer,
            "without_checkpointing": shape.L * layer,
        },
        problems=(),
    )
    return replace(made, problems=tuple(_problems(made, recipe, zero, parameters)))


def gathered_numel(replayed: Sequence[Gathered]) -> int:
    """What one process receives in a micro step, its own share with it: every parameter as often as it is fetched."""
    return sum(gathered.arriving for gathered in replayed)


def _host(
    zero: Zero3, gpus: int, *, partition: int, states: Mapping[str, int], loading: int
) -> tuple[dict[str, int], int]:
    """What one host's memory and its NVMe hold, for all its processes.

    Args:
        zero: DeepSpeed's settings.
        gpus: Processes of the host.
        partition: Bytes of one process's partition of base and LoRA.
        states: Bytes of its master weights, Adam's state and gradients.
        loading: Bytes of the tensors of the checkpoint that its first process holds while it loads.
    """
    host: dict[str, int] = {}
    disk = 0
    if zero.offload_parameters == "cpu":
        host["parameters"] = partition * gpus
    elif zero.offload_parameters == "nvme":
        disk += partition * gpus
        host["nvme_buffers"] = zero.nvme_buffers * 2 * gpus
    if zero.offload_optimizer == "cpu":
        # The gradients twice: as they come in, and as the optimiser wants them.
        host["optimizer"] = (sum(states.values()) + states["gradients"]) * gpus
    elif zero.offload_optimizer == "nvme":
        disk += (states["master"] + states["optimizer"] + states["gradients"]) * gpus
        host["optimizer"] = states["gradients"] * gpus
    host["loading"] = loading
    return host, disk


def _problems(made: Plan, recipe: TrainRecipe, zero: Zero3, parameters: Sequence[Parameter]) -> Iterator[str]:
    hardware = made.hardware
    room = hardware.gpu_bytes - hardware.reserve_bytes
    if made.loading > room:
        yield f"loading takes {gib(made.loading)} of a GPU that has {gib(room)}"
    if made.gpu_total > room:
        yield (
            f"a GPU needs {gib(made.gpu_total)} and has {gib(room)} "
            f"({gib(hardware.gpu_bytes)} less {gib(hardware.reserve_bytes)} in reserve); the peak is: {made.peak.name}"
        )
    if hardware.host_bytes is not None and made.host_total > hardware.host_bytes:
        what = max(made.host, key=lambda key: made.host[key])
        yield f"a host needs {gib(made.host_total)} and has {gib(hardware.host_bytes)}; most of it: {what}"
    if zero.offload_parameters == "nvme":
        largest = max(p.per_rank(hardware.world) for p in parameters)
        if largest > zero.nvme_buffer:
            yield (
                f"offload_param.buffer_size {zero.nvme_buffer:.1e} is less than the largest partition's "
                f"{largest:.2e} elements"
            )
    step = recipe.optimizer.micro_batch * hardware.world
    if recipe.optimizer.batch_size % step:
        yield (
            f"optimizer.batch_size {recipe.optimizer.batch_size} is no multiple of "
            f"micro_batch * processes = {step}; set it to one"
        )


# ------------------------------------------------------------------------------------------------------------- time


class Speed(NamedTuple):
    """Tokens a second of all GPUs together, under assumptions that are stated with it.

    Attributes:
        flops_per_token: Of one trained token.
        compute: If only computing counted.
        gather: If only gathering parameters counted.
        tokens_per_second: Neither hidden behind the other.
    """

    flops_per_token: float
    compute: float
    gather: float
    tokens_per_second: float


def speed(made: Plan, *, tflops: float, utilisation: float, bandwidth: float) -> Speed:
    """Estimates throughput from FLOPs and from the bytes ZeRO-3 moves.

    A token's forward pass takes 2·(active parameters - embedding) + 2·S·A·D·L FLOPs (causal attention sees half of S on
    average). Backward through frozen weights is the gradient of the inputs only, as much again; checkpointing adds a
    forward pass, and so does DPO's reference.

    Args:
        made: The plan.
        tflops: A GPU's peak, in TFLOP/s.
        utilisation: The share of it that is assumed to be reached while computing.
        bandwidth: Bytes a second one GPU receives.
    """
    shape, world = made.shape, made.hardware.world
    matrices = 2 * (made.active_parameters - (0 if shape.tied else shape.V * shape.H))
    forward = matrices + 2 * made.batch.S * shape.A * shape.D * shape.L
    passes = 2 + made.checkpointing + (made.stage == "judge")
    compute = world * utilisation * tflops * 1e12 / (passes * forward)
    moved = made.gathered_numel * made.w * (world - 1) / world
    gather = world * made.batch.T * bandwidth / moved if moved else math.inf
    return Speed(passes * forward, compute, gather, 1 / (1 / compute + 1 / gather))


# ------------------------------------------------------------------------------------------------------------ advice


class Change(NamedTuple):
    """A change that was planned for, and what came of it.

    Attributes:
        change: What to write, or to bring.
        gpu_bytes: What a GPU would then hold.
        host_bytes: What a host would.
        fits: Whether all would fit.
    """

    change: str
    gpu_bytes: int
    host_bytes: int
    fits: bool


class _Setting(NamedTuple):
    recipe: TrainRecipe
    zero3: Mapping[str, Any]
    hardware: Hardware


def advise(
    recipe: TrainRecipe, config: Mapping[str, Any], zero3: Mapping[str, Any], hardware: Hardware
) -> list[Change]:
    """The first three changes that make it fit, cheapest first: single ones, then two together, then all that help.

    Every entry is a plan made anew with the change; where nothing fits, the one change that helps most is named.
    """
    start = _Setting(recipe, zero3, hardware)
    now = plan(recipe, config, zero3, hardware)
    singles = list(_variants(start))
    tried: list[Change] = []

    def fits(*names: str) -> bool:
        setting = start
        for name in names:
            # A change that one before it has made needless is no longer offered.
            setting = next((after for offered, after in _variants(setting) if offered == name), setting)
        made = plan(setting.recipe, config, setting.zero3, setting.hardware)
        tried.append(Change(" and ".join(names), made.gpu_total, made.host_total, made.fits))
        return made.fits

    helpful = []
    for name, _ in singles:
        if not fits(name) and (tried[-1].gpu_bytes < now.gpu_total or tried[-1].host_bytes < now.host_total):
            helpful.append(name)
    # The pairs of what costs least first; more would take longer than the rest of the plan.
    pairs = sorted(itertools.combinations(range(len(helpful)), 2), key=sum)[:20]
    for one, other in pairs:
        if sum(change.fits for change in tried) >= 3:
            break
        fits(helpful[one], helpful[other])
    found = [change for change in tried if change.fits][:3]
    if not found and helpful:
        fits(*helpful)
        found = [change for change in tried if change.fits]
    return found or sorted(tried, key=lambda change: change.gpu_bytes)[:1]


def _variants(start: _Setting) -> Iterator[tuple[str, _Setting]]:
    """Every single change that there is, cheapest first: what costs time, then hardware, then what is trained."""
    recipe, zero3, hardware = start
    zero = zero3.get("zero_optimization", {})

    def with_recipe(**keys: Any) -> _Setting:
        return start._replace(recipe=recipe.model_copy(update=keys))

    def with_zero(**keys: Any) -> _Setting:
        changed = copy.deepcopy(dict(zero3))
        changed["zero_optimization"] = {**zero, **keys}
        return start._replace(zero3=changed)

    optimizer, world = recipe.optimizer, hardware.world
    if optimizer.batch_size % (optimizer.micro_batch * world):
        size = math.ceil(optimizer.batch_size / (optimizer.micro_batch * world)) * optimizer.micro_batch * world
        changed = optimizer.model_copy(update={"batch_size": size})
        yield f"optimizer.batch_size={size}", with_recipe(optimizer=changed)
    if recipe.dtype == "float32" and hardware.cuda:
        yield "dtype=bfloat16", with_recipe(dtype="bfloat16")
    if not recipe.gradient_checkpointing:
        yield "gradient_checkpointing=true", with_recipe(gradient_checkpointing=True)
    micro = optimizer.micro_batch
    while micro > 1:
        micro //= 2
        changed = optimizer.model_copy(update={"micro_batch": micro})
        yield f"optimizer.micro_batch={micro}", with_recipe(optimizer=changed)
    if zero.get("stage3_max_live_parameters", 1) != 0:
        keys = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
        yield "in deepspeed: " + ", ".join(f"{key} 0" for key in keys), with_zero(**keys)
    if not zero.get("offload_optimizer"):
        yield "in deepspeed: offload_optimizer to cpu", with_zero(offload_optimizer={"device": "cpu"})
    if not zero.get("offload_param"):
        yield "in deepspeed: offload_param to cpu", with_zero(offload_param={"device": "cpu"})
    for factor in (2, 4):
        nodes = hardware.nodes * factor
        yield f"--nodes {nodes}", start._replace(hardware=hardware._replace(nodes=nodes))
    if recipe.max_length > 1024:
        yield f"max_length={recipe.max_length // 2}", with_recipe(max_length=recipe.max_length // 2)
    if recipe.lora.r > 8:
        yield f"lora.r={recipe.lora.r // 2}", with_recipe(lora=recipe.lora.model_copy(update={"r": recipe.lora.r // 2}))
    if recipe.lora.experts != "none" and recipe.lora.attention:
        yield "lora.experts=none", with_recipe(lora=recipe.lora.model_copy(update={"experts": "none"}))


# ------------------------------------------------------------------------------------------------------------ report


def find_config(recipe: TrainRecipe, recipe_path: Path, model: Path | None) -> tuple[Mapping[str, Any], str]:
    """The base's `config.json`: `model`'s, or the base's, or that of the folder `model/` beside the recipe.

    Returns:
        The config, and where it is.

    Raises:
        MixfuseError: There is none.
    """
    places = [model] if model else [recipe.base, recipe_path.parent / MODEL_FOLDER]
    for place in places:
        file = place if place.is_file() else place / "config.json"
        if file.is_file():
            config = read_json(file)
            if not isinstance(config, dict):
                raise MixfuseError(f"{file} is no model's config.json")
            return config, str(file)
    raise MixfuseError(
        f"no config.json in {' or '.join(map(str, places))}; name a folder that holds one, weights are not needed: "
        "--model configs/mixtral-8x22b/model"
    )


def count_on_meta(config: Mapping[str, Any]) -> int:
    """Builds the base on the meta device and counts its parameters.

    Raises:
        MixfuseError: The count is not the formula's: the planner does not know this model.
    """
    import torch

    from mixfuse.train.model.family_classes import classes_of

    expected = base_parameters(shape_of(config))
    classes = classes_of(config["model_type"])
    with torch.device("meta"):
        model = classes.causal_lm(classes.config.from_dict(dict(config)))
    counted = sum(parameter.numel() for parameter in model.parameters())
    if counted != expected:
        raise MixfuseError(
            f"the model has {counted:,} parameters and the planner's formula says {expected:,}; "
            "its config has something the planner does not know, so it does not guess"
        )
    return int(counted)


def gib(count: float) -> str:
    """Bytes as GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def to_json(
    made: Plan, advice: Sequence[Change], estimate: Speed | None, assumptions: Mapping[str, float]
) -> dict[str, Any]:
    """The plan as one JSON object."""
    return {
        "kind": "training",
        "recipe": made.recipe,
        "stage": made.stage,
        "nodes": made.hardware.nodes,
        "gpus_per_node": made.hardware.gpus,
        "gpu_bytes": made.hardware.gpu_bytes,
        "reserve_bytes": made.hardware.reserve_bytes,
        "base_parameters": made.base_parameters,
        "active_parameters": made.active_parameters,
        "trainable_parameters": made.trainable_parameters,
        "base_bytes": made.base_parameters * made.w,
        "adapter_bytes": made.trainable_parameters * made.w,
        "batch": {"sequences": made.batch.B, "length": made.batch.S, "tokens": made.batch.T},
        "per_gpu_bytes": made.per_gpu(),
        "peak_at": made.peak.name,
        "loading_bytes": made.loading,
        "largest_gather_bytes": made.largest_gather,
        "moe_block_bytes": memory.moe_block_parameters(made.shape) * made.w,
        "activation_bytes": {key: made.saved[key] for key in ("with_checkpointing", "without_checkpointing")},
        "per_host_bytes": {**made.host, "total": made.host_total},
        "nvme_bytes_per_host": made.disk,
        "fits": made.fits,
        "problems": list(made.problems),
        "advice": [change._asdict() for change in advice],
        "speed": estimate
        and {
            **{key: None if math.isinf(value) else value for key, value in estimate._asdict().items()},
            "assumed": dict(assumptions),
        },
    }


def header(made: Plan) -> str:
    """What a recipe's header says of memory; `tests/test_plan.py` holds the two together."""
    words = f"{gib(made.gpu_total)} a GPU, {gib(made.host_total)} a host"
    if not made.hardware.cuda:
        words = f"{gib(made.gpu_total)} a process"
    return words if made.fits else f"{words}, which does not fit"


def to_text(made: Plan, advice: Sequence[Change], estimate: Speed | None, assumptions: Mapping[str, float]) -> str:
    """The plan for people."""
    hardware, shape = made.hardware, made.shape
    unit = "GPU" if hardware.cuda else "process"
    parts = "\n".join(f"  {name:14} {gib(size):>10}" for name, size in made.per_gpu().items() if size)
    host = "\n".join(f"  {name:14} {gib(size):>10}" for name, size in {**made.host, "total": made.host_total}.items())
    lines = [
        f"{made.recipe}: {made.stage} on {hardware.nodes} x {hardware.gpus}"
        + (f" GPUs of {gib(hardware.gpu_bytes)}" if hardware.cuda else " processes without a GPU"),
        f"base {made.base_parameters / 1e9:.2f} B parameters ({made.base_parameters * made.w / 1e9:.1f} GB), "
        f"{made.active_parameters / 1e9:.2f} B active; trained {made.trainable_parameters / 1e6:.1f} M "
        f"({made.trainable_parameters * made.w / 1e9:.2f} GB)",
        f"one pass: {made.batch.B} x {made.batch.S} tokens; activations with checkpointing "
        f"{gib(made.saved['with_checkpointing'])}, without {gib(made.saved['without_checkpointing'])}",
        f"one MoE block: {memory.moe_block_parameters(shape) * made.w / 1e9:.2f} GB; "
        f"the most that is gathered at once: {made.largest_gather / 1e9:.2f} GB",
        "",
        f"per {unit}, at its peak ({made.peak.name}):",
        parts,
        f"  (while loading   {gib(made.loading):>8})",
        "per host:",
        host,
    ]
    if made.disk:
        lines.append(f"  {'on NVMe':14} {gib(made.disk):>10}")
    if hardware.host_bytes is None:
        lines.append("  (--host-memory was not given, so a host's is not checked)")
    if estimate:
        assumed = ", ".join(f"{key} {value:g}" for key, value in assumptions.items())
        lines += [
            "",
            f"time: {estimate.tokens_per_second:,.0f} tokens/s together; computing alone {estimate.compute:,.0f}, "
            f"gathering alone {estimate.gather:,.0f}",
            f"  assumed, not measured: {assumed}",
        ]
    lines += ["", "fits" if made.fits else "does NOT fit: " + "; ".join(made.problems)]
    lines += [
        f"  {'fits' if change.fits else 'still too much'} with {change.change}: {gib(change.gpu_bytes)} a {unit}, "
        f"{gib(change.host_bytes)} a host"
        for change in advice
    ]
    return "\n".join(lines)
