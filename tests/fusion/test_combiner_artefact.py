"""The combiner's file: what is refused, each in one line that names it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from combiner_pools import pool

from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.combiner.artefact import BINS, MOST_MEMBERS, Combiner, load, save
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
        data[int(last) if isinstance(data, list) else last] = value

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
        (_set("members/a/weight", float("nan")), "members.a.weight"),
        (_set("unread", float("inf")), "'unread': Input should be a finite number"),
        (_set("members/a/accuracy", 1.5), "members.a.accuracy"),
        (_set("calibration", []), "calibration"),
        (_set("members", {}), "members"),
        (_set("members/a/weight", "1.5"), "members.a.weight"),
        (_set("members/a/weight", True), "members.a.weight"),
        (_set("members/a/weight", 1e4), "members.a.weight is 10000, and no fitted one is beyond ±1000"),
        (_set("policies/0/calibration/slope", 1e4), "policies[0].calibration.slope is 10000"),
        (_set("members/a/price", -1.0), "members.a.price"),
        (_set("members/a/price", 10**400), "members.a.price"),
        (_set("members/a\n", {"weight": 0.0, "accuracy": 0.5, "price": 1.0}), "is no name"),
        (_set("judges/\ud800", 1.0), "half of a surrogate pair"),
        (_set("counts", [0.1]), "counts has 1 values; 3 members need 2"),
        (_set("none/asked", [0.1]), "none.asked has 1 values; 3 members need 3"),
        (_set("calibration", [{"slope": 1.0}] * 2), "calibration has 2 values; 3 members need 3"),
        (_set("pairs/0/second", "a"), "the pair a is no pair"),
        (_set("pairs/1", {"first": "b", "second": "a", "weight": 0.1}), "the pair a and b is no pair, or stands twice"),
        (_set("policies/0/target", 0.95), "the targets of the policies do not rise"),
        (_set("policies/0/actions", {}), "asks nobody at the start"),
        (_set("policies/0/actions/", [""] * BINS), "asks nobody at the start"),
        (_set("data/marked", 10**6), "more complete or marked questions than there are"),
        (_set("figures/n", float("inf")), "figures.n is not a finite number"),
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


def test_more_members_than_a_request_can_wait_for_are_refused(fitted: Combiner, tmp_path: Path) -> None:
    data = json.loads(fitted.model_dump_json())
    data["members"] |= {f"m{number}": data["members"]["a"] for number in range(MOST_MEMBERS)}
    file = tmp_path / "combiner.json"
    file.write_text(json.dumps(data))
    with pytest.raises(MixfuseError, match="67 members, and a combiner has at most 64"):
        load(file)


def test_what_could_not_be_read_again_is_not_written(fitted: Combiner, tmp_path: Path) -> None:
    with pytest.raises(MixfuseError, match="unread is not a finite number"):
        save(fitted.model_copy(update={"unread": float("nan")}), tmp_path / "combiner.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "[]", "null", '{"version": 1', "3"])
def test_another_file_is_no_combiner(tmp_path: Path, text: str) -> None:
    file = tmp_path / "combiner.json"
    file.write_text(text)
    with pytest.raises(MixfuseError, match=str(file)) as error:
        load(file)
    assert "\n" not in str(error.value)
