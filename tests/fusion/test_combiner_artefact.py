"""The combiner's file: what is refused, each in one line that names it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from combiner_pools import pool

from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.combiner.artefact import BINS, Combiner, load, save
from mixfuse.fusion.measure.combiner_fit import fit_combiner


@pytest.fixture(scope="module")
def fitted() -> Combiner:
    return fit_combiner(pool(300, {"a": 0.7, "b": 0.7, "c": 0.7}), "choice")


def test_a_combiner_is_read_as_it_was_written(fitted: Combiner, tmp_path: Path) -> None:
    save(fitted, tmp_path / "combiner.json")
    assert load(tmp_path / "combiner.json") == fitted
    assert load(tmp_path / "combiner.json").revision == fitted.revision
    assert len(fitted.revision) == 12


def test_the_revision_changes_with_any_weight(fitted: Combiner) -> None:
    assert fitted.model_copy(update={"unread": fitted.unread + 1e-6}).revision != fitted.revision


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        *folders, last = path.split("/")
        for name in folders:
            data = data[int(name)] if isinstance(data, list) else data[name]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("surprise", 1), "surprise"),
        (_set("members/a/wieght", 1.0), "wieght"),
        (_set("version", 2), "version 2 of the combiner's format; this program reads 1"),
        (_set("best_member", "nobody"), "no member is called 'nobody'"),
        (_set("policies/0/actions/", ["nobody"] * BINS), "no member is called 'nobody'"),
        (_set("policies/0/actions/nobody", ["a"] * BINS), "no member is called 'nobody'"),
        (_set("policies/0/actions/a", ["b"] * (BINS - 1)), f"has no {BINS} bins after 'a'"),
        (_set("policies/0/actions/a", ["a"] * BINS), "asks 'a' again after 'a'"),
        (_set("policies/0/actions/b+a", ["c"] * BINS), "'b+a' out of the members' order"),
        (_set("members/a/weight", float("nan")), "not a finite number"),
        (_set("unread", float("inf")), "not a finite number"),
        (_set("members/a/accuracy", 1.5), "members.a.accuracy"),
        (_set("calibration", []), "calibration"),
        (_set("members", {}), "members"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    fitted: Combiner, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = json.loads(fitted.model_dump_json())
    change(data)
    file = tmp_path / "combiner.json"
    file.write_text(json.dumps(data))
    with pytest.raises(MixfuseError) as error:
        load(file)
    assert message in str(error.value)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"version": 1', "3"])
def test_another_file_is_no_combiner(tmp_path: Path, text: str) -> None:
    file = tmp_path / "combiner.json"
    file.write_text(text)
    with pytest.raises(MixfuseError, match=str(file)) as error:
        load(file)
    assert "\n" not in str(error.value)
