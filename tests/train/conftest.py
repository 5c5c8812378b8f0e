"""The tiny base, adapters for it, and trained runs that several tests look at."""

from collections.abc import Callable
from pathlib import Path

import pytest
import train_harness as harness
from train_harness import Run


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random two-layer Mixtral with the embedded tokenizer."""
    from train.base import build

    out = tmp_path_factory.mktemp("tiny") / "base"
    build(out, tiny=True)
    return out


@pytest.fixture(scope="session")
def peft_adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves an adapter of the tiny base with PEFT alone: `peft_adapter(attention=…, experts=…)`; made once each."""
    made: dict[tuple[bool, bool], Path] = {}

    def make(*, attention: bool = True, experts: bool = True) -> Path:
        key = (attention, experts)
        if key not in made:
            made[key] = harness.save_adapter(
                tiny_base, tmp_path_factory.mktemp("peft") / "adapter", attention=attention, experts=experts
            )
        return made[key]

    return make


@pytest.fixture(scope="session")
def adapter_directory(
    tiny_base: Path, peft_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An exported adapter directory with attention and experts. Copy it before changing it."""
    from train.export import export

    out = tmp_path_factory.mktemp("exported") / "adapter"
    export(peft_adapter(), out, base=tiny_base)
    return out


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of recipes and runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def sft_recipe(runs: Path, tiny_base: Path) -> Path:
    return harness.sft_recipe(runs, tiny_base)


@pytest.fixture(scope="session")
def judge_recipe(runs: Path, tiny_base: Path) -> Path:
    return harness.judge_recipe(runs, tiny_base)


@pytest.fixture(scope="session")
def sft_by_one(sft_recipe: Path, runs: Path) -> Run:
    """SFT on one process, with Weights & Biases writing offline."""
    return harness.train("sft", sft_recipe, f"out={runs / 'sft_by_one'}", "wandb=offline")


@pytest.fixture(scope="session")
def sft_by_two(sft_recipe: Path, runs: Path) -> Run:
    return harness.train("sft", sft_recipe, f"out={runs / 'sft_by_two'}", "processes=2")


@pytest.fixture(scope="session")
def judge_by_one(judge_recipe: Path, runs: Path) -> Run:
    """DPO on one process, probed from inside: see `judge_probe.py`."""
    return harness.probe_judge(judge_recipe, runs / "judge_by_one")


@pytest.fixture(scope="session")
def judge_by_two(judge_recipe: Path, runs: Path) -> Run:
    return harness.train("judge", judge_recipe, f"out={runs / 'judge_by_two'}", "processes=2")
