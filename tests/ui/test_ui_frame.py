"""The frame of the page: login, sessions, forgery, headers, what it costs unused; in Chromium where it matters."""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browsing import Served, Watched, served
from fake_upstream import Script

from mixfuse.app.server import GatewayConfig, _ui
from mixfuse.contracts.database import opened
from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.http import keys

ADMIN = "an admin key"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A gateway with two API keys and an admin key."""
    folder = tmp_path_factory.mktemp("gateway")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(keys.ADMIN_KEY, ADMIN)
        with opened(folder / "traces.sqlite3") as database:
            secrets = [keys.create(database, name)[1] for name in ("ann", "bob")]
        with served(folder, {"alpha": Script("hello"), "judge": Script()}, members=["alpha"]) as running:
            running.ann, running.bob = secrets  # type: ignore[attr-defined]
            yield running


@pytest.fixture(scope="module")
def open_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A gateway that asks for no key."""
    with served(tmp_path_factory.mktemp("open"), {"alpha": Script("hello")}, members=["alpha"]) as running:
        yield running


def log_in(client: httpx.Client, key: str, **extra: str) -> httpx.Response:
    form = client.get("/ui/login").text
    token = re.search(r'name="csrf" value="(\w+)"', form)
    assert token
    return client.post("/ui/login", data={"csrf": token[1], "key": key, **extra})


def ask(url: str, question: str, key: str | None = None) -> str:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    body = {"model": "alpha", "messages": [{"role": "user", "content": question}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return str(answer.headers.get("x-trace-id", ""))


def test_a_key_becomes_a_session_and_shows_its_own_traces(gateway: Served, tab: Callable[..., Watched]) -> None:
    ask(gateway.url, "what ann asked", gateway.ann)  # type: ignore[attr-defined]
    page = tab().page
    page.goto(f"{gateway.url}/ui/traces?mode=")
    assert page.url.startswith(f"{gateway.url}/ui/login?next=")
    page.get_by_label("Key").fill(gateway.bob)  # type: ignore[attr-defined]
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: "/login" not in url)
    assert page.get_by_text("There are no traces").is_visible()
    (cookie,) = page.context.cookies(f"{gateway.url}/ui")
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/ui")
    assert gateway.bob not in str(page.context.cookies())  # type: ignore[attr-defined]
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url("**/ui/login")
    page.get_by_label("Key").fill(gateway.ann)  # type: ignore[attr-defined]
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: "/login" not in url)
    page.goto(f"{gateway.url}/ui/traces")
    assert page.locator("tbody tr").count() >= 1
    assert page.get_by_text("There are no traces").count() == 0


def test_a_wrong_key_says_so_and_makes_no_session(gateway: Served) -> None:
    with httpx.Client(base_url=gateway.url) as client:
        for wrong in ("mf-wrong", "", "é"):
            refused = log_in(client, wrong)
            assert refused.status_code == 401
            assert "that is no key of this gateway" in refused.text
        assert client.get("/ui/traces").status_code == 303


def test_the_admin_key_sees_all_and_a_changed_cookie_nothing(gateway: Served) -> None:
    ask(gateway.url, "another of ann", gateway.ann)  # type: ignore[attr-defined]
    with httpx.Client(base_url=gateway.url) as client:
        assert log_in(client, ADMIN).status_code == 303
        assert "There are no traces" not in client.get("/ui/traces").text
        assert "Log out (admin)" in client.get("/ui/traces").text
        (name,) = client.cookies
        value = client.cookies[name]
        for forged in (value[:-4] + "AAA=", "x", "é"):
            cookie = {b"cookie": f"{name}={forged}".encode()}
            assert httpx.get(f"{gateway.url}/ui/traces", headers=cookie).status_code == 303


def test_a_revoked_key_ends_its_sessions(gateway: Served) -> None:
    with opened(gateway.folder / "traces.sqlite3") as database:
        secret = keys.create(database, "eve")[1]
        with httpx.Client(base_url=gateway.url) as client:
            until(lambda: log_in(client, secret).status_code == 303)
            assert client.get("/ui/traces").status_code == 200
            keys.revoke(database, "eve")
            until(lambda: client.get("/ui/traces").status_code == 401)


def until(true: Callable[[], bool]) -> None:
    """Waits for what another thread does within seconds."""
    for _ in range(600):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("it never became so")


@pytest.mark.parametrize("sent", [{}, {"csrf": ""}, {"csrf": "0" * 64}, {"csrf": "é"}])
def test_a_form_without_its_token_is_refused(gateway: Served, sent: dict[str, str]) -> None:
    with httpx.Client(base_url=gateway.url) as client:
        log_in(client, ADMIN)
        refused = client.post("/ui/logout", data=sent)
        assert refused.status_code == 403
        assert client.get("/ui/traces").status_code == 200, "still logged in"


def test_the_token_of_another_session_is_refused(gateway: Served) -> None:
    with httpx.Client(base_url=gateway.url) as one, httpx.Client(base_url=gateway.url) as other:
        log_in(one, ADMIN)
        log_in(other, ADMIN)
        token = re.search(r'name="csrf" content="(\w+)"', one.get("/ui/traces").text)
        assert token
        assert other.post("/ui/logout", data={"csrf": token[1]}).status_code == 403
        assert one.post("/ui/logout", data={"csrf": token[1]}).status_code == 303


@pytest.mark.parametrize(
    "there", ["//evil.example/", "https://evil.example/", "/\\evil.example", "javascript:alert(1)"]
)
def test_a_login_leads_nowhere_else(gateway: Served, there: str) -> None:
    with httpx.Client(base_url=gateway.url) as client:
        assert log_in(client, ADMIN, next=there).headers["location"] == "/ui/"


@pytest.mark.parametrize("path", ["/ui/login", "/ui/traces", "/ui/nothing", "/ui/assets/x/ui.js", "/ui/"])
def test_every_response_has_the_policy(open_gateway: Served, path: str) -> None:
    headers = httpx.get(open_gateway.url + path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"


def test_without_keys_there_is_no_login_and_foreign_pages_are_refused(open_gateway: Served) -> None:
    assert httpx.get(f"{open_gateway.url}/ui/traces").status_code == 200
    rebound = httpx.get(f"{open_gateway.url}/ui/traces", headers={"host": "evil.example"})
    assert rebound.status_code == 403
    foreign = httpx.post(f"{open_gateway.url}/ui/logout", headers={"origin": "https://evil.example"})
    assert foreign.status_code == 403


def test_an_unknown_page_is_a_page(open_gateway: Served) -> None:
    missing = httpx.get(f"{open_gateway.url}/ui/nothing/<script>")
    assert missing.status_code == 404
    assert "<script>alert" not in missing.text
    assert "Traces" in missing.text
    assert httpx.post(f"{open_gateway.url}/ui/traces").status_code == 405


@pytest.mark.parametrize(
    ("host", "asked", "there"),
    [("127.0.0.1", None, True), ("127.0.0.1", False, False), ("0.0.0.0", None, False), ("0.0.0.0", True, True)],
)
def test_the_page_is_there_on_loopback_only_unless_asked_for(host: str, asked: bool | None, there: bool) -> None:
    member = {"name": "a", "base_url": "http://127.0.0.1:1/v1", "model": "a"}
    config = FusionConfig.model_validate({"members": [member], "ui": asked})
    assert (_ui(config, GatewayConfig(host=host)) is not None) == there


def test_an_unused_page_is_not_imported(tmp_path: Path) -> None:
    """What it would cost at start is jinja2 and the pages themselves."""
    code = (
        "import sys, mixfuse.app.server\n"
        "print([name for name in sys.modules if name.startswith(('jinja2', 'mixfuse.fusion.ui', 'mixfuse.app.pages'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['mixfuse.fusion.ui', 'mixfuse.fusion.ui.mount']"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_every_page_fits_its_width(open_gateway: Served, tab: Callable[..., Watched], width: int, scheme: Any) -> None:
    ask(open_gateway.url, "hello " * 30)
    page = tab(viewport={"width": width, "height": 800}, color_scheme=scheme).page
    page.goto(f"{open_gateway.url}/ui")
    links = page.locator("nav a").evaluate_all("links => links.map(link => link.href)")
    assert f"{open_gateway.url}/ui/traces" in links
    for name in links:
        page.goto(name)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        dark = page.evaluate("getComputedStyle(document.body.parentElement).backgroundColor") == "rgb(16, 21, 29)"
        assert dark == (scheme == "dark")


def test_reading_needs_no_script(open_gateway: Served, tab: Callable[..., Watched]) -> None:
    page = tab(java_script_enabled=False).page
    page.goto(f"{open_gateway.url}/ui/traces")
    assert page.get_by_role("heading", name="Traces").is_visible()
