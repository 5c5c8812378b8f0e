"""Bodies of requests: read as JSON, within the limits of the gateway's config."""

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, Request

from mixfuse.contracts import bounded_json
from mixfuse.fusion.config import Limits
from mixfuse.fusion.http.statuses import RequestError

LARGE = 256 << 10
"""Bytes; a larger body is parsed in a thread."""


async def read_json(request: Request) -> Any:
    """Returns the JSON value in a request's body; an app that is no gateway has the default limits.

    Raises:
        RequestError: It is encoded (415), longer than `limits.body_bytes` (413), takes longer than
            `limits.body_timeout_s` (408), or is not JSON or too deep (400).
    """
    content = await read_body(request)
    try:
        return (
            await asyncio.to_thread(bounded_json.loads, content)
            if len(content) > LARGE
            else bounded_json.loads(content)
        )
    except bounded_json.TooDeepError as error:
        raise RequestError(f"the request body is {error}", code="too_deep") from None
    except ValueError:
        raise RequestError("the request body is not valid JSON", code="invalid_json") from None


async def read_body(request: Request) -> bytearray:
    """Returns the bytes of a request's body; limits and errors as for `read_json`."""
    connections = getattr(request.app.state, "connections", None)
    limits = Limits() if connections is None else connections.limits
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        # A few bytes of gzip can stand for gigabytes.
        raise RequestError(
            f"content-encoding {encoding!r} is not supported here; send the body as it is",
            code="unsupported_encoding",
            status=415,
        )
    content = bytearray()
    declared = request.headers.get("content-length", "0")
    try:
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > limits.body_bytes:
            raise _too_long(limits)
        async with asyncio.timeout(limits.body_timeout_s):
            async for part in request.stream():
                content += part
                if len(content) > limits.body_bytes:
                    raise _too_long(limits)
    except TimeoutError:
        raise RequestError(
            f"the request body took more than {limits.body_timeout_s:g} s", code="body_timeout_s", status=408
        ) from None
    except ClientDisconnect:
        raise RequestError("the client went away before the end of its request", code="client_left") from None
    return content


def _too_long(limits: Limits) -> RequestError:
    return RequestError(
        f"the request body is longer than {limits.body_bytes} bytes (limits.body_bytes)", code="body_bytes", status=413
    )
