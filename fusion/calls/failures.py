"""The kinds of failure of a call; docs/failures.md says what the client gets on each.

The HTTP status of each kind is in `mixfuse.fusion.http.statuses`.
"""

from typing import Literal, get_args

from mixfuse.contracts.errors import MixfuseError

FailureKind = Literal[
    "timeout",  # the call's own time limit or the members' deadline
    "rate_limited",  # the endpoint said 429
    "upstream_error",  # a status other than 200, or the connection broke
    "unreachable",  # no connection, or the role is not being served
    "invalid_response",  # status 200, but no chat completion
    "bad_request",  # the endpoint said that the request is at fault
    "refused",  # the model or its content filter declined
    "context_length",  # the prompt is too long for it
    "queue_full",  # too many calls already wait for this model
    "circuit_open",  # it failed so often that no calls are made for a while
    "budget",  # the request's or the key's budget does not allow it
    "cancelled_straggler",  # enough others had answered
    "cancelled_hedge",  # another attempt at the same call answered first
    "cancelled",  # the client went away
]
KINDS: tuple[FailureKind, ...] = get_args(FailureKind)


class CallError(MixfuseError):
    """One call gave no usable answer.

    Attributes:
        kind: The kind of failure.
        transient: Whether the same call may succeed if it is made again.
        retry_after_s: The seconds that the endpoint asked to wait before the next call.
        code: The endpoint's own name for the failure.
    """

    def __init__(
        self,
        kind: FailureKind,
        message: str,
        *,
        transient: bool = False,
        retry_after_s: float | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, kind=kind)
        self.transient, self.retry_after_s, self.code = transient, retry_after_s, code
