"""API keys: who may ask, how often, and for how much.

A key is `mf-` and 32 random bytes. Only its SHA-256 is stored: a slow hash (scrypt) protects secrets that can be
guessed, which 256 random bits cannot, and would cost every request tens of milliseconds. Keys and what they used are
in the trace database, so all gateways that share it share them.
"""

import asyncio
import hashlib
import hmac
import logging
import os
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from rich.console import Console
from rich.table import Table
from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from mixfuse.contracts.database import Database, opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import NOTHING, Budget, Spend

logger = logging.getLogger(__name__)

Period = Literal["day", "month", "total"]
PERIODS: tuple[Period, ...] = get_args(Period)
PREFIX = "mf-"
API_KEY = "MIXFUSE_API_KEY"
"""The environment variable of the API key that `mixfuse eval` sends."""
ADMIN_KEY = "MIXFUSE_ADMIN_KEY"
"""The environment variable of the admin key. It is no API key: it opens `/admin`, `/metrics` and all traces."""

_REFRESH_S = 2.0


class UnauthorizedError(MixfuseError):
    """A request without a key, or with one that is unknown or revoked."""

    def __init__(self, message: str = "send an API key of this gateway as a bearer token") -> None:
        super().__init__(message, kind="unauthorized")


@dataclass(frozen=True)
class ApiKey:
    """A key, without its secret.

    Attributes:
        id: Names it in traces and metrics.
        name: Whose it is, for people.
        sha256: Of the secret, in hex.
        created_at: Seconds since 1970.
        revoked_at: Likewise; None while it is valid.
        max_cost: Dollars it may spend in a period; None for no limit.
        max_tokens: Tokens it may use in a period; None for no limit.
        period: What the limits are for: a day or a month in UTC, or all time.
        per_minute: Requests a minute; None for no limit.
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


class KeyBudget(Budget):
    """What a key may spend in one period; what other gateways spent of it arrives with each refresh.

    Attributes:
        since: The first day of the period.
        local: What this gateway has added and the database has not got yet.
    """

    def __init__(self, key: ApiKey, since: str) -> None:
        super().__init__(f"API key {key.name!r}, {key.period}", max_cost=key.max_cost, max_tokens=key.max_tokens)
        self.since, self.local = since, NOTHING

    def add(self, spend: Spend) -> None:
        """Counts a reservation, or what it turned out to be off by."""
        super().add(spend)
        self.local = self.local.plus(spend)

    def committed(self, spend: Spend) -> None:
        """Notes that so much of `local` is in the database."""
        self.local = self.local.minus(spend)

    def rebase(self, stored: Spend) -> None:
        """Takes over what the database says."""
        self.used = stored.plus(self.local)


class KeyRing:
    """The keys of a running gateway, read from the database again and again.

    Args:
        database: Where they are.
        mode: Whether a key is needed: "auto" if there are any, revoked ones too.
    """

    def __init__(self, database: Database, mode: Literal["auto", "required", "off"]) -> None:
        self._database, self._mode = database, mode
        self._keys: dict[str, ApiKey] = {}
        self._budgets: dict[str, KeyBudget] = {}
        self._buckets: dict[str, _Bucket] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self._take(*database.run_now(_read))

    @property
    def needed(self) -> bool:
        """Whether a request needs a key."""
        return self._mode == "required" or (self._mode == "auto" and bool(self._keys))

    def start(self) -> None:
        """Begins to follow changes of the keys, and what other gateways spend."""
        if self._mode != "off":
            self._refreshing = asyncio.create_task(self._refresh())

    async def close(self) -> None:
        """Ends following."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait({self._refreshing})

    def identify(self, authorization: str | None) -> ApiKey | None:
        """Returns the key of a request's `Authorization` header; None where none is needed.

        Raises:
            UnauthorizedError: A key is needed and this is none.
        """
        if not self.needed:
            return None
        scheme, _, secret = (authorization or "").partition(" ")
        # Looked up by its hash: how long that takes says nothing of the secret.
        key = self._keys.get(_sha256(secret.strip())) if scheme.lower() == "bearer" else None
        if key is None or key.revoked_at is not None:
            raise UnauthorizedError
        return key

    def admit(self, key: ApiKey) -> Budget:
        """Counts a request against a key's rate; returns the budget it draws on.

        Raises:
            CallError: Too many in the last minute (`rate_limited`), or nothing is left (`budget`).
        """
        if key.per_minute is not None:
            bucket = self._buckets.setdefault(key.id, _Bucket(key.per_minute))
            wait_s = bucket.take()
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

    def committed(self, key_id: str, spend: Spend) -> None:
        """Notes that the database has got what a request of this key spent."""
        if key_id in self._budgets:
            self._budgets[key_id].committed(spend)

    def _budget(self, key: ApiKey) -> KeyBudget:
        since = _since(key.period)
        budget = self._budgets.get(key.id)
        if budget is None or budget.since != since:
            budget = self._budgets[key.id] = KeyBudget(key, since)
        return budget

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_S)
            try:
                # In the order of the database's thread: what it has committed before has been noted by then.
                self._take(*await self._database.run(_read))
            except SQLAlchemyError:
                logger.warning("the API keys could not be read again; the last known ones are kept", exc_info=True)

    def _take(self, keys: Sequence[ApiKey], usage: dict[str, dict[Period, Spend]]) -> None:
        self._keys = {key.sha256: key for key in keys}
        for key in keys:
            if key.per_minute is None or (key.id in self._buckets and self._buckets[key.id].rate != key.per_minute):
                self._buckets.pop(key.id, None)
            self._budget(key).rebase(usage.get(key.id, {}).get(key.period, NOTHING))


class _Bucket:
    """A token bucket of one minute: the whole minute's requests may come at once, then they come at the rate."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._left, self._at = float(rate), time.monotonic()

    def take(self) -> float:
        """Takes one, or returns the seconds until there is one."""
        now = time.monotonic()
        self._left = min(float(self.rate), self._left + (now - self._at) * self.rate / 60)
        self._at = now
        if self._left < 1:
            return (1 - self._left) * 60 / self.rate
        self._left -= 1
        return 0.0


def is_admin(authorization: str | None) -> bool:
    """Whether an `Authorization` header carries the admin key; any does where none is set."""
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
) -> tuple[ApiKey, str]:
    """Adds a key.

    Returns:
        The key, and its secret, which is not to be had again.

    Raises:
        MixfuseError: The name is taken or empty, or a limit is not positive.
    """
    if not name.strip():
        raise MixfuseError("a key needs a name that says whose it is")
    for what, limit in (("budget", max_cost), ("token budget", max_tokens), ("rate", per_minute)):
        if limit is not None and limit <= 0:
            raise MixfuseError(f"the {what} of a key must be more than 0, not {limit}")
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
    )

    def insert(connection: Connection) -> None:
        taken = text("SELECT 1 FROM api_keys WHERE name = :name AND revoked_at IS NULL")
        if connection.execute(taken, {"name": name}).scalar():
            raise MixfuseError(f"there is a key called {name!r} already; revoke it first, or choose another name")
        names = [column.name for column in fields(ApiKey)]
        columns, values = ", ".join(names), ", ".join(f":{name}" for name in names)
        connection.execute(text(f"INSERT INTO api_keys ({columns}) VALUES ({values})"), vars(key))  # noqa: S608

    database.run_now(insert)
    return key, secret


def has_keys(where: str) -> bool:
    """Whether a key was ever added to the database at `where`."""
    with opened(where) as database:
        return bool(database.run_now(_read)[0])


def revoke(database: Database, name: str) -> ApiKey:
    """Ends a key, named by its name or its id.

    Raises:
        MixfuseError: There is no such key that is valid.
    """

    def end(connection: Connection) -> ApiKey:
        keys, _ = _read(connection)
        key = next((key for key in keys if name in (key.name, key.id) and key.revoked_at is None), None)
        if key is None:
            raise MixfuseError(f"there is no valid key {name!r}; `mixfuse keys list` shows them")
        connection.execute(
            text("UPDATE api_keys SET revoked_at = :now WHERE id = :id"), {"now": time.time(), "id": key.id}
        )
        return key

    return database.run_now(end)


def show(database: Database) -> None:
    """Prints the keys, their limits and what they used in their period."""
    keys, usage = database.run_now(_read)
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
            "" if key.revoked_at is None else "revoked",
        )
    Console().print(table)


def _read(connection: Connection) -> tuple[list[ApiKey], dict[str, dict[Period, Spend]]]:
    """All keys, oldest first, and what each used in each period."""
    names = [column.name for column in fields(ApiKey)]
    rows = connection.execute(text(f"SELECT {', '.join(names)} FROM api_keys ORDER BY created_at"))  # noqa: S608
    keys = [ApiKey(**row) for row in rows.mappings()]
    usage: dict[str, dict[Period, Spend]] = {key.id: {} for key in keys}
    if not keys:
        return [], {}
    query = text("SELECT key_id, SUM(cost), SUM(tokens) FROM key_usage WHERE day >= :since GROUP BY key_id")
    for period in PERIODS:
        for key_id, cost, tokens in connection.execute(query, {"since": _since(period)}):
            usage.setdefault(key_id, {})[period] = Spend(float(cost), int(tokens))
    return keys, usage


def _since(period: Period) -> str:
    """The first day of the period that is now."""
    today = datetime.now(UTC).date()
    first: Any = {"day": today, "month": today.replace(day=1)}.get(period)
    return first.isoformat() if first else "0000-00-00"


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
