"""LoRA on Mixtral's experts, applied to activations: for the tokens routed to expert e, `y += (x A_eᵀ) B_eᵀ · scale`.

PEFT's `target_parameters` adds `scale · B_e A_e` to the weight of every expert on every forward, and keeps the sum for
backward: memory and time that grow with the base, not with the adapter. Here neither library is patched, each is used
where it lets itself be extended:

- transformers calls the experts implementation that the model's config names (`ALL_EXPERTS_FUNCTIONS`): here
  `experts_forward`.
- PEFT builds the wrapper class that a `LoraConfig` registers for a module class (`attach`): here a `ParamWrapper` that
  hands A and B to that implementation. Keys, saving, loading, merging, disabling and the set of adapters stay PEFT's
  own, so what is saved is a plain PEFT adapter.

Neither registration is saved with a model or an adapter; `assert_in_force` tells whether both hold.

Dimensions in names: T tokens, K experts a token, S = T·K token-expert pairs sorted by expert, E experts, H hidden size,
I intermediate size, R rank; elsewhere M is the width of a projection's input and N of its output.
"""

# ruff: noqa: N803, N806 - tensors are named with their dimensions

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layer
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from mixfuse.errors import MixfuseError

EXPERTS_IMPLEMENTATION = "mixfuse_lora"
"""What `experts_implementation=` or `set_experts_implementation` is given, after `register`."""


class Factors(NamedTuple):
    """A LoRA of one 3-D expert parameter, as PEFT holds it (peft 0.21, `ParamWrapper.get_delta_weight`).

    Attributes:
        a: (E·R, M), expert-major: `a.view(E, R, M)`.
        b: (N, R·E), rank-major: `b.view(N, R, E)`.
        scale: alpha / R.
    """

    a: Tensor
    b: Tensor
    scale: float


class ParamWrapper(peft_layer.ParamWrapper):
    """PEFT's wrapper of one expert parameter, which passes A and B down instead of changing the weight.

    PEFT recognises wrappers by the class's name (peft 0.21, `BaseTuner._inject_parameters`): it must be this one. Two
    wrappers nest where both parameters are adapted; each adds its factors to the keyword argument `lora`, which the
    experts module hands to the implementation. An implementation that takes no `lora` fails with a TypeError.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Calls what is wrapped with this parameter's factors added to `lora`.

        Raises:
            MixfuseError: More than one adapter is active.
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names or kwargs.get("adapter_names") is not None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        if len(names) > 1:
            raise MixfuseError(f"adapters {names} are active together; expert LoRA in activation space takes one")
        factors = Factors(self.lora_A[names[0]].weight, self.lora_B[names[0]].weight, self.scaling[names[0]])
        lora = {**kwargs.pop("lora", {}), self.parameter_name: factors}
        result = self.base_layer(x, *args, lora=lora, **kwargs)
        return result


def attach(config: LoraConfig) -> None:
    """Makes PEFT build our wrapper around Mixtral's experts, for a model that is wrapped with `config`.

    Call it before `get_peft_model`, and give a config to `PeftModel.from_pretrained(..., config=config)`: the one PEFT
    reads from an adapter's folder knows nothing of it.

    Args:
        config: Its `target_parameters` name `gate_up_proj`, `down_proj` or both; changed in place.
    """
    config._register_custom_module({MixtralExperts: ParamWrapper})


def register() -> None:
    """Makes `EXPERTS_IMPLEMENTATION` known to transformers, in this process."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)


def assert_in_force(model: torch.nn.Module) -> None:
    """Checks that no expert LoRA of this model runs through PEFT's whole delta weights.

    Args:
        model: Any module that holds Mixtral's experts, adapted or not.

    Raises:
        MixfuseError: The implementation is not registered or not chosen, or an expert's wrapper is PEFT's own.
    """
    if ALL_EXPERTS_FUNCTIONS.get(EXPERTS_IMPLEMENTATION) is not experts_forward:
        raise MixfuseError(
            f"experts implementation {EXPERTS_IMPLEMENTATION!r} is not registered; call train.expert_lora.register()"
        )
    found = False
    for name, module in model.named_modules():
        if isinstance(module, MixtralExperts):
            found = True
            chosen = module.config._experts_implementation
            if chosen != EXPERTS_IMPLEMENTATION:
                raise MixfuseError(
                    f"{name} runs the experts implementation {chosen!r}, not {EXPERTS_IMPLEMENTATION!r}; "
                    f"load the model with experts_implementation={EXPERTS_IMPLEMENTATION!r}"
                )
        elif isinstance(module, peft_layer.ParamWrapper) and not isinstance(module, ParamWrapper):
            raise MixfuseError(
                f"{name} is PEFT's own wrapper, which builds the whole delta weight of every expert; "
                "call train.expert_lora.attach(config) before the model is wrapped"
            )
    if not found:
        raise MixfuseError("the model holds no Mixtral experts; expert LoRA has nothing to act on")


def experts_forward(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    lora: dict[str, Factors] | None = None,
) -> Tensor:
    """The experts implementation: every token through its K experts, the low-rank terms added on the way.

    Args:
        experts: The `MixtralExperts`: `gate_up_proj` (E, 2·I, H), `down_proj` (E, H, I), `_apply_gate`.
        hidden_states: (T, H).
        top_k_index: (T, K) expert numbers.
        top_k_weights: (T, K) gate weights.
        lora: Parameter name → its factors; a parameter not named is not adapted.

    Returns:
        (T, H), in the dtype of `hidden_states`.

    Raises:
        MixfuseError: The experts have biases, are transposed or spread over devices, or PEFT has parametrised them.
    """
    if experts.has_bias or experts.is_transposed or not experts.has_gate or experts._is_expert_parallel:
        raise MixfuseError(f"{EXPERTS_IMPLEMENTATION!r} is for Mixtral's experts, whole on every process")
    if hasattr(experts, "parametrizations"):
        raise MixfuseError(
            "PEFT's own wrapper builds the whole delta weight of every expert here; "
            "call train.expert_lora.attach(config) before the model is wrapped"
        )
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if torch.is_grad_enabled() and (gate_up.requires_grad or down.requires_grad):
        if lora:
            raise MixfuseError("the experts' base weights are trainable; with LoRA they have to be frozen")
        plain: Tensor = grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
        return plain
    dtype, device = gate_up.dtype, hidden_states.device.type
    with torch.no_grad():
        experts_S, order_S = torch.sort(top_k_index.flatten(), stable=True)
        numbers_E = torch.arange(experts.num_experts, device=order_S.device)
        # The last row of each expert, without the wait for the device that bincount brings.
        ends_E = torch.searchsorted(experts_S, numbers_E, right=True).to(torch.int32)
    tensors: list[Tensor | None] = []
    scales: list[float] = []
    for name in ("gate_up_proj", "down_proj"):
        a, b, scale = (lora or {}).get(name, (None, None, 0.0))
        # PEFT, too, computes in the base's dtype (`get_delta_factors`); its adapters are float32 on a bfloat16 base.
        tensors += [a if a is None else a.to(dtype), b if b is None else b.to(dtype)]
        scales.append(scale)
    constants = _Constants(tuple(scales), experts._apply_gate)
    with torch.autocast(device_type=device, enabled=False):
        out_TH: Tensor = _Experts.apply(
            hidden_states.to(dtype), top_k_weights, order_S, ends_E, gate_up, down, *tensors, constants
        )
    return out_TH.to(hidden_states.dtype)


class _Constants(NamedTuple):
    """What `_Experts` needs beside tensors: the scales of gate_up's and down's LoRA, and (S, 2·I) → (S, I)."""

    scales: tuple[float, ...]
    apply_gate: Callable[[Tensor], Tensor]


class _Experts(torch.autograd.Function):
    """Both projections of the experts with their LoRA; saves the input, gate_up's output and two (S, R) tensors.

    The weights are saved as the very parameters they came as: ZeRO-3 empties a parameter after forward and fills it
    again for backward, while a view of it, which F.linear or grouped_mm would save, keeps the gathered weight of every
    layer alive. Backward computes no gradient for them.

    The gradient of a gate weight needs no saved output: with y = L(h) linear, ⟨g, L(h)⟩ = ⟨Lᵀ(g), h⟩, and Lᵀ(g) is h's
    gradient.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes tensors by position
        ctx: Any,
        x_TH: Tensor,
        gates_TK: Tensor,
        order_S: Tensor,
        ends_E: Tensor,
        gate_up: Tensor,
        down: Tensor,
        a1: Tensor | None,
        b1: Tensor | None,
        a2: Tensor | None,
        b2: Tensor | None,
        constants: _Constants,
    ) -> Tensor:
        k = gates_TK.shape[1]
        groups = _Groups(ends_E, x_TH)
        lora1, lora2 = _factors(a1, b1, constants.scales[0]), _factors(a2, b2, constants.scales[1])
        h_S2I, u_SR = _project(groups, x_TH[order_S // k], gate_up, lora1)
        y_SH, v_SR = _project(groups, constants.apply_gate(h_S2I), down, lora2)
        y_SH.mul_(gates_TK.flatten()[order_S, None])
        ctx.save_for_backward(x_TH, gates_TK, order_S, ends_E, gate_up, down, a1, b1, a2, b2, h_S2I, u_SR, v_SR)
        ctx.constants = constants
        return _to_tokens(y_SH, order_S, k)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> Any:
        x_TH, gates_TK, order_S, ends_E, gate_up, down, a1, b1, a2, b2, h_S2I, u_SR, v_SR = ctx.saved_tensors
        constants: _Constants = ctx.constants
        k = gates_TK.shape[1]
        tokens_S = order_S // k
        lora1, lora2 = _factors(a1, b1, constants.scales[0]), _factors(a2, b2, constants.scales[1])
        grad_x = grad_gates = grad_a1 = grad_b1 = grad_a2 = grad_b2 = None
        with torch.autocast(device_type=grad_TH.device.type, enabled=False):
            groups = _Groups(ends_E, x_TH)
            grad_SH = grad_TH[tokens_S]
            gates_S1 = gates_TK.flatten()[order_S, None].to(grad_SH.dtype)
            with torch.enable_grad():
                leaf_S2I = h_S2I.detach().requires_grad_()
                act_SI = constants.apply_gate(leaf_S2I)
            # Of the output before the gate weight; the gate weight enters after its own gradient is taken.
            grad_SI, grad_v_SR = _project_back(groups, grad_SH, down, lora2)
            if ctx.needs_input_grad[1]:
                grad_gates_S = torch.linalg.vecdot(grad_SI, act_SI.detach()).to(gates_TK.dtype)
                grad_gates = torch.empty_like(grad_gates_S).scatter_(0, order_S, grad_gates_S).view_as(gates_TK)
            if lora2 and v_SR is not None and grad_v_SR is not None:
                grad_a2 = groups.outer(grad_v_SR * gates_S1, act_SI.detach()).reshape_as(lora2.a)
                grad_b2 = _b_like(groups.outer(v_SR * (gates_S1 * lora2.scale), grad_SH))
            grad_SI.mul_(gates_S1)
            (grad_S2I,) = torch.autograd.grad(act_SI, leaf_S2I, grad_SI)
            del act_SI, leaf_S2I, grad_SI
            if ctx.needs_input_grad[0] or lora1:
                grad_x_SH, grad_u_SR = _project_back(groups, grad_S2I, gate_up, lora1)
                grad_x = _to_tokens(grad_x_SH, order_S, k)
                if lora1 and u_SR is not None and grad_u_SR is not None:
                    grad_a1 = groups.outer(grad_u_SR, x_TH[tokens_S]).reshape_as(lora1.a)
                    grad_b1 = _b_like(groups.outer(u_SR * lora1.scale, grad_S2I))
        return grad_x, grad_gates, None, None, None, None, grad_a1, grad_b1, grad_a2, grad_b2, None


class _Groups:
    """Products over rows that are sorted by expert: one grouped product on a GPU that has it, a loop elsewhere."""

    def __init__(self, ends_E: Tensor, like: Tensor) -> None:
        self._ends = ends_E
        # torch 2.13's grouped kernels: bfloat16, SM80 and newer; strides in multiples of 16 bytes (checked per call).
        self._grouped = (
            like.is_cuda and like.dtype == torch.bfloat16 and torch.cuda.get_device_capability(like.device) >= (8, 0)
        )
        self._list: list[int] | None = None

    def rows(self, x_SM: Tensor, w_EMN: Tensor, *, onto: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Every row times its expert's matrix: (S, N); added to `onto` in place, times `scale`, where that is given."""
        if self._in_one(x_SM.shape[-1], w_EMN.shape[-1]):
            y_SN = F.grouped_mm(x_SM, w_EMN, offs=self._ends)
            return y_SN if onto is None else onto.add_(y_SN, alpha=scale)
        if onto is None:
            onto = x_SM.new_empty(x_SM.shape[0], w_EMN.shape[-1])
            for expert, rows in self._slices():
                torch.mm(x_SM[rows], w_EMN[expert], out=onto[rows])
        else:
            for expert, rows in self._slices():
                onto[rows].addmm_(x_SM[rows], w_EMN[expert], alpha=scale)
        return onto

    def outer(self, x_SM: Tensor, y_SN: Tensor) -> Tensor:
        """The sum over each expert's rows of x's row times y's: (E, M, N), zero for an expert without rows."""
        if self._in_one(x_SM.shape[-1], y_SN.shape[-1]):
            product: Tensor = F.grouped_mm(x_SM.t(), y_SN, offs=self._ends)
            counts_E = torch.diff(self._ends, prepend=self._ends.new_zeros(1))
            return product.masked_fill_((counts_E == 0)[:, None, None], 0)
        product = x_SM.new_zeros(len(self._ends), x_SM.shape[1], y_SN.shape[1])
        for expert, rows in self._slices():
            torch.mm(x_SM[rows].t(), y_SN[rows], out=product[expert])
        return product

    def _in_one(self, *widths: int) -> bool:
        return self._grouped and all(width % 8 == 0 for width in widths)

    def _slices(self) -> Iterator[tuple[int, slice]]:
        if self._list is None:
            self._list = self._ends.tolist()
        start = 0
        for expert, end in enumerate(self._list):
            if end > start:
                yield expert, slice(start, end)
            start = end


def _project(groups: _Groups, x_SM: Tensor, weight_ENM: Tensor, lora: Factors | None) -> tuple[Tensor, Tensor | None]:
    """One projection with its LoRA: the output (S, N), and x Aᵀ (S, R)."""
    y_SN = groups.rows(x_SM, weight_ENM.transpose(1, 2))
    if lora is None:
        return y_SN, None
    a_ERM, b_ERN = _by_expert(lora, weight_ENM.shape[0])
    u_SR = groups.rows(x_SM, a_ERM.transpose(1, 2))
    return groups.rows(u_SR, b_ERN, onto=y_SN, scale=lora.scale), u_SR


def _project_back(
    groups: _Groups, grad_SN: Tensor, weight_ENM: Tensor, lora: Factors | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of a projection's input (S, M), and of x Aᵀ (S, R)."""
    grad_SM = groups.rows(grad_SN, weight_ENM)
    if lora is None:
        return grad_SM, None
    a_ERM, b_ERN = _by_expert(lora, weight_ENM.shape[0])
    grad_SR = groups.rows(grad_SN, b_ERN.transpose(1, 2)).mul_(lora.scale)
    return groups.rows(grad_SR, a_ERM, onto=grad_SM), grad_SR


def _factors(a: Tensor | None, b: Tensor | None, scale: float) -> Factors | None:
    return None if a is None or b is None else Factors(a, b, scale)


def _by_expert(lora: Factors, experts: int) -> tuple[Tensor, Tensor]:
    """PEFT's flat factors as (E, R, M) and (E, R, N), the second copied so that each expert's matrix is dense."""
    a, b, _ = lora
    return a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 1, 0).contiguous()


def _b_like(grad_ERN: Tensor) -> Tensor:
    """(E, R, N) in the layout of PEFT's B, (N, R·E)."""
    return grad_ERN.permute(2, 1, 0).reshape(grad_ERN.shape[2], -1)


def _to_tokens(y_SH: Tensor, order_S: Tensor, k: int) -> Tensor:
    """Sums each token's K rows, in a fixed order: index_add_ adds in any order on CUDA."""
    numbers_S = torch.arange(len(order_S), device=order_S.device)
    inverse_S = torch.empty_like(order_S).scatter_(0, order_S, numbers_S)
    total: Tensor = y_SH[inverse_S].view(-1, k, y_SH.shape[1]).sum(1)
    return total
