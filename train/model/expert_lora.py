"""LoRA on a mixture's experts, applied to activations: for the tokens routed to e, `y += dropout(x) A_eᵀ B_eᵀ · scale`.

PEFT's `target_parameters` adds `scale · B_e A_e` to the weight of every expert in every forward pass and saves the sum
for backward, so memory and time grow with the base, not with the adapter. This module avoids that without a patch. It
uses an extension point of each library:

- transformers calls the experts implementation that the model's config names (`ALL_EXPERTS_FUNCTIONS`). Here that is
  `experts_forward`.
- PEFT builds the wrapper class that a `LoraConfig` registers for a module class (`attach`). Here that is a
  `ParamWrapper` that passes A and B to the implementation. PEFT still handles keys, merging, disabling and the set of
  adapters.

`expert_products.py` does the computing.

The module adds two features that PEFT's `target_parameters` lacks: dropout, and experts without a LoRA. A layer's A and
B hold only its adapted experts, so parameters, gradients, optimizer state and checkpoints are smaller. `as_plain_peft`
fills in zeros for the other experts, so the saved adapter is a plain PEFT adapter.

Neither registration is saved with a model or an adapter. `assert_in_force` checks both.

Dimensions in names: T tokens, K experts per token, S = T·K token-expert pairs sorted by expert, E experts, C adapted
(chosen) experts, H hidden size, I intermediate size, R rank; M is the width of a projection's input, N of its output,
and n the number of rows in one segment.
"""

# ruff: noqa: N806 - tensors are named with their dimensions

import copy
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.model.expert_products import Factors, routed_products
from mixfuse.train.model.family_classes import experts_classes
from mixfuse.train.model.quantised_experts import scales_of
from mixfuse.train.quantization import QUANTIZATION_BLOCK

EXPERTS_IMPLEMENTATION = "mixfuse_lora"
"""The name for `experts_implementation=` or `set_experts_implementation`, once `register` has been called."""


class ParamWrapper(peft_layer.ParamWrapper):
    """PEFT's wrapper of one expert parameter, changed to pass A and B to the wrapped module, not to change the weight.

    PEFT recognises wrappers by the name of the class (peft 0.21, `BaseTuner._inject_parameters`), so it must be this
    name. If both parameters are adapted, two wrappers are nested. Each adds its factors to the keyword argument `lora`,
    which the experts module passes to the implementation. An implementation without `lora` raises a TypeError.

    Attributes:
        chosen: The layer's adapted experts, the same for every adapter of the model; None for all.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: LoraConfig,
        *,
        chosen_by_layer: Mapping[int, Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.chosen: tuple[int, ...] | None = None
        if chosen_by_layer is not None:
            # PEFT passes the parameter's whole name (peft 0.21, `LoraModel._create_and_replace`).
            layer = re.search(r"\.layers\.(\d+)\.", kwargs["target_name"])
            if layer is None:
                raise MixfuseError(f"{kwargs['target_name']} is not in a numbered layer")
            self.chosen = tuple(chosen_by_layer[int(layer[1])])
        super().__init__(base_layer, adapter_name, parameter_name, _without_dropout(config), **kwargs)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)

    def _get_in_out_features(self, module: nn.Module) -> Any:
        features = super()._get_in_out_features(module)
        self._all_experts = int(self.num_experts)  # type: ignore[has-type]
        if self.chosen is not None:
            self.num_experts = len(self.chosen)  # PEFT sizes A and B by it
        if (scales := scales_of(module, self.parameter_name)) is not None:
            # PEFT has read the width of the codes (peft 0.21: in and out are swapped later).
            return features[0], getattr(scales, "ds_shape", scales.shape)[-1] * QUANTIZATION_BLOCK
        return features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Adds an adapter to the same experts as the first one."""
        super().update_layer(adapter_name, r, lora_alpha, config=_without_dropout(config), **kwargs)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Calls the wrapped module, with this parameter's factors added to `lora`.

        Raises:
            MixfuseError: More than one adapter is active.
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names or kwargs.get("adapter_names") is not None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        if len(names) > 1:
            raise MixfuseError(f"adapters {names} are active together; expert LoRA supports one active adapter")
        (name,) = names
        dropout = self.lora_dropout[name]
        factors = Factors(
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
            self.chosen,
            dropout.p if dropout.training else 0.0,
        )
        lora = {**kwargs.pop("lora", {}), self.parameter_name: factors}
        result = self.base_layer(x, *args, lora=lora, **kwargs)
        return result

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """Returns what merging adds to the weight: (E, N, M), zero for experts without a LoRA.

        Raises:
            MixfuseError: The weight is quantised.
        """
        if scales_of(self.get_base_layer(), self.parameter_name) is not None:
            raise MixfuseError("an adapter cannot be merged into quantised experts; load the base without quantization")
        a, b = self.spread(self.lora_A[adapter_name].weight, "A"), self.spread(self.lora_B[adapter_name].weight, "B")
        experts = self._all_experts
        a_ERM, b_NRE = a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts)
        delta = torch.einsum("nre,erm->enm", b_NRE, a_ERM) * self.scaling[adapter_name]
        return delta.to(self.get_param().dtype)

    def spread(self, factor: Tensor, side: str) -> Tensor:
        """Returns a factor in plain PEFT's layout for all experts, with zeros for experts without a LoRA.

        Args:
            factor: (C·R, M) if `side` is "A", (N, R·C) if it is "B".
            side: "A" or "B".

        Returns:
            (E·R, M) or (N, R·E).
        """
        if self.chosen is None:
            return factor
        count, all_experts, index = len(self.chosen), self._all_experts, list(self.chosen)
        if side == "A":
            factor_CRM = factor.view(count, -1, factor.shape[1])
            whole = factor.new_zeros(all_experts, *factor_CRM.shape[1:])
            whole[index] = factor_CRM
            return whole.flatten(0, 1)
        factor_NRC = factor.view(factor.shape[0], -1, count)
        whole = factor.new_zeros(*factor_NRC.shape[:2], all_experts)
        whole[..., index] = factor_NRC
        return whole.flatten(1)


def _without_dropout(config: LoraConfig) -> LoraConfig:
    """Returns a copy without dropout, which PEFT's own wrapper refuses: it has no activations to apply it to."""
    config = copy.copy(config)
    config.lora_dropout = 0.0
    return config


def attach(config: LoraConfig, chosen: Mapping[int, Sequence[int]] | None = None) -> None:
    """Makes PEFT build this module's wrapper around the experts of a model that is wrapped with `config`.

    Call it before `get_peft_model`. For `PeftModel.from_pretrained`, pass the config as `config=config`: the one that
    PEFT reads from an adapter's folder does not have the registration.

    Args:
        config: A config whose `target_parameters` name `gate_up_proj`, `down_proj` or both; changed in place.
        chosen: For each layer among the `target_parameters`, the experts that get a LoRA; None for all experts.
    """
    wrapper = partial(ParamWrapper, chosen_by_layer=chosen)
    config._register_custom_module(dict.fromkeys(experts_classes(), wrapper))


def as_plain_peft(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts a model's expert factors to plain PEFT's layout, which has factors for all experts.

    Args:
        model: The PEFT model; its parameters may be partitioned.
        weights: Whole tensors under PEFT's saved names.

    Returns:
        The same names; other tensors, and factors of layers whose experts are all adapted, are unchanged.
    """
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, ParamWrapper)}
    result = {}
    for name, tensor in weights.items():
        stem, _, side = name.removesuffix(".weight").rpartition(".lora_")
        wrapper = wrappers.get(stem)
        result[name] = tensor if wrapper is None else wrapper.spread(tensor, side)
    return result


def register() -> None:
    """Registers `EXPERTS_IMPLEMENTATION` with transformers, for this process."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)


def assert_in_force(model: torch.nn.Module) -> None:
    """Checks that the model's expert LoRA uses this module, and not PEFT's delta weights.

    Args:
        model: A module that holds experts of a known family, adapted or not.

    Raises:
        MixfuseError: The implementation is not registered or not used, an expert's wrapper is PEFT's own, or the model
            has no experts of a known family.
    """
    if ALL_EXPERTS_FUNCTIONS.get(EXPERTS_IMPLEMENTATION) is not experts_forward:
        raise MixfuseError(
            f"experts implementation {EXPERTS_IMPLEMENTATION!r} is not registered; call expert_lora.register()"
        )
    has_experts = False
    for name, module in model.named_modules():
        if isinstance(module, experts_classes()):
            has_experts = True
            implementation = module.config._experts_implementation
            if implementation != EXPERTS_IMPLEMENTATION:
                raise MixfuseError(
                    f"{name} runs the experts implementation {implementation!r}, not {EXPERTS_IMPLEMENTATION!r}; "
                    f"load the model with experts_implementation={EXPERTS_IMPLEMENTATION!r}"
                )
        elif isinstance(module, peft_layer.ParamWrapper) and not isinstance(module, ParamWrapper):
            raise MixfuseError(
                f"{name} is PEFT's own wrapper, which builds the full delta weight of every expert; "
                "call mixfuse.train.model.expert_lora.attach(config) before the model is wrapped"
            )
    if not has_experts:
        raise MixfuseError("the model has no experts of a known family, so expert LoRA cannot be applied")


def experts_forward(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    lora: dict[str, Factors] | None = None,
) -> Tensor:
    """The experts implementation: sends every token through its K experts and adds the low-rank products.

    Args:
        experts: A layer's experts: `gate_up_proj` (E, 2·I, H), `down_proj` (E, H, I), `act_fn` SiLU.
        hidden_states: (T, H).
        top_k_index: (T, K) expert numbers.
        top_k_weights: (T, K) gate weights.
        lora: The factors by parameter name; a parameter that is missing is not adapted.

    Returns:
        (T, H), in the dtype of `hidden_states`.

    Raises:
        MixfuseError: The experts do not use SiLU, have biases, are transposed or are spread over devices, PEFT has
            parametrised them, or their base weights are trainable together with a LoRA.
    """
    if experts.has_bias or experts.is_transposed or not experts.has_gate or experts._is_expert_parallel:
        raise MixfuseError(f"{EXPERTS_IMPLEMENTATION!r} needs experts without biases that are whole on every process")
    if not isinstance(experts.act_fn, SiLUActivation):
        raise MixfuseError(f"{EXPERTS_IMPLEMENTATION!r} needs experts with SiLU, not {experts.act_fn}")
    if hasattr(experts, "parametrizations"):
        raise MixfuseError(
            "PEFT's own wrapper builds the full delta weight of every expert here; "
            "call mixfuse.train.model.expert_lora.attach(config) before the model is wrapped"
        )
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if torch.is_grad_enabled() and (gate_up.requires_grad or down.requires_grad):
        if lora:
            raise MixfuseError("the experts' base weights are trainable; with LoRA they must be frozen")
        plain: Tensor = grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
        return plain
    scales = scales_of(experts, "gate_up_proj"), scales_of(experts, "down_proj")
    out_TH = routed_products(
        hidden_states.to(gate_up.dtype), top_k_index, top_k_weights, gate_up, down, lora or {}, scales
    )
    return out_TH.to(hidden_states.dtype)
