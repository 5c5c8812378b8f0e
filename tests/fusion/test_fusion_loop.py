"""The loop: traces to pairs to a judge to a decision. Judges are learned and asked for real, but small: bags of words.

A trainer reads the round's own pairs file and counts which words the chosen answers have; the fake upstream serves what
it learned, and the evaluation, the report, the paired test and the decision are the ones in use.
"""

import asyncio
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_upstream import COMPARISON, FakeUpstream, Script
from fake_upstream import serving as serving_app
from fusion_harness import prefers
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse
from starlette.routing import Route
from test_gates import House, database, house

from mixfuse.app import loop
from mixfuse.app.loop import Tools
from mixfuse.app.loop_config import LoopConfig, Promote
from mixfuse.app.promotion import decide
from mixfuse.app.roles_routes import routes
from mixfuse.app.roles_store import StoredRoles
from mixfuse.cli.entry import main
from mixfuse.contracts.database import opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import read_json, read_jsonl, write_json, write_jsonl
from mixfuse.contracts.strict_yaml import validate
from mixfuse.contracts.trace import Call, Trace
from mixfuse.fusion.calls.upstream import Endpoint
from mixfuse.fusion.config import TraceConfig
from mixfuse.fusion.measure import eval_judge, judge_page, judge_report
from mixfuse.fusion.measure.comparisons import Comparison, load
from mixfuse.fusion.measure.marks import Views, paired
from mixfuse.fusion.store.traces import TraceStore

__all__ = ["database", "house"]  # fixtures

# The quality of an answer is the sum of its words': half of them good, half bad, some more than others.
WORDS = {
    f"{kind}{number}": sign * (0.3 + number / 10) for number in range(12) for kind, sign in (("up", 1), ("down", -1))
}
Weights = dict[str, float]


def answer(rng: random.Random) -> str:
    return " ".join(rng.choice(list(WORDS)) for _ in range(6))


def quality(text: str) -> float:
    return sum(WORDS.get(word, 0.0) for word in text.split())


def two_answers(rng: random.Random) -> tuple[str, str]:
    """The better first; they can be told apart."""
    while True:
        better, worse = sorted((answer(rng), answer(rng)), key=quality, reverse=True)
        if quality(better) - quality(worse) > 0.5:
            return better, worse


Flip = Callable[[random.Random, str, str], bool]


def at_random(share: float) -> Flip:
    return lambda rng, _better, _worse: rng.random() < share


def with_word(*words: str) -> Flip:
    """Feedback of someone who wants answers with these words to win."""
    return lambda _rng, better, worse: not set(words) & set(better.split()) and bool(set(words) & set(worse.split()))


def traces(count: int, flip: Flip, *, seed: int) -> list[Trace]:
    rng = random.Random(seed)
    made = []
    for number in range(count):
        better, worse = two_answers(rng)
        texts = [better, worse] if rng.random() < 0.5 else [worse, better]
        best = texts.index(worse if flip(rng, better, worse) else better)
        calls = [Call(stage="answer", member="m", model="m", candidate=n, text=text) for n, text in enumerate(texts)]
        trace = Trace(
            model="fusion/best-of",
            mode="best_of",
            messages=[{"role": "user", "content": f"Question {seed} {number}?"}],
            candidates=["model-x-7b", "model-y-70b"],
            calls=calls,
            winner=0,
            reason="judged",
            answer=texts[0],
            feedback=[{"best": best}],
        )
        made.append(trace)
    return made


async def store(place: Path, made: Sequence[Trace]) -> None:
    with opened(place) as database:
        kept = TraceStore(database, TraceConfig())
        for one in made:
            await kept.add(one)
        await kept.close()


def learned(pairs: Path) -> Weights:
    """What the words of chosen answers have over those of rejected ones, in log-odds."""
    return log_odds(shown_of(row) for row in read_jsonl(pairs))


def shown_of(row: dict[str, Any]) -> tuple[str, str]:
    """The chosen and the rejected answer of a row of pairs."""
    found = COMPARISON.search(row["prompt"][-1]["content"])
    assert found
    shown = {"A": found["first"], "B": found["second"]}
    return shown[row["chosen"][0]["content"]], shown[row["rejected"][0]["content"]]


def log_odds(pairs: Iterable[tuple[str, str]]) -> Weights:
    counts = (Counter[str](), Counter[str]())
    for both in pairs:
        for text, count in zip(both, counts, strict=True):
            count.update(text.split())
    return {word: math.log((counts[0][word] + 1) / (counts[1][word] + 1)) for word in WORDS}


def judging(weights: Weights) -> Callable[[str, str], float]:
    def score(text: str) -> float:
        return sum(weights.get(word, 0.0) for word in text.split())

    return lambda first, second: 1 / (1 + math.exp(score(second) - score(first)))


def tools(upstream: FakeUpstream | None = None) -> Tools:
    """Trains bags of words; they judge behind the fake upstream, by the name of their folder, or else in place."""

    def train(recipe: Path, _overrides: Sequence[str], _log: Path) -> None:
        keys = yaml.safe_load(recipe.read_text())
        write_json(Path(keys["out"]) / "weights.json", learned(Path(keys["data"])))

    def export(run: Path, adapter: Path, _log: Path) -> None:
        write_json(adapter / "weights.json", read_json(run / "weights.json"))

    def views(judge: Path | None, rows: Sequence[Comparison]) -> list[Views]:
        verdict = judging(read_json(judge / "weights.json") if judge else {})
        if upstream is None:
            return [Views(verdict(row.first, row.second), verdict(row.second, row.first)) for row in rows]
        upstream.models[str(judge)] = Script(verdict=verdict)
        endpoint = Endpoint(upstream.base_url, str(judge))
        return asyncio.run(eval_judge.evaluate(endpoint, rows, progress=False)).views

    def evaluate(new: Path, serving: Path | None, data: Sequence[Path], out: Path, _log: Path) -> None:
        rows = [row for path in data for row in load(path)]
        beside = {str(serving): judge_report.report(rows, views(serving, rows))}
        judge_page.write(out, judge_report.report(rows, views(new, rows), against=beside), rows, judge=str(new))

    return Tools(train, export, evaluate)


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    """Labelled with care, and out of feedback's reach."""
    rng = random.Random(99)
    rows = []
    for number in range(100):
        better, worse = two_answers(rng)
        sides = ({"text": better}, {"text": worse})
        label = "AB"[number % 2]
        a, b = sides if label == "A" else sides[::-1]
        rows.append({"prompt": f"Frozen {number}?", "response_a": a, "response_b": b, "label": label})
    write_jsonl(tmp_path / "frozen.jsonl", rows)
    return tmp_path / "frozen.jsonl"


def config(tmp_path: Path, **keys: Any) -> LoopConfig:
    (tmp_path / "judge.yaml").write_text("role: judge\nout: elsewhere\ndata: elsewhere\nevaluation: {every: 1}\n")
    data = {
        "rounds": str(tmp_path / "rounds"),
        "traces": {"database": str(tmp_path / "traces.sqlite3"), "min_rows": 20, "settle_s": 0},
        "frozen": [str(tmp_path / "frozen.jsonl")],
        "recipe": str(tmp_path / "judge.yaml"),
        "pairs": {"near": None, "balance": []},
        "server": None,
    }
    return validate({**data, **keys}, LoopConfig, source="config")


async def a_round(config: LoopConfig, with_: Tools) -> dict[str, Any]:
    decision = await asyncio.to_thread(loop.run_round, config, with_)
    assert decision is not None
    return decision


def serving(tmp_path: Path, count: int) -> str:
    """A judge that learned from so many pairs, all of them right."""
    rng = random.Random(1)
    write_json(tmp_path / "serving" / "weights.json", log_odds(two_answers(rng) for _ in range(count)))
    return str(tmp_path / "serving")


async def test_honest_feedback_makes_a_better_judge(tmp_path: Path, upstream: FakeUpstream, frozen: Path) -> None:
    settings = config(tmp_path, judge=serving(tmp_path, 20))
    await store(tmp_path / "traces.sqlite3", traces(400, at_random(0.0), seed=2))
    decision = await a_round(settings, tools(upstream))
    assert decision["promoted"], decision["reason"]
    assert decision["serving_before"]["directory"] == str(settings.judge)
    assert decision["frozen"]["difference"]["low"] > 0
    assert decision["frozen"]["new"]["value"] > 0.8 > decision["frozen"]["serving"]["value"]
    # Everything is there to be looked at.
    folder = tmp_path / "rounds" / "0001"
    for name in (
        "round.json", "data/traces.jsonl", "data/pairs.jsonl", "data/pairs.dev.jsonl", "data/pairs.card.md",
        "data/fresh.jsonl", "recipe.yaml", "run/weights.json", "adapter/weights.json", "evaluation/frozen/report.html",
        "evaluation/frozen/verdicts.jsonl", "evaluation/fresh/report.json", "decision.json",
    ):  # fmt: skip
        assert (folder / name).is_file(), name
    assert len(read_jsonl(folder / "data/traces.jsonl")) == 400
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert Path(recipe["evaluation"]["data"]) == folder / "data/pairs.dev.jsonl"
    trained_on = (folder / "data/pairs.jsonl").read_text()
    assert not any(json.dumps(row["prompt"])[1:-1] in trained_on for row in read_jsonl(folder / "data/fresh.jsonl"))
    assert "model-x-7b" not in trained_on
    # The next round has the traces since this one, and is compared with the judge of this one.
    await store(tmp_path / "traces.sqlite3", traces(30, at_random(0.0), seed=3))
    after = await a_round(settings, tools())
    assert after["traces"]["rows"] == 30
    assert after["serving_before"]["directory"] == str(folder / "adapter")


@pytest.mark.parametrize(
    ("poison", "count"),
    [
        pytest.param(at_random(0.3), 40, id="at random"),
        pytest.param(with_word("down10", "down11", "down9"), 400, id="for words of the attacker's"),
    ],
)
async def test_poisoned_feedback_promotes_no_worse_judge(
    poison: Flip, count: int, tmp_path: Path, frozen: Path
) -> None:
    """About 30 % of the labels are flipped, in what is trained on and in the fresh traces alike."""
    settings = config(tmp_path, judge=serving(tmp_path, 400))
    made = traces(count, poison, seed=3)
    await store(tmp_path / "traces.sqlite3", made)
    flipped = sum(
        quality(trace.calls[trace.feedback[0]["best"]].text or "")
        < max(quality(call.text or "") for call in trace.calls)
        for trace in made
    )
    assert 0.2 < flipped / count < 0.4
    decision = await a_round(settings, tools())
    assert not decision["promoted"]
    assert decision["frozen"]["new"]["value"] < decision["frozen"]["serving"]["value"], "the poison did nothing"
    assert decision["reason"].startswith(("worse", "not better by enough"))
    # The round after it is compared with the judge that still serves.
    await store(tmp_path / "traces.sqlite3", traces(30, at_random(0.0), seed=4))
    assert (await a_round(settings, tools()))["serving_before"] == decision["serving_before"]


async def test_what_poisoned_people_say_of_fresh_traces_promotes_nothing(tmp_path: Path, frozen: Path) -> None:
    """On the fresh traces, whose labels are as poisoned, the poisoned judge is the better one, and significantly."""
    settings = config(tmp_path, judge=serving(tmp_path, 400))
    await store(tmp_path / "traces.sqlite3", traces(800, with_word("down10", "down11", "down9"), seed=3))
    decision = await a_round(settings, tools())
    assert decision["fresh"]["difference"]["low"] > 0
    assert decision["frozen"]["difference"]["high"] < 0
    assert not decision["promoted"]
    assert decision["reason"].startswith("worse")


def outcomes(rng: random.Random, count: int, better: float, worse: float) -> dict[str, Any]:
    """Two judges, right with these probabilities, on pairs of prompts of their own."""
    rows = [Comparison(f"{number}?", "good", "bad", "first") for number in range(count)]
    views = [[Views(*[0.9 if rng.random() < p else 0.1] * 2) for _ in rows] for p in (better, worse)]
    views = [[Views(view.forward, 1 - (view.forward or 0)) for view in own] for own in views]
    return {"prompts": count, "difference": paired(rows, *views).to_json()}


def test_a_worse_judge_is_hardly_ever_promoted_by_chance() -> None:
    rng = random.Random(5)
    worse = [decide(outcomes(rng, 100, 0.70, 0.75), None, Promote()).promote for _ in range(40)]
    better = [decide(outcomes(rng, 100, 0.95, 0.70), None, Promote()).promote for _ in range(10)]
    assert (sum(worse), sum(better)) == (0, 10)


def seen(low: float, high: float, p: float = 0.001, prompts: int = 100) -> dict[str, Any]:
    difference = {
        "value": (low + high) / 2,
        "low": low,
        "high": high,
        "p": p,
        "test": "mcnemar",
        "better": 9,
        "worse": 1,
    }
    return {"prompts": prompts, "difference": difference}


@pytest.mark.parametrize(
    ("frozen", "fresh", "promote", "reason"),
    [
        (seen(0.05, 0.2), None, True, "better"),
        (seen(0.05, 0.2), seen(-0.1, 0.1), True, "better"),
        (seen(0.05, 0.2), seen(-0.2, -0.01), False, "worse on fresh traces"),
        (seen(0.01, 0.2), None, False, "not better by enough"),
        (seen(-0.1, 0.2), seen(0.3, 0.5), False, "not better by enough"),
        (seen(-0.3, -0.1), seen(0.3, 0.5), False, "worse: both orders correct on the frozen set"),
        (seen(0.05, 0.2, p=0.06), None, False, "not significant at 0.05"),
        (seen(0.05, 0.2, prompts=49), None, False, "the frozen set has 49 prompts, 50 are needed"),
    ],
)
def test_the_decision(frozen: dict[str, Any], fresh: dict[str, Any] | None, promote: bool, reason: str) -> None:
    decision = decide(frozen, fresh, Promote(margin=0.02))
    assert decision.promote is promote
    assert decision.reason.startswith(reason)


async def test_too_few_traces_wait_for_the_next_round(tmp_path: Path, frozen: Path) -> None:
    place = tmp_path / "traces.sqlite3"
    await store(place, traces(15, at_random(0.0), seed=1))
    assert await asyncio.to_thread(loop.run_round, config(tmp_path), tools()) is None
    assert not list((tmp_path / "rounds").glob("0*"))
    await store(place, traces(15, at_random(0.0), seed=2))
    decision = await a_round(config(tmp_path), tools())
    assert decision["traces"]["rows"] == 30
    assert await asyncio.to_thread(loop.run_round, config(tmp_path), tools()) is None, "they are used up"


async def test_a_round_takes_only_traces_that_had_time_for_feedback(tmp_path: Path, frozen: Path) -> None:
    place = tmp_path / "traces.sqlite3"
    now = time.time()

    def aged(seed: int, seconds: float) -> list[Trace]:
        made = traces(30, at_random(0.0), seed=seed)
        return [trace.model_copy(update={"created_at": now - seconds}) for trace in made]

    settings = config(tmp_path, traces={"database": str(place), "min_rows": 20, "settle_s": 3600})
    await store(place, aged(1, 1800))
    assert await asyncio.to_thread(loop.run_round, settings, tools()) is None, "all are too young"
    await store(place, aged(2, 7200))
    decision = await a_round(settings, tools())
    assert decision["traces"]["rows"] == 30
    asked = {row["prompt"] for row in read_jsonl(tmp_path / "rounds/0001/data/traces.jsonl")}
    assert asked == {f"Question 2 {number}?" for number in range(30)}
    # The younger ones are the next round's, once they are old enough.
    at_once = config(tmp_path, traces={"database": str(place), "min_rows": 20, "settle_s": 0})
    assert (await a_round(at_once, tools()))["traces"]["rows"] == 30


async def test_a_redirect_is_not_followed_and_takes_no_key_along(
    tmp_path: Path, frozen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where it asks which judge serves nor where it swaps; the target would answer as a server does."""
    monkeypatch.setenv("MIXFUSE_ADMIN_KEY", "secret-admin-key")
    visits: list[str | None] = []

    async def elsewhere(request: Request) -> JSONResponse:
        visits.append(request.headers.get("authorization"))
        row = {"role": "judge", "directory": None, "revision": None, "gate": None}
        return JSONResponse({"roles": [row]})

    async with serving_app(Starlette(routes=[Route("/admin/roles", elsewhere)])) as target:

        async def redirect(_request: Request) -> RedirectResponse:
            return RedirectResponse(f"{target}/admin/roles")

        async with serving_app(Starlette(routes=[Route("/admin/roles", redirect)])) as url:
            settings = config(tmp_path, server={"url": url})
            with pytest.raises(MixfuseError, match=r"30[0-9]"):
                await asyncio.to_thread(loop.run_round, settings, tools())
    assert visits == []


async def test_a_round_without_a_usable_pair_is_decided(tmp_path: Path, frozen: Path) -> None:
    made = traces(30, at_random(0.0), seed=1)
    liked = [trace.model_copy(update={"feedback": [{"score": 1}]}) for trace in made]  # nothing is said of the other
    await store(tmp_path / "traces.sqlite3", liked)
    decision = await a_round(config(tmp_path), tools())
    assert not decision["promoted"]
    assert "nothing to prefer" in decision["reason"]


STEPS = ("train", "export", "evaluate")


async def test_a_round_that_is_cut_off_at_any_step_goes_on(tmp_path: Path, frozen: Path) -> None:
    await store(tmp_path / "traces.sqlite3", traces(300, at_random(0.0), seed=1))
    real, done = tools(), Counter[str]()

    def breaking(at: str, after: bool) -> Tools:
        def broken(name: str) -> Callable[..., None]:
            def step(*arguments: Any) -> None:
                if name == at and not after:
                    raise MixfuseError(f"cut off before {name}")
                getattr(real, name)(*arguments)
                done[name] += 1
                if name == at:
                    raise KeyboardInterrupt

            return step

        return Tools(*map(broken, STEPS))

    for at in STEPS:
        for after in (False, True):
            with pytest.raises((MixfuseError, KeyboardInterrupt)):
                await asyncio.to_thread(loop.run_round, config(tmp_path), breaking(at, after))
            assert not (tmp_path / "rounds/0001/decision.json").exists()
    # Traces that came meanwhile, and a config that changed, are the next round's.
    await store(tmp_path / "traces.sqlite3", traces(300, at_random(0.0), seed=2))
    decision = await a_round(config(tmp_path, promote={"margin": 0.9}), real)
    assert decision["promoted"], decision["reason"]
    assert decision["traces"]["rows"] == 300
    assert [path.name for path in sorted((tmp_path / "rounds").glob("0*"))] == ["0001"]
    # Each once more than it was cut off after its work and before its result was written down; none after that.
    assert done == {"train": 2, "export": 2, "evaluate": 1}
    untouched = await a_round(config(tmp_path), real)
    assert untouched["round"] == "0002"


async def test_a_killed_process_leaves_a_round_that_goes_on(tmp_path: Path, frozen: Path) -> None:
    """SIGKILL in the middle of training; the lock ends with the process."""
    await store(tmp_path / "traces.sqlite3", traces(300, at_random(0.0), seed=1))
    settings = config(tmp_path)
    code = (
        "import json, sys; from mixfuse.app import loop; from mixfuse.app.loop_config import LoopConfig\n"
        "from mixfuse.contracts.strict_yaml import validate\n"
        "def train(*_): print('training', flush=True); sys.stdin.read()\n"
        "config = validate(json.loads(sys.argv[1]), LoopConfig, source='config')\n"
        "loop.run_round(config, loop.Tools(train, train, train))\n"
    )
    arguments = [sys.executable, "-c", code, settings.model_dump_json(exclude_unset=True)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(*arguments, **pipes)
    try:
        assert process.stdout
        assert await process.stdout.readline() == b"training\n"
        with pytest.raises(MixfuseError, match="another mixfuse loop is running"):
            await asyncio.to_thread(loop.run_round, settings, tools())
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()
    assert (await a_round(settings, tools()))["round"] == "0001"


def test_a_failing_command_says_where_to_look(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as lock:
        with_ = loop.commands(config(tmp_path), lock.fileno())
        log = tmp_path / "logs" / "train.log"
        said = rf"train judge ended with 2 \(log: {log}\): mixfuse: error: .*no such file"
        with pytest.raises(MixfuseError, match=said):
            with_.train(tmp_path / "none.yaml", [], log)
    assert "no such file" in log.read_text()


def test_a_mistake_in_the_config_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text(yaml.safe_dump(json.loads(config(tmp_path).model_dump_json(exclude_unset=True))))
    for override, message in (
        ("promote.margn=1", "unknown key 'promote.margn'; did you mean 'promote.margin'"),
        ("pairs.sources=[{path: a.jsonl, name: feedback}]", "'feedback' is the name of the round's own pairs"),
        ("traces.database=postgresql://me:secret@host/db", "set it in PGPASSWORD"),
        ("server={url: 'http://127.0.0.1:1'}", "no mixfuse server answers at http://127.0.0.1:1"),
    ):
        assert main(["loop", str(path), override]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "secret" not in error


# The swap, on a real role table with the gates before it


def liking(word: str, weights: Weights) -> Callable[[str, str], float]:
    """A judge of the frozen set's words who, of what the live members say, prefers this one's."""
    known = judging(weights)
    return lambda first, second: prefers(word)(first, second) if "answer" in first else known(first, second)


@pytest.mark.parametrize(
    ("likes", "promoted", "reason"),
    [
        ("beta", True, "better"),
        ("alpha", False, "the server refused it: "),
    ],
)
async def test_a_better_judge_is_swapped_in_if_it_stands_beside_the_old_one_on_live_requests(
    likes: str, promoted: bool, reason: str, tmp_path: Path, frozen: Path, house: House
) -> None:
    poor, good = json.loads(Path(serving(tmp_path, 20), "weights.json").read_text()), dict(WORDS)
    first = house.table.serving()["judge"]
    scripts = {"poor": liking("beta", poor), "good": liking(likes, good)}
    made = house.make("judge", Script(verdict=scripts["good"]))

    def export(_run: Path, adapter: Path, _log: Path) -> None:
        shutil.copytree(made, adapter)
        house.engine._scripts[adapter] = Script(verdict=scripts["good"])

    def evaluate(new: Path, old: Path | None, data: Sequence[Path], out: Path, _log: Path) -> None:
        assert old == first.directory, "it is to be compared with what serves"
        rows = [row for path in data for row in load(path)]
        views = [
            [Views(verdict(row.first, row.second), verdict(row.second, row.first)) for row in rows]
            for verdict in (scripts["good"], scripts["poor"])
        ]
        beside = {str(old): judge_report.report(rows, views[1])}
        judge_page.write(out, judge_report.report(rows, views[0], against=beside), rows, judge=str(new))

    await store(tmp_path / "fed.sqlite3", traces(30, at_random(0.0), seed=1))
    with opened(tmp_path / "roles.sqlite3") as database:
        admin = Starlette(routes=routes(house.swapper, StoredRoles(database, "test"), house.gates))
        async with serving_app(admin) as url:
            settings = config(
                tmp_path,
                server={"url": url, "shadow": 3, "timeout_s": 60},
                traces={"database": str(tmp_path / "fed.sqlite3"), "min_rows": 20, "settle_s": 0},
            )
            with_ = Tools(lambda *_: None, export, evaluate)
            at_work = asyncio.create_task(a_round(settings, with_))
            while not at_work.done():
                await (house.ask() if house.gates.of("judge") else asyncio.sleep(0.05))
            decision = await at_work
    assert decision["promoted"] is promoted
    assert decision["reason"].startswith(reason)
    assert decision["swap"]["state"] == ("promoted" if promoted else "refused")
    assert decision["swap"]["asked"]["shadow"] == 3
    now = house.table.serving()["judge"]
    assert now.directory == (Path(decision["adapter"]) if promoted else first.directory)


async def test_a_judge_is_not_swapped_for_one_it_was_not_compared_with(
    tmp_path: Path, frozen: Path, house: House
) -> None:
    """Somebody swaps another judge in while the round trains."""
    await store(tmp_path / "fed.sqlite3", traces(30, at_random(0.0), seed=1))
    other = house.make("judge", Script(verdict=prefers("beta")))
    real = tools()
    running = asyncio.get_running_loop()

    def train(recipe: Path, overrides: Sequence[str], log: Path) -> None:
        asyncio.run_coroutine_threadsafe(house.swapper.swap("judge", other), running).result(60)
        real.train(recipe, overrides, log)

    def evaluate(new: Path, _old: Path | None, data: Sequence[Path], out: Path, log: Path) -> None:
        real.evaluate(new, None, data, out, log)

    with opened(tmp_path / "roles.sqlite3") as database:
        admin = Starlette(routes=routes(house.swapper, StoredRoles(database, "test"), house.gates))
        async with serving_app(admin) as url:
            settings = config(
                tmp_path,
                server={"url": url},
                traces={"database": str(tmp_path / "fed.sqlite3"), "min_rows": 20, "settle_s": 0},
            )
            decision = await a_round(settings, Tools(train, real.export, evaluate))
    assert not decision["promoted"]
    assert f"{other} serves since the round began" in decision["reason"]
    assert house.table.serving()["judge"].directory == other
