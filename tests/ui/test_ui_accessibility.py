"""Axe finds nothing serious on any page, light and dark, narrow and wide."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from browsing import Served, Watched, served
from fake_upstream import Script

MODES = ("best-of", "auto", "merge", "debate")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    models = {
        "alpha": Script("Paris"),
        "beta": Script("London"),
        "judge": Script(verdict=lambda first, second: 0.9 if "Paris" in first else 0.3),
        "synth": Script("the merged text"),
    }
    folder = tmp_path_factory.mktemp("axe")
    with served(folder, models, packages=("mixfuse.app.pages",), members=["alpha", "beta"]) as running:
        running.traces = {mode: ask(running, mode) for mode in MODES}  # type: ignore[attr-defined]
        yield running


def ask(gateway: Served, mode: str) -> str:
    body = {"model": f"fusion/{mode}", "messages": [{"role": "user", "content": "the capital?"}]}
    answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=60)
    trace_id: str = answer.json()["fusion"]["trace_id"]
    httpx.get(f"{gateway.url}/v1/traces/{trace_id}").raise_for_status()
    return trace_id


@pytest.mark.parametrize(("scheme", "width"), [("light", 1600), ("dark", 360)])
def test_axe_finds_nothing_serious(gateway: Served, tab: Callable[..., Watched], scheme: Any, width: int) -> None:
    page = tab(color_scheme=scheme, viewport={"width": width, "height": 900}).page
    page.goto(f"{gateway.url}/ui")
    addresses = page.locator("nav a").evaluate_all("links => links.map(link => link.href)")
    assert len(addresses) >= 2
    traces: dict[str, str] = gateway.traces  # type: ignore[attr-defined]
    addresses += [f"{gateway.url}/ui/traces/{trace_id}" for trace_id in traces.values()]
    addresses += [f"{gateway.url}/ui/ask?trace={traces['merge']}", f"{gateway.url}/ui/login"]
    addresses += [f"{gateway.url}/ui/traces/compare?id={traces['best-of']}&id={traces['auto']}"]
    found = []
    for address in addresses:
        page.goto(address)
        page.locator("main details").evaluate_all("all => all.forEach(one => { one.open = true })")
        for violation in Axe().run(page).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                found.append((address, violation["id"], [node["html"][:200] for node in violation["nodes"][:3]]))
    assert found == []
