"""Packed chats in each implementation of attention: the same as each chat alone, and what it costs.

The reference computes each chat alone in float32. The implementations: `sdpa`, with a mask over all pairs of tokens;
`flex`, torch's `flex_attention` with a mask of blocks; `varlen`, ours (`train/model/packed_attention.py`), with torch's
`varlen_attn` on a GPU; and `flash_attn`, where that package is installed.
"""

# ruff: noqa: N806 - tensors are named with their dimensions, as in train/model/packed_attention.py

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from gpu_checks.checking import Report, error, free, peak_bytes, seconds
from mixfuse.train.model import packed_attention

TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""Relative norm of an error. bfloat16 rounds the weights of a softmax and the result by 2⁻⁹ = 0.2 % each, and gradients
once more: below 1 % is expected. Chats that see one another change the result by about its own size."""
LEAK = 0.1
"""The least error of attention over the whole pack as one chat; otherwise the comparison could not find a leak."""


class Pack:
    """Queries, keys and values of several documents, and the gradient of the output."""

    def __init__(
        self, lengths: list[int], heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        random = torch.Generator(device).manual_seed(0)
        A, G, D = heads
        self.T, self.lengths, self.longest = sum(lengths), lengths, max(lengths)
        ends = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
        self.ends = torch.tensor(ends, dtype=torch.int32, device=device)
        self.document = torch.repeat_interleave(
            torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device)
        )
        shapes = ((self.T, A, D), (self.T, G, D), (self.T, G, D))
        # Queries and keys of size √3 make some tokens stand out in the softmax, as in a trained model.
        self.qkv = [torch.empty(s, dtype=dtype, device=device).normal_(0, 1.3, generator=random) for s in shapes]
        for tensor in self.qkv:
            tensor.requires_grad_()
        self.grad = torch.empty(shapes[0], dtype=dtype, device=device).normal_(generator=random)

    def heads_first(self) -> list[Tensor]:
        """Queries, keys and values as (1, heads, T, D)."""
        return [tensor.transpose(0, 1)[None] for tensor in self.qkv]


def check(report: Report) -> None:
    """Runs each implementation that is there."""
    device = report.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if report.small:
        pack = Pack([1, 37, 80, 10], (6, 2, 32), dtype, device)
    else:
        pack = Pack([1, 127, 1024, 3000, 4040, 8192], (48, 8, 128), dtype, device)
    expected = reference(pack)
    whole = error(attend_as_one(pack), expected["output"])
    report.expect(whole > LEAK, f"chats that see one another change the output by {whole:.2g} only")
    found = implementations(report, pack)
    times = {}
    for name, (attend, differentiable) in found.items():
        free(device)
        try:
            row = measured(report, pack, expected, attend, name, differentiable=differentiable)
        except torch.OutOfMemoryError as short:
            report.skipped[name] = f"out of memory: {str(short)[:120]}"
            continue
        if row["step_s"] is not None:
            times[name] = row["step_s"]
    if times:
        report.row(what="fastest", name=min(times, key=lambda name: times[name]), seconds=times)


def measured(
    report: Report, pack: Pack, expected: dict[str, Tensor], attend: Callable[[], Tensor], name: str, *,
    differentiable: bool,
) -> dict[str, Any]:  # fmt: skip
    """One implementation's errors, times and memory."""
    device, dtype = report.device, pack.grad.dtype

    def step() -> dict[str, Tensor]:
        out = attend()
        grads = torch.autograd.grad(out, pack.qkv, pack.grad)
        return {"output": out.detach(), **dict(zip(("q", "k", "v"), grads, strict=True))}

    def forward() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"output": attend()}

    once = step if differentiable else forward
    results = once()
    errors = {key: error(value, expected[key]) for key, value in results.items()}
    for key, value in errors.items():
        report.at_most(f"{name}: the error of {key}", value, TOLERANCES[dtype])
    return report.row(
        what=name, tokens=pack.T, chats=len(pack.lengths), dtype=str(dtype).removeprefix("torch."),
        error=max(errors.values()), forward_s=seconds(forward, device, rounds=3),
        step_s=seconds(step, device, rounds=3) if differentiable else None,
        peak_bytes=peak_bytes(once, device) if differentiable else None, mask_bytes=pack.T**2 if name == "sdpa" else 0,
    )  # fmt: skip


def implementations(report: Report, pack: Pack) -> dict[str, tuple[Callable[[], Tensor], bool]]:
    """What can run here, and whether its backward pass can."""

    def sdpa() -> Tensor:
        places = torch.arange(pack.T, device=report.device)
        mask = (pack.document[:, None] == pack.document) & (places[:, None] >= places)
        out = F.scaled_dot_product_attention(*pack.heads_first(), attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    def varlen() -> Tensor:
        return packed_attention.varlen(*pack.qkv, pack.ends, pack.longest)

    found: dict[str, tuple[Callable[[], Tensor], bool]] = {"sdpa": (sdpa, True), "varlen": (varlen, True)}
    # torch 2.13's flex_attention has no backward pass on a CPU, and its compiled kernels need Triton.
    found["flex"] = (flex(pack, report.device), report.device.type == "cuda")
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as missing:
        report.skipped["flash_attn"] = str(missing)
    else:
        ends, longest = pack.ends, pack.longest
        found["flash_attn"] = (
            lambda: flash_attn_varlen_func(*pack.qkv, ends, ends, longest, longest, causal=True),
            True,
        )
    return found


def flex(pack: Pack, device: torch.device) -> Callable[[], Tensor]:
    """`flex_attention` with a block mask of the documents; compiled on a GPU, as transformers compiles it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (pack.document[query] == pack.document[key]) & (query >= key)

    compiled = torch.compile(flex_attention) if device.type == "cuda" else flex_attention
    blocks = create_block_mask(visible, None, None, pack.T, pack.T, device=device, _compile=device.type == "cuda")

    def attend() -> Tensor:
        q, k, v = pack.heads_first()
        # The kernel wants a power of 2 of query heads for each key head; transformers repeats the keys, too.
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if device.type == "cpu":
            q, k, v = q.detach(), k.detach(), v.detach()
        return compiled(q, k, v, block_mask=blocks)[0].transpose(0, 1)

    return attend


def reference(pack: Pack) -> dict[str, Tensor]:
    """Each document alone, in float32, with its gradients."""
    qkv = [tensor.detach().float().requires_grad_() for tensor in pack.qkv]
    outputs = []
    begin = 0
    for length in pack.lengths:
        q, k, v = (tensor[begin : begin + length].transpose(0, 1)[None] for tensor in qkv)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1))
        begin += length
    out = torch.cat(outputs)
    grads = torch.autograd.grad(out, qkv, pack.grad.float())
    return {"output": out.detach(), **dict(zip(("q", "k", "v"), grads, strict=True))}


def attend_as_one(pack: Pack) -> Tensor:
    """The pack as one chat, which is what an implementation without boundaries would compute."""
    with torch.no_grad():
        out = F.scaled_dot_product_attention(*pack.heads_first(), is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)
