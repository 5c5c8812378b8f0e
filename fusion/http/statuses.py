"""The HTTP status, headers and error object of every failure: of the gateway's API and of `/admin`."""

import math
from typing import Any

from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.answering.request import TooFewAnswersError

STATUS_OF_KIND: dict[str, int] = {
    "bad_request": 400,
    "context_length": 400,
    "invalid_request_error": 400,
    "refused": 400,
    "unauthorized": 401,
    "budget": 402,
    "role": 404,
    "conflict": 409,
    "trace_unreadable": 422,
    "low_confidence": 422,
    "queue_full": 429,
    "rate_limited": 429,
    "invalid_response": 502,
    "judge_failed": 502,
    "upstream_error": 502,
    "circuit_open": 503,
    "engine": 503,
    "too_few_answers": 503,
    "trace_db": 503,
    "unreachable": 503,
    "timeout": 504,
}
"""Failure kind (`MixfuseError.kind`) → HTTP status.

OpenAI's own clients repeat a request on 429 and 5xx. A spent budget is therefore 402, not OpenAI's 429: asking again
does not help.
"""

_OF_THE_REQUEST = frozenset({"bad_request", "context_length", "refused"})
_OVERLOADED = frozenset({"rate_limited", "queue_full"})


class RequestError(MixfuseError):
    """A request that the gateway refuses, in the terms of OpenAI's error object.

    Attributes:
        code: OpenAI's `code`.
        param: The parameter at fault.
        status: The HTTP status.
    """

    def __init__(self, message: str, *, code: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message, kind="invalid_request_error")
        self.code, self.param, self.status = code, param, status


def status_of(error: MixfuseError, *, otherwise: int = 500) -> int:
    """Returns the HTTP status of a failure.

    Args:
        error: The failure.
        otherwise: The status of a kind that `STATUS_OF_KIND` does not know. In the gateway that is a bug (500); in
            `/admin` it is input that the caller can correct (400).
    """
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, TooFewAnswersError) and all(failure.type in _OVERLOADED for failure in error.failures):
        return 429  # nothing is broken, there is too much to do
    if isinstance(error, TooFewAnswersError) and all(failure.type in _OF_THE_REQUEST for failure in error.failures):
        return 400  # it would fail again
    return STATUS_OF_KIND.get(error.kind, otherwise)


def without_names(error: MixfuseError) -> MixfuseError:
    """Returns a failure without the members' names and what they said, for a client to whom nothing is exposed."""
    if not isinstance(error, TooFewAnswersError):
        return error
    kind = {429: "rate_limited", 400: "bad_request"}.get(status_of(error), error.kind)
    return MixfuseError(error.summary, kind=kind)


def error_headers(error: MixfuseError) -> dict[str, str]:
    """Returns the headers of a failure: when to retry, in whole seconds, and how to authenticate (RFC 9110)."""
    if error.kind == "unauthorized":
        return {"www-authenticate": "Bearer"}
    seconds = getattr(error, "retry_after_s", None)
    return {} if seconds is None else {"retry-after": str(max(1, math.ceil(seconds)))}


def error_body(error: MixfuseError) -> dict[str, Any]:
    """Returns OpenAI's error object; if the quorum was not met, each member's failure is listed in it."""
    body: dict[str, Any] = {
        "message": str(error),
        "type": error.kind,
        "param": error.param if isinstance(error, RequestError) else None,
        "code": getattr(error, "code", None) or error.kind,
    }
    if isinstance(error, TooFewAnswersError):
        body["failed"] = [vars(failure) for failure in error.failures]
    return {"error": body}
