"""auto: who is asked, when asking stops, and what is kept of it."""

import asyncio
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import StartGateway
from openai import APIError

from mixfuse.contracts.database import opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import write_jsonl
from mixfuse.fusion.combiner.artefact import (
    BINS,
    Calibrated,
    Combiner,
    Data,
    DomainReader,
    MemberWeights,
    NoneOfThem,
    Policy,
    save,
)
from mixfuse.fusion.combiner.evidence import Question, answer, read_pool
from mixfuse.fusion.measure.combiner_fit import fit_combiner
from mixfuse.fusion.measure.combiner_replay import ask as ask_offline
from mixfuse.fusion.store.export_traces import read as export_rows

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


async def test_a_request_that_names_no_domain_gets_the_one_that_its_words_tell(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path
) -> None:
    """Alpha is the one to believe in law; the last message of the user decides, unless the request names a domain."""
    say(upstream, "B", "C", "C")
    reader = DomainReader(
        domains=["law", "maths"],
        bias=[0, 0],
        words={"court": [9, 0], "matrix": [0, 9]},
        sure=0.6,
        accuracy=1,
        named=1,
    )
    fitted = combiner(target=1.0, reader=reader)
    members = {name: member.model_copy() for name, member in fitted.members.items()}
    members["alpha"] = members["alpha"].model_copy(update={"domains": {"law": 9.0}})
    save(fitted.model_copy(update={"members": members}), tmp_path / "reading.json")
    gateway = await start_gateway(combiner=tmp_path / "reading.json")
    body = {**ASK, "messages": [{"role": "user", "content": "matrix"}, {"role": "user", "content": "the Court?"}]}
    seen = (await gateway.post(**body)).json()["fusion"]
    assert (seen["winner"], (await gateway.trace(seen))["weighing"]["domain"]) == (0, "law")
    named = (await gateway.post(**body, fusion={"domain": "maths"})).json()["fusion"]
    assert (named["winner"], (await gateway.trace(named))["weighing"]["domain"]) == (1, "maths")
    doubt = (await gateway.post(**body | {"messages": [{"role": "user", "content": "?"}]})).json()["fusion"]
    assert (await gateway.trace(doubt))["weighing"]["domain"] is None


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
    fusion = (await gateway.post(**ASK, fusion={"deadline_ms": 3000})).json()["fusion"]
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


def priced(upstream: FakeUpstream, *names: str, **prices: float) -> list[Any]:
    """Members with prices, a hundred tokens an answer."""
    return [
        {
            "name": name,
            "base_url": upstream.base_url,
            "model": name,
            "max_tokens": 100,
            "price": {"completion": prices.get(name, 1.0)},
        }
        for name in names or NAMES
    ]


JUDGED = {"judges": {"judge": 1.0}}


@pytest.mark.parametrize(("judges_price", "asked_first"), [(0.01, "judge"), (1e6, "gamma")])
async def test_the_judge_is_asked_instead_of_a_member_where_it_gains_more_for_its_price(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path, judges_price: float, asked_first: str
) -> None:
    say(upstream, "B", "C", "C")
    save(combiner(**JUDGED), tmp_path / "combiner.json")
    upstream.models["judge"] = Script(verdict=lambda first, second: 0.5 + 0.45 * (("(B)" in first) - ("(B)" in second)))
    gateway = await start_gateway(
        priced(upstream, gamma=100.0),
        combiner=tmp_path / "combiner.json",
        judge={"base_url": upstream.base_url, "model": "judge", "price": {"completion": judges_price}},
    )
    fusion = (await gateway.post(**ASK, fusion={"target": 0.8})).json()["fusion"]
    assert next(name for name in asked(upstream) if name not in ("alpha", "beta")) == asked_first
    if asked_first == "judge":
        (verdict,) = fusion["verdicts"]
        assert (verdict["first"], verdict["second"], verdict["winner"]) == (0, 1, "first")
    else:
        assert fusion["verdicts"] == []


async def test_a_reward_models_scores_are_evidence_for_the_combiner(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path
) -> None:
    say(upstream, "B", "C", "D")
    save(combiner(**JUDGED), tmp_path / "combiner.json")
    liked = "(C)"
    upstream.models["judge"] = Script(reward=lambda text: 4.0 if liked in text else 0.0)
    gateway = await start_gateway(
        combiner=tmp_path / "combiner.json",
        judge={"kind": "reward", "base_url": upstream.base_url, "model": "judge"},
    )
    fusion = (await gateway.post(**ASK, fusion={"target": 0.99})).json()["fusion"]
    assert fusion["winner"] == 1
    assert {verdict["read"] for verdict in fusion["verdicts"]} == {"scores"}
    scored = [request["messages"][-1]["content"] for request in upstream.asked("judge")]
    assert len(scored) == len(set(scored)) > 1
    liked = "(D)"
    again = (await gateway.post(**ASK, fusion={"target": 0.99})).json()["fusion"]
    assert again["winner"] == 2


async def test_a_judge_that_weighs_nothing_is_never_asked(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path
) -> None:
    say(upstream, "B", "C", "D")
    save(combiner(judges={"judge": 0.0}), tmp_path / "combiner.json")
    gateway = await start_gateway(combiner=tmp_path / "combiner.json")
    await gateway.post(**ASK)
    assert "judge" not in asked(upstream)


async def test_of_members_alike_the_quicker_is_asked_first(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path
) -> None:
    say(upstream, "B", "B", "B")
    alike = {
        name: MemberWeights(weight=1.0, accuracy=0.7, price=1.0, latency_ms=latency)
        for name, latency in zip(NAMES, (900.0, 100.0, 500.0), strict=True)
    }
    save(combiner(members=alike), tmp_path / "combiner.json")
    gateway = await start_gateway(combiner=tmp_path / "combiner.json")
    await gateway.post(**ASK, fusion={"prefer": "latency", "width": 1, "target": 0.8})
    assert asked(upstream) == ["beta", "gamma"]


async def test_a_member_that_hangs_does_not_hold_up_the_next(
    start_gateway: StartGateway, upstream: FakeUpstream, file: Path
) -> None:
    say(upstream, "B", "B", "B")
    upstream.models["alpha"].hold = asyncio.Event()
    gateway = await start_gateway(combiner=file, modes={"patience_ms": 50})
    fusion = (await gateway.post(**ASK, fusion={"target": 0.8})).json()["fusion"]
    assert fusion["asked"] == ["alpha", "beta", "gamma"]
    assert fusion["stopped"] == "target"
    await upstream.wait_aborted("alpha")
    outcomes = {call["member"]: call["outcome"] for call in (await gateway.trace(fusion))["calls"]}
    assert outcomes == {"alpha": "cancelled_straggler", "beta": "ok", "gamma": "ok"}


@pytest.mark.parametrize("models", [("alpha", "beta", "gamma"), ("alpha", "alpha", "alpha")])
async def test_where_all_are_unsure_different_models_debate(
    start_gateway: StartGateway, upstream: FakeUpstream, file: Path, models: tuple[str, ...]
) -> None:
    for name, letter in zip(NAMES, "BCD", strict=True):
        upstream.models[name].reply = lambda text, letter=letter: (
            "The answer is (C)." if "Others answered" in text else f"The answer is ({letter})."
        )
    members = [
        {"name": name, "base_url": upstream.base_url, "model": model} for name, model in zip(NAMES, models, strict=True)
    ]
    if len(set(models)) == 1:
        letters = iter("BCD")
        upstream.models["alpha"].reply = lambda _text: f"The answer is ({next(letters)})."
    gateway = await start_gateway(members, combiner=file, modes={"escalate": "debate"})
    body = (await gateway.post(**ASK)).json()
    if len(set(models)) == 1:
        assert len(asked(upstream)) == 3
        assert "debate" not in body["fusion"]
    else:
        assert body["choices"][0]["message"]["content"] == "The answer is (C)."
        assert body["fusion"]["debate"]["rounds"] == 1
        assert [row["candidates"] for row in body["fusion"]["classes"]] == [[0, 1, 2]]


async def test_where_all_are_unsure_the_synthesizer_writes_the_answer(
    start_gateway: StartGateway, upstream: FakeUpstream, file: Path
) -> None:
    say(upstream, "B", "C", "D")
    gateway = await start_gateway(combiner=file, modes={"escalate": "merge"})
    body = (await gateway.post(**ASK)).json()
    assert (body["fusion"]["reason"], body["fusion"]["stopped"]) == ("synthesis", "all_asked")
    assert body["choices"][0]["message"]["content"] == "one merged answer in several words"
    upstream.models["synth"] = Script(status=500)
    body = (await gateway.post(**ASK)).json()
    best = body["fusion"]["classes"][0]["candidates"][0]
    assert (body["fusion"]["reason"], body["fusion"]["winner"]) == ("synthesizer_failed", best)
    say(upstream, "B", "B", "B")
    assert (await gateway.post(**ASK, fusion={"target": 0.8})).json()["fusion"]["reason"] == "weighed"


async def test_where_nothing_is_known_the_best_member_is_asked_whatever_its_place(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path
) -> None:
    say(upstream, "B", "C", "D")
    alike = {name: MemberWeights(weight=1.0, accuracy=0.7, price=1.0) for name in NAMES}
    save(combiner(members=alike, fallback="too few marks", policies=[]), tmp_path / "combiner.json")
    gateway = await start_gateway(combiner=tmp_path / "combiner.json")
    fusion = (await gateway.post(**ASK)).json()["fusion"]
    assert (fusion["asked"], fusion["winner"]) == (["gamma"], 2)


@pytest.mark.parametrize("target", [True, "0.8", 0, -1, 1.5, 1e400, [], {}])
async def test_a_target_that_is_no_probability_is_refused(
    start_gateway: StartGateway, upstream: FakeUpstream, file: Path, target: Any
) -> None:
    gateway = await start_gateway(combiner=file)
    content = json.dumps(ASK | {"fusion": {"target": target}}).encode()
    headers = {"content-type": "application/json"}
    response = await gateway.http.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert "target" in response.json()["error"]["message"] or "JSON" in response.json()["error"]["message"]
    assert asked(upstream) == []


async def test_a_member_that_the_combiner_does_not_know_weighs_as_members_do(
    start_gateway: StartGateway, upstream: FakeUpstream, file: Path
) -> None:
    say(upstream, "B", "C", "D")
    upstream.models["delta"] = Script("The answer is (C).")
    gateway = await start_gateway([*NAMES, "delta"], combiner=file)
    fusion = (await gateway.post(**ASK)).json()["fusion"]
    assert fusion["asked"] == ["alpha", "beta", "gamma", "delta"]
    assert fusion["classes"][0]["candidates"] == [1, 3]
    assert fusion["classes"][0]["score"] == pytest.approx(1.2 + 1.2)


async def test_it_streams_calls_tools_and_samples_with_the_official_client(
    start_gateway: StartGateway, upstream: FakeUpstream, file: Path
) -> None:
    say(upstream, "B", "B", "C")
    gateway = await start_gateway(combiner=file)
    stream = await gateway.client.chat.completions.create(**ASK, stream=True, extra_body={"fusion": {"target": 0.8}})
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
    assert text == "The answer is (B)."
    tool: Any = {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
    for name in NAMES:
        upstream.models[name].tool_calls = [("weather", "{}")]
    called = await gateway.client.chat.completions.create(**ASK, tools=[tool], extra_body={"fusion": {"target": 0.8}})
    assert called.choices[0].finish_reason == "tool_calls"
    for name in NAMES:
        upstream.models[name].tool_calls = None
    sampled = (await gateway.post(**ASK, fusion={"samples": 2, "target": 0.8})).json()["fusion"]
    assert len(sampled["candidates"]) == 2 * len(sampled["asked"])


@pytest.mark.slow
async def test_verdicts_and_propensities_reach_the_next_fit(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path
) -> None:
    """From a log in which gamma was asked by chance alone, its accuracy is recovered."""
    draw = random.Random(3)
    save(combiner(target=0.6, **JUDGED), tmp_path / "combiner.json")
    upstream.models["judge"] = Script(verdict=lambda first, second: 0.5 + 0.3 * (("(A)" in first) - ("(A)" in second)))
    gateway = await start_gateway(combiner=tmp_path / "combiner.json", modes={"explore": 0.3})
    for number in range(150):
        say(upstream, *("A" if draw.random() < share else draw.choice("BC") for share in (0.8, 0.7, 0.9)))
        body = (
            await gateway.post(model="fusion/auto", messages=[{"role": "user", "content": f"question {number}"}])
        ).json()
        rows = (await gateway.trace(body["fusion"]))["calls"]
        marks = [call["candidate"] for call in rows if call["stage"] == "answer" and "(A)" in call["text"]]
        wrong = [call["candidate"] for call in rows if call["stage"] == "answer" and "(A)" not in call["text"]]
        mark = {"correct": marks, "wrong": wrong}
        assert (
            await gateway.http.post(f"/v1/traces/{body['fusion']['trace_id']}/feedback", json=mark)
        ).status_code == 200
    with opened(tmp_path / "traces.sqlite3") as database:
        exported, _ = export_rows(database)
    assert any(row.get("verdicts") for row in exported)
    assert any(row.get("propensities") for row in exported)
    write_jsonl(tmp_path / "pool.jsonl", exported)
    questions, agreement = read_pool([tmp_path / "pool.jsonl"])
    fitted = fit_combiner(questions, agreement)
    assert fitted.members["gamma"].accuracy == pytest.approx(0.9, abs=0.12)
    assert fitted.judges["judge"] > 0


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ({"fallback": "too few marks", "policies": []}, {}),
        ({"policies": []}, {}),
        ({}, {}),
        ({}, {"prefer": "latency", "width": 1}),
    ],
)
async def test_a_quorum_is_met_however_sure_the_first_answer_is(
    start_gateway: StartGateway,
    upstream: FakeUpstream,
    tmp_path: Path,
    keys: dict[str, Any],
    options: dict[str, Any],
) -> None:
    say(upstream, "B", "B", "B")
    save(combiner(target=0.1, **keys), tmp_path / "combiner.json")
    gateway = await start_gateway(combiner=tmp_path / "combiner.json", modes={"min_responses": 2})
    response = await gateway.post(**ASK, fusion={"target": 0.1, **options})
    assert response.status_code == 200
    assert len(response.json()["fusion"]["candidates"]) == 2


async def test_a_judge_that_hangs_is_given_up_at_the_deadline(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path
) -> None:
    say(upstream, "B", "C", "D")
    upstream.models["judge"] = Script(hold=asyncio.Event())
    save(combiner(**JUDGED), tmp_path / "combiner.json")
    gateway = await start_gateway(combiner=tmp_path / "combiner.json", modes={"deadline_ms": 3000})
    fusion = (await gateway.post(**ASK)).json()["fusion"]
    assert (fusion["reason"], fusion["stopped"], fusion["verdicts"]) == ("weighed", "deadline", [])
    assert "deadline" in fusion["error"]
    calls = (await gateway.trace(fusion))["calls"]
    assert {call["outcome"] for call in calls if call["stage"] == "verdict"} == {"timeout"}
    strict = await start_gateway(
        combiner=tmp_path / "combiner.json", modes={"deadline_ms": 3000, "on_judge_error": "fail"}
    )
    refused = await strict.post(**ASK)
    assert refused.json()["error"]["type"] == "judge_failed"


async def test_a_judge_that_the_budget_does_not_allow_has_not_failed(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path
) -> None:
    say(upstream, "B", "C", "D")
    save(combiner(**JUDGED), tmp_path / "combiner.json")
    gateway = await start_gateway(
        priced(upstream, gamma=1e9),
        combiner=tmp_path / "combiner.json",
        modes={"on_judge_error": "fail"},
        judge={"base_url": upstream.base_url, "model": "judge", "price": {"completion": 1000.0}},
    )
    response = await gateway.post(**ASK, fusion={"max_cost": 0.0009, "target": 0.97})
    fusion = response.json()["fusion"]
    assert (response.status_code, fusion["stopped"], fusion["error"]) == (200, "budget", None)
    assert "judge" not in asked(upstream)


async def test_where_the_best_member_is_too_dear_another_is_asked(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path
) -> None:
    say(upstream, "B", "C", "D")
    save(combiner(fallback="too few marks", policies=[]), tmp_path / "combiner.json")
    gateway = await start_gateway(priced(upstream, gamma=1e5), combiner=tmp_path / "combiner.json")
    fusion = (await gateway.post(**ASK, fusion={"max_cost": 1.0})).json()["fusion"]
    assert fusion["asked"] == ["alpha"]
    nobody = await gateway.post(**ASK, fusion={"max_cost": 1e-9})
    assert (nobody.status_code, nobody.json()["error"]["type"]) == (402, "budget")
    quorum = await gateway.post(**ASK, fusion={"max_cost": 0.00015, "min_responses": 2})
    assert (quorum.status_code, quorum.json()["error"]["type"]) == (402, "budget")
    assert "only alpha; answers: 1 of at least 2" in quorum.json()["error"]["message"]


async def test_of_a_part_of_the_pool_members_are_asked_until_the_target_and_then_the_judge(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path
) -> None:
    """The policy counts gamma, its best member, as asked; what it holds says nothing of that."""
    say(upstream, "B", "C", "D")
    save(combiner(**JUDGED), tmp_path / "combiner.json")
    gateway = await start_gateway(
        priced(upstream),
        combiner=tmp_path / "combiner.json",
        judge={"base_url": upstream.base_url, "model": "judge", "price": {"completion": 1e-6}},
    )
    fusion = (await gateway.post(**ASK, fusion={"members": ["alpha", "beta"], "target": 0.8})).json()["fusion"]
    assert (fusion["asked"], fusion["stopped"]) == (["alpha", "beta"], "all_asked")
    assert [(verdict["first"], verdict["second"]) for verdict in fusion["verdicts"]] == [(0, 1)]


async def test_exploring_first_asks_as_ever_and_names_all_who_were_asked_by_chance(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path
) -> None:
    say(upstream, "B", "B", "C")
    stopping = Policy(target=0.3, accuracy=0.8, cost_ratio=0.5, asked=1, actions={"": ["alpha"] * BINS})
    save(combiner(policies=[stopping], **JUDGED), tmp_path / "combiner.json")
    gateway = await start_gateway(combiner=tmp_path / "combiner.json", modes={"explore": 1.0})
    fusion = (await gateway.post(**ASK, fusion={"target": 0.3})).json()["fusion"]
    assert (fusion["asked"][0], sorted(fusion["asked"]), fusion["stopped"]) == ("alpha", list(NAMES), "explore")
    weighing = (await gateway.trace(fusion))["weighing"]
    assert weighing["propensities"] == {"beta": 1.0, "gamma": 1.0}


async def test_open_questions_are_weighed_by_domain_and_judge(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path
) -> None:
    """No two answers are equal; beta is the one to believe in law, and the judge turns the rest."""
    for name in NAMES:
        upstream.models[name].text = f"An essay by {name}."
    members = {
        name: MemberWeights(weight=1.0, domains={"law": 4.0} if name == "beta" else {}, accuracy=0.6, price=1.0)
        for name in NAMES
    }
    save(combiner(agreement="never", members=members, policies=[], **JUDGED), tmp_path / "combiner.json")
    upstream.models["judge"] = Script(
        verdict=lambda first, second: 0.5 + 0.45 * (("by alpha" in first) - ("by alpha" in second))
    )
    gateway = await start_gateway(combiner=tmp_path / "combiner.json")
    law = await gateway.client.chat.completions.create(**ASK, metadata={"domain": "law"})
    assert law.choices[0].message.content == "An essay by beta."
    other = (await gateway.post(**ASK, metadata={"domain": "art"})).json()
    assert other["choices"][0]["message"]["content"] == "An essay by alpha."
    assert other["fusion"]["verdicts"]
    assert len(other["fusion"]["classes"]) == 3


async def test_a_stream_begins_while_another_hangs_and_ends_with_an_error_where_unsure_is_refused(
    start_gateway: StartGateway, upstream: FakeUpstream, file: Path
) -> None:
    say(upstream, "B", "B", "C")
    upstream.models["gamma"].hold = asyncio.Event()
    gateway = await start_gateway(combiner=file, modes={"abstain_below": 0.6, "on_abstain": "refuse"})
    fast: Any = {"extra_body": {"fusion": {"target": 0.8, "prefer": "latency"}}}
    stream = await gateway.client.chat.completions.create(**ASK, stream=True, **fast)
    assert "".join([part.choices[0].delta.content or "" async for part in stream if part.choices]) == (
        "The answer is (B)."
    )
    upstream.models["gamma"].hold = None
    say(upstream, "B", "C", "D")
    with pytest.raises(APIError, match=r"right with a probability of 0\."):
        async for _ in await gateway.client.chat.completions.create(**ASK, stream=True, **fast):
            pass
