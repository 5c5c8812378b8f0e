"""Attention of concatenated documents in which each sees only itself, by kernels that come with torch.

It needs torch alone; `attention.py` registers `varlen` with transformers. On a GPU in bfloat16, `varlen` is torch's own
`varlen_attn` (torch 2.10), which runs FlashAttention's kernels. Elsewhere it is `scaled_dot_product_attention` for each
document. Neither makes a mask, whose size grows with the square of the tokens.

Dimensions in names: T tokens of all documents, A query heads, G key and value heads, D head size, N documents.
"""

# ruff: noqa: N803 - tensors are named with their dimensions

from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor


def has_kernel(like: Tensor) -> bool:
    """Whether `varlen_attn` runs for such a tensor: a GPU since Ampere (SM80), and two bytes per element."""
    return (
        like.is_cuda
        and like.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(like.device) >= (8, 0)
        and torch_has_varlen()
    )


def torch_has_varlen() -> bool:
    """Whether this torch has `varlen_attn`."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return True


def varlen(
    q_TAD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    ends_N: Tensor,
    longest: int,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention within each document.

    Args:
        q_TAD: Queries (T, A, D).
        k_TGD: Keys (T, G, D); A is a multiple of G.
        v_TGD: Values (T, G, D).
        ends_N: (N + 1,) int32: 0, and the end of each document.
        longest: Tokens of the longest document.
        scale: The factor of the products; 1 / √D by default.
        window: How many tokens a query sees, its own included; None for all before it.

    Returns:
        (T, A, D).
    """
    if has_kernel(q_TAD):
        from torch.nn.attention.varlen import varlen_attn

        ends = ends_N.to(q_TAD.device, torch.int32)
        # (-1, 0) is what `varlen_attn` takes for causal; its window counts the tokens before the query's own.
        seen = (-1, 0) if window is None or window >= longest else (window - 1, 0)
        out: Tensor = varlen_attn(
            q_TAD, k_TGD, v_TGD, ends, ends, longest, longest, scale=scale, window_size=seen, enable_gqa=True
        )
        return out
    begins = ends_N.tolist()
    parts = [
        _document(q_TAD[begin:end], k_TGD[begin:end], v_TGD[begin:end], scale, window)
        for begin, end in pairwise(begins)
    ]
    return torch.cat(parts)


def _document(q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Attention of one document, by torch's ordinary kernels."""
    mask = None
    if window is not None and window < len(q_TAD):
        places = torch.arange(len(q_TAD), device=q_TAD.device)
        before = places[:, None] - places
        mask = (before >= 0) & (before < window)
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q_TAD, k_TGD, v_TGD))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)
