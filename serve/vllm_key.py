"""A middleware for vLLM's API server: every route needs the API key.

vLLM's own check covers `/v1` and three other prefixes (vllm/entrypoints/serve/middleware/authenticate.py).
`POST /adapters`, `DELETE /adapters/NAME`, `/invocations`, `/tokenize` and `/metrics` answer whoever reaches the port,
and all containers of a pod share loopback. vLLM imports this module by name (`--middleware`), in its own process.
"""

import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

KEY = "VLLM_API_KEY"
KEY_FILE = "MIXFUSE_ENGINE_KEY_FILE"
"""The variable that names a file with the key. Its name begins with no prefix that vLLM copies to Ray's workers."""
_OPEN = ("/health",)  # says whether the server runs, and nothing else; orchestrators ask it
_REFUSAL = b'{"error": {"message": "send the API key as a bearer token", "type": "Unauthorized", "code": 401}}'


class EveryRouteNeedsTheKey:
    """The middleware, with the key in the file that `MIXFUSE_ENGINE_KEY_FILE` names, else of `VLLM_API_KEY`.

    Raises:
        RuntimeError: There is no key, or its file cannot be read.
    """

    def __init__(self, app: App) -> None:
        self._app, self._expected = app, _digest(_key())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on if it carries the key, or needs none."""
        kind = scope["type"]
        if kind not in ("http", "websocket") or (kind == "http" and scope["path"] in _OPEN) or self._has_key(scope):
            await self._app(scope, receive, send)
        elif kind == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_REFUSAL)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSAL})

    def _has_key(self, scope: Scope) -> bool:
        sent = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        scheme, _, key = (sent[0] if sent else b"").decode("latin-1").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(_digest(key.strip()), self._expected)


def _key() -> str:
    file = os.environ.get(KEY_FILE)
    try:
        key = Path(file).read_text(encoding="utf-8").strip() if file else os.environ.get(KEY)
    except OSError as error:
        raise RuntimeError(f"{KEY_FILE}={file} cannot be read: {error.strerror}") from None
    if not key:
        raise RuntimeError(f"neither {KEY_FILE} nor {KEY} gives a key, and every route of this server needs one")
    return key


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
