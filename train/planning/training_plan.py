"""Plans the memory of a training step on each GPU and each host, and its speed, before anything is loaded.

The formulas are in `memory.py`. `zero3_gathers.py` replays DeepSpeed's rules for gathering. `docs/planning.md` explains
every number. Nothing is downloaded and no weight is read: the model is built only on the meta device, where its
parameters are counted and compared with the formula.
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
from mixfuse.train.planning.memory import FP32, Batch, MicroStep, Moment
from mixfuse.train.planning.zero3_gathers import Gathered, Parameter, Thresholds, replay
from mixfuse.train.quantization import CHANGING_KEYS, QUANTIZATION_BLOCK, QUANTIZED_BITS, Experts
from mixfuse.train.recipe import (
    SEQUENCE_ATTENTION,
    JudgeRecipe,
    Lora,
    Parallel,
    SftRecipe,
    TrainRecipe,
    lora_parameters,
)

_HOPELESS = 16
_QUANTIZED = "quantization="
PAIR = 2  # DPO on rationales runs chosen and rejected in one batch
RESERVE = 4 << 30
"""Bytes of each GPU that stay free for what no formula covers, unless `mixfuse plan --reserve` says otherwise."""
GATHERING = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance")
"""Keys of DeepSpeed's JSON that the plan fills where they are `auto`."""
AHEAD = (
    "the next layer, while a MoE block computes",
    "the next MoE block, while attention computes",
    "nothing",
)
"""How far ZeRO-3 gathers ahead, the most first; each takes less memory than the one before."""
MODEL_FOLDER = "model"  # beside a recipe: holds the config.json to plan with if the base is not on this disk


class Hardware(NamedTuple):
    """The machines to train on.

    Attributes:
        nodes: Hosts.
        gpus: GPUs per host; without a GPU, processes per host.
        gpu_bytes: Memory of one GPU.
        host_bytes: Memory of one host; None skips the check.
        reserve_bytes: Memory of each GPU that stays free for what no formula covers: CUDA context, NCCL's buffers,
            cuBLAS workspaces, fragmentation.
        cuda: Whether CUDA's kernels run. torch's kernels for the output layer need more memory on a CPU.
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
    """The settings in DeepSpeed's JSON that affect memory.

    Attributes:
        thresholds: In elements; for `auto`, what `gathering` says, or transformers (`trainer_config_finalize`).
        reduce_bucket: `reduce_bucket_size`, in elements.
        contiguous: `contiguous_gradients`: whether the bucket is allocated.
        offload_parameters: Where the partitions of the parameters are: "none", "cpu" or "nvme".
        offload_optimizer: Where master weights, the optimizer's state and gradients are.
        nvme_buffers: Elements of all the host's staging buffers for parameters on NVMe.
        nvme_buffer: Elements of one of them.
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
        """Reads DeepSpeed's JSON; missing keys have the defaults of DeepSpeed 0.19.8 (`runtime/zero/config.py`)."""
        zero = _group(config, "zero_optimization")

        def value(key: str, automatic: int, default: int) -> int:
            setting = zero.get(key, default)
            return automatic if setting == "auto" else _count(key, setting)

        parameters, optimizer = _group(zero, "offload_param"), _group(zero, "offload_optimizer")
        buffer_count = _count("buffer_count", parameters.get("buffer_count", 5))
        buffer_size = _count("buffer_size", parameters.get("buffer_size", 100_000_000))
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
            nvme_buffers=buffer_count * buffer_size,
            nvme_buffer=buffer_size,
            secondary=max(1, _count("zero_hpz_partition_size", zero.get("zero_hpz_partition_size", 1))),
        )


def gathering(shape: Shape, lora: Lora, ahead: int, experts: Experts = memory.PLAIN) -> dict[str, int]:
    """DeepSpeed's settings for gathering so far ahead, in elements; see `AHEAD`.

    By default DeepSpeed stops gathering ahead at 1e9 live parameters. A MoE block of 8x22B alone has 2.42e9, so none
    would be on its way while another computes.

    - prefetch: a layer, so that one bucket holds all of the next one;
    - live: two layers, so that the next one sets out when a MoE block begins to compute; or one layer and the output
      layer, which TRL's fused head keeps gathered: then it sets out once that block is released;
    - reuse: a layer's attention, which recomputation and backward pass use in turn; more would keep whole blocks.

    Args:
        shape: Sizes of the base.
        lora: What is trained.
        ahead: An index of `AHEAD`.
        experts: How the frozen experts are held.
    """
    if ahead == len(AHEAD) - 1:
        return dict.fromkeys(GATHERING, 0)
    layer = memory.layer_parameters(shape, lora, experts)
    attention = layer - memory.moe_block_parameters(shape, experts)
    live = 2 * layer if ahead == 0 else layer + shape.V * shape.H
    return dict(zip(GATHERING, (layer, live, attention), strict=True))


def filled(zero3: Mapping[str, Any], values: Mapping[str, int]) -> dict[str, Any]:
    """DeepSpeed's JSON with these values where it says `auto`."""
    zero = _group(zero3, "zero_optimization")
    automatic = {key: value for key, value in values.items() if zero.get(key) == "auto"}
    return {**zero3, "zero_optimization": {**zero, **automatic}} if automatic else dict(zero3)


def _group(config: Any, key: str) -> Mapping[str, Any]:
    """Returns a group of DeepSpeed's keys; an empty one if it is not there."""
    group = config.get(key) if isinstance(config, Mapping) else config
    if group is not None and not isinstance(group, Mapping):
        raise MixfuseError(f"deepspeed: {key} must be a group of keys")
    return group or {}


def _count(key: str, setting: Any) -> int:
    """Reads a count from DeepSpeed's JSON, where people also write 5e8."""
    if not isinstance(setting, int | float) or isinstance(setting, bool) or not 0 <= setting <= 1 << 62:
        raise MixfuseError(f'deepspeed: {key} must be a number from 0 on, or "auto", not {str(setting)[:40]}')
    return int(setting)


@dataclass(frozen=True)
class Plan:
    """What one recipe needs on one kind of hardware; in bytes unless the description says otherwise.

    Attributes:
        recipe: The recipe's path.
        stage: "sft" or "judge".
        two_models: Whether each step also runs the reference, as DPO on rationales does.
        shape: Sizes of the base.
        hardware: The machines.
        base_parameters: Parameters of the base.
        active_parameters: Parameters of the base that one token uses.
        trainable_parameters: Parameters of the LoRA.
        w: Bytes per element.
        experts: How the frozen experts are held.
        base_bytes: Of the whole base, as it is held.
        held: Per GPU, by part: memory that is used during the whole run.
        peak: Per GPU: the moment of a step that needs most.
        loading: Per GPU: while the base is loaded, before training begins.
        largest_gather: Per GPU: the most that is gathered at once.
        host: Per host, by part. The part `loading` is freed before training begins.
        disk: Per host, on NVMe.
        gathered_numel: Elements that one process gathers in a micro step.
        batch: One forward pass.
        checkpointing: Whether activations are checkpointed.
        saved: Activations with and without checkpointing.
        ahead: How far ZeRO-3 gathers ahead (`AHEAD`), or None if DeepSpeed's JSON says so itself.
        zero3: DeepSpeed's JSON, with `GATHERING` filled in.
        problems: One sentence for each thing that does not fit.
    """

    recipe: str
    stage: str
    two_models: bool
    shape: Shape
    hardware: Hardware
    base_parameters: int
    active_parameters: int
    trainable_parameters: int
    w: int
    experts: Experts
    base_bytes: int
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
    ahead: str | None
    zero3: Mapping[str, Any]
    problems: tuple[str, ...]

    @property
    def exchanged_bytes(self) -> int:
        """What one GPU sends, and receives, in a pass to divide its sequences; 0 if it does not."""
        crossing = memory.exchanged(self.shape, self.batch, self.w) * (self.batch.C - 1) // self.batch.C
        return self.shape.L * crossing

    @property
    def gpu_total(self) -> int:
        """The most that one GPU holds."""
        return sum(self.held.values()) + self.peak.total

    @property
    def host_total(self) -> int:
        """The most that one host holds. Memory for loading is freed before the optimizer is made."""
        optimizer, loading = self.host.get("optimizer", 0), self.host["loading"]
        return sum(self.host.values()) - optimizer - loading + max(optimizer, loading)

    @property
    def fits(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def per_gpu(self) -> dict[str, int]:
        """Memory of a GPU at the peak, by part; the parts add up to `total`."""
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
    """Plans one recipe. Where DeepSpeed's JSON leaves it open (`auto`), ZeRO-3 gathers as far ahead as fits a GPU.

    Args:
        recipe: The recipe.
        config: The base's `config.json`.
        zero3: DeepSpeed's JSON.
        hardware: The machines.
        source: The recipe's path, for the report.
        batch: One forward pass; the default is the recipe's micro batch with sequences of `max_length` tokens.

    Raises:
        MixfuseError: The base's family is unknown, or DeepSpeed's JSON is malformed.
    """
    shape, zero = shape_of(config), _group(zero3, "zero_optimization")
    # From NVMe, a parameter that is gathered ahead takes one of few staging buffers; DeepSpeed's defaults suit those.
    from_disk = _group(zero, "offload_param").get("device") == "nvme"
    if from_disk or "auto" not in (zero.get(key) for key in GATHERING):
        return _plan(recipe, config, zero3, hardware, source=source, batch=batch)
    room = hardware.gpu_bytes - hardware.reserve_bytes
    for number, name in enumerate(AHEAD):
        settings = filled(zero3, gathering(shape, recipe.lora, number, experts_of(recipe)))
        planned = replace(_plan(recipe, config, settings, hardware, source=source, batch=batch), ahead=name)
        if planned.gpu_total <= room:
            break
    return planned


def experts_of(recipe: TrainRecipe) -> Experts:
    """How a recipe holds the frozen experts."""
    return Experts(recipe.quantization, 2 if recipe.dtype == "bfloat16" else 4)


def _plan(
    recipe: TrainRecipe,
    config: Mapping[str, Any],
    zero3: Mapping[str, Any],
    hardware: Hardware,
    *,
    source: str,
    batch: Batch | None,
) -> Plan:
    shape, lora = shape_of(config), recipe.lora
    judge = isinstance(recipe, JudgeRecipe)
    # A verdict is read from one pass over the prompt; the reference's were computed before training.
    one_pass = isinstance(recipe, JudgeRecipe) and recipe.completion == "verdict"
    two_models = judge and not one_pass
    experts = experts_of(recipe)
    w = experts.w
    world = hardware.world
    zero = Zero3.of(zero3, shape.H)
    sequences = recipe.optimizer.micro_batch * (PAIR if two_models else 1)
    step = MicroStep(
        shape=shape,
        batch=batch or Batch(sequences, recipe.max_length, recipe.parallel.sequences),
        w=w,
        lora=lora,
        checkpointing=recipe.gradient_checkpointing,
        cuda=hardware.cuda,
        aux_loss=getattr(recipe, "router_aux_loss_coef", 0) > 0,
        one_pass=one_pass,
        experts=experts,
    )
    groups = memory.modules(shape, lora, experts, one_pass=one_pass)
    parameters = memory.all_parameters(groups)
    frozen = sum(p.per_rank(world) for p in parameters if not p.trainable)
    trained = sum(p.per_rank(world) for p in parameters if p.trainable)
    states = {
        "master": trained * FP32,
        "optimizer": trained * recipe.optimizer.entry.state_bytes,
        "gradients": trained * w,
    }
    visits = memory.visits(groups, checkpointing=recipe.gradient_checkpointing)
    thresholds = zero.thresholds
    if thresholds.max_live >= (layer := memory.layer_parameters(shape, lora, experts)):
        # DeepSpeed sets its count to zero where a step ends, and subtracts a layer that is still gathered afterwards.
        # So it counts a layer too few, and gathers as much more (`benchmarks/plan.py`, model `ahead`).
        thresholds = replace(thresholds, max_live=thresholds.max_live + layer)
    gathers = replay(visits, thresholds, world, recorded=not two_models)
    # `train/model/load.py` reads one tensor and gathers one module at a time.
    largest_tensor = max(shape.I, shape.V) * shape.H * w
    partition = (frozen + trained) * w
    host, disk = _host(zero, hardware.gpus, partition=partition, states=states, loading=2 * largest_tensor)
    result = Plan(
        recipe=source,
        stage="judge" if judge else "sft",
        two_models=two_models,
        shape=shape,
        hardware=hardware,
        base_parameters=base_parameters(shape),
        active_parameters=active_parameters(shape),
        trainable_parameters=sum(sum(layer) for layer in lora_parameters(config, lora)),
        w=w,
        experts=experts,
        base_bytes=sum(p.numel for p in parameters if not p.trainable) * w,
        held=_held_on_gpu(zero, parameters, world, w, states),
        peak=_peak(step, gathers, trained, _passes_without_gradients(recipe, step.batch.S)),
        loading=frozen * w + max(3 * shape.E * shape.I, shape.V) * shape.H * w,
        largest_gather=max((gathered.fetching for gathered in gathers), default=0) * w,
        host=host,
        disk=disk,
        # On rationales DPO's reference adds one forward pass to each step, which gathers every parameter anew.
        gathered_numel=gathered_numel(gathers) + (sum(p.numel for p in parameters) if two_models and world > 1 else 0),
        batch=step.batch,
        checkpointing=recipe.gradient_checkpointing,
        saved=_saved(step),
        ahead=None,
        zero3=zero3,
        problems=(),
    )
    return replace(result, problems=tuple(_problems(result, recipe, zero, parameters)))


def _held_on_gpu(
    zero: Zero3, parameters: Sequence[Parameter], world: int, w: int, states: Mapping[str, int]
) -> dict[str, int]:
    """Returns what one GPU holds during the whole run, by part."""
    frozen = sum(p.per_rank(world) for p in parameters if not p.trainable)
    trained = sum(p.per_rank(world) for p in parameters if p.trainable)
    persistent = sum(p.numel for p in parameters if p.numel <= zero.thresholds.persistence) if world > 1 else 0
    held = {
        "parameters": 0 if zero.offload_parameters != "none" else frozen * w,
        "persistent": persistent * w,
        "lora": 0 if zero.offload_parameters != "none" else trained * w,
        "secondary": 0 if zero.secondary == 1 else sum(-(-p.numel // zero.secondary) for p in parameters) * w,
    }
    if zero.offload_optimizer == "none":
        held |= states
    held["buckets"] = zero.reduce_bucket * w if zero.contiguous else 0
    return held


def _passes_without_gradients(recipe: TrainRecipe, length: int) -> dict[str, Batch]:
    """The forward passes of a run outside its steps, by what they are for; sequences have `length` tokens."""
    passes = {}
    if recipe.evaluation:
        size = recipe.evaluation.micro_batch or recipe.optimizer.micro_batch
        passes["evaluation"] = Batch(size, length, recipe.parallel.sequences)
    if isinstance(recipe, JudgeRecipe) and recipe.completion == "verdict":
        passes["reference"] = Batch(recipe.reference_batch, length)
    return passes


def _peak(step: MicroStep, gathers: Sequence[Gathered], trained: int, passes: Mapping[str, Batch]) -> Moment:
    """Returns the moment that needs most.

    It is one of the micro step, the optimizer's step on `trained` elements, or one of a pass without gradients.
    """
    update = Moment("optimizer step", 0, 0, 2 * trained * FP32)
    forward = [memory.without_gradients(name, step._replace(batch=batch), gathers) for name, batch in passes.items()]
    return max((*memory.moments(step, gathers), *forward, update), key=lambda moment: moment.total)


def _saved(step: MicroStep) -> dict[str, int]:
    """Returns the bytes of saved activations: as planned, with checkpointing, and without."""
    shape, batch, w = step.shape, step.batch, step.w
    layer = memory.layer_saved(shape, batch, w, step.lora, cuda=step.cuda)
    checkpoints = shape.L * memory.checkpoint_saved(shape, batch, w)
    return {
        "planned": (checkpoints if step.checkpointing else shape.L * layer) + memory.final_body(shape, batch, w),
        "with_checkpointing": checkpoints + layer,
        "without_checkpointing": shape.L * layer,
    }


def gathered_numel(gathers: Sequence[Gathered]) -> int:
    """Elements that one process gathers in a micro step, its own share included; counted at every fetch."""
    return sum(gathered.arriving for gathered in gathers)


def _host(
    zero: Zero3, gpus: int, *, partition: int, states: Mapping[str, int], loading: int
) -> tuple[dict[str, int], int]:
    """Returns what one host holds for all its processes: in memory, by part, and on NVMe.

    Args:
        zero: DeepSpeed's settings.
        gpus: Processes of the host.
        partition: Bytes of one process's partition of base and LoRA.
        states: Bytes of its master weights, optimizer state and gradients.
        loading: Bytes of the checkpoint's tensors that the host's first process holds while it loads the base.
    """
    host: dict[str, int] = {}
    disk = 0
    if zero.offload_parameters == "cpu":
        host["parameters"] = partition * gpus
    elif zero.offload_parameters == "nvme":
        disk += partition * gpus
        host["nvme_buffers"] = zero.nvme_buffers * 2 * gpus
    if zero.offload_optimizer == "cpu":
        # Gradients exist twice: as they arrive, and in the form that the optimizer takes.
        host["optimizer"] = (sum(states.values()) + states["gradients"]) * gpus
    elif zero.offload_optimizer == "nvme":
        disk += (states["master"] + states["optimizer"] + states["gradients"]) * gpus
        host["optimizer"] = states["gradients"] * gpus
    host["loading"] = loading
    return host, disk


def _problems(planned: Plan, recipe: TrainRecipe, zero: Zero3, parameters: Sequence[Parameter]) -> Iterator[str]:
    hardware = planned.hardware
    room = hardware.gpu_bytes - hardware.reserve_bytes
    if planned.loading > room:
        yield f"loading takes {gib(planned.loading)} of a GPU that has {gib(room)}"
    if planned.gpu_total > room:
        yield (
            f"a GPU needs {gib(planned.gpu_total)} and has {gib(room)} "
            f"({gib(hardware.gpu_bytes)} less {gib(hardware.reserve_bytes)} in reserve); "
            f"the peak is: {planned.peak.name}"
        )
    if hardware.host_bytes is not None and planned.host_total > hardware.host_bytes:
        largest_part = max(planned.host, key=lambda key: planned.host[key])
        yield f"a host needs {gib(planned.host_total)} and has {gib(hardware.host_bytes)}; most of it: {largest_part}"
    if zero.offload_parameters == "nvme":
        largest = max(p.per_rank(hardware.world) for p in parameters)
        if largest > zero.nvme_buffer:
            yield (
                f"offload_param.buffer_size {zero.nvme_buffer:.1e} is less than the largest partition's "
                f"{largest:.2e} elements"
            )
    sequences = recipe.parallel.sequences
    try:
        check_sequences(sequences, hardware.world, planned.shape)
    except MixfuseError as error:
        yield str(error)
        return
    step = recipe.optimizer.micro_batch * hardware.world // sequences
    if recipe.optimizer.batch_size % step:
        divided = " / parallel.sequences" if sequences > 1 else ""
        yield (
            f"optimizer.batch_size {recipe.optimizer.batch_size} is no multiple of "
            f"micro_batch * processes{divided} = {step}; set it to one"
        )


def check_sequences(sequences: int, world: int, shape: Shape) -> None:
    """Checks that so many processes can divide a chat's tokens, and its heads in attention.

    Raises:
        MixfuseError: The groups do not divide the processes, or a group the heads.
    """
    if world % sequences:
        raise MixfuseError(f"parallel.sequences: {sequences} does not divide the run's {world} processes")
    if not divides(sequences, world, shape):
        raise MixfuseError(
            f"parallel.sequences: {sequences} processes cannot divide the base's {shape.A} query heads and {shape.G} "
            "key heads; it must divide the first, and divide the second or be a multiple of it"
        )


def divides(sequences: int, world: int, shape: Shape) -> bool:
    """Whether groups of so many processes divide all processes, and their attention the heads."""
    keys = shape.G % sequences == 0 or sequences % shape.G == 0
    return world % sequences == 0 and shape.A % sequences == 0 and keys


# ------------------------------------------------------------------------------------------------------------- time


class Speed(NamedTuple):
    """Throughput of all GPUs together in tokens per second, under the assumptions that are reported with it.

    Attributes:
        flops_per_token: FLOPs for one trained token.
        compute: Tokens per second if gathering took no time.
        gather: Tokens per second if computing took no time.
        exchange: Tokens per second if only the exchange of divided sequences took time.
        tokens_per_second: Tokens per second if none of these overlap.
    """

    flops_per_token: float
    compute: float
    gather: float
    exchange: float
    tokens_per_second: float


def forward_flops(shape: Shape, sequence: float) -> float:
    """FLOPs of a token's forward pass: 2·(active parameters - embedding) + 2·S·A·D·L.

    Causal attention sees half of S on average (Kaplan et al., arXiv 2001.08361).

    Args:
        shape: The base's.
        sequence: S, tokens of a sequence.
    """
    matrices = 2 * (active_parameters(shape) - (0 if shape.tied else shape.V * shape.H))
    return matrices + 2 * sequence * shape.A * shape.D * shape.L


def speed(
    planned: Plan, *, tflops: float, utilisation: float, bandwidth: float, memory_bandwidth: float = math.inf
) -> Speed:
    """Estimates throughput from the FLOPs and from the bytes that ZeRO-3 moves.

    The backward pass through frozen weights computes only the gradient of the inputs and takes as much as the forward
    pass (`forward_flops`). Checkpointing adds a forward pass. On rationales, DPO's
    reference adds another.

    Args:
        planned: The plan.
        tflops: A GPU's peak, in TFLOP/s.
        utilisation: The share of the peak that is assumed while computing.
        bandwidth: Bytes per second that one GPU receives.
        memory_bandwidth: Bytes per second that one GPU reads and writes of its own memory, to unpack quantised experts.
    """
    shape, world = planned.shape, planned.hardware.world
    forward = forward_flops(shape, planned.batch.S)
    passes = 2 + planned.checkpointing + planned.two_models
    seconds = passes * planned.batch.T * forward / (utilisation * tflops * 1e12)
    # Every weight of every expert, in each pass: the grouped product takes them all.
    seconds += passes * planned.experts.unpacking_bytes() * 3 * shape.L * shape.E * shape.H * shape.I / memory_bandwidth
    compute = world * planned.batch.T / seconds
    moved = planned.gathered_numel * planned.w * (world - 1) / world
    gather = world * planned.batch.T * bandwidth / moved if moved else math.inf
    exchanged = passes * planned.exchanged_bytes
    exchange = world * planned.batch.T * bandwidth / exchanged if exchanged else math.inf
    return Speed(passes * forward, compute, gather, exchange, 1 / (1 / compute + 1 / gather + 1 / exchange))


# ------------------------------------------------------------------------------------------------------------ advice


class Change(NamedTuple):
    """A change to the recipe or the hardware, and the result of planning with it.

    Attributes:
        change: The setting or the hardware, as text.
        gpu_bytes: What a GPU would hold.
        host_bytes: What a host would hold.
        fits: Whether the plan would fit.
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
    """Finds up to three changes that make the recipe fit: single changes first, then pairs, then all that help.

    Each change is planned in full. If nothing fits, the result is the one attempt that needs the least GPU memory. A
    base that is many times larger than all GPUs together gets no advice, since each attempt would take minutes.
    """
    start = _Setting(recipe, zero3, hardware)
    now = plan(recipe, config, zero3, hardware)
    if now.base_bytes > _HOPELESS * hardware.world * hardware.gpu_bytes:
        return []
    singles = list(_variants(start, shape_of(config)))
    tried: list[Change] = []

    def fits(*names: str) -> bool:
        setting = start
        for name in names:
            # An earlier change can make this one unnecessary; it is then not among the variants.
            setting = next(
                (after for offered, after in _variants(setting, shape_of(config)) if offered == name), setting
            )
        planned = plan(setting.recipe, config, setting.zero3, setting.hardware)
        tried.append(Change(" and ".join(names), planned.gpu_total, planned.host_total, planned.fits))
        return planned.fits

    helpful = []
    for name, _ in singles:
        if name.startswith(_QUANTIZED) and any(
            change.fits and change.change.startswith(_QUANTIZED) for change in tried
        ):
            continue  # fewer bits than are needed
        if not fits(name) and (tried[-1].gpu_bytes < now.gpu_total or tried[-1].host_bytes < now.host_total):
            helpful.append(name)
    # The cheapest pairs first. More than 20 would take longer than the rest of the plan.
    pairs = sorted(itertools.combinations(range(len(helpful)), 2), key=sum)[:20]
    for first, second in pairs:
        if sum(change.fits for change in tried) >= 3:
            break
        fits(helpful[first], helpful[second])
    fitting = [change for change in tried if change.fits][:3]
    if not fitting and helpful:
        fits(*helpful)
        fitting = [change for change in tried if change.fits]
    return fitting or sorted(tried, key=lambda change: change.gpu_bytes)[:1]


def _variants(start: _Setting, shape: Shape) -> Iterator[tuple[str, _Setting]]:
    """Yields every single change, cheapest first: those that cost time, then fewer bits, hardware, and quality."""
    recipe, zero3, hardware = start
    zero = zero3.get("zero_optimization", {})

    def with_recipe(**keys: Any) -> _Setting:
        return start._replace(recipe=recipe.model_copy(update=keys))

    def with_zero(**keys: Any) -> _Setting:
        changed = copy.deepcopy(dict(zero3))
        changed["zero_optimization"] = {**zero, **keys}
        return start._replace(zero3=changed)

    optimizer, readers = recipe.optimizer, max(1, hardware.world // recipe.parallel.sequences)
    if optimizer.batch_size % (optimizer.micro_batch * readers):
        size = math.ceil(optimizer.batch_size / (optimizer.micro_batch * readers)) * optimizer.micro_batch * readers
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
    if zero.get("stage3_max_live_parameters", 1) not in (0, "auto"):  # `auto` tries it by itself
        keys = dict.fromkeys(GATHERING, 0)
        yield "in deepspeed: " + ", ".join(f"{key} 0" for key in keys), with_zero(**keys)
    if not zero.get("offload_optimizer"):
        yield "in deepspeed: offload_optimizer to cpu", with_zero(offload_optimizer={"device": "cpu"})
    if not zero.get("offload_param"):
        yield "in deepspeed: offload_param to cpu", with_zero(offload_param={"device": "cpu"})
    # Not where `train/stages/checks.py: check_quantization` would refuse it.
    if not (shape.H % QUANTIZATION_BLOCK or shape.I % QUANTIZATION_BLOCK or any(map(zero.get, CHANGING_KEYS))):
        bits = QUANTIZED_BITS[recipe.quantization] if recipe.quantization else 16
        for name in (name for name, fewer in QUANTIZED_BITS.items() if fewer < bits):
            yield f"{_QUANTIZED}{name}", with_recipe(quantization=name)
    for factor in (2, 4):
        nodes = hardware.nodes * factor
        yield f"--nodes {nodes}", start._replace(hardware=hardware._replace(nodes=nodes))
    if (
        isinstance(recipe, SftRecipe)
        and recipe.attention in ("auto", *SEQUENCE_ATTENTION)
        and optimizer.micro_batch == 1
    ):
        for sequences in range(2 * recipe.parallel.sequences, hardware.gpus + 1):
            if divides(sequences, hardware.world, shape):
                yield f"parallel.sequences={sequences}", with_recipe(parallel=Parallel(sequences=sequences))
    if recipe.max_length > 1024:
        yield f"max_length={recipe.max_length // 2}", with_recipe(max_length=recipe.max_length // 2)
    if recipe.lora.r > 8:
        yield f"lora.r={recipe.lora.r // 2}", with_recipe(lora=recipe.lora.model_copy(update={"r": recipe.lora.r // 2}))
    if recipe.lora.experts != "none" and recipe.lora.attention:
        yield "lora.experts=none", with_recipe(lora=recipe.lora.model_copy(update={"experts": "none"}))


# ------------------------------------------------------------------------------------------------------------ report


def find_config(recipe: TrainRecipe, recipe_path: Path, model: Path | None) -> tuple[Mapping[str, Any], str]:
    """Finds the base's `config.json`: in `model` if set, else in the base or in the folder `model/` beside the recipe.

    Returns:
        The config, and its path.

    Raises:
        MixfuseError: There is no such file, or it holds no JSON object.
    """
    places = [model] if model else [recipe.base, recipe_path.parent / MODEL_FOLDER]
    for place in places:
        file = place if place.is_file() else place / "config.json"
        if file.is_file():
            config = read_json(file)
            if not isinstance(config, dict):
                raise MixfuseError(f"{file} is not a model's config.json")
            return config, str(file)
    raise MixfuseError(
        f"no config.json in {' or '.join(map(str, places))}; name a folder that holds one (weights are not needed): "
        "--model DIR"
    )


def count_on_meta(config: Mapping[str, Any]) -> int:
    """Builds the base on the meta device and counts its parameters.

    Raises:
        MixfuseError: The count differs from the formula's, so the formulas do not fit this model; or a value in the
            config makes no model.
    """
    import torch

    from mixfuse.train.model.family_classes import classes_of

    expected = base_parameters(shape_of(config))
    classes = classes_of(config["model_type"])
    try:
        with torch.device("meta"):
            model = classes.causal_lm(classes.config.from_dict(dict(config)))
    except Exception as error:  # whatever an odd value makes transformers raise
        reason = " ".join(str(error).split())[:200]
        raise MixfuseError(f"transformers builds no model from this config.json: {reason}") from None
    counted = sum(parameter.numel() for parameter in model.parameters())
    if counted != expected:
        raise MixfuseError(
            f"the model has {counted:,} parameters, but the planner's formula gives {expected:,}; "
            "the planner does not support a setting in its config.json"
        )
    return int(counted)


def gib(count: float) -> str:
    """Formats bytes as GiB, or as MiB below 1 GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def to_json(
    planned: Plan, advice: Sequence[Change], estimate: Speed | None, assumptions: Mapping[str, float]
) -> dict[str, Any]:
    """Returns the plan as one JSON object."""
    return {
        "kind": "training",
        "recipe": planned.recipe,
        "stage": planned.stage,
        "nodes": planned.hardware.nodes,
        "gpus_per_node": planned.hardware.gpus,
        "gpu_bytes": planned.hardware.gpu_bytes,
        "reserve_bytes": planned.hardware.reserve_bytes,
        "base_parameters": planned.base_parameters,
        "active_parameters": planned.active_parameters,
        "trainable_parameters": planned.trainable_parameters,
        "base_bytes": planned.base_bytes,
        "quantization": planned.experts.quantization,
        "adapter_bytes": planned.trainable_parameters * planned.w,
        "batch": {
            "sequences": planned.batch.B,
            "length": planned.batch.S,
            "tokens": planned.batch.T,
            "divided_by": planned.batch.C,
        },
        "exchanged_bytes": planned.exchanged_bytes,
        "per_gpu_bytes": planned.per_gpu(),
        "peak_at": planned.peak.name,
        "loading_bytes": planned.loading,
        "largest_gather_bytes": planned.largest_gather,
        "gathers_ahead": planned.ahead,
        "gathering": {key: planned.zero3.get("zero_optimization", {}).get(key) for key in GATHERING},
        "moe_block_bytes": memory.moe_block_parameters(planned.shape, planned.experts) * planned.w,
        "activation_bytes": {key: planned.saved[key] for key in ("with_checkpointing", "without_checkpointing")},
        "per_host_bytes": {**planned.host, "total": planned.host_total},
        "nvme_bytes_per_host": planned.disk,
        "fits": planned.fits,
        "problems": list(planned.problems),
        "advice": [change._asdict() for change in advice],
        "speed": estimate
        and {
            **{key: None if math.isinf(value) else value for key, value in estimate._asdict().items()},
            "assumed": dict(assumptions),
        },
    }


def header(planned: Plan) -> str:
    """Returns the memory line of a recipe's header; `tests/test_plan_docs.py` compares them."""
    line = f"{gib(planned.gpu_total)} a GPU, {gib(planned.host_total)} a host"
    if not planned.hardware.cuda:
        line = f"{gib(planned.gpu_total)} a process"
    return line if planned.fits else f"{line}, which does not fit"


def to_text(planned: Plan, advice: Sequence[Change], estimate: Speed | None, assumptions: Mapping[str, float]) -> str:
    """Formats the plan for people."""
    hardware, shape = planned.hardware, planned.shape
    unit = "GPU" if hardware.cuda else "process"
    parts = "\n".join(f"  {name:14} {gib(size):>10}" for name, size in planned.per_gpu().items() if size)
    host = "\n".join(
        f"  {name:14} {gib(size):>10}" for name, size in {**planned.host, "total": planned.host_total}.items()
    )
    divided = (
        f", divided by {planned.batch.C}: {planned.exchanged_bytes / 1e9:.2f} GB exchanged"
        if planned.batch.C > 1
        else ""
    )
    held = f", experts in {planned.experts.quantization}" if planned.experts.quantization else ""
    lines = [
        f"{planned.recipe}: {planned.stage} on {hardware.nodes} x {hardware.gpus}"
        + (f" GPUs of {gib(hardware.gpu_bytes)}" if hardware.cuda else " processes without a GPU"),
        f"base {planned.base_parameters / 1e9:.2f} B parameters ({planned.base_bytes / 1e9:.1f} GB{held}), "
        f"{planned.active_parameters / 1e9:.2f} B active; trained {planned.trainable_parameters / 1e6:.1f} M "
        f"({planned.trainable_parameters * planned.w / 1e9:.2f} GB)",
        f"one pass: {planned.batch.B} x {planned.batch.S} tokens{divided}; activations with checkpointing "
        f"{gib(planned.saved['with_checkpointing'])}, without {gib(planned.saved['without_checkpointing'])}",
        f"one MoE block: {memory.moe_block_parameters(shape, planned.experts) * planned.w / 1e9:.2f} GB; "
        f"the most that is gathered at once: {planned.largest_gather / 1e9:.2f} GB",
        *([f"gathered ahead: {planned.ahead}"] if planned.ahead else []),
        "",
        f"per {unit}, at its peak ({planned.peak.name}):",
        parts,
        f"  (while loading   {gib(planned.loading):>8})",
        "per host:",
        host,
    ]
    if planned.disk:
        lines.append(f"  {'on NVMe':14} {gib(planned.disk):>10}")
    if hardware.host_bytes is None:
        lines.append("  (--host-memory was not given, so a host's is not checked)")
    if estimate:
        assumed = ", ".join(f"{key} {value:g}" for key, value in assumptions.items())
        lines += [
            "",
            f"time: {estimate.tokens_per_second:,.0f} tokens/s together; computing alone {estimate.compute:,.0f}, "
            f"gathering alone {estimate.gather:,.0f}"
            + (f", exchanging alone {estimate.exchange:,.0f}" if planned.batch.C > 1 else ""),
            f"  assumed, not measured: {assumed}",
        ]
    lines += ["", "fits" if planned.fits else "does NOT fit: " + "; ".join(planned.problems)]
    lines += [
        f"  {'fits' if change.fits else 'still too much'} with {change.change}: {gib(change.gpu_bytes)} a {unit}, "
        f"{gib(change.host_bytes)} a host" + _less(planned.gpu_total - change.gpu_bytes, unit)
        for change in advice
    ]
    return "\n".join(lines)


def _less(saved: int, unit: str) -> str:
    return f" ({gib(saved)} less a {unit})" if saved > 0 else ""
