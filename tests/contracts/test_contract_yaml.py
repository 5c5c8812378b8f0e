"""YAML as people write it: numbers and booleans of YAML 1.2, and whatever means two things or nothing is one line."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from mixfuse.app.loop_config import LoopConfig
from mixfuse.app.pairs_spec import PairsSpec
from mixfuse.app.server import ServeConfig
from mixfuse.cli.entry import main
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import load, override, validate
from mixfuse.contracts.yaml_text import parse
from mixfuse.fusion.config import FusionConfig
from mixfuse.train.recipe import JudgeRecipe, SftRecipe, TrainRecipe

RECIPE = "base: models/tiny\nout: out\ndata: data.jsonl\ndeepspeed: zero3.json\n"
TRIES = int(os.environ.get("MIXFUSE_FUZZ_TRIES", "200"))


def sft(tmp_path: Path, text: str, *overrides: str) -> SftRecipe:
    (tmp_path / "r.yaml").write_text(RECIPE + text)
    return load(tmp_path / "r.yaml", SftRecipe, overrides)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("0o10", 8), ("0x10", 16), ("1e-4", 1e-4), ("1e3", 1000.0), ("-.5", -0.5), ("1:30", "1:30"),
        ("1_000", "1_000"), ("no", "no"), ("off", "off"), ("Yes", "Yes"), ("true", True), ("False", False), ("~", None),
        ("null", None), ("", None), ("2024-01-01", "2024-01-01"), ("=", "="), ("1.5.2", "1.5.2"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object):
    found = parse(f"a: {text}", "x")["a"]
    assert found == value
    assert type(found) is type(value)


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "x:3: .*the key 'a' stands twice"),
        ("a:\n  - {b: {c: 1, c: 2}}", "x:2: .*the key 'c' stands twice"),
        ("{0: a, 00: b}", "stands twice"),
        ('{0: a, "0": b}', "stands twice"),
        ("a: .inf", "x:1: .*no finite number"),
        ("a: -.INF", "no finite number"),
        ("a: .nan", "no finite number"),
        ("a: 1.0e400", "no finite number"),
        ("a: 99999999999999999999", "too large"),
        ("a: " + "9" * 5000, "too large"),
        ("a: 0x" + "f" * 30, "too large"),
        ("a: 1\n---\nb: 2", "x:2: .*a second document"),
        ("a:\n\tb: 1", "x:2: .*spaces, not tabs"),
        ("? {a: 1}\n: 2", "x:1: .*the key is a mapping"),
        ("1.5: 2", "the key '1.5' is a float"),
        ("{a: 2,0e-4}", "the key '0e-4' is a float"),
        ("null: 2", "the key 'null' is a null"),
        ('a: "\\ud800"', "half a surrogate"),
        ("a: \x07", "x:1: .*control character U\\+0007"),
        ("a: &a [*a]", "inside of what it refers to"),
        (LAUGHS, "expand beyond measure"),
        (MERGES, "expand beyond measure"),
        ("a: " + "[" * 150 + "]" * 150, "nested too deep"),
        ("[" * 50_000, "nested too deep"),
        ("a: *nothing", "undefined alias"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: !!int x", "no whole number"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!binary x", "not valid YAML"),
    ],
    ids=lambda value: value[:20],
)
def test_what_means_two_things_or_nothing_is_one_line(text: str, message: str):
    with pytest.raises(MixfuseError, match=message):
        parse(text, "x")


def test_references_are_read():
    assert parse("a: &o {x: 1}\nb: *o\nc: {<<: *o, x: 2}", "x") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 2}}


def test_a_key_is_overridden_once():
    assert override({}, ["a.b=1", "a.c=2", "ab=3"]) == {"a": {"b": 1, "c": 2}, "ab": 3}
    for twice in (["a=1", "a=2"], ["a.b=1", "a={b: 2}"], ["a={b: 2}", "a.b=1"]):
        with pytest.raises(MixfuseError, match="give a key once"):
            override({}, twice)


def test_paths_in_recipes_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/a")
    monkeypatch.setenv("MIXTRAL", "/m")
    recipe = sft(tmp_path, "optimizer: {steps: 2}", "base=${MIXTRAL}/8x7b", "out=~/out", "data=[$MIXTRAL/a.jsonl]")
    assert (recipe.base, recipe.out, recipe.data[0].path) == (Path("/m/8x7b"), Path("/home/a/out"), Path("/m/a.jsonl"))
    with pytest.raises(MixfuseError, match="'base': the environment variable NOT_SET_HERE"):
        sft(tmp_path, "optimizer: {steps: 2}", "base=$NOT_SET_HERE/x")


def bare_paths(model: Any) -> Iterator[str]:
    for name, field in model.model_fields.items():
        parts = [(field.annotation, bool(field.metadata))]
        while parts:
            kind, expanded = parts.pop()
            if get_origin(kind) is Annotated:
                parts.append((get_args(kind)[0], True))
            elif kind is Path and not expanded:
                yield f"{model.__name__}.{name}"
            elif isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from bare_paths(kind)
            else:
                parts += [(part, False) for part in get_args(kind)]


def test_every_path_of_a_config_is_expanded():
    """No config has a field of the bare type, so that a new key is expanded as well."""
    for model in (SftRecipe, JudgeRecipe, ServeConfig, FusionConfig, LoopConfig, PairsSpec):
        assert not list(bare_paths(model))


def test_a_dash_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for dash in "\u2013\u2014\u2212\u2011":
        with pytest.raises(MixfuseError, match=f"U\\+{ord(dash):04X}"):
            sft(tmp_path, "optimizer: {steps: 2}", f"optimizer.warmup{dash}steps=1")
        with pytest.raises(MixfuseError, match=f"U\\+{ord(dash):04X}"):
            sft(tmp_path, f"optimizer: {{steps: 2, learning_rate: 2e{dash}4}}")
        assert main(["tasks", "make", "tasks.yaml", f"{dash}out", "x.jsonl"]) == 2
        assert f"U+{ord(dash):04X}" in capsys.readouterr().err


ODD = st.text(alphabet="ab0:1e-.,[]{}&*<>!|?'\"#%@` \t\n\\~_xonyu\ud800\x00\x85\u2028", max_size=60)
TEXTS = st.text(max_size=6) | st.sampled_from(
    [
        "all",
        "none",
        "auto",
        "~",
        "$X",
        "$HOME",
        "${",
        "1e-4",
        "010",
        ".inf",
        "\ud800",
        "\0",
        "a" * 300,
        "\u2013",
        "../..",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
KEYS = (
    st.sampled_from(sorted({*SftRecipe.model_fields, *JudgeRecipe.model_fields, "path", "hub", "weight", "r"})) | TEXTS
)
VALUES = st.recursive(
    SCALARS | st.integers(-(10**40), 10**40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.integers(-1, 70), inner, max_size=3),
    max_leaves=8,
)
GOOD: dict[str, Any] = {
    "base": "b", "out": "o", "data": "d.jsonl", "deepspeed": "z.json", "optimizer": {"steps": 2}, "lora": {"r": 8},
}  # fmt: skip


@settings(max_examples=TRIES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([SftRecipe, JudgeRecipe]), st.dictionaries(KEYS, VALUES, max_size=4))
def test_no_recipe_ends_in_a_traceback(model: type[TrainRecipe], changes: dict[str, Any]):
    try:
        validate({**GOOD, **changes}, model, source="r.yaml")
    except MixfuseError as error:
        assert "\n" not in str(error)


@settings(max_examples=TRIES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.text(alphabet="ab0:1e-.,[]{}&*<>!|?'\"#%@` \t\n\\~_xonyu\ud800\x00\x85\u2028", max_size=60)
    | st.text(max_size=40)
)
def test_no_yaml_ends_in_a_traceback(text: str):
    try:
        parse(text, "x")
    except MixfuseError as error:
        assert "\n" not in str(error)


@settings(max_examples=TRIES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.builds("{}={}".format, st.text(max_size=4) | KEYS, st.text(max_size=12)), max_size=3))
def test_no_override_ends_in_a_traceback(overrides: list[str]):
    try:
        validate(override({**GOOD, "optimizer": {"steps": 2}}, overrides), SftRecipe, source="r.yaml")
    except MixfuseError as error:
        assert "\n" not in str(error)
