"""Completions and embeddings over real HTTP, with OpenAI's own client."""

from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import Gateway, StartGateway
from openai import AsyncOpenAI, InternalServerError, NotFoundError, RateLimitError
from pydantic import ValidationError

from mixfuse.contracts.database import opened
from mixfuse.fusion.http.keys import create


@pytest.fixture
async def passing(start_gateway: StartGateway, upstream: FakeUpstream) -> Gateway:
    upstream.models["embedder"] = Script(usage=(7, 0))
    price = {"prompt": 2.0, "completion": 4.0}
    at = {"base_url": upstream.base_url, "price": price}
    return await start_gateway(
        ["beta", {"name": "alpha", "model": "alpha", **at}], embeddings=[{"name": "vectors", "model": "embedder", **at}]
    )


async def test_a_completion_is_the_members_own(passing: Gateway, upstream: FakeUpstream) -> None:
    answer = await passing.client.completions.create(model="alpha", prompt="Once", max_tokens=9, echo=True, logprobs=2)
    assert (answer.choices[0].text, answer.model, answer.object) == ("the answer of alpha", "alpha", "text_completion")
    (sent,) = upstream.asked("alpha")
    assert sent == {"model": "alpha", "prompt": "Once", "max_tokens": 9, "echo": True, "logprobs": 2}
    (trace,) = await passing.first_traces()
    assert (trace["answer"], trace["messages"]) == ("the answer of alpha", [{"role": "user", "content": "Once"}])
    (call,) = trace["calls"]
    assert (call["usage"]["prompt_tokens"], call["usage"]["completion_tokens"]) == (10, 5)
    assert call["cost"] == pytest.approx((10 * 2 + 5 * 4) / 1e6)


async def test_embeddings_come_from_a_model_that_is_no_member(passing: Gateway, upstream: FakeUpstream) -> None:
    vectors = await passing.client.embeddings.create(model="vectors", input=["a", "b"], encoding_format="float")
    assert [entry.embedding for entry in vectors.data] == [[0.5, -0.25]] * 2
    assert vectors.model == "vectors"
    assert upstream.asked("embedder")[0]["input"] == ["a", "b"]
    (trace,) = await passing.first_traces()
    assert trace["calls"][0]["cost"] == pytest.approx(7 * 2 / 1e6)
    assert "vectors" in [model.id for model in (await passing.client.models.list()).data]
    fused = (await passing.post(model="fusion/best-of", messages=[{"role": "user", "content": "?"}])).json()
    assert {entry["member"] for entry in fused["fusion"]["candidates"]} == {"alpha", "beta"}
    for call in (
        passing.client.completions.create(model="vectors", prompt="x"),
        passing.client.chat.completions.create(model="vectors", messages=[{"role": "user", "content": "x"}]),
        passing.client.embeddings.create(model="delta", input="x"),
    ):
        with pytest.raises(NotFoundError):
            await call


async def test_failures_are_typed_and_traced(passing: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["alpha"] = Script(status=429)
    with pytest.raises(RateLimitError):
        await passing.client.completions.create(model="alpha", prompt="x")
    upstream.models["alpha"] = Script(status=500)
    with pytest.raises(InternalServerError):
        await passing.client.completions.create(model="alpha", prompt="x")
    traces = (await passing.http.get("/v1/traces")).json()["data"]
    assert {trace["outcome"] for trace in traces} == {"rate_limited", "upstream_error"}


async def test_a_budget_holds_for_them(start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path) -> None:
    with opened(tmp_path / "traces.sqlite3") as database:
        secret = create(database, "small", max_tokens=200)[1]
    gateway = await start_gateway()
    headers = {"authorization": f"Bearer {secret}"}
    for body, status in (
        ({"prompt": "x" * 500, "max_tokens": 1}, 402),
        ({"prompt": [1] * 500, "max_tokens": 1}, 402),
        ({"prompt": "x", "max_tokens": 1, "n": 300}, 402),
        ({"prompt": "x", "max_tokens": 1, "best_of": 300}, 402),
        ({"prompt": ["x"] * 300, "max_tokens": 1}, 402),
        ({"prompt": "x", "max_tokens": 1}, 200),
    ):
        answer = await gateway.http.post("/v1/completions", json={"model": "alpha", **body}, headers=headers)
        assert answer.status_code == status, body
    assert len(upstream.requests) == 1
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="mf-wrong", max_retries=0) as stranger:
        with pytest.raises(Exception, match="401"):
            await stranger.embeddings.create(model="alpha", input="x")


@pytest.mark.parametrize(
    ("api", "body", "param"),
    [
        ("completions", {"prompt": "x", "stream": True}, "stream"),
        ("completions", {"prompt": None}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [1, -1]}, "prompt"),
        ("completions", {"prompt": [1, "x"]}, "prompt"),
        ("completions", {"prompt": "x", "n": 10**9}, "prompt"),
        ("completions", {"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ("embeddings", {"input": {}}, "input"),
        ("embeddings", {"input": ["x"] * 1000}, "input"),
    ],
)
async def test_what_cannot_be_passed_is_refused(
    gateway: Gateway, upstream: FakeUpstream, api: str, body: dict[str, Any], param: str
) -> None:
    answer = await gateway.http.post(f"/v1/{api}", json={"model": "alpha", **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert upstream.requests == []


async def test_an_embedding_model_has_a_name_of_its_own(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    with pytest.raises(ValidationError, match="alpha"):
        await start_gateway(embeddings=[{"name": "alpha", "base_url": upstream.base_url, "model": "x"}])
