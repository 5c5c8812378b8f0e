"""What goes over the wire to an upstream: to its own address only, and every image of a question."""

import json
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Script, fake_upstream
from fusion_harness import StartGateway

KEY = "sk-secret-of-alpha"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(
    start_gateway: StartGateway,
    upstream: FakeUpstream,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    stream: bool,
) -> None:
    """A redirect could lead the key and the prompt to another host."""
    monkeypatch.setenv("KEY_OF_ALPHA", KEY)
    member = {"name": "alpha", "base_url": upstream.base_url, "model": "alpha", "api_key_env": "KEY_OF_ALPHA"}
    gateway = await start_gateway([member, "beta"])
    async with fake_upstream(alpha=Script("an answer from elsewhere")) as elsewhere:
        location = {"location": f"{elsewhere.base_url}/chat/completions"}
        upstream.models["alpha"] = Script(status=status, headers=location)
        question = [{"role": "user", "content": "a private question"}]
        response = await gateway.post(model="alpha", messages=question, stream=stream)
        assert elsewhere.requests == []
    assert "an answer from elsewhere" not in response.text
    assert (response.status_code, response.json()["error"]["type"]) == (502, "upstream_error")
    # The upstream itself was asked, with the key: the test would notice a key that is sent on.
    assert upstream.asked("alpha")[0]["messages"] == question
    assert upstream.headers[0]["authorization"] == f"Bearer {KEY}"


def image(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"https://images.example/{name}.png"}}


SEVERAL_IMAGES: list[Any] = [
    {"role": "user", "content": [image("1"), {"type": "text", "text": "which is larger?"}, image("2")]},
    {"role": "assistant", "content": "the second"},
    {"role": "user", "content": [{"type": "text", "text": "and of these?"}, image("3"), image("4"), image("3")]},
]


async def test_all_of_several_images_are_sent_in_order(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    synthesizer = {"base_url": upstream.base_url, "model": "synth", "images": True}
    members = [
        {"name": name, "base_url": upstream.base_url, "model": name, "images": True} for name in ("alpha", "beta")
    ]
    gateway = await start_gateway(members, synthesizer=synthesizer)
    for model in ("alpha", "fusion/best-of", "fusion/merge", "fusion/debate"):
        upstream.requests.clear()
        assert (await gateway.post(model=model, messages=SEVERAL_IMAGES)).status_code == 200
        assert upstream.asked("alpha")[0]["messages"] == SEVERAL_IMAGES
        if model != "alpha":
            assert upstream.asked("beta")[0]["messages"] == SEVERAL_IMAGES
        if model == "fusion/merge":
            contents = [turn["content"] for turn in upstream.asked("synth")[0]["messages"]]
            parts = [part for content in contents if isinstance(content, list) for part in content]
            images = [part for part in parts if part["type"] == "image_url"]
            assert images == [image("1"), image("2"), image("3"), image("4"), image("3")]


async def test_a_judge_is_told_how_many_images_there_were(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    members = [
        {"name": name, "base_url": upstream.base_url, "model": name, "images": True} for name in ("alpha", "beta")
    ]
    gateway = await start_gateway(members)
    await gateway.post(model="fusion/best-of", messages=SEVERAL_IMAGES)
    asked = upstream.asked("judge")
    assert asked
    for request in asked:
        assert sum(turn["content"].count("[image]") for turn in request["messages"]) == 5


async def test_the_judge_decides_between_the_members_that_take_images(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    """`winner` counts among all members that were asked; the judge of these tests likes beta."""

    def at(name: str, **keys: Any) -> dict[str, Any]:
        return {"name": name, "base_url": upstream.base_url, "model": name, **keys}

    gateway = await start_gateway([at("alpha"), at("beta", images=True), at("gamma", images=True)])
    body = (await gateway.post(model="fusion/best-of", messages=SEVERAL_IMAGES)).json()
    assert body["choices"][0]["message"]["content"] == "the answer of beta"
    (winner,) = [
        candidate for candidate in body["fusion"]["candidates"] if candidate["candidate"] == body["fusion"]["winner"]
    ]
    assert winner["member"] == "beta"


async def test_only_whole_responses_up_to_the_limit_are_read(
    start_gateway: StartGateway, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start_gateway()
    body = json.dumps({"choices": [{"message": {"role": "assistant", "content": "x" * 999}}]}).encode()
    upstream.models["alpha"].body = body
    question = [{"role": "user", "content": "?"}]
    monkeypatch.setattr("mixfuse.fusion.calls.responses.LONGEST_RESPONSE", len(body))
    assert (await gateway.post(model="alpha", messages=question)).status_code == 200
    monkeypatch.setattr("mixfuse.fusion.calls.responses.LONGEST_RESPONSE", len(body) - 1)
    response = await gateway.post(model="alpha", messages=question)
    assert (response.status_code, response.json()["error"]["type"]) == (502, "invalid_response")
