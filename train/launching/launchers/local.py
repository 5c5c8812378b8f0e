"""One machine: torchrun on this one, at a free port."""

from mixfuse.train.launching.launchers.job import Job, Launch, Machines, torchrun_command


def launch_local(job: Job, machines: Machines) -> Launch:
    """Starts the job's processes on this machine; `machines` has nothing to add."""
    return Launch([*torchrun_command(job), "--standalone", "--no-python", *job.command])
