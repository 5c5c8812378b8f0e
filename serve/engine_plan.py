"""Formulas for the memory of serving on each GPU: weights under TP and PP, LoRA slots, room for keys and values.

The formulas take the sizes in a `config.json`. They follow vLLM 0.32's code and were not measured on a GPU.
`docs/planning.md` explains them.

Symbols: those of `contracts/family.py`, and t tensor parallel, p pipeline parallel, d data parallel, n GPUs that share
a layer's experts (t·d), r LoRA rank, m LoRA slots, M tokens in a batch, w bytes per element, q bytes per element of a
linear layer's weight (less than w if quantised).
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import shape_of
from mixfuse.contracts.family import Shape, base_parameters, norm_parameters
from mixfuse.serve.engine import EngineConfig, check_device
from mixfuse.serve.vllm_arguments import Split, argument, option, split_of

BATCHED_TOKENS = 8192  # vLLM's default `max_num_batched_tokens` for a server on a GPU of 70 GiB and more
UTILISATION = 0.92  # vLLM 0.32's default `gpu_memory_utilization`
_GRAPHED_TOKENS = 512  # its default for the largest batch with a CUDA graph; 1024 on Blackwell
_GRAPH_BYTES: int = 128 * 1024  # of one graph, for each layer: an assumption
_UNQUANTISED = re.compile(r"(?:^|[.$*])lm_head\$?$|(?:^|[.*])(?:gate|router)\$?$")
"""Modules that a checkpoint may leave unquantised: those that the formulas count so in any case."""


class Precision(NamedTuple):
    """Bytes per element.

    Attributes:
        w: For embeddings, norms, routers, adapters and activations.
        q: For the weights of attention and experts, including their share of scales and zero points.
        kv: For keys and values in the cache.
    """

    w: int
    q: float
    kv: int

    @classmethod
    def of(cls, engine: EngineConfig, config: Mapping[str, Any], *, cpu: bool = False) -> "Precision":
        """Reads vLLM's arguments and the `quantization_config` of the weights' `config.json`.

        FP8 has one scale per tensor, which is negligible. AWQ has, for each group of an output's weights, a scale of
        two bytes and a zero point with as many bits as a weight. compressed-tensors has the same scale for each group,
        or a negligible one for each output, and zero points if it is not symmetric.

        Raises:
            MixfuseError: The planner does not know the quantisation.
        """
        w = 4 if engine.dtype_on(cpu=cpu) == "float32" else 2
        kv = 1 if (argument(engine.extra_args, "--kv-cache-dtype") or "").startswith("fp8") else w
        quantization = config.get("quantization_config") or {}
        if not isinstance(quantization, Mapping):
            raise MixfuseError("config.json: quantization_config must be an object")
        method = argument(engine.extra_args, "--quantization") or quantization.get("quant_method")
        if method is None:
            return cls(w, w, kv)
        if method == "fp8":
            return cls(w, 1, kv)
        if method in ("awq", "awq_marlin"):
            bits, group = quantization.get("bits", 4), quantization.get("group_size", 128)
            if not (isinstance(bits, int) and isinstance(group, int) and 1 <= bits <= 16 and group >= 1):
                raise MixfuseError(
                    "config.json: quantization_config needs bits from 1 to 16 and a group_size of 1 or more"
                )
            return cls(w, bits / 8 + (2 + bits / 8) / group, kv)
        if method == "compressed-tensors":
            return cls(w, _compressed(quantization), kv)
        raise MixfuseError(
            f"the planner knows the quantisations fp8, awq, awq_marlin and compressed-tensors, not {str(method)[:60]!r}"
        )


def _compressed(quantization: Mapping[str, Any]) -> float:
    """Bytes per weight of a checkpoint of compressed-tensors; all its linear layers are quantised in one way.

    Raises:
        MixfuseError: They are not, or the config is not one.
    """
    groups = quantization.get("config_groups")
    sizes = set()
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weight = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weight, Mapping) or group.get("targets") != ["Linear"]:
            raise MixfuseError(
                "config.json: of compressed-tensors the planner knows groups with targets: [Linear] only"
            )
        bits, size = weight.get("num_bits", 8), weight.get("group_size") or -1
        if not (isinstance(bits, int) and isinstance(size, int) and 1 <= bits <= 16 and (size == -1 or size >= 1)):
            raise MixfuseError("config.json: compressed-tensors needs num_bits from 1 to 16 and a group_size above 0")
        zero_point = 0 if weight.get("symmetric", True) else bits / 8
        sizes.add(bits / 8 + ((2 + zero_point) / size if size > 0 else 0))
    ignored = quantization.get("ignore") or []
    named = [name for name in ignored if not (isinstance(name, str) and _UNQUANTISED.search(name))]
    if len(sizes) != 1 or named:
        found = f"compressed-tensors leaves out {str(named[0])[:80]!r}" if named else f"there are {len(sizes)}"
        raise MixfuseError(f"config.json: the planner counts one quantisation for all linear layers, and {found}")
    return sizes.pop()


def weights(sizes: Shape, split: Split, precision: Precision) -> int:
    """ceil(L/p)·(q·(H·(A + 2·max(G, t))·D/t + A·D·H/t + 3·E·H·I/n) + w·(E·H + norms)) + w·((2 or 1)·V·H/t + H).

    With expert parallelism a GPU holds ceil(E/n) experts, each whole. This is the GPU that holds most. Key heads are
    repeated if there are fewer than t. Every GPU holds the router and the norms. The first stage holds the embedding,
    the last stage the output layer and the last norm; a single stage holds all of them.
    """
    L, H, _, E, _, A, G, D, V, tied, _ = sizes  # noqa: N806
    t, p = split.t, split.p
    attention = H * (A + 2 * max(G, t)) * D // t + A * D * H // t
    here, inner = _experts(sizes, split)
    layer = precision.q * (attention + 3 * here * H * inner) + precision.w * (E * H + norm_parameters(sizes))
    ends = V * H // t * (2 if p == 1 and not tied else 1) + H
    return int(math.ceil(L / p) * layer) + precision.w * ends


def _experts(sizes: Shape, split: Split) -> tuple[int, int]:
    """How many experts of a layer a GPU holds, and how wide each is there."""
    if split.experts:
        return math.ceil(sizes.E / split.shares), sizes.I
    return sizes.E, math.ceil(sizes.I / split.shares)


def kv_per_token(sizes: Shape, split: Split, w: int) -> int:
    """2·ceil(L/p)·max(1, G/t)·D·w bytes on one GPU."""
    return 2 * math.ceil(sizes.L / split.p) * max(1, sizes.G // split.t) * sizes.D * w


def lora_slots(sizes: Shape, split: Split, w: int, *, slots: int, rank: int) -> int:
    """m·ceil(L/p)·r·w·(attention + experts), all allocated at the start (vllm/lora/layers).

    Not divided by t are A of q, k, v, gate and up, and B of o and down.
    """
    L, H, _, _, _, A, G, D, *_ = sizes  # noqa: N806
    t, p = split.t, split.p
    attention = 3 * H + (A + 2 * max(G, t)) * D // t + A * D // t + H
    here, inner = _experts(sizes, split)
    experts = here * (2 * (H + inner) + inner + H)
    return slots * math.ceil(L / p) * rank * w * (attention + experts)


def activations(sizes: Shape, split: Split, w: int, *, tokens: int, sequences: int) -> int:
    """w·M·(d·K·(3·I/n + H) + 4H) + 4·sequences·V: one layer with the largest batch, and logits in float32.

    The experts get the tokens of all d data-parallel copies.
    """
    each = split.d * sizes.K * (3 * sizes.I // split.shares + sizes.H) + 4 * sizes.H
    return w * tokens * each + 4 * sequences * sizes.V


def cuda_graphs(sizes: Shape, split: Split, w: int, *, sequences: int, largest: int | None = None) -> int:
    """g·ceil(L/p)·128 KiB + activations of the largest graph's batch, for g graphs.

    vLLM captures batches of 1, 2, 4, every 8th size below 256 and every 16th from there to the smaller of 2·sequences
    and 512 (`_set_cudagraph_sizes` in vllm/config/vllm.py): in pieces, and whole up to `sequences`; each with and
    without LoRA. The bytes of a graph are an assumption.

    Args:
        sizes: The model's sizes.
        split: How it is divided.
        w: Bytes per element.
        sequences: `max_num_seqs`.
        largest: `--max-cudagraph-capture-size`; None: vLLM's default.
    """
    most = min(2 * sequences, _GRAPHED_TOKENS) if largest is None else largest
    batches = [size for size in (1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)) if size <= most]
    graphs: int = 2 * (len(batches) + sum(size <= sequences for size in batches))
    working = activations(sizes, split, w, tokens=most, sequences=min(most, sequences))
    return graphs * math.ceil(sizes.L / split.p) * _GRAPH_BYTES + working


def pinned_adapter(sizes: Shape, split: Split, w: int, *, rank: int) -> int:
    """Bytes of one adapter in the pinned memory of a host, for each GPU (vllm/lora/model_manager.py).

    Each process holds every factor whole, since it is divided only on the way to the GPU; with expert parallelism, of
    its own experts. The experts' factors are joined to one tensor a matrix, gate and up each with their own A. PyTorch
    rounds each pinned tensor up to a power of two.
    """
    L, H, I, _, _, A, G, D, *_ = sizes  # noqa: N806, E741
    E, _ = _experts(sizes, split)  # noqa: N806
    attention = [H, A * D, H, G * D, H, G * D, A * D, H]
    experts = [E * H, E * I, E * H, E * I, E * I, E * H]
    rounded = [1 << (rank * w * width - 1).bit_length() for width in attention + experts]
    return L * sum(rounded)


@dataclass(frozen=True)
class ServePlan:
    """What one engine needs.

    Attributes:
        parameters: Parameters of the base.
        split: TP, PP and DP.
        parts: Bytes per GPU, by part, without keys and values.
        pinned: Bytes in the memory of each host, for the adapters that its GPUs' processes cache; 0 on a CPU.
        kv_per_token: Bytes per GPU for one token's keys and values.
        kv_room: Bytes per GPU that are left for keys and values.
        concurrency: The number of requests that are planned for.
        length: Tokens in each of these requests.
        problems: One sentence for each thing that does not fit.
    """

    parameters: int
    split: Split
    parts: dict[str, int]
    pinned: int
    kv_per_token: int
    kv_room: int
    concurrency: int
    length: int
    problems: tuple[str, ...]

    @property
    def kv_needed(self) -> int:
        """Bytes per GPU for `concurrency` requests of `length` tokens, divided among the data-parallel copies."""
        return math.ceil(self.concurrency / self.split.d) * self.length * self.kv_per_token

    @property
    def total(self) -> int:
        """What a GPU holds with these requests."""
        return sum(self.parts.values()) + self.kv_needed

    @property
    def most(self) -> int:
        """The number of requests of `length` tokens that fit at once."""
        return self.split.d * (max(0, self.kv_room) // (self.length * self.kv_per_token))

    @property
    def fits(self) -> bool:
        """Whether nothing stands against it."""
        return not self.problems


def plan(
    engine: EngineConfig,
    config: Mapping[str, Any],
    *,
    gpus: int,
    gpu_bytes: int,
    concurrency: int,
    cpu: bool = False,
    host: tuple[int | None, int] = (None, 8),
) -> ServePlan:
    """Plans one engine.

    Args:
        engine: The engine's config.
        config: The base's `config.json`.
        gpus: Number of GPUs on all nodes.
        gpu_bytes: Memory of one GPU.
        concurrency: The number of requests with `max_model_len` tokens that shall fit at once.
        cpu: Whether the engine runs on a CPU. Experts are then in memory twice, and the config sets the room for keys
            and values.
        host: The memory of one host, None for unchecked, and the number of its GPUs, or of processes on a CPU.

    Raises:
        MixfuseError: The base's family or the quantisation is unknown, or an argument is not a number.
    """
    sizes, split = shape_of(config), split_of(engine.extra_args)
    precision = Precision.of(engine, config, cpu=cpu)
    w = precision.w
    tokens = int(option(engine.extra_args, "--max-num-batched-tokens", BATCHED_TOKENS))
    parts = {
        "weights": weights(sizes, split, precision),
        "lora_slots": lora_slots(sizes, split, w, slots=engine.max_loras, rank=engine.max_lora_rank),
        "activations": activations(sizes, split, w, tokens=tokens, sequences=engine.max_num_seqs),
    }
    if not cpu and argument(engine.extra_args, "--enforce-eager") is None:
        largest = argument(engine.extra_args, "--max-cudagraph-capture-size")
        parts["cuda_graphs"] = cuda_graphs(
            sizes,
            split,
            w,
            sequences=engine.max_num_seqs,
            largest=None if largest is None else int(option(engine.extra_args, "--max-cudagraph-capture-size", 0)),
        )
    if cpu:  # packed once for vLLM's kernel and once for oneDNN (`vllm_cpu_experts.py`)
        parts["weights"] += w * sizes.L * 3 * sizes.E * sizes.H * sizes.I
    usable = option(engine.extra_args, "--gpu-memory-utilization", UTILISATION) * gpu_bytes
    room = engine.kv_cache_gib << 30 if cpu else int(usable) - sum(parts.values())
    needed = engine.replicas * split.gpus
    memory, on_host = host
    beside = min(needed, on_host)
    result = ServePlan(
        parameters=base_parameters(sizes),
        split=split,
        parts=parts,
        pinned=0 if cpu else beside * engine.cpu_loras * pinned_adapter(sizes, split, w, rank=engine.max_lora_rank),
        kv_per_token=kv_per_token(sizes, split, precision.kv),
        kv_room=room,
        concurrency=concurrency,
        length=engine.max_model_len,
        problems=(),
    )
    problems = []
    try:
        check_device(engine, cpu=cpu)
    except MixfuseError as error:
        problems.append(str(error))
    if needed > gpus:
        times = f"{engine.replicas} x " if engine.replicas > 1 else ""
        problems.append(f"{times}{split} needs {needed} GPUs and there are {gpus}")
    if sizes.A % split.t:
        problems.append(f"{sizes.A} heads cannot be divided by TP {split.t}")
    if memory is not None and result.pinned > memory:
        problems.append(
            f"{beside} GPUs of a host x {engine.cpu_loras} cached adapters take {result.pinned / 2**30:.1f} GiB of its "
            f"{memory / 2**30:.1f} GiB, pinned; lower engine.max_cpu_loras or max_lora_rank"
        )
    if cpu and memory is not None:
        # vLLM allocates the cache at the start, however much of it is used.
        each = sum(parts.values()) + room
        if each * beside > memory:
            problems.append(
                f"{beside} {'process' if beside == 1 else 'processes'} of {each / 2**30:.1f} GiB on a host "
                f"with {memory / 2**30:.1f} GiB"
            )
    if result.kv_needed > room:
        problems.append(
            f"keys and values of {concurrency} x {engine.max_model_len} tokens take "
            f"{result.kv_needed / 2**30:.1f} GiB a GPU, and {max(0, room) / 2**30:.1f} GiB are left"
        )
    return replace(result, problems=tuple(problems))


class Change(NamedTuple):
    """A change to the config or the hardware, and the result of planning with it.

    Attributes:
        change: The setting or the hardware, as text.
        gpu_bytes: What a GPU would hold.
        most: The number of requests that would fit at once.
        fits: Whether the plan would fit.
    """

    change: str
    gpu_bytes: int
    most: int
    fits: bool


def advise(
    engine: EngineConfig, config: Mapping[str, Any], *, gpus: int, gpu_bytes: int, concurrency: int
) -> list[Change]:
    """Finds up to three changes that make the config fit. Each is planned in full."""
    changes = []
    for name, changed in _variants(engine, gpus):
        planned = plan(changed, config, gpus=gpus, gpu_bytes=gpu_bytes, concurrency=concurrency)
        if planned.fits:
            changes.append(Change(name, planned.total, planned.most, fits=True))
    for factor in (2, 4):
        planned = plan(engine, config, gpus=gpus * factor, gpu_bytes=gpu_bytes, concurrency=concurrency)
        if planned.fits and planned.split.gpus > gpus:
            changes.append(Change(f"{gpus * factor} GPUs", planned.total, planned.most, fits=True))
            break
    fewer = concurrency
    while fewer > 1 and len(changes) < 3:
        fewer //= 2
        planned = plan(engine, config, gpus=gpus, gpu_bytes=gpu_bytes, concurrency=fewer)
        if planned.fits:
            changes.append(Change(f"--concurrency {fewer}", planned.total, planned.most, fits=True))
            break
    return changes[:3]


def _variants(engine: EngineConfig, gpus: int) -> Iterator[tuple[str, EngineConfig]]:
    split = split_of(engine.extra_args)
    rest = [
        argument
        for argument in engine.extra_args
        if not argument.startswith(("--tensor-parallel-size", "--pipeline-parallel-size", "-tp", "-pp"))
    ]
    for t, p in ((2 * split.t, split.p), (4 * split.t, split.p), (8, 1), (8, 2), (8, 4)):
        if t <= 8 and t * p * split.d * split.c <= gpus and (t, p) != (split.t, split.p):
            arguments = [f"--tensor-parallel-size={t}", f"--pipeline-parallel-size={p}"]
            yield (
                f"engine.extra_args: {' '.join(arguments)}",
                engine.model_copy(update={"extra_args": rest + arguments}),
            )
    if engine.dtype == "float32":
        yield "engine.dtype=bfloat16", engine.model_copy(update={"dtype": "bfloat16"})
    slots = engine.max_loras
    while slots > 1:
        slots //= 2
        yield f"engine.max_loras={slots}", engine.model_copy(update={"max_loras": slots})
    length = engine.max_model_len
    while length > 1024:
        length //= 2
        yield f"engine.max_model_len={length}", engine.model_copy(update={"max_model_len": length})
