"""The number format that an engine computes in: how precise its log-probabilities can be."""

from collections.abc import Mapping

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import config_of
from mixfuse.serve.engine import EngineConfig
from mixfuse.serve.vllm_arguments import argument


def precision(config: EngineConfig) -> str:
    """The type of activations, then what is quantised: `bfloat16`, `bfloat16 fp8`, `bfloat16 fp8 fp8-kv`.

    The second is of the weights, the third of keys and values.

    `auto` is float32 on a CPU. Else it is what vLLM makes of the checkpoint's type: float16 stays, everything else is
    bfloat16.

    Raises:
        MixfuseError: A `config.json` cannot be read.
    """
    weights = config.weights or config.base
    stored = config_of(weights) if (weights / "config.json").is_file() else {}
    dtype = config.served_dtype
    if dtype == "auto":
        dtype = "float16" if "float16" in (stored.get("dtype"), stored.get("torch_dtype")) else "bfloat16"
    group = stored.get("quantization_config") or {}
    if not isinstance(group, Mapping):
        raise MixfuseError(f"{weights}/config.json: quantization_config must be an object")
    method = argument(config.extra_args, "--quantization") or group.get("quant_method")
    cache = argument(config.extra_args, "--kv-cache-dtype") or "auto"
    return " ".join([dtype, *([method] if method else []), *([f"{cache}-kv"] if cache != "auto" else [])])
