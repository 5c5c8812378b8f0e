"""The page that asks, in a real Chromium over a gateway: answers as they come, votes, verdicts, editing, code."""

import ast
import asyncio
import json
import shlex
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import yaml
from browsing import Served, Watched, served
from fake_upstream import Script
from playwright.sync_api import Page, expect

from mixfuse.fusion.config import FusionOptions
from mixfuse.fusion.http.statuses import RequestError
from mixfuse.fusion.ui.pages.ask import _body
from mixfuse.fusion.ui.requests_as_code import as_code

ATTACK = "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'>data:text/html,x {{ 7 * 7 }}"


def reply(asked: str) -> str:
    return ATTACK if "attack" in asked else "L" * 1_000_000 if "long" in asked else "Paris"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    models = {
        "alpha": Script(reply=reply),
        "beta": Script(reply=reply),
        "gamma": Script(reply=lambda asked: "London"),
        "late": Script("late", hold=asyncio.Event()),
        "judge": Script(verdict=lambda first, second: 0.9 if "London" in first else 0.2 if "London" in second else 0.5),
        "synth": Script("merged of three [1][2]\n\nand more [3]"),
    }
    with served(
        tmp_path_factory.mktemp("ask"), models, members=["alpha", "beta", "gamma", "late"], modes={"agreement": "exact"}
    ) as running:
        running.late = models["late"]  # type: ignore[attr-defined]
        yield running


def fill(page: Page, gateway: Served, question: str, mode: str = "best-of", members: str = "alpha beta gamma") -> None:
    page.goto(f"{gateway.url}/ui/ask")
    page.get_by_label("Model, mode or preset").select_option(f"fusion/{mode}")
    page.get_by_text("Options", exact=True).click()
    for member in members.split():
        page.get_by_role("checkbox", name=member).check()
    page.get_by_label("Question").fill(question)


def test_answers_come_one_by_one_and_end_with_votes_and_verdicts(gateway: Served, tab: Callable[..., Watched]) -> None:
    page = tab().page
    fill(page, gateway, "the capital?", members="alpha beta gamma late")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#live-answers article")).to_have_count(3)  # the fourth is held back
    assert page.locator("#live-answers").inner_text().count("Paris") == 2
    gateway.soon(gateway.late.hold.set)  # type: ignore[attr-defined]
    expect(page.locator("#result table.matrix")).to_be_visible()
    gateway.soon(gateway.late.hold.clear)  # type: ignore[attr-defined]
    text = page.locator("#result").inner_text()
    assert text.count("2 votes") == 2
    assert "The judge compared the answers in pairs" in text
    assert page.locator("#result .card.won").count() == 1
    row = page.locator("table.matrix tbody tr", has=page.get_by_role("rowheader", name="gamma (2)"))
    assert "90 % · 80 %" in row.inner_text()
    assert "/ui/ask?trace=trace-" in page.url
    page.reload()  # the link shows the question and its answer to whoever opens it
    assert page.get_by_label("Question").input_value() == "the capital?"
    assert page.locator("#result table.matrix").is_visible()


def test_edit_and_run_again_with_another_mode_and_synthesizer(gateway: Served, tab: Callable[..., Watched]) -> None:
    page = tab().page
    fill(page, gateway, "first wording")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#result h2").first).to_be_visible()
    first = page.url
    page.get_by_label("Question").fill("second wording")
    page.get_by_label("Model, mode or preset").select_option("fusion/merge")
    page.get_by_label("Synthesizer").select_option("gamma")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#result #answer")).to_have_text("London")
    assert page.url != first
    trace = httpx.get(f"{gateway.url}/v1/traces/{page.url.partition('trace=')[2]}").json()
    assert trace["messages"] == [{"role": "user", "content": "second wording"}]
    assert [call["model"] for call in trace["calls"] if call["stage"] == "synthesis"] == ["gamma"]


@pytest.mark.parametrize(
    ("mode", "seen"), [("auto", "Weights"), ("debate", "Debate"), ("merge", "Answers of the members")]
)
def test_each_mode_shows_how_it_came_to_its_answer(
    gateway: Served, tab: Callable[..., Watched], mode: str, seen: str
) -> None:
    page = tab().page
    fill(page, gateway, "how?", mode)
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#result h2", has_text=seen)).to_be_visible()
    if mode == "auto":
        assert "Confidence" in page.locator("#result").inner_text()
    if mode == "debate":
        assert page.locator("#result summary", has_text="Round").count() >= 1


@pytest.mark.parametrize("question", ["attack " + ATTACK, "long"])
def test_what_members_write_does_nothing(gateway: Served, tab: Callable[..., Watched], question: str) -> None:
    page = tab(viewport={"width": 360, "height": 800}).page
    fill(page, gateway, question)
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#result h2").first).to_be_visible()
    assert page.evaluate("window.hit") is None
    assert page.locator("main script, main img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_conversation_goes_on(gateway: Served, tab: Callable[..., Watched]) -> None:
    page = tab().page
    fill(page, gateway, "first question")
    page.get_by_text("System prompt").click()
    page.get_by_role("textbox", name="System prompt").fill("Be brief.")
    page.get_by_label("Question").press("Control+Enter")
    page.get_by_role("button", name="Go on with this answer").click()
    page.get_by_label("Question").fill("and then?")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#progress")).to_have_text("answered")
    expect(page.locator("#result h2").first).to_be_visible()
    trace = httpx.get(f"{gateway.url}/v1/traces/{page.url.partition('trace=')[2]}").json()
    roles = [turn["role"] for turn in trace["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    page.reload()
    assert page.locator("fieldset.turn").count() == 2
    assert page.get_by_role("textbox", name="System prompt").input_value() == "Be brief."


def test_a_refusal_is_shown_in_its_words(gateway: Served, tab: Callable[..., Watched]) -> None:
    page = tab().page
    fill(page, gateway, "hello", members="alpha")
    page.get_by_label("samples").fill("99")
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("alert")).to_contain_text("samples")
    watched = tab()
    fill(watched.page, gateway, "hello", members="alpha")
    watched.page.get_by_label("temperature").fill("warm")
    watched.page.get_by_role("button", name="Ask").click()
    expect(watched.page.get_by_role("alert")).to_have_text("'temperature' must be a number, not 'warm'")
    watched.complaints.clear()  # Chromium notes the status 400 in its console


def until(page: Page, condition: Callable[[], bool], what: str) -> None:
    """Waits for what happens outside the page."""
    for _ in range(600):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"waited in vain until {what}")


def test_stop_cancels_the_request(gateway: Served, tab: Callable[..., Watched]) -> None:
    page = tab().page
    before, asked = gateway.upstream.aborted.count("late"), len(gateway.upstream.asked("late"))
    fill(page, gateway, "stop me", members="late")
    page.get_by_role("button", name="Ask").click()
    until(page, lambda: len(gateway.upstream.asked("late")) > asked, "the member is called")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#progress")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Ask")).to_be_enabled()
    until(page, lambda: gateway.upstream.aborted.count("late") > before, "the member's call ends")


def test_asking_needs_no_script(gateway: Served, tab: Callable[..., Watched]) -> None:
    page = tab(java_script_enabled=False).page
    page.goto(f"{gateway.url}/ui/ask")
    page.get_by_label("Model, mode or preset").select_option("alpha")
    page.get_by_label("Question").fill("plainly")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#answer")).to_have_text("Paris")


def test_the_code_is_the_request(gateway: Served, tab: Callable[..., Watched]) -> None:
    page = tab().page
    fill(page, gateway, 'it\'s "quoted" $HOME `id`\nin lines', members="alpha gamma")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#code")).to_be_visible()
    command = page.locator("#code-curl").text_content() or ""
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert {candidate["member"] for candidate in answer["fusion"]["candidates"]} == {"alpha", "gamma"}
    trace = httpx.get(f"{gateway.url}/v1/traces/{answer['fusion']['trace_id']}").json()
    assert trace["messages"][0]["content"] == 'it\'s "quoted" $HOME `id`\nin lines'


@pytest.mark.parametrize("keyed", [False, True])
def test_code_in_each_language(keyed: bool) -> None:
    body: dict[str, Any] = {
        "model": "fusion/best-of",
        "messages": [{"role": "user", "content": "a'b\"c\n$(x)"}],
        "temperature": 0.5,
        "fusion": {"members": ["a"], "target": 0.9},
    }
    code = as_code(body, "http://127.0.0.1:1", keyed=keyed)
    words = shlex.split(code["curl"].replace("\\\n", ""))
    assert json.loads(words[words.index("-d") + 1]) == body
    assert ("$MIXFUSE_API_KEY" in code["curl"]) == keyed
    tree = ast.parse(code["python"])
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.keywords) > 2)
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert given.pop("extra_body") == {"fusion": body["fusion"]}
    assert given == {name: value for name, value in body.items() if name != "fusion"}
    preset = yaml.safe_load(code["yaml"])["presets"]["my-preset"]
    assert FusionOptions.model_validate(preset).mode == "best_of"


def test_a_form_as_a_request() -> None:
    fields = [("model", "m"), ("system", " "), ("turn_role", "user"), ("turn_text", "one"), ("turn_role", "assistant")]
    fields += [("turn_text", "two"), ("question", "three"), ("member", "a"), ("member", "b"), ("cite", "1")]
    assert _body([*fields, ("max_tokens", "5"), ("target", "0.5"), ("judge", "")]) == {
        "model": "m",
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
        ],
        "max_tokens": 5,
        "fusion": {"members": ["a", "b"], "target": 0.5, "cite": True},
    }
    pictured = _body([("model", "m"), ("question", "what?"), ("image", "data:image/png;base64,AA==")])
    assert pictured["messages"][0]["content"][1]["image_url"]["url"] == "data:image/png;base64,AA=="
    for wrong in ([("question", " ")], [("question", "q"), ("seed", "1.5")], [("question", "q"), ("target", "inf")]):
        with pytest.raises(RequestError):
            _body(wrong)
