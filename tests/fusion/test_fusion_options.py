"""What a request may set for itself: presets, field-wise overrides, what is exposed, OpenRouter's form of requests."""

import asyncio
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import Gateway, StartGateway, prefers, summed

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import validate

HELLO: list[Any] = [{"role": "user", "content": "why?"}]
BEST: dict[str, Any] = {"model": "fusion/best-of", "messages": HELLO}

PRESETS = {
    "careful": {"mode": "debate", "max_rounds": 1, "members": ["alpha", "beta"]},
    "written": {"mode": "merge", "synthesizer": "gamma"},
    "plain": {"samples": 2},
}


async def test_a_preset_is_a_model(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = await start_gateway(presets=PRESETS)
    assert set(PRESETS) < {model.id async for model in await gateway.client.models.list()}
    careful = await gateway.client.chat.completions.create(model="careful", messages=HELLO)
    assert careful.model == "careful"
    assert careful.model_extra["fusion"]["debate"] == {"rounds": 1, "stopped": "max_rounds"}
    assert upstream.asked("gamma") == []
    written = await gateway.client.chat.completions.create(model="written", messages=HELLO)
    assert written.choices[0].message.content == "the answer of gamma"
    assert written.model_extra["fusion"]["reason"] == "synthesis"
    plain = await gateway.client.chat.completions.create(model="plain", messages=HELLO)
    assert (plain.model_extra["fusion"]["mode"], len(plain.model_extra["fusion"]["candidates"])) == ("best_of", 6)


async def test_a_request_overrides_a_preset_field_by_field(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = await start_gateway(presets=PRESETS)
    body = (await gateway.post(model="careful", messages=HELLO, fusion={"mode": "best_of"})).json()
    assert body["fusion"]["mode"] == "best_of"
    assert [entry["member"] for entry in body["fusion"]["candidates"]] == ["alpha", "beta"]  # the preset's still
    assert upstream.asked("gamma") == []


@pytest.mark.parametrize(
    ("presets", "words"),
    [
        ({"alpha": {}}, "preset 'alpha': that name is a member's"),
        ({"fusion/mine": {}}, "preset 'fusion/mine'"),
        ({"x": {"members": ["delta"]}}, "there is no member 'delta'"),
        ({"x": {"rounds": 2}}, "did you mean"),
    ],
)
def test_a_bad_preset_is_named(presets: Any, words: str) -> None:
    from mixfuse.fusion.config import FusionConfig

    data = {"members": [{"name": "alpha", "role": "r"}], "presets": presets}
    with pytest.raises(MixfuseError, match=words):
        validate(data, FusionConfig, source="fusion.yaml")


async def test_min_responses_grace_and_deadline(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["gamma"].hold = asyncio.Event()
    body = (await gateway.post(**BEST, fusion={"min_responses": 2, "grace_ms": 0})).json()
    assert ("gamma", "cancelled_straggler") in [(entry["member"], entry["type"]) for entry in body["fusion"]["failed"]]
    await upstream.wait_aborted("gamma")
    body = (await gateway.post(**BEST, fusion={"deadline_ms": 1000})).json()
    assert ("gamma", "timeout") in [(entry["member"], entry["type"]) for entry in body["fusion"]["failed"]]
    response = await gateway.post(**BEST, fusion={"min_responses": 3, "deadline_ms": 1000})
    assert response.json()["error"]["type"] == "too_few_answers"
    response = await gateway.post(**BEST, fusion={"min_responses": 4})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "fusion")


async def test_a_request_can_lower_what_it_may_cost_but_not_raise_it(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    at = {"base_url": upstream.base_url, "model": "alpha", "price": {"prompt": 1e6, "completion": 1e6}}
    gateway = await start_gateway([{"name": "alpha", **at}], modes={"max_cost": 50})
    assert (await gateway.post(**BEST, max_tokens=20)).status_code == 200
    assert (await gateway.post(**BEST, max_tokens=20, fusion={"max_cost": 5})).status_code == 402
    assert (await gateway.post(**BEST, max_tokens=100, fusion={"max_cost": 500})).status_code == 402
    assert len(upstream.asked("alpha")) == 1


async def test_a_refusal_does_not_repeat_megabytes(gateway: Gateway) -> None:
    picture = {"type": "image_url", "image_url": {"url": "x" * 5_000_000}}
    response = await gateway.post(model="alpha", messages=[{"role": "user", "content": [picture]}])
    assert response.status_code == 400
    assert len(response.content) < 1000


# What is exposed


async def test_nothing_is_exposed_where_nothing_shall_be(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(modes={"expose": "none"})
    assert "fusion" not in (await gateway.post(**BEST)).json()
    shown = await gateway.post(**BEST, stream=True)
    assert "fusion" not in shown.text.replace("fusion/best-of", "")
    # The completion's id still leads to the trace.
    body = (await gateway.post(**BEST)).json()
    trace = await gateway.trace({"trace_id": body["id"].replace("chatcmpl-", "trace-")})
    assert trace["answer"] == "the answer of beta"


async def test_a_summary_tells_who_won_and_what_failed(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["gamma"] = Script(status=500)
    fusion = (await gateway.post(**BEST)).json()["fusion"]
    assert fusion.keys() == {
        "trace_id", "mode", "reason", "error", "winner", "candidates", "verdicts", "failed", "cost", "latency_ms",
    }  # fmt: skip
    assert fusion["candidates"] == [{"candidate": 0, "member": "alpha"}, {"candidate": 1, "member": "beta"}]
    assert fusion["failed"][0]["type"] == "upstream_error"
    (verdict,) = fusion["verdicts"]
    assert (verdict["winner"], verdict["consistent"]) == ("second", True)
    assert verdict["score"] == pytest.approx(0.1)
    assert fusion["latency_ms"] > 0


async def test_in_full_there_are_texts_and_every_calls_usage(gateway: Gateway) -> None:
    body = (await gateway.post(**BEST, fusion={"expose": "full"})).json()
    texts = [entry["text"] for entry in body["fusion"]["candidates"]]
    assert texts == [f"the answer of {name}" for name in ("alpha", "beta", "gamma")]
    calls = body["fusion"]["calls"]
    assert [call["stage"] for call in calls].count("verdict") == 6
    assert body["usage"] == summed({"calls": calls})
    assert all(("text" in call) == (call["stage"] == "verdict") and call["duration_ms"] > 0 for call in calls)


async def test_a_model_by_name_takes_expose_and_nothing_else(gateway: Gateway) -> None:
    body = (await gateway.post(model="alpha", messages=HELLO, fusion={"expose": "full"})).json()
    assert len(body["fusion"]["calls"]) == 1
    body = (await gateway.post(model="alpha", messages=HELLO, fusion={"expose": "none"})).json()
    assert "fusion" not in body
    response = await gateway.post(model="alpha", messages=HELLO, fusion={"expose": "none", "samples": 2})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "fusion")


# OpenRouter's form of requests


async def test_openrouters_fusion_is_understood_where_it_is_allowed(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    gateway = await start_gateway(openrouter_alias=True, presets=PRESETS)
    panel = {"id": "fusion", "analysis_models": ["alpha", "beta"], "model": "gamma"}
    body = (await gateway.post(model="openrouter/fusion", messages=HELLO, plugins=[panel])).json()
    assert (body["fusion"]["mode"], body["choices"][0]["message"]["content"]) == ("merge", "the answer of gamma")
    assert [entry["member"] for entry in body["fusion"]["candidates"]] == ["alpha", "beta"]
    assert upstream.asked("synth") == []
    # With a model of its own, that model writes the answer.
    body = (await gateway.post(model="beta", messages=HELLO, plugins=[{"id": "fusion"}])).json()
    assert (body["fusion"]["mode"], body["choices"][0]["message"]["content"]) == ("merge", "the answer of beta")
    # The configured synthesizer, a preset, and none at all.
    body = (await gateway.post(model="openrouter/fusion", messages=HELLO)).json()
    assert body["choices"][0]["message"]["content"] == "one merged answer in several words"
    careful = {"id": "fusion", "preset": "careful"}
    body = (await gateway.post(model="openrouter/fusion", messages=HELLO, plugins=[careful])).json()
    assert body["fusion"]["mode"] == "debate"
    off = {"id": "fusion", "enabled": False}
    body = (await gateway.post(model="alpha", messages=HELLO, plugins=[off])).json()
    assert body["fusion"]["mode"] == "pass_through"
    # Our own options count before the plugin's.
    body = (await gateway.post(**BEST, plugins=[panel], fusion={"members": ["beta"]})).json()
    assert (body["fusion"]["mode"], body["fusion"]["reason"]) == ("best_of", "lone_survivor")


@pytest.mark.parametrize(
    ("plugin", "status", "code"),
    [
        ({"id": "web"}, 400, "invalid_value"),
        ({"id": "fusion", "max_tool_calls": 17}, 400, "invalid_value"),
        ({"id": "fusion", "reasoning": {"effort": "low", "max_tokens": 3}}, 400, "unknown_parameter"),
        ({"id": "fusion", "temperature": 3}, 400, "invalid_value"),
        ({"id": "fusion", "analysis_models": ["delta"]}, 400, "unknown_member"),
        ({"id": "fusion", "model": "delta"}, 400, "unknown_member"),
        ({"id": "fusion", "preset": "none"}, 400, "unknown_preset"),
    ],
)
async def test_what_openrouter_has_and_we_have_not_is_refused(
    start_gateway: StartGateway, plugin: dict[str, Any], status: int, code: str
) -> None:
    gateway = await start_gateway(openrouter_alias=True, presets=PRESETS)
    response = await gateway.post(model="openrouter/fusion", messages=HELLO, plugins=[plugin])
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_openrouters_way_is_off_unless_allowed(gateway: Gateway) -> None:
    response = await gateway.post(**BEST, plugins=[{"id": "fusion"}])
    assert (response.status_code, response.json()["error"]["code"]) == (400, "unknown_parameter")
    assert (await gateway.post(model="openrouter/fusion", messages=HELLO)).status_code == 404
    response = await gateway.post(model="alpha", messages=HELLO, tools=[{"type": "openrouter:fusion"}])
    assert (response.status_code, response.json()["error"]["code"]) == (400, "unknown_parameter")


async def test_openrouters_tool_is_its_plugin(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = await start_gateway(openrouter_alias=True, presets=PRESETS)
    parameters = {"analysis_models": ["alpha", "gamma"], "temperature": 0.2, "max_completion_tokens": 9}
    tool = {"type": "openrouter:fusion", "parameters": {**parameters, "max_tool_calls": 4}}
    body = (await gateway.post(model="beta", messages=HELLO, tools=[tool], tool_choice="required")).json()
    assert (body["fusion"]["mode"], body["choices"][0]["message"]["content"]) == ("merge", "the answer of beta")
    assert {entry["member"] for entry in body["fusion"]["candidates"]} == {"alpha", "gamma"}
    assert [(sent["temperature"], sent["max_tokens"]) for sent in upstream.asked("alpha")] == [(0.2, 9)]
    assert "tools" not in upstream.asked("alpha")[0]
    body = (await gateway.post(model="beta", messages=HELLO, tools=[tool], temperature=0.5)).json()
    assert upstream.asked("alpha")[1]["temperature"] == 0.5
    body = (await gateway.post(model="beta", messages=HELLO, tools=[tool], tool_choice="none")).json()
    assert body["fusion"]["mode"] == "pass_through"
    for wrong in ([tool, tool], [{**tool, "parameters": []}], [{**tool, "function": {}}]):
        response = await gateway.post(model="beta", messages=HELLO, tools=wrong)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


async def test_models_are_fallbacks_in_their_order(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["alpha"] = Script(status=500)
    body = (await gateway.post(model="alpha", models=["alpha", "gamma", "beta"], messages=HELLO)).json()
    assert body["choices"][0]["message"]["content"] == "the answer of gamma"
    assert [failed["member"] for failed in body["fusion"]["failed"]] == ["alpha"] * len(body["fusion"]["failed"])
    assert upstream.asked("beta") == []
    body = (await gateway.post(models=["beta"], messages=HELLO)).json()
    assert body["model"] == "beta"
    for wrong in (["delta"], [], "beta", ["fusion/merge"]):
        response = await gateway.post(model="beta", models=wrong, messages=HELLO)
        assert response.status_code in (400, 404), wrong
    response = await gateway.post(**BEST, models=["alpha"])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "models")


# Sampling parameters, in every mode


@pytest.mark.parametrize("model", ["fusion/best-of", "fusion/merge", "fusion/debate"])
async def test_sampling_parameters_reach_every_call_that_writes_text(
    gateway: Gateway, upstream: FakeUpstream, model: str
) -> None:
    sent = {"temperature": 0.3, "top_p": 0.9, "max_tokens": 7, "seed": 3, "stop": ["END"]}
    upstream.models["judge"].verdict = prefers("alpha")
    await gateway.post(model=model, messages=HELLO, **sent)
    writing = [request for request in upstream.requests if request["model"] != "judge"]
    assert len(writing) >= 3
    for request in writing:
        assert {key: request[key] for key in sent} == sent


async def test_half_a_surrogate_pair_is_refused_both_ways(gateway: Gateway, upstream: FakeUpstream) -> None:
    content = rb'{"model": "alpha", "messages": [{"role": "user", "content": "\ud800"}]}'
    response = await gateway.http.post("/v1/chat/completions", content=content)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    whole = rb'{"model": "alpha", "messages": [{"role": "user", "content": "\ud83d\ude00"}]}'
    assert (await gateway.http.post("/v1/chat/completions", content=whole)).status_code == 200
    upstream.models["alpha"].body = rb'{"choices": [{"message": {"content": "\ud800"}}]}'
    body = (await gateway.post(**BEST)).json()
    assert [(entry["member"], entry["type"]) for entry in body["fusion"]["failed"]] == [("alpha", "invalid_response")]
