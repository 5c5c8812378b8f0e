"""API keys: made, revoked, listed, and checked on each request; their limits are `mixfuse.fusion.http.key_limits`.

A key is `mf-` and 32 random bytes. Only its SHA-256 is stored: a slow hash (scrypt) protects secrets that can be
guessed, which 256 random bits cannot, and would cost every request tens of milliseconds. Keys and their usage are in
the trace database, so all gateways that share the database share the keys.
"""

import asyncio
import hashlib
import hmac
import logging
import os
import secrets
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime
from datetime import time as clock
from typing import Literal

from rich.console import Console
from rich.table import Table
from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from mixfuse.contracts.database import Database, opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.calls.board import Board
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import NOTHING, Budget, Spend
from mixfuse.fusion.http.key_limits import PERIODS, KeyBudget, Period, RateLimit, first_day
from mixfuse.fusion.store.traces import Spent

logger = logging.getLogger(__name__)

PREFIX = "mf-"
API_KEY = "MIXFUSE_API_KEY"
"""The environment variable of the API key that `mixfuse eval` sends."""
ADMIN_KEY = "MIXFUSE_ADMIN_KEY"
"""The environment variable of the admin key. It is no API key: it opens `/admin`, `/metrics` and all traces."""

_REFRESH_S = 2.0
# Figures that were read during a commit are read again, so often and after so long.
_TRIES = 8
_AGAIN_S = 0.03
_UNDER_WAY, _COMMITS = 0, 1
MOST = 2**53
"""The most that a limit of a key may be; a double and a database column still hold it exactly."""


class UnauthorizedError(MixfuseError):
    """A request came without a key, or with an unknown or revoked one."""

    def __init__(self, message: str = "send an API key of this gateway as a bearer token") -> None:
        super().__init__(message, kind="unauthorized")


@dataclass(frozen=True)
class ApiKey:
    """A key, without its secret.

    Attributes:
        id: The key's name in traces and metrics.
        name: The key's name for people.
        sha256: The SHA-256 of the secret, in hex.
        created_at: When it was made, in seconds since 1970.
        revoked_at: When it was revoked, likewise; None while it is valid.
        max_cost: Dollars it may spend in a period; None for no limit.
        max_tokens: Tokens it may use in a period; None for no limit.
        period: The period of these limits: a day or a month in UTC, or all time.
        per_minute: Requests a minute; None for no limit.
        expires_at: When it ends by itself, in seconds since 1970; None for never.
    """

    id: str
    name: str
    sha256: str
    created_at: float
    revoked_at: float | None
    max_cost: float | None
    max_tokens: int | None
    period: Period
    per_minute: int | None
    expires_at: float | None = None

    @property
    def valid(self) -> bool:
        """Whether it is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or time.time() < self.expires_at)


def unpriced_text(names: Sequence[str]) -> str:
    """Says which models have no price."""
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no `price`"


class KeyRing:
    """The keys of a running gateway, read from the database every few seconds.

    Args:
        database: The database of the keys.
        mode: Whether a request needs a key: "auto" if there is any key, a revoked one included.
        priced: Whether a model has a price; without one a budget in dollars limits nothing, which is logged.
        unpriced: The models without a price: what they do is free to a budget in dollars, which is logged.
        board: Shares budgets and rates with other processes.

    Attributes:
        unlimited: The names of the valid keys whose budget in dollars limits nothing.
    """

    def __init__(
        self,
        database: Database,
        mode: Literal["auto", "required", "off"],
        *,
        priced: bool = True,
        unpriced: Sequence[str] = (),
        board: Board | None = None,
    ) -> None:
        self._database, self._mode, self._priced = database, mode, priced
        self._unpriced = tuple(unpriced)
        self.unlimited: list[str] = []
        self._board = board or Board()
        # Each worker's own: whether it is committing spending, and how often it has.
        self._commits = self._board.row("commits")
        self._keys: dict[str, ApiKey] = {}
        self._budgets: dict[str, KeyBudget] = {}
        self._rates: dict[str, RateLimit] = {}
        self._refreshing: asyncio.Task[None] | None = None
        before = self._seen()
        keys, usage = database.run_now(read)
        self._take(keys)
        self._rebase(usage, before)

    @property
    def needed(self) -> bool:
        """Whether a request needs a key."""
        return self._mode == "required" or (self._mode == "auto" and bool(self._keys))

    def start(self) -> None:
        """Starts to follow changes of the keys and other gateways' spending."""
        if self._mode != "off":
            self._refreshing = asyncio.create_task(self._refresh())

    async def close(self) -> None:
        """Stops following."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait({self._refreshing})

    def identify(self, authorization: str | None) -> ApiKey | None:
        """Returns the key of a request's `Authorization` header; None if no key is needed.

        Raises:
            UnauthorizedError: A key is needed, and the header holds no valid one.
        """
        if not self.needed:
            return None
        scheme, _, secret = (authorization or "").partition(" ")
        # Looked up by its hash, so that the time it takes reveals nothing about the secret.
        key = self._keys.get(_sha256(secret.strip())) if scheme.lower() == "bearer" else None
        if key is None or key.revoked_at is not None:
            raise UnauthorizedError
        if not key.valid:
            raise UnauthorizedError("this API key has expired; ask for a new one")
        return key

    def admit(self, key: ApiKey) -> Budget:
        """Counts a request against a key's rate limit; returns the budget that the request draws on.

        Raises:
            CallError: Too many requests in the last minute (`rate_limited`), or the budget is spent (`budget`).
        """
        if key.per_minute is not None:
            rate = self._rates.get(key.id)
            if rate is None or rate.per_minute != key.per_minute:
                rate = self._rates[key.id] = RateLimit(key.per_minute, key.id, self._board)
            wait_s = rate.take()
            if wait_s > 0:
                raise CallError(
                    "rate_limited",
                    f"API key {key.name!r} may make {key.per_minute} requests a minute",
                    retry_after_s=wait_s,
                )
        budget = self._budget(key)
        if (budget.max_cost is not None and budget.used.cost >= budget.max_cost) or (
            budget.max_tokens is not None and budget.used.tokens >= budget.max_tokens
        ):
            raise CallError("budget", f"{budget.name}: {budget.describe()} taken")
        return budget

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Within the block spending is written to the database and `committed` is told of it.

        Meanwhile no process takes over the database's figures: they may hold that spending already, or not yet.
        """
        with self._board.locked():
            self._commits.set_own(_UNDER_WAY, 1)
        try:
            yield
        finally:
            with self._board.locked():
                self._commits.set_own(_COMMITS, self._commits.own(_COMMITS) + 1)
                self._commits.set_own(_UNDER_WAY, 0)

    def committed(self, spent: Spent) -> None:
        """Notes that the spending of a request with a key is in the database."""
        if spent.key_id in self._budgets:
            self._budgets[spent.key_id].committed(spent.spend, spent.day)

    def adopt(self, left_behind: Sequence[Spent]) -> None:
        """Takes the place of a killed process: counts the spending that it had not committed."""
        with self._board.locked():
            self._board.clear_own()
            for spent in left_behind:
                if spent.key_id in self._budgets:
                    self._budgets[spent.key_id].adopt(spent.spend, spent.day)

    def _budget(self, key: ApiKey) -> KeyBudget:
        budget = self._budgets.get(key.id)
        if budget is None or budget.since != first_day(key.period):
            budget = KeyBudget(
                key.id, key.name, key.period, max_cost=key.max_cost, max_tokens=key.max_tokens, board=self._board
            )
            self._budgets[key.id] = budget
        return budget

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_S)
            try:
                for _ in range(_TRIES):
                    before = self._seen()
                    keys, usage = await self._database.run(read)
                    self._take(keys)
                    if self._rebase(usage, before):
                        break
                    await asyncio.sleep(_AGAIN_S)
            except SQLAlchemyError:
                logger.warning("the API keys could not be read again; the last known ones are kept", exc_info=True)

    def _take(self, keys: Sequence[ApiKey]) -> None:
        self._keys = {key.sha256: key for key in keys}
        if self._mode == "off":
            return
        if self._priced and self._unpriced and any(key.max_cost is not None and key.valid for key in keys):
            logger.warning(
                "API keys have budgets in dollars, and %s: what has no price is free to them; "
                "name the prices in the config, or limit tokens (mixfuse keys add --tokens)",
                unpriced_text(self._unpriced),
            )
            self._unpriced = ()
        if not self._priced:
            known = set(self.unlimited)
            self.unlimited = [key.name for key in keys if key.max_cost is not None and key.revoked_at is None]
            for name in [name for name in self.unlimited if name not in known]:
                logger.warning(
                    "API key %r has a budget in dollars, and no model has a `price`: it limits nothing; "
                    "name the prices in the config, or limit tokens (mixfuse keys add --tokens)",
                    name,
                )

    def _seen(self) -> tuple[list[float], list[float]]:
        """Returns which workers are committing, and how often each has."""
        return self._commits.of_all(_UNDER_WAY), self._commits.of_all(_COMMITS)

    def _rebase(self, usage: dict[str, dict[Period, Spend]], before: tuple[list[float], list[float]]) -> bool:
        """Takes over the database's figures, unless a worker was committing while they were read; returns whether."""
        budgets = [(self._budget(key), key) for key in self._keys.values() if key.revoked_at is None]
        with self._board.locked():
            if any(before[0]) or before != self._seen():
                return False
            for budget, key in budgets:
                budget.rebase(usage.get(key.id, {}).get(key.period, NOTHING))
        return True


def is_admin(authorization: str | None) -> bool:
    """Whether an `Authorization` header carries the admin key; without an admin key every header does."""
    key = os.environ.get(ADMIN_KEY)
    sent = (authorization or "").removeprefix("Bearer ")
    return not key or hmac.compare_digest(key.encode(), sent.encode())


def create(
    database: Database,
    name: str,
    *,
    max_cost: float | None = None,
    max_tokens: int | None = None,
    period: Period = "month",
    per_minute: int | None = None,
    last_day: date | None = None,
) -> tuple[ApiKey, str]:
    """Adds a key.

    Returns:
        The key and its secret. The secret is stored nowhere.

    Raises:
        MixfuseError: The name is taken or empty, a limit is not a positive number, or the last day (UTC) is over.
    """
    if not name.strip():
        raise MixfuseError("a key needs a name")
    if not name.isprintable():
        raise MixfuseError(f"the name of a key has characters that cannot be printed: {name!r}")
    for what, limit in (("budget", max_cost), ("token budget", max_tokens), ("rate", per_minute)):
        if limit is not None and not 0 < limit <= MOST:  # NaN compares false
            raise MixfuseError(f"the {what} of a key must be more than 0 and at most {MOST}, not {limit}")
    if last_day is not None and last_day < datetime.now(UTC).date():
        raise MixfuseError(f"the key would have expired already: {last_day} is over (UTC)")
    end = None if last_day is None else datetime.combine(last_day, clock.max, UTC).timestamp()
    secret = PREFIX + secrets.token_urlsafe(32)
    key = ApiKey(
        id=f"key-{uuid.uuid4().hex[:12]}",
        name=name,
        sha256=_sha256(secret),
        created_at=time.time(),
        revoked_at=None,
        max_cost=max_cost,
        max_tokens=max_tokens,
        period=period,
        per_minute=per_minute,
        expires_at=end,
    )

    def insert(connection: Connection) -> None:
        if any(known.name == name and known.valid for known in read(connection)[0]):
            raise MixfuseError(f"there is a key called {name!r} already; revoke it first, or choose another name")
        names = [column.name for column in fields(ApiKey)]
        columns, values = ", ".join(names), ", ".join(f":{name}" for name in names)
        connection.execute(text(f"INSERT INTO api_keys ({columns}) VALUES ({values})"), vars(key))  # noqa: S608

    database.run_now(insert)
    return key, secret


def has_keys(where: str) -> bool:
    """Whether a key was ever added to the database at this path or URL."""
    with opened(where) as database:
        return bool(database.run_now(read)[0])


def revoke(database: Database, name: str) -> ApiKey:
    """Revokes a key, given by its name or its id.

    Raises:
        MixfuseError: There is no valid key of that name or id.
    """

    def end(connection: Connection) -> ApiKey:
        keys, _ = read(connection)
        key = next((key for key in keys if name in (key.name, key.id) and key.valid), None)
        if key is None:
            raise MixfuseError(f"there is no valid key {name!r}; `mixfuse keys list` shows them")
        connection.execute(
            text("UPDATE api_keys SET revoked_at = :now WHERE id = :id"), {"now": time.time(), "id": key.id}
        )
        return key

    return database.run_now(end)


def show(database: Database) -> None:
    """Prints the keys, their limits and their usage in the current period."""
    keys, usage = database.run_now(read)
    table = Table("name", "id", "made", "budget", "used", "a minute", "")
    for key in keys:
        used = usage.get(key.id, {}).get(key.period, NOTHING)
        limits = [f"${key.max_cost:g}"] if key.max_cost is not None else []
        limits += [f"{key.max_tokens} tokens"] if key.max_tokens is not None else []
        table.add_row(
            key.name,
            key.id,
            datetime.fromtimestamp(key.created_at, UTC).date().isoformat(),
            f"{' and '.join(limits)} a {key.period}" if limits else "-",
            f"${used.cost:.6g}, {used.tokens} tokens",
            str(key.per_minute or "-"),
            _state(key),
        )
    Console(markup=False, emoji=False).print(table)


def _state(key: ApiKey) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.expires_at is None:
        return ""
    return f"{'until' if key.valid else 'expired'} {datetime.fromtimestamp(key.expires_at, UTC).date()}"


def read(connection: Connection) -> tuple[list[ApiKey], dict[str, dict[Period, Spend]]]:
    """Returns all keys, oldest first, and each one's usage by period."""
    names = [column.name for column in fields(ApiKey)]
    rows = connection.execute(text(f"SELECT {', '.join(names)} FROM api_keys ORDER BY created_at"))  # noqa: S608
    keys = [ApiKey(**row) for row in rows.mappings()]
    usage: dict[str, dict[Period, Spend]] = {key.id: {} for key in keys}
    if not keys:
        return [], {}
    query = text("SELECT key_id, SUM(cost), SUM(tokens) FROM key_usage WHERE day >= :since GROUP BY key_id")
    for period in PERIODS:
        for key_id, cost, tokens in connection.execute(query, {"since": first_day(period)}):
            usage.setdefault(key_id, {})[period] = Spend(float(cost), int(tokens))
    return keys, usage


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
