"""Every way a call or a request can fail, by name; docs/failures.md says what a client gets of each."""

from typing import Literal, get_args

from mixfuse.contracts.errors import MixfuseError

FailureKind = Literal[
    "timeout",  # the call's own limit or the members' deadline
    "rate_limited",  # the endpoint said 429
    "upstream_error",  # another status than 200, or the connection broke
    "unreachable",  # no connection, or the role is not being served
    "invalid_response",  # 200, but no chat completion
    "refused",  # the model or its content filter declined
    "context_length",  # the prompt is too long for it
    "queue_full",  # too many calls wait for this model already
    "circuit_open",  # it failed so often that it is left alone for a while
    "budget",  # the request's or the key's budget does not allow it
    "cancelled_straggler",  # enough others had answered
    "cancelled_hedge",  # another attempt at the same call answered first
    "cancelled",  # the client went away
]
KINDS: tuple[FailureKind, ...] = get_args(FailureKind)


class CallError(MixfuseError):
    """One call gave no usable answer.

    Attributes:
        kind: One of `FailureKind`.
        transient: The same call may well succeed if it is made again.
        retry_after_s: Seconds after which the endpoint said it may be asked again.
    """

    def __init__(
        self, kind: FailureKind, message: str, *, transient: bool = False, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, kind=kind)
        self.transient, self.retry_after_s = transient, retry_after_s
