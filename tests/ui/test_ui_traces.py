"""The pages of traces in a real Chromium: the list, its filters and pages, one trace, two, and feedback."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browsing import Served, Watched, refusal, served
from fake_upstream import Script
from playwright.sync_api import Page, expect

from mixfuse.contracts.database import opened
from mixfuse.contracts.trace import Trace, Verdict
from mixfuse.fusion.store.trace_facts import Filters, Place, backfill, facts, find
from mixfuse.fusion.ui.trace_view import explained

ATTACK = (
    "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'><svg onload='window.hit = 3'><a href="
    "'javascript:window.hit = 4'>here</a> data:text/html,<script>window.hit=5</script> {{ 7 * 7 }} \"'></textarea>"
)
LINE = "W" * 1_000_000


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    models = {
        "alpha": Script(reply=lambda asked: ATTACK if "attack" in asked else LINE if "long" in asked else "Paris"),
        "beta": Script(reply=lambda asked: "Paris" if "capital" in asked else "beta says so"),
        "gamma": Script(reply=lambda asked: "London", status=200),
        "broken": Script(status=500),
        "judge": Script(verdict=lambda first, second: 0.9 if "beta" in first else 0.2 if "beta" in second else 0.6),
        "synth": Script("the merged text"),
    }
    members = ["alpha", "beta", "gamma"]
    with served(tmp_path_factory.mktemp("traces"), models, members=members, modes={"agreement": "exact"}) as running:
        yield running


def ask(gateway: Served, question: str, mode: str = "best_of") -> str:
    body = {"model": f"fusion/{mode.replace('_', '-')}", "messages": [{"role": "user", "content": question}]}
    answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    trace_id: str = answer.json()["fusion"]["trace_id"]
    httpx.get(f"{gateway.url}/v1/traces/{trace_id}").raise_for_status()  # it is in the database
    return trace_id


def listed(page: Page) -> list[str]:
    return page.locator("tbody td.question").all_inner_texts()


def test_a_trace_is_found_opened_and_read(gateway: Served, tab: Callable[..., Watched]) -> None:
    trace_id = ask(gateway, "capital of the walk through")
    page = tab().page
    page.goto(f"{gateway.url}/ui/traces")
    page.keyboard.press("/")
    page.keyboard.type("walk THROUGH")
    page.wait_for_url("**words=walk+THROUGH*")
    expect(page.locator("tbody tr")).to_have_count(1)
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/ui/traces/{trace_id}")
    text = page.locator("main").inner_text()
    assert "The judge compared the answers in pairs" in text or "gave the same answer" in text
    # alpha and beta gave one answer, gamma another.
    assert page.get_by_text("2 votes").count() == 2
    assert page.locator("svg.timeline rect").count() >= 3
    cell = page.locator("table.matrix td .tag").first.inner_text()
    assert re.fullmatch(r"\d+ %", cell)
    page.get_by_text("Every verdict in words").click()
    expect(page.get_by_text("The judge prefers").first).to_be_visible()
    page.get_by_text("Sent to the judge: alpha as A").first.click()
    assert "capital of the walk through" in page.locator("details[open] pre").first.inner_text()


def test_both_orders_are_in_the_matrix(gateway: Served, tab: Callable[..., Watched]) -> None:
    """The judge sees beta's answer first with .9, second with .2, so beta gets 90 % and 80 %."""
    trace_id = ask(gateway, "who wins")
    page = tab().page
    page.goto(f"{gateway.url}/ui/traces/{trace_id}")
    row = page.locator("table.matrix tbody tr", has=page.get_by_role("rowheader", name="beta (1)"))
    assert "90 % · 80 %" in row.locator("td").first.inner_text()
    assert row.locator("td").first.locator(".tag.good").count() == 1
    column = page.locator("table.matrix tbody tr", has=page.get_by_role("rowheader", name="alpha (0)"))
    assert "20 % · 10 %" in column.locator("td").nth(1).inner_text()


@pytest.mark.parametrize("mode", ["best_of", "merge", "debate", "auto"])
@pytest.mark.parametrize("question", ["attack " + ATTACK, "long"])
def test_what_members_and_people_write_does_nothing(
    gateway: Served, tab: Callable[..., Watched], question: str, mode: str
) -> None:
    trace_id = ask(gateway, question, mode)
    page = tab(viewport={"width": 360, "height": 800}).page
    for path in ("/ui/traces", f"/ui/traces/{trace_id}", f"/ui/traces/compare?id={trace_id}&id={trace_id}"):
        page.goto(gateway.url + path)
        assert page.evaluate("window.hit") is None
        assert page.locator("main script, main img, main [onload], main a[href^=javascript]").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
    assert len(page.content()) < 2_000_000
    if "attack" in question:
        assert "<script>window.hit = 1</script>" in page.locator("main").inner_text()


def test_filters_and_pages(gateway: Served, tab: Callable[..., Watched]) -> None:
    ids = [ask(gateway, f"numbered question {number}", "merge") for number in range(53)]
    page = tab().page
    page.goto(f"{gateway.url}/ui/traces?words=numbered&mode=merge")
    assert len(listed(page)) == 50
    page.locator("#older").click()
    expect(page.get_by_text("numbered question 0", exact=True)).to_be_visible()
    assert listed(page) == [f"numbered question {number}" for number in (2, 1, 0)]
    page.goto(f"{gateway.url}/ui/traces?mode=best_of&words=numbered")
    assert page.get_by_text("There are no traces like these.").is_visible()
    page.goto(f"{gateway.url}/ui/traces?member=alpha&disagreement=1&words=numbered+question+52")
    assert len(listed(page)) == 1
    page.goto(f"{gateway.url}/ui/traces")
    for picked in ids[-2:]:
        page.locator(f"#pick-{picked}").check()
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_text("They were asked different questions.")).to_be_visible()
    page.go_back()


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("min_cost=much", "'min_cost' must be a number, not 'much'"),
        ("min_s=nan", "'min_s' must be a number"),
        ("since=yesterday", "'since' must be a day and a time"),
        ("after=x~y", "'after' must be a number"),
    ],
)
def test_a_wrong_filter_is_one_clear_line(gateway: Served, query: str, said: str) -> None:
    assert said in refusal(gateway, f"traces?{query}")


@pytest.mark.parametrize("query", ["words=%00", "words=%25", "mode=%00", "member=_", "after=1~%00", "words=%ED%A0%80"])
def test_odd_filters_find_nothing_and_break_nothing(gateway: Served, query: str) -> None:
    ask(gateway, "capital")
    assert httpx.get(f"{gateway.url}/ui/traces?{query}").status_code == 200


def test_one_trace_cannot_be_compared(gateway: Served) -> None:
    assert "tick two traces" in httpx.get(f"{gateway.url}/ui/traces/compare?id=a").text
    assert httpx.get(f"{gateway.url}/ui/traces/trace-nothing").status_code == 404


@pytest.mark.parametrize(
    ("mode", "options"), [("merge", {"analysis": True}), ("merge", {"cite": True}), ("debate", {})]
)
def test_prompts_are_those_that_were_sent(
    tmp_path: Path, tab: Callable[..., Watched], mode: str, options: dict[str, Any]
) -> None:
    found = {
        name: ["x"] for name in ("consensus", "contradictions", "partial_coverage", "unique_insights", "blind_spots")
    }
    synth = Script([json.dumps(found), "merged"] if "analysis" in options else "merged")
    models = {"alpha": Script("one"), "beta": Script("two"), "synth": synth}
    models["judge"] = Script(verdict=lambda first, second: 0.9)
    with served(tmp_path, models, members=["alpha", "beta"]) as running:
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}]
        body = {"model": f"fusion/{mode}", "messages": turns, "fusion": options}
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        page = tab().page
        page.goto(f"{running.url}/ui/traces/{answer.json()['fusion']['trace_id']}")
        shown = [json.loads(text) for text in page.locator("details[id^=prompt] pre").all_text_contents()]
        sent = [request["messages"] for request in running.upstream.requests]

    def plain(messages: Any) -> str:
        return re.sub(r" [0-9a-f]{4,}(?=[\]>])", " NONCE", json.dumps(messages))

    assert {plain(messages) for messages in sent} == {plain(messages) for messages in shown}
    assert len(shown) >= 2


def test_feedback_is_in_the_trace_and_in_the_list(gateway: Served, tab: Callable[..., Watched]) -> None:
    trace_id = ask(gateway, "feedback wanted")
    page = tab().page
    page.goto(f"{gateway.url}/ui/traces/{trace_id}")
    page.get_by_role("group", name="beta (candidate 1) is").get_by_label("right").check()
    page.get_by_role("group", name="alpha (candidate 0) is").get_by_label("wrong").check()
    page.get_by_label("Comment").fill("<b>as I knew</b>")
    page.get_by_role("button", name="Send feedback").click()
    expect(page.get_by_text("<b>as I knew</b>")).to_be_visible()
    kept = httpx.get(f"{gateway.url}/v1/traces/{trace_id}").json()["feedback"]
    assert kept == [{"correct": [1], "wrong": [0], "comment": "<b>as I knew</b>"}]
    page.goto(f"{gateway.url}/ui/traces?feedback=1")
    assert "feedback wanted" in listed(page)


def test_the_list_follows_new_traces(gateway: Served, tab: Callable[..., Watched]) -> None:
    page = tab().page
    page.goto(f"{gateway.url}/ui/traces?words=born+later")
    assert page.get_by_text("There are no traces like these.").is_visible()
    ask(gateway, "born later")
    expect(page.locator("td.question", has_text="born later")).to_be_visible()


def trace(**values: Any) -> Trace:
    return Trace.model_validate({"model": "m", "mode": "best_of", "messages": []} | values)


def test_the_facts_of_a_trace(tmp_path: Any) -> None:
    call = {"stage": "answer", "member": "a", "model": "a", "candidate": 0, "text": "one"}
    told = facts(
        trace(
            messages=[{"role": "user", "content": "first"}, {"role": "user", "content": "Last\0 \ud800"}],
            candidates=["a", "b"],
            calls=[call, {**call, "member": "b", "candidate": 1, "text": "two"}, {**call, "outcome": "timeout"}],
            verdicts=[{"first": 0, "second": 1, "winner": "tie", "score": 0.5, "consistent": False}],
            answer="One",
        )
    )
    assert told["question"] == "Last ?"
    assert told["words"] == "last ?\none"
    assert (told["failed"], told["disagreement"], told["flipped"], told["unsure"]) == (1, 1, 1, 0)
    cut = {**call, "member": "b", "candidate": 1, "outcome": "cancelled_straggler", "text": None}
    assert facts(trace(calls=[call, cut]))["failed"] == 0
    with opened(tmp_path / "traces.sqlite3") as database:
        odd = trace(messages=[{"role": "user", "content": [{"kind": "other"}]}], created_at=5.0)
        record = {"id": odd.id, "record": odd.model_dump_json()}
        from sqlalchemy import text

        insert = text(
            "INSERT INTO traces (id, created_at, model, mode, outcome, reason, total_tokens, duration_ms, record) "
            "VALUES (:id, 5.0, 'm', 'best_of', 'ok', '', 0, 0, :record)"
        )
        database.run_now(lambda connection: connection.execute(insert, record))
        assert database.run_now(lambda connection: find(connection, Filters())).rows == []
        assert database.run_now(lambda connection: backfill(connection, None, 10)) is None
        (row,) = database.run_now(lambda connection: find(connection, Filters())).rows
        assert row["id"] == odd.id
        assert database.run_now(lambda connection: find(connection, Filters(), after=Place(5.0, odd.id))).rows == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "So a is better; both orders say so."),
        ({"winner": "tie", "consistent": False, "orders": [0.9, 0.3]}, "it went by their place"),
        ({"winner": "tie", "score": 0.52}, "too close to one half"),
        ({"winner": "tie", "consistent": False, "parse_failures": 1, "orders": [None, 0.9]}, "could not be read"),
        ({"read": "scores", "orders": None}, "by the scores of a reward model."),
    ],
)
def test_a_verdict_in_words(changes: dict[str, Any], said: str) -> None:
    verdict = {"first": 0, "second": 1, "winner": "first", "score": 0.9, "consistent": True, "orders": [0.9, 0.8]}
    assert said in explained(Verdict.model_validate(json.loads(json.dumps(verdict | changes))), ["a", "b"])
