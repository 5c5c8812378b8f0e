"""One machine: torchrun on this one, at a free port."""

from mixfuse.train.launching.launchers.job import Job, Launch, Machines, torchrun_command
from mixfuse.train.processes.graceful_torchrun import ON_THIS_MACHINE


def launch_local(job: Job, machines: Machines) -> Launch:
    """Starts the job's processes on this machine; `machines` has nothing to add."""
    return Launch([*torchrun_command(job), *ON_THIS_MACHINE, "--no-python", *job.command])
