"""The arena in a real Chromium: blind pairs, votes, what they become, and how far people and the judge agree."""

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
from playwright.sync_api import Page, expect
from sqlalchemy import text

from mixfuse.contracts.database import Database, opened
from mixfuse.contracts.trace import Trace
from mixfuse.fusion.http import keys
from mixfuse.fusion.store import trace_facts
from mixfuse.fusion.ui import votes
from mixfuse.fusion.ui.votes import compare, following, hardest, standing, votes_of

ATTACK = "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'>{{ 7 * 7 }} \"'></div>"
MEMBERS = ("alpha", "beta", "gamma")


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Served]:
    """The judge prefers what is first shown where it is unsure: its two orders disagree."""
    models = {
        "alpha": Script(reply=lambda asked: f"one {asked}"),
        "beta": Script(reply=lambda asked: ATTACK if "attack" in asked else "two"),
        "judge": Script(
            verdict=lambda first, second: 0.9 if "flip" in first + second else 0.9 if "two" in first else 0.1
        ),
    }
    with served(tmp_path, models, members=["alpha", "beta"], modes={"agreement": "exact"}) as running:
        yield running


def ask(gateway: Served, question: str, key: str | None = None) -> str:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    body = {"model": "fusion/best-of", "messages": [{"role": "user", "content": question}]}
    answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    trace_id: str = answer.json()["fusion"]["trace_id"]
    httpx.get(f"{gateway.url}/v1/traces/{trace_id}", headers=headers).raise_for_status()  # it is in the database
    return trace_id


def vote(page: Page, side: str, comment: str = "") -> None:
    page.get_by_label("Comment").fill(comment)
    page.get_by_role("button", name=side).click()
    page.wait_for_url("**/arena/told?*")


def side_of(page: Page, words: str) -> str:
    """The side on which an answer stands."""
    return "Left is better" if words in page.locator("section.card").first.inner_text() else "Right is better"


def feedback(gateway: Served, trace_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(f"{gateway.url}/v1/traces/{trace_id}").json()["feedback"]
    return found


def test_votes_on_blind_pairs_become_preference_pairs(gateway: Served, tab: Callable[..., Watched]) -> None:
    flipped = ask(gateway, "please flip")
    sure = ask(gateway, "which is it")
    page = tab(viewport={"width": 360, "height": 800}).page
    sent: list[str] = []
    page.on("response", lambda response: response.url.split("?")[0].endswith("/arena") and sent.append(response.text()))
    page.goto(f"{gateway.url}/ui/arena")
    page.get_by_label("Your name").fill("Ann")
    page.keyboard.press("Enter")
    # First what the judge flipped on, although it is older.
    expect(page.get_by_text("please flip", exact=True)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    blind = page.content()
    assert not re.search("alpha|beta", blind), "a page before the vote names no member"
    assert flipped not in blind
    assert sent
    assert not any(re.search("alpha|beta", body) or flipped in body for body in sent)
    vote(page, side_of(page, "one please flip"), "<b>clearer</b>")
    told = page.locator("main").inner_text()
    assert "alpha is better" in told
    assert "its two orders disagree" in told
    page.locator("#next").click()
    expect(page.get_by_text("which is it", exact=True)).to_be_visible()
    vote(page, "Both are bad")
    page.locator("#next").click()
    expect(page.get_by_text("There is no pair left for you")).to_be_visible()
    assert feedback(gateway, flipped) == [
        {
            "user": "Ann", "correct": [0], "wrong": [1], "comment": "<b>clearer</b>",
            "metadata": {"arena": {"first": 0, "second": 1, "vote": "first"}},
        }
    ]  # fmt: skip
    assert feedback(gateway, sure)[0]["wrong"] == [0, 1]
    out, pairs = gateway.folder / "pool.jsonl", gateway.folder / "pairs.jsonl"
    database = str(gateway.folder / "traces.sqlite3")
    mixfuse("traces", "export", "--db", database, "--out", str(out))
    assert "2 training rows" in mixfuse("pairs", "build", str(out), "--out", str(pairs), "--dev-share", "0")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["responses"] == [
        {"model": "alpha", "text": "one please flip", "correct": True},
        {"model": "beta", "text": "two", "correct": False},
    ]


def mixfuse(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "mixfuse", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_votes_by_keys_and_what_is_skipped(gateway: Served, tab: Callable[..., Watched]) -> None:
    first, second, third = (ask(gateway, f"question {number}") for number in range(3))
    page = tab().page
    page.goto(f"{gateway.url}/ui/arena?name=Ann")
    expect(page.get_by_text("question 2", exact=True)).to_be_visible()
    page.keyboard.press("?")
    expect(page.get_by_role("status")).to_contain_text("b, both are bad; s skips")
    page.get_by_label("Comment").press_sequentially("best")  # in a field they are letters
    expect(page.get_by_label("Comment")).to_have_value("best")
    page.keyboard.press("Escape")
    page.keyboard.press("s")
    expect(page.get_by_text("question 1", exact=True)).to_be_visible()
    page.wait_for_load_state()  # its script has run
    assert third not in page.url
    left = side_of(page, "one question")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url("**/arena/told?*")
    expect(page.locator("main")).to_contain_text(f"{'alpha' if left.startswith('Left') else 'beta'} is better")
    page.keyboard.press("n")
    expect(page.get_by_text("question 0", exact=True)).to_be_visible()
    page.wait_for_load_state()
    page.keyboard.press("b")
    page.wait_for_url("**/arena/told?*")
    page.keyboard.press("n")
    page.get_by_role("link", name="Show what you skipped").click()
    expect(page.get_by_text("question 2", exact=True)).to_be_visible()
    page.wait_for_load_state()
    page.keyboard.press("t")
    page.wait_for_url("**/arena/told?*")
    page.keyboard.press("n")
    expect(page.get_by_text("There is no pair left for you")).to_be_visible()
    said = [feedback(gateway, trace_id)[0]["metadata"]["arena"]["vote"] for trace_id in (first, second, third)]
    assert said == ["bad", "first" if left.startswith("Left") else "second", "tie"]


def test_several_people_and_the_judge_are_compared(gateway: Served, tab: Callable[..., Watched]) -> None:
    for number in range(4):
        ask(gateway, f"question {number}")
    page = tab().page
    for name, choices in (("Ann", "aaaa"), ("Bob", "aatb")):
        page.goto(f"{gateway.url}/ui/arena?name={name}")
        for choice in choices:
            one = side_of(page, "one question")
            other = "Left is better" if one.startswith("Right") else "Right is better"
            vote(page, {"a": one, "b": other, "t": "Tie"}[choice])
            page.locator("#next").click()
            page.wait_for_url("**/arena?*")
        expect(page.get_by_text("There is no pair left for you")).to_be_visible()
    page.goto(f"{gateway.url}/ui/arena/agreement")
    rows = page.locator("#agreement tbody tr").all_inner_texts()
    assert [row.split("\t") for row in rows] == [
        ["Ann", "Bob", "4", "50 %", "0.00"],
        ["Ann", "the judge", "4", "0 %", "0.00"],
        ["Bob", "the judge", "4", "25 %", "0.00"],
    ]


def test_what_members_and_people_write_does_nothing(gateway: Served, tab: Callable[..., Watched]) -> None:
    ask(gateway, f"attack {ATTACK}")
    page = tab().page
    page.goto(f"{gateway.url}/ui/arena")
    page.get_by_label("Your name").fill(ATTACK[:60])
    page.keyboard.press("Enter")
    expect(page.locator("section.card", has_text="window.hit = 1")).to_have_count(2)
    vote(page, "Tie", ATTACK)
    page.goto(f"{gateway.url}/ui/arena/agreement")
    assert page.get_by_text(ATTACK[:60]).count() >= 1
    assert page.evaluate("window.hit") is None


def test_nothing_is_told_before_the_vote(gateway: Served) -> None:
    ask(gateway, "blind")
    with httpx.Client(base_url=gateway.url) as client:
        page = client.get("/ui/arena?name=Ann").text
        found = re.search(r'name="ticket" value="([^"]+)"', page)
        assert found
        told = client.get("/ui/arena/told", params={"ticket": found[1]})
        assert (told.status_code, told.headers["location"]) == (303, "/ui/arena?name=Ann")
        # A ticket is no session.
        (name,) = client.cookies
        cookie = {"cookie": f"{name}={found[1]}"}
        assert httpx.get(f"{gateway.url}/ui/arena", headers=cookie).status_code == 200


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("name=" + "x" * 81, "'name' must be a name"),
        ("name=%07", "'name' must be a name"),
        ("name=a&after=1", "'after' is no place"),
        ("name=a&after=1~1~nan~x", "'after' is no place"),
    ],
)
def test_a_wrong_query_is_one_clear_line(gateway: Served, query: str, said: str) -> None:
    assert said in refusal(gateway, f"arena?{query}")


def test_a_wrong_vote_is_refused(gateway: Served) -> None:
    ask(gateway, "which")
    with httpx.Client(base_url=gateway.url) as client:
        page = client.get("/ui/arena?name=Ann").text
        fields = dict(re.findall(r'name="(csrf|ticket)" value="([^"]+)"', page))
        assert client.post("/ui/arena/vote", data={**fields, "choice": "both"}).status_code == 400
        assert client.post("/ui/arena/vote", data={**fields, "choice": "tie", "ticket": "x"}).status_code == 400
        assert client.post("/ui/arena/vote", data={"ticket": fields["ticket"], "choice": "tie"}).status_code == 403


def test_a_key_votes_on_its_own_traces_only(tmp_path: Path) -> None:
    with opened(tmp_path / "traces.sqlite3") as database:
        ann, bob = (keys.create(database, name)[1] for name in ("ann", "bob"))
    models = {"alpha": Script("one"), "beta": Script("two"), "judge": Script(verdict=lambda _first, _second: 0.6)}
    with served(tmp_path, models, members=["alpha", "beta"], modes={"agreement": "exact"}) as gateway:
        ask(gateway, "what ann asked", ann)
        with httpx.Client(base_url=gateway.url) as client, httpx.Client(base_url=gateway.url) as other:
            for visitor, key in ((client, ann), (other, bob)):
                token = re.search(r'name="csrf" value="(\w+)"', visitor.get("/ui/login").text)
                assert token
                assert visitor.post("/ui/login", data={"csrf": token[1], "key": key}).status_code == 303
            assert "There is no pair left" in other.get("/ui/arena?name=Bob").text
            page = client.get("/ui/arena?name=Ann").text
            assert "what ann asked" in page
            fields = dict(re.findall(r'name="(csrf|ticket)" value="([^"]+)"', page))
            token = re.search(r'name="csrf" value="(\w+)"', other.get("/ui/arena").text)
            assert token
            stolen = other.post("/ui/arena/vote", data={**fields, "csrf": token[1], "choice": "tie"})
            assert stolen.status_code == 404
            assert client.post("/ui/arena/vote", data={**fields, "choice": "tie"}).status_code == 303
            assert "There are no votes yet" in other.get("/ui/arena/agreement").text
            assert "There are no votes yet" not in client.get("/ui/arena/agreement").text


def trace(**values: Any) -> Trace:
    calls = [
        {"stage": "answer", "member": member, "model": member, "candidate": index, "text": member}
        for index, member in enumerate(MEMBERS)
    ]
    given = {"model": "m", "mode": "best_of", "messages": [], "candidates": MEMBERS, "calls": calls}
    return Trace.model_validate(given | values)


def verdict(first: int, second: int, score: float, *, consistent: bool = True) -> dict[str, Any]:
    winner = "first" if score > 0.5 else "second"
    return {"first": first, "second": second, "winner": winner, "score": score, "consistent": consistent}


def test_the_pair_that_the_judge_is_least_sure_of() -> None:
    sure, close = verdict(0, 1, 0.95), verdict(2, 1, 0.55)
    assert hardest(trace(verdicts=[sure, close])) == (1, 2)
    assert hardest(trace(verdicts=[verdict(0, 1, 0.95, consistent=False), close])) == (0, 1)
    assert hardest(trace(calls=[])) is None


def test_votes_are_read_from_whatever_clients_sent() -> None:
    about = {"first": 0, "second": 1, "vote": "tie"}
    odd = [
        {"user": "a"}, {"user": "a", "metadata": []}, {"user": "a", "metadata": {"arena": 1}},
        {"metadata": {"arena": about}}, {"user": "a", "metadata": {"arena": {**about, "vote": ["tie"]}}},
        {"user": "a", "metadata": {"arena": {}}},
        {"user": "a", "metadata": {"arena": {**about, "second": 0}}},
    ]  # fmt: skip
    assert votes_of("t", odd) == []
    assert [vote.vote for vote in votes_of("t", [*odd, {"user": "a", "metadata": {"arena": about}}])] == ["tie"]


def test_cohens_kappa() -> None:
    """Cohen's kappa of 20 yes/yes, 15 no/no, 5 and 10 apart is .4."""
    told = (
        [("first", "first")] * 20 + [("first", "second")] * 5 + [("second", "first")] * 10 + [("second", "second")] * 15
    )
    one = {("t", 0, number): said for number, (said, _) in enumerate(told, 1)}
    other = {("t", 0, number): said for number, (_, said) in enumerate(told, 1)}
    found = compare("a", one, "b", other)
    assert (found.pairs, found.same) == (50, 35)
    assert found.kappa == pytest.approx(0.4)
    assert compare("a", {("t", 0, 1): "tie"}, "b", {("t", 0, 1): "tie"}).kappa is None


def write(database: Database, statement: Any, values: dict[str, Any]) -> None:
    database.run_now(lambda connection: connection.execute(statement, values))


def test_the_queue_goes_through_everything_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(votes, "_CHUNK", 3)
    monkeypatch.setattr(votes, "_CHUNKS", 2)
    with opened(tmp_path / "traces.sqlite3") as database:
        traces = [trace(id=f"t{number}", created_at=float(number)) for number in range(20)]
        traces.append(trace(id="flipped", created_at=0.5, verdicts=[verdict(0, 1, 0.9, consistent=False)]))
        voted = {"t12", "t11", "t10", "t9", "t8"}
        said = [{"user": "Ann", "metadata": {"arena": {"first": 0, "second": 1, "vote": "tie"}}}]
        insert = text(
            "INSERT INTO traces (id, created_at, model, mode, outcome, reason, total_tokens, duration_ms, record) "
            "VALUES (:id, :at, 'm', 'best_of', 'ok', '', 0, 0, :record)"
        )
        change = text("UPDATE traces SET record = :record WHERE id = :id")
        for one in traces:
            kept = one.model_copy(update={"feedback": said if one.id in voted else []})
            values = {"id": kept.id, "at": kept.created_at, "record": kept.model_dump_json()}
            write(database, insert, values)
            write(database, trace_facts.INSERT, trace_facts.facts(kept))
        seen: list[str] = []
        after = None
        for _ in range(40):
            found = database.run_now(lambda connection, after=after: following(connection, None, "Ann", after))
            after = found.after
            if found.asked is not None:
                seen.append(found.asked.trace.id)
                mark = found.asked.trace.model_copy(update={"feedback": said})
                write(database, change, {"id": mark.id, "record": mark.model_dump_json()})
            elif not found.more:
                break
        assert seen[0] == "flipped"
        assert sorted(seen) == sorted(one.id for one in traces if one.id not in voted)
        assert database.run_now(lambda connection: standing(connection, None)).counts == {"Ann": 5}
