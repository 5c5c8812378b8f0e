"""Formulas for the memory of serving on each GPU: weights under TP and PP, LoRA slots, room for keys and values.

The formulas take the sizes in a `config.json`. They follow vLLM 0.32's code and were not measured on a GPU.
`docs/planning.md` explains them.

Symbols: those of `contracts/family.py`, and t tensor parallel, p pipeline parallel, r LoRA rank, m LoRA slots,
M tokens in a batch, w bytes per element, q bytes per element of a linear layer's weight (less than w if quantised).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import shape_of
from mixfuse.contracts.family import Shape, base_parameters, norm_parameters
from mixfuse.serve.engine import EngineConfig

BATCHED_TOKENS = 8192  # vLLM's default `max_num_batched_tokens` for a server on a GPU of 70 GiB and more
UTILISATION = 0.92  # vLLM 0.32's default `gpu_memory_utilization`


class Split(NamedTuple):
    """How the model is divided: each layer over t GPUs, the layers over p stages."""

    t: int
    p: int


_SHORT = {"-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-q": "--quantization"}


def argument(arguments: Sequence[str], name: str) -> str | None:
    """Returns the value of one of vLLM's arguments: the last one if it occurs twice, None if it is missing."""
    result = None
    for place, text in enumerate(arguments):
        key, equals, value = text.partition("=")
        if _SHORT.get(key, key) == name:
            result = value if equals else (arguments[place + 1] if place + 1 < len(arguments) else "")
    return result


def split_of(arguments: Sequence[str]) -> Split:
    """Reads the parallel sizes from vLLM's arguments.

    Raises:
        MixfuseError: A size is not a number.
    """
    sizes = (argument(arguments, name) or "1" for name in ("--tensor-parallel-size", "--pipeline-parallel-size"))
    try:
        return Split(*(int(size) for size in sizes))
    except ValueError:
        raise MixfuseError(f"engine.extra_args: {' '.join(arguments)}: a parallel size is not a number") from None


def option(arguments: Sequence[str], name: str, default: float) -> float:
    """Reads a number from vLLM's arguments.

    Raises:
        MixfuseError: The value is not a number.
    """
    text = argument(arguments, name)
    try:
        return default if text is None else float(text)
    except ValueError:
        raise MixfuseError(f"engine.extra_args: {name} {text!r} is not a number") from None


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
    def of(cls, engine: EngineConfig, config: Mapping[str, Any]) -> "Precision":
        """Reads vLLM's arguments and the `quantization_config` of the weights' `config.json`.

        FP8 has one scale per tensor, which is negligible. AWQ has, for each group of an output's weights, a scale of
        two bytes and a zero point with as many bits as a weight.

        Raises:
            MixfuseError: The planner does not know the quantisation.
        """
        w = 4 if engine.dtype == "float32" else 2
        kv = 1 if (argument(engine.extra_args, "--kv-cache-dtype") or "").startswith("fp8") else w
        quantization = config.get("quantization_config") or {}
        method = argument(engine.extra_args, "--quantization") or quantization.get("quant_method")
        if method is None:
            return cls(w, w, kv)
        if method == "fp8":
            return cls(w, 1, kv)
        if method in ("awq", "awq_marlin"):
            bits, group = int(quantization.get("bits", 4)), int(quantization.get("group_size", 128))
            return cls(w, bits / 8 + (2 + bits / 8) / group, kv)
        raise MixfuseError(f"the planner knows the quantisations fp8, awq and awq_marlin, not {method!r}")


def weights(sizes: Shape, split: Split, precision: Precision) -> int:
    """ceil(L/p)·(q·(H·(A + 2·max(G, t))·D/t + A·D·H/t + 3·E·H·I/t) + w·(E·H + norms)) + w·((2 or 1)·V·H/t + H).

    This is the GPU that holds most. Key heads are repeated if there are fewer than t. Every GPU holds the router and
    the norms. The first stage holds the embedding, the last stage the output layer and the last norm; a single stage
    holds all of them.
    """
    L, H, I, E, _, A, G, D, V, tied, _ = sizes  # noqa: N806, E741
    t, p = split
    attention = H * (A + 2 * max(G, t)) * D // t + A * D * H // t
    layer = precision.q * (attention + 3 * E * H * I // t) + precision.w * (E * H + norm_parameters(sizes))
    ends = V * H // t * (2 if p == 1 and not tied else 1) + H
    return int(math.ceil(L / p) * layer) + precision.w * ends


def kv_per_token(sizes: Shape, split: Split, w: int) -> int:
    """2·ceil(L/p)·max(1, G/t)·D·w bytes on one GPU."""
    return 2 * math.ceil(sizes.L / split.p) * max(1, sizes.G // split.t) * sizes.D * w


def lora_slots(sizes: Shape, split: Split, w: int, *, slots: int, rank: int) -> int:
    """m·ceil(L/p)·r·w·(attention + experts), all allocated at the start (vllm/lora/layers).

    Not divided by t are A of q, k, v, gate and up, and B of o and down.
    """
    L, H, I, E, _, A, G, D, *_ = sizes  # noqa: N806, E741
    t, p = split
    attention = 3 * H + (A + 2 * max(G, t)) * D // t + A * D // t + H
    experts = E * (2 * (H + I // t) + I // t + H)
    return slots * math.ceil(L / p) * rank * w * (attention + experts)


def activations(sizes: Shape, split: Split, w: int, *, tokens: int, sequences: int) -> int:
    """w·M·(K·(3·I/t + H) + 4H) + 4·sequences·V: one layer with the largest batch, and logits in float32."""
    each = sizes.K * (3 * sizes.I // split.t + sizes.H) + 4 * sizes.H
    return w * tokens * each + 4 * sequences * sizes.V


@dataclass(frozen=True)
class ServePlan:
    """What one engine needs.

    Attributes:
        parameters: Parameters of the base.
        split: TP and PP.
        parts: Bytes per GPU, by part, without keys and values.
        kv_per_token: Bytes per GPU for one token's keys and values.
        kv_room: Bytes per GPU that are left for keys and values.
        concurrency: The number of requests that are planned for.
        length: Tokens in each of these requests.
        problems: One sentence for each thing that does not fit.
    """

    parameters: int
    split: Split
    parts: dict[str, int]
    kv_per_token: int
    kv_room: int
    concurrency: int
    length: int
    problems: tuple[str, ...]

    @property
    def kv_needed(self) -> int:
        """Bytes per GPU for `concurrency` requests of `length` tokens."""
        return self.concurrency * self.length * self.kv_per_token

    @property
    def total(self) -> int:
        """What a GPU holds with these requests."""
        return sum(self.parts.values()) + self.kv_needed

    @property
    def most(self) -> int:
        """The number of requests of `length` tokens that fit at once."""
        return max(0, self.kv_room) // (self.length * self.kv_per_token)

    @property
    def fits(self) -> bool:
        """Whether nothing stands against it."""
        return not self.problems


def plan(
    engine: EngineConfig, config: Mapping[str, Any], *, gpus: int, gpu_bytes: int, concurrency: int, cpu: bool = False
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

    Raises:
        MixfuseError: The base's family or the quantisation is unknown, or an argument is not a number.
    """
    sizes, split = shape_of(config), split_of(engine.extra_args)
    precision = Precision.of(engine, config)
    w = precision.w
    tokens = int(option(engine.extra_args, "--max-num-batched-tokens", BATCHED_TOKENS))
    parts = {
        "weights": weights(sizes, split, precision),
        "lora_slots": lora_slots(sizes, split, w, slots=engine.max_loras, rank=engine.max_lora_rank),
        "activations": activations(sizes, split, w, tokens=tokens, sequences=engine.max_num_seqs),
    }
    if cpu:  # packed once for vLLM's kernel and once for oneDNN (`vllm_cpu_experts.py`)
        parts["weights"] += w * sizes.L * 3 * sizes.E * sizes.H * sizes.I
    usable = option(engine.extra_args, "--gpu-memory-utilization", UTILISATION) * gpu_bytes
    room = engine.kv_cache_gib << 30 if cpu else int(usable) - sum(parts.values())
    result = ServePlan(
        parameters=base_parameters(sizes),
        split=split,
        parts=parts,
        kv_per_token=kv_per_token(sizes, split, precision.kv),
        kv_room=room,
        concurrency=concurrency,
        length=engine.max_model_len,
        problems=(),
    )
    problems = []
    needed = engine.replicas * split.t * split.p
    if needed > gpus:
        times = f"{engine.replicas} x " if engine.replicas > 1 else ""
        problems.append(f"{times}TP {split.t} x PP {split.p} needs {needed} GPUs and there are {gpus}")
    if sizes.A % split.t:
        problems.append(f"{sizes.A} heads cannot be divided by TP {split.t}")
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
        if planned.fits and planned.split.t * planned.split.p > gpus:
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
        if t <= 8 and t * p <= gpus and (t, p) != split:
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
