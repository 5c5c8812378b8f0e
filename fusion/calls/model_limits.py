"""The limits of a model: calls at once, a bounded queue, a circuit breaker, and the wait before a retry.

Each model has one `Guard`, which all requests of a process share. The worker processes of a gateway share the state of
the breaker, and each has its part of the calls at once and of the queue. The loops for retries and hedging are in
`mixfuse.fusion.calls.upstream`.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable
from enum import IntEnum

from mixfuse.fusion.calls.board import Board
from mixfuse.fusion.calls.dialect import Dialect
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.config import Breaker, ModelConfig, Retry

# Failures that count against the endpoint's health. An endpoint that answers 429 or refuses a long prompt is healthy.
_UNWELL = frozenset({"timeout", "unreachable", "upstream_error"})

# Numbers of a model's row: failures in a row, whether the circuit has opened, and when; and a worker's own: whether it
# finds out if the model has recovered.
_FAILURES, _OPENED, _OPENED_AT = 0, 1, 2
_TRIES = 0


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
        clock: Returns seconds that never decrease, the same in all processes.
        board: Shares the breaker with other processes.

    Attributes:
        latency_s: How long its answers took of late, in seconds; None before the first.
    """

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        board: Board | None = None,
    ) -> None:
        self.name = name
        self.retry: Retry = model.retry
        self.hedge_after_s = None if model.hedge_after_ms is None else model.hedge_after_ms / 1000
        self.dialect = Dialect(model)
        self.latency_s: float | None = None
        self.under_way = 0
        self._breaker: Breaker | None = model.breaker
        self._board = board or Board()
        self._most = None if model.max_concurrency is None else self._board.part(model.max_concurrency)
        self._longest_queue = self._board.part(model.max_queue)
        self._queue: deque[asyncio.Future[None]] = deque()
        self._clock = clock
        self._state = self._board.row(f"model {name}")

    @property
    def queued(self) -> int:
        """The calls that wait for a place."""
        return sum(not place.done() for place in self._queue)

    @property
    def circuit(self) -> Circuit:
        """The state of the breaker."""
        if self._breaker is None or not self._state[_OPENED]:
            return Circuit.CLOSED
        return Circuit.HALF_OPEN if self._cooldown_left_s() <= 0 else Circuit.OPEN

    def admit(self) -> None:
        """Admits an attempt or refuses it at once; `report` must follow an attempt that was admitted.

        Raises:
            CallError: The circuit is open (`circuit_open`), or the queue is full (`queue_full`).
        """
        broken = self._breaker is not None and bool(self._state[_OPENED])
        if broken and (self._cooldown_left_s() > 0 or any(self._state.of_all(_TRIES))):
            raise self._circuit_open()
        if self._most is not None and self.under_way >= self._most and self.queued >= self._longest_queue:
            raise CallError(
                "queue_full",
                f"{self.name} has {self.under_way} calls under way and {self.queued} waiting; "
                f"its limits are {self._most} and {self._longest_queue}",
                retry_after_s=1.0,
            )
        if broken:
            with self._board.locked():
                first = not any(self._state.of_all(_TRIES))
                if first:
                    self._state.set_own(_TRIES, 1)  # this attempt finds out whether the model has recovered
            if not first:
                raise self._circuit_open()

    def _circuit_open(self) -> CallError:
        wait = max(self._cooldown_left_s(), 0.0)
        return CallError(
            "circuit_open",
            f"{self.name} failed {self._state[_FAILURES]:.0f} times in a row; calls to it resume in {wait:.1f} s",
            retry_after_s=wait,
        )

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

    def took(self, seconds: float) -> None:
        """Notes how long an answer took; `latency_s` is a moving average of the last ones."""
        self.latency_s = seconds if self.latency_s is None else 0.8 * self.latency_s + 0.2 * seconds

    def report(self, kind: str | None) -> None:
        """Tells the breaker how an attempt ended.

        Args:
            kind: The failure's kind; None for a success. Kinds that do not count against the endpoint's health change
                nothing.
        """
        state = self._state
        if kind not in _UNWELL and not (state[_FAILURES] or state[_OPENED]):
            return  # nothing to change
        with self._board.locked():
            state.set_own(_TRIES, 0)
            if kind in _UNWELL:
                state[_FAILURES] += 1
                if self._breaker is not None and state[_FAILURES] >= self._breaker.failures:
                    state[_OPENED], state[_OPENED_AT] = 1, self._clock()
            elif kind is None:
                state[_FAILURES] = state[_OPENED] = 0

    def wait_before_retry_s(self, failure: CallError, attempts: int) -> float | None:
        """Returns the seconds to wait after this many failed attempts; None if there is to be no further one."""
        if not failure.transient or attempts >= self.retry.attempts:
            return None
        longest = min(self.retry.backoff_ms * 2 ** (attempts - 1), self.retry.max_backoff_ms) / 1000
        # "Equal jitter": calls that failed together are not retried together, and none is retried at once.
        return max(random.uniform(longest / 2, longest), failure.retry_after_s or 0.0)  # noqa: S311

    def _cooldown_left_s(self) -> float:
        if self._breaker is None:
            return 0.0
        return self._state[_OPENED_AT] + self._breaker.cooldown_ms / 1000 - self._clock()
