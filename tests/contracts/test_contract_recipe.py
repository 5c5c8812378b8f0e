"""Recipes are strict: every mistake is one line that names the key and the nearest right one."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import PositiveFloat, PositiveInt

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import Strict, load, validate


class Engine(Strict):
    model: str = "tiny"
    max_lora_rank: PositiveInt = 16


class Member(Strict):
    name: str
    temperature: float = 0.7


class Job(Strict):
    learning_rate: PositiveFloat = 1e-3
    steps: int = 1
    note: str | None = None
    engine: Engine = Engine()
    members: list[Member] = []
    roles: dict[str, Engine] = {}


def recipe(tmp_path: Path, text: str, *overrides: str) -> Job:
    (tmp_path / "job.yaml").write_text(text)
    return load(tmp_path / "job.yaml", Job, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", "unknown key 'learning_rte'; did you mean 'learning_rate'?"),
        ("engine: {max_rank: 1}", "unknown key 'engine.max_rank'; did you mean 'engine.max_lora_rank'?"),
        (
            "members: [{name: a}, {name: b, temprature: 1}]",
            "'members.1.temprature'; did you mean 'members.1.temperature'?",
        ),
        ("roles: {judge: {modle: x}}", "'roles.judge.modle'; did you mean 'roles.judge.model'?"),
        ("engine: {zzz: 1}", "unknown key 'engine.zzz'; known keys: max_lora_rank, model"),
        ("members: [{temperature: 1}]", "missing key 'members.0.name'"),
        ("learning_rate: -1", "'learning_rate': Input should be greater than 0 (got -1)"),
        ("engine: {max_lora_rank: many}", "'engine.max_lora_rank': Input should be a valid integer"),
        ("- a", "expected a mapping of keys, found list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_key(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(MixfuseError) as caught:
        recipe(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'job.yaml'}:")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_override_sets_one_key_and_leaves_its_neighbours(tmp_path: Path) -> None:
    text = "engine: {model: big, max_lora_rank: 8}"
    job = recipe(tmp_path, text, "engine.max_lora_rank=32", "steps=7", "note=null", "members=[{name: a}]")
    assert job.engine == Engine(model="big", max_lora_rank=32)
    assert (job.steps, job.note, job.members) == (7, None, [Member(name="a")])
    assert recipe(tmp_path, "", "engine.model=new").engine.model == "new"


@pytest.mark.parametrize("number", ["1e-4", "1.0e-4", "0.0001"])
def test_a_number_with_an_exponent_is_a_number(number: str, tmp_path: Path) -> None:
    assert recipe(tmp_path, "", f"learning_rate={number}").learning_rate == 1e-4
    assert recipe(tmp_path, f"learning_rate: {number}").learning_rate == 1e-4


def test_text_that_looks_like_a_number_is_text_in_quotes(tmp_path: Path) -> None:
    assert recipe(tmp_path, "", 'note="1e5"').note == "1e5"
    with pytest.raises(MixfuseError, match="'note'"):
        recipe(tmp_path, "", "note=1e5")
    assert recipe(tmp_path, "", "note=nan").note == "nan"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "not of the form key=value"),
        ("=1", "not of the form key=value"),
        ("engine..model=x", "not of the form key=value"),
        ("steps.more=1", "'steps' is not a group of keys"),
        ("steps=[", "the value is not valid YAML"),
        ("engin.model=x", "unknown key 'engin'; did you mean 'engine'?"),
    ],
)
def test_a_bad_override_is_named(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(MixfuseError) as caught:
        recipe(tmp_path, "steps: 1", override)
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(MixfuseError, match="nowhere: no such file"):
        load(tmp_path / "nowhere", Job)
    with pytest.raises(MixfuseError, match="is a folder"):
        load(tmp_path, Job)
    (tmp_path / "latin").write_bytes("note: é".encode("latin-1"))
    with pytest.raises(MixfuseError, match="latin:1: not valid YAML"):
        load(tmp_path / "latin", Job)


def test_a_recipe_does_not_change_once_loaded() -> None:
    job: Any = validate({}, Job, source="here")
    with pytest.raises(ValueError, match="frozen"):
        job.steps = 2
