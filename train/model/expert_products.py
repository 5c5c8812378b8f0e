"""The products of a mixture's experts with their LoRA, forward and backward, and what they save in between.

It needs torch alone: no PEFT and no transformers. `expert_lora.py` joins it to both. Where the device has a grouped
product, one call computes all experts; elsewhere each expert's rows are multiplied on their own.

Dimensions in names: T tokens, K experts per token, S = T·K token-expert pairs sorted by expert, E experts, C adapted
(chosen) experts, H hidden size, I intermediate size, R rank; M is the width of a projection's input, N of its output,
and n the number of rows in one segment.
"""

# ruff: noqa: N803, N806 - tensors are named with their dimensions

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixfuse.train.model.quantised import unpack
from mixfuse.train.quantization import QUANTIZATION_BLOCK


class Factors(NamedTuple):
    """The LoRA of one 3-D expert parameter, which its wrapper passes to the implementation.

    Attributes:
        a: (C·R, M), expert-major: `a.view(C, R, M)`.
        b: (N, R·C), rank-major: `b.view(N, R, C)`. Both are PEFT's layout (peft 0.21, `ParamWrapper.get_delta_weight`).
        scale: alpha / R, or alpha / √R for rsLoRA.
        experts: The C adapted experts, ascending; None for all experts.
        dropout: The dropout probability on the adapter's input; 0 outside training.
    """

    a: Tensor
    b: Tensor
    scale: float
    experts: tuple[int, ...] | None = None
    dropout: float = 0.0


def routed_products(  # noqa: PLR0917 - the order of `experts_forward`
    x_TH: Tensor,
    index_TK: Tensor,
    gates_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    lora: Mapping[str, Factors],
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Sends every token through its K experts and adds the low-rank products.

    Args:
        x_TH: (T, H), in the dtype of the weights.
        index_TK: (T, K) expert numbers.
        gates_TK: (T, K) gate weights.
        gate_up: (E, 2·I, H), frozen; or its codes (`quantised.py`).
        down: (E, H, I), frozen; or its codes.
        lora: The factors of `gate_up_proj` and `down_proj`; one that is missing is not adapted.
        scales: The scales of `gate_up` and `down` if these are codes.

    Returns:
        (T, H): for each token the sum over its experts of gate weight · down(silu(gate(x)) · up(x)).
    """
    with torch.no_grad():
        experts_S, order_S = torch.sort(index_TK.flatten(), stable=True)
        numbers_E = torch.arange(len(gate_up), device=order_S.device)
        # The end of each expert's rows; bincount would wait for the device.
        ends_E = torch.searchsorted(experts_S, numbers_E, right=True).to(torch.int32)
    tensors: list[Tensor | None] = []
    settings: list[_Setting] = []
    for name in ("gate_up_proj", "down_proj"):
        factors = lora.get(name)
        tensors += [None, None] if factors is None else [factors.a, factors.b]
        settings.append(_setting(factors, len(gate_up)))
    with _without_autocast(x_TH):
        out_TH: Tensor = _Experts.apply(
            x_TH,
            gates_TK,
            order_S,
            ends_E,
            gate_up,
            down,
            *scales,
            *tensors,
            _Constants(settings[0], settings[1]),
        )
    return out_TH


class _Setting(NamedTuple):
    """A projection's LoRA without its tensors. `seed` is for the dropout masks of this forward pass."""

    scale: float
    experts: tuple[int, ...]
    dropout: float
    seed: int


class _Constants(NamedTuple):
    """The arguments of `_Experts` that are not tensors."""

    gate_up: _Setting
    down: _Setting


def _setting(factors: Factors | None, experts: int) -> _Setting:
    if factors is None:
        return _Setting(0.0, (), 0.0, 0)
    chosen = tuple(range(experts)) if factors.experts is None else factors.experts
    # From the CPU's generator: gradient checkpointing restores its state before it repeats the forward pass.
    seed = int(torch.randint(1 << 62, ())) if factors.dropout else 0
    return _Setting(factors.scale, chosen, factors.dropout, seed)


class _Experts(torch.autograd.Function):
    """Both projections of the experts with their LoRA. Saves the input; per segment, gate_up's output and two (n, R).

    A segment is finished before the next one starts, so that on a CPU an expert's rows are still in the cache when the
    low-rank products read and write them.

    The weights are saved as the parameters themselves. ZeRO-3 empties a parameter after forward and fills it again for
    backward. A view of the parameter, which F.linear or grouped_mm would save, would keep the gathered weight of every
    layer in memory. Backward computes no gradient for the weights. Dropout masks are drawn again instead of saved.

    The gradient of a gate weight needs no saved output: for a linear y = L(h), ⟨g, L(h)⟩ = ⟨Lᵀ(g), h⟩, and Lᵀ(g) is
    the gradient of h.
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
        gate_up_scales: Tensor | None,
        down_scales: Tensor | None,
        a1: Tensor | None,
        b1: Tensor | None,
        a2: Tensor | None,
        b2: Tensor | None,
        constants: _Constants,
    ) -> Tensor:
        weight1, weight2 = _Weight(gate_up, gate_up_scales), _Weight(down, down_scales)
        segments = _segments(ends_E, x_TH, weight2.width)
        lora1 = _Lora(a1, b1, constants.gate_up, segments, x_TH)
        lora2 = _Lora(a2, b2, constants.down, segments, x_TH)
        tokens_S = order_S // gates_TK.shape[1]
        gates_S = gates_TK.flatten().index_select(0, order_S)
        sums = _TokenSums(x_TH, order_S, tokens_S, segments)
        saved: list[Tensor | None] = []
        for segment in segments:
            x = x_TH.index_select(0, tokens_S[segment.rows])
            h, u = _project(segment, x, weight1, lora1)
            gate, up = h.chunk(2, -1)
            y, v = _project(segment, F.silu(gate).mul_(up), weight2, lora2)
            sums.add(segment, y.mul_(gates_S[segment.rows, None]))
            saved += [h, u, v]
        weights = (gate_up, down, gate_up_scales, down_scales)
        ctx.save_for_backward(x_TH, gates_TK, order_S, ends_E, *weights, a1, b1, a2, b2, *saved)
        ctx.constants = constants
        return sums.total()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> Any:
        x_TH, gates_TK, order_S, ends_E, gate_up, down, scales1, scales2, a1, b1, a2, b2, *saved = ctx.saved_tensors
        constants: _Constants = ctx.constants
        with _without_autocast(grad_TH):
            weight1, weight2 = _Weight(gate_up, scales1), _Weight(down, scales2)
            segments = _segments(ends_E, x_TH, weight2.width)
            lora1 = _Lora(a1, b1, constants.gate_up, segments, x_TH)
            lora2 = _Lora(a2, b2, constants.down, segments, x_TH)
            tokens_S = order_S // gates_TK.shape[1]
            gates_S = gates_TK.flatten().index_select(0, order_S).to(x_TH.dtype)
            sums = _TokenSums(x_TH, order_S, tokens_S, segments)
            grad_gates_S = torch.empty_like(gates_S)
            for segment, h, u, v in zip(segments, saved[::3], saved[1::3], saved[2::3], strict=True):
                tokens, gates = tokens_S[segment.rows], gates_S[segment.rows, None]
                grad_y = grad_TH.index_select(0, tokens)
                gate, up = h.chunk(2, -1)
                active = F.silu(gate)
                act = active * up
                # The gradient before the gate weight is applied; the gate weight's own gradient needs this one.
                grad_act = _project_back(segment, grad_y, act, v, weight2, lora2, gates)
                grad_gates_S[segment.rows] = torch.linalg.vecdot(grad_act, act)
                grad_act.mul_(gates)
                grad_h = torch.empty_like(h)
                grad_gate, grad_up = grad_h.chunk(2, -1)
                torch.mul(grad_act, active, out=grad_up)
                torch.ops.aten.silu_backward.grad_input(grad_act.mul_(up), gate, grad_input=grad_gate)
                if ctx.needs_input_grad[0] or lora1.adapts(segment):
                    x = x_TH.index_select(0, tokens)
                    sums.add(segment, _project_back(segment, grad_h, x, u, weight1, lora1, None))
            grad_gates = torch.empty_like(grad_gates_S).scatter_(0, order_S, grad_gates_S).view_as(gates_TK)
        return (
            sums.total() if ctx.needs_input_grad[0] else None,
            grad_gates.to(gates_TK.dtype),
            *(None,) * 6,
            *lora1.gradients(),
            *lora2.gradients(),
            None,
        )


class _Weight(NamedTuple):
    """A projection's base weight, as the parameters that hold it.

    Attributes:
        stored: (E, N, M), the weights or their codes.
        scales: The codes' scales.
    """

    stored: Tensor
    scales: Tensor | None

    @property
    def width(self) -> int:
        """M."""
        return int(self.stored.shape[-1] if self.scales is None else self.scales.shape[-1] * QUANTIZATION_BLOCK)

    def of(self, segment: "_Segment") -> Tensor:
        """Returns the weights of the segment's expert (N, M), or of all (E, N, M), in the type of the activations."""
        stored = segment.of(self.stored)
        return stored if self.scales is None else unpack(stored, segment.of(self.scales))


class _Segment(NamedTuple):
    """Rows that are multiplied in one call: the rows of one expert, or the rows of all experts in a grouped product.

    Attributes:
        rows: The segment's part of the S sorted rows.
        expert: The expert; None if the segment holds the rows of all experts.
        ends: (E,) the end of each expert's rows.
    """

    rows: slice
    expert: int | None
    ends: Tensor

    def of(self, stack: Tensor) -> Tensor:
        """Returns the expert's matrix of a stack (E, ...), or the whole stack for all experts."""
        return stack if self.expert is None else stack[self.expert]

    def times(self, x: Tensor, w: Tensor) -> Tensor:
        """Multiplies each row by its expert's matrix."""
        return torch.mm(x, w) if self.expert is not None else F.grouped_mm(x, w, offs=self.ends)

    def add_times(self, y: Tensor, x: Tensor, w: Tensor) -> None:
        """Adds the product of each row and its expert's matrix to `y`, in place."""
        if self.expert is not None:
            y.addmm_(x, w)
        else:
            y.add_(self.times(x, w))

    def outer(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        """Writes xᵀ y over an expert's rows: (M, N); or (E, M, N) for all experts, zero for an expert without rows."""
        if self.expert is not None:
            torch.mm(x.t(), y, out=out)
            return
        product: Tensor = F.grouped_mm(x.t(), y, offs=self.ends)
        counts_E = torch.diff(self.ends, prepend=self.ends.new_zeros(1))
        out.copy_(product.masked_fill_((counts_E == 0)[:, None, None], 0))


def _segments(ends_E: Tensor, x_TH: Tensor, inner: int) -> list[_Segment]:
    """Returns one segment if the device has a grouped product, else one for each expert that has rows."""
    if _has_grouped_product(x_TH, inner):
        return [_Segment(slice(None), None, ends_E)]
    ends = ends_E.tolist()
    starts = [0, *ends[:-1]]
    return [
        _Segment(slice(start, end), expert, ends_E)
        for expert, (start, end) in enumerate(zip(starts, ends, strict=True))
        if end > start
    ]


def _without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Disables autocast, so that products keep the dtype of their factors. The meta device has no autocast."""
    return nullcontext() if like.is_meta else torch.autocast(device_type=like.device.type, enabled=False)


def _has_grouped_product(x_TH: Tensor, inner: int) -> bool:
    """Whether torch 2.13 has a grouped kernel: bfloat16, SM80 and newer, rows of a multiple of 16 bytes.

    The meta device, on which the full size is tested, has no rows to count, so it takes a GPU's path.
    """
    return x_TH.is_meta or bool(
        x_TH.is_cuda
        and x_TH.dtype == torch.bfloat16
        and x_TH.shape[1] % 8 == 0
        and inner % 8 == 0
        and torch.cuda.get_device_capability(x_TH.device) >= (8, 0)
    )


class _Lora:
    """A projection's A and B as one matrix per expert, for one pass over the segments. Collects their gradients.

    If one segment holds all experts, experts without a LoRA have zeros, and the rank is padded to a multiple of 8 for
    the grouped kernels.
    """

    def __init__(
        self, a: Tensor | None, b: Tensor | None, setting: _Setting, segments: list[_Segment], like: Tensor
    ) -> None:
        self._a, self._b, self._scale, self._dropout = a, b, setting.scale, setting.dropout
        self._places: dict[int | None, int] = {}
        if a is None or b is None:
            return
        count = len(setting.experts)
        # PEFT also computes in the base's dtype (`get_delta_factors`); its adapters are float32 on a bfloat16 base.
        a_CRM = a.view(count, -1, a.shape[1]).to(like.dtype)
        b_CNR = b.view(b.shape[0], -1, count).permute(2, 0, 1).to(like.dtype, memory_format=torch.contiguous_format)
        b_CNR = b_CNR * setting.scale
        self._rank, self._experts = a_CRM.shape[1], list(setting.experts)
        if any(segment.expert is None for segment in segments):
            self._places = {None: 0}
            experts, rank = len(segments[0].ends), -(-self._rank // 8) * 8
            whole_ERM = a_CRM.new_zeros(experts, rank, a_CRM.shape[2])
            whole_ENR = b_CNR.new_zeros(experts, b_CNR.shape[1], rank)
            whole_ERM[self._experts, : self._rank] = a_CRM
            whole_ENR[self._experts, :, : self._rank] = b_CNR
            a_CRM, b_CNR = whole_ERM[None], whole_ENR[None]
        else:
            self._places = {expert: place for place, expert in enumerate(self._experts)}
        self._a_matrices, self._b_matrices = a_CRM.unbind(), b_CNR.unbind()
        self._grads: tuple[Tensor, Tensor] | None = None
        self._random = torch.Generator(like.device).manual_seed(setting.seed) if setting.dropout else None

    def adapts(self, segment: _Segment) -> bool:
        """Whether this projection has a LoRA for rows of the segment."""
        return segment.expert in self._places

    def matrices(self, segment: _Segment) -> tuple[Tensor, Tensor]:
        """Returns A (R, M) and B · scale (N, R) of a segment's expert; or (E, R, M) and (E, N, R) for all experts."""
        place = self._places[segment.expert]
        return self._a_matrices[place], self._b_matrices[place]

    def mask(self, x: Tensor) -> Tensor | None:
        """Draws the next segment's dropout mask, of 0 and 1 / (1 - p), in the shape of `x`; backward draws the same."""
        if self._random is None:
            return None
        probability = 1 - self._dropout
        return torch.empty_like(x).bernoulli_(probability, generator=self._random).div_(probability)

    def collect(self, segment: _Segment, grad_u: Tensor, x: Tensor, u: Tensor, grad: Tensor) -> None:
        """Stores the gradients of the segment's A, grad_uᵀ x, and of its B without the scale, uᵀ grad."""
        if self._grads is None:
            # B's gradient is (C, R, N), because the product is faster in this orientation.
            a, b = self._a_matrices[0], self._b_matrices[0].mT
            self._grads = a.new_zeros(len(self._a_matrices), *a.shape), b.new_zeros(len(self._b_matrices), *b.shape)
        place = self._places[segment.expert]
        segment.outer(grad_u, x, self._grads[0][place])
        segment.outer(u, grad, self._grads[1][place])

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Returns the gradients in the layout of PEFT's A (C·R, M) and B (N, R·C); zero for an expert without rows."""
        if self._a is None or self._b is None:
            return None, None
        if self._grads is None:  # none of the adapted experts has rows
            return torch.zeros_like(self._a), torch.zeros_like(self._b)
        a_CRM, b_CRN = self._grads
        if None in self._places:
            a_CRM, b_CRN = a_CRM[0, self._experts, : self._rank], b_CRN[0, self._experts, : self._rank]
        return (
            a_CRM.reshape_as(self._a).to(self._a.dtype),
            b_CRN.permute(2, 1, 0).reshape_as(self._b).to(self._b.dtype).mul_(self._scale),
        )


def _project(segment: _Segment, x: Tensor, weight: _Weight, lora: _Lora) -> tuple[Tensor, Tensor | None]:
    """Computes one projection with its LoRA: the output (n, N), and dropout(x) Aᵀ (n, R) for backward."""
    y = segment.times(x, weight.of(segment).mT)
    if not lora.adapts(segment):
        return y, None
    a, b = lora.matrices(segment)
    mask = lora.mask(x)
    u = segment.times(x if mask is None else x * mask, a.mT)
    segment.add_times(y, u, b.mT)
    return y, u


def _project_back(  # noqa: PLR0917 - the order of `_project`, then what backward adds
    segment: _Segment,
    grad: Tensor,
    x: Tensor,
    u: Tensor | None,
    weight: _Weight,
    lora: _Lora,
    gates: Tensor | None,
) -> Tensor:
    """Computes the gradient of a projection's input (n, M), and stores the gradients of A and B in `lora`.

    Args:
        segment: The rows.
        grad: (n, N), the gradient of the output; with `gates`, of the output multiplied by its gate weight.
        x: (n, M), the input.
        u: (n, R), dropout(x) Aᵀ.
        weight: The base weight.
        lora: The LoRA.
        gates: (n, 1), the rows' gate weights. They are part of A's and B's gradients, not of the returned one.
    """
    grad_x = segment.times(grad, weight.of(segment))
    if u is None:
        return grad_x
    a, b = lora.matrices(segment)
    mask = lora.mask(x)
    grad_u = segment.times(grad, b)
    if mask is None:
        segment.add_times(grad_x, grad_u, a)
    else:
        grad_x.addcmul_(segment.times(grad_u, a), mask)
        x = x * mask
    if gates is not None:
        grad_u, u = grad_u * gates, u * gates
    lora.collect(segment, grad_u, x, u, grad)
    return grad_x


class _TokenSums:
    """Sums each token's K rows in a fixed order on every device."""

    def __init__(self, x_TH: Tensor, order_S: Tensor, tokens_S: Tensor, segments: list[_Segment]) -> None:
        self._order, self._tokens = order_S, tokens_S
        self._by_expert = all(segment.expert is not None for segment in segments)
        self._total = torch.zeros_like(x_TH) if self._by_expert else None
        self._k = len(order_S) // max(1, len(x_TH))

    def add(self, segment: _Segment, y: Tensor) -> None:
        """Adds the rows (n, H) of a segment."""
        if self._by_expert:
            # A token occurs once among an expert's rows, so the result does not depend on the order of additions.
            assert self._total is not None  # noqa: S101
            self._total.index_add_(0, self._tokens[segment.rows], y)
        else:
            numbers_S = torch.arange(len(self._order), device=y.device)
            inverse_S = torch.empty_like(self._order).scatter_(0, self._order, numbers_S)
            self._total = y[inverse_S].view(-1, self._k, y.shape[1]).sum(1)

    def total(self) -> Tensor:
        """Returns the sums, (T, H)."""
        assert self._total is not None  # noqa: S101
        return self._total
