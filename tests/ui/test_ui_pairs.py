"""Pairs of a file in a real Chromium: blind votes, where they go, who agrees, and what the file may not be."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from browsing import Watched, served
from fake_upstream import Script
from playwright.sync_api import Page, expect
from test_ui_alone import viewing

from mixfuse.app.pairs_file import PairsFile, pairs_at, votes_beside
from mixfuse.cli.entry import main
from mixfuse.contracts import preferences
from mixfuse.contracts.database import opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import iter_objects
from mixfuse.fusion.http import keys

ATTACK = "<script>window.hit = 1</script><svg onload='window.hit = 2'> data:text/html,\u202e {{ 7 * 7 }} \"'></form>"
PACKAGES = ("mixfuse.app.pages",)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"question {number}", "response_a": f"good {number}", "response_b": f"poor {number}", **more}


def vote(page: Page, question: str, key: str) -> None:
    """Votes by a key: `g` for the good answer, `p` for the poor one, or a key of the page."""
    expect(page.locator("div.text.card").first).to_have_text(question)
    page.wait_for_load_state()  # its script has run
    if key in "gp":
        word = {"g": "good", "p": "poor"}[key]
        left = word in page.locator("section.card").first.inner_text()
        key = "ArrowLeft" if left else "ArrowRight"
    page.keyboard.press(key)


def mixfuse(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "mixfuse", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_votes_on_a_file_become_a_file_to_train_on(tmp_path: Path, tab: Callable[..., Watched]) -> None:
    conversation = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"}, {"role": "user", "content": "question 3"},
    ]  # fmt: skip
    file = write(
        tmp_path / "pairs.jsonl",
        pair(0, model_a="secret-one", model_b="secret-two", winner="A"),
        pair(1),
        pair(2, winner=None),
        pair(3, prompt=conversation),
        pair(4, response_b="good 4"),
    )
    before = file.read_bytes()
    with viewing("--pairs", str(file)) as url:
        page = tab(viewport={"width": 360, "height": 800}).page
        page.goto(url)
        expect(page.get_by_text("4 pairs.")).to_be_visible()
        page.get_by_label("Your name").fill("Ann")
        page.keyboard.press("Enter")
        expect(page.get_by_text("question 0", exact=True)).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert "secret" not in page.content(), "a page before the vote names no model"
        assert "pairs.votes.jsonl" not in [path.name for path in tmp_path.iterdir()]
        vote(page, "question 0", "g")
        vote(page, "question 1", "s")
        expect(page.get_by_text("question 2", exact=True)).to_be_visible()
        page.get_by_label("Comment").fill(ATTACK)
        page.get_by_role("button", name="Both are bad").click()
        vote(page, "question 3", "p")
        page.get_by_role("link", name="Show what you skipped").click()
        vote(page, "question 1", "t")
        expect(page.get_by_text("you have voted on 4 of 4")).to_be_visible()
    votes = tmp_path / "pairs.votes.jsonl"
    assert file.read_bytes() == before
    rows = [json.loads(line) for line in votes.read_text(encoding="utf-8").splitlines()]
    assert [(row["winner"], row["user"], row.get("comment")) for row in rows] == [
        ("model_a", "Ann", None), ("tie (bothbad)", "Ann", ATTACK), ("model_b", "Ann", None), ("tie", "Ann", None),
    ]  # fmt: skip
    assert (rows[0]["model_a"], rows[0]["response_a"]) == ("secret-one", "good 0")
    read = preferences.read(iter_objects(votes)).pairs
    assert [(one.better, one.label == "tie") for one in read] == [
        ("good 0", False), ("poor 2", True), ("poor 3", False), ("poor 1", True),
    ]  # fmt: skip
    assert read[2].conversation == tuple(conversation)
    out = tmp_path / "built.jsonl"
    assert "4 training rows" in mixfuse("pairs", "build", str(votes), "--out", str(out), "--dev-share", "0")
    # Another start goes on, and others are compared.
    with viewing("--pairs", str(file)) as url:
        page.goto(f"{url}/pairs?name=Ann")
        expect(page.get_by_text("you have voted on 4 of 4")).to_be_visible()
        page.goto(f"{url}/pairs?name=Bob")
        for number, key in enumerate("gtbp"):
            vote(page, f"question {number}", key)
        expect(page.get_by_text("you have voted on 4 of 4")).to_be_visible()
        page.get_by_role("link", name="How far people and the file agree").click()
        page.wait_for_url("**/agreement*")
        table = page.locator("#agreement tbody tr").all_inner_texts()
    assert [row.split("\t")[:4] for row in table] == [
        ["Ann", "Bob", "4", "100 %"], ["Ann", "the file", "1", "100 %"], ["Bob", "the file", "1", "100 %"],
    ]  # fmt: skip


def test_what_a_file_holds_does_nothing(tmp_path: Path, tab: Callable[..., Watched]) -> None:
    file = write(
        tmp_path / "pairs.jsonl",
        {"prompt": ATTACK, "response_a": ATTACK, "response_b": "W" * 1_000_000},
    )
    with served(tmp_path, {"alpha": Script()}, packages=PACKAGES, members=["alpha"], ui_pairs=str(file)) as gateway:
        page = tab(viewport={"width": 360, "height": 800}).page
        page.goto(f"{gateway.url}/ui/pairs?name=Ann")
        expect(page.locator("section.card")).to_have_count(2)
        assert page.locator("main script, main svg, main [onload]").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert len(page.content()) < 100_000
        page.keyboard.press("t")
        expect(page.get_by_text("you have voted on 1 of 1")).to_be_visible()
        assert page.evaluate("window.hit") is None


def test_it_is_a_plain_form_without_javascript(tmp_path: Path, tab: Callable[..., Watched]) -> None:
    file = write(tmp_path / "pairs.jsonl", pair(0))
    with viewing("--pairs", str(file)) as url:
        page = tab(java_script_enabled=False).page
        page.goto(f"{url}/pairs?name=Ann")
        page.get_by_role("button", name="Tie").click()
        expect(page.get_by_text("you have voted on 1 of 1")).to_be_visible()


def test_only_who_has_a_key_votes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "pairs.jsonl", pair(0))
    with opened(tmp_path / "traces.sqlite3") as database:
        secret = keys.create(database, "ann")[1]
    with (
        served(tmp_path, {"alpha": Script()}, packages=PACKAGES, members=["alpha"], ui_pairs=str(file)) as gateway,
        httpx.Client(base_url=gateway.url) as client,
    ):
        assert client.get("/ui/pairs").status_code == 303
        token = re.search(r'name="csrf" value="(\w+)"', client.get("/ui/login").text)
        assert token
        assert client.post("/ui/pairs/vote", data={"csrf": token[1], "choice": "tie"}).status_code == 401
        assert client.post("/ui/login", data={"csrf": token[1], "key": secret}).status_code == 303
        page = client.get("/ui/pairs?name=Ann").text
        fields = dict(re.findall(r'name="(csrf|ticket)" value="([^"]+)"', page))
        for sent, said in (
            ({**fields, "choice": "none"}, "must be one of left, right, tie, bad"),
            ({**fields, "choice": "tie", "ticket": "forged"}, "open the page again"),
        ):
            refused = client.post("/ui/pairs/vote", data=sent)
            assert refused.status_code == 400
            assert said in refused.text
        with monkeypatch.context() as full:
            full.setattr("mixfuse.app.pairs_file._MOST_VOTED_BYTES", 10)
            refused = client.post("/ui/pairs/vote", data={**fields, "choice": "tie"})
            assert refused.status_code == 503
            assert "of votes; move it away" in refused.text
        assert client.post("/ui/pairs/vote", data={**fields, "choice": "tie"}).status_code == 303
        (tmp_path / "pairs.votes.jsonl").write_text("{broken\n" * 100)
        refused = client.get("/ui/pairs?name=Bob")
        assert refused.status_code == 409
        assert "malformed JSON" in refused.text
        write(file, {"prompt": "only a question"})
        refused = client.get("/ui/pairs?name=Ann")
        assert refused.status_code == 409
        assert f"{file}:1: " in refused.text


def test_bad_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good.jsonl", pair(0))
    (tmp_path / "good.votes.jsonl").write_text('{"pair_id": 1}\n{"half\n')
    linked = write(tmp_path / "linked.jsonl", pair(0))
    os.link(linked, tmp_path / "linked.votes.jsonl")
    write(tmp_path / "row.jsonl", pair(0), {"prompt": "x", "response_a": "y", "response_b": None})
    write(tmp_path / "pool.jsonl", {"prompt": "x", "responses": []})
    write(tmp_path / "same.jsonl", pair(0, response_a="poor 0"))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken.jsonl").write_text(json.dumps(pair(0)) + "\n{broken\n")
    for name, said in (
        (good.name, "good.votes.jsonl:2: malformed JSON"),
        ("linked.jsonl", "the votes would go into the file of pairs itself"),
        ("row.jsonl", "row.jsonl:2: 'response_b' holds no answer"),
        ("pool.jsonl", "pool.jsonl:1: this is a pool row"),
        ("same.jsonl", "there is no pair to vote on"),
        ("broken.jsonl", "broken.jsonl:2: malformed JSON"),
        ("none.jsonl", "none.jsonl"),
        ("folder", "folder: no regular file"),
        ("pipe", "pipe: no regular file"),
    ):
        assert main(["ui", "--port", "0", "--pairs", str(tmp_path / name)]) == 2
        printed = capsys.readouterr().err
        assert said in printed, printed
        assert len(printed.splitlines()) == 1


def test_two_processes_see_each_others_votes(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.json", pair(0), pair(1))
    one, other = PairsFile(path), PairsFile(path)
    first, second = one.pairs.values()
    one.add(first, "first", "Ann", "")
    with one.votes_path.open("ab") as stream:
        stream.write(b'{"cut off')  # by a full disk, say
    assert other.following("Ann", ()) == second
    assert other.following("Ann", (second.id,)) is None
    assert other.following("Bob", ()) == first
    with pytest.raises(MixfuseError, match=r"pairs\.votes\.jsonl:2: malformed JSON"):
        other.add(second, "bad", "Ann", "")
        one.votes()
    write(path, pair(2))
    (tmp_path / "pairs.votes.jsonl").unlink()
    assert [found.messages[0]["content"] for found in pairs_at(path).pairs.values()] == ["question 2"]


def test_a_vote_that_comes_twice_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = PairsFile(write(tmp_path / "pairs.jsonl", pair(0)))
    (one,) = file.pairs.values()
    for vote_again, comment in (("tie", ""), ("tie", ""), ("tie", "sure"), ("first", "")):
        file.add(one, vote_again, "Ann", comment)
    assert len(file.votes_path.read_text().splitlines()) == 3
    assert file.votes() == {"Ann": {one.id: "first"}}
    file.votes_path.rename(tmp_path / "moved.jsonl")
    assert file.votes() == {}
    assert file.following("Ann", ()) == one
    monkeypatch.setattr("mixfuse.app.pairs_file._MOST_VOTED_BYTES", 1000)
    with pytest.raises(MixfuseError, match="of votes; move it away"):
        file.add(one, "bad", "Ann", "w" * 1000)


def test_a_vote_that_comes_twice_at_once_is_one_row(tmp_path: Path) -> None:
    file = PairsFile(write(tmp_path / "pairs.jsonl", *(pair(number) for number in range(40))))
    together = threading.Barrier(8)

    def vote_on_all() -> None:
        for one in file.pairs.values():
            together.wait(60)
            file.add(one, "first", "Ann", "")

    with ThreadPoolExecutor(8) as people:
        for done in [people.submit(vote_on_all) for _ in range(8)]:
            done.result()
    assert len(file.votes_path.read_text().splitlines()) == 40


def test_a_name_that_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", pair(0))
    (one,) = PairsFile(path).pairs
    write(tmp_path / "pairs.votes.jsonl", {"pair_id": one, "user": "\ud800", "winner": "tie"})
    with pytest.raises(MixfuseError, match=r"pairs\.votes\.jsonl:1: 'user' is no name that can be printed"):
        PairsFile(path)


def test_where_the_votes_go(tmp_path: Path) -> None:
    for name, votes in (("a.jsonl", "a"), ("a.b.json", "a.b"), ("a.jsonl.gz", "a"), ("plain", "plain")):
        assert votes_beside(tmp_path / name).name == f"{votes}.votes.jsonl"
