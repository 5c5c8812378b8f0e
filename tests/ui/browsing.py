"""What the tests of the page share: a gateway with its page over the fake upstream, and a real Chromium."""

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_upstream import FakeUpstream, Script, fake_upstream, serving
from fusion_harness import config_keys
from playwright.sync_api import Browser, Page, sync_playwright

from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.http.gateway import create_app
from mixfuse.fusion.ui.mount import ui

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Served:
    """A running gateway with its page.

    Attributes:
        url: Its address.
        upstream: The fake upstream behind it.
        folder: Holds its database, `traces.sqlite3`.
    """

    def __init__(self, url: str, upstream: FakeUpstream, folder: Path, loop: asyncio.AbstractEventLoop) -> None:
        self.url, self.upstream, self.folder, self._loop = url, upstream, folder, loop

    def soon(self, call: Callable[[], None]) -> None:
        """Calls something on the event loop of the upstream and the gateway, such as an event's `set`."""
        self._loop.call_soon_threadsafe(call)


@contextmanager
def served(
    folder: Path, models: Mapping[str, Script], *, packages: tuple[str, ...] = (), **keys: Any
) -> Iterator[Served]:
    """Runs a gateway with its page in a thread; keywords are keys of its config."""
    started: Future[tuple[str, FakeUpstream, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def run() -> None:
        try:
            async with fake_upstream(**models) as upstream:
                config = FusionConfig.model_validate(config_keys(upstream, folder, **keys))
                async with serving(create_app(config, None, ui=ui(*packages))) as url:
                    end = asyncio.Event()
                    started.set_result((url, upstream, asyncio.get_running_loop(), end))
                    await end.wait()
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        url, upstream, loop, end = started.result(60)
        yield Served(url, upstream, folder, loop)
    finally:
        if started.done() and not started.exception():
            loop.call_soon_threadsafe(end.set)
        thread.join(60)


def refusal(served: Served, path: str) -> str:
    """The text of a page that is refused with 400."""
    refused = httpx.get(f"{served.url}/ui/{path}")
    assert refused.status_code == 400
    return refused.text.replace("&#39;", "'")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium of the distribution; the test is skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("no chromium is installed: apt install chromium (scripts/test does it)")
    with sync_playwright() as playwright:
        # Containers give no user namespaces to its sandbox; it loads nothing but our own page.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A browser's tab that must not complain: errors of scripts, refusals by the content security policy, dialogs.

    Attributes:
        page: The tab.
        complaints: What it said.
    """

    def __init__(self, browser: Browser, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.set_default_timeout(30_000)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
