"""The trace store: traces of requests in the database, written in the background.

`TraceStore.add` appends a trace to the spool and returns; a task writes the waiting traces to the database, many in
one transaction. `mixfuse.fusion.store.spool` says which traces survive a crash.

No trace ends the writer or is retried for ever. Where the database takes a stand-in of the same size but not the trace,
the trace is set aside in the spool's folder, named in the log and counted. A stored trace that cannot be read is left
out of lists, named there, and counted.
"""

import asyncio
import hashlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from sqlalchemy import Connection, bindparam, text
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from mixfuse.contracts.database import Database
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.linear_patterns import Pattern, SlowError
from mixfuse.contracts.trace import Trace, time_in_utc
from mixfuse.fusion.calls.board import Board
from mixfuse.fusion.calls.ledger import Spend
from mixfuse.fusion.config import TraceConfig
from mixfuse.fusion.store import spending, trace_facts
from mixfuse.fusion.store.spool import SET_ASIDE, Segment, Spool

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

REDACTED = "[redacted]"
_TEXTS = ("text", "thoughts", "tool_calls", "error")  # of a call

# Traces are collected for this long and written together: a commit of fifty costs as much as a commit of one.
_COLLECT_S = 0.05
_BATCH = 200
_RETRY_S = 1.0
# A request that needs the database waits for it so long, also behind others: docs/failures.md.
_ANSWER_S = 10.0
# This many are kept in memory while the database is unreachable; more are in the spool only.
_MOST_WAITING = 20_000
_PURGE_S = 3600.0
# At the end an unreachable database is waited for this long; what is left stays in the spool.
_CLOSE_S = 5.0
# A trace is set aside once the database was away for it, but not for its stand-in, this often.
_MOST_TRIES = 3
# A trace's texts are searched for the patterns of `redact` for so long.
_REDACT_S = 2.0
_PURGE_ROWS = 500
# A read waits so long for the traces of other workers, and looks so often.
_OTHERS_S = 2.0
_LOOK_S = 0.005
_ADDED, _STORED, _REFUSED = 0, 1, 2
# Bytes of the traces in one list.
_LONGEST_LIST = 32 << 20
_AWAY = (OperationalError, InterfaceError)

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
    """A trace to write: its columns, its facts, what it adds to the sums; the spool file that holds it until then."""

    columns: dict[str, Any]
    facts: dict[str, Any]
    sums: spending.Sums
    segment: Segment | None


class Spent(NamedTuple):
    """What a request with an API key spent.

    Attributes:
        key_id: The key's id.
        day: The day in UTC, as ISO 8601 writes it.
        spend: Dollars and tokens.
    """

    key_id: str
    day: str
    spend: Spend


class Spending(Protocol):
    """Is told which spending is in the database."""

    def committing(self) -> AbstractContextManager[None]:
        """Within the block spending is written to the database, and `committed` is called."""
        ...

    def committed(self, spent: Spent) -> None:
        """Called for each trace with an API key, once it is in the database."""
        ...

    def adopt(self, left_behind: Sequence[Spent]) -> None:
        """Called once at the start, with what killed processes left in the spool."""
        ...


class Listing(NamedTuple):
    """The newest traces.

    Attributes:
        traces: Newest first.
        unreadable: The ids of those left out because they cannot be read.
        has_more: Whether traces were left out because the list would be too long.
    """

    traces: list[Trace]
    unreadable: list[str]
    has_more: bool


class UnreadableTraceError(MixfuseError):
    """A stored trace that cannot be read: another version wrote it, or it was changed."""

    def __init__(self, trace_id: str) -> None:
        super().__init__(f"trace {trace_id!r} is stored, but cannot be read", kind="trace_unreadable")


class TraceStore:
    """Traces in the database.

    Args:
        database: The database.
        config: Retention, redaction, and the spool's folder.
        spending: Is told of the spending of API keys.
        board: Tells the other workers' stores how far this one is.

    Attributes:
        failure: Why the database takes no traces; None while it does.
        set_aside: The number of traces that were set aside.
        unreadable: How often a stored trace could not be read.

    Raises:
        MixfuseError: The spool's folder cannot be written.
    """

    def __init__(
        self,
        database: Database,
        config: TraceConfig,
        *,
        spending: Spending | None = None,
        board: Board | None = None,
    ) -> None:
        self._database, self._config, self._spending = database, config, spending
        # Each worker's own: traces added, traces stored, and whether the database refuses them.
        self._progress_of_all = (board or Board()).row("traces")
        folder = config.spool or _spool_beside(database)
        try:
            self._spool = Spool(folder)
        except OSError as error:
            raise MixfuseError(f"cannot write the trace spool {folder}: {error.strerror}", kind="trace_db") from error
        self._redact = [Pattern(pattern) for pattern in config.redact]
        self._waiting: list[_Row] = []
        self._added = self._stored = self._left_behind = 0
        self._hurry = asyncio.Event()
        self._progress = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None
        self._purging: asyncio.Task[None] | None = None
        self._tries: Counter[str] = Counter()
        self.failure: str | None = None
        self.set_aside = self.unreadable = 0

    @property
    def backlog(self) -> int:
        """The number of traces that are not in the database yet, those for the next start included."""
        return len(self._waiting) + self._left_behind

    async def problems(self) -> list[str]:
        """Returns why traces cannot be stored now; empty while they can."""
        found = self.failures()
        try:
            await asyncio.to_thread(self._spool.try_disk)
        except OSError as error:
            found.append(f"the trace spool cannot be written: {error.strerror or error}")
        return found

    def failures(self) -> list[str]:
        """Returns those of `problems` that are known without a look at the disk."""
        found = []
        if self.failure is not None:
            found.append(f"the trace database takes no traces: {self.failure}")
        if self._waiting and (self._writing is None or self._writing.done()):
            found.append("the writer of the traces has ended")
        return found

    async def start(self) -> None:
        """Writes the traces that killed processes left in the spool, and starts to remove expired traces."""
        left_behind: list[Spent] = []
        for segment, lines in self._spool.left_behind():
            rows = []
            for line in lines:
                try:
                    rows.append(_row_of_line(line, segment))
                except ValueError as error:
                    self._put_aside(line, segment, f"a line of {segment.path}", error)
            logger.warning("writing %d traces of a gateway that was killed", len(rows))
            self._waiting.extend(rows)
            self._added += len(rows)
            left_behind += filter(None, map(_spent, rows))
        if self._spending is not None:
            self._spending.adopt(left_behind)
        self._tell_others()
        if self._waiting:
            self._write_soon()
        if self._config.retention_days is not None:
            self._purging = asyncio.create_task(self._purge(self._config.retention_days))

    async def add(self, trace: Trace) -> None:
        """Adds a trace: when this returns it survives a crash, and soon it is in the database."""
        if not self._config.store_text:
            trace = _without_text(trace)
        elif self._redact:
            try:
                trace = await asyncio.to_thread(self._redacted, trace)
            except Exception:
                logger.exception("trace %s could not be redacted; it is stored without its texts", trace.id)
                trace = _without_text(trace)
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
        self._waiting.append(row_of(trace, record, segment))
        self._added += 1
        self._tell_others()
        self._write_soon()

    async def get(self, trace_id: str, *, key_id: str | None = None) -> Trace | None:
        """Returns the trace of that id, or None; with `key_id` only a trace of that API key."""
        record = await self._read(lambda connection: _record(connection, trace_id, key_id))
        return None if record is None else self._readable(trace_id, record)

    async def newest(self, *, limit: int = 100, mode: str | None = None, key_id: str | None = None) -> Listing:
        """Returns the newest traces that can be read."""
        conditions = [column for column, value in (("mode", mode), ("key_id", key_id)) if value is not None]
        where = " AND ".join(f"{column} = :{column}" for column in conditions)
        query = text(
            f"SELECT id, record FROM traces {'WHERE ' + where if where else ''} "  # noqa: S608 - our own column names
            "ORDER BY created_at DESC LIMIT :limit"
        )
        values = {"limit": limit, "mode": mode, "key_id": key_id}
        bound = {name: values[name] for name in ("limit", *conditions)}

        def read(connection: Connection) -> Listing:  # here, off the event loop, the traces are parsed, too
            traces: list[Trace] = []
            unreadable: list[str] = []
            size = 0
            for trace_id, record in connection.execute(query, bound):
                size += len(record)
                if size > _LONGEST_LIST and traces:
                    return Listing(traces, unreadable, has_more=True)
                try:
                    traces.append(Trace.model_validate_json(record))
                except ValueError:
                    unreadable.append(trace_id)
            return Listing(traces, unreadable, has_more=False)

        listing = await self._read(read)
        for trace_id in listing.unreadable:
            self._note_unreadable(trace_id)
        return listing

    async def add_feedback(self, trace_id: str, feedback: dict[str, Any], *, key_id: str | None = None) -> Trace | None:
        """Adds a user's feedback to a trace; returns the trace with it, or None if there is no such trace."""
        if self._redact:
            feedback = await asyncio.to_thread(_Scrubber(self._redact).scrub, feedback)

        def append(connection: Connection) -> Trace | None:
            record = _record(connection, trace_id, key_id, to_change=True)
            if record is None:
                return None
            trace = self._readable(trace_id, record)
            trace = trace.model_copy(update={"feedback": [*trace.feedback, feedback]})
            connection.execute(
                text("UPDATE traces SET record = :record WHERE id = :id"),
                {"record": trace.model_dump_json(), "id": trace_id},
            )
            connection.execute(
                text("UPDATE trace_facts SET feedback = :feedback, marked_right = :right WHERE id = :id"),
                {"feedback": len(trace.feedback), "right": trace_facts.marked_right(trace), "id": trace_id},
            )
            return trace

        return await self._read(append)

    def _readable(self, trace_id: str, record: str) -> Trace:
        try:
            return Trace.model_validate_json(record)
        except ValueError:
            self._note_unreadable(trace_id)
            raise UnreadableTraceError(trace_id) from None

    def _note_unreadable(self, trace_id: str) -> None:
        self.unreadable += 1
        logger.warning("trace %s is stored, but cannot be read; it is skipped", trace_id)

    async def _read(self, work: Callable[[Connection], Result]) -> Result:
        """Runs `work` once every trace added so far is in the database.

        Raises:
            MixfuseError: The database cannot be read, or does not answer within `_ANSWER_S` (`trace_db`).
        """
        try:
            async with asyncio.timeout(_ANSWER_S):
                await self.written()
                all_there = self.failure is None
                found = await self._database.run(work)
            if found is None and not all_there:
                # It may be one of those that wait.
                raise MixfuseError("the trace database takes no traces now; try again later", kind="trace_db")
            return found
        except TimeoutError:
            raise MixfuseError(
                f"the trace database does not answer within {_ANSWER_S:g} s; try again later", kind="trace_db"
            ) from None
        except SQLAlchemyError as error:
            logger.warning("traces cannot be read", exc_info=True)
            raise MixfuseError("the trace database cannot be read now; try again later", kind="trace_db") from error

    async def written(self) -> None:
        """Waits until every trace added so far is in the database, those of other workers too, or it refuses one."""
        last, of_all = self._added, self._progress_of_all.of_all(_ADDED)
        while self._stored < last and self.failure is None:
            self._hurry.set()
            await self._progress.wait()
        with suppress(TimeoutError):  # a worker was killed; the next one writes what it left
            async with asyncio.timeout(_OTHERS_S):
                while self._others_lag(of_all):  # noqa: ASYNC110 - other processes set no event here
                    await asyncio.sleep(_LOOK_S)

    def _others_lag(self, of_all: Sequence[float]) -> bool:
        """Whether another worker has not stored as many traces yet as it had added then."""
        row = self._progress_of_all
        now = zip(of_all, row.of_all(_ADDED), row.of_all(_STORED), row.of_all(_REFUSED), strict=True)
        return any(stored < min(then, added) and not refused for then, added, stored, refused in now)

    def _tell_others(self) -> None:
        row = self._progress_of_all
        row.set_own(_ADDED, self._added)
        row.set_own(_STORED, self._stored)
        row.set_own(_REFUSED, self.failure is not None)

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
        while self._waiting:
            await self._collect()
            batch = self._waiting[:_BATCH]
            try:
                await self._insert(batch)
            except Exception as error:  # whatever it is: a writer that has ended would be noticed by nobody
                if await self._takes_traces(max(len(row.columns["record"]) for row in batch)):
                    await self._write_one_by_one(len(batch))
                else:
                    await self._wait_for_database(error)
            else:
                self._leave_queue(len(batch))

    async def _write_one_by_one(self, count: int) -> None:
        """Writes the first waiting traces, of which at least one is at fault; that one is set aside."""
        for _ in range(count):
            row = self._waiting[0]
            trace_id = row.columns["id"]
            try:
                await self._insert([row])
            except Exception as error:
                if not await self._takes_traces(len(row.columns["record"])):
                    await self._wait_for_database(error)
                    return
                self._tries[trace_id] += 1
                if isinstance(error, _AWAY) and self._tries[trace_id] < _MOST_TRIES:
                    self._waiting.append(self._waiting.pop(0))
                    continue
                self._put_aside(row.columns["record"].encode() + b"\n", row.segment, f"trace {trace_id}", error)
            self._tries.pop(trace_id, None)
            self._leave_queue(1)

    async def _takes_traces(self, size: int) -> bool:
        """Whether the database takes a trace of so many characters, which is removed again at once."""
        try:
            await self._database.run(partial(_insert_and_remove, size=size))
        except Exception:
            return False
        return True

    async def _wait_for_database(self, error: Exception) -> None:
        if self.failure is None:
            logger.error("the trace database takes no traces; they wait in the spool", exc_info=error)
        self.failure = str(error) or type(error).__name__
        self._notify_progress()
        await asyncio.sleep(_RETRY_S)

    def _leave_queue(self, count: int) -> None:
        """Removes the first waiting traces, which are written or set aside."""
        del self._waiting[:count]
        self._stored += count
        if self.failure is not None:
            logger.warning("the trace database takes traces again")
            self.failure = None
        self._notify_progress()

    def _put_aside(self, line: bytes, segment: Segment | None, what: str, error: Exception) -> None:
        """Sets a trace aside that cannot be written; where that fails too, it stays in its file of the spool."""
        self.set_aside += 1
        reason = str(error).partition("\n")[0][:300] or type(error).__name__
        try:
            self._spool.set_aside(line.rstrip(b"\n") + b"\n")
        except OSError:
            logger.exception("%s cannot be written (%s), nor set aside; it stays in its file", what, reason)
            return
        logger.error("%s cannot be written (%s); it is set aside in the spool's %s", what, reason, SET_ASIDE)
        if segment is not None:
            self._spool.done(segment)

    async def _collect(self) -> None:
        """Waits for more traces, unless `written` waits for these."""
        try:
            async with asyncio.timeout(_COLLECT_S):
                await self._hurry.wait()
        except TimeoutError:
            pass
        self._hurry.clear()

    async def _insert(self, batch: Sequence[_Row]) -> None:
        """Writes these traces to the database and notes that they are there."""
        spent = [] if self._spending is None else [found for row in batch if (found := _spent(row))]
        work = partial(insert, rows=batch)
        if self._spending is None or not spent:
            await self._database.run(work)
        else:
            with self._spending.committing():
                await self._database.run(work)
                for one in spent:
                    self._spending.committed(one)
        for row in batch:
            if row.segment is not None:
                self._spool.done(row.segment)

    def _notify_progress(self) -> None:
        """Wakes the callers that wait in `written`."""
        self._tell_others()
        self._progress.set()
        self._progress = asyncio.Event()

    async def _purge(self, days: float) -> None:
        """Removes expired traces, now and every hour; a few at a time, so that nobody waits for it."""
        while True:
            try:
                before = time.time() - days * 86400
                removed = _PURGE_ROWS
                while removed == _PURGE_ROWS:  # reads come in between
                    removed = await self._database.run(partial(_purge, before=before))
            except Exception:
                logger.exception("expired traces could not be removed; next attempt in an hour")
            await asyncio.sleep(_PURGE_S)

    def _redacted(self, trace: Trace) -> Trace:
        """Returns the trace with the redaction patterns' matches replaced; takes `_REDACT_S` at most, and a search."""
        scrub = _Scrubber(self._redact).scrub
        calls = [call.model_copy(update={name: scrub(getattr(call, name)) for name in _TEXTS}) for call in trace.calls]
        debate, weighing, analysis = trace.debate, trace.weighing, trace.analysis
        if debate is not None:
            rounds = [[turn.model_copy(update={"text": scrub(turn.text)}) for turn in turns] for turns in debate.rounds]
            debate = debate.model_copy(update={"rounds": rounds})
        if weighing is not None:
            weighing = weighing.model_copy(update={"domain": scrub(weighing.domain)})
        if analysis is not None:
            analysis = analysis.model_copy(update=scrub(analysis.model_dump()))
        fields = ("messages", "parameters", "metadata", "answer", "tool_calls", "error", "feedback")
        return trace.model_copy(
            update={
                "calls": calls,
                "debate": debate,
                "weighing": weighing,
                "analysis": analysis,
                **{name: scrub(getattr(trace, name)) for name in fields},
            }
        )

    async def stores_whole(self, value: Any) -> bool:
        """Whether a value is stored as it is: texts may be stored, and nothing in it is redacted."""
        if not self._redact:
            return self._config.store_text
        return self._config.store_text and await asyncio.to_thread(_Scrubber(self._redact).scrub, value) == value


class _Scrubber:
    """Replaces the matches of patterns in all texts of a value, for as long as `_REDACT_S`.

    A text that takes longer is replaced as a whole: what was not searched is not stored.
    """

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._patterns = patterns
        self._until = time.monotonic() + _REDACT_S

    def scrub(self, value: Any) -> Any:
        """Returns the value with every match replaced, in the keys of objects too."""
        if isinstance(value, str):
            try:
                for pattern in self._patterns:
                    if time.monotonic() > self._until:
                        return REDACTED
                    value = pattern.replaced(value, REDACTED, until=self._until)
            except SlowError:
                return REDACTED
            return value
        if isinstance(value, dict):
            return {self.scrub(key): self.scrub(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.scrub(entry) for entry in value]
        return value


def _without_text(trace: Trace) -> Trace:
    silent = dict.fromkeys(_TEXTS)
    return trace.model_copy(
        update={
            "messages": [],
            "metadata": {},
            "parameters": {k: v for k, v in trace.parameters.items() if isinstance(v, int | float)},
            "calls": [call.model_copy(update=silent) for call in trace.calls],
            "debate": trace.debate and trace.debate.model_copy(update={"rounds": []}),
            "analysis": None,
            "answer": None,
            "tool_calls": None,
            "error": None,
        }
    )


def _spool_beside(database: Database) -> Path:
    """The folder of a database's own spool: what a killed gateway left goes into no other database."""
    if "://" not in database.name:
        return Path(f"{database.name}.spool")
    return Path("runs/trace-spool") / hashlib.sha256(database.name.encode()).hexdigest()[:12]


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


def row_of(trace: Trace, record: str, segment: Segment | None = None) -> _Row:
    """Returns what `insert` writes of a trace; `record` is the trace as JSON."""
    return _Row(_columns(trace, record), trace_facts.facts(trace), spending.sums_of(trace), segment)


def _row_of_line(line: bytes, segment: Segment) -> _Row:
    """Returns the row of a line of the spool.

    Raises:
        ValueError: It is not a trace.
    """
    trace = Trace.model_validate_json(line)
    return row_of(trace, line.decode(), segment)


def _spent(row: _Row) -> Spent | None:
    columns = row.columns
    if columns["key_id"] is None:
        return None
    return Spent(columns["key_id"], _day(columns), Spend(columns["cost"], columns["total_tokens"]))


def _day(columns: Mapping[str, Any]) -> str:
    return time_in_utc(columns["created_at"]).date().isoformat()


def insert(connection: Connection, rows: Sequence[_Row]) -> None:
    """Writes traces and adds to the sums and their keys' usage; a trace that is already there changes nothing."""
    new = _insert_new(connection, rows)
    used = [
        {"key_id": spent.key_id, "day": spent.day, "tokens": spent.spend.tokens, "cost": spent.spend.cost}
        for row in new
        if (spent := _spent(row)) is not None
    ]
    if used:  # in one order, so that two gateways wait for each other's rows only one way
        connection.execute(_COUNT_USAGE, sorted(used, key=lambda one: (one["key_id"], one["day"])))
    if new:
        connection.execute(trace_facts.INSERT, [row.facts for row in new])
        spending.add(connection, (row.sums for row in new))


def _insert_new(connection: Connection, rows: Sequence[_Row]) -> list[_Row]:
    """Writes those traces that are not there yet, and returns them.

    A trace may come from another connection at the same time: a commit may still be under way whose gateway has lost
    its connection and tries again.
    """
    while True:
        known = set(connection.execute(_KNOWN, {"ids": [row.columns["id"] for row in rows]}).scalars())
        new = list({row.columns["id"]: row for row in reversed(rows) if row.columns["id"] not in known}.values())[::-1]
        if not new:
            return []
        with connection.begin_nested() as attempt:
            # -1: the driver does not know.
            if connection.execute(_INSERT, [row.columns for row in new]).rowcount in (len(new), -1):
                return new
            attempt.rollback()  # the insert has waited for the other's commit, so its traces are known now


def _insert_and_remove(connection: Connection, size: int) -> None:
    """Writes a trace of so many characters and removes it in the same transaction: a full disk fails at the commit."""
    trace = Trace(id=f"stand-in-{uuid.uuid4().hex}", model="", mode="", messages=[])
    connection.execute(_INSERT, _columns(trace, "0" * size))
    connection.execute(text("DELETE FROM traces WHERE id = :id"), {"id": trace.id})


def _purge(connection: Connection, before: float) -> int:
    """Removes at most `_PURGE_ROWS` traces made before that time, the oldest; returns their number."""
    oldest = text("SELECT id FROM traces WHERE created_at < :before ORDER BY created_at LIMIT :n")
    ids = connection.execute(oldest, {"before": before, "n": _PURGE_ROWS}).scalars().all()
    if ids:
        for table in ("trace_facts", "traces"):
            remove = text(f"DELETE FROM {table} WHERE id IN :ids")  # noqa: S608 - our own names
            connection.execute(remove.bindparams(bindparam("ids", expanding=True)), {"ids": ids})
    return len(ids)


def _record(connection: Connection, trace_id: str, key_id: str | None, *, to_change: bool = False) -> str | None:
    if "\0" in trace_id:  # PostgreSQL refuses to look for it
        return None
    query = "SELECT record FROM traces WHERE id = :id"
    if key_id is not None:
        query += " AND key_id = :key_id"
    if to_change and connection.dialect.name == "postgresql":  # SQLite lets one writer in at a time anyway
        query += " FOR UPDATE"
    bound = {"id": trace_id} if key_id is None else {"id": trace_id, "key_id": key_id}
    record = connection.execute(text(query), bound).scalar()
    return None if record is None else str(record)
