"""The database of the gateways: traces, API keys and roles. SQLite by default; PostgreSQL if several gateways share it.

The schema is a list of numbered steps, `MIGRATIONS`; opening the database runs the missing ones, and a new table is a
new step at the end. All work runs in one thread, one transaction after the other in the order of the calls. So the
event loop never waits for a disk, and a reader sees everything that was written before.
"""

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy
from sqlalchemy import Connection, Engine, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from mixfuse.contracts.errors import MixfuseError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# SQL that SQLite and PostgreSQL both read. A step that has been released is never changed.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # "IF NOT EXISTS": the first databases carried no version.
        """CREATE TABLE IF NOT EXISTS traces (
            id TEXT PRIMARY KEY,
            created_at DOUBLE PRECISION NOT NULL,
            model TEXT NOT NULL,
            mode TEXT NOT NULL,
            outcome TEXT NOT NULL,
            reason TEXT NOT NULL,
            total_tokens BIGINT NOT NULL,
            duration_ms DOUBLE PRECISION NOT NULL,
            record TEXT NOT NULL
        )""",
        "CREATE INDEX IF NOT EXISTS traces_by_time ON traces (created_at)",
        "CREATE INDEX IF NOT EXISTS traces_by_mode ON traces (mode, created_at)",
    ),
    (
        "ALTER TABLE traces ADD COLUMN cost DOUBLE PRECISION NOT NULL DEFAULT 0",
        "ALTER TABLE traces ADD COLUMN key_id TEXT",
        "CREATE INDEX traces_by_key ON traces (key_id, created_at)",
        """CREATE TABLE api_keys (
            id TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            sha256 TEXT NOT NULL UNIQUE,
            created_at DOUBLE PRECISION NOT NULL,
            revoked_at DOUBLE PRECISION,
            max_cost DOUBLE PRECISION,
            max_tokens BIGINT,
            period TEXT NOT NULL,
            per_minute INTEGER
        )""",
        """CREATE TABLE key_usage (
            key_id TEXT NOT NULL,
            day TEXT NOT NULL,
            requests BIGINT NOT NULL,
            tokens BIGINT NOT NULL,
            cost DOUBLE PRECISION NOT NULL,
            PRIMARY KEY (key_id, day)
        )""",
    ),
    (
        """CREATE TABLE roles (
            role TEXT PRIMARY KEY,
            version BIGINT NOT NULL,
            revision TEXT,
            directory TEXT,
            pinned INTEGER NOT NULL,
            since DOUBLE PRECISION NOT NULL,
            gateway TEXT NOT NULL
        )""",
        """CREATE TABLE role_history (
            id TEXT PRIMARY KEY,
            at DOUBLE PRECISION NOT NULL,
            role TEXT NOT NULL,
            why TEXT NOT NULL,
            outcome TEXT NOT NULL,
            old_revision TEXT,
            new_revision TEXT,
            directory TEXT,
            gateway TEXT NOT NULL,
            version BIGINT,
            error TEXT
        )""",
        "CREATE UNIQUE INDEX role_history_by_version ON role_history (role, version)",
        "CREATE INDEX role_history_by_time ON role_history (role, at)",
    ),
    (
        """CREATE TABLE response_cache (
            key TEXT PRIMARY KEY,
            expires_at DOUBLE PRECISION NOT NULL,
            record TEXT NOT NULL
        )""",
        "CREATE INDEX response_cache_by_end ON response_cache (expires_at)",
    ),
    (
        """CREATE TABLE engine_leases (
            engine TEXT PRIMARY KEY,
            holder TEXT NOT NULL,
            expires_at DOUBLE PRECISION NOT NULL
        )""",
        "ALTER TABLE api_keys ADD COLUMN expires_at DOUBLE PRECISION",
    ),
    ("CREATE TABLE ui_secrets (name TEXT PRIMARY KEY, value TEXT NOT NULL)",),
    (
        """CREATE TABLE trace_facts (
            id TEXT PRIMARY KEY,
            created_at DOUBLE PRECISION NOT NULL,
            mode TEXT NOT NULL,
            key_id TEXT,
            reason TEXT NOT NULL,
            outcome TEXT NOT NULL,
            members TEXT NOT NULL,
            failed INTEGER NOT NULL,
            disagreement INTEGER NOT NULL,
            flipped INTEGER NOT NULL,
            unsure INTEGER NOT NULL,
            confidence DOUBLE PRECISION,
            cost DOUBLE PRECISION NOT NULL,
            duration_ms DOUBLE PRECISION NOT NULL,
            feedback INTEGER NOT NULL,
            question TEXT NOT NULL,
            words TEXT NOT NULL
        )""",
        # All that lists are filtered by, so that a search reads the index alone.
        """CREATE INDEX trace_facts_by_time ON trace_facts (created_at, id, mode, key_id, reason, outcome, members,
            failed, disagreement, flipped, unsure, cost, duration_ms, feedback)""",
        """CREATE INDEX trace_facts_by_key ON trace_facts (key_id, created_at, id, mode, reason, outcome, members,
            failed, disagreement, flipped, unsure, cost, duration_ms, feedback)""",
    ),
    (
        "DROP TABLE engine_leases",
        """CREATE TABLE gateways (
            owner TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            engines TEXT NOT NULL,
            serves TEXT NOT NULL,
            expires_at DOUBLE PRECISION NOT NULL
        )""",
    ),
    (
        # A trace has its facts exactly if it is in the sums; both are written again for what there is.
        "DELETE FROM trace_facts",
        "ALTER TABLE trace_facts ADD COLUMN marked_right INTEGER",
        """CREATE INDEX trace_facts_by_mark ON trace_facts (created_at, mode, key_id, marked_right, cost)
            WHERE marked_right IS NOT NULL""",
        """CREATE TABLE spent_on_requests (
            day TEXT NOT NULL,
            key_id TEXT NOT NULL,
            mode TEXT NOT NULL,
            requests BIGINT NOT NULL,
            cost DOUBLE PRECISION NOT NULL,
            PRIMARY KEY (day, key_id, mode)
        )""",
        """CREATE TABLE spent_on_calls (
            day TEXT NOT NULL,
            key_id TEXT NOT NULL,
            mode TEXT NOT NULL,
            member TEXT NOT NULL,
            stage TEXT NOT NULL,
            calls BIGINT NOT NULL,
            asked BIGINT NOT NULL,
            spared BIGINT NOT NULL,
            prompt_tokens BIGINT NOT NULL,
            completion_tokens BIGINT NOT NULL,
            cost DOUBLE PRECISION NOT NULL,
            PRIMARY KEY (day, key_id, mode, member, stage)
        )""",
    ),
    (
        """CREATE TABLE role_proposals (
            role TEXT PRIMARY KEY,
            id TEXT NOT NULL,
            owner TEXT NOT NULL,
            revision TEXT NOT NULL,
            directory TEXT NOT NULL
        )""",
        "ALTER TABLE gateways ADD COLUMN prepared TEXT NOT NULL DEFAULT '{}'",
    ),
)

# At the end of a process its last calls get this long.
_CLOSE_S = 5.0

# An arbitrary number that all gateways share.
_MIGRATION_LOCK = 0x6D697866


class Database:
    """An open database, its schema up to date.

    Args:
        where: The path of a SQLite file, which is created with its folder if it does not exist; or a URL, `sqlite:///…`
            or `postgresql://…`.
        create: Whether a SQLite file may be created.
        reads: Nothing is written to it, not even a newer schema.

    Raises:
        MixfuseError: It cannot be opened, is not a database, or was written by a newer version (kind "trace_db").
    """

    def __init__(self, where: str | Path, *, create: bool = True, reads: bool = False) -> None:
        url = _url(where)
        self.name = url.render_as_string(hide_password=True) if "://" in str(where) else str(where)
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._connections: deque[Any] = deque(maxlen=2)  # the driver's; the pool makes no more at once
        path = Path(url.database) if self.is_sqlite and url.database else None
        if path is not None and not create and not path.exists():
            raise MixfuseError(f"there is no database {path}", kind="trace_db")
        try:
            if path is not None and create:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._engine = _engine(url, reads=reads)
            sqlalchemy.event.listen(self._engine, "connect", lambda made, _record: self._connections.append(made))
            try:
                self.run_now(partial(_check_version if reads else _migrate, name=self.name))
            except BaseException:
                self._engine.dispose()
                raise
        except ImportError as error:
            raise MixfuseError(
                f"{self.name} needs a driver that is not installed ({error.name}): pip install 'mixfuse[postgres]'",
                kind="trace_db",
            ) from error
        except (SQLAlchemyError, OSError) as error:
            raise MixfuseError(
                f"cannot open the trace database {self.name}: {_reason(error)}", kind="trace_db"
            ) from error
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mixfuse-database")
        self._reading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mixfuse-reading")

    async def run(self, work: Callable[[Connection], Result]) -> Result:
        """Runs `work` in one transaction, after all earlier calls; commits unless it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.run_now, work)

    async def read(self, work: Callable[[Connection], Result]) -> Result:
        """Runs `work`, which only reads, beside the calls of `run`: a long search keeps no writer waiting."""
        return await asyncio.get_running_loop().run_in_executor(self._reading, self._read_now, work)

    def _read_now(self, work: Callable[[Connection], Result]) -> Result:
        with self._engine.connect().execution_options(mixfuse_reads=True) as connection, connection.begin():
            return work(connection)

    def run_now(self, work: Callable[[Connection], Result]) -> Result:
        """As `run`, but in the calling thread."""
        with self._engine.connect() as connection, connection.begin():
            return work(connection)

    def close(self) -> None:
        """Waits for all earlier calls, then closes the database; hangs up on a server that does not answer."""
        self._reading.shutdown(wait=False, cancel_futures=True)
        try:
            self._thread.submit(lambda: None).result(_CLOSE_S)
        except TimeoutError:
            self._hang_up()
        self._thread.shutdown(cancel_futures=True)
        self._engine.dispose()

    def _hang_up(self) -> None:
        """Ends the connections under the thread that waits for their server: else the process could not end."""
        for connection in self._connections:
            try:
                with socket.socket(fileno=os.dup(connection.fileno())) as connected:
                    connected.shutdown(socket.SHUT_RDWR)
            except Exception:  # the driver's own, and SQLite's connection, which is no socket, gives up by itself
                logger.debug("a connection could not be ended", exc_info=True)


@contextmanager
def opened(where: str | Path, *, create: bool = True, reads: bool = False) -> Iterator[Database]:
    """Opens a database for the duration of a block; arguments and errors as for `Database`."""
    database = Database(where, create=create, reads=reads)
    try:
        yield database
    finally:
        database.close()


def probe(connection: Connection) -> None:
    """Checks that the database can be written; the write is rolled back."""
    with connection.begin_nested() as inside:
        connection.execute(text("UPDATE schema_version SET version = version"))
        inside.rollback()


def _url(where: str | Path) -> URL:
    if "://" not in str(where):
        return URL.create("sqlite", database=str(where))
    try:
        url = make_url(str(where))
    except ArgumentError:
        raise MixfuseError(f"the database URL {str(where).partition('://')[0]}://… cannot be read") from None
    if url.drivername in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise MixfuseError(f"the database is a path, a sqlite:///… or a postgresql://… URL, not {url.drivername}://…")
    return url


def _engine(url: URL, *, reads: bool = False) -> Engine:
    if url.get_backend_name() != "sqlite":
        # One thread needs one connection. It is tested before each use, because the server may have been restarted.
        options = {"options": "-c default_transaction_read_only=on"} if reads else {}
        return sqlalchemy.create_engine(
            url, pool_size=1, max_overflow=1, pool_pre_ping=True, connect_args={"connect_timeout": 10, **options}
        )
    engine = sqlalchemy.create_engine(url, connect_args={"check_same_thread": False, "timeout": 30})

    @sqlalchemy.event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # we begin transactions ourselves; the driver would guess where
        if reads:
            connection.execute("PRAGMA query_only=ON")
            return
        connection.execute("PRAGMA journal_mode=WAL")  # readers beside the writer
        connection.execute("PRAGMA synchronous=NORMAL")  # safe with WAL; a power cut may lose the last transactions

    @sqlalchemy.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # Lock for writing at once: a reader that becomes a writer would fail instead of waiting for another process.
        only_reads = reads or connection.get_execution_options().get("mixfuse_reads")
        connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")

    return engine


def _check_version(connection: Connection, name: str) -> None:
    """Checks that nothing is to be written before this version can read the database."""
    if not sqlalchemy.inspect(connection).has_table("schema_version"):
        raise MixfuseError(f"{name} is no database of mixfuse", kind="trace_db")
    version = connection.execute(text("SELECT version FROM schema_version")).scalar() or 0
    if version != len(MIGRATIONS):
        age, mend = (
            ("an older", "start the gateway on it once") if version < len(MIGRATIONS) else ("a newer", "upgrade")
        )
        raise MixfuseError(
            f"{name} was written by {age} mixfuse (its schema is version {version}, this one reads "
            f"{len(MIGRATIONS)}); {mend}",
            kind="trace_db",
        )


def _migrate(connection: Connection, name: str) -> None:
    if connection.dialect.name == "postgresql":  # several gateways may start at the same time
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
    connection.execute(text("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)"))
    version = connection.execute(text("SELECT version FROM schema_version")).scalar()
    if version is not None and version > len(MIGRATIONS):
        raise MixfuseError(
            f"{name} was written by a newer mixfuse (its schema is version {version}, this one knows "
            f"{len(MIGRATIONS)}); upgrade, or name another trace_db",
            kind="trace_db",
        )
    if version == len(MIGRATIONS):
        return
    for step in MIGRATIONS[version or 0 :]:
        for statement in step:
            connection.execute(text(statement))
    connection.execute(text("DELETE FROM schema_version"))
    connection.execute(text("INSERT INTO schema_version VALUES (:version)"), {"version": len(MIGRATIONS)})


def _reason(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).strip()
