"""The judge: how many verdicts are asked for, who comes out first, and verdicts without log-probabilities."""

import itertools
import random
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import FakeRoles, StartGateway, prefers, summed

from mixfuse.contracts.judge_protocol import Calibration
from mixfuse.contracts.trace import Verdict
from mixfuse.fusion.answering.candidate import Candidate
from mixfuse.fusion.answering.pairwise_judge import FINALISTS, knock_out_pairs, ranking, survivors
from mixfuse.fusion.config import Member

ASK: dict[str, Any] = {"model": "fusion/best-of", "messages": [{"role": "user", "content": "why?"}]}
MEMBER = Member(name="m", role="r")


def candidates(count: int) -> list[Candidate]:
    return [Candidate(index, MEMBER, str(index), "stop") for index in range(count)]


def tournament(count: int, p: Any) -> tuple[Candidate, int]:
    """The winner and the number of pairs, where P(one is better than other) is `p(one, other)`."""

    def judged(one: Candidate, other: Candidate) -> Verdict:
        score = p(one.index, other.index)
        winner = "tie" if score == 0.5 else "first" if score > 0.5 else "second"
        return Verdict(first=one.index, second=other.index, winner=winner, score=score, consistent=score != 0.5)

    rivals, pairs = candidates(count), 0
    while len(rivals) > FINALISTS:
        meeting = knock_out_pairs(rivals)
        pairs += len(meeting)
        rivals = survivors(rivals, [judged(*pair) for pair in meeting])
    final = [judged(*pair) for pair in itertools.combinations(rivals, 2)]
    return ranking(final, rivals)[0], pairs + len(final)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 31, 64])
def test_the_best_comes_out_first_after_a_linear_number_of_pairs(count: int) -> None:
    for seed in range(20):
        order = random.Random(seed).sample(range(count), count)
        best, pairs = tournament(count, lambda one, other, order=order: 0.9 if order[one] < order[other] else 0.1)
        assert best.index == order.index(0)
        assert pairs == (count * (count - 1) // 2 if count <= FINALISTS else count + 2)


@pytest.mark.parametrize("count", [3, 5, 8, 13])
def test_ties_all_round_leave_the_first(count: int) -> None:
    assert tournament(count, lambda _one, _other: 0.5)[0].index == 0


def test_a_tie_on_wins_goes_by_mean_score_then_by_order() -> None:
    def verdicts(a_b: float, b_c: float, a_c: float) -> list[Verdict]:
        pairs = ((0, 1, a_b), (1, 2, b_c), (0, 2, a_c))
        return [
            Verdict(first=one, second=other, winner="first" if p > 0.5 else "second", score=p, consistent=True)
            for one, other, p in pairs
        ]

    circle = verdicts(0.6, 0.9, 0.3)  # 0 beats 1 beats 2 beats 0
    assert [one.index for one in ranking(circle, candidates(3))] == [1, 0, 2]
    assert [one.index for one in ranking(verdicts(0.7, 0.7, 0.3), candidates(3))] == [0, 1, 2]


async def test_nine_samples_are_judged_in_eleven_pairs(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    upstream.models["alpha"].text = [f"text {number}" for number in "123456789"]
    upstream.models["judge"].verdict = prefers("7")
    gateway = await start_gateway(["alpha"])
    body = (await gateway.post(**ASK, fusion={"samples": 9})).json()
    assert body["choices"][0]["message"]["content"] == "text 7"
    assert len(body["fusion"]["verdicts"]) == 11
    assert len(upstream.asked("judge")) == 22


async def test_a_judges_calibration_goes_with_its_role(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    """Odds of 9 in both orders: at temperature 2 they are 3; and the margin of a judge that cannot tell is a tie."""
    roles = FakeRoles(upstream, "judge")
    gateway = await start_gateway(["alpha", "beta"], roles=roles, judge={"role": "judge"})
    upstream.models["judge@r1"] = Script(verdict=prefers("beta"))
    seen = []
    for roles.calibration in (None, Calibration(temperature=2.0), Calibration(temperature=2.0, tie_margin=0.3)):
        (found,) = (await gateway.post(**ASK)).json()["fusion"]["verdicts"]
        seen.append((found["winner"], round(found["score"], 3), found["consistent"]))
    assert seen == [("second", 0.1, True), ("second", 0.25, True), ("tie", 0.25, True)]


# Judges without log-probabilities


@pytest.mark.parametrize("shortcoming", [{"no_logprobs": True}, {"refuses": "logprobs"}])
async def test_a_judge_without_logprobs_writes_its_verdicts(
    start_gateway: StartGateway, upstream: FakeUpstream, shortcoming: dict[str, Any]
) -> None:
    upstream.models["judge"] = Script(verdict=prefers("beta"), **shortcoming)
    gateway = await start_gateway()
    fusion = (await gateway.post(**ASK)).json()["fusion"]
    assert (fusion["winner"], fusion["reason"]) == (1, "judged")
    assert {verdict["read"] for verdict in fusion["verdicts"]} == {"parsed"}
    trace = await gateway.trace(fusion)
    assert {verdict["read"] for verdict in trace["verdicts"]} == {"parsed"}
    written = [request for request in upstream.asked("judge") if "response_format" in request]
    assert len(written) == 6
    schema = written[0]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["verdict"]["enum"] == ["A", "B"]
    # What was found out is remembered: from now on the verdicts are asked for in writing at once.
    before = len(upstream.asked("judge"))
    await gateway.post(**ASK)
    assert len(upstream.asked("judge")) == before + 6


async def test_with_logprobs_a_trace_says_so(start_gateway: StartGateway) -> None:
    fusion = (await (await start_gateway()).post(**ASK)).json()["fusion"]
    assert {verdict["read"] for verdict in fusion["verdicts"]} == {"logprobs"}


async def test_how_verdicts_are_read_can_be_settled(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    judge = {"base_url": upstream.base_url, "model": "judge"}
    parsed = await start_gateway(judge={**judge, "verdicts": "parsed"})
    assert (await parsed.post(**ASK)).json()["fusion"]["winner"] == 1
    assert not any("logprobs" in request for request in upstream.asked("judge"))
    upstream.models["judge"].no_logprobs = True
    strict = await start_gateway(judge={**judge, "verdicts": "logprobs"})
    fusion = (await strict.post(**ASK)).json()["fusion"]
    assert (fusion["reason"], fusion["winner"]) == ("judge_failed", 0)
    assert "gives no log-probabilities" in fusion["error"]


@pytest.mark.parametrize("said", ["", "A", '{"verdict": "C"}', '{"verdict": "A"} or {"verdict": "B"}'])
async def test_a_written_verdict_that_cannot_be_read_is_none(
    start_gateway: StartGateway, upstream: FakeUpstream, said: str
) -> None:
    upstream.models["judge"] = Script(said, no_logprobs=True)
    fusion = (await (await start_gateway()).post(**ASK)).json()["fusion"]
    assert (fusion["reason"], fusion["verdicts"]) == ("judge_failed", [])


async def test_a_failing_judge_may_be_an_error(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    upstream.models["judge"] = Script(status=500)
    gateway = await start_gateway()
    response = await gateway.post(**ASK, fusion={"on_judge_error": "fail"})
    assert (response.status_code, response.json()["error"]["type"]) == (502, "judge_failed")
    (trace,) = (await gateway.http.get("/v1/traces")).json()["data"]
    assert (trace["outcome"], trace["id"]) == ("judge_failed", response.json()["trace_id"])
    # The members' answers are paid for.
    assert response.json()["usage"]["completion_tokens"] >= 15
    assert response.json()["usage"] == summed(trace)


async def test_another_member_may_judge(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    upstream.models["gamma"].verdict = prefers("alpha")
    gateway = await start_gateway()
    fusion = (await gateway.post(**ASK, fusion={"judge": "gamma", "members": ["alpha", "beta"]})).json()["fusion"]
    assert fusion["winner"] == 0
    assert upstream.asked("judge") == []
    response = await gateway.post(**ASK, fusion={"judge": "gama"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "fusion.judge")
    assert "did you mean 'gamma'?" in response.json()["error"]["message"]


async def test_long_answers_are_cut_for_the_judge_with_a_mark(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    upstream.models["alpha"].text = long = "start " + "x" * 100_000 + " end"
    gateway = await start_gateway(["alpha", "beta"], modes={"max_candidate_chars": 400})
    upstream.models["judge"].verdict = prefers("start")
    body = (await gateway.post(**ASK)).json()
    assert body["choices"][0]["message"]["content"] == long
    for request in upstream.asked("judge"):
        content = request["messages"][-1]["content"]
        assert len(content) < 700
        assert "was left out" in content
        assert "start xxx" in content
        assert "xxx end" in content
