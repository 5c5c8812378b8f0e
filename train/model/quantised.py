"""Weights in 8 or 4 bits with a scale for each block of 64, as frozen experts may be held, and their way back.

It needs torch alone. `load.py` packs a base's experts, and `expert_products.py` unpacks them where it multiplies.

- `int8`: a weight is code · scale, with codes from -127 to 127.
- `nf4`: a weight is one of the 16 values of QLoRA's 4-bit NormalFloat (arXiv 2305.14314, appendix E) · scale.

The bytes are held in a tensor of the run's own type, 2 or 4 of them in each element, and so are the scales. Everything
between here and there only copies them: ZeRO-3 partitions and gathers such a parameter like any other, so that gathers
shrink with the weights. (bitsandbytes calls this `bnb_4bit_quant_storage`.) Their value as numbers means nothing.

Dimensions in names: N the width of a projection's output, M of its input, Z the elements that hold a row's M codes.
"""

# ruff: noqa: N806 - tensors are named with their dimensions

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from mixfuse.train.quantization import QUANTIZATION_BLOCK, QUANTIZED_BITS, WEIGHTS_AT_ONCE, Quantization

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""QLoRA's 16 values: about equally many weights of a normal distribution, scaled by a block's largest, fall to each."""


def shapes(shape: Sequence[int], kind: Quantization, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes in which weights of a shape (…, M) are held: of the codes (…, Z), and of the scales (…, M / 64)."""
    *outer, width = shape
    return (*outer, width * QUANTIZED_BITS[kind] // (8 * dtype.itemsize)), (*outer, width // QUANTIZATION_BLOCK)


def pack(weight: Tensor, kind: Quantization, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rounds each weight to the nearest code.

    Args:
        weight: (…, M), M a multiple of 64.
        kind: The codes.
        dtype: The type in which codes and scales are held.

    Returns:
        The codes (…, Z) and the scales (…, M / 64).
    """
    blocks = weight.float().unflatten(-1, (-1, QUANTIZATION_BLOCK))
    largest = blocks.abs().amax(-1)
    scales = (largest / 127 if kind == "int8" else largest).to(dtype)
    # By the scale as it is held, so that its rounding is no error of its own.
    units = blocks / scales.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    if kind == "int8":
        codes = units.round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8).flatten(-2)
    else:
        values = torch.tensor(NF4, device=weight.device)
        nearest = torch.bucketize(units, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8).flatten(-2)
        codes = nearest[..., ::2] << 4 | nearest[..., 1::2]
    return codes.contiguous().view(dtype), scales


def unpack(codes: Tensor, scales: Tensor) -> Tensor:
    """The weights (…, M), in the type of codes (…, Z) and scales (…, M / 64)."""
    outer, width = scales.shape[:-1], scales.shape[-1] * QUANTIZATION_BLOCK
    codes_NZ, scales_NB = codes.reshape(-1, codes.shape[-1]).view(torch.uint8), scales.reshape(-1, scales.shape[-1], 1)
    weight_NBC = torch.empty(*scales_NB.shape[:2], QUANTIZATION_BLOCK, dtype=codes.dtype, device=codes.device)
    pairs = None
    if codes_NZ.shape[-1] != width:
        values = torch.tensor(NF4, dtype=codes.dtype, device=codes.device)
        pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)  # of the two weights in a byte
    rows = max(1, WEIGHTS_AT_ONCE // width)
    for start in range(0, len(codes_NZ), rows):
        part = slice(start, start + rows)
        units = codes_NZ[part].view(torch.int8) if pairs is None else F.embedding(codes_NZ[part].int(), pairs)
        out = weight_NBC[part]
        torch.mul(units.reshape(out.shape), scales_NB[part], out=out)
    return weight_NBC.view(*outer, width)
