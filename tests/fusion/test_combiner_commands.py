"""`mixfuse combiner fit`, `mixfuse eval fusion --pool`: what they print, write and refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
from combiner_pools import pool, write_pool

from mixfuse.cli.entry import main
from mixfuse.fusion.combiner.artefact import load

KEYS = {
    "n", "best_member", "best_member_accuracy", "majority", "weighed", "oracle", "difference", "ece", "curve",
}  # fmt: skip
ACCURACIES = {"a": 0.7, "b": 0.65, "c": 0.65}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pool(tmp_path / "pool.jsonl", pool(200, ACCURACIES))


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The last line as JSON that has no NaN, which is not JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    parsed = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=refuse)
    assert isinstance(parsed, dict)
    return parsed


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(words) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    return message


def test_fit_writes_a_combiner_that_a_replay_reads(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "combiner.json"
    assert main(["combiner", "fit", str(data), "--out", str(out), "--json"]) == 0
    fitted = last_line(capsys)
    assert fitted.keys() >= KEYS
    assert set(fitted["difference"]) >= {"value", "low", "high"}
    assert all(point.keys() >= {"target", "accuracy", "cost_ratio"} for point in fitted["curve"])
    assert load(out).revision == fitted["revision"]
    other = write_pool(tmp_path / "other.jsonl", pool(300, ACCURACIES, seed=1))
    assert main(["eval", "fusion", "--pool", str(other), "--combiner", str(out), "--json"]) == 0
    replayed = last_line(capsys)
    assert replayed.keys() >= KEYS
    assert (replayed["n"], replayed["revision"]) == (300, fitted["revision"])
    assert replayed["weighed"] > replayed["best_member_accuracy"]


def test_without_a_combiner_the_replay_is_cross_validated(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "fusion", "--pool", str(data), "--json"]) == 0
    assert last_line(capsys).keys() >= KEYS


def test_a_best_member_that_costs_nothing_has_no_cost_ratio(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "combiner.json"
    prices = [word for name in "abc" for word in ("--price", f"{name}=0")]
    assert main(["combiner", "fit", str(data), "--out", str(out), *prices, "--json"]) == 0
    last_line(capsys)
    assert main(["eval", "fusion", "--pool", str(data), "--combiner", str(out), "--json"]) == 0
    assert {point["cost_ratio"] for point in last_line(capsys)["curve"]} == {None}


def test_only_the_members_named_are_fitted(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "combiner.json"
    words = ["combiner", "fit", str(data), "--out", str(out)]
    assert main([*words, "--members", "a", "c", "--price", "a=1", "--price", "c=2"]) == 0
    assert {name: member.price for name, member in load(out).members.items()} == {"a": 1.0, "c": 2.0}
    assert (
        main(["eval", "fusion", "--pool", str(data), "--combiner", str(out), "--price", "a=3", "--price", "c=1"]) == 0
    )
    assert "'z'" in refused(capsys, *words, "--members", "a", "z")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--price", "a=nan"], "the price of 'a' must be a number"),
        (["--price", "a=-1"], "the price of 'a' must be a number"),
        (["--price", "a=inf"], "the price of 'a' must be a number"),
        (["--price", "a=much"], "the price of 'a' must be a number"),
        (["--price", "a"], "not of the form NAME=DOLLARS"),
        (["--price", "a=1"], "there is no price of 'b'"),
        (["--price", "zed=1"], "no answer is of a member 'zed'"),
        (["--prices", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_wrong_price_is_refused_by_name(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    out = tmp_path / "combiner.json"
    assert message in refused(capsys, "combiner", "fit", str(data), "--out", str(out), *words)
    assert not out.exists()


def test_prices_come_from_a_file_and_words_win(data: Path, tmp_path: Path) -> None:
    prices, out = tmp_path / "prices.yaml", tmp_path / "combiner.json"
    prices.write_text("a: 1\nb: 2\nc: 3\n")
    words = ["combiner", "fit", str(data), "--out", str(out), "--prices", str(prices), "--price", "c=9"]
    assert main(words) == 0
    assert [load(out).members[name].price for name in "abc"] == [1.0, 2.0, 9.0]


def test_what_cannot_be_read_exits_with_2_and_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "combiner.json")
    assert "nowhere.jsonl" in refused(capsys, "combiner", "fit", "nowhere.jsonl", "--out", out)
    few = str(write_pool(tmp_path / "few.jsonl", pool(10, ACCURACIES)))
    assert "at least 30" in refused(capsys, "combiner", "fit", few, "--out", out)
    broken = tmp_path / "broken.json"
    broken.write_text('{"version": 7}')
    assert "version 7" in refused(capsys, "eval", "fusion", "--pool", str(data), "--combiner", str(broken))


def test_options_of_the_replay_are_refused_without_it(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "fusion", "fusion.yaml"]
    assert "--pool" in refused(capsys, *words, "--data", str(data), "--combiner", "combiner.json")
    assert "fusion.yaml: --pool asks no model" in refused(capsys, *words, "--pool", str(data))
