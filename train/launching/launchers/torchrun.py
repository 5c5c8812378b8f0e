"""Several machines by torchrun: every host runs the same command, and they meet at one of them (c10d rendezvous)."""

from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.launching.launchers.job import PORT, Job, Launch, Machines, torchrun_command


def launch_torchrun(job: Job, machines: Machines) -> Launch:
    """Starts this host's share of the job.

    Raises:
        MixfuseError: Neither the hosts, nor their number and where they meet, are named.
    """
    hosts = machines.hosts
    rendezvous = machines.rendezvous or (hosts[0] if hosts else None)
    nodes = machines.nodes or len(hosts)
    if rendezvous is None or not nodes:
        raise MixfuseError("torchrun needs the machines' meeting point: --hosts A,B,… or --nodes N --rdzv HOST:PORT")
    endpoint = rendezvous if ":" in rendezvous else f"{rendezvous}:{PORT}"
    meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={job.name}"]
    return Launch(
        [*torchrun_command(job), f"--nnodes={nodes}", *meet, "--no-python", *job.command],
        note=f"# on each of {', '.join(hosts)}:" if hosts else f"# on each of {nodes} machines:",
    )
