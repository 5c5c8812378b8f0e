"""The sheet of marks in a real Chromium: keys, saving, what marks become, pages, and the form without JavaScript."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browsing import Served, Watched, refusal, served
from fake_upstream import Script
from playwright.sync_api import Locator, Page, expect

from mixfuse.contracts.database import opened
from mixfuse.contracts.trace import Trace
from mixfuse.fusion.http import keys
from mixfuse.fusion.store.export_traces import by_feedback
from mixfuse.fusion.ui.marking import changes, feedback_of, marks_of, spread
from mixfuse.fusion.ui.trace_view import Shown

ATTACK = (
    "<script>window.hit = 1</script><svg onload='window.hit = 2'><a href='data:text/html,<script>1</script>'>x</a>"
    " \u202eoverridden\u2066 {{ 7 * 7 }} \"'></select></textarea></form>"
)
LINE = "W" * 1_000_000 + " the end"


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Served]:
    """Alpha and beta say the same."""
    models = {
        "alpha": Script(reply=lambda asked: ATTACK if "attack" in asked else LINE if "long" in asked else "it is 4"),
        "beta": Script(reply=lambda asked: "4"),
        "gamma": Script(reply=lambda asked: "it is 5"),
        "judge": Script(verdict=lambda first, second: 0.6),
        "synth": Script("the merged text"),
    }
    members = ["alpha", "beta", "gamma"]
    with served(tmp_path, models, members=members, modes={"agreement": "number"}) as running:
        yield running


def ask(gateway: Served, question: str, key: str | None = None, model: str = "fusion/merge") -> str:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    body = {"model": model, "messages": [{"role": "user", "content": question}]}
    answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    trace_id = f"trace-{answer.json()['id'].removeprefix('chatcmpl-')}"
    httpx.get(f"{gateway.url}/v1/traces/{trace_id}", headers=headers).raise_for_status()  # it is in the database
    return trace_id


def feedback(gateway: Served, trace_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(f"{gateway.url}/v1/traces/{trace_id}").json()["feedback"]
    return found


def menu(page: Page, row: int, column: int) -> Locator:
    return page.locator("table.sheet tbody tr").nth(row).locator("td").nth(column).locator("select")


def mixfuse(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "mixfuse", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_answers_are_marked_by_keys_and_become_evidence(gateway: Served, tab: Callable[..., Watched]) -> None:
    older, newer = ask(gateway, "older question"), ask(gateway, "newer question")
    watched = tab()
    page = watched.page
    page.goto(f"{gateway.url}/ui/sheet")
    assert page.locator("table.sheet thead th").all_inner_texts() == ["Question", "alpha", "beta", "gamma"]
    page.get_by_label("Your name").fill("Ann")
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")
    expect(menu(page, 0, 0)).to_be_focused()
    page.keyboard.press("r")  # alpha and beta gave one answer
    for column, value in enumerate(("right", "right", "")):
        expect(menu(page, 0, column)).to_have_value(value)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(menu(page, 0, 2)).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(menu(page, 0, 2)).to_be_focused()
    page.keyboard.press("w")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("w")
    expect(menu(page, 1, 2)).to_have_value("wrong")
    page.keyboard.press("Space")
    expect(menu(page, 1, 2)).to_have_value("")
    page.keyboard.press("r")
    expect(page.locator("#unsaved")).to_have_text("4 not saved yet")
    assert feedback(gateway, newer) == []
    # Leaving asks first.
    with page.expect_event("dialog") as asked:
        page.get_by_role("link", name="Traces").click()
    assert asked.value.type == "beforeunload"
    expect(menu(page, 1, 2)).to_have_value("right")
    watched.complaints.remove("")
    menu(page, 1, 2).focus()
    page.keyboard.press("s")
    expect(page.get_by_text("4 marks are kept.").first).to_be_visible()
    expect(menu(page, 1, 0)).to_be_focused()
    expect(page.get_by_label("Your name")).to_have_value("Ann")
    expect(menu(page, 1, 2)).to_have_value("right")
    assert feedback(gateway, newer) == [{"correct": [0, 1], "wrong": [2], "user": "Ann"}]
    assert feedback(gateway, older) == [{"correct": [2], "user": "Ann"}]
    # A mark is taken back.
    menu(page, 1, 2).focus()
    page.keyboard.press("Space")
    page.keyboard.press("s")
    expect(page.get_by_text("1 mark is kept.").first).to_be_visible()
    expect(menu(page, 1, 0)).to_be_focused()
    expect(menu(page, 1, 2)).to_have_value("")
    assert feedback(gateway, older)[1:] == [{"unmarked": [2], "user": "Ann"}]
    out = gateway.folder / "pool.jsonl"
    mixfuse("traces", "export", "--db", str(gateway.folder / "traces.sqlite3"), "--out", str(out))
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(one["model"], one["correct"]) for one in row["responses"]] == [
        ("alpha", True), ("beta", True), ("gamma", False),
    ]  # fmt: skip


def test_only_what_has_no_feedback_and_pages(
    gateway: Served, tab: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixfuse.fusion.ui.pages.sheet._ROWS", 2)
    for number in range(5):
        ask(gateway, f"question {number}")
    page = tab().page
    page.goto(f"{gateway.url}/ui/sheet?words=question")
    questions = page.locator("table.sheet tbody th bdi")
    expect(questions).to_have_text(["question 4", "question 3"])
    menu(page, 0, 2).select_option("wrong")
    page.get_by_role("button", name="Save and go on").click()
    expect(questions).to_have_text(["question 2", "question 1"])
    expect(menu(page, 0, 0)).to_be_focused()
    page.locator("#older").click()
    expect(questions).to_have_text(["question 0"])
    page.get_by_role("link", name="Only what has no feedback yet").click()
    expect(questions).to_have_text(["question 3", "question 2"])
    page.wait_for_load_state()  # its script has run
    menu(page, 0, 0).focus()
    page.keyboard.press("w")
    page.keyboard.press("s")
    expect(questions).to_have_text(["question 2", "question 1"])
    assert "words=question" in page.url
    page.goto(f"{gateway.url}/ui/traces?words=question+4")
    page.get_by_role("link", name="Mark these in the sheet").click()
    expect(questions).to_have_text(["question 4"])
    page.goto(f"{gateway.url}/ui/sheet?words=nothing+like+it")
    expect(page.get_by_text("There are no traces with answers like these.")).to_be_visible()


def test_it_is_a_plain_form_without_javascript(gateway: Served, tab: Callable[..., Watched]) -> None:
    trace_id = ask(gateway, "plain")
    page = tab(java_script_enabled=False).page
    page.goto(f"{gateway.url}/ui/sheet")
    expect(page.locator("#keys")).to_be_hidden()
    menu(page, 0, 0).select_option("wrong")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_text("2 marks are kept.")).to_be_visible()
    assert feedback(gateway, trace_id) == [{"wrong": [0, 1]}]
    page.get_by_label("Mark equal answers").uncheck()
    menu(page, 0, 1).select_option("right")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_text("1 mark is kept.")).to_be_visible()
    assert feedback(gateway, trace_id)[1:] == [{"correct": [1]}]


@pytest.mark.parametrize("question", ["attack " + ATTACK, "long"])
def test_what_members_and_people_write_does_nothing(
    gateway: Served, tab: Callable[..., Watched], question: str
) -> None:
    trace_id = ask(gateway, question)
    page = tab(viewport={"width": 360, "height": 800}).page
    page.goto(f"{gateway.url}/ui/sheet")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("main script, main img, main svg, main [onload], main a[href^=data]").count() == 0
    assert len(page.content()) < 50_000
    menu(page, 0, 0).focus()
    page.keyboard.press("Enter")
    opened_text = page.locator("table.sheet details[open] .text")
    expect(opened_text).to_contain_text("window.hit" if "attack" in question else "more characters")
    page.get_by_label("Your name").fill(ATTACK.replace("\u202e", "").replace("\u2066", "")[:70])
    menu(page, 0, 0).focus()
    page.keyboard.press("w")
    page.keyboard.press("s")
    expect(page.get_by_text("are kept.").or_(page.get_by_text("is kept.")).first).to_be_visible()
    assert feedback(gateway, trace_id)[0]["user"].startswith("<script>")
    assert page.evaluate("window.hit") is None


def test_what_somebody_else_marked_meanwhile_stays(gateway: Served, tab: Callable[..., Watched]) -> None:
    trace_id = ask(gateway, "two people")
    page = tab().page
    page.goto(f"{gateway.url}/ui/sheet")
    httpx.post(f"{gateway.url}/v1/traces/{trace_id}/feedback", json={"correct": [0, 1]}).raise_for_status()
    menu(page, 0, 2).focus()
    page.keyboard.press("w")
    page.keyboard.press("s")
    for column, value in enumerate(("right", "right", "wrong")):
        expect(menu(page, 0, column)).to_have_value(value)


def test_refusals_are_one_line(gateway: Served) -> None:
    ask(gateway, "once")
    assert "'after' must be a number" in refusal(gateway, "sheet?after=x~y")
    assert "'name' must be a name" in refusal(gateway, "sheet?name=%E2%80%AEx")
    with httpx.Client(base_url=gateway.url) as client:
        token = re.search(r'name="csrf" content="(\w+)"', client.get("/ui/sheet").text)
        assert token
        sent = {"csrf": token[1], "trace-0": "trace-none", "shown-0": "-", "mark-0-0": "right"}
        refused = client.post("/ui/sheet", data=sent)
        assert refused.status_code == 404
        assert "0 marks are kept, those of 1 traces are not: there is no trace" in refused.text
        assert client.post("/ui/sheet", data={**sent, "csrf": "no"}).status_code == 403


def test_a_key_marks_its_own_traces(tmp_path: Path) -> None:
    with opened(tmp_path / "traces.sqlite3") as database:
        ann, bob = (keys.create(database, name)[1] for name in ("ann", "bob"))
    with served(tmp_path, {"alpha": Script("one"), "beta": Script("two")}, members=["alpha", "beta"]) as gateway:
        trace_id = ask(gateway, "what ann asked", ann, "alpha")
        for key, status in ((bob, 404), (ann, 303)):
            with httpx.Client(base_url=gateway.url) as client:
                token = re.search(r'name="csrf" value="(\w+)"', client.get("/ui/login").text)
                assert token
                assert client.post("/ui/login", data={"csrf": token[1], "key": key}).status_code == 303
                page = client.get("/ui/sheet").text
                assert ("what ann asked" in page) == (key == ann)
                token = re.search(r'name="csrf" content="(\w+)"', page)
                assert token
                sent = {"csrf": token[1], "trace-0": trace_id, "shown-0": "-", "mark-0-0": "right"}
                assert client.post("/ui/sheet", data=sent).status_code == status


def test_changed_marks() -> None:
    assert changes({0: "right", 1: "", 2: "wrong", 3: "x"}, "-rw") == {0: "right", 1: ""}
    call = {"index": 0, "member": "m", "text": "t", "call": None, "votes": 1, "won": False}
    equal = [Shown(**{**call, "index": index, "group": group}) for index, group in enumerate((0, 1, 0, 0, -1))]  # type: ignore[arg-type]
    assert spread({0: "right", 3: "wrong", 4: ""}, equal) == {0: "right", 2: "right", 3: "wrong", 4: ""}
    assert feedback_of({2: "right", 0: "wrong", 1: "right", 3: ""}, "") == {
        "wrong": [0], "correct": [1, 2], "unmarked": [3],
    }  # fmt: skip


def test_a_mark_is_taken_back() -> None:
    said = [{"best": 1}, {"unmarked": [0]}, {"correct": [2]}, {"unmarked": [2], "user": "b"}]
    trace = Trace(model="m", mode="merge", messages=[], candidates=["a", "b", "c"], feedback=said)
    assert by_feedback(trace) == {1: True}
    assert marks_of(trace) == ["", "right", ""]
