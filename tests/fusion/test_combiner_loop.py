"""The combiner in `mixfuse loop`: fitted to traces, held against the serving one, swapped, rolled back."""

import asyncio
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream
from fusion_harness import StartGateway
from test_fusion_auto import NAMES, combiner, say

from mixfuse.app import combiner_file, loop
from mixfuse.app.loop_config import LoopConfig
from mixfuse.app.promotion import summary_lines
from mixfuse.cli.entry import main
from mixfuse.contracts.database import opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import read_json, write_jsonl
from mixfuse.contracts.strict_yaml import validate
from mixfuse.contracts.trace import Call, Trace
from mixfuse.fusion.combiner.artefact import load, save
from mixfuse.fusion.combiner.serving import ServingCombiner
from mixfuse.fusion.config import TraceConfig
from mixfuse.fusion.store.traces import TraceStore

ACCURACIES = {"alpha": 0.9, "beta": 0.55, "gamma": 0.5}


def letters(draw: random.Random, accuracies: Mapping[str, float]) -> dict[str, str]:
    """What each member answers; A is right."""
    return {name: "A" if draw.random() < share else draw.choice("BCDE") for name, share in accuracies.items()}


def rows(count: int, seed: int, accuracies: Mapping[str, float] = ACCURACIES) -> list[dict[str, Any]]:
    """A recorded pool."""
    draw = random.Random(seed)
    return [
        {
            "id": f"{seed}-{number}",
            "prompt": f"question {seed} {number}",
            "responses": [
                {"model": name, "text": f"The answer is ({letter}).", "choice": letter, "correct": letter == "A"}
                for name, letter in letters(draw, accuracies).items()
            ],
        }
        for number in range(count)
    ]


def traces(count: int, seed: int, *, flip: float = 0.0) -> list[Trace]:
    """Traces of auto with everybody asked, and users' marks, some of them wrong."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        said = letters(draw, ACCURACIES)
        right = [place for place, letter in enumerate(said.values()) if (letter == "A") != (draw.random() < flip)]
        wrong = [place for place in range(len(said)) if place not in right]
        calls = [
            Call(stage="answer", member=name, model=name, candidate=place, text=f"The answer is ({letter}).")
            for place, (name, letter) in enumerate(said.items())
        ]
        made.append(
            Trace(
                model="fusion/auto",
                mode="auto",
                messages=[{"role": "user", "content": f"live {seed} {number}"}],
                candidates=list(said),
                calls=calls,
                winner=0,
                reason="weighed",
                answer=calls[0].text,
                feedback=[{"correct": right, "wrong": wrong}],
            )
        )
    return made


def store(path: Path, made: list[Trace]) -> None:
    async def fill() -> None:
        with opened(path) as database:
            kept = TraceStore(database, TraceConfig())
            for trace in made:
                await kept.add(trace)
            await kept.close()

    asyncio.run(fill())


@pytest.fixture
def rounds(tmp_path: Path) -> LoopConfig:
    write_jsonl(tmp_path / "frozen.jsonl", rows(300, seed=9))
    data = {
        "rounds": str(tmp_path / "rounds"),
        "traces": {"database": str(tmp_path / "traces.sqlite3"), "settle_s": 0, "min_rows": 50},
        "combiner": {
            "file": str(tmp_path / "combiner.json"),
            "frozen": [str(tmp_path / "frozen.jsonl")],
            "agreement": "choice",
        },
    }
    return validate(data, LoopConfig, source="loop.yaml")


def test_a_better_combiner_takes_the_place_of_the_serving_one_and_is_rolled_back(
    rounds: LoopConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The serving one believes gamma, which is right half the time; the new one learns whom to believe."""
    file = tmp_path / "combiner.json"
    save(combiner(), file)
    before = load(file).revision
    store(tmp_path / "traces.sqlite3", traces(250, seed=1))
    decision = loop.run_round(rounds)
    assert decision is not None
    found = decision["combiner"]
    assert found["promoted"], found
    assert (found["before"], found["revision"]) == (before, load(file).revision)
    assert found["frozen"]["new_accuracy"] > found["frozen"]["serving_accuracy"]
    assert found["live"]["n"] == 250
    assert f"combiner: promoted {found['revision']}; better" in "\n".join(summary_lines(decision))
    assert main(["combiner", "history", str(file)]) == 0
    assert before in capsys.readouterr().out
    assert main(["combiner", "rollback", str(file)]) == 0
    assert load(file).revision == before
    assert main(["combiner", "rollback", str(file)]) == 2
    assert "nothing to roll back to" in capsys.readouterr().err


def test_a_first_combiner_must_beat_the_best_member_alone(rounds: LoopConfig, tmp_path: Path) -> None:
    """One member is so much better that nothing is gained by asking the others."""
    store(tmp_path / "traces.sqlite3", traces(120, seed=2))
    decision = loop.run_round(rounds)
    assert decision is not None
    assert not decision["combiner"]["promoted"]
    assert not (tmp_path / "combiner.json").exists()


def test_feedback_that_is_turned_round_replaces_nothing(rounds: LoopConfig, tmp_path: Path) -> None:
    file = tmp_path / "combiner.json"
    store(tmp_path / "traces.sqlite3", traces(250, seed=1))
    good = loop.run_round(rounds)
    assert good is not None
    write_jsonl(tmp_path / "pool.jsonl", rows(300, seed=4))
    assert main(["combiner", "fit", str(tmp_path / "pool.jsonl"), "--out", str(file)]) == 0
    serving = load(file).revision
    store(tmp_path / "traces.sqlite3", traces(1500, seed=3, flip=1.0))
    decision = loop.run_round(rounds)
    assert decision is not None
    assert not decision["combiner"]["promoted"]
    assert load(file).revision == serving


def test_too_few_marks_fit_nothing(rounds: LoopConfig, tmp_path: Path) -> None:
    few = rounds.model_copy(update={"traces": rounds.traces.model_copy(update={"min_rows": 5})})
    store(tmp_path / "traces.sqlite3", traces(10, seed=1))
    decision = loop.run_round(few)
    assert decision is not None
    assert not decision["combiner"]["promoted"]
    assert "marked" in decision["combiner"]["reason"]


def test_an_interrupted_round_goes_on_and_swaps_once(
    rounds: LoopConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "combiner.json"
    save(combiner(), file)
    store(tmp_path / "traces.sqlite3", traces(250, seed=1))
    swap = combiner_file.swap
    monkeypatch.setattr(combiner_file, "swap", lambda new, old: (swap(new, old), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        loop.run_round(rounds)
    monkeypatch.setattr(combiner_file, "swap", swap)
    decision = loop.run_round(rounds)
    assert decision is not None and decision["combiner"]["promoted"]
    assert load(file).revision == decision["combiner"]["revision"]
    assert len(combiner_file.history(file)) == 1


async def test_a_running_gateway_follows_a_swap_and_a_rollback(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path
) -> None:
    say(upstream, "B", "B", "B")
    file, new = tmp_path / "combiner.json", tmp_path / "new.json"
    save(combiner(), file)
    save(combiner(target=0.99), new)
    gateway = await start_gateway(combiner=file)
    asked: dict[str, Any] = {"model": "fusion/auto", "messages": [{"role": "user", "content": "?"}]}
    seen = []
    for change in (None, lambda: combiner_file.swap(new, file), lambda: combiner_file.rollback(file)):
        if change is not None:
            change()
        seen.append((await gateway.post(**asked)).json()["fusion"]["combiner"])
    assert seen == [combiner().revision, combiner(target=0.99).revision, combiner().revision]


def test_what_cannot_serve_is_not_swapped_in(tmp_path: Path) -> None:
    file, strange = tmp_path / "combiner.json", tmp_path / "strange.json"
    save(combiner(), file)
    strange.write_text("{}")
    with pytest.raises(MixfuseError, match="no combiner"):
        combiner_file.swap(strange, file)
    fitted = combiner()
    others = {f"other-{name}": fitted.members[name] for name in NAMES}
    save(combiner(members=others, best_member="other-gamma", policies=[]), strange)
    with pytest.raises(MixfuseError, match="knows none of the members"):
        combiner_file.swap(strange, file)
    assert load(file).revision == combiner().revision
    assert combiner_file.history(file) == []
    assert combiner_file.swap(file, file).old == combiner().revision
    assert combiner_file.history(file) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"combiner": None}, "name a 'recipe'"),
        ({"recipe": "judge.yaml"}, "'frozen' is missing"),
        ({"combiner": {"file": "c.json", "frozen": []}}, "combiner.frozen"),
        ({"combiner": {"file": "c.json", "frozen": ["f"], "target": 1.0}}, "combiner.target"),
    ],
)
def test_a_config_that_asks_for_nothing_is_refused(rounds: LoopConfig, change: dict[str, Any], words: str) -> None:
    data = rounds.model_dump(mode="json", exclude_unset=True) | change
    with pytest.raises(MixfuseError, match=words):
        validate({key: value for key, value in data.items() if value is not None}, LoopConfig, source="loop.yaml")


def test_the_rounds_files_are_all_there(rounds: LoopConfig, tmp_path: Path) -> None:
    save(combiner(), tmp_path / "combiner.json")
    store(tmp_path / "traces.sqlite3", traces(250, seed=1))
    loop.run_round(rounds)
    folder = tmp_path / "rounds" / "0001"
    assert load(folder / "combiner.json").figures["n"] == 250
    assert read_json(folder / "decision.json")["combiner"]["promoted"]
    assert {path.stem for path in (folder / "steps").iterdir()} == {
        "combiner", "combiner-fit", "combiner-frozen", "combiner-live",
    }  # fmt: skip


async def test_a_swap_is_served_though_the_client_that_first_saw_it_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, new = tmp_path / "combiner.json", tmp_path / "new.json"
    save(combiner(), file)
    save(combiner(target=0.99), new)
    serving = ServingCombiner(file, NAMES)
    combiner_file.swap(new, file)
    leaves = asyncio.create_task(serving.current())
    await asyncio.sleep(0)  # it has seen the change, and reads
    leaves.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaves
    assert (await serving.current()).revision == combiner(target=0.99).revision


@pytest.mark.parametrize("command", ["swap", "rollback", "history"])
def test_a_folder_is_no_combiner_whatever_its_name(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(combiner(), tmp_path / "new.json")
    for folder in (".", "/", str(tmp_path)):
        assert main(["combiner", command, *([str(tmp_path / "new.json")] if command == "swap" else []), folder]) == 2
        assert "a folder; give the file" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.json"]


@pytest.mark.parametrize("command", ["rollback", "history"])
def test_where_nothing_is_nothing_is_made(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["combiner", command, str(tmp_path / "none" / "combiner.json")]) == 2
    assert "no such" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(MixfuseError, match="a device or a pipe"):
        load(tmp_path / "pipe.json")
