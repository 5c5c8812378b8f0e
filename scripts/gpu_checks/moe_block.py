"""One MoE block of Mixtral 8x22B with LoRA on its experts, forward and backward, on three paths.

`grouped` is ours with one grouped product for all experts. `per_expert` is ours with one product for each. `peft` is
PEFT's `target_parameters` on transformers' own block. All are compared with a reference that is none of them: each
expert on its own in float32, with autograd's gradients.
"""

# ruff: noqa: N803, N806 - tensors are named with their dimensions, as in train/model/expert_products.py

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from gpu_checks.checking import Report, error, free, peak_bytes, seconds
from mixfuse.train.model import expert_products
from mixfuse.train.model.expert_products import Factors, routed_products

TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""Relative norm of an error. bfloat16 rounds each of about five results in a row by up to 2⁻⁹ = 0.2 % and products are
summed in float32, so 0.5 to 1 % is expected and twice that is refused; float32 rounds by 6e-8, times the square root of
the length of a sum."""
PLAN = 1.10
"""How far the peak may lie above the plan's formula."""


class Sizes(NamedTuple):
    """The sizes of the block, by the symbols of `docs/planning.md`."""

    H: int
    I: int  # noqa: E741
    E: int
    K: int
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]


FULL = Sizes(H=6144, I=16384, E=8, K=2, tokens=(1, 4096, 16384), ranks=(4, 16))
SMALL = Sizes(H=64, I=96, E=8, K=2, tokens=(1, 96), ranks=(4, 16))


class Case(NamedTuple):
    """The inputs and outputs' gradient of one case, and the LoRA."""

    x: Tensor
    index: Tensor
    gates: Tensor
    grad: Tensor
    factors: dict[str, Factors]


def routing(kind: str, T: int, sizes: Sizes, device: torch.device, random: torch.Generator) -> Tensor:
    """Expert numbers (T, K): `uniform` over all experts, `one` expert for all tokens (K = 1), `half` without tokens."""
    if kind == "one":
        return torch.full((T, 1), sizes.E - 1, device=device)
    used = sizes.E if kind == "uniform" else sizes.E // 2
    return torch.rand(T, used, generator=random, device=device).topk(sizes.K, -1).indices


def check(report: Report) -> None:
    """Runs all cases."""
    sizes = SMALL if report.small else FULL
    device = report.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, std, generator=random)

    weights = (
        normal(sizes.E, 2 * sizes.I, sizes.H, std=sizes.H**-0.5),
        normal(sizes.E, sizes.H, sizes.I, std=sizes.I**-0.5),
    )
    for T in sizes.tokens:
        for kind in ("uniform", "one", "half"):
            for r in sizes.ranks:
                index = routing(kind, T, sizes, device, random)
                gates = torch.rand(index.shape, generator=random, device=device).softmax(-1).requires_grad_()
                factors = {
                    # Float32 factors on a bfloat16 base, as PEFT has them; B is not zero, as after some steps.
                    name: Factors(
                        normal(sizes.E * r, wide, std=wide**-0.5).float().requires_grad_(),
                        normal(out, r * sizes.E, std=0.3 * r**-0.5).float().requires_grad_(),
                        scale=2.0,
                    )
                    for name, wide, out in (
                        ("gate_up_proj", sizes.H, 2 * sizes.I),
                        ("down_proj", sizes.I, sizes.H),
                    )
                }
                case = Case(
                    normal(T, sizes.H, std=1).requires_grad_(), index, gates, normal(T, sizes.H, std=1), factors
                )
                compare(report, sizes, weights, case, kind=kind, r=r)
                free(device)


def compare(report: Report, sizes: Sizes, weights: tuple[Tensor, Tensor], case: Case, *, kind: str, r: int) -> None:
    """Runs one case on each path and adds a row for each."""
    device, dtype = case.x.device, case.x.dtype
    expected = reference(weights, case)
    T, K = case.index.shape
    for path, (compute, context) in paths(report, weights, case).items():
        with context():
            found = gradients(compute, case)
            errors = {name: error(found[name], value) for name, value in expected.items()}
            del found
            forward = seconds(partial(no_grad, compute), device, rounds=3)
            both = seconds(partial(gradients, compute, case), device, rounds=3)
            peak = peak_bytes(partial(gradients, compute, case), device)
        # Two operations for each weight and row; backward computes the inputs' gradient, not the frozen weights'.
        operations = 2 * T * K * 3 * sizes.H * sizes.I
        planned = planned_peak(sizes, T, K, r, case) if path == "grouped" else None
        report.row(
            path=path, T=T, routing=kind, r=r, dtype=str(dtype).removeprefix("torch."), error=max(errors.values()),
            forward_s=forward, step_s=both, forward_tflops=operations / forward / 1e12,
            step_tflops=2 * operations / both / 1e12, peak_bytes=peak, planned_peak_bytes=planned,
        )  # fmt: skip
        for name, value in errors.items():
            report.at_most(f"{path}, T {T}, {kind}, r {r}: the error of {name}", value, TOLERANCES[dtype])
        if planned and T > sizes.E:  # with fewer rows the kernels' own small buffers outweigh what the plan counts
            report.at_most(f"grouped, T {T}, {kind}, r {r}: peak over plan", peak / planned, PLAN)


def paths(
    report: Report, weights: tuple[Tensor, Tensor], case: Case
) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Any]]]:
    """Each path's computation, with the setting that it runs in."""

    def ours() -> Tensor:
        return routed_products(case.x, case.index, case.gates, *weights, case.factors)

    found: dict[str, tuple[Callable[[], Tensor], Callable[[], Any]]] = {
        "grouped": (ours, lambda: grouped(True)),
        "per_expert": (ours, lambda: grouped(False)),
    }
    try:
        theirs = peft_block(weights, case)
    except ImportError as missing:
        report.skipped["peft"] = str(missing)
    else:
        found["peft"] = (theirs, lambda: grouped(False))
    return found


@contextmanager
def grouped(use: bool) -> Iterator[None]:
    """Makes our products take the grouped path, or one expert at a time, whatever the device would choose."""
    chosen = expert_products._has_grouped_product
    expert_products._has_grouped_product = lambda *_: use
    try:
        yield
    finally:
        expert_products._has_grouped_product = chosen


def peft_block(weights: tuple[Tensor, Tensor], case: Case) -> Callable[[], Tensor]:
    """Transformers' experts with PEFT's own LoRA on their parameters, which shares the case's weights and factors."""
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    gate_up, down = weights
    config = MixtralConfig(
        hidden_size=down.shape[1], intermediate_size=down.shape[2], num_local_experts=len(down),
        num_experts_per_tok=case.index.shape[1], experts_implementation="grouped_mm",
    )  # fmt: skip
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
    experts.down_proj = nn.Parameter(down, requires_grad=False)
    block = nn.ModuleDict({"experts": experts})
    r = case.factors["down_proj"].b.shape[1] // len(down)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(block, LoraConfig(r=r, lora_alpha=2 * r, target_modules=[], target_parameters=names))
    for wrapper in (module for module in model.modules() if hasattr(module, "parameter_name")):
        factors = case.factors[wrapper.parameter_name]
        wrapper.lora_A["default"].weight = nn.Parameter(factors.a)
        wrapper.lora_B["default"].weight = nn.Parameter(factors.b)
    wrapped = {module.parameter_name: module for module in model.modules() if hasattr(module, "parameter_name")}
    outer = model.base_model.model["experts"]

    def compute() -> Tensor:
        out: Tensor = outer(case.x, case.index, case.gates.to(case.x.dtype))
        return out

    compute.own = {  # type: ignore[attr-defined]  # where PEFT's own parameters collect their gradients
        name: (wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight) for name, wrapper in wrapped.items()
    }
    return compute


def gradients(compute: Callable[[], Tensor], case: Case) -> dict[str, Tensor]:
    """The output and the gradients of the input, of the gate weights and of all factors."""
    leaves = {"x": case.x, "gates": case.gates}
    own: Mapping[str, tuple[Tensor, Tensor]] = getattr(compute, "own", {})
    for name, factors in case.factors.items():
        a, b = own.get(name, (factors.a, factors.b))
        leaves |= {f"{name}.A": a, f"{name}.B": b}
    out = compute()
    grads = torch.autograd.grad(out, list(leaves.values()), case.grad)
    return {"output": out.detach(), **dict(zip(leaves, grads, strict=True))}


def no_grad(compute: Callable[[], Tensor]) -> Tensor:
    """A forward pass alone."""
    with torch.no_grad():
        return compute()


def reference(weights: tuple[Tensor, Tensor], case: Case) -> dict[str, Tensor]:
    """The same in float32, one expert after the other, by plain multiplication and autograd."""
    experts = len(weights[0])
    x, gates = case.x.detach().float().requires_grad_(), case.gates.detach().clone().requires_grad_()
    leaves = {"x": x, "gates": gates}
    for name, factors in case.factors.items():
        leaves |= {f"{name}.{side}": getattr(factors, side.lower()).detach().clone().requires_grad_() for side in "AB"}
    total = torch.zeros_like(x)
    for expert in range(experts):
        tokens, places = (case.index == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        rows = x[tokens]

        def project(rows: Tensor, name: str, weight: Tensor, expert: int = expert) -> Tensor:
            a = leaves[f"{name}.A"].view(experts, -1, rows.shape[1])[expert]
            b = leaves[f"{name}.B"].view(weight.shape[1], -1, experts)[..., expert]
            return rows @ weight[expert].float().T + (rows @ a.T) @ b.T * case.factors[name].scale

        gate, up = project(rows, "gate_up_proj", weights[0]).chunk(2, -1)
        y = project(F.silu(gate) * up, "down_proj", weights[1]) * gates[tokens, places, None]
        (y * case.grad[tokens].float()).sum().backward()
        total.index_add_(0, tokens, y.detach())
    zero = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    return {"output": total, **{name: zero[name] if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}}


def planned_peak(sizes: Sizes, T: int, K: int, r: int, case: Case) -> int | None:
    """What `mixfuse plan` counts for this block alone: what it saves, and the larger of its two work spaces.

    Less what exists before the measurement: the input, and what the plan counts of the norm and the router. More the
    gradients of the factors, which the plan counts among the partitions.
    """
    try:
        from mixfuse.contracts.family import Shape
        from mixfuse.train.planning import memory
        from mixfuse.train.recipe import Lora
    except ImportError:
        return None
    shape = Shape(L=1, H=sizes.H, I=sizes.I, E=sizes.E, K=K, A=1, G=1, D=1, V=1, tied=False, qk_norm=False)
    batch, lora, w = memory.Batch(1, T), Lora(r=r), case.x.element_size()
    saved = w * T * K * (2 * sizes.I + 2 * r) + T * K * 2 * memory.INT64
    work = max(
        memory.moe_forward_workspace(shape, batch, w, cuda=True),
        memory.moe_backward_workspace(shape, batch, w, lora, cuda=True),
    )
    factors = sum(f.a.nbytes + f.b.nbytes for f in case.factors.values())
    return saved + work + factors
