"""The limits of an API key: its rate (requests a minute) and its budget (dollars and tokens a period)."""

import time
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from mixfuse.fusion.calls.board import Board
from mixfuse.fusion.calls.ledger import NOTHING, Budget, Spend

Period = Literal["day", "month", "total"]
PERIODS: tuple[Period, ...] = get_args(Period)

# Numbers of a bucket's row, and of a budget's: those of all, and each worker's own.
_RATE, _LEFT, _AT = 0, 1, 2
_SINCE, _STORED_COST, _STORED_TOKENS = 0, 1, 2
_COST, _TOKENS = 0, 1


class RateLimit:
    """A token bucket of one minute: a whole minute's requests may come at once, later ones at the rate.

    Args:
        per_minute: Requests a minute.
        key_id: The key's id.
        board: Shares the bucket with other processes.
    """

    def __init__(self, per_minute: int, key_id: str, board: Board) -> None:
        self.per_minute = per_minute
        self._board = board
        self._row = board.row(f"rate {key_id}")

    def take(self) -> float:
        """Counts a request; returns 0, or the seconds until one is allowed again."""
        row = self._row
        with self._board.locked():
            now = time.monotonic()
            if row[_RATE] != self.per_minute:  # a new bucket, or another rate
                row[_RATE], row[_LEFT], row[_AT] = self.per_minute, self.per_minute, now
            left = min(float(self.per_minute), row[_LEFT] + (now - row[_AT]) * self.per_minute / 60)
            row[_LEFT], row[_AT] = (left - 1 if left >= 1 else left), now
        return 0.0 if left >= 1 else (1 - left) * 60 / self.per_minute


class KeyBudget(Budget):
    """What a key may spend in one period, over all worker processes and gateways.

    `used` is what the database says and what each worker has added that is not in that figure yet. A worker that is
    killed leaves its part behind, until the one in its place has read the spool.

    Args:
        key_id: The key's id.
        key_name: The key's name.
        period: The period.
        max_cost: Dollars; None for no limit.
        max_tokens: Prompt and completion tokens; None for no limit.
        board: Shares the budget with other processes.

    Attributes:
        since: The first day of the period.
    """

    def __init__(
        self,
        key_id: str,
        key_name: str,
        period: Period,
        *,
        max_cost: float | None,
        max_tokens: int | None,
        board: Board,
    ) -> None:
        self.name, self.max_cost, self.max_tokens = f"API key {key_name!r}, {period}", max_cost, max_tokens
        self.since = first_day(period)
        self._board, self._row = board, board.row(f"budget {key_id}")
        self._day = float(self.since.replace("-", ""))
        with board.locked():
            if self._row[_SINCE] < self._day:
                self._row.clear()
                self._row[_SINCE] = self._day

    @property
    def used(self) -> Spend:
        """What has been spent or reserved in this period."""
        row = self._row
        return Spend(row[_STORED_COST] + sum(row.of_all(_COST)), round(row[_STORED_TOKENS] + sum(row.of_all(_TOKENS))))

    def add(self, spend: Spend) -> None:
        """Counts a reservation, or the difference between it and what was spent."""
        with self._board.locked():
            self._add(spend)

    def take(self, more: Spend) -> bool:
        """Reserves this much if it may be spent; returns whether it did."""
        with self._board.locked():
            if not self.allows(more):
                return False
            self._add(more)
        return True

    def committed(self, spend: Spend, day: str) -> None:
        """Notes that this much of what was added is in the database, on that day."""
        if day < self.since:
            return
        with self._board.locked():
            self._add(NOTHING.minus(spend))
            self._row[_STORED_COST] += spend.cost
            self._row[_STORED_TOKENS] += spend.tokens

    def rebase(self, stored: Spend) -> None:
        """Takes over the database's figure; called while the board is locked and no commit is under way."""
        if self._row[_SINCE] == self._day:
            self._row[_STORED_COST], self._row[_STORED_TOKENS] = stored

    def adopt(self, spend: Spend, day: str) -> None:
        """Counts what a killed process spent and the database has not got yet; called while the board is locked."""
        if day >= self.since:
            self._add(spend)

    def _add(self, spend: Spend) -> None:
        if self._row[_SINCE] == self._day:  # else the next period has begun
            self._row.set_own(_COST, self._row.own(_COST) + spend.cost)
            self._row.set_own(_TOKENS, self._row.own(_TOKENS) + spend.tokens)


def first_day(period: Period) -> str:
    """Returns the first day of the current period, in UTC."""
    today = datetime.now(UTC).date()
    first: Any = {"day": today, "month": today.replace(day=1)}.get(period)
    return first.isoformat() if first else "0000-00-00"
