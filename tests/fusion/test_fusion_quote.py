"""Quotes over real HTTP: nobody is called, the most is never exceeded, and what is expected comes from traces."""

from typing import Any

import pytest
from fake_upstream import FakeUpstream
from fusion_harness import Gateway, StartGateway

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Which of these is it? " * 20}]
PRICED = {"prompt": 1.0, "completion": 3.0}


async def priced(start_gateway: StartGateway, upstream: FakeUpstream, **keys: Any) -> Gateway:
    def at(model: str) -> dict[str, Any]:
        return {"base_url": upstream.base_url, "model": model, "price": PRICED}

    members = [{"name": name, **at(name)} for name in ("alpha", "beta", "gamma")]
    return await start_gateway(members, **({"judge": at("judge"), "synthesizer": at("synth")} | keys))


async def quotes(gateway: Gateway, **body: Any) -> dict[str, dict[str, Any]]:
    response = await gateway.http.post("/v1/fusion/quote", json={"messages": HELLO, "max_tokens": 50} | body)
    assert response.status_code == 200, response.text
    return {quote["mode"]: quote for quote in response.json()["quotes"]}


async def test_no_mode_costs_more_than_its_most(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = await priced(start_gateway, upstream)
    told = await quotes(gateway, model="fusion/merge")
    assert upstream.requests == []
    assert next(iter(told)) == "merge"
    assert set(told) == {"merge", "best_of", "debate", "auto"}
    for mode, quote in told.items():
        assert quote["expected"] is None
        body = (await gateway.post(model=f"fusion/{mode.replace('_', '-')}", messages=HELLO, max_tokens=50)).json()
        trace = await gateway.trace(body["fusion"])
        assert len(trace["calls"]) <= quote["most"]["calls"]
        assert 0 < body["fusion"]["cost"] <= quote["most"]["cost"]


async def test_what_is_expected_is_what_was(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = await priced(start_gateway, upstream)
    costs = []
    for _ in range(6):
        body = (await gateway.post(model="fusion/best-of", messages=HELLO, max_tokens=50)).json()
        costs.append(body["fusion"]["cost"])
    quote = (await quotes(gateway, model="fusion/best-of"))["best_of"]
    assert quote["traces"] == 6
    assert quote["expected"]["calls"] == 9
    assert 0 < quote["expected"]["latency_ms"] <= quote["expected"]["latency_p95_ms"]
    # The fake reports 10 prompt tokens whatever it is sent; the quote counts those of the question that is asked.
    assert quote["expected"]["cost"] > costs[0]
    longer = (await quotes(gateway, model="fusion/best-of", messages=HELLO * 3))["best_of"]
    assert longer["expected"]["cost"] > quote["expected"]["cost"]


async def test_a_mode_that_cannot_answer_says_why(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = await priced(start_gateway, upstream, synthesizer=None)
    told = await quotes(gateway, model="alpha")
    assert told["pass_through"]["most"]["calls"] == 1
    assert "synthesizer" in told["merge"]["unavailable"]
    assert "most" in told["best_of"]


async def test_the_request_itself_is_checked_and_exposure_is_kept(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXFUSE_ADMIN_KEY", "the operator's")
    gateway = await start_gateway()
    for body in ({"model": "delta"}, {"model": "alpha", "n": 2}, {"model": "fusion/best-of", "fusion": {"x": 1}}):
        assert (await gateway.http.post("/v1/fusion/quote", json={"messages": HELLO} | body)).status_code in (400, 404)
    silent = await start_gateway(modes={"expose": "none"})
    refused = await silent.http.post("/v1/fusion/quote", json={"model": "alpha", "messages": HELLO})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_exposed")


@pytest.mark.parametrize("cap", [1e-9, 1e9])
async def test_the_most_is_at_most_the_cap(start_gateway: StartGateway, upstream: FakeUpstream, cap: float) -> None:
    gateway = await priced(start_gateway, upstream)
    free = (await quotes(gateway, model="fusion/merge"))["merge"]["most"]["cost"]
    told = await quotes(gateway, model="fusion/merge", fusion={"max_cost": cap})
    assert told["merge"]["most"]["cost"] == min(free, cap)
