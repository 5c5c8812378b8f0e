"""vLLM's arguments in `engine.extra_args`: what they say about the division of the model, and which are refused.

Names and rules are those of vLLM 0.32: `engine/arg_utils.py`, `entrypoints/cli/serve.py`, and for experts with LoRA
`lora/layers/fused_moe.py`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from mixfuse.contracts.errors import MixfuseError

_MOST_PARALLEL = 1 << 16
_SHORT = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-pcp": "--prefill-context-parallel-size",
    "-dp": "--data-parallel-size",
    "-dpl": "--data-parallel-size-local",
    "-dpn": "--data-parallel-rank",
    "-dpr": "--data-parallel-start-rank",
    "-dpa": "--data-parallel-address",
    "-dpb": "--data-parallel-backend",
    "-dph": "--data-parallel-hybrid-lb",
    "-dpe": "--data-parallel-external-lb",
    "-dpm": "--data-parallel-multi-port-external-lb",
    "-ep": "--enable-expert-parallel",
    "-asc": "--api-server-count",
    "-n": "--nnodes",
    "-r": "--node-rank",
    "-q": "--quantization",
}
_OURS = {
    "--host": "engine.host",
    "--port": "engine.port",
    "--uds": "engine.host and engine.port",
    "--api-key": "nothing: the engine's key is made at each start",
    "--config": "engine.extra_args",
    "--model": "engine.base or engine.weights",
    "--tokenizer": "engine.base",
    "--dtype": "engine.dtype",
    "--max-model-len": "engine.max_model_len",
    "--max-num-seqs": "engine.max_num_seqs",
    "--max-loras": "engine.max_loras",
    "--max-lora-rank": "engine.max_lora_rank",
    "--max-cpu-loras": "engine.max_cpu_loras",
}
"""Arguments that have a key of their own; as the last one on the command line they would win unseen."""
_OTHER_SERVERS = (
    *("--headless", "--data-parallel-external-lb", "--data-parallel-hybrid-lb"),
    *("--data-parallel-multi-port-external-lb", "--data-parallel-rank", "--data-parallel-start-rank"),
)
_NAMES = (
    *(name for name in _SHORT.values()),
    *_OURS,
    *_OTHER_SERVERS,
    *("--all2all-backend", "--fully-sharded-loras", "--distributed-executor-backend", "--disable-log-stats"),
    *("--kv-cache-dtype", "--gpu-memory-utilization", "--max-num-batched-tokens", "--enforce-eager"),
    *("--cudagraph-capture-sizes", "--max-cudagraph-capture-size", "--tool-call-parser", "--enable-auto-tool-choice"),
    *("--chat-template", "--quantization-config", "--data-parallel-rpc-port", "--data-parallel-supervisor-port"),
)


def argument(arguments: Sequence[str], name: str) -> str | None:
    """Returns the value of one of vLLM's arguments: the last one if it occurs twice, None if it is missing.

    A flag without a value has the value "".
    """
    result = None
    for place, text in enumerate(arguments):
        key, equals, value = text.partition("=")
        if _full(key) == name:
            following = arguments[place + 1] if place + 1 < len(arguments) else ""
            result = value if equals else ("" if following.startswith("-") else following)
    return result


def _full(key: str) -> str:
    """An argument's name, as vLLM's parser understands it: short, with underscores, or cut off where it is plain."""
    if not key.startswith("-"):
        return ""
    key = _SHORT.get(key, key.replace("_", "-"))
    if key in _NAMES or not key.startswith("--") or len(key) < 4:
        return key
    longer = {name for name in _NAMES if name.startswith(key)}
    return longer.pop() if len(longer) == 1 else key


class Split(NamedTuple):
    """How an engine divides the model.

    Attributes:
        t: Each layer is divided over t GPUs.
        p: The layers are divided into p stages.
        d: There are d data-parallel copies of attention. Their experts are divided over t·d GPUs.
        c: Prompts are divided over c GPUs (prefill context parallelism).
        experts: Whether whole experts are divided among GPUs, not each expert's matrices.
    """

    t: int
    p: int
    d: int = 1
    c: int = 1
    experts: bool = False

    @property
    def gpus(self) -> int:
        """The number of GPUs that the engine takes."""
        return self.t * self.p * self.d * self.c

    @property
    def shares(self) -> int:
        """The number of GPUs that a layer's experts are divided over."""
        return self.t * self.d * self.c

    def __str__(self) -> str:
        """Names the sizes that are not 1, and always TP and PP."""
        text = f"TP {self.t} x PP {self.p}"
        text += f" x DP {self.d}" if self.d > 1 else ""
        return text + (f" x PCP {self.c}" if self.c > 1 else "")


def split_of(arguments: Sequence[str]) -> Split:
    """Reads the parallel sizes from vLLM's arguments.

    Raises:
        MixfuseError: A size is not a number, or none that engines have.
    """
    names = ("tensor-parallel", "pipeline-parallel", "data-parallel", "prefill-context-parallel")
    values = [argument(arguments, f"--{name}-size") for name in names]
    shown = f"engine.extra_args: {' '.join(arguments)[:200]}"
    try:
        t, p, d, c = (1 if value is None else int(value) for value in values)
    except ValueError:
        raise MixfuseError(f"{shown}: a parallel size is not a number") from None
    if not all(1 <= size <= _MOST_PARALLEL for size in (t, p, d, c)):
        raise MixfuseError(f"{shown}: a parallel size is from 1 to {_MOST_PARALLEL}")
    return Split(t, p, d, c, argument(arguments, "--enable-expert-parallel") is not None)


def option(arguments: Sequence[str], name: str, default: float) -> float:
    """Reads a number from vLLM's arguments.

    Raises:
        MixfuseError: The value is not a number above 0.
    """
    text = argument(arguments, name)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e15:  # NaN compares false
        raise MixfuseError(f"engine.extra_args: {name} {str(text)[:40]!r} is not a number above 0")
    return value


def spans_nodes(arguments: Sequence[str]) -> bool:
    """Whether the engine has processes on other nodes, or may have: those that Ray places."""
    return (
        argument(arguments, "--distributed-executor-backend") == "ray"
        or argument(arguments, "--data-parallel-backend") == "ray"
        or argument(arguments, "--data-parallel-address") is not None
        or (argument(arguments, "--nnodes") or "1") != "1"
    )


def refusal(arguments: Sequence[str]) -> str | None:
    """Says why vLLM could not serve adapters with these arguments, or not as the rest of the config says; else None.

    Raises:
        MixfuseError: A parallel size is not a number.
    """
    for name, key in _OURS.items():
        if argument(arguments, name) is not None:
            return f"{name} would override the config; use {key}"
    if argument(arguments, "--disable-log-stats") is not None:
        return "--disable-log-stats hides the engine's steps, which tell a long queue from a hang"
    if (argument(arguments, "--api-server-count") or "1") != "1":
        return "--api-server-count: vLLM loads adapters at run time with one API server only; leave it out"
    for name in _OTHER_SERVERS:
        if argument(arguments, name) is not None:
            return (
                f"{name}: adapters are loaded at run time through one API server, and this engine would have none or "
                "several; leave it out, or start more engines with `replicas`"
            )
    return _experts_refusal(arguments)


def _experts_refusal(arguments: Sequence[str]) -> str | None:
    """Why vLLM's LoRA for experts refuses to divide them among GPUs (`_ep_check`, `_verify_ep_fs`)."""
    split = split_of(arguments)
    if not split.experts:
        return None
    exchange = argument(arguments, "--all2all-backend") or "allgather_reducescatter"
    if exchange.replace("-", "_") != "allgather_reducescatter":
        return f"--enable-expert-parallel with LoRA needs --all2all-backend=allgather_reducescatter, not {exchange}"
    if argument(arguments, "--fully-sharded-loras") is not None:
        return "--enable-expert-parallel with LoRA cannot be used together with --fully-sharded-loras"
    if split.t > 1 and split.d > 1:
        return (
            "--enable-expert-parallel with LoRA works with tensor or with data parallelism, not with both: vLLM would "
            "divide the sequence among the GPUs"
        )
    return None
