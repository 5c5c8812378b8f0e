"""Does fusing help? Pools whose answer is known beforehand, over a real gateway; and the verdict's words."""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_upstream import FakeUpstream
from fusion_harness import StartGateway
from reading_pages import every_value_missing_from, page_text

from mixfuse.cli.entry import main
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import read_jsonl, write_jsonl
from mixfuse.contracts.tasks import TaskSet
from mixfuse.fusion.batch import Sampling, Target
from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.measure.eval_fusion import Design, evaluate, split
from mixfuse.fusion.measure.fusion_report import Answer, Answers, FusionReport, report
from mixfuse.fusion.measure.fusion_verdict import decide
from mixfuse.fusion.measure.questions import Question, matches, read_questions
from mixfuse.fusion.measure.statistics import Difference
from mixfuse.fusion.store.cache import Cache

Config = Callable[..., FusionConfig]

# 20 questions; alpha knows the even ones, beta the odd ones, gamma none.
QUESTIONS = [Question(f"t{n}", f"What is {n} + 1000?", f"It is {n + 1000}") for n in range(20)]


def knows(which: Callable[[int], bool], else_says: str = "wrong 5") -> Callable[[str], str]:
    def reply(question: str) -> str:
        n = int(re.findall(r"\d+", question)[0])
        return f"I say {n + 1000}" if which(n) else else_says

    return reply


@pytest.fixture
def pool(upstream: FakeUpstream) -> FakeUpstream:
    upstream.models["alpha"].reply = knows(lambda n: n % 2 == 0)
    upstream.models["beta"].reply = knows(lambda n: n % 2 == 1, "wrong 6")
    upstream.models["gamma"].reply = knows(lambda _n: False, "wrong 7")
    upstream.models["synth"].reply = knows(lambda n: n < 15)
    upstream.models["judge"].verdict = lambda first, second: 0.5 + 0.4 * (("wrong" in second) - ("wrong" in first))
    return upstream


def right(question: Question, text: str) -> bool:
    return matches(question, text, "number")


async def evaluated(
    config: FusionConfig, url: str, cache: Cache, *, served: dict[str, str] | None = None, **design: Any
) -> FusionReport:
    settings: dict[str, Any] = {"modes": ["best_of"], "same": "number", "sampling": Sampling(seed=0)}
    tasks = TaskSet(QUESTIONS, right)
    evaluation, _ = await evaluate(
        config, Target(url), tasks, Design(**settings | design), cache=cache, served=served, progress=False
    )
    return evaluation


async def test_a_pool_whose_members_know_different_things_is_worth_fusing(
    pool: FakeUpstream, start_gateway: StartGateway, config: Config
) -> None:
    gateway = await start_gateway()
    with Cache(None) as cache:
        evaluation = await evaluated(config(), gateway.url, cache, modes=["best_of", "merge"])
    assert (evaluation.tasks, evaluation.chosen_on) == (14, 6)
    assert evaluation.best_member in ("alpha", "beta")
    alpha, beta = evaluation.members["alpha"].accuracy.value, evaluation.members["beta"].accuracy.value
    assert alpha + beta == pytest.approx(1)
    assert evaluation.members["gamma"].accuracy.value == 0
    assert evaluation.baselines["random_member"].accuracy.value == pytest.approx(1 / 3)
    assert evaluation.baselines["oracle"].accuracy.value == evaluation.modes["best_of"].accuracy.value == 1
    assert evaluation.baselines["majority"].accuracy.value == alpha  # all differ, so the first of them
    assert evaluation.self_fusion["best_of"].accuracy.value == evaluation.members[evaluation.best_member].accuracy.value
    assert evaluation.gap_closed["best_of"] == (1, 1, 1)
    gap = evaluation.differences["best_of"]["self_fusion"]
    assert gap.value == pytest.approx(1 - evaluation.members[evaluation.best_member].accuracy.value)
    assert (evaluation.verdict.choice, evaluation.verdict.mode) == ("fuse", "best_of")
    assert evaluation.verdict.words.startswith(f"Fuse, by best_of: best_of beats {evaluation.best_member} alone by +")
    assert "sampled 3 times" in evaluation.verdict.words
    # best_of asks three members and a judge, six times for three pairs; a member alone is one call.
    assert evaluation.members["alpha"].tokens == 15
    assert evaluation.modes["best_of"].tokens > 3 * 15


async def test_a_judge_that_knows_nothing_is_not_worth_it(
    pool: FakeUpstream, start_gateway: StartGateway, config: Config
) -> None:
    pool.models["judge"].verdict = lambda _first, _second: 0.9
    gateway = await start_gateway()
    with Cache(None) as cache:
        evaluation = await evaluated(config(), gateway.url, cache)
    assert evaluation.verdict.choice == "member"
    assert evaluation.verdict.words.startswith(f"Use {evaluation.best_member} alone. No mode is shown to be better")


async def test_self_fusion_is_asked_of_the_best_member_as_often_as_the_pool(
    pool: FakeUpstream, start_gateway: StartGateway, config: Config
) -> None:
    pool.models["beta"].reply = knows(lambda _n: True)
    members = [{"name": name, "base_url": pool.base_url, "model": name} for name in ("alpha", "beta")]
    members[0]["samples"] = 2
    members[1]["price"] = {"prompt": 1000, "completion": 0}
    gateway = await start_gateway(members)
    with Cache(None) as cache:
        evaluation = await evaluated(config(members), gateway.url, cache)
    assert evaluation.best_member == "beta"
    seeds = [
        request["seed"] for request in pool.asked("beta") if request["messages"][0]["content"] == QUESTIONS[0].prompt
    ]
    reported = QUESTIONS[0] in split(QUESTIONS, 0.3)[1]
    assert sorted(seeds) == ([0, 0, 0, 1, 2] if reported else [0])  # alone, in the pool, and three times itself
    assert evaluation.members["beta"].cost == pytest.approx(10 * 1000 / 1e6)
    assert evaluation.self_fusion["best_of"].cost == pytest.approx(3 * evaluation.members["beta"].cost)
    assert evaluation.modes["best_of"].cost == pytest.approx(evaluation.members["beta"].cost)
    assert evaluation.gap_closed["best_of"] is None  # the best member is always right


async def test_a_second_run_asks_nothing_and_one_cut_off_goes_on(
    pool: FakeUpstream, start_gateway: StartGateway, config: Config, tmp_path: Path
) -> None:
    gateway = await start_gateway()
    pool.models["gamma"].hold, pool.models["gamma"].hold_from = asyncio.Event(), 8
    with Cache(tmp_path / "cache.sqlite3") as cache:
        running = asyncio.create_task(evaluated(config(), gateway.url, cache, concurrency=2))
        await pool.wait_asked("gamma", 8)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        done = cache.added
    assert done >= 20
    pool.models["gamma"].hold = None
    with Cache(tmp_path / "cache.sqlite3") as cache:
        first = await evaluated(config(), gateway.url, cache)
        assert (cache.hits, cache.added) == (done, 20 * 3 + 14 * 2 - done)
    asked = len(pool.requests)
    with Cache(tmp_path / "cache.sqlite3") as cache:
        assert await evaluated(config(), gateway.url, cache) == first
        assert cache.added == 0
        assert len(pool.requests) == asked
        await evaluated(config(), gateway.url, cache, served={"judge": "r2"})  # a judge was swapped
        assert cache.added == 20 * 3 + 14 * 2
    for content in ("{}", "{ }"):  # a combiner was fitted, and fitted again
        (tmp_path / "combiner.json").write_text(content)
        with_combiner = config().model_copy(update={"combiner": tmp_path / "combiner.json"})
        with Cache(tmp_path / "cache.sqlite3") as cache:
            await evaluated(with_combiner, gateway.url, cache)
            assert cache.added == 20 * 3 + 14 * 2


async def test_failures_count_as_wrong_and_are_asked_again(
    pool: FakeUpstream, start_gateway: StartGateway, config: Config
) -> None:
    pool.models["beta"].status = 500
    gateway = await start_gateway()
    keys = {"choose_share": 0.0}
    with Cache(None) as cache:
        evaluation = await evaluated(config(), gateway.url, cache, **keys)
        assert (evaluation.chosen_on, evaluation.best_member) == (0, "alpha")
        assert set(evaluation.members["beta"].failed) <= {"upstream_error", "circuit_open"}
        assert sum(evaluation.members["beta"].failed.values()) == 20
        assert evaluation.members["beta"].accuracy.value == 0
        assert evaluation.modes["best_of"].failed == {}
        added = cache.added
        pool.models["beta"].status = 200
        gateway = await start_gateway()  # whose circuit to beta is closed
        assert (await evaluated(config(), gateway.url, cache, **keys)).members["beta"].accuracy.value == 0.5
        assert cache.added == added + 20


async def test_a_gateway_that_is_not_there_or_another_one(
    pool: FakeUpstream, start_gateway: StartGateway, config: Config
) -> None:
    gateway = await start_gateway([{"name": "other", "base_url": pool.base_url, "model": "alpha"}])
    with Cache(None) as cache:
        with pytest.raises(MixfuseError, match="has no member 'alpha'"):
            await evaluated(config(), gateway.url, cache)
        with pytest.raises(MixfuseError, match=r"no gateway answers at http://127\.0\.0\.1:9"):
            await evaluated(config(), "http://127.0.0.1:9", cache)
    gateway = await start_gateway(synthesizer=None)
    with Cache(None) as cache, pytest.raises(MixfuseError, match=r"fusion/merge: the gateway answered 400"):
        await evaluated(config(), gateway.url, cache, modes=["merge"])
    with Cache(None) as cache, pytest.raises(MixfuseError, match="20 tasks are too few"):
        await evaluated(config(), gateway.url, cache, choose_share=1.0)


# The verdict


def judged(config: FusionConfig, **marks: Sequence[int]) -> FusionReport:
    """A report on arms that are right where their marks say so."""
    names = {"alpha": "member alpha", "beta": "member beta", "own": "self best_of", "best_of": "best_of"}
    count = len(marks["alpha"])
    questions = [Question(f"t{n}", f"q{n}", "yes") for n in range(count)]
    answers: Answers = {
        question.id: {arm: [Answer("yes" if marks[key][n] else "no")] for key, arm in names.items()}
        for n, question in enumerate(questions)
    }
    tasks = TaskSet(questions, lambda question, text: text == question.reference)
    return report(tasks, answers, config, ["best_of"], best="alpha", chosen_on=5, same="exact")


HALF, ALL, NONE = [1, 0] * 10, [1] * 20, [0] * 20


@pytest.mark.parametrize(
    ("own", "best_of", "choice", "words"),
    [
        (HALF, ALL, "fuse", "Fuse, by best_of: best_of beats alpha alone by +0.500"),
        (ALL, ALL, "fuse", "is not told apart from it"),
        (HALF, [*HALF[:18], 1, 1], "member", "Use alpha alone. No mode is shown to be better"),
        (HALF, NONE, "member", "It is shown to be worse."),
    ],
)
def test_the_verdict_rests_on_paired_intervals(
    config: Config, own: list[int], best_of: list[int], choice: str, words: str
) -> None:
    evaluation = judged(config(["alpha", "beta"]), alpha=HALF, beta=NONE, own=own, best_of=best_of)
    assert evaluation.verdict.choice == choice
    assert words in evaluation.verdict.words


def test_where_equal_compute_beats_the_pool_the_other_members_go(config: Config) -> None:
    alpha = [0] * 40
    evaluation = judged(config(["alpha", "beta"]), alpha=alpha, beta=alpha, own=[1] * 40, best_of=[1] * 20 + [0] * 20)
    assert evaluation.verdict.choice == "self_fusion"
    assert "Use alpha, sampled 2 times and judged" in evaluation.verdict.words


def test_latencies_and_the_majoritys_first_answer(config: Config) -> None:
    questions = [Question(f"t{n}", f"q{n}", "yes") for n in range(40)]

    def both(n: int) -> dict[str, list[Answer]]:
        # Equal as text but for white space, so both are one vote; only the first is right to the letter.
        alpha = [Answer("yes", latency_ms=100.0 * (n + 1)), Answer(" yes")]
        return {"member alpha": alpha, "member beta": [Answer("no")], "best_of": [Answer("yes")], "self best_of": alpha}

    tasks = TaskSet(questions, lambda question, text: text == question.reference)
    answers = {question.id: both(n) for n, question in enumerate(questions)}
    evaluation = report(tasks, answers, config(["alpha", "beta"]), ["best_of"], best="alpha", chosen_on=5, same="exact")
    assert evaluation.baselines["majority"].accuracy.value == 1
    assert evaluation.members["alpha"].accuracy.value == 0.5
    # The pool waits for its slowest answer: 100 to 4000 ms.
    assert evaluation.baselines["majority"].latency_ms == (2050, 3800)
    assert evaluation.baselines["oracle"].latency_ms is None


def gap(value: float, p: float) -> Difference:
    """A difference whose interval lies on one side of zero where the value is not zero."""
    return Difference(value, value - abs(value) / 2, value + abs(value) / 2, p, "mcnemar", 5, 1)


def test_each_of_several_modes_must_pass_at_its_share_of_the_error() -> None:
    differences = {mode: {"best_member": gap(0.2, 0.03)} for mode in ("best_of", "merge")}
    one = decide("alpha", {"best_of": 0.7}, differences, pool_size=2)
    assert (one.choice, one.mode) == ("fuse", "best_of")
    two = decide("alpha", {"best_of": 0.7, "merge": 0.6}, differences, pool_size=2)
    assert (two.choice, two.mode) == ("member", None)
    differences["merge"] = {"best_member": gap(0.2, 0.024)}
    assert decide("alpha", {"best_of": 0.7, "merge": 0.6}, differences, pool_size=2).mode == "merge"


def test_a_mode_is_shown_better_only_by_interval_and_p() -> None:
    beats, unsure = gap(0.2, 0.001), Difference(0.2, -0.01, 0.4, 0.001, "mcnemar", 5, 1)
    assert decide("alpha", {"merge": 0.7}, {"merge": {"best_member": unsure}}, pool_size=2).choice == "member"
    assert decide("alpha", {"merge": 0.7}, {"merge": {"best_member": gap(0.2, 0.06)}}, pool_size=2).choice == "member"
    two = {"merge": {"best_member": beats}, "debate": {"best_member": beats}}
    assert decide("alpha", {"merge": 0.7, "debate": 0.8}, two, pool_size=2).mode == "debate"
    only = decide("alpha", {"merge": 0.7, "debate": 0.8}, two | {"debate": {"best_member": unsure}}, pool_size=2)
    assert only.mode == "merge", "the best of those that are shown, not the best of all"


@pytest.mark.parametrize(
    ("equal", "choice", "told_apart"),
    [(gap(-0.2, 0.01), "self_fusion", True), (gap(-0.2, 0.04), "fuse", False), (gap(0.2, 0.01), "fuse", True)],
)
def test_equal_compute_stands_at_the_same_level(equal: Difference, choice: str, told_apart: bool) -> None:
    rivals = {"best_member": gap(0.2, 0.001), "self_fusion": equal}
    differences = {"merge": rivals, "debate": {"best_member": gap(0.0, 1.0)}}
    evaluation = decide("alpha", {"merge": 0.7, "debate": 0.6}, differences, pool_size=3)
    assert (evaluation.choice, evaluation.mode) == (choice, "merge")
    assert ("is not told apart from it" in evaluation.words) is not told_apart
    assert "sampled 3 times" in evaluation.words


# The questions


def test_questions_from_rows_of_two_shapes(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q2"}, {"role": "assistant", "content": "r2"}]
    rows = [{"id": 7, "prompt": "q1", "reference": "r1", "responses": []}, {"messages": chat}]
    write_jsonl(tmp_path / "a.jsonl", [*rows, {"prompt": "q1", "reference": "again"}])
    assert [(one.prompt, one.reference) for one in read_questions([tmp_path / "a.jsonl"])] == [
        ("q1", "r1"),
        ("q2", "r2"),
    ]
    assert len(read_questions([tmp_path / "a.jsonl"], limit=1)) == 1
    write_jsonl(tmp_path / "a.jsonl", [*rows, {"prompt": "q3"}])
    with pytest.raises(MixfuseError, match=r"a\.jsonl:3: no task: it needs 'prompt' and 'reference'"):
        read_questions([tmp_path / "a.jsonl"])


@pytest.mark.parametrize(
    ("how", "reference", "answer", "right"),
    [
        ("exact", "two  words", " two words\n", True),
        ("exact", "two words", "Two words", False),
        ("number", "3 x 2 = 6\nAnswer: 1,006.0", "it is 1006", True),
        ("number", "Answer: 6", "6 or 7", False),
        ("json", '{"a": 1, "b": [2]}', '```json\n{"b": [2], "a": 1}\n```', True),
        ("regex", r"\bsix\b", "that makes six.", True),
        ("regex", r"^six$", "that makes six.", False),
    ],
)
def test_answers_against_references(how: Any, reference: str, answer: str, right: bool) -> None:
    assert matches(Question("t", "q", reference), answer, how) is right


def test_a_reference_that_is_no_pattern_is_named() -> None:
    with pytest.raises(MixfuseError, match="task t: the reference is no regular expression"):
        matches(Question("t", "q", "("), "x", "regex")


# The command


async def test_the_command_writes_a_report(
    pool: FakeUpstream, start_gateway: StartGateway, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = await start_gateway()
    where, data = tmp_path / "fusion.yaml", tmp_path / "questions.jsonl"
    where.write_text(yaml.safe_dump(config().model_dump(mode="json", exclude_defaults=True)))
    write_jsonl(data, [{"prompt": one.prompt, "reference": one.reference} for one in QUESTIONS])

    def command(*more: str) -> int:
        return main(["eval", "fusion", str(where), "--url", gateway.url, "--data", str(data), *more])

    assert await asyncio.to_thread(command) == 2
    assert "--data needs --verifier exact, number, json, regex" in capsys.readouterr().err
    options = ("--verifier", "number", "--modes", "best_of", "--out", str(tmp_path / "out"), "--json")
    assert await asyncio.to_thread(command, *options) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    asked = len(pool.requests)
    assert printed["verdict"]["choice"] == "fuse"
    assert await asyncio.to_thread(command, *options) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == printed
    assert len(pool.requests) == asked
    page = page_text((tmp_path / "out" / "report.html").read_text())
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved | printed == saved
    assert every_value_missing_from(page, saved) == []
    assert printed["verdict"]["words"] in (tmp_path / "out" / "report.md").read_text()
    rows = read_jsonl(tmp_path / "out" / "answers.jsonl")
    assert len(rows) == 20
    assert sum(row["arms"]["member alpha"][0]["right"] for row in rows) == 10


async def test_tasks_with_verifiers_of_their_own(
    pool: FakeUpstream, start_gateway: StartGateway, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool.models["alpha"].reply = lambda question: str(sum(map(int, re.findall(r"\d+", question))))
    gateway = await start_gateway()
    where, tasks = tmp_path / "fusion.yaml", tmp_path / "tasks.yaml"
    where.write_text(yaml.safe_dump(config().model_dump(mode="json", exclude_defaults=True)))
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2, "allow_negation": False}
    tasks.write_text(yaml.safe_dump({"tasks": [{"name": "chain_sum", "settings": settings}]}))
    arguments = [
        "eval",
        "fusion",
        str(where),
        "--url",
        gateway.url,
        "--tasks",
        str(tasks),
        "--modes",
        "best_of",
        "--json",
    ]
    assert await asyncio.to_thread(main, [*arguments, "--count", "12"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["best_member"] == "alpha"
    assert printed["tasks"] + printed["chosen_on"] == 12
    assert printed["members"]["alpha"]["accuracy"]["value"] >= 0.4  # the sums without a minus
    assert printed["members"]["gamma"]["accuracy"]["value"] == 0
