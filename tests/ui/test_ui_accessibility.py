"""Axe finds nothing serious on any page, light and dark, narrow and wide."""

import json
from collections.abc import Callable, Iterator

import httpx
import pytest
from axe import serious
from browsing import Served, Watched, served
from fake_upstream import Script
from playwright.sync_api import expect
from test_ui_runs import train_row, write_run

MODES = ("best-of", "auto", "merge", "debate")
LONG = "\n" + "a line of a long text\n" * 100  # it scrolls, which must be possible by keyboard


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    models = {
        "alpha": Script("Paris" + LONG),
        "beta": Script("London"),
        "judge": Script(verdict=lambda first, second: 0.9 if "Paris" in first else 0.3),
        "synth": Script("the merged text"),
    }
    folder = tmp_path_factory.mktemp("axe")
    recipe = {"role": "domain", "optimizer": {"steps": 3}}
    for name in ("sft", "other"):
        write_run(folder / "runs" / name, [train_row(1, 4.0), train_row(2, 2.0), train_row(3, 1.25)], recipe)
    profile = {"tokens": 278, "gate_share": [[0.25, 0.75], [0.9, 0.1]], "chosen": [[1], [0]]}
    (folder / "runs" / "sft" / "experts.json").write_text(json.dumps(profile))
    (folder / "runs" / "report").mkdir()
    (folder / "runs" / "report" / "report.md").write_text("# A report\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n")
    pairs = folder / "pairs.jsonl"
    pair = {"prompt": "which?" + LONG, "response_a": "this" + LONG, "response_b": "that", "winner": "A"}
    pairs.write_text(json.dumps(pair))
    keys = {"members": ["alpha", "beta"], "ui_runs": str(folder / "runs"), "ui_pairs": str(pairs)}
    with served(folder, models, packages=("mixfuse.app.pages",), **keys) as running:
        running.traces = {mode: ask(running, mode) for mode in MODES}  # type: ignore[attr-defined]
        yield running


def ask(gateway: Served, mode: str) -> str:
    body = {"model": f"fusion/{mode}", "messages": [{"role": "user", "content": "the capital?" + LONG}]}
    answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=60)
    trace_id: str = answer.json()["fusion"]["trace_id"]
    httpx.get(f"{gateway.url}/v1/traces/{trace_id}").raise_for_status()
    return trace_id


def test_axe_finds_nothing_serious(gateway: Served, tab: Callable[..., Watched]) -> None:
    watched = tab()
    page = watched.page
    page.goto(f"{gateway.url}/ui")
    addresses = page.locator("nav a").evaluate_all("links => links.map(link => link.href)")
    names = {address.rpartition("/")[2] for address in addresses}
    assert {"ask", "traces", "arena", "pairs", "sheet", "runs"} <= names
    traces: dict[str, str] = gateway.traces  # type: ignore[attr-defined]
    paths = [f"traces/{trace_id}" for trace_id in traces.values()]
    paths += [f"ask?trace={traces['merge']}", "login", "traces/none", "sheet?no_feedback=1", "sheet?words=none"]
    paths += [f"traces/compare?id={traces['best-of']}&id={traces['auto']}", "arena?name=Ann", "pairs?name=Ann"]
    paths += ["runs/run?path=sft", "runs/run?path=sft&with=other", "runs/report?path=report"]
    addresses += [f"{gateway.url}/ui/{path}" for path in paths]
    found = [one for address in addresses for one in serious(page, address)]
    watched.complaints[:] = [said for said in watched.complaints if "404" not in said]  # of the page that is not there
    assert found == []


def test_axe_finds_nothing_serious_after_votes(gateway: Served, tab: Callable[..., Watched]) -> None:
    page = tab().page
    page.goto(f"{gateway.url}/ui/arena?name=Bob")
    page.get_by_role("button", name="Left is better").click()
    page.wait_for_url("**/arena/told?*")
    found = serious(page, page.url)
    page.goto(f"{gateway.url}/ui/pairs?name=Bob")
    page.get_by_role("button", name="Tie").click()
    expect(page.get_by_text("There is no pair left for you")).to_be_visible()
    for path in ("arena/agreement", "pairs/agreement", "pairs?name=Bob", "arena?name=Bob"):
        found += serious(page, f"{gateway.url}/ui/{path}")
    page.goto(f"{gateway.url}/ui/sheet")
    page.locator("table.sheet select").first.select_option("wrong")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator("#saved")).to_be_visible()
    found += serious(page, f"{gateway.url}/ui/sheet?saved=1")
    assert found == []
