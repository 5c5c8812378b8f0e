"""When candidates say the same, by each way of reading them."""

import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import StartGateway

from mixfuse.fusion.answering.agreement import candidate_key, distinct
from mixfuse.fusion.answering.candidate import Candidate
from mixfuse.fusion.config import Agreement, Member

MEMBER = Member(name="m", role="r")


def said(text: str, *calls: tuple[str, str]) -> Candidate:
    tool_calls = [{"id": "x", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return Candidate(0, MEMBER, text, "stop", tool_calls or None)


@pytest.mark.parametrize(
    ("how", "texts"),
    [
        ("exact", ["42 is it", " 42  is\nit "]),
        ("number", ["It is 42.", "6 * 7 = 42", "**42.0**", "4.2e1"]),
        ("number", ["1,234.50 dollars", "$1234.5"]),
        ("number", ["-3", "It comes to \u22123"]),
        ("number", ["no number  here", "no number here"]),
        ("json", ['{"a": 1, "b": [true]}', '```json\n{"b":[true],\n"a":1}\n```']),
        ("json", ["no { json", "no  { json"]),
        ("choice", ["B", "(B)", "B.", "The answer is (B)", "Not A. The answer is B", "**Answer: b**", "B) Paris"]),
        ("choice", ["Yes", "yes, because it is", "**YES**"]),
        ("choice", ["neither of them", "neither of  them"]),
    ],
)
def test_these_say_the_same(how: Agreement, texts: list[str]) -> None:
    assert len({candidate_key(said(text), how) for text in texts}) == 1
    assert len(distinct([said(text) for text in texts], how)) == 1


@pytest.mark.parametrize(
    ("how", "one", "other"),
    [
        ("exact", "42", "42."),
        ("exact", "Yes", "yes"),
        ("number", "42", "-42"),
        ("number", "1.5", "15"),
        ("number", "1e400", "1e401"),
        ("number", "none", "0"),
        ("json", '{"a": 1}', '{"a": "1"}'),
        ("json", "[1, 2]", "[2, 1]"),
        ("json", '"x"', "x"),
        ("choice", "A", "B"),
        ("choice", "The answer is A", "The answer is B"),
        ("choice", "yes", "no"),
        ("never", "a", "a"),
    ],
)
def test_these_do_not(how: Agreement, one: str, other: str) -> None:
    assert len(distinct([said(one), said(other)], how)) == 2


def test_calls_of_tools_are_the_same_whatever_their_spelling() -> None:
    def key(text: str, *calls: tuple[str, str]) -> str:
        return candidate_key(said(text, *calls), "exact")

    assert key("", ("add", '{"a": 1, "b": 2}')) == key("", ("add", '{"b":2,"a":1}'))
    assert key("", ("add", '{"a": 1}')) != key("", ("sub", '{"a": 1}'))
    assert key("", ("add", "{}")) != key("", ("add", "{}"), ("add", "{}"))
    assert key("add({})") != key("", ("add", "{}"))


async def test_a_gateway_reads_answers_as_configured(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    for model, text in {"alpha": "It is 42.", "beta": "6 * 7 = 42", "gamma": "42"}.items():
        upstream.models[model] = Script(text)
    ask = {"model": "fusion/best-of", "messages": [{"role": "user", "content": "why?"}]}
    by_number = await start_gateway(modes={"agreement": "number"})
    body = (await by_number.post(**ask)).json()
    assert (body["fusion"]["reason"], body["choices"][0]["message"]["content"]) == ("agreement", "It is 42.")
    assert upstream.asked("judge") == []
    # A debate ends as soon as all agree, in that reading of it.
    body = (await by_number.post(**{**ask, "model": "fusion/debate"})).json()
    assert body["fusion"]["debate"] == {"rounds": 0, "stopped": "agreement"}
    by_text = await start_gateway()
    assert (await by_text.post(**ask)).json()["fusion"]["reason"] == "judged"
