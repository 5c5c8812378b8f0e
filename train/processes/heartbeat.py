"""Dead ranks: a process that no longer answers ends the run, instead of leaving the others to wait for it.

A launcher sees the processes of its own machine die, and gloo sees a closed connection. But a collective over NCCL
whose peer on another machine is gone waits for its time-out, which is half an hour here because loading a large model
may take as long. So each process counts aloud in a store of its own (`torch.distributed.TCPStore`, not the one that
collectives use); rank 0 listens, and when one has been silent too long, or the store itself is gone with rank 0's
machine, every process ends.
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

BEAT = 5.0  # seconds between beats
SILENCE = 40.0  # seconds without one: with a beat and its reading on top, a dead rank ends the job within a minute
EXIT_CODE = 76  # a process that ends because another is dead

_LOST = "lost"


@contextmanager
def heartbeat(*, beat: float = BEAT, silence: float = SILENCE) -> Iterator[None]:
    """Watches over all ranks while the block runs. All ranks must enter it; torch.distributed must be up.

    Args:
        beat: Seconds between a rank's beats.
        silence: Seconds without a beat after which a rank is taken for dead.
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
        leader = distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
    port = torch.tensor([leader.port if leader else 0])
    if distributed.get_backend() == "nccl":
        port = port.to("cuda")
    distributed.broadcast(port, 0)
    store = distributed.TCPStore(host, int(port.item()), is_master=False, wait_for_workers=False, timeout=wait)
    store.set(f"host{rank}", socket.gethostname())
    distributed.barrier()  # every rank has one
    talk = _Talk(store, rank, world, beat, silence)
    for loop in (talk.beat_on, talk.listen):
        threading.Thread(target=loop, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        talk.stop.set()


class _Talk:
    """One rank's part: a thread that beats, and one that sees whether that thread still gets answers.

    Two, because a call to a store whose process is frozen or whose machine is gone may never return.
    """

    def __init__(self, store: Any, rank: int, world: int, beat: float, silence: float) -> None:
        self.stop = threading.Event()
        self._store, self._rank, self._beat, self._silence = store, rank, beat, silence
        self._heard = dict.fromkeys(range(world), (0, time.monotonic()))
        self._answered = time.monotonic()

    def beat_on(self) -> None:
        """Counts; ends when the store does, which `listen` notices."""
        count = 0
        while not self.stop.wait(self._beat):
            count += 1
            try:
                self._store.set(f"beat{self._rank}", str(count))
                if self._rank == 0:
                    self._look_for_silence()
                elif self._store.check([_LOST]):
                    os._exit(EXIT_CODE)
            except RuntimeError:  # torch's type of error for a store that is gone; a launcher may see to it meanwhile
                return
            self._answered = time.monotonic()

    def listen(self) -> None:
        """Ends this process when the store has not answered for too long."""
        while not self.stop.wait(self._beat):
            if time.monotonic() - self._answered > self._silence:
                self._end(f"rank 0 on {os.environ['MASTER_ADDR']}")

    def _look_for_silence(self) -> None:
        now = time.monotonic()  # times are rank 0's own: machines' clocks differ
        for rank, (last, since) in self._heard.items():
            key = f"beat{rank}"
            count = int(self._store.get(key)) if self._store.check([key]) else 0
            if count != last:
                self._heard[rank] = (count, now)
            elif now - since > self._silence:
                self._store.set(_LOST, str(rank))
                time.sleep(2 * self._beat)  # the others read it from this process
                self._end(f"rank {rank} on {self._store.get(f'host{rank}').decode()}")

    def _end(self, who: str) -> None:
        """Says why and ends the process: its main thread is inside a collective, where no exception would reach it."""
        print(
            f"mixfuse: error: {who} has not answered for {self._silence:.0f} s; the run ends here; see what it or its "
            "machine wrote last, then run the same command again",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_CODE)
