"""What serving takes on each GPU: weights under TP and PP, LoRA slots, and the room left for keys and values.

Formulas over a `config.json`, explained in `docs/planning.md`; read from vLLM 0.32's code, not measured on a GPU.

Symbols: those of `contracts/family.py`, and t tensor parallel, p pipeline parallel, r LoRA rank, m LoRA slots,
M tokens in a batch, w bytes of an element, q bytes of an element of a linear layer's weight, quantised or not.
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
    """How the model is spread: t GPUs a layer, p stages of layers."""

    t: int
    p: int


_SHORT = {"-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-q": "--quantization"}


def argument(arguments: Sequence[str], name: str) -> str | None:
    """The value of one of vLLM's arguments, the last one where it is given twice; None where it is not."""
    found = None
    for place, text in enumerate(arguments):
        key, equals, value = text.partition("=")
        if _SHORT.get(key, key) == name:
            found = value if equals else (arguments[place + 1] if place + 1 < len(arguments) else "")
    return found


def split_of(arguments: Sequence[str]) -> Split:
    """Reads vLLM's arguments.

    Raises:
        MixfuseError: A size is no number.
    """
    sizes = (argument(arguments, name) or "1" for name in ("--tensor-parallel-size", "--pipeline-parallel-size"))
    try:
        return Split(*(int(size) for size in sizes))
    except ValueError:
        raise MixfuseError(f"engine.extra_args: {' '.join(arguments)}: a parallel size is no number") from None


def option(arguments: Sequence[str], name: str, default: float) -> float:
    """A number among vLLM's arguments.

    Raises:
        MixfuseError: It is no number.
    """
    text = argument(arguments, name)
    try:
        return default if text is None else float(text)
    except ValueError:
        raise MixfuseError(f"engine.extra_args: {name} {text!r} is no number") from None


class Precision(NamedTuple):
    """Bytes of an element.

    Attributes:
        w: Of embeddings, norms, routers, adapters and activations.
        q: Of a weight of attention and experts, with its share of scales and zero points.
        kv: Of a key or value in the cache.
    """

    w: int
    q: float
    kv: int

    @classmethod
    def of(cls, engine: EngineConfig, config: Mapping[str, Any]) -> "Precision":
        """From vLLM's arguments and the `quantization_config` of the weights' `config.json`.

        FP8 has a scale a tensor, which is nothing. AWQ has, for each group of weights of an output, a scale of two
        bytes and a zero point of as many bits as a weight.

        Raises:
            MixfuseError: A quantisation that the planner does not know.
        """
        w = 4 if engine.dtype == "float32" else 2
        kv = 1 if (argument(engine.extra_args, "--kv-cache-dtype") or "").startswith("fp8") else w
        told = config.get("quantization_config") or {}
        method = argument(engine.extra_args, "--quantization") or told.get("quant_method")
        if method is None:
            return cls(w, w, kv)
        if method == "fp8":
            return cls(w, 1, kv)
        if method in ("awq", "awq_marlin"):
            bits, group = int(told.get("bits", 4)), int(told.get("group_size", 128))
            return cls(w, bits / 8 + (2 + bits / 8) / group, kv)
        raise MixfuseError(f"the planner knows the quantisations fp8, awq and awq_marlin, not {method!r}")


def weights(sizes: Shape, split: Split, precision: Precision) -> int:
    """ceil(L/p)·(q·(H·(A + 2·max(G, t))·D/t + A·D·H/t + 3·E·H·I/t) + w·(E·H + norms)) + w·((2 or 1)·V·H/t + H).

    On the fullest GPU. Key heads are repeated where there are fewer than t; the router and the norms stand on every
    GPU; the first stage has the embedding, the last the output layer and the last norm, a single one has both.
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
    """m·ceil(L/p)·r·w·(attention + experts), allocated whole at the start (vllm/lora/layers).

    A of q, k, v and of gate and up is not divided by t, nor B of o and of down.
    """
    L, H, I, E, _, A, G, D, *_ = sizes  # noqa: N806, E741
    t, p = split
    attention = 3 * H + (A + 2 * max(G, t)) * D // t + A * D // t + H
    experts = E * (2 * (H + I // t) + I // t + H)
    return slots * math.ceil(L / p) * rank * w * (attention + experts)


def activations(sizes: Shape, split: Split, w: int, *, tokens: int, sequences: int) -> int:
    """w·M·(K·(3·I/t + H) + 4H) + 4·sequences·V: one layer at the largest batch, and logits in float32."""
    each = sizes.K * (3 * sizes.I // split.t + sizes.H) + 4 * sizes.H
    return w * tokens * each + 4 * sequences * sizes.V


@dataclass(frozen=True)
class ServePlan:
    """What one engine takes.

    Attributes:
        parameters: Of the base.
        split: TP and PP.
        parts: Per GPU, bytes, by part.
        kv_per_token: Per GPU, bytes.
        kv_room: Per GPU, bytes left for keys and values.
        concurrency: The requests that were planned for.
        length: Tokens of one.
        problems: What does not fit, in words.
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
        """Bytes for `concurrency` requests of the greatest length."""
        return self.concurrency * self.length * self.kv_per_token

    @property
    def total(self) -> int:
        """What a GPU holds with just those requests."""
        return sum(self.parts.values()) + self.kv_needed

    @property
    def most(self) -> int:
        """Requests of the greatest length that fit at once."""
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
        gpus: GPUs there are, on all nodes.
        gpu_bytes: Memory of one.
        concurrency: Requests of `max_model_len` tokens that shall fit at once.
        cpu: Serve on a CPU: experts are in memory twice, keys and values have the room the config names.

    Raises:
        MixfuseError: The base is of no known family, an argument no number, or a quantisation unknown.
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
    if cpu:  # `serve/vllm_cpu_moe_lora.py`: once packed for vLLM's kernel, once for oneDNN
        parts["weights"] += w * sizes.L * 3 * sizes.E * sizes.H * sizes.I
    each = kv_per_token(sizes, split, precision.kv)
    usable = option(engine.extra_args, "--gpu-memory-utilization", UTILISATION) * gpu_bytes
    room = engine.kv_cache_gib << 30 if cpu else int(usable) - sum(parts.values())
    made = ServePlan(
        parameters=base_parameters(sizes),
        split=split,
        parts=parts,
        kv_per_token=each,
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
        problems.append(f"{sizes.A} heads do not divide over TP {split.t}")
    if made.kv_needed > room:
        problems.append(
            f"keys and values of {concurrency} x {engine.max_model_len} tokens take {made.kv_needed / 2**30:.1f} GiB a "
            f"GPU, and {max(0, room) / 2**30:.1f} GiB are left"
        )
    return replace(made, problems=tuple(problems))


class Change(NamedTuple):
    """A change that was planned for, and what came of it."""

    change: str
    gpu_bytes: int
    most: int
    fits: bool


def advise(
    engine: EngineConfig, config: Mapping[str, Any], *, gpus: int, gpu_bytes: int, concurrency: int
) -> list[Change]:
    """The first three changes that make it fit, each planned anew."""
    found = []
    for name, changed in _variants(engine, gpus):
        made = plan(changed, config, gpus=gpus, gpu_bytes=gpu_bytes, concurrency=concurrency)
        if made.fits:
            found.append(Change(name, made.total, made.most, fits=True))
    for factor in (2, 4):
        made = plan(engine, config, gpus=gpus * factor, gpu_bytes=gpu_bytes, concurrency=concurrency)
        if made.fits and made.split.t * made.split.p > gpus:
            found.append(Change(f"{gpus * factor} GPUs", made.total, made.most, fits=True))
            break
    fewer = concurrency
    while fewer > 1 and len(found) < 3:
        fewer //= 2
        made = plan(engine, config, gpus=gpus, gpu_bytes=gpu_bytes, concurrency=fewer)
        if made.fits:
            found.append(Change(f"--concurrency {fewer}", made.total, made.most, fits=True))
            break
    return found[:3]


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
