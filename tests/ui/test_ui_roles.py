"""The page Roles: swaps, a gate with live figures, rollback and pin, over a real role table; by the admin alone."""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe import serious
from browsing import Watched
from fake_upstream import Script, fake_upstream
from fusion_harness import config_keys, prefers
from test_gates import House, a_house, house_config

from mixfuse.contracts.database import opened
from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.http import keys
from mixfuse.fusion.ui.mount import ui

ADMIN = "an admin key"
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"


class Roles:
    """A server with a role table, in a thread."""

    def __init__(self, house: House, url: str, secret: str, loop: asyncio.AbstractEventLoop) -> None:
        self.house, self.url, self.secret, self._loop = house, url, secret, loop

    def do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Roles]:
    folder: Path = tmp_path_factory.mktemp("roles")
    started: Future[Roles] = Future()
    ended: list[Callable[[], None]] = []

    async def run() -> None:
        try:
            with opened(folder / "traces.sqlite3") as database:
                secret = keys.create(database, "ann")[1]
                async with fake_upstream(alpha=Script("hello"), beta=Script("hello")) as upstream:
                    fusion = FusionConfig.model_validate(config_keys(upstream, folder, **house_config()))
                    async with a_house(upstream, fusion, database, folder, ui=ui("mixfuse.app.pages")) as house:
                        end, loop = asyncio.Event(), asyncio.get_running_loop()
                        ended.append(lambda: loop.call_soon_threadsafe(end.set))
                        started.set_result(Roles(house, house.gateway.url, secret, loop))
                        await end.wait()
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(keys.ADMIN_KEY, ADMIN)
        thread = threading.Thread(target=lambda: asyncio.run(run()))
        thread.start()
        try:
            yield started.result(60)
        finally:
            for end in ended:
                end()
            thread.join(60)


def logged_in(roles: Roles, watched: Watched, key: str = ADMIN) -> Any:
    page = watched.page
    page.goto(f"{roles.url}/ui/roles")
    page.get_by_label("Key").fill(key)
    page.keyboard.press("Enter")
    page.wait_for_url("**/ui/roles")
    return page


def serving(roles: Roles, role: str = "domain") -> str:
    return str(roles.house.serving(role))


def test_a_role_is_swapped_pinned_and_rolled_back(roles: Roles, tab: Callable[..., Watched]) -> None:
    first = serving(roles)
    new = roles.house.make("domain", Script("a newer answer"))
    page = logged_in(roles, tab())
    assert first in page.locator("tbody").inner_text()
    page.get_by_role("link", name="domain", exact=True).click()
    page.get_by_label("Adapter directory").fill(str(new))
    page.get_by_role("button", name="Swap").click()
    page.get_by_role("cell", name="swap", exact=True).nth(1).wait_for()
    assert serving(roles) != first
    assert serving(roles) in page.locator("#now").inner_text()
    (new / "README.md").write_text(f"# A card\n\n{ATTACK}")
    page.reload()
    assert "Parity: not measured" in page.locator("main").inner_text()
    page.get_by_text("Manifest", exact=True).click()
    assert '"revision": "' + serving(roles) in page.locator("#manifest pre").inner_text()
    page.get_by_text("Card", exact=True).click()
    assert ATTACK in page.locator("#card pre").inner_text()
    page.get_by_role("button", name="Pin", exact=True).click()
    page.get_by_role("button", name="Unpin").wait_for()
    assert next(state for state in roles.house.table.states() if state.name == "domain").pinned
    page.get_by_role("button", name="Unpin").click()
    page.get_by_role("button", name="Pin", exact=True).wait_for()
    page.get_by_role("button", name="Roll back").click()
    page.get_by_role("cell", name="rollback").first.wait_for()
    assert serving(roles) == first


def test_a_gate_shows_live_figures_and_is_stopped(roles: Roles, tab: Callable[..., Watched]) -> None:
    first = serving(roles, "judge")
    new = roles.house.make("judge", Script(verdict=prefers("beta")))
    page = logged_in(roles, tab())
    page.get_by_role("link", name="judge", exact=True).click()
    page.get_by_label("Adapter directory").fill(str(new))
    page.get_by_text("Through a gate").click()
    page.get_by_label("Shadow: live requests").fill("500")
    page.get_by_label("Limits").fill("max_failures=0.5")
    page.get_by_role("button", name="Swap").click()
    page.get_by_role("heading", name="Gate").wait_for()
    assert "max_failures 0.5" in page.locator("#now").inner_text()
    headers = {"authorization": f"Bearer {ADMIN}"}
    body = {"model": "fusion/best-of", "messages": [{"role": "user", "content": "why?"}]}
    seen = page.locator("#now tr", has_text="requests").first.locator("td").nth(2)
    for _ in range(60):
        asked = httpx.post(
            f"{roles.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {roles.secret}"}
        )
        assert asked.status_code == 200, asked.text
        if seen.inner_text() not in ("0", ""):
            break
        page.wait_for_timeout(500)
    assert int(seen.inner_text()) >= 1, "it follows by itself"
    page.get_by_role("button", name="Stop the gate").click()
    page.get_by_text("it was stopped; the old revision serves on").first.wait_for()
    assert serving(roles, "judge") == first
    assert httpx.delete(f"{roles.url}/admin/roles/judge/gate", headers=headers).json()["gate"]["state"] == "stopped"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"directory": "/nothing/there"}, "/nothing/there"),
        ({"directory": ""}, "name the adapter directory"),
        ({"directory": "/x", "canary": "many"}, "no share of requests"),
        ({"directory": "/x", "canary": "10%", "for": "soon"}, "no length of time"),
        ({"directory": "/x", "canary": "10%"}, "say how long the canary lasts"),
        ({"directory": "/x", "shadow": "-3"}, "must be a whole number"),
        ({"directory": "/x", "shadow": "3", "limits": "max_failures"}, "max_failures"),
        ({"directory": "/x", "limits": "max_failures=0.1"}, "limits go with shadow or canary"),
    ],
)
def test_what_the_command_refuses_the_page_refuses(roles: Roles, fields: dict[str, str], said: str) -> None:
    before = serving(roles)
    with httpx.Client(base_url=roles.url) as client:
        token = enter(client, ADMIN)
        answer = client.post("/ui/roles/domain/swap", data={"csrf": token, **fields})
        assert 400 <= answer.status_code < 500
        assert said in answer.text
        assert client.post("/ui/roles/domain/swap", data=fields).status_code == 403, "no token"
        assert client.get("/ui/roles/<script>").status_code == 404
    assert serving(roles) == before


def enter(client: httpx.Client, key: str) -> str:
    def token(path: str) -> str:
        return client.get(path).text.partition('name="csrf" content="')[2].partition('"')[0]

    assert client.post("/ui/login", data={"csrf": token("/ui/login"), "key": key}).status_code == 303
    return token("/ui/traces")


def test_an_api_key_neither_sees_nor_changes_roles(roles: Roles) -> None:
    before = serving(roles)
    with httpx.Client(base_url=roles.url) as client:
        token = enter(client, roles.secret)
        assert 'href="/ui/roles"' not in client.get("/ui/traces").text, "no link leads to a refusal"
        assert client.get("/ui/roles").status_code == 403
        assert client.get("/ui/roles/domain").status_code == 403
        for action in ("rollback", "pin", "unpin", "stop", "swap"):
            answer = client.post(f"/ui/roles/domain/{action}", data={"csrf": token, "directory": os.fspath("/x")})
            assert answer.status_code in (401, 403), action
    assert serving(roles) == before


@pytest.mark.parametrize("width", [360, 1600])
def test_it_fits(roles: Roles, tab: Callable[..., Watched], width: int) -> None:
    page = logged_in(roles, tab(viewport={"width": width, "height": 800}))
    page.goto(f"{roles.url}/ui/roles/domain")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_axe_finds_nothing_serious(roles: Roles, tab: Callable[..., Watched]) -> None:
    page = logged_in(roles, tab())
    assert serious(page, f"{roles.url}/ui/roles") + serious(page, f"{roles.url}/ui/roles/domain") == []
