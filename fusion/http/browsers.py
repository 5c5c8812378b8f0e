"""Guards against web pages: who may reach a gateway from a browser, and how.

A page of any site can make its visitor's browser send requests to a gateway on the visitor's machine or network. Where
no key is asked for, nothing else protects it:

- **DNS rebinding.** A page's own name is made to resolve to the gateway's address, so that its scripts read the
  answers. The `Host` header then has that name. Only loopback names, IP addresses (which cannot be rebound) and the
  config's `allowed_hosts` are served.
- **Cross-site requests.** A browser sends `Origin` with them. It must be the gateway's own or one of `cors_origins`.
- **Simple requests.** A form or a script can send `text/plain` anywhere without being asked first. A body must be
  `application/json`, with a key too. Only a program, which sends no `Origin`, may leave the type out. Forms of the page
  at `/ui` are let through: each carries a token of its session.
"""

import ipaddress
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mixfuse.fusion.http.completion import JsonResponse
from mixfuse.fusion.http.statuses import RequestError, error_body

OPEN_PATHS = ("/healthz", "/readyz")
"""They tell nothing that a page could use, and load balancers ask for them under any name."""


class BrowserGuard:
    """Refuses requests that only a foreign web page would send; an ASGI middleware.

    Args:
        app: Answers the others.
        allowed_hosts: The config's.
        cors_origins: The config's.
        protected: Whether a request to this path needs a key; such a request proves by its key where it comes from.
    """

    def __init__(
        self, app: ASGIApp, allowed_hosts: Sequence[str], cors_origins: Sequence[str], protected: Callable[[str], bool]
    ) -> None:
        self._app, self._protected = app, protected
        self._hosts = {host.lower().rstrip(".") for host in allowed_hosts}
        self._origins = {origin.lower().rstrip("/") for origin in cors_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request; called by the server."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await JsonResponse(error_body(refusal), refusal.status)(scope, receive, send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        headers, path = Headers(scope=scope), scope["path"]
        if path not in OPEN_PATHS and not self._protected(path):
            host = headers.get("host", "")
            if not self._host_allowed(host):
                return RequestError(
                    f"host {host[:100]!r} is not served here; add it to `allowed_hosts` in the config",
                    code="host_not_allowed",
                    status=403,
                )
            origin = headers.get("origin")
            if origin is not None and not self._origin_allowed(origin, host):
                return RequestError(
                    f"pages of {origin[:100]!r} may not call this gateway; add it to `cors_origins` in the config",
                    code="origin_not_allowed",
                    status=403,
                )
        typed = scope["method"] in ("POST", "PUT", "PATCH") and _has_body(headers) and not path.startswith("/ui/")
        if typed and not _is_json(headers):
            return RequestError(
                f"the body must be application/json, not {headers.get('content-type', 'without a type')[:100]!r}",
                code="unsupported_media_type",
                status=415,
            )
        return None

    def _host_allowed(self, host: str) -> bool:
        if "*" in self._hosts:
            return True
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name == "localhost" or name.endswith(".localhost") or name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _origin_allowed(self, origin: str, host: str) -> bool:
        # The scheme is not compared: behind a proxy that ends TLS the gateway does not know it.
        own = origin.lower().partition("://")[2] == host.lower()
        return own or "*" in self._origins or origin.lower() in self._origins


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0").strip() != "0"


def _is_json(headers: Headers) -> bool:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if not kind:
        return "origin" not in headers and "sec-fetch-site" not in headers
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
