"""The tiny base, adapters for it, and trained runs that several tests look at."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import train_harness as harness
from train_harness import Run


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random two-layer Mixtral with the embedded tokenizer."""
    from mixfuse.train.model.embedded_base import build

    out = tmp_path_factory.mktemp("tiny") / "base"
    build(out, tiny=True)
    return out


@pytest.fixture(scope="session")
def embedded() -> Any:
    """The embedded tokenizer. Copy it before changing it."""
    from mixfuse.train.model.embedded_base import load_embedded_tokenizer

    return load_embedded_tokenizer()


@pytest.fixture
def tokenizer(embedded: Any) -> Any:
    """The embedded tokenizer, for this test alone."""
    return copy.deepcopy(embedded)


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
    from mixfuse.train.adapters.export import export

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
    evaluation = harness.evaluated(sft_recipe, every=3, micro_batch=4)
    return harness.train("sft", sft_recipe, f"out={runs / 'sft_by_one'}", "wandb=offline", evaluation)


@pytest.fixture(scope="session")
def sft_by_two(sft_recipe: Path, runs: Path) -> Run:
    evaluation = harness.evaluated(sft_recipe, every=3)
    return harness.train("sft", sft_recipe, f"out={runs / 'sft_by_two'}", "processes=2", evaluation)


@pytest.fixture(scope="session")
def stopped_early(sft_recipe: Path, runs: Path) -> Run:
    """SFT on two processes that learns its own chats by heart and so gets worse on others; the best is kept."""
    evaluation = harness.evaluated(sft_recipe, every=2, patience=2)
    wild = "optimizer={steps: 40, batch_size: 4, micro_batch: 2, learning_rate: 0.1, warmup_steps: 4}"
    return harness.train("sft", sft_recipe, f"out={runs / 'stopped_early'}", "processes=2", wild, evaluation)


@pytest.fixture(scope="session")
def judge_by_one(judge_recipe: Path, runs: Path) -> Run:
    """DPO on one process, probed from inside: see `judge_probe.py`."""
    return harness.probe_judge(judge_recipe, runs / "judge_by_one")


@pytest.fixture(scope="session")
def judge_by_two(judge_recipe: Path, runs: Path) -> Run:
    return harness.train("judge", judge_recipe, f"out={runs / 'judge_by_two'}", "processes=2")
