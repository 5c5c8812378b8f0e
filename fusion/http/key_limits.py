"""The limits of an API key: its rate (requests a minute) and its budget (dollars and tokens a period)."""

import time
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from mixfuse.fusion.calls.ledger import NOTHING, Budget, Spend

Period = Literal["day", "month", "total"]
PERIODS: tuple[Period, ...] = get_args(Period)


class RateLimit:
    """A token bucket of one minute: a whole minute's requests may come at once, later ones at the rate.

    Args:
        per_minute: Requests a minute.
    """

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._left, self._at = float(per_minute), time.monotonic()

    def take(self) -> float:
        """Counts a request; returns 0, or the seconds until one is allowed again."""
        now = time.monotonic()
        self._left = min(float(self.per_minute), self._left + (now - self._at) * self.per_minute / 60)
        self._at = now
        if self._left < 1:
            return (1 - self._left) * 60 / self.per_minute
        self._left -= 1
        return 0.0


class KeyBudget(Budget):
    """What a key may spend in one period; what other gateways spent of it is added at each refresh.

    Args:
        key_name: The key's name.
        period: The period.
        max_cost: Dollars; None for no limit.
        max_tokens: Prompt and completion tokens; None for no limit.

    Attributes:
        since: The first day of the period.
        local: What this gateway has added and the database has not got yet.
    """

    def __init__(self, key_name: str, period: Period, *, max_cost: float | None, max_tokens: int | None) -> None:
        super().__init__(f"API key {key_name!r}, {period}", max_cost=max_cost, max_tokens=max_tokens)
        self.since, self.local = first_day(period), NOTHING

    def add(self, spend: Spend) -> None:
        """Counts a reservation, or the difference between it and what was spent."""
        super().add(spend)
        self.local = self.local.plus(spend)

    def committed(self, spend: Spend) -> None:
        """Notes that this much of `local` is in the database."""
        self.local = self.local.minus(spend)

    def rebase(self, stored: Spend) -> None:
        """Takes over the database's figure."""
        self.used = stored.plus(self.local)


def first_day(period: Period) -> str:
    """Returns the first day of the current period, in UTC."""
    today = datetime.now(UTC).date()
    first: Any = {"day": today, "month": today.replace(day=1)}.get(period)
    return first.isoformat() if first else "0000-00-00"
