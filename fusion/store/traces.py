"""The trace store: traces of requests in the database, written in the background.

`TraceStore.add` appends a trace to the spool and returns; a task writes the waiting traces to the database, many in
one transaction. `mixfuse.fusion.store.spool` says which traces survive a crash.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, bindparam, text
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from mixfuse.contracts.database import Database
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.trace import Trace
from mixfuse.fusion.calls.ledger import Spend
from mixfuse.fusion.config import TraceConfig
from mixfuse.fusion.store.spool import Segment, Spool

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

REDACTED = "[redacted]"

# Traces are collected for this long and written together: a commit of fifty costs as much as a commit of one.
_COLLECT_S = 0.05
_BATCH = 200
_RETRY_S = 1.0
# This many are kept in memory while the database is unreachable; more are in the spool only.
_MOST_WAITING = 20_000
_PURGE_S = 3600.0
# At the end an unreachable database is waited for this long; what is left stays in the spool.
_CLOSE_S = 5.0

_INSERT = text(
    "INSERT INTO traces "
    "(id, created_at, model, mode, outcome, reason, total_tokens, duration_ms, cost, key_id, record) VALUES "
    " (:id, :created_at, :model, :mode, :outcome, :reason, :total_tokens, :duration_ms, :cost, :key_id, :record) "
    "ON CONFLICT (id) DO NOTHING"
)
_KNOWN = text("SELECT id FROM traces WHERE id IN :ids").bindparams(bindparam("ids", expanding=True))
_COUNT_USAGE = text(
    "INSERT INTO key_usage (key_id, day, requests, tokens, cost) VALUES (:key_id, :day, 1, :tokens, :cost) "
    "ON CONFLICT (key_id, day) DO UPDATE SET requests = key_usage.requests + 1, "
    "tokens = key_usage.tokens + excluded.tokens, cost = key_usage.cost + excluded.cost"
)


class _Row(NamedTuple):
    """A trace to write: its columns, and the spool file that holds it until then."""

    columns: dict[str, Any]
    segment: Segment | None


class TraceStore:
    """Traces in the database.

    Args:
        database: The database.
        config: Retention, redaction, and the spool's folder.
        committed: Called for each trace with an API key, once it is in the database: (key id, spend).

    Attributes:
        failure: Why the database takes no traces; None while it does.

    Raises:
        MixfuseError: The spool's folder cannot be written.
    """

    def __init__(
        self,
        database: Database,
        config: TraceConfig,
        *,
        committed: Callable[[str, Spend], None] | None = None,
    ) -> None:
        self._database, self._config, self._committed = database, config, committed
        folder = config.spool or _spool_beside(database)
        try:
            self._spool = Spool(folder)
        except OSError as error:
            raise MixfuseError(f"cannot write the trace spool {folder}: {error.strerror}", kind="trace_db") from error
        self._redact = [re.compile(pattern) for pattern in config.redact]
        self._waiting: list[_Row] = []
        self._added = self._stored = self._left_behind = 0
        self._hurry = asyncio.Event()
        self._progress = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None
        self._purging: asyncio.Task[None] | None = None
        self.failure: str | None = None

    @property
    def backlog(self) -> int:
        """The number of traces that are not in the database yet, those for the next start included."""
        return len(self._waiting) + self._left_behind

    async def start(self) -> None:
        """Writes the traces that killed processes left in the spool, and starts to remove expired traces."""
        for segment, lines in self._spool.left_behind():
            rows = [row for line in lines if (row := _row_of(line, segment)) is not None]
            for _ in range(len(lines) - len(rows)):
                self._spool.done(segment)
            logger.warning("writing %d traces of a gateway that was killed", len(rows))
            self._waiting.extend(rows)
            self._added += len(rows)
        if self._waiting:
            self._write_soon()
        if self._config.retention_days is not None:
            self._purging = asyncio.create_task(self._purge(self._config.retention_days))

    def add(self, trace: Trace) -> None:
        """Adds a trace: when this returns it survives a crash, and soon it is in the database."""
        if self._redact or not self._config.store_text:
            trace = self._redacted(trace)
        record = trace.model_dump_json()
        segment: Segment | None = None
        try:
            segment = self._spool.append(record.encode() + b"\n")
        except OSError:
            # The database may still take the trace, and the client has paid for its answer.
            logger.exception("trace %s could not be spooled", trace.id)
        if len(self._waiting) >= _MOST_WAITING and segment is not None:
            self._left_behind += 1  # the next start writes it; the database may be unreachable for hours
            return
        self._waiting.append(_Row(_columns(trace, record), segment))
        self._added += 1
        self._write_soon()

    async def get(self, trace_id: str, *, key_id: str | None = None) -> Trace | None:
        """Returns the trace of that id, or None; with `key_id` only a trace of that API key."""
        await self.written()
        record = await self._read(lambda connection: _record(connection, trace_id, key_id))
        return None if record is None else Trace.model_validate_json(record)

    async def newest(self, *, limit: int = 100, mode: str | None = None, key_id: str | None = None) -> list[Trace]:
        """Returns the newest traces, newest first."""
        await self.written()
        conditions = [column for column, value in (("mode", mode), ("key_id", key_id)) if value is not None]
        where = " AND ".join(f"{column} = :{column}" for column in conditions)
        query = text(
            f"SELECT record FROM traces {'WHERE ' + where if where else ''} "  # noqa: S608 - our own column names
            "ORDER BY created_at DESC LIMIT :limit"
        )
        values = {"limit": limit, "mode": mode, "key_id": key_id}
        bound = {name: values[name] for name in ("limit", *conditions)}
        records = await self._read(lambda connection: connection.execute(query, bound).scalars().all())
        return [Trace.model_validate_json(record) for record in records]

    async def add_feedback(self, trace_id: str, feedback: dict[str, Any], *, key_id: str | None = None) -> Trace | None:
        """Adds a user's feedback to a trace; returns the trace with it, or None if there is no such trace."""
        await self.written()
        feedback = self._scrub(feedback)

        def append(connection: Connection) -> Trace | None:
            record = _record(connection, trace_id, key_id, to_change=True)
            if record is None:
                return None
            trace = Trace.model_validate_json(record)
            trace = trace.model_copy(update={"feedback": [*trace.feedback, feedback]})
            connection.execute(
                text("UPDATE traces SET record = :record WHERE id = :id"),
                {"record": trace.model_dump_json(), "id": trace_id},
            )
            return trace

        return await self._read(append)

    async def _read(self, work: Callable[[Connection], Result]) -> Result:
        try:
            return await self._database.run(work)
        except SQLAlchemyError as error:
            logger.warning("traces cannot be read", exc_info=True)
            raise MixfuseError("the trace database cannot be read now; try again later", kind="trace_db") from error

    async def written(self) -> None:
        """Waits until every trace added so far is in the database, or the database refuses one."""
        last = self._added
        while self._stored < last and self.failure is None:
            self._hurry.set()
            await self._progress.wait()

    async def close(self) -> None:
        """Writes the waiting traces and closes the spool; traces that the database does not take stay there."""
        if self._purging is not None:
            self._purging.cancel()
            await asyncio.wait({self._purging})
        if self._writing is not None:
            self._hurry.set()
            await asyncio.wait({self._writing}, timeout=_CLOSE_S)
            self._writing.cancel()
            await asyncio.wait({self._writing})
        if self.backlog:
            logger.error("%d traces could not be written to the database; they are in the spool", self.backlog)
        self._spool.close()

    def _write_soon(self) -> None:
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())

    async def _write(self) -> None:
        """Writes the waiting traces; tries again while the database is unreachable."""
        size = _BATCH
        while self._waiting:
            await self._collect()
            batch = self._waiting[:size]
            try:
                await self._database.run(partial(_insert, rows=[row.columns for row in batch]))
            except (OperationalError, InterfaceError) as error:
                if self.failure is None:
                    logger.exception("the trace database takes no traces; they wait in the spool")
                self.failure = str(error)
                self._notify_progress()
                await asyncio.sleep(_RETRY_S)
                continue
            except SQLAlchemyError:
                # One trace of the batch is at fault: written one by one, the others succeed.
                if size > 1:
                    size = 1
                    continue
                logger.exception("trace %s cannot be written; it stays in the spool", batch[0].columns["id"])
            else:
                self._commit(batch)
            size = _BATCH if size > 1 or len(self._waiting) == 1 else size
            self._waiting = self._waiting[len(batch) :]
            self._stored += len(batch)
            if self.failure is not None:
                logger.warning("the trace database takes traces again")
                self.failure = None
            self._notify_progress()

    async def _collect(self) -> None:
        """Waits for more traces, unless `written` waits for these."""
        try:
            async with asyncio.timeout(_COLLECT_S):
                await self._hurry.wait()
        except TimeoutError:
            pass
        self._hurry.clear()

    def _commit(self, batch: Sequence[_Row]) -> None:
        """Notes that these traces are in the database."""
        for row in batch:
            if row.segment is not None:
                self._spool.done(row.segment)
            if self._committed is not None and row.columns["key_id"] is not None:
                self._committed(row.columns["key_id"], Spend(row.columns["cost"], row.columns["total_tokens"]))

    def _notify_progress(self) -> None:
        """Wakes the callers that wait in `written`."""
        self._progress.set()
        self._progress = asyncio.Event()

    async def _purge(self, days: float) -> None:
        """Removes expired traces, now and every hour."""
        while True:
            try:
                await self._database.run(partial(_purge, before=time.time() - days * 86400))
            except SQLAlchemyError:
                logger.exception("expired traces could not be removed; next attempt in an hour")
            await asyncio.sleep(_PURGE_S)

    def _redacted(self, trace: Trace) -> Trace:
        """Returns the trace without its texts, or with the redaction patterns' matches replaced."""
        if not self._config.store_text:
            silent = {"text": None, "tool_calls": None, "error": None}
            return trace.model_copy(
                update={
                    "messages": [],
                    "parameters": {k: v for k, v in trace.parameters.items() if isinstance(v, int | float)},
                    "calls": [call.model_copy(update=silent) for call in trace.calls],
                    "debate": trace.debate and trace.debate.model_copy(update={"rounds": []}),
                    "answer": None,
                    "tool_calls": None,
                    "error": None,
                }
            )
        calls = [
            call.model_copy(update={name: self._scrub(getattr(call, name)) for name in ("text", "tool_calls", "error")})
            for call in trace.calls
        ]
        debate = trace.debate
        if debate is not None:
            rounds = [
                [turn.model_copy(update={"text": self._scrub(turn.text)}) for turn in turns] for turns in debate.rounds
            ]
            debate = debate.model_copy(update={"rounds": rounds})
        fields = ("messages", "parameters", "answer", "tool_calls", "error", "feedback")
        return trace.model_copy(
            update={"calls": calls, "debate": debate, **{name: self._scrub(getattr(trace, name)) for name in fields}}
        )

    def _scrub(self, value: Any) -> Any:
        """Returns the value with every match of a redaction pattern in its texts replaced."""
        if isinstance(value, str):
            for pattern in self._redact:
                value = pattern.sub(REDACTED, value)
            return value
        if isinstance(value, dict):
            return {key: self._scrub(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self._scrub(entry) for entry in value]
        return value


def _spool_beside(database: Database) -> Path:
    return Path(f"{database.name}.spool") if "://" not in database.name else Path("runs/trace-spool")


def _columns(trace: Trace, record: str) -> dict[str, Any]:
    return {
        "id": trace.id,
        "created_at": trace.created_at,
        "model": trace.model,
        "mode": trace.mode,
        "outcome": trace.outcome,
        "reason": trace.reason,
        "total_tokens": trace.usage.total_tokens,
        "duration_ms": trace.duration_ms,
        "cost": trace.cost,
        "key_id": trace.key,
        "record": record,
    }


def _row_of(line: bytes, segment: Segment) -> _Row | None:
    try:
        trace = Trace.model_validate_json(line)
    except ValueError:
        logger.warning("%s: a line is not a trace; it is skipped", segment.path)
        return None
    return _Row(_columns(trace, line.decode()), segment)


def _insert(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Writes traces and adds to their keys' usage; a trace that is already there changes nothing."""
    keyed = [row for row in rows if row["key_id"] is not None]
    if keyed:
        ids = [row["id"] for row in keyed]
        known = set(connection.execute(_KNOWN, {"ids": ids}).scalars())
        used = [
            {
                "key_id": row["key_id"],
                "day": datetime.fromtimestamp(row["created_at"], UTC).date().isoformat(),
                "tokens": row["total_tokens"],
                "cost": row["cost"],
            }
            for row in keyed
            if row["id"] not in known
        ]
        if used:
            connection.execute(_COUNT_USAGE, used)
    connection.execute(_INSERT, list(rows))


def _purge(connection: Connection, before: float) -> None:
    connection.execute(text("DELETE FROM traces WHERE created_at < :before"), {"before": before})


def _record(connection: Connection, trace_id: str, key_id: str | None, *, to_change: bool = False) -> str | None:
    query = "SELECT record FROM traces WHERE id = :id"
    if key_id is not None:
        query += " AND key_id = :key_id"
    if to_change and connection.dialect.name == "postgresql":  # SQLite lets one writer in at a time anyway
        query += " FOR UPDATE"
    bound = {"id": trace_id} if key_id is None else {"id": trace_id, "key_id": key_id}
    record = connection.execute(text(query), bound).scalar()
    return None if record is None else str(record)
