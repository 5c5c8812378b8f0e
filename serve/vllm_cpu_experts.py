"""vLLM's experts on a CPU with LoRA: the class that the plugin `vllm_cpu_moe_lora.py` makes vLLM use.

A batch without an adapter goes through vLLM's own fused kernel. That kernel does not expose what lies between its two
products, where LoRA has to be added, so a batch with an adapter goes through oneDNN, expert by expert, as vLLM's linear
layers do. Each of the two packs the weights in its own way, so the experts are in memory twice.

This module imports vLLM. Dimensions in comments: E experts, I intermediate.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.experts.lora_context import MoELoRAContext
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin

from mixfuse.serve.cpu_lora_products import ExpertLora, routed_experts, rows_by_slot

CONTEXT_FIELDS = (
    "adapter_enabled",
    "enable_moe_shared_loras",
    "fully_sharded",
    "punica_wrapper",
    "w13_lora_a_stacked",
    "w13_lora_b_stacked",
    "w2_lora_a_stacked",
    "w2_lora_b_stacked",
)


def check_vllm() -> None:
    """Checks that vLLM has the names that this module uses.

    Raises:
        AttributeError: One is missing.
    """
    present = MoELoRAContext.__dataclass_fields__
    if missing := [name for name in CONTEXT_FIELDS if name not in present]:
        raise AttributeError(f"MoELoRAContext has no field {missing[0]!r}")
    _ = ops.create_onednn_mm, ops.onednn_mm, CPUUnquantizedExperts.process_weights_after_loading
    _ = MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH


def with_lora(experts_class: Any, moe_config: Any) -> Any:
    """Returns a subclass of one of vLLM's experts classes for this CPU that applies LoRA.

    Raises:
        NotImplementedError: The class or the config is not supported.
    """
    parallel = moe_config.moe_parallel_config
    activations = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)
    refusals = {
        f"{experts_class.__name__} is not known": not issubclass(experts_class, CPUUnquantizedExperts),
        "biases are not supported": moe_config.has_bias,
        f"{moe_config.activation} is not supported": moe_config.activation not in activations,
        "expert and data parallelism are not supported": parallel.use_ep or parallel.dp_size != 1,
        # On a CPU the layer is not an opaque op to torch.compile (`_select_forward` in
        # fused_moe/runner/moe_runner.py), and a loop over the experts that were chosen cannot be traced.
        "it needs --enforce-eager": not get_current_vllm_config().model_config.enforce_eager,
    }
    for reason, applies in refusals.items():
        if applies:
            raise NotImplementedError(f"LoRA on experts on a CPU: {reason}")
    name = f"{experts_class.__name__}WithLoRA"
    return type(name, (_CpuExpertLora, experts_class), {"__qualname__": name, "__module__": __name__})


def _packed(weights: torch.Tensor) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Returns a function for each matrix of (E, out, in) that multiplies by it, with the weights in oneDNN's layout."""
    if not ops._supports_onednn:
        return [partial(torch.nn.functional.linear, weight=weight.clone()) for weight in weights]
    handlers = [ops.create_onednn_mm(weight.t(), 32) for weight in weights]
    return [partial(ops.onednn_mm, handler, bias=None) for handler in handlers]


class _CpuExpertLora(LoRAExpertsMixin):  # type: ignore[misc]
    """Adds LoRA to one of vLLM's experts classes, which follows it in the method resolution order.

    vLLM's `LoRAExpertsMixin`, which its own LoRA kernels use, too, takes the adapters from the engine.
    """

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self._first, self._second = _packed(layer.w13_weight), _packed(layer.w2_weight)
        super().process_weights_after_loading(layer)

    def set_lora_context(self, ctx: Any) -> None:
        if ctx.fully_sharded or ctx.enable_moe_shared_loras:
            raise NotImplementedError("LoRA on experts on a CPU: fully sharded and shared LoRAs are not supported")
        super().set_lora_context(ctx)

    def apply(self, output: torch.Tensor, hidden_states: torch.Tensor, **rest: Any) -> None:
        lora = self._lora_of_batch()
        if lora is None:
            super().apply(output=output, hidden_states=hidden_states, **rest)
            return

        def activate(hidden: torch.Tensor) -> torch.Tensor:
            activated = hidden.new_empty(hidden.shape[0], hidden.shape[1] // 2)
            self.activation(rest["activation"], activated, hidden)
            return activated

        weights = rest["topk_weights"]
        if rest["apply_router_weight_on_input"]:  # already in hidden_states
            weights = torch.ones_like(weights)
        output.copy_(
            routed_experts(hidden_states, self._first, self._second, rest["topk_ids"], weights, activate, lora)
        )

    def _lora_of_batch(self) -> ExpertLora | None:
        """Returns the adapters, or None if no adapter of the batch changes experts of this layer."""
        context = self._lora_context
        if context is None or context.punica_wrapper.no_lora:
            return None
        enabled = context.adapter_enabled.tolist()
        adapted = [bool(enabled[slot]) for slot, _ in rows_by_slot(context.punica_wrapper)]
        if not any(adapted):
            return None
        slots = context.punica_wrapper.token_lora_indices
        if not all(adapted):
            # -1 selects the last flag, which is always 0: `create_lora_weights` in vllm/lora/layers/fused_moe.py
            # allocates one flag more than slots.
            slots = torch.where(context.adapter_enabled[slots] > 0, slots, -1)
        return ExpertLora(
            slots,
            context.w13_lora_a_stacked,
            context.w13_lora_b_stacked,
            context.w2_lora_a_stacked[0],
            context.w2_lora_b_stacked[0],
        )
