"""Judge evaluation: figures whose answer is known beforehand, the three data shapes, and what is refused."""

import asyncio
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Script
from rich.console import Console

from fusion.eval_judge import Comparison, JudgeReport, evaluate, load
from fusion.upstream import Endpoint
from mixfuse.errors import MixfuseError

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
        ({"prompt": "p", "response_a": "x", "response_b": "y", "label": "A"}, "expected an object"),
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
        ("gsm8k_pool/dev.jsonl", None, 0, True),
    ],
)
async def test_the_shared_data(
    upstream: FakeUpstream, file: str, pairs: int | None, ties: int, strongest: bool
) -> None:
    rows = await asyncio.to_thread(load, DATA / file)
    decided = [row for row in rows if row.label != "tie"]
    assert len(rows) - len(decided) == ties
    assert pairs is None or len(decided) == pairs
    assert len(decided) >= 100
    upstream.models["judge"].verdict = lambda _first, _second: 0.9
    report = await judged(upstream, decided[:20])
    assert ("strongest_member" in report.baselines) == strongest
    assert report.consistency.value == 0


@needs_data
def test_the_longer_answer_is_preferred_as_often_as_documented() -> None:
    rows = [row for row in load(DATA / "llmbar" / "natural.jsonl") if row.label != "tie"]
    longer = [(len(row.first) > len(row.second)) == (row.label == "first") for row in rows]
    assert sum(longer) / len(longer) == pytest.approx(0.57, abs=0.02)
