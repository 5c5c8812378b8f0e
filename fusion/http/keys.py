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
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Literal

from rich.console import Console
from rich.table import Table
from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from mixfuse.contracts.database import Database, opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import NOTHING, Budget, Spend
from mixfuse.fusion.http.key_limits import PERIODS, KeyBudget, Period, RateLimit, first_day

logger = logging.getLogger(__name__)

PREFIX = "mf-"
API_KEY = "MIXFUSE_API_KEY"
"""The environment variable of the API key that `mixfuse eval` sends."""
ADMIN_KEY = "MIXFUSE_ADMIN_KEY"
"""The environment variable of the admin key. It is no API key: it opens `/admin`, `/metrics` and all traces."""

_REFRESH_S = 2.0


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


class KeyRing:
    """The keys of a running gateway, read from the database every few seconds.

    Args:
        database: The database of the keys.
        mode: Whether a request needs a key: "auto" if there is any key, a revoked one included.
    """

    def __init__(self, database: Database, mode: Literal["auto", "required", "off"]) -> None:
        self._database, self._mode = database, mode
        self._keys: dict[str, ApiKey] = {}
        self._budgets: dict[str, KeyBudget] = {}
        self._rates: dict[str, RateLimit] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self._take(*database.run_now(_read))

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
        return key

    def admit(self, key: ApiKey) -> Budget:
        """Counts a request against a key's rate limit; returns the budget that the request draws on.

        Raises:
            CallError: Too many requests in the last minute (`rate_limited`), or the budget is spent (`budget`).
        """
        if key.per_minute is not None:
            rate = self._rates.setdefault(key.id, RateLimit(key.per_minute))
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

    def committed(self, key_id: str, spend: Spend) -> None:
        """Notes that the spending of a request with this key is in the database."""
        if key_id in self._budgets:
            self._budgets[key_id].committed(spend)

    def _budget(self, key: ApiKey) -> KeyBudget:
        budget = self._budgets.get(key.id)
        if budget is None or budget.since != first_day(key.period):
            budget = KeyBudget(key.name, key.period, max_cost=key.max_cost, max_tokens=key.max_tokens)
            self._budgets[key.id] = budget
        return budget

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_S)
            try:
                # The database has one thread: whatever it committed before this read has been noted by then.
                self._take(*await self._database.run(_read))
            except SQLAlchemyError:
                logger.warning("the API keys could not be read again; the last known ones are kept", exc_info=True)

    def _take(self, keys: Sequence[ApiKey], usage: dict[str, dict[Period, Spend]]) -> None:
        self._keys = {key.sha256: key for key in keys}
        for key in keys:
            if key.id in self._rates and self._rates[key.id].per_minute != key.per_minute:
                del self._rates[key.id]
            self._budget(key).rebase(usage.get(key.id, {}).get(key.period, NOTHING))


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
) -> tuple[ApiKey, str]:
    """Adds a key.

    Returns:
        The key and its secret. The secret is stored nowhere.

    Raises:
        MixfuseError: The name is taken or empty, or a limit is not positive.
    """
    if not name.strip():
        raise MixfuseError("a key needs a name")
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
    """Whether a key was ever added to the database at this path or URL."""
    with opened(where) as database:
        return bool(database.run_now(_read)[0])


def revoke(database: Database, name: str) -> ApiKey:
    """Revokes a key, given by its name or its id.

    Raises:
        MixfuseError: There is no valid key of that name or id.
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
    """Prints the keys, their limits and their usage in the current period."""
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
