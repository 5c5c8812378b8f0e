"""Spend: the figures are the requests' own, key holders see theirs, hostile names do nothing."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import httpx
import pytest
from browsing import Served, Watched, refusal, served
from fake_upstream import Script
from playwright.sync_api import Page, expect

from mixfuse.contracts.database import opened
from mixfuse.fusion.http import keys

ADMIN = "an admin key"
HOSTILE = "<script>alert(1)</script>"
# Dollars for a million tokens: 10 tokens in and 5 out, as the fake upstream says, are 2 dollars.
PRICE = {"prompt": 100_000, "completion": 200_000}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A gateway whose two API keys have asked; one member has no price."""
    folder = tmp_path_factory.mktemp("spend")
    models = {"alpha": Script("Paris"), "beta": Script("Rome"), "judge": Script(verdict=lambda first, second: 0.8)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(keys.ADMIN_KEY, ADMIN)
        with opened(folder / "traces.sqlite3") as database:
            ann = keys.create(database, "ann", max_cost=40.0, period="day")[1]
            odd = keys.create(database, HOSTILE)[1]
        members = [{"name": "alpha", "price": PRICE}, "beta"]
        with served(folder, models, members=members) as running:
            running.ann = ann  # type: ignore[attr-defined]
            for key, model in ((ann, "alpha"), (ann, "alpha"), (ann, "beta"), (odd, "fusion/best-of")):
                trace_id = ask(running, key, model)
            score = {"score": 1}
            address = f"{running.url}/v1/traces/{trace_id}/feedback"
            httpx.post(address, json=score, headers={"authorization": f"Bearer {odd}"}).raise_for_status()
            yield running


def ask(gateway: Served, key: str, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "the capital?"}], "max_tokens": 5}
    headers = {"authorization": f"Bearer {key}"}
    answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["fusion"]["trace_id"])


def log_in(page: Page, gateway: Served, key: str) -> None:
    page.goto(f"{gateway.url}/ui/login?next=/spend")
    page.get_by_label("Key").fill(key)
    page.keyboard.press("Enter")
    page.wait_for_url("**/ui/spend")


def rows(page: Page, table: str) -> list[list[str]]:
    """The texts of a table's cells."""
    return [row.locator("td").all_inner_texts() for row in page.locator(f"#{table} tbody tr").all()]


def test_the_admin_sees_all_spending(gateway: Served, tab: Callable[..., Watched]) -> None:
    page = tab().page
    log_in(page, gateway, ADMIN)
    expect(page.locator("#total")).to_contain_text("$6.00 for 4 requests")
    today = datetime.now(UTC).date().isoformat()
    assert rows(page, "by-day")[0][:3] == [today, "4", "$6.00"]
    assert [row[:3] for row in rows(page, "by-key")] == [["ann", "3", "$4.00"], [HOSTILE, "1", "$2.00"]]
    assert [row[:4] for row in rows(page, "by-mode")] == [
        ["pass_through", "3", "$4.00", "67 %"],
        ["best_of", "1", "$2.00", "33 %"],
    ]
    members = {(row[0], row[1]): row[2:] for row in rows(page, "by-member")}
    assert members["alpha", "answers"] == ["3", "30", "15", "$6.00", "100 %"]
    assert members["beta", "answers"] == ["2", "20", "10", "no price", "-"]
    assert members["judge", "verdicts"][3] == "no price"
    assert rows(page, "right")[0][:4] == ["best_of", "1", "1", "$2.00"]
    budgets = {row[0]: row[1:] for row in rows(page, "budgets")}
    assert budgets["ann"][0] == "$40.00 a day"
    assert budgets["ann"][2:] == ["$36.00", "10 %"]
    assert budgets[HOSTILE][0] == "none"
    assert page.locator("svg rect.bar").count() == 30  # the last thirty days
    page.get_by_role("combobox", name="Key").select_option(label=HOSTILE)
    page.get_by_role("combobox", name="Mode").select_option("best_of")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#total")).to_contain_text("$2.00 for 1 request,")
    page.get_by_role("combobox", name="Mode").select_option("pass_through")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_text("Nothing was asked in these days")).to_be_visible()


def test_a_key_holder_sees_its_own_spending(gateway: Served, tab: Callable[..., Watched]) -> None:
    page = tab(viewport={"width": 360, "height": 700}).page
    log_in(page, gateway, gateway.ann)  # type: ignore[attr-defined]
    expect(page.locator("#total")).to_contain_text("$4.00 for 3 requests")
    assert HOSTILE not in page.locator("main").inner_text()
    assert [row[0] for row in rows(page, "budgets")] == ["ann"]
    assert page.get_by_role("combobox", name="Key").count() == 0
    page.goto(f"{gateway.url}/ui/spend?key=none")
    expect(page.locator("#total")).to_contain_text("$4.00 for 3 requests")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_an_empty_key_is_any_key(gateway: Served, tab: Callable[..., Watched]) -> None:
    page = tab().page
    log_in(page, gateway, ADMIN)
    page.goto(f"{gateway.url}/ui/spend?key=&mode=")
    expect(page.locator("#total")).to_contain_text("$6.00 for 4 requests")


def test_many_days_are_drawn_by_month(gateway: Served, tab: Callable[..., Watched]) -> None:
    page = tab().page
    log_in(page, gateway, ADMIN)
    page.goto(f"{gateway.url}/ui/spend?since=2020-01-01")
    expect(page.locator("#by-month")).to_contain_text(datetime.now(UTC).date().isoformat()[:7])
    assert page.locator("svg rect.bar").count() == 1


def test_days_that_are_none_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    with served(tmp_path_factory.mktemp("open"), {"alpha": Script("hello")}, members=["alpha"]) as running:
        assert "'since' must be a day such as 2026-05-01" in refusal(running, "spend?since=yesterday")
        assert "'until' must be a day such as" in refusal(running, "spend?until=2026-13-01")
        assert "'since' is after 'until'" in refusal(running, "spend?since=2026-02-01&until=2026-01-01")
        first = httpx.get(f"{running.url}/ui/spend?until=0001-01-01&mode=%00&key=%F0x")
        assert first.status_code == 200
        assert "Nothing was asked in these days" in first.text
