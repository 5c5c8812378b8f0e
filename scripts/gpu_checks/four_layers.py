"""Four layers of Mixtral 8x22B (10 B parameters) with random weights, trained under ZeRO-3 by the real trainer.

Twenty packed steps beside the plan; the first steps again without checkpointing; and a run that is killed after a
checkpoint and continued.
"""

import tempfile
from pathlib import Path

import torch

from gpu_checks.checking import Report
from gpu_checks.small_runs import Base, Ran, make_base, make_recipe, relative, require_packages, train

PLAN = 0.03
"""The plan's goal for the peak on a GPU. A CPU counts every storage, and `benchmarks/plan.py` allows 5 % there."""
PLAN_ON_CPU = 0.05
SAME = {"cuda": 2e-2, "cpu": 1e-4}
"""Relative difference of losses and gradient norms that should be equal. In float32 they differ by the order of sums.
In bfloat16 on a GPU the order changes from run to run, by a rounding of 0.4 % that training carries on."""
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "B200": 2250}
"""Dense bfloat16, by a part of the card's name; the makers' data sheets."""


def check(report: Report) -> None:
    """Trains on a base that is written to a temporary folder."""
    require_packages()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        base = make_base(Path(folder) / "base", report)
        recipe = make_recipe(base, report)
        steps = (6, 2) if report.small else (20, 10)
        options = (f"optimizer.steps={steps[0]}", f"save_every={steps[1]}")
        whole = train(recipe, "whole", *options)
        beside_the_plan(report, base, recipe, whole)
        checkpointing(report, recipe, whole)
        resume(report, recipe, whole, options, steps[1])


def beside_the_plan(report: Report, base: Base, recipe_path: Path, ran: Ran) -> None:
    """The peak of the steps after the second, beside the plan of the batch that made it; speed."""
    from mixfuse.contracts.families import shape_of
    from mixfuse.contracts.family import active_parameters
    from mixfuse.contracts.files import read_json
    from mixfuse.contracts.strict_yaml import load
    from mixfuse.train.planning.training_plan import Batch, Hardware, plan
    from mixfuse.train.recipe import RECIPES

    recipe = load(recipe_path, RECIPES["sft"])
    cuda = report.device.type == "cuda"
    hardware = Hardware(nodes=1, gpus=1, gpu_bytes=1 << 40, cuda=cuda)
    planned = plan(recipe, base.config, read_json(recipe.deepspeed), hardware, batch=Batch(*ran.facts["batch"]))
    peak = max(ran.facts["peaks"][2:])
    # The time of a row is that of its step alone: nothing is evaluated, and checkpoints are not counted.
    speed = sorted(ran.series("tokens_per_second")[2:])[len(ran.steps[2:]) // 2]
    # Forward, and the gradient of the inputs; frozen weights have none of their own. Recomputing is no use of the card.
    operations = 4 * active_parameters(shape_of(base.config))
    peak_tflops = next((t for name, t in PEAK_TFLOPS.items() if name in _card(report)), None)
    report.row(
        what="training", parameters=planned.base_parameters, attention=ran.facts["attention"],
        batch=ran.facts["batch"], steps=len(ran.steps),
        first_loss=ran.steps[0]["loss"], last_loss=ran.steps[-1]["loss"],
        tokens_per_second=speed, tflops=speed * operations / 1e12,
        mfu=speed * operations / 1e12 / peak_tflops if peak_tflops else None,
        peak_bytes=peak, planned_peak_bytes=planned.gpu_total, planned_at=planned.peak.name,
    )  # fmt: skip
    off = planned.gpu_total / peak - 1
    limit = PLAN if cuda else PLAN_ON_CPU
    report.expect(abs(off) <= limit, f"the plan is {off:+.1%} of the measured peak; the goal is {limit:.0%}")
    report.expect(ran.steps[-1]["loss"] < ran.steps[0]["loss"], "the loss did not fall")


def checkpointing(report: Report, recipe: Path, whole: Ran) -> None:
    """The same first steps without checkpointing: the same losses and gradients, for more memory."""
    plain = train(recipe, "plain", "gradient_checkpointing=false", "optimizer.steps=3")
    count = len(plain.steps)
    # Of the rows, those before the learning rates part: the schedule depends on the number of steps.
    loss = relative(plain.series("loss")[:1], whole.series("loss")[:1])
    norm = relative(plain.series("grad_norm")[:1], whole.series("grad_norm")[:1])
    report.row(
        what="without checkpointing", steps=count, loss_difference=loss, grad_norm_difference=norm,
        peak_bytes=max(plain.facts["peaks"][2:]), step_s=plain.facts["step_s"][-1],
        step_s_with_checkpointing=whole.facts["step_s"][2],
    )  # fmt: skip
    report.at_most("the loss without checkpointing", loss, SAME[report.device.type])
    report.at_most("the gradient norm without checkpointing", norm, SAME[report.device.type])


def resume(report: Report, recipe: Path, whole: Ran, options: tuple[str, ...], saved: int) -> None:
    """A run that is killed after its first checkpoint and started again has the losses of the whole run."""
    train(recipe, "again", *options, kill_after=saved)
    again = train(recipe, "again", *options)
    difference = relative(again.series("loss"), whole.series("loss"))
    weights = _difference(again.out, whole.out)
    report.row(
        what="resumed", after=saved, steps=len(again.steps), loss_difference=difference, adapter_difference=weights
    )
    report.expect(len(again.facts["peaks"]) == len(whole.steps) - saved, "the run did not continue from its checkpoint")
    report.at_most("the resumed run's loss", difference, SAME[report.device.type])


def _difference(ours: Path, theirs: Path) -> float:
    """The largest difference between two adapters' weights, relative to the largest weight."""
    from safetensors.torch import load_file

    a, b = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (ours, theirs))
    largest = max(float(tensor.abs().max()) for tensor in b.values())
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in b) / largest


def _card(report: Report) -> str:
    return torch.cuda.get_device_name(report.device) if report.device.type == "cuda" else ""
