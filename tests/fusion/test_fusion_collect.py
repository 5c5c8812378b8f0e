"""Collecting pool responses: the rows, the verifier's marks, and going on after an interruption."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import StartGateway

from mixfuse.contracts.database import opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import read_jsonl
from mixfuse.contracts.tasks import TaskSet
from mixfuse.fusion.batch import Sampling, Target
from mixfuse.fusion.calls.pool import HttpRoles
from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.http.keys import create
from mixfuse.fusion.labels.collect import CollectReport, collect, collect_answers

Config = Callable[..., FusionConfig]


@dataclass(frozen=True)
class Sum:
    id: str
    prompt: str
    reference: str
    domain: str | None = None


TASKS = [Sum(f"t{number}", f"1 + {number}?", str(number + 1)) for number in range(4)]


def is_of_alpha(_task: Sum, text: str) -> bool:
    return "alpha" in text


async def gather(
    config: FusionConfig,
    out: Path,
    *,
    tasks: list[Sum] = TASKS,
    samples: int = 2,
    concurrency: int = 4,
    seed: int = 0,
) -> CollectReport:
    return await collect(
        config,
        None,
        TaskSet(tasks, is_of_alpha),
        Sampling(0.8, 16, seed),
        out,
        samples=samples,
        concurrency=concurrency,
        progress=False,
    )


async def test_each_member_answers_each_task_several_times(
    config: Config, upstream: FakeUpstream, tmp_path: Path
) -> None:
    out = tmp_path / "pool.jsonl"
    upstream.models["alpha"].text = "alpha\u2028says"  # some readers take U+2028 for the end of a line
    report = await gather(config(["alpha", "beta"]), out, seed=5)
    rows = read_jsonl(out)
    assert [row["id"] for row in rows] == [task.id for task in TASKS]
    assert rows[1] == {
        "id": "t1",
        "prompt": "1 + 1?",
        "reference": "2",
        "responses": [
            {"model": "alpha", "text": "alpha\u2028says", "correct": True},
            {"model": "alpha", "text": "alpha\u2028says", "correct": True},
            {"model": "beta", "text": "the answer of beta", "correct": False},
            {"model": "beta", "text": "the answer of beta", "correct": False},
        ],
    }
    sent = {(request["temperature"], request["max_tokens"], request["seed"]) for request in upstream.requests}
    assert sent == {(0.8, 16, 5), (0.8, 16, 6)}
    assert (report.rows, report.answers["alpha"], report.correct["alpha"], report.correct["beta"]) == (4, 8, 8, 0)
    assert list(tmp_path.glob("*.partial")) == []


async def test_an_interrupted_run_goes_on_where_it_was(config: Config, upstream: FakeUpstream, tmp_path: Path) -> None:
    out, pool = tmp_path / "pool.jsonl", config(["alpha"])
    partial = tmp_path / "pool.jsonl.partial"
    upstream.models["alpha"].text = "alpha\u2028says"
    upstream.models["alpha"].hold, upstream.models["alpha"].hold_from = asyncio.Event(), 3
    running = asyncio.create_task(gather(pool, out, samples=1, concurrency=1))
    await upstream.wait_asked("alpha", 3)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not out.exists()
    assert [json.loads(line).get("id") for line in partial.read_text().split("\n")[:-1]] == [None, "t0", "t1"]
    with partial.open("a") as stream:
        stream.write('{"id": "t2", "prom')  # torn by a kill

    upstream.models["alpha"] = Script("the answer of alpha")
    with pytest.raises(MixfuseError, match="begun with other settings"):
        await gather(pool, out, samples=2)
    report = await gather(pool, out, samples=1)
    assert (report.resumed, report.rows) == (2, 4)
    assert [row["id"] for row in read_jsonl(out)] == ["t0", "t1", "t2", "t3"]
    assert [request["messages"][0]["content"] for request in upstream.requests[3:]] == ["1 + 2?", "1 + 3?"]
    assert not partial.exists()


async def test_a_member_that_fails_is_reported(config: Config, upstream: FakeUpstream, tmp_path: Path) -> None:
    upstream.models["beta"] = Script(status=500)
    report = await gather(config(["alpha", "beta"]), tmp_path / "pool.jsonl")
    assert report.failures == {("beta", "upstream_error"): 8}
    assert any("beta" in line and "8 upstream_error" in line for line in report.lines())
    row = read_jsonl(tmp_path / "pool.jsonl")[0]
    assert {response["model"] for response in row["responses"]} == {"alpha"}
    assert {failure["type"] for failure in row["failed"]} == {"upstream_error"}


async def test_tasks_nobody_answers_are_an_error_and_tried_again(
    config: Config, upstream: FakeUpstream, tmp_path: Path
) -> None:
    upstream.models["alpha"] = Script(status=500)
    with pytest.raises(MixfuseError, match=r"4 of 4 tasks were answered by no member.*upstream_error"):
        await gather(config(["alpha"]), tmp_path / "pool.jsonl")
    upstream.models["alpha"] = Script("alpha again")
    assert (await gather(config(["alpha"]), tmp_path / "pool.jsonl")).rows == 4


async def test_a_finished_file_is_not_overwritten(config: Config, upstream: FakeUpstream, tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_text("{}\n")
    with pytest.raises(MixfuseError, match="exists already"):
        await gather(config(["alpha"]), tmp_path / "pool.jsonl")
    with pytest.raises(MixfuseError, match="no tasks"):
        await gather(config(["alpha"]), tmp_path / "other.jsonl", tasks=[])
    assert upstream.requests == []


async def test_roles_are_reached_through_a_running_gateway(
    start_gateway: StartGateway, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = await start_gateway()  # whose member "alpha" stands for the role "alpha"
    pool = config([{"name": "mine", "role": "alpha"}])

    def collect_in_a_thread() -> CollectReport:
        tasks = TaskSet(TASKS, is_of_alpha)
        out = tmp_path / "pool.jsonl"
        return collect_answers(pool, Target(gateway.url), tasks, Sampling(0.0, 4, 0), out, samples=1, concurrency=2)

    report = await asyncio.to_thread(collect_in_a_thread)
    assert report.correct["mine"] == 4
    assert "mine: 4 of 4 correct" in capsys.readouterr().out


async def test_a_server_that_does_not_run_is_one_line_and_few_calls(config: Config, tmp_path: Path) -> None:
    pool = config([{"name": "one", "role": "one"}, {"name": "two", "role": "two"}])
    tasks = [Sum(f"t{number}", f"{number}?", "0") for number in range(200)]
    where = HttpRoles("http://127.0.0.1:9/v1")
    with pytest.raises(MixfuseError, match="no member of the pool can be reached") as caught:
        await collect(
            pool, where, TaskSet(tasks, is_of_alpha), Sampling(), tmp_path / "pool.jsonl",
            samples=3, concurrency=1, progress=False,
        )  # fmt: skip
    assert str(caught.value).count("cannot connect") == 1  # the same reason is not repeated for each member and sample
    assert "one, two: unreachable" in str(caught.value)
    assert "--url" in str(caught.value)
    assert not (tmp_path / "pool.jsonl").exists()


async def test_the_servers_key_is_sent(
    start_gateway: StartGateway, config: Config, upstream: FakeUpstream, tmp_path: Path
) -> None:
    with opened(tmp_path / "keys.sqlite3") as database:
        _, secret = create(database, "jane")
    gateway = await start_gateway(trace_db=str(tmp_path / "keys.sqlite3"))
    pool = config([{"name": "mine", "role": "alpha"}])
    tasks, out = TaskSet(TASKS, is_of_alpha), tmp_path / "pool.jsonl"
    for server, right in ((Target(gateway.url), False), (Target(f"{gateway.url}/v1/", secret), True)):
        run = asyncio.to_thread(
            collect_answers, pool, server, tasks, Sampling(0.0, 4, 0), out, samples=1, concurrency=2
        )
        if right:
            assert (await run).rows == 4
        else:
            with pytest.raises(MixfuseError, match="answered by no member"):
                await run
