"""Judge evaluation: figures whose answer is known beforehand, the three data shapes, and what is refused."""

import asyncio
import json
import math
import re
import xml.etree.ElementTree
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import StartGateway
from reading_pages import every_value_missing_from, page_text
from rich.console import Console

from mixfuse.cli.entry import main
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import read_jsonl
from mixfuse.contracts.judge_protocol import Calibration
from mixfuse.fusion.calls.upstream import Endpoint
from mixfuse.fusion.measure.comparisons import Comparison, load
from mixfuse.fusion.measure.eval_judge import all_cached, evaluate
from mixfuse.fusion.measure.judge_report import JudgeReport, compared
from mixfuse.fusion.measure.judge_report import report as report_on
from mixfuse.fusion.measure.marks import Views
from mixfuse.fusion.store.cache import Cache

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is absent (../shared/data)")

# Half the better answers stand first; in half the pairs the better one is the longer.
PAIRS = [
    Comparison("p1", "good", "bad but longer", "first", ("strong", "weak")),
    Comparison("p1", "bad but longer", "good", "second", ("weak", "strong")),
    Comparison("p2", "good, and longer", "bad", "first", ("strong", "weak")),
    Comparison("p3", "bad", "good, and longer", "second", ("strong", "weak")),
]


async def judged(upstream: FakeUpstream, rows: list[Comparison] | None = None) -> JudgeReport:
    endpoint = Endpoint(upstream.base_url, "judge")
    return await evaluate(endpoint, PAIRS if rows is None else rows, concurrency=3, progress=False)


async def test_a_judge_that_knows(upstream: FakeUpstream) -> None:
    upstream.models["judge"].verdict = lambda first, _second: 0.9 if "good" in first else 0.1
    report = await judged(upstream)
    assert report.both_orders_correct == report.first_order == report.order_averaged == (1, 1, 1)
    assert report.consistency.value == 1
    assert (report.n, report.prompts, report.parse_failures) == (4, 3, 0)


async def test_a_judge_that_always_says_a(upstream: FakeUpstream) -> None:
    upstream.models["judge"].verdict = lambda _first, _second: 0.9
    report = await judged(upstream)
    assert report.first_order.value == 0.5
    assert report.both_orders_correct == report.consistency == (0, 0, 0)
    assert report.order_averaged.value == 0.5


async def test_a_judge_that_is_always_wrong_is_consistent(upstream: FakeUpstream) -> None:
    upstream.models["judge"].verdict = lambda first, _second: 0.1 if "good" in first else 0.9
    report = await judged(upstream)
    assert (report.both_orders_correct.value, report.order_averaged.value, report.consistency.value) == (0, 0, 1)


async def test_a_judge_right_in_one_order_only_by_confidence(upstream: FakeUpstream) -> None:
    # Says A always, but surer where A is right: wrong in both orders together, right on the average of them.
    upstream.models["judge"].verdict = lambda first, _second: 0.95 if "good" in first else 0.6
    report = await judged(upstream)
    assert (report.both_orders_correct.value, report.order_averaged.value) == (0, 1)


async def test_verdicts_that_cannot_be_read_are_counted(upstream: FakeUpstream) -> None:
    upstream.models["judge"] = Script(logprobs={"Hm": -0.1})
    report = await judged(upstream)
    assert report.parse_failures == 8
    assert (report.first_order.value, report.both_orders_correct.value, report.consistency.value) == (0, 0, 0)
    assert report.order_averaged.value == 0.5


async def test_baselines_on_pairs_with_known_answers(upstream: FakeUpstream) -> None:
    upstream.models["judge"].verdict = lambda _first, _second: 0.9
    baselines = (await judged(upstream)).to_json()["baselines"]
    assert baselines["random"] == {"both_orders_correct": 0.25, "first_order": 0.5}
    assert baselines["longer"]["both_orders_correct"]["value"] == 0.5
    assert baselines["shorter"]["first_order"]["value"] == 0.5
    assert baselines["strongest_member"]["both_orders_correct"]["value"] == 0.75
    assert (baselines["strongest_member"]["member"], baselines["strongest_member"]["in_sample"]) == ("strong", True)


async def test_no_strongest_member_where_models_are_unnamed(upstream: FakeUpstream) -> None:
    report = await judged(upstream, [Comparison("p", "good", "bad", "first")])
    assert "strongest_member" not in report.baselines


async def test_human_ties_count_for_no_accuracy_but_for_the_judges_ties(upstream: FakeUpstream) -> None:
    rows = [*PAIRS, Comparison("p9", "one", "other", "tie"), Comparison("p10", "a", "good", "tie")]
    upstream.models["judge"].verdict = lambda first, second: 0.5 + 0.4 * (("good" in first) - ("good" in second))
    report = await judged(upstream, rows)
    assert (report.n, report.human_ties, report.both_orders_correct.value) == (4, 2, 1)
    assert {name: figure.value for name, figure in report.ties.items()} == {
        "share": 0,
        "of_human_ties": 0.5,
        "three_way": pytest.approx(5 / 6),
    }
    rows = [*PAIRS[:1], Comparison("p9", "one", "other", "tie")]
    with pytest.raises(MixfuseError, match="no pair is left"):
        await judged(upstream, rows[1:])


async def test_intervals_draw_whole_prompts(upstream: FakeUpstream) -> None:
    upstream.models["judge"].verdict = lambda first, _second: 0.9 if "good" in first else 0.1
    one_prompt = [Comparison("p", f"good {n}", "bad", "first" if n % 2 else "second") for n in range(8)]
    report = await judged(upstream, one_prompt)
    assert report.both_orders_correct == (0.5, 0.5, 0.5)  # one prompt says nothing of how prompts vary
    many = [Comparison(f"p{n}", f"good {n}", "bad", "first" if n % 2 else "second") for n in range(8)]
    report = await judged(upstream, many)
    assert report.both_orders_correct.low < 0.5 < report.both_orders_correct.high
    assert report == await judged(upstream, many)  # seeded


async def test_a_judge_that_is_down_is_one_clear_error(upstream: FakeUpstream) -> None:
    with pytest.raises(MixfuseError, match="cannot connect"):
        await evaluate(Endpoint("http://127.0.0.1:9/v1", "judge"), PAIRS, progress=False)
    upstream.models["judge"] = Script(status=500)
    with pytest.raises(MixfuseError, match="every call to the judge failed"):
        await judged(upstream)


async def test_calls_that_fail_here_and_there_are_reported(upstream: FakeUpstream) -> None:
    upstream.models["judge"].fail_after = 5
    report = await judged(upstream)
    assert report.failed_calls == {"upstream_error": 3}
    assert report.parse_failures == 3


async def test_the_report_for_machines_and_for_people(upstream: FakeUpstream) -> None:
    report = await judged(upstream)
    data = json.loads(json.dumps(report.to_json()))
    assert {"both_orders_correct", "first_order", "consistency", "parse_failures", "n"} <= set(data)
    for name in ("both_orders_correct", "first_order", "order_averaged", "consistency"):
        assert set(data[name]) == {"value", "low", "high"}
    console = Console(record=True, width=100, file=StringIO())
    console.print(report.table())
    shown = console.export_text()
    assert "right in both orders" in shown
    assert "strongest member" in shown
    assert "chosen on these very pairs" in shown


# The data shapes


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labelled_pairs(tmp_path: Path) -> None:
    row = {"prompt": "p", "response_a": {"text": "x", "model": "m"}, "response_b": {"text": "y", "model": "n"}}
    path = write(tmp_path / "d.jsonl", *({**row, "label": label} for label in ("A", "B", "tie")))
    assert [one.label for one in load(path)] == ["first", "second", "tie"]
    assert load(path)[0].models == ("m", "n")
    assert len(load(path, limit=2)) == 2


def test_pool_responses_give_every_usable_pair_up_to_a_cap(tmp_path: Path) -> None:
    responses = [{"model": f"m{n}", "text": f"text {n}", "correct": n < 3} for n in range(6)]
    unusable = [
        {"model": "m0", "text": "text 0", "correct": True},  # twice the same
        {"model": "empty", "text": " ", "correct": False},
        {"model": "unmarked", "text": "who knows", "correct": None},
    ]
    path = write(tmp_path / "d.jsonl", {"id": "1", "prompt": "p", "responses": responses + unusable})
    every = load(path, pairs_per_prompt=99)
    assert len(every) == 9
    assert {one.label for one in every} == {"first", "second"}
    for one in every:
        better = one.first if one.label == "first" else one.second
        assert better in ("text 0", "text 1", "text 2")
    few = load(path, pairs_per_prompt=2)
    assert len(few) == 2
    assert few == load(path, pairs_per_prompt=2)
    assert set(few) <= set(every)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p", "messages": []}, "no pairs to judge"),
        ({"prompt": "p", "response_a": {"text": "x"}, "label": "A"}, "missing key 'response_b'"),
        ({"prompt": "p", "response_a": {"text": "x"}, "response_b": {"text": "y"}, "label": "C"}, "label 'C'"),
        ({"prompt": "p", "response_a": 1, "response_b": "y", "label": "A"}, "expected text"),
        ({"prompt": "p", "response_a": {"text": 1}, "response_b": {"text": "y"}, "label": "A"}, "expected text"),
        ({"prompt": "p", "responses": [{"text": "x"}]}, "missing key 'model'"),
        ({"response_a": {"text": "x"}, "response_b": {"text": "y"}, "label": "A"}, "missing key 'prompt'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    good = {"prompt": "p", "response_a": {"text": "x"}, "response_b": {"text": "y"}, "label": "A"}
    path = tmp_path / "d.jsonl"
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(row)}\n")
    with pytest.raises(MixfuseError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert words in str(caught.value)


@needs_data
@pytest.mark.parametrize(
    ("file", "pairs", "ties", "strongest"),
    [
        ("pandalm/dev.jsonl", 163, 15, True),
        ("llmbar/natural.jsonl", 100, 0, False),
        ("gsm8k_pool/dev.jsonl", 612, 0, True),
    ],
)
async def test_the_shared_data(upstream: FakeUpstream, file: str, pairs: int, ties: int, strongest: bool) -> None:
    rows = await asyncio.to_thread(load, DATA / file)
    decided = [row for row in rows if row.label != "tie"]
    assert len(rows) - len(decided) == ties
    assert len(decided) == pairs
    upstream.models["judge"].verdict = lambda _first, _second: 0.9
    report = await judged(upstream, decided[:20])
    assert ("strongest_member" in report.baselines) == strongest
    assert report.consistency.value == 0


@needs_data
def test_the_longer_answer_is_preferred_as_often_as_documented() -> None:
    rows = [row for row in load(DATA / "llmbar" / "natural.jsonl") if row.label != "tie"]
    longer = [(len(row.first) > len(row.second)) == (row.label == "first") for row in rows]
    assert sum(longer) / len(longer) == pytest.approx(0.57, abs=0.02)


# Calibration, lengths, other judges


def test_a_judge_as_right_as_it_says_has_no_calibration_error() -> None:
    rows = [Comparison(f"p{n}", "x", "y", "first" if n < 8 else "second") for n in range(10)]
    figures = report_on(rows, [Views(0.8, 0.2)] * 10).reliability
    assert figures.ece.value == pytest.approx(0)
    assert [(one.n, one.confidence, one.accuracy) for one in figures.bins] == [(10, pytest.approx(0.8), 0.8)]


def test_the_calibration_error_is_the_gap_by_confidence() -> None:
    rows = [Comparison(f"p{n}", "x", "y", "first") for n in range(4)]
    views = [Views(0.97, 0.03), Views(0.03, 0.97), Views(0.56, 0.44), Views(0.56, 0.44)]
    figures = report_on(rows, views).reliability
    # Sure in two, right in one: .47; unsure in two, right in both: .44.
    assert figures.ece.value == pytest.approx((0.47 + 0.44) / 2)
    assert [(one.n, one.accuracy) for one in figures.bins] == [(2, 1.0), (2, 0.5)]
    assert [(one.low, one.high) for one in figures.bins] == [pytest.approx((0.55, 0.6)), pytest.approx((0.95, 1.0))]


def test_pairs_of_neighbouring_confidence_are_in_bins_of_their_own() -> None:
    rows = [Comparison(f"p{n}", "x", "y", "first") for n in range(10)]
    views = [Views(0.5 + step, 0.5 - step) for step in (0.02 + 0.05 * n for n in range(10))]
    bins = report_on(rows, views).reliability.bins
    assert [one.n for one in bins] == [1] * 10
    assert all(one.low <= one.confidence <= one.high for one in bins)


def test_accuracy_by_how_long_the_better_answer_is() -> None:
    rows = [
        Comparison("p1", "x" * 100, "y" * 10, "first"),
        Comparison("p2", "x" * 100, "y" * 10, "second"),
        Comparison("p3", "x" * 100, "y" * 100, "first"),
        Comparison("p4", "x" * 60, "y" * 100, "second"),
    ]
    figures = report_on(rows, [Views(0.9, 0.1), Views(0.9, 0.1), Views(0.9, 0.1), Views(0.1, 0.9)]).by_length
    assert {name: (part["n"], part["order_averaged"]["value"]) for name, part in figures.items()} == {
        "half as long or less": (1, 0),
        "as long, within a tenth": (1, 1),
        "longer": (1, 1),
        "over twice as long": (1, 1),
    }


def test_against_another_judge() -> None:
    knows = report_on(PAIRS, [Views(0.9, 0.1) if row.label == "first" else Views(0.1, 0.9) for row in PAIRS])
    guesses = report_on(PAIRS, [Views(0.9, 0.9)] * 4)
    printed = compared(PAIRS, knows, {"a guesser": guesses}).to_json()["against"]["a guesser"]
    assert printed["both_orders_correct"]["value"] == 0
    assert printed["difference"]["both_orders_correct"]["value"] == 1
    assert printed["difference"]["order_averaged"]["value"] == 0.5
    assert set(printed["difference"]["consistency"]) == {"value", "low", "high", "p", "test", "better", "worse"}


async def test_a_calibrated_judge(upstream: FakeUpstream) -> None:
    # Right in 8 of 10 and always sure of it at .98: log-odds of 3.9 are to be 1.39, a temperature of 2.8.
    rows = [Comparison(f"p{n}", f"good {n}", "bad", "first" if n < 8 else "second") for n in range(10)]
    upstream.models["judge"].verdict = lambda first, _second: 0.98 if "good" in first else 0.02
    calibration = Calibration(temperature=math.log(0.98 / 0.02) / math.log(0.8 / 0.2))
    endpoint = Endpoint(upstream.base_url, "judge", calibration=calibration)
    figures = await evaluate(endpoint, rows, progress=False)
    assert figures.reliability.ece.value == pytest.approx(0.18)
    assert figures.calibrated is not None
    assert figures.calibrated.ece.value == pytest.approx(0, abs=1e-9)
    assert figures.both_orders_correct.value == 0.8
    assert figures.to_json()["calibration"]["parameters"]["temperature"] == calibration.temperature
    unsure = replace(endpoint, calibration=Calibration(tie_margin=0.49))
    figures = await evaluate(unsure, rows, progress=False)
    assert (figures.ties["share"].value, figures.both_orders_correct.value, figures.consistency.value) == (1, 0, 1)


# The cache


async def test_a_second_run_asks_nothing(upstream: FakeUpstream, tmp_path: Path) -> None:
    endpoint = Endpoint(upstream.base_url, "judge", revision="r1")
    with Cache(tmp_path / "deep" / "cache.sqlite3") as cache:
        first = await evaluate(endpoint, PAIRS, progress=False, cache=cache)
    assert (cache.added, cache.hits) == (8, 0)
    with Cache(tmp_path / "deep" / "cache.sqlite3") as cache:
        assert all_cached("r1", PAIRS, cache)
        assert not all_cached("r2", PAIRS, cache)
        assert not all_cached("r1", [*PAIRS, Comparison("new", "x", "y", "first")], cache)
        assert await evaluate(endpoint, PAIRS, progress=False, cache=cache) == first
        assert (cache.added, cache.hits) == (0, 8)
        assert len(upstream.requests) == 8
        other = replace(endpoint, revision="r2")  # a swapped judge is another one
        await evaluate(other, PAIRS[:1], progress=False, cache=cache)
        assert len(upstream.requests) == 10


async def test_a_judge_without_log_probabilities_writes_its_verdicts(upstream: FakeUpstream, tmp_path: Path) -> None:
    upstream.models["judge"] = Script(verdict=lambda first, _second: 0.9 if "good" in first else 0.1, no_logprobs=True)
    endpoint = Endpoint(upstream.base_url, "judge")
    with Cache(tmp_path / "cache.sqlite3") as cache:
        first = await evaluate(endpoint, PAIRS, progress=False, cache=cache, concurrency=2)
        assert (first.read, first.both_orders_correct.value, first.failed_calls) == ("parsed", 1, {})
        assert set(first.views) == {Views(1, 0), Views(0, 1)}
        asked = len(upstream.requests)
        assert asked <= 8 + 2  # who was under way when it came out asked once more
    with Cache(tmp_path / "cache.sqlite3") as cache:
        assert await evaluate(endpoint, PAIRS, progress=False, cache=cache) == first
        assert len(upstream.requests) == asked


async def test_a_run_that_is_cut_off_goes_on(upstream: FakeUpstream, tmp_path: Path) -> None:
    judge = upstream.models["judge"]
    judge.hold, judge.hold_from = asyncio.Event(), 4
    endpoint = Endpoint(upstream.base_url, "judge")
    with Cache(tmp_path / "cache.sqlite3") as cache:
        running = asyncio.create_task(evaluate(endpoint, PAIRS, progress=False, cache=cache, concurrency=1))
        await upstream.wait_asked("judge", 4)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    judge.hold = None
    with Cache(tmp_path / "cache.sqlite3") as cache:
        await evaluate(endpoint, PAIRS, progress=False, cache=cache)
        assert (cache.hits, cache.added) == (3, 5)


async def test_a_failed_call_is_asked_again(upstream: FakeUpstream, tmp_path: Path) -> None:
    upstream.models["judge"].fail_after = 5
    endpoint = Endpoint(upstream.base_url, "judge")
    with Cache(None) as cache:
        assert (await evaluate(endpoint, PAIRS, progress=False, cache=cache)).failed_calls == {"upstream_error": 3}
        upstream.models["judge"].fail_after = None
        assert (await evaluate(endpoint, PAIRS, progress=False, cache=cache)).failed_calls == {}
    (tmp_path / "text.txt").write_text("a text file, and by its first bytes no database " * 20)
    with pytest.raises(MixfuseError, match="cannot be used as a cache"), Cache(tmp_path / "text.txt"):
        pass


# The command


async def test_the_command_writes_a_report_of_two_judges(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream.models["judge"].verdict = lambda first, second: 0.5 + 0.4 * (("good" in first) - ("good" in second))
    upstream.models["other"] = Script(verdict=lambda first, _second: 0.8 if "x" in first else 0.7)
    places: list[Any] = [{"name": name, "base_url": upstream.base_url, "model": name} for name in ("judge", "other")]
    gateway = await start_gateway(places)
    labelled = [
        {"prompt": f"p{n}", "response_a": {"text": f"good {n}"}, "response_b": {"text": f"x {n}"}, "label": label}
        for n, label in enumerate(["A", "A", "A", "B", "tie"])
    ]
    data = write(tmp_path / "pairs.jsonl", *labelled)
    public = write(
        tmp_path / "judgebench.jsonl",
        {"pair_id": "1", "question": "q", "response_A": "bad", "response_B": "good", "label": "B>A", "source": "s"},
    )

    def command(*more: str) -> dict[str, Any]:
        arguments = ["eval", "judge", "--judge", "judge", "--data", str(data), str(public), "--url", gateway.url]
        assert main([*arguments, "--against", "other", "--out", str(tmp_path / "out"), "--json", *more]) == 0
        printed: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return printed

    printed = await asyncio.to_thread(command)
    asked = len(upstream.requests)
    assert asked == 2 * 2 * 6
    assert (printed["n"], printed["human_ties"], printed["both_orders_correct"]["value"]) == (5, 1, 0.8)
    assert printed["official"]["judgebench"]["accuracy"]["value"] == 1
    assert printed["against"]["other"]["difference"]["both_orders_correct"]["value"] == pytest.approx(0.8)
    assert await asyncio.to_thread(command) == printed
    assert len(upstream.requests) == asked
    shown = (tmp_path / "out" / "report.md").read_text()
    assert "right in both orders on 80.0 %" in shown
    assert "better on 4 prompts, worse on 0" in shown
    plots = re.findall(r"\((\w+\.svg)\)", shown)
    assert set(plots) == {"accuracy.svg", "reliability.svg", "by_length.svg"}
    for plot in plots:
        xml.etree.ElementTree.parse(tmp_path / "out" / plot)
    page = page_text((tmp_path / "out" / "report.html").read_text())
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved == {"judge": "judge", **printed}
    assert every_value_missing_from(page, saved) == []
    verdicts = read_jsonl(tmp_path / "out" / "verdicts.jsonl")
    assert [row["winner"] for row in verdicts] == ["first", "first", "first", "first", "first", "second"]
    assert [row["label"] for row in verdicts] == ["first", "first", "first", "second", "tie", "second"]
