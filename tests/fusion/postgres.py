"""A throwaway PostgreSQL server for tests, where its programs are installed (`apt-get install postgresql`)."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy


@dataclass(frozen=True)
class Postgres:
    """A running server, which can be stopped and started again, and halted so that it keeps its connections silent."""

    url: str
    stop: Callable[[], None]
    start: Callable[[], None]
    halt: Callable[[], None]
    go_on: Callable[[], None]


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Runs a server of its own on a free loopback port. Skips the test where there is none."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed here: apt-get install postgresql")
    # Not pytest's folder: the server does not run as root, and must be able to get there.
    folder = Path(tempfile.mkdtemp(prefix="mixfuse-postgres-"))
    as_whom: dict[str, Any] = {}
    if os.geteuid() == 0:  # as which PostgreSQL refuses to run
        user = next(name for name in ("postgres", "nobody") if name in {entry.pw_name for entry in pwd.getpwall()})
        as_whom = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
        shutil.chown(folder, user)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [programs / program, "-D", folder / "data", *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=120,
            cwd=folder,
            **as_whom,
        )

    def start() -> None:
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories='' -c fsync=off"
        run("pg_ctl", "start", "-w", "-s", "-l", str(folder / "log"), "-o", options)

    def stop() -> None:
        run("pg_ctl", "stop", "-m", "fast", "-s")

    def signal_all(number: signal.Signals) -> None:
        first = psutil.Process(int((folder / "data" / "postmaster.pid").read_text().split()[0]))
        for process in (first, *first.children(recursive=True)):
            process.send_signal(number)

    try:
        run("initdb", "-A", "trust", "-U", "mixfuse", "-E", "UTF8", "--no-sync")
        start()
        try:
            yield Postgres(
                f"postgresql://mixfuse@127.0.0.1:{port}/postgres",
                stop,
                start,
                halt=partial(signal_all, signal.SIGSTOP),
                go_on=partial(signal_all, signal.SIGCONT),
            )
        finally:
            stop()
    finally:
        shutil.rmtree(folder)


def emptied(server: Postgres) -> str:
    """Takes everything out of its database; returns the URL."""
    engine = sqlalchemy.create_engine(server.url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("DROP SCHEMA public CASCADE"))
        connection.execute(sqlalchemy.text("CREATE SCHEMA public"))
    engine.dispose()
    return server.url


def _programs() -> Path | None:
    found = shutil.which("initdb")
    candidates = [Path(found).resolve().parent] if found else []
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((path for path in candidates if (path / "initdb").exists() and (path / "pg_ctl").exists()), None)
