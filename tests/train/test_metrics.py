"""Every run leaves metrics.jsonl and a picture; Weights & Biases holds the same where it is asked for."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from train_harness import SFT_STEPS, Run

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import load
from mixfuse.train.recipe import SftRecipe
from mixfuse.train.stages import training_metrics

zero3 = pytest.mark.zero3


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: LevelDB's log format after a header of 7 bytes.

    A block holds 32 KiB; a chunk in it is a checksum (4 bytes), a length (2), a type (1: whole, 2: first, 3: middle,
    4: last) and the data; less than 7 bytes at a block's end are left empty.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def read_wandb(run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The config and the history of a run, from the files that Weights & Biases wrote offline."""
    (folder,) = (run.out / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return config, history


@zero3
def test_the_wandb_run_reads_back_as_the_metrics_on_disk(sft_by_one: Run) -> None:
    config, history = read_wandb(sft_by_one)
    assert config["recipe"]["optimizer"]["steps"] == SFT_STEPS
    logged = [row for row in history if "train/loss" in row]
    assert len(logged) == SFT_STEPS
    keys = ("loss", "learning_rate", "grad_norm", "aux_loss", "tokens_per_second", "expert_load_max", "num_tokens")
    for row, local in zip(logged, sft_by_one.steps, strict=True):
        assert row["train/global_step"] == local["step"]
        assert {key: row[f"train/{key}"] for key in keys} == {key: local[key] for key in keys}
    evaluations = [row["eval/loss"] for row in history if "eval/loss" in row]
    assert evaluations == [row["eval_loss"] for row in sft_by_one.evaluations]


@zero3
def test_wandb_writes_nothing_where_it_is_disabled(sft_by_two: Run) -> None:
    assert not (sft_by_two.out / "wandb").exists()


def test_going_online_without_a_key_is_one_line(
    sft_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    recipe = load(sft_recipe, SftRecipe, [f"out={tmp_path / 'run'}", "wandb=online"])
    with pytest.raises(MixfuseError, match=r"wandb: online: .*; log in with `wandb login`, or write wandb: offline"):
        training_metrics.start_wandb(recipe, resumed=False)


@zero3
def test_every_step_says_how_fast_and_how_evenly_it_ran(sft_by_one: Run, sft_by_two: Run, judge_by_two: Run) -> None:
    for run in (sft_by_one, sft_by_two, judge_by_two):
        for row in run.steps:
            assert row["tokens_per_second"] > 0
            assert row["expert_load_max"] >= 1 >= row["expert_load_min"] >= 0
    # The same tokens through the same routers, counted over both processes.
    assert sft_by_two.series("num_tokens") == sft_by_one.series("num_tokens")
    assert sft_by_two.series("expert_load_max")[0] == pytest.approx(sft_by_one.series("expert_load_max")[0], abs=0.05)


@zero3
def test_every_run_leaves_a_picture(sft_by_two: Run, judge_by_two: Run) -> None:
    from matplotlib.image import imread

    for run in (sft_by_two, judge_by_two):
        picture = imread(run.out / "metrics.png")
        height, width, _ = picture.shape
        assert min(height, width) > 300
        assert picture[..., :3].std() > 0.02, "the picture is blank"


def test_a_picture_shows_what_was_logged_and_only_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[tuple[str, list[int], list[float]]] = []
    plot = Axes.plot

    def spy(self: Any, steps: Any, values: Any, **keys: Any) -> Any:
        drawn.append((keys["label"], steps, values))
        return plot(self, steps, values, **keys)

    monkeypatch.setattr(Axes, "plot", spy)
    training_metrics.draw(tmp_path)
    assert not (tmp_path / "metrics.png").exists()
    rows = [{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.0, "grad_norm": 1.0}, {"step": 2, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training_metrics.draw(tmp_path)
    assert drawn == [("loss", [1, 2], [2.0, 1.0]), ("eval_loss", [0], [3.0]), ("grad_norm", [1], [1.0])]
    assert (tmp_path / "metrics.png").is_file()
