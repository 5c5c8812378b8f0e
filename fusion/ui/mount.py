"""Puts the page at `/ui` into the gateway. Nothing of it is imported before somebody opens it."""

import asyncio
from collections.abc import Callable, Sequence
from importlib import import_module

from starlette.types import ASGIApp, Receive, Scope, Send

from mixfuse.fusion.http.inside import Inside

PAGES = "mixfuse.fusion.ui.pages"
"""The package of this room's own pages."""


class LazyUi:
    """The page as an ASGI application, which is made at the first request.

    Args:
        inside: What the gateway lends.
        packages: The packages in which each module is a page.
    """

    def __init__(self, inside: Inside, packages: Sequence[str]) -> None:
        self._inside, self._packages = inside, packages
        self._made: ASGIApp | None = None
        self._making = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request; called by the server."""
        async with self._making:
            if self._made is None:
                make = await asyncio.to_thread(lambda: import_module(f"{__package__}.frame").make)
                self._made = await make(self._inside, self._packages)
        await self._made(scope, receive, send)


def ui(*packages: str) -> Callable[[Inside], ASGIApp]:
    """Returns what `create_app` takes as `ui`: this room's pages, and those of further packages."""
    return lambda inside: LazyUi(inside, [PAGES, *packages])
