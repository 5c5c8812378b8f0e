"""The limits of a model: calls at once, a bounded queue, a circuit breaker, and the wait before a retry.

Each model has one `Guard`, which all requests of a gateway share. Everything runs on the event loop, so nothing is
locked. The loops for retries and hedging are in `mixfuse.fusion.calls.upstream`.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from enum import IntEnum

from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.config import Breaker, ModelConfig, Retry

# Failures that count against the endpoint's health. An endpoint that answers 429 or refuses a long prompt is healthy.
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
        model: The model's config.
        clock: Returns seconds that never decrease; for tests.
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
        self._half_open_trial = False

    @property
    def queued(self) -> int:
        """The calls that wait for a place."""
        return sum(not place.done() for place in self._queue)

    @property
    def circuit(self) -> Circuit:
        """The state of the breaker."""
        if self._breaker is None or self._opened_at is None:
            return Circuit.CLOSED
        return Circuit.HALF_OPEN if self._cooldown_left_s() <= 0 else Circuit.OPEN

    def admit(self) -> None:
        """Admits an attempt or refuses it at once; `report` must follow an attempt that was admitted.

        Raises:
            CallError: The circuit is open (`circuit_open`), or the queue is full (`queue_full`).
        """
        if self._breaker is not None and self._opened_at is not None:
            left = self._cooldown_left_s()
            if left > 0 or self._half_open_trial:
                wait = max(left, 0.0)
                raise CallError(
                    "circuit_open",
                    f"{self.name} failed {self._failures} times in a row; calls to it resume in {wait:.1f} s",
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
            self._half_open_trial = True  # this attempt finds out whether the model has recovered

    def enter(self) -> bool:
        """Takes a place if one is free, and returns whether it did; `leave` gives the place back."""
        if self._most is not None and self.under_way >= self._most:
            return False
        self.under_way += 1
        return True

    async def wait(self) -> None:
        """Waits for a place in order of arrival and takes it."""
        place = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        try:
            await place  # `leave` hands its place on
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.leave()  # the place came at the same moment
            raise

    def leave(self) -> None:
        """Gives the place to the first call in the queue, or back."""
        while self._queue:
            place = self._queue.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.under_way -= 1

    def report(self, kind: str | None) -> None:
        """Tells the breaker how an attempt ended.

        Args:
            kind: The failure's kind; None for a success. Kinds that do not count against the endpoint's health change
                nothing.
        """
        self._half_open_trial = False
        if kind in _UNWELL:
            self._failures += 1
            if self._breaker is not None and self._failures >= self._breaker.failures:
                self._opened_at = self._clock()
        elif kind is None:
            self._failures, self._opened_at = 0, None

    def wait_before_retry_s(self, failure: CallError, attempts: int) -> float | None:
        """Returns the seconds to wait after this many failed attempts; None if there is to be no further one."""
        if not failure.transient or attempts >= self.retry.attempts:
            return None
        longest = min(self.retry.backoff_ms * 2 ** (attempts - 1), self.retry.max_backoff_ms) / 1000
        # "Equal jitter": calls that failed together are not retried together, and none is retried at once.
        return max(random.uniform(longest / 2, longest), failure.retry_after_s or 0.0)  # noqa: S311

    def _cooldown_left_s(self) -> float:
        if self._breaker is None or self._opened_at is None:
            return 0.0
        return self._opened_at + self._breaker.cooldown_ms / 1000 - self._clock()
