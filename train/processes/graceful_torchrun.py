"""torchrun, for runs that may be asked to stop: it waits while they save, and passes on how they ended.

    python -m mixfuse.train.processes.graceful_torchrun [torchrun's own options] --no-python COMMAND …

starts the processes of this machine exactly as `torchrun` does. Three things differ. On SIGTERM, torchrun gives its
workers 30 seconds (`--shutdown-timeout`) and kills them; this one hands the signal on and waits, because saving a
checkpoint takes as long as it takes (a second SIGTERM is obeyed as torchrun would). torchrun exits with 1 whatever
happened; this one with 75 when the run was stopped and can go on, 2 when it failed, 130 after Ctrl-C. And the workers
get the allocator's settings below, which a process cannot set for itself.
"""

import os
import signal
import sys
from types import FrameType
from typing import Any

from mixfuse.contracts.errors import PREEMPTED, MixfuseError, Preempted, exit_code
from mixfuse.train.processes.worker import threads

# What ZeRO-3 gathers are big tensors that live for a moment. By default glibc returns each to the kernel and faults the
# next one in again (DPO on the tiny base took 23 s so, and 10 s with these); these keep the memory in the process.
QUIET_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def torchrun(arguments: list[str]) -> None:
    """Starts this machine's processes and waits for them.

    torchrun is called rather than started: its handlers for SIGINT and SIGHUP then stand in this process, and none of
    these leaves processes behind that go on training.

    Args:
        arguments: As `torchrun` takes them.

    Raises:
        Preempted: SIGTERM came, or a process ended as one that had been asked to stop.
        MixfuseError: A process failed.
        KeyboardInterrupt: SIGINT or SIGHUP came.
    """
    asked = _hand_on_sigterm()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torch_torchrun

    os.environ.update(QUIET_ALLOCATOR)
    count = next((int(text.partition("=")[2]) for text in arguments if text.startswith("--nproc-per-node=")), 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads(None, count)))  # torchrun would say 1, and warn
    try:
        torch_torchrun(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *arguments])
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        raise _ending(error, asked=bool(asked)) from None


def _hand_on_sigterm() -> list[bool]:
    """Hands SIGTERM on to the workers, once; returns a list that is empty until then."""
    import psutil

    asked: list[bool] = []

    def handler(number: int, frame: FrameType | None) -> None:
        workers = psutil.Process().children()
        if asked or not workers:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the workers by SIGTERM, this process is done
            raise Preempted("stopped by SIGTERM; the same command goes on from the last checkpoint")
        asked.append(True)
        for worker in workers:
            worker.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, handler)
    return asked


def _ending(error: Any, *, asked: bool) -> MixfuseError:
    """What a `ChildFailedError` means.

    A process ends with 75 once all of them have saved; one that SIGTERM met before it could listen is just gone. Of
    failures, one that left a reason (`contracts/errors.py`) counts before those that only lost their connection to it.
    """
    failures = error.failures
    codes = {failure.exitcode for failure in failures.values()}
    if PREEMPTED in codes or (asked and codes == {-signal.SIGTERM}):
        return Preempted("stopped by SIGTERM; the same command goes on from the last checkpoint")
    reasons = {rank: failure.error_file_data.get("message") for rank, failure in failures.items()}
    rank = min(failures, key=lambda rank: (not reasons[rank], failures[rank].timestamp))
    code = failures[rank].exitcode
    hint = reasons[rank] or "the lines above say why"
    if code == -signal.SIGKILL:
        hint = "something killed it, most often for want of memory: lower optimizer.micro_batch or processes"
    return MixfuseError(f"process {rank} failed (exit code {code}): {hint}", kind="training")


def main() -> int:
    """`python -m mixfuse.train.processes.graceful_torchrun`."""
    return exit_code(lambda: torchrun(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
