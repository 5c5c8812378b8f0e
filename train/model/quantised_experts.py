"""The experts of a model, held as codes and scales (`quantised.py`) instead of weights.

An experts module keeps the names of its parameters: `gate_up_proj` holds codes, and `gate_up_proj_scales` beside it the
scales. `expert_lora.py` passes both to the products.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mixfuse.train.model.family_classes import experts_classes
from mixfuse.train.model.quantised import pack, shapes
from mixfuse.train.quantization import Quantization

SCALES = "_scales"
"""What the name of a parameter with scales ends with, after the name of the one with the codes."""
_WEIGHTS = ("gate_up_proj", "down_proj")


def scales_of(module: Any, name: str) -> nn.Parameter | None:
    """The scales of a module's parameter, or None if it is not quantised."""
    return getattr(module, name + SCALES, None)


@contextmanager
def built(kind: Quantization | None) -> Iterator[None]:
    """While this lasts, experts modules that are built get codes and scales, not yet filled, in place of weights.

    So ZeRO-3 partitions codes from the first: no process ever holds its share of the unquantised base. It uses torch's
    own hook on the registration of parameters.
    """

    def register(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter is None or name not in _WEIGHTS or not isinstance(module, experts_classes()):
            return None
        assert kind is not None  # noqa: S101
        kept = {"dtype": parameter.dtype, "device": parameter.device}
        codes, scales = (torch.empty(shape, **kept) for shape in shapes(parameter.shape, kind, parameter.dtype))
        return _held(module, name, codes, scales)

    hook: Any = register_module_parameter_registration_hook(register) if kind else nullcontext()
    with hook:
        yield


def quantise(model: nn.Module, kind: Quantization) -> None:
    """Packs the experts of a model that is whole in this process; in place, one weight after the other."""
    for module in model.modules():
        if isinstance(module, experts_classes()):
            for name in _WEIGHTS:
                weight = getattr(module, name).data
                codes, scales = (
                    torch.empty(shape, dtype=weight.dtype) for shape in shapes(weight.shape, kind, weight.dtype)
                )
                for expert in range(len(weight)):  # one at a time: packing takes a few times a weight's memory
                    codes[expert], scales[expert] = pack(weight[expert], kind, weight.dtype)
                delattr(module, name)
                module.register_parameter(name, _held(module, name, codes, scales))


def _held(module: nn.Module, name: str, codes: Tensor, scales: Tensor) -> nn.Parameter:
    """Registers the scales, and returns the parameter of the codes."""
    module.register_parameter(name + SCALES, nn.Parameter(scales, requires_grad=False))
    return nn.Parameter(codes, requires_grad=False)
