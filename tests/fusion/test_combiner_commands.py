"""`mixfuse combiner fit`, `mixfuse eval fusion --pool`: what they print, write and refuse."""

import asyncio
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from combiner_pools import pool, row, write_pool
from fake_upstream import FakeUpstream, Script
from fusion_harness import StartGateway

from mixfuse.cli.entry import main
from mixfuse.contracts.files import write_jsonl
from mixfuse.fusion.combiner.artefact import load
from mixfuse.fusion.combiner.evidence import Question

KEYS = {
    "n", "best_member", "best_member_accuracy", "majority", "weighed", "oracle", "difference", "ece", "curve",
}  # fmt: skip
SHARED = Path(__file__).parents[3] / "shared" / "data"
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
        (["--price", "a=1", "--price", "a=2"], "--price names 'a' twice"),
        (["--price", "a=1e-300"], "the price of 'a' must be a number"),
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
    assert "--combiner goes with --pool" in refused(capsys, *words, "--data", str(data), "--combiner", "combiner.json")
    assert "--price goes with --pool" in refused(capsys, *words, "--data", str(data), "--price", "a=1")
    assert "fusion.yaml: --pool asks no model" in refused(capsys, *words, "--pool", str(data))


@pytest.mark.parametrize(
    "option",
    [
        ("--verifier", "number"), ("--split", "heldout"), ("--count", "100"), ("--modes", "best_of"),
        ("--choose-share", "0.3"), ("--temperature", "1"), ("--max-tokens", "5"), ("--concurrency", "4"),
    ],
)  # fmt: skip
def test_options_that_ask_models_are_refused_by_a_replay(
    data: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, str]
) -> None:
    assert refused(capsys, "eval", "fusion", "--pool", str(data), *option).startswith(
        f"mixfuse: error: {option[0]} asks models"
    )


def test_options_that_a_source_of_questions_does_not_heed_are_refused(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "fusion", "fusion.yaml"]
    assert "--limit goes with --data or --pool" in refused(capsys, *words, "--tasks", "tasks.yaml", "--limit", "3")
    assert "--count goes with --tasks" in refused(capsys, *words, "--data", str(data), "--count", "3")


def test_a_replay_heeds_its_limit_its_seed_and_its_folder(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "fusion", "--pool", str(data), "--json"]
    assert main([*words, "--limit", "80", "--seed", "3", "--out", str(tmp_path / "report")]) == 0
    printed = last_line(capsys)
    assert (printed["n"], printed["seed"]) == (80, 3)
    assert json.loads((tmp_path / "report" / "report.json").read_text())["n"] == 80
    out = tmp_path / "combiner.json"
    assert main(["combiner", "fit", str(data), "--out", str(out)]) == 0
    assert main([*words, "--combiner", str(out), "--limit", "50", "--out", str(tmp_path / "replay")]) == 0
    assert last_line(capsys)["n"] == 50
    written = json.loads((tmp_path / "replay" / "report.json").read_text())
    assert (written["n"], written["revision"], written["refitted"]) == (50, load(out).revision, False)
    assert "--seed is of the cross-validation" in refused(capsys, *words, "--combiner", str(out), "--seed", "1")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the recorded pools of ../shared/data are not here")
def test_recorded_pools_are_read_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, folder = tmp_path / "combiner.json", SHARED / "gsm8k_pool"
    assert main(["combiner", "fit", str(folder / "train.jsonl"), "--out", str(out), "--json"]) == 0
    fitted = last_line(capsys)
    assert (fitted["n"], fitted["agreement"], fitted["best_member"]) == (822, "number", "gpt-4-1106")
    for pool_, n in ((folder, 1000), (folder / "dev.jsonl", 178)):
        assert main(["eval", "fusion", "--pool", str(pool_), "--combiner", str(out), "--json"]) == 0
        replayed = last_line(capsys)
        assert replayed.keys() >= KEYS
        assert replayed["n"] == n


def judged_pool(path: Path, questions: list[Question], *, sure: float) -> Path:
    """The pool with verdicts on all pairs of answers of a judge that knows what is right."""
    rows = [row(question) for question in questions]
    for one in rows:
        marks = [response["correct"] for response in one["responses"]]
        one["verdicts"] = [
            {"first": first, "second": second, "score": 0.5 + sure * (marks[first] - marks[second])}
            for first, second in combinations(range(len(marks)), 2)
        ]
    write_jsonl(path, rows)
    return path


def test_best_of_is_replayed_from_recorded_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = pool(200, ACCURACIES)
    for sure, at_least in ((0.45, 0.9), (-0.45, 0.0)):
        path = judged_pool(tmp_path / f"{sure}.jsonl", questions, sure=sure)
        assert main(["eval", "fusion", "--pool", str(path), "--json"]) == 0
        found = last_line(capsys)
        assert found["best_of"]["n"] == 200
        if at_least:
            assert found["best_of"]["accuracy"] == pytest.approx(found["oracle"])
        else:
            assert found["best_of"]["accuracy"] < found["majority"]
    plain = write_pool(tmp_path / "plain.jsonl", questions)
    assert main(["eval", "fusion", "--pool", str(plain), "--json"]) == 0
    assert "best_of" not in last_line(capsys)


async def test_best_of_is_replayed_with_a_judge_that_is_asked(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream.models["gamma"] = Script(
        verdict=lambda first, second: 0.5 + 0.4 * (("(A)" in first) - ("(A)" in second)), logprobs=None
    )
    gateway = await start_gateway()
    path = write_pool(tmp_path / "pool.jsonl", pool(60, ACCURACIES))
    command = ["eval", "fusion", "--pool", str(path), "--judge", "gamma", "--url", gateway.url, "--json"]
    cached = [*command, "--cache", str(tmp_path / "verdicts.sqlite3")]
    assert await asyncio.to_thread(main, cached) == 0
    found = last_line(capsys)
    assert found["best_of"]["accuracy"] == pytest.approx(found["oracle"])
    asked = len(upstream.asked("gamma"))
    assert asked > 0
    assert await asyncio.to_thread(main, cached) == 0
    assert len(upstream.asked("gamma")) == asked
    capsys.readouterr()
    assert main(["eval", "fusion", "--pool", str(path), "--cache", "x"]) == 2
    assert "--cache goes with --judge" in capsys.readouterr().err
    assert main(["eval", "fusion", "--pool", str(path), "--url", gateway.url]) == 2
    assert "--url goes with --judge" in capsys.readouterr().err
