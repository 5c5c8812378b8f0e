"""Reasoning models as members, synthesizers and judges: thoughts are never taken for an answer."""

import json
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import Gateway, StartGateway, prefers

from mixfuse.fusion.calls.thoughts import Splitter, split

HELLO: list[Any] = [{"role": "user", "content": "why?"}]
ASK: dict[str, Any] = {"model": "fusion/best-of", "messages": HELLO}
SECRET = "SECRET-THOUGHT"
FORMS = {
    "field": "reasoning_content",
    "OpenRouter's field": "reasoning",
    "Mistral's parts": "parts",
    "think": f"<think>\n{SECRET}\n</think>\n\n{{}}",
    "thinking": f"<thinking>{SECRET}</thinking>{{}}",
    "reasoning": f"<reasoning>{SECRET}</reasoning>\n{{}}",
    "Mistral's marks": f"[THINK]{SECRET}[/THINK]{{}}",
    "opened in the prompt": f"{SECRET}\n</think>\n\n{{}}",
    "gpt-oss": (
        f"<|channel|>analysis<|message|>{SECRET}<|end|><|start|>assistant<|channel|>final<|message|>{{}}<|return|>"
    ),
    "Cohere": f"<|START_THINKING|>{SECRET}<|END_THINKING|><|START_RESPONSE|>{{}}<|END_RESPONSE|>",
    "Kimi": f"\u25c1think\u25b7{SECRET}\u25c1/think\u25b7{{}}",
    "Seed": f"<seed:think>{SECRET}</seed:think>{{}}",
    "several": f"<think>{SECRET}</think><think>more</think>{{}}",
}


# Telling thoughts from answers

WHOLE = {
    "plain": ("plain", ""),
    " with a space": (" with a space", ""),
    "<think>a b</think>\n\n42": ("42", "a b"),
    "\n<Thinking>x</Thinking>y": ("y", "x"),
    "<think>cut off": ("", "cut off"),
    "hard thought\n</think>\n42": ("42", "hard thought\n"),
    "<|channel|>analysis<|message|>cut": ("", "cut"),
    "<|channel|>analysis<|message|>a<|start|>assistant<|channel|>final<|message|>b": ("b", "a"),
    "Write `</think>` at its end": ("Write `</think>` at its end", ""),
    "```\n<think>\nx\n</think>\n```\nok": ("```\n<think>\nx\n</think>\n```\nok", ""),
    "First.\n<think>wait</think>\nSecond.": ("First.\nSecond.", "wait"),
    "<thin air> and [thing]": ("<thin air> and [thing]", ""),
    "a <think> in a line": ("a <think> in a line", ""),
    "<": ("<", ""),
    "": ("", ""),
    "<think></think>": ("", ""),
}


@pytest.mark.parametrize("text", WHOLE)
def test_thoughts_are_told_from_the_answer_in_pieces_of_any_size(text: str) -> None:
    whole = split(text)
    assert (whole.said, whole.thought) == WHOLE[text]
    for size in range(1, 12):
        splitter = Splitter()
        pieces = [splitter.feed(text[start : start + size]) for start in range(0, len(text), size)]
        pieces.append(splitter.end(cut=False))
        assert (splitter.said, splitter.thought) == WHOLE[text]
        if not splitter.opened:  # then the beginning was passed on before its end could tell what it was
            assert "".join(said for said, _ in pieces).strip() == WHOLE[text][0].strip()
        assert "".join(thought for _, thought in pieces) == WHOLE[text][1]


def test_a_text_that_is_presumed_to_begin_in_thoughts_may_have_none() -> None:
    assert split("just an answer", begins="open").said == "just an answer"
    cut = split("still thinking", begins="open", cut=True)
    assert (cut.said, cut.thought) == ("", "still thinking")
    assert split("hm</think>42", begins="open").said == "42"
    assert split("<think>hm</think>42", begins="none").said == "<think>hm</think>42"


@pytest.mark.parametrize("evil", ["<think></think>", "\n<think>", "<", "`</think>`", "</think>", " ", "```\n<think>"])
def test_marks_by_the_million_are_read_once(evil: str) -> None:
    """It would not end otherwise: the work would grow with the square."""
    splitter = Splitter()
    for _ in range(40):
        splitter.feed(evil * 5_000)
    splitter.end(cut=True)
    assert len(splitter.said) + len(splitter.thought) <= len(evil) * 200_000


# Members


@pytest.mark.parametrize(("told", "kept"), [(3, 3), (99, 5), (-1, 0), ("3", 0), (True, 0), (None, 0)])
async def test_thoughts_are_counted_as_the_endpoint_counts_them(
    upstream: FakeUpstream, start_gateway, told: Any, kept: int
):
    upstream.models["alpha"] = Script("B", thoughts=SECRET, reasoning_tokens=told)
    gateway = await start_gateway()
    asked = await gateway.client.chat.completions.create(model="alpha", messages=HELLO)
    assert asked.usage.completion_tokens_details.reasoning_tokens == kept
    for stream in (False, True):
        answer = await gateway.client.responses.create(model="alpha", input="Hello", stream=stream)
        if stream:
            answer = [event async for event in answer][-1].response
        assert answer.usage.output_tokens_details.reasoning_tokens == kept
        assert answer.usage.output_tokens == 5


async def test_thoughts_are_estimated_where_the_endpoint_counts_nothing(upstream: FakeUpstream, start_gateway):
    upstream.models["alpha"] = Script("B", thoughts=SECRET, usage=None)
    gateway = await start_gateway()
    usage = (await gateway.client.chat.completions.create(model="alpha", messages=HELLO)).usage
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens


@pytest.mark.parametrize("form", FORMS)
async def test_nobody_but_the_trace_and_a_client_who_asks_sees_thoughts(
    start_gateway: StartGateway, upstream: FakeUpstream, form: str
) -> None:
    for name in ("alpha", "beta", "gamma"):
        upstream.models[name] = Script(f"the answer of {name}", thoughts=SECRET, thinks_in=FORMS[form])
    gateway = await start_gateway()
    for mode in ("best-of", "merge", "debate"):
        answer = await gateway.client.chat.completions.create(model=f"fusion/{mode}", messages=HELLO)
        assert SECRET not in answer.model_dump_json()
        trace = await gateway.trace(answer.model_extra["fusion"])
        assert all(SECRET in call["thoughts"] for call in trace["calls"] if call["stage"] == "answer")
        assert SECRET not in json.dumps([call["text"] for call in trace["calls"]])
    assert SECRET not in json.dumps(upstream.requests)
    asked = await gateway.client.chat.completions.create(
        model="fusion/best-of", messages=HELLO, extra_body={"include_reasoning": True}
    )
    assert asked.choices[0].message.content == "the answer of beta"
    assert SECRET in asked.choices[0].message.model_extra["reasoning_content"]


@pytest.mark.parametrize("form", FORMS)
async def test_thoughts_are_streamed_apart(start_gateway: StartGateway, upstream: FakeUpstream, form: str) -> None:
    """A stream that opened its thoughts in the prompt is held back once the first answer has shown it."""
    upstream.models["alpha"] = Script("the answer of alpha", thoughts=SECRET, thinks_in=FORMS[form])
    gateway = await start_gateway()
    await gateway.post(model="alpha", messages=HELLO)
    for wanted in (False, True):
        thoughts, text = "", ""
        stream = await gateway.client.chat.completions.create(
            model="alpha", messages=HELLO, stream=True, extra_body={"fusion": {"include_reasoning": wanted}}
        )
        async for chunk in stream:
            thoughts += (chunk.choices[0].delta.model_extra or {}).get("reasoning_content") or ""
            text += chunk.choices[0].delta.content or ""
        assert text == "the answer of alpha"
        assert (SECRET in thoughts) == wanted


async def test_the_synthesizers_thoughts_are_streamed_before_its_text(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    upstream.models["synth"] = Script("merged", thoughts="let me see", thinks_in="<think>let me see</think>{}")
    gateway = await start_gateway()
    stream = await gateway.client.chat.completions.create(
        model="fusion/merge", messages=HELLO, stream=True, extra_body={"include_reasoning": True}
    )
    deltas = [chunk.choices[0].delta async for chunk in stream]
    pieces = [(delta.model_extra or {}).get("reasoning_content") for delta in deltas]
    first_text = next(place for place, delta in enumerate(deltas) if delta.content)
    assert "".join(piece or "" for piece in pieces) == "let me see"
    assert not any(pieces[first_text:])


@pytest.mark.parametrize("form", ["reasoning_content", "<think>hm hm {}", "parts"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_member_that_was_cut_in_its_thoughts_has_no_answer(
    gateway: Gateway, upstream: FakeUpstream, form: str, stream: bool
) -> None:
    upstream.models["alpha"] = Script("", thoughts="hm hm", thinks_in=form, finish="length")
    fusion = (await gateway.post(**ASK)).json()["fusion"]
    assert [row["member"] for row in fusion["candidates"]] == ["beta", "gamma"]
    (failed,) = fusion["failed"]
    assert (failed["type"], "did not answer" in failed["message"]) == ("invalid_response", True)
    response = await gateway.post(model="alpha", messages=HELLO, stream=stream)
    assert (response.status_code, response.json()["error"]["type"]) == (502, "invalid_response")


async def test_an_operator_that_exposes_nothing_shows_no_thoughts(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    upstream.models["beta"] = Script("the answer of beta", thoughts=SECRET)
    gateway = await start_gateway(modes={"expose": "none"})
    assert SECRET not in (await gateway.post(**ASK, include_reasoning=True)).text


# Judges


@pytest.mark.parametrize("form", ["reasoning_content", "<think>B is tempting</think>{}", "B is tempting</think>\n{}"])
@pytest.mark.parametrize("verdicts", ["auto", "parsed", "logprobs"])
async def test_a_judge_that_thinks_gets_room_and_its_verdict_is_read(
    start_gateway: StartGateway, upstream: FakeUpstream, form: str, verdicts: str
) -> None:
    upstream.models["judge"] = Script(verdict=prefers("beta"), thoughts="B is tempting", thinks_in=form)
    gateway = await start_gateway(judge={"base_url": upstream.base_url, "model": "judge", "verdicts": verdicts})
    for expected in (12, 6):  # what was found out is remembered
        before = len(upstream.asked("judge"))
        fusion = (await gateway.post(**ASK)).json()["fusion"]
        assert (fusion["reason"], fusion["winner"]) == ("judged", 1)
        assert all(verdict["parse_failures"] == 0 for verdict in fusion["verdicts"])
        assert len(upstream.asked("judge")) - before <= expected
    assert upstream.asked("judge")[-1]["max_tokens"] == 8192


async def test_a_judges_own_parameters_are_honoured(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    judge = {
        "base_url": upstream.base_url,
        "model": "judge",
        "max_tokens": 3000,
        "temperature": 0.6,
        "system": "You judge cooking.",
        "extra_body": {"reasoning_effort": "low"},
    }
    await (await start_gateway(judge=judge)).post(**ASK)
    for request in upstream.asked("judge"):
        assert (request["max_tokens"], request["temperature"], request["reasoning_effort"]) == (3000, 0.6, "low")
        assert request["messages"][0]["content"].startswith("You judge cooking.")
        assert [message["role"] for message in request["messages"]] == ["system", "user"]


REFUSALS: dict[str, Any] = {
    "limit": lambda asked: (
        (400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if "max_tokens" in asked
        else None
    ),
    "logprobs": lambda asked: (
        (400, "'top_logprobs' must be less than or equal to 5") if asked.get("top_logprobs", 0) > 5 else None
    ),
    "vLLM's logprobs": lambda asked: (
        (400, "Requested sample logprobs of 20, which is greater than max allowed: 5")
        if asked.get("top_logprobs", 0) > 5
        else None
    ),
    "temperature": lambda asked: (
        (400, "'temperature' does not support 0 with this model") if asked.get("temperature") == 0 else None
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
async def test_what_a_judge_takes_is_learned_once(
    start_gateway: StartGateway, upstream: FakeUpstream, name: str
) -> None:
    upstream.models["judge"].refuse = REFUSALS[name]
    gateway = await start_gateway()
    fusion = (await gateway.post(**ASK)).json()["fusion"]
    assert (fusion["reason"], fusion["winner"]) == ("judged", 1)
    assert {verdict["read"] for verdict in fusion["verdicts"]} == {"logprobs"}
    before = len(upstream.asked("judge"))
    await gateway.post(**ASK)
    later = upstream.asked("judge")[before:]
    assert len(later) == 6
    assert not any(REFUSALS[name](request) for request in later)
    if "logprobs" in name:
        assert {request["top_logprobs"] for request in later} == {5}


async def test_one_reply_without_logprobs_is_not_for_good(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    upstream.models["judge"].faults = [Script('{"verdict": "A"}', no_logprobs=True)]
    gateway = await start_gateway()
    await gateway.post(**ASK)
    fusion = (await gateway.post(**ASK)).json()["fusion"]
    assert {verdict["read"] for verdict in fusion["verdicts"]} == {"logprobs"}


async def test_a_judge_that_cannot_judge_is_loud(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = await start_gateway()
    well = upstream.models["judge"]
    for broken in (Script(status=401), Script("I would rather not say", no_logprobs=True)):
        upstream.models["judge"] = broken
        assert (await gateway.post(**ASK)).json()["fusion"]["reason"] == "judge_failed"
        ready = await gateway.http.get("/readyz")
        assert (ready.status_code, "judge cannot judge" in ready.text) == (200, True)
        assert (await gateway.metrics())['mixfuse_judge_failing{member="judge"}'] == 1
    upstream.models["judge"] = well
    await gateway.post(**ASK)
    assert (await gateway.http.get("/readyz")).json()["problems"] == []
    assert (await gateway.metrics())['mixfuse_judge_failing{member="judge"}'] == 0
