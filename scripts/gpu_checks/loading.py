"""A synthetic four-layer checkpoint: how fast it loads under ZeRO-3, training with CPU offload, and quantised weights.

Packing and unpacking need torch alone.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from gpu_checks.checking import Report, Skipped, error, seconds
from gpu_checks.small_runs import ROOT, make_base, make_recipe, relative, require_packages, train
from mixfuse.train.model import quantised
from mixfuse.train.quantization import Quantization

KINDS: dict[Quantization, float] = {"int8": 0.008, "nf4": 0.12}
"""Relative norm of the error. The largest of 64 normal weights is about 2.4 standard deviations, so a step of int8 is
2.4 / 127 of one, and its rounding error 1/√12 of that: 0.5 %. NF4's sixteen levels leave about 9 %."""
OFFLOADED = {"cuda": 2e-2, "cpu": 1e-5}
"""Relative difference of losses: the same numbers from another place. bfloat16 on a GPU as in `four_layers.py`."""
QUANTISED_LOSS = 0.05
"""Relative difference of the losses of five steps on random weights, whose outputs change by about 1 %."""


def check(report: Report) -> None:
    """Quantises one expert's weight, then trains from a checkpoint in three ways."""
    weights(report)
    try:
        require_packages()
    except Skipped as missing:
        report.skipped["training"] = str(missing)
        return
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        base = make_base(Path(folder) / "base", report)
        recipe = make_recipe(base, report)
        steps = "optimizer.steps=3"
        plain = train(recipe, "plain", steps)
        load = float(plain.facts["load_s"])
        report.row(what="loading", bytes=base.bytes, seconds=load, gb_per_second=base.bytes / load / 1e9)
        offload = ROOT / "configs" / "deepspeed" / "zero3_cpu_offload.json"
        moved = train(recipe, "offloaded", steps, f"deepspeed={offload}")
        difference = relative(moved.series("loss"), plain.series("loss"))
        report.row(
            what="CPU offload", loss_difference=difference, peak_bytes=max(moved.facts["peaks"]),
            peak_bytes_without=max(plain.facts["peaks"]), step_s=moved.facts["step_s"][-1],
            step_s_without=plain.facts["step_s"][-1],
        )  # fmt: skip
        report.at_most("the loss with CPU offload", difference, OFFLOADED[report.device.type])
        for kind in KINDS:
            small = train(recipe, kind, steps, f"quantization={kind}")
            difference = relative(small.series("loss"), plain.series("loss"))
            report.row(
                what=f"training with experts in {kind}", loss_difference=difference,
                peak_bytes=max(small.facts["peaks"]), peak_bytes_without=max(plain.facts["peaks"]),
                step_s=small.facts["step_s"][-1], step_s_without=plain.facts["step_s"][-1],
            )  # fmt: skip
            report.at_most(f"the loss with experts in {kind}", difference, QUANTISED_LOSS)


def weights(report: Report) -> None:
    """The error and the speed of one expert's weight in int8 and NF4, beside the weight itself."""
    device = report.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    wide, inner, tokens = (640, 800, 16) if report.small else (6144, 16384, 4096)
    random = torch.Generator(device).manual_seed(0)
    weight = torch.empty(inner, wide, dtype=dtype, device=device).normal_(0, 0.02, generator=random)
    x = torch.empty(tokens, wide, dtype=dtype, device=device).normal_(generator=random)
    exact = x.float() @ weight.float().T
    plain = seconds(lambda: x @ weight.T, device, rounds=3)
    for name, limit in KINDS.items():
        packed = quantised.pack(weight, name, dtype)
        found = error(x @ quantised.unpack(*packed).T, exact)

        def restore(packed: tuple[Tensor, Tensor] = packed) -> Tensor:
            return quantised.unpack(*packed)

        took = seconds(restore, device, rounds=3)
        report.row(
            what=name, error=found, bytes=sum(tensor.nbytes for tensor in packed), bytes_without=weight.nbytes,
            restore_s=took, restored_gb_per_second=weight.nbytes / took / 1e9, product_s=plain,
        )  # fmt: skip
        report.at_most(f"{name}: the error of a product", found, limit)
