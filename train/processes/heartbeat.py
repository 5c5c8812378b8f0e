"""Dead ranks: the run ends when a process no longer responds, instead of waiting for it.

A launcher notices when a process of its own machine dies, and gloo notices a closed connection. But an NCCL collective
whose peer on another machine is gone waits for its time-out, which is half an hour unless the recipe says otherwise,
because loading a large model may take that long. So each process writes an increasing count into a separate store
(`torch.distributed.TCPStore`, not the one that collectives use), and rank 0 reads the counts. When one has not changed
for too long, or when the store is gone with rank 0's machine, every process ends.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from mixfuse.train.processes import worker

BEAT = 5.0  # seconds between beats
SILENCE = 40.0  # seconds without a beat; with the delays of beating and reading, a dead rank ends the job in a minute
EXIT_CODE = 76  # of a process that ends because another is dead

_LOST = "lost"


@contextmanager
def heartbeat(*, beat: float = BEAT, silence: float = SILENCE) -> Iterator[None]:
    """Monitors all ranks while the block runs. All ranks must enter it; torch.distributed must be initialised.

    Args:
        beat: Seconds between a rank's beats.
        silence: Seconds without a beat after which a rank counts as dead.

    Raises:
        MixfuseError: The chosen port is taken.
    """
    import torch
    from torch import distributed

    rank, world = distributed.get_rank(), distributed.get_world_size()
    if world == 1:
        yield
        return
    host = os.environ["MASTER_ADDR"]  # where rank 0 is
    wait = timedelta(seconds=silence / 2)
    leader = None
    if rank == 0:
        chosen = worker.ports()
        own = chosen[1] if chosen else 0
        with worker.opening(own):
            leader = distributed.TCPStore(host, own, is_master=True, wait_for_workers=False, timeout=wait)
    port = torch.tensor([leader.port if leader else 0], device=worker.device())
    distributed.broadcast(port, 0)
    store = distributed.TCPStore(host, int(port.item()), is_master=False, wait_for_workers=False, timeout=wait)
    store.set(f"host{rank}", socket.gethostname())
    distributed.barrier()  # every rank is connected
    monitor = _Monitor(store, rank, world, beat, silence)
    for loop in (monitor.send_beats, monitor.watch_store):
        threading.Thread(target=loop, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        monitor.stop.set()


class _Monitor:
    """One rank's two threads: one sends beats, the other checks that the first still gets answers from the store.

    Two threads, because a call to a store whose process is frozen or whose machine is gone may never return.
    """

    def __init__(self, store: Any, rank: int, world: int, beat: float, silence: float) -> None:
        self.stop = threading.Event()
        self._store, self._rank, self._beat, self._silence = store, rank, beat, silence
        self._last_beats = dict.fromkeys(range(world), (0, time.monotonic()))
        self._answered = time.monotonic()

    def send_beats(self) -> None:
        """Writes this rank's count; on rank 0 checks the others. Returns when the store is gone (see `watch_store`)."""
        count = 0
        while not self.stop.wait(self._beat):
            count += 1
            try:
                self._store.set(f"beat{self._rank}", str(count))
                if self._rank == 0:
                    self._check_beats()
                elif self._store.check([_LOST]):
                    os._exit(EXIT_CODE)
            except RuntimeError:  # what torch raises when the store is gone; a launcher may already be ending the run
                return
            self._answered = time.monotonic()

    def watch_store(self) -> None:
        """Ends this process when the store has not answered for too long."""
        while not self.stop.wait(self._beat):
            if time.monotonic() - self._answered > self._silence:
                self._end(f"rank 0 on {os.environ['MASTER_ADDR']}")

    def _check_beats(self) -> None:
        now = time.monotonic()  # rank 0's clock alone: machines' clocks differ
        for rank, (last, since) in self._last_beats.items():
            key = f"beat{rank}"
            count = int(self._store.get(key)) if self._store.check([key]) else 0
            if count != last:
                self._last_beats[rank] = (count, now)
            elif now - since > self._silence:
                self._store.set(_LOST, str(rank))
                time.sleep(2 * self._beat)  # the other ranks read the mark from this process's store
                self._end(f"rank {rank} on {self._store.get(f'host{rank}').decode()}")

    def _end(self, who: str) -> None:
        """Prints the reason and ends the process: no exception would reach the main thread inside a collective."""
        print(
            f"mixfuse: error: {who} has not answered for {self._silence:.0f} s; the run ends here; see the last lines "
            "of its output, then run the same command again",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_CODE)
