"""Several worker processes that are one gateway: started, replaced when they die, and ended together.

The parent serves nothing. It forks the workers before it has any thread, so a worker starts in tenths of a second and
inherits the config, its socket and the memory of the shared numbers (`mixfuse.fusion.calls.board`). Each worker listens
on a socket of its own on the same port, and the kernel spreads the connections over them. The parent holds all the
sockets: connections to a worker that died wait for the one that takes its place.
"""

import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType

from mixfuse.contracts.errors import MixfuseError

logger = logging.getLogger(__name__)

Work = Callable[[int, Callable[[], None], int], None]
"""What worker number N does until it ends: (N, what it calls once it serves, a file that ends when the parent does)."""

# A worker that has not ended so long after its requests had to is killed.
_END_S = 15
_AGAIN_S = 1.0
_READY = b"ready"


def run(count: int, work: Work, *, drain_s: int, ready: Callable[[], None]) -> int:
    """Runs so many workers until a signal ends them.

    Args:
        count: The number of workers.
        work: What each does.
        drain_s: Seconds that open requests get at the end.
        ready: Called once when all serve.

    Returns:
        The signal.

    Raises:
        MixfuseError: One could not start.
    """
    parent = _Parent(work, drain_s)
    try:
        for number in range(count):
            parent.start(number)
        for failure in filter(None, [parent.started(number) for number in range(count)]):
            raise MixfuseError(failure)
        if not parent.ending:
            ready()
        parent.watch()
    finally:
        parent.end(signal.SIGTERM)
        parent.watch()
        signal.alarm(0)
    return parent.ending[0]


class _Parent:
    """The workers as their parent sees them.

    Attributes:
        ending: The signals that came, in order.
    """

    def __init__(self, work: Work, drain_s: int) -> None:
        self._work, self._drain_s = work, drain_s
        self._running: dict[int, int] = {}  # process → number
        self._starting: dict[int, int] = {}  # number → the pipe in which a worker says that it serves, or why not
        self._alive, self._held = os.pipe()
        self.ending: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGALRM, self._on_alarm)

    def start(self, number: int) -> None:
        """Starts a worker."""
        told, tell = os.pipe()
        # A signal waits until the worker is known, and in the worker until it has handlers of its own.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        process = os.fork()
        if process == 0:
            self._be_worker(number, tell)
        self._running[process] = number
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
        os.close(tell)
        self._starting[number] = told

    def started(self, number: int) -> str | None:
        """Waits until a worker serves; returns why it does not, or None."""
        with os.fdopen(self._starting.pop(number), "rb") as pipe:
            said = pipe.read()
        if said == _READY or self.ending:
            return None
        return said.decode(errors="replace") or f"worker {number + 1} ended before it served; its error is above"

    def watch(self) -> None:
        """Replaces workers that end, until a signal has come and all have ended."""
        while self._running:
            process, status = os.waitpid(-1, 0)
            number = self._running.pop(process, None)
            if number is None or self.ending:
                continue
            logger.error("worker %d ended (%s); another takes its place", number + 1, _how(status))
            self._replace(number)

    def _replace(self, number: int) -> None:
        while not self.ending:
            self.start(number)
            failure = self.started(number)
            if failure is None:
                return
            logger.error("worker %d cannot start: %s", number + 1, failure)
            failed = next(process for process, of in self._running.items() if of == number)
            os.waitpid(failed, 0)
            del self._running[failed]
            time.sleep(_AGAIN_S)

    def end(self, how: int) -> None:
        """Asks all workers to end."""
        self.ending.append(how)
        for process in list(self._running):
            os.kill(process, how)
        if len(self.ending) == 1:
            signal.alarm(self._drain_s + _END_S)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.end(number)

    def _on_alarm(self, _number: int, _frame: FrameType | None) -> None:
        for process in list(self._running):
            os.kill(process, signal.SIGKILL)

    def _be_worker(self, number: int, tell: int) -> None:
        """Works in the forked process, and ends it."""
        code = 1
        try:
            os.setpgid(0, 0)  # Ctrl-C comes from the parent, once
            for one in (signal.SIGTERM, signal.SIGALRM):
                signal.signal(one, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
            os.close(self._held)
            self._work(number, lambda: _tell(tell, _READY), self._alive)
            code = 0
        except KeyboardInterrupt:
            code = 0
        except MixfuseError as error:
            code = 2
            _tell(tell, str(error).encode())
        except BaseException:
            logger.exception("worker %d failed", number + 1)
        finally:
            sys.stderr.flush()
            os._exit(code)


def _tell(pipe: int, what: bytes) -> None:
    try:
        os.write(pipe, what)
        os.close(pipe)
    except OSError:  # the worker failed after it served, and nobody listens
        logger.error("%s", what.decode(errors="replace"))


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def tcp_socket(family: int = socket.AF_INET) -> socket.socket:
    """Makes a socket that names its protocol, or asyncio leaves Nagle's algorithm on: 40 ms in each answer.

    uvloop switches it off in any case.
    """
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)


def listeners(first: socket.socket, count: int) -> list[socket.socket]:
    """Replaces a listening socket by several on its port, over which the kernel spreads the connections.

    The first one has made sure that no other program listens there.
    """
    address, family = first.getsockname(), first.family
    first.close()
    made = [tcp_socket(family) for _ in range(count)]
    try:
        for one in made:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind(address)
            one.listen(2048)
    except OSError as error:
        close(made)
        raise MixfuseError(f"cannot listen on {address[0]}:{address[1]}: {error.strerror}") from None
    return made


def close(sockets: Iterable[socket.socket]) -> None:
    """Closes sockets."""
    for one in sockets:
        one.close()


def folder() -> Path:
    """Makes a folder for the workers' files, in memory where the system has such a place: a full disk stops nothing."""
    memory = Path("/dev/shm")  # noqa: S108 - the folder in it is private
    return Path(tempfile.mkdtemp(prefix="mixfuse-gateway-", dir=memory if os.access(memory, os.W_OK) else None))


def remove(made: Path) -> None:
    """Removes that folder."""
    shutil.rmtree(made, ignore_errors=True)


def check(count: int, limits: Sequence[tuple[str, int | None]]) -> None:
    """Checks that so many workers can run and share these limits of calls at once.

    Raises:
        MixfuseError: They cannot.
    """
    if not hasattr(os, "memfd_create") or not hasattr(socket, "SO_REUSEPORT"):
        raise MixfuseError("--workers needs Linux; leave it out to run one process")
    for name, most in limits:
        if most is not None and most < count:
            raise MixfuseError(
                f"max_concurrency {most} of {name!r} cannot be divided among {count} workers; "
                "raise it, or lower --workers"
            )
