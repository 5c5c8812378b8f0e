"""The DeepSpeed configs that a CPU can run give the losses of plain ZeRO-3."""

import json
from pathlib import Path

import pytest
import train_harness as harness
from train_harness import PROJECT, Run

pytestmark = [pytest.mark.zero3, pytest.mark.slow]

CONFIGS = PROJECT / "configs" / "deepspeed"


def smaller_nodes(folder: Path, size: int) -> Path:
    """zero3_hpz.json with nodes of `size` processes instead of 8."""
    config = json.loads((CONFIGS / "zero3_hpz.json").read_text())
    config["zero_optimization"]["zero_hpz_partition_size"] = size
    (folder / "hpz.json").write_text(json.dumps(config))
    return folder / "hpz.json"


def assert_equal(run: Run, plain: Run) -> None:
    assert run.series("loss") == pytest.approx(plain.series("loss"), rel=1e-3)
    assert run.series("grad_norm") == pytest.approx(plain.series("grad_norm"), rel=1e-2)
    weights = run.weights()
    for name, weight in plain.weights().items():
        assert (weights[name] - weight).abs().max() <= 1e-2 * weight.abs().max() + 1e-5, name


def test_parameters_in_the_hosts_memory(sft_recipe: Path, runs: Path, sft_by_two: Run) -> None:
    keys = [f"out={runs / 'offloaded'}", "processes=2", f"deepspeed={CONFIGS / 'zero3_cpu_offload.json'}"]
    assert_equal(harness.train("sft", sft_recipe, *keys), sft_by_two)


def test_a_second_partition_inside_each_of_two_nodes(sft_recipe: Path, runs: Path, sft_by_one: Run) -> None:
    """Four processes as two nodes of two."""
    batch = "optimizer={steps: 8, batch_size: 4, micro_batch: 1, learning_rate: 1e-2, warmup_steps: 0}"
    keys = [f"out={runs / 'hpz'}", "processes=4", f"deepspeed={smaller_nodes(runs, 2)}", batch]
    assert_equal(harness.train("sft", sft_recipe, *keys), sft_by_one)
