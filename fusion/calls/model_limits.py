"""What stands between a call and a model: places under way, a queue with an end, a circuit breaker.

One `Guard` a model, shared by all requests of a gateway. Everything happens on the event loop, so nothing is locked.
The loops for retries and hedging that use it are in `mixfuse.fusion.calls.upstream`.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from enum import IntEnum

from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.config import Breaker, ModelConfig, Retry

# Failures that say the endpoint is unwell. One that says 429 or that a prompt is too long is in good health.
_UNWELL = frozenset({"timeout", "unreachable", "upstream_error"})


class Circuit(IntEnum):
    """The state of a circuit breaker, as the metric shows it."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Guard:
    """The limits of one model.

    Args:
        name: The member's name, or "judge" or "synthesizer".
        model: Whose limits to keep.
        clock: Seconds, rising; for tests.
    """

    def __init__(self, name: str, model: ModelConfig, *, clock: Callable[[], float] | None = None) -> None:
        self.name = name
        self.retry: Retry = model.retry
        self.hedge_after_s = None if model.hedge_after_ms is None else model.hedge_after_ms / 1000
        self.under_way = 0
        self._breaker: Breaker | None = model.breaker
        self._most, self._longest_queue = model.max_concurrency, model.max_queue
        self._queue: deque[asyncio.Future[None]] = deque()
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._failures = 0
        self._opened_at: float | None = None
        self._trying = False

    @property
    def queued(self) -> int:
        """Calls that wait for a place."""
        return sum(not place.done() for place in self._queue)

    @property
    def circuit(self) -> Circuit:
        """The state of the breaker."""
        if self._breaker is None or self._opened_at is None:
            return Circuit.CLOSED
        return Circuit.HALF_OPEN if self._cooldown_left_s() <= 0 else Circuit.OPEN

    def admit(self) -> None:
        """Lets an attempt through, or refuses it at once; `report` must follow where it was let through.

        Raises:
            CallError: `circuit_open`: the model has failed too often lately; or `queue_full`.
        """
        if self._breaker is not None and self._opened_at is not None:
            left = self._cooldown_left_s()
            if left > 0 or self._trying:
                wait = max(left, 0.0)
                raise CallError(
                    "circuit_open",
                    f"{self.name} failed {self._failures} times in a row and is left alone for {wait:.1f} s more",
                    retry_after_s=wait,
                )
        if self._most is not None and self.under_way >= self._most and self.queued >= self._longest_queue:
            raise CallError(
                "queue_full",
                f"{self.name} has {self.under_way} calls under way and {self.queued} waiting; "
                f"its limits are {self._most} and {self._longest_queue}",
                retry_after_s=1.0,
            )
        if self._opened_at is not None:
            self._trying = True  # the one that finds out whether it is well again

    def enter(self) -> bool:
        """Takes a place if one is free; `leave` gives it back. Otherwise one is to be waited for."""
        if self._most is not None and self.under_way >= self._most:
            return False
        self.under_way += 1
        return True

    async def wait(self) -> None:
        """Waits for a place, in order of arrival, and takes it."""
        place = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        try:
            await place  # the one who leaves hands its place on
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.leave()  # it came in the same moment
            raise

    def leave(self) -> None:
        """Gives a place back, to the first in the queue if there is one."""
        while self._queue:
            place = self._queue.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.under_way -= 1

    def report(self, kind: str | None) -> None:
        """Tells the breaker how an attempt ended: the failure's kind, or None for a success.

        Failures that say nothing of the endpoint's health change nothing.
        """
        self._trying = False
        if kind in _UNWELL:
            self._failures += 1
            if self._breaker is not None and self._failures >= self._breaker.failures:
                self._opened_at = self._clock()
        elif kind is None:
            self._failures, self._opened_at = 0, None

    def wait_before_retry_s(self, failure: CallError, attempts: int) -> float | None:
        """How long to wait after `attempts` attempts that failed, the last so; None where it is not to be repeated."""
        if not failure.transient or attempts >= self.retry.attempts:
            return None
        longest = min(self.retry.backoff_ms * 2 ** (attempts - 1), self.retry.max_backoff_ms) / 1000
        # "Equal jitter": callers that failed together do not come back together, and nobody comes back at once.
        return max(random.uniform(longest / 2, longest), failure.retry_after_s or 0.0)  # noqa: S311

    def _cooldown_left_s(self) -> float:
        if self._breaker is None or self._opened_at is None:
            return 0.0
        return self._opened_at + self._breaker.cooldown_ms / 1000 - self._clock()
