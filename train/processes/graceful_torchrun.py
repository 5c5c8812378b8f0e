"""torchrun for runs that SIGTERM may stop: it waits while they save, and returns how they ended.

    python -m mixfuse.train.processes.graceful_torchrun [torchrun's own options] --no-python COMMAND …

starts the processes of this machine exactly as `torchrun` does. Three things differ:

- On SIGTERM, torchrun gives its workers 30 seconds (`--shutdown-timeout`) and kills them. This one forwards the signal
  and waits, because saving a checkpoint may take longer. A second SIGTERM ends the workers as torchrun would.
- torchrun exits with 1 after any failure. This one exits with 75 when the run was stopped and can resume, 2 when it
  failed, 130 after Ctrl-C.
- The workers get settings of the C library's allocator, which a process cannot set for itself, and of CUDA's.
"""

import os
import signal
import sys
from types import FrameType
from typing import Any

from mixfuse.contracts.errors import PREEMPTED, MixfuseError, Preempted, exit_code
from mixfuse.train.processes.worker import allocate_in_segments, threads

ON_THIS_MACHINE = ("--standalone", "--local-addr=127.0.0.1")
"""Options for processes of one machine. By itself torchrun publishes the machine's full name, which may not resolve."""
# ZeRO-3 gathers big tensors that live for a moment. By default glibc returns each to the kernel and faults the next one
# in again. These settings keep the memory in the process: DPO on the tiny base took 10 s with them, 23 s without.
QUIET_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def torchrun(arguments: list[str]) -> None:
    """Starts this machine's processes and waits for them.

    torchrun runs in this process, not in a child. Its handlers for SIGINT and SIGHUP are then installed here, so that
    neither signal leaves processes behind that continue training.

    Args:
        arguments: Arguments of `torchrun`.

    Raises:
        Preempted: SIGTERM arrived, or a process ended because of one.
        MixfuseError: A process failed.
        KeyboardInterrupt: SIGINT or SIGHUP arrived.
    """
    forwarded = _forward_sigterm()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torch_torchrun

    os.environ.update(QUIET_ALLOCATOR)
    allocate_in_segments()
    count = next((int(text.partition("=")[2]) for text in arguments if text.startswith("--nproc-per-node=")), 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads(None, count)))  # torchrun would say 1, and warn
    try:
        torch_torchrun(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *arguments])
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        raise _as_mixfuse_error(error, terminated=bool(forwarded)) from None


def _forward_sigterm() -> list[bool]:
    """Forwards SIGTERM to the workers, once; returns a list that is empty until then."""
    import psutil

    forwarded: list[bool] = []

    def handler(number: int, frame: FrameType | None) -> None:
        workers = psutil.Process().children()
        if forwarded or not workers:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun now sends SIGTERM to the workers itself
            raise Preempted("stopped by SIGTERM; the same command resumes from the last checkpoint")
        forwarded.append(True)
        for worker in workers:
            worker.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, handler)
    return forwarded


def _as_mixfuse_error(error: Any, *, terminated: bool) -> MixfuseError:
    """Translates a `ChildFailedError`.

    A process exits with 75 once all of them have saved; a process that SIGTERM reached before its handler was installed
    is ended by the signal. Among failures, one that left a reason (`contracts/errors.py`) comes before those that only
    lost their connection to it.
    """
    failures = error.failures
    codes = {failure.exitcode for failure in failures.values()}
    if PREEMPTED in codes or (terminated and codes == {-signal.SIGTERM}):
        return Preempted("stopped by SIGTERM; the same command resumes from the last checkpoint")
    reasons = {rank: failure.error_file_data.get("message") for rank, failure in failures.items()}
    rank = min(failures, key=lambda rank: (not reasons[rank], failures[rank].timestamp))
    code = failures[rank].exitcode
    hint = reasons[rank] or "see the lines above"
    if code == -signal.SIGKILL:
        hint = "it was killed, most often because memory ran out: lower optimizer.micro_batch or processes"
    return MixfuseError(f"process {rank} failed (exit code {code}): {hint}", kind="training")


def main() -> int:
    """Runs `python -m mixfuse.train.processes.graceful_torchrun`; returns its exit code."""
    return exit_code(lambda: torchrun(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
