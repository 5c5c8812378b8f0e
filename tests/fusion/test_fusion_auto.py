"""auto: who is asked, when asking stops, and what is kept of it."""

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import StartGateway

from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.combiner.artefact import BINS, Calibrated, Combiner, Data, MemberWeights, NoneOfThem, Policy, save
from mixfuse.fusion.combiner.evidence import Question, answer
from mixfuse.fusion.measure.combiner_replay import ask as ask_offline

ASK: dict[str, Any] = {"model": "fusion/auto", "messages": [{"role": "user", "content": "which?"}]}
NAMES = ("alpha", "beta", "gamma")


def combiner(target: float = 0.8, **keys: Any) -> Combiner:
    """Asks alpha, then beta, then gamma, until the confidence reaches the target."""
    following = {"": "alpha", "alpha": "beta", "beta": "alpha", "alpha+beta": "gamma"}
    fields: dict[str, Any] = {
        "agreement": "choice",
        "members": {
            name: MemberWeights(weight=weight, accuracy=0.7, price=price)
            for name, weight, price in zip(NAMES, (1.0, 1.2, 1.4), (1.0, 2.0, 4.0), strict=True)
        },
        "none": NoneOfThem(weight=0.5),
        "best_member": "gamma",
        "policies": [
            Policy(
                target=target,
                accuracy=0.8,
                cost_ratio=0.5,
                asked=2,
                actions={state: [name] * BINS for state, name in following.items()},
                calibration=Calibrated(slope=0.9),
            )
        ],
        "data": Data(sha256="0", questions=1, marked=1, complete=1),
    }
    return Combiner(**fields | keys)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "combiner.json"
    save(combiner(), path)
    return path


def say(upstream: FakeUpstream, *letters: str) -> None:
    for name, letter in zip(NAMES, letters, strict=True):
        upstream.models[name].text = f"The answer is ({letter})."


def asked(upstream: FakeUpstream) -> list[str]:
    return [request["model"] for request in upstream.requests]


async def test_asking_stops_when_the_target_is_reached(
    start_gateway: StartGateway, upstream: FakeUpstream, file: Path
) -> None:
    say(upstream, "B", "B", "C")
    gateway = await start_gateway(combiner=file)
    body = (await gateway.post(**ASK, fusion={"target": 0.8})).json()
    fusion = body["fusion"]
    assert asked(upstream) == ["alpha", "beta"]
    assert body["choices"][0]["message"]["content"] == "The answer is (B)."
    assert (fusion["mode"], fusion["reason"], fusion["stopped"]) == ("auto", "weighed", "target")
    assert fusion["asked"] == ["alpha", "beta"]
    assert [row["candidates"] for row in fusion["classes"]] == [[0, 1]]
    assert 0.8 < fusion["confidence"] < 1
    weighing = (await gateway.trace(fusion))["weighing"]
    assert weighing["combiner"] == combiner().revision
    assert weighing["confidence"] == fusion["confidence"]


async def test_where_they_disagree_all_are_asked_and_a_failed_one_counts_as_asked(
    start_gateway: StartGateway, upstream: FakeUpstream, file: Path
) -> None:
    say(upstream, "B", "C", "C")
    upstream.models["beta"] = Script(status=500)
    gateway = await start_gateway(combiner=file)
    fusion = (await gateway.post(**ASK)).json()["fusion"]
    assert asked(upstream) == ["alpha", "beta", "gamma"]
    assert (fusion["winner"], fusion["stopped"]) == (2, "all_asked")
    assert [call["member"] for call in fusion["failed"]] == ["beta"]


async def test_what_is_no_longer_needed_is_cancelled_and_in_the_ledger(
    start_gateway: StartGateway, upstream: FakeUpstream, file: Path
) -> None:
    say(upstream, "B", "B", "C")
    upstream.models["gamma"].hold = asyncio.Event()
    gateway = await start_gateway(combiner=file)
    fusion = (await gateway.post(**ASK, fusion={"prefer": "latency", "target": 0.8})).json()["fusion"]
    assert fusion["stopped"] == "target"
    await upstream.wait_aborted("gamma")
    calls = (await gateway.trace(fusion))["calls"]
    assert sorted((call["member"], call["outcome"]) for call in calls) == [
        ("alpha", "ok"),
        ("beta", "ok"),
        ("gamma", "cancelled_straggler"),
    ]


async def test_the_deadline_and_the_budget_end_the_asking(
    start_gateway: StartGateway, upstream: FakeUpstream, file: Path
) -> None:
    say(upstream, "B", "B", "C")
    upstream.models["beta"].hold = asyncio.Event()
    gateway = await start_gateway(combiner=file)
    fusion = (await gateway.post(**ASK, fusion={"deadline_ms": 400})).json()["fusion"]
    assert (fusion["winner"], fusion["stopped"]) == (0, "deadline")
    assert [call["type"] for call in fusion["failed"]] == ["timeout"]
    members = [
        {"name": name, "base_url": upstream.base_url, "model": name, "price": {"completion": 1000}, "max_tokens": 100}
        for name in NAMES
    ]
    frugal = await start_gateway(members, combiner=file)
    fusion = (await frugal.post(**ASK, fusion={"max_cost": 0.1})).json()["fusion"]
    assert (fusion["asked"], fusion["stopped"]) == (["alpha"], "budget")


async def test_exploring_asks_all_and_records_how_probable_that_was(
    start_gateway: StartGateway, upstream: FakeUpstream, file: Path
) -> None:
    say(upstream, "B", "B", "C")
    gateway = await start_gateway(combiner=file, modes={"explore": 1.0})
    fusion = (await gateway.post(**ASK)).json()["fusion"]
    assert (len(asked(upstream)), fusion["stopped"]) == (3, "explore")
    assert (await gateway.trace(fusion))["weighing"]["propensities"] == {"gamma": 1.0}


async def test_an_answer_that_is_not_sure_is_marked_or_refused(
    start_gateway: StartGateway, upstream: FakeUpstream, file: Path
) -> None:
    say(upstream, "B", "C", "D")
    marking = await start_gateway(combiner=file, modes={"abstain_below": 0.6})
    assert (await marking.post(**ASK)).json()["fusion"]["low_confidence"] is True
    refusing = await start_gateway(combiner=file, modes={"abstain_below": 0.6, "on_abstain": "refuse"})
    response = await refusing.post(**ASK)
    assert (response.status_code, response.json()["error"]["type"]) == (422, "low_confidence")


async def test_a_changed_file_is_read_and_a_broken_one_leaves_the_old(
    start_gateway: StartGateway, upstream: FakeUpstream, file: Path
) -> None:
    say(upstream, "B", "B", "B")
    gateway = await start_gateway(combiner=file)
    save(combiner(target=0.99), file)
    os.utime(file, ns=(1, 1))
    assert len((await gateway.post(**ASK)).json()["fusion"]["asked"]) == 3
    file.write_text("{}")
    assert len((await gateway.post(**ASK)).json()["fusion"]["asked"]) == 3
    ready = await gateway.http.get("/readyz")
    assert ready.status_code == 200
    assert "keeps serving" in ready.json()["problems"][0]


async def test_a_combiner_of_another_pool_is_refused(start_gateway: StartGateway, file: Path) -> None:
    stranger = {"stranger": MemberWeights(weight=1, accuracy=0.5, price=1)}
    save(combiner(members=stranger, best_member="stranger", policies=[]), file)
    with pytest.raises(MixfuseError, match="knows none of the pool's members"):
        await start_gateway(combiner=file)


async def test_without_a_combiner_votes_decide(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    say(upstream, "B", "C", "C")
    gateway = await start_gateway(judge=None, modes={"agreement": "choice"})
    fusion = (await gateway.post(**ASK)).json()["fusion"]
    assert (fusion["winner"], fusion["combiner"], len(fusion["asked"])) == (1, None, 3)
    refused = await gateway.post(**{**ASK, "model": "fusion/best-of"}, fusion={"target": 0.5})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "fusion.target")


async def test_without_a_combiner_votes_decide_where_the_judge_fails(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    say(upstream, "B", "C", "C")
    upstream.models["judge"] = Script(status=500)
    gateway = await start_gateway(modes={"agreement": "choice"})
    fusion = (await gateway.post(**ASK)).json()["fusion"]
    assert (fusion["winner"], fusion["reason"]) == (1, "weighed")
    assert "500" in fusion["error"]
    leading = max(fusion["classes"], key=lambda row: row["probability"])
    assert (leading["candidates"], fusion["confidence"]) == ([1, 2], pytest.approx(leading["probability"]))


async def test_a_target_above_all_of_the_combiners_is_not_reported_as_reached(
    start_gateway: StartGateway, upstream: FakeUpstream, file: Path
) -> None:
    say(upstream, "C", "C", "C")
    gateway = await start_gateway(combiner=file)
    highest = max(policy.target for policy in combiner().policies)
    reached = (await gateway.post(**ASK, fusion={"target": highest})).json()["fusion"]
    beyond = (await gateway.post(**ASK, fusion={"target": 1.0})).json()["fusion"]
    assert reached["confidence"] == beyond["confidence"]
    assert (reached["stopped"] == "target", beyond["stopped"] == "target") == (True, False)


async def test_at_the_deadline_each_member_under_way_is_named(
    start_gateway: StartGateway, upstream: FakeUpstream, file: Path
) -> None:
    for name in NAMES:
        upstream.models[name] = Script(hold=asyncio.Event())
    gateway = await start_gateway(combiner=file, modes={"agreement": "choice", "deadline_ms": 200})
    late = await gateway.post(**ASK)
    assert (late.status_code, late.json()["error"]["failed"][0]["type"]) == (503, "timeout")


async def test_200_questions_over_http_go_as_they_do_offline(
    start_gateway: StartGateway, upstream: FakeUpstream, file: Path
) -> None:
    draw, fitted = random.Random(5), combiner()
    gateway = await start_gateway(combiner=file)
    for number in range(200):
        letters = [draw.choice("AABC") for _ in NAMES]
        say(upstream, *letters)
        texts = [f"The answer is ({letter})." for letter in letters]
        answers = tuple(answer(name, text, "choice") for name, text in zip(NAMES, texts, strict=True))
        offline = ask_offline(fitted, fitted.policies[0], Question(str(number), answers))
        body = (await gateway.post(**ASK)).json()
        assert tuple(body["fusion"]["asked"]) == offline.members
        assert body["fusion"]["confidence"] == pytest.approx(offline.confidence)
        assert offline.weighing is not None
        hits = [row for row in answers if row.member in offline.members]
        assert body["choices"][0]["message"]["content"] == hits[offline.weighing.leader].text
