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
from functools import partial
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
    stop = threading.Event()
    watch = partial(_watch, store, rank, world, stop=stop, beat=beat, silence=silence)
    threading.Thread(target=watch, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        stop.set()


def _watch(store: Any, rank: int, world: int, *, stop: threading.Event, beat: float, silence: float) -> None:
    heard = dict.fromkeys(range(world), (0, time.monotonic()))
    count = 0
    while not stop.wait(beat):
        count += 1
        try:
            store.set(f"beat{rank}", str(count))
            if rank == 0:
                lost = _silent(store, heard, silence)
                if lost is not None:
                    _say(f"rank {lost} on {store.get(f'host{lost}').decode()} has not answered for {silence:.0f} s")
                    store.set(_LOST, str(lost))
                    time.sleep(2 * beat)  # the others read it from this process
                    os._exit(EXIT_CODE)
            elif store.check([_LOST]):
                os._exit(EXIT_CODE)
        except RuntimeError:  # torch's type of error for a store that is gone; a launcher may see to it meanwhile
            if not stop.wait(silence):
                _say(f"rank 0 on {os.environ['MASTER_ADDR']} is gone")
                os._exit(EXIT_CODE)


def _silent(store: Any, heard: dict[int, tuple[int, float]], silence: float) -> int | None:
    """The first rank that has not been heard for too long; times are this process's own."""
    now = time.monotonic()
    for rank, (last, since) in heard.items():
        count = int(store.get(f"beat{rank}")) if store.check([f"beat{rank}"]) else 0
        if count != last:
            heard[rank] = (count, now)
        elif now - since > silence:
            return rank
    return None


def _say(what: str) -> None:
    """Says why the process ends now: its main thread is inside a collective, where no exception would reach it."""
    hint = "see what it or its machine wrote last, then run the same command again"
    print(f"mixfuse: error: {what}; the run ends here; {hint}", file=sys.stderr, flush=True)
