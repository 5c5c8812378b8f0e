"""The number formats in which a recipe can hold its frozen experts, and what they take. It imports nothing heavy.

`train/model/quantised.py` packs and unpacks them.
"""

from typing import Literal, NamedTuple

Quantization = Literal["int8", "nf4"]
QUANTIZED_BITS: dict[Quantization, int] = {"int8": 8, "nf4": 4}
"""Bits of a weight, without its share of a scale."""
QUANTIZATION_BLOCK = 64
"""Weights, side by side in a row, that have one scale."""
CHANGING_KEYS = ("zero_quantized_weights", "stage3_use_all_reduce_for_fetch_params")
"""DeepSpeed's keys of `zero_optimization` that make a gather more than a copy of bytes, and so would change codes."""

WEIGHTS_AT_ONCE = 1 << 24
"""Weights that are unpacked in one go, so that what this takes beside the result is small."""
LOOKED_UP_BYTES = 2
"""An NF4 weight's share of the int32 with which two of them are looked up."""


class Experts(NamedTuple):
    """How frozen experts are held.

    Attributes:
        quantization: The format; None for the run's own type.
        w: Bytes of an element of the run's own type.
    """

    quantization: Quantization | None = None
    w: int = 4

    def elements(self, weights: int) -> dict[str, int]:
        """Elements of the run's own type that hold so many weights, by the suffix of the parameter's name."""
        if self.quantization is None:
            return {"": weights}
        codes = weights * QUANTIZED_BITS[self.quantization] // (8 * self.w)
        return {"_scales": weights // QUANTIZATION_BLOCK, "": codes}

    def unpacking_bytes(self) -> float:
        """Bytes of the GPU's memory that unpacking one weight reads and writes (`train/model/quantised.py: unpack`).

        int8: code and weight. NF4: code, its int32 written and read, its value written and read, weight.
        """
        if self.quantization is None:
            return 0.0
        code = QUANTIZED_BITS[self.quantization] / 8
        return code + self.w + (2 * LOOKED_UP_BYTES + 2 * self.w if self.quantization == "nf4" else 0)
