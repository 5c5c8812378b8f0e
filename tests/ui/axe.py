"""What axe finds on a page of the gateway, for any module of tests."""

from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

COMBINATIONS: tuple[tuple[Any, int], ...] = (("light", 1600), ("light", 360), ("dark", 360), ("dark", 1600))


def serious(page: Page, address: str) -> list[tuple[str, str, str, int, list[str]]]:
    """What axe finds on a page, with everything unfolded: light and dark, narrow and wide."""
    response = page.goto(address)
    assert response
    assert response.status < 400 or address.endswith("/none"), address
    page.locator("main details").evaluate_all("all => all.forEach(one => { one.open = true })")
    found = []
    for scheme, width in COMBINATIONS:
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # a transition has colours of its own
        page.set_viewport_size({"width": width, "height": 900})
        for violation in Axe().run(page).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                nodes = [node["html"][:200] for node in violation["nodes"][:3]]
                found.append((address, violation["id"], scheme, width, nodes))
    return found
