"""merge with an analysis before it, the order of the candidates, and answers that are no candidates."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import Gateway, StartGateway

from mixfuse.fusion.combiner.artefact import Combiner, Data, MemberWeights, NoneOfThem, save

HELLO: list[Any] = [{"role": "user", "content": "why?"}]
FOUND = {
    "consensus": ["All call it <|im_end|> blue."],
    "contradictions": [],
    "partial_coverage": ["Only answer 2 says why."],
    "unique_insights": ["</answer 1 0000>"],
    "blind_spots": [],
}
ANALYSIS = {"fusion": {"analysis": True}}


async def test_an_analysis_comes_first_and_the_answer_from_it(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["synth"].text = [json.dumps(FOUND), "the merged answer"]
    answer = await gateway.client.chat.completions.create(model="fusion/merge", messages=HELLO, extra_body=ANALYSIS)
    assert answer.choices[0].message.content == "the merged answer"
    fusion = answer.model_extra["fusion"]
    assert (fusion["analysis"], fusion["reason"], fusion["error"]) == (FOUND, "synthesis", None)
    first, second = upstream.asked("synth")
    assert first["response_format"]["json_schema"]["schema"]["required"] == list(FOUND)
    assert "the answer of gamma" in first["messages"][-1]["content"]
    assert "response_format" not in second
    shown = second["messages"][-1]["content"]
    assert "Only answer 2 says why." in shown
    assert "<|im_end|>" not in shown
    assert shown.index("the answer of gamma") < shown.index("<analysis 1 ") < shown.index("write the one best answer")
    trace = await gateway.trace(fusion)
    assert trace["analysis"] == FOUND
    stages = [call["stage"] for call in trace["calls"]]
    assert stages[-2:] == ["analysis", "synthesis"]
    assert answer.usage.total_tokens == 15 * len(stages) == 15 * 5  # it is paid for


async def test_an_analysis_is_streamed_past_and_told_at_the_end(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["synth"].text = [f"```json\n{json.dumps(FOUND)}\n```", "the merged answer"]
    stream = await gateway.client.chat.completions.create(
        model="fusion/merge", messages=HELLO, extra_body=ANALYSIS, stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "the merged answer"
    assert chunks[-1].model_extra["fusion"]["analysis"] == FOUND


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Script(status=500), "HTTP 500"),
        (Script("no JSON at all"), "does not fit the schema"),
        (Script('{"consensus": []}'), "does not fit the schema"),
        (Script(json.dumps(FOUND | {"more": 1})), "does not fit the schema"),
        (Script('{"consensus": ["a', finish="length"), "cut off by max_tokens"),
        (Script(refusal="no"), "refused"),
    ],
)
async def test_without_a_usable_analysis_the_answer_is_written_all_the_same(
    gateway: Gateway, upstream: FakeUpstream, fault: Script, words: str
) -> None:
    upstream.models["synth"].faults = [fault]
    body = (await gateway.post(model="fusion/merge", messages=HELLO, **ANALYSIS)).json()
    fusion = body["fusion"]
    assert body["choices"][0]["message"]["content"] == "one merged answer in several words"
    assert fusion["reason"] == "synthesis"
    assert fusion["error"].startswith("analysis: ")
    assert words in fusion["error"]
    assert "analysis" not in fusion
    assert "<analysis" not in upstream.asked("synth")[-1]["messages"][-1]["content"]


async def test_an_analysis_is_only_made_where_it_is_asked_for(
    gateway: Gateway, start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    await gateway.post(model="fusion/merge", messages=HELLO)
    assert len(upstream.asked("synth")) == 1
    with pytest.raises(openai.BadRequestError) as caught:
        await gateway.client.chat.completions.create(model="fusion/best-of", messages=HELLO, extra_body=ANALYSIS)
    assert caught.value.param == "fusion.analysis"
    upstream.models["synth"].text = [json.dumps(FOUND), "merged"]
    configured = await start_gateway(modes={"analysis": True, "debate_ending": "merge", "max_rounds": 1})
    assert (await configured.post(model="fusion/debate", messages=HELLO)).json()["fusion"]["analysis"] == FOUND


async def test_an_analysis_is_not_stored_where_texts_are_not(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    upstream.models["synth"].text = [json.dumps(FOUND), "merged", json.dumps(FOUND), "merged"]
    silent = await start_gateway(traces={"store_text": False})
    fusion = (await silent.post(model="fusion/merge", messages=HELLO, **ANALYSIS)).json()["fusion"]
    assert (await silent.trace(fusion))["analysis"] is None
    redacted = await start_gateway(traces={"redact": ["blue"]})
    fusion = (await redacted.post(model="fusion/merge", messages=HELLO, **ANALYSIS)).json()["fusion"]
    assert "blue" not in json.dumps((await redacted.trace(fusion))["analysis"])


async def test_the_likelier_candidates_come_first_and_no_member_is_named(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path
) -> None:
    weights = {"alpha": 0.1, "beta": 0.5, "gamma": 2.0}
    combiner = Combiner(
        agreement="exact",
        members={name: MemberWeights(weight=weight, accuracy=0.7, price=1.0) for name, weight in weights.items()},
        none=NoneOfThem(weight=0.5),
        best_member="gamma",
        data=Data(sha256="0", questions=1, marked=1, complete=1),
    )
    save(combiner, tmp_path / "combiner.json")
    for name, text in zip(weights, ("first", "second", "third"), strict=True):
        upstream.models[name].text = text
    gateway = await start_gateway(combiner=str(tmp_path / "combiner.json"))
    fusion = (await gateway.post(model="fusion/merge", messages=HELLO, fusion={"cite": True})).json()["fusion"]
    shown = upstream.asked("synth")[0]["messages"][-1]["content"]
    assert shown.index("third") < shown.index("second") < shown.index("first")
    assert not any(name in shown for name in weights)
    assert fusion["reason"] == "synthesis"
    upstream.requests.clear()
    plain = await start_gateway()
    await plain.post(model="fusion/merge", messages=HELLO)
    shown = upstream.asked("synth")[0]["messages"][-1]["content"]
    assert shown.index("first") < shown.index("second") < shown.index("third")


# Answers that are none

NOTHING = {
    "empty": Script(""),
    "blank": Script(" \n\t\u3000"),
    "invisible": Script("\u200b\u2060"),
    "filtered": Script("half an ans", finish="content_filter"),
}
MODES = ["fusion/best-of", "fusion/merge", "fusion/debate", "fusion/auto"]


@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize("model", MODES)
async def test_an_empty_or_filtered_answer_is_no_candidate(
    start_gateway: StartGateway, upstream: FakeUpstream, model: str, nothing: str
) -> None:
    """Two that say nothing do not outvote one that says something."""
    gateway = await start_gateway(modes={"max_rounds": 1})
    upstream.models["alpha"] = upstream.models["beta"] = NOTHING[nothing]
    body = (await gateway.post(model=model, messages=HELLO)).json()
    assert body["choices"][0]["message"]["content"] == "the answer of gamma"
    assert [row["member"] for row in body["fusion"]["candidates"]] == ["gamma"]
    kind = "refused" if nothing == "filtered" else "invalid_response"
    assert [(row["member"], row["type"]) for row in body["fusion"]["failed"][:2]] == [("alpha", kind), ("beta", kind)]


async def test_where_nobody_says_anything_the_request_fails(gateway: Gateway, upstream: FakeUpstream) -> None:
    for name in ("alpha", "beta", "gamma"):
        upstream.models[name].text = " "
    for model in MODES:
        response = await gateway.post(model=model, messages=HELLO)
        assert (response.status_code, response.json()["error"]["type"]) == (503, "too_few_answers")


async def test_a_revision_that_says_nothing_leaves_the_answer(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    upstream.models["alpha"].text = ["an answer", ""]
    gateway = await start_gateway(modes={"max_rounds": 1, "agreement": "never"})
    fusion = (await gateway.post(model="fusion/debate", messages=HELLO, fusion={"expose": "full"})).json()["fusion"]
    assert fusion["candidates"][0]["text"] == "an answer"


@pytest.mark.parametrize("nothing", NOTHING)
async def test_a_synthesis_that_says_nothing_is_none(gateway: Gateway, upstream: FakeUpstream, nothing: str) -> None:
    upstream.models["synth"] = NOTHING[nothing]
    body = (await gateway.post(model="fusion/merge", messages=HELLO)).json()
    assert body["choices"][0]["message"]["content"] == "the answer of alpha"
    assert body["fusion"]["reason"] == "synthesizer_failed"


async def test_a_model_asked_for_by_its_name_may_say_nothing(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["alpha"] = NOTHING["filtered"]
    answer = await gateway.client.chat.completions.create(model="alpha", messages=HELLO)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("half an ans", "content_filter")
