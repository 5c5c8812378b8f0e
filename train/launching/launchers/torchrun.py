"""Several machines by torchrun: every host runs the same command, and they meet at one of them (c10d rendezvous)."""

import socket
from collections.abc import Sequence

from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.launching.launchers.job import PORT, Job, Launch, Machines, torchrun_command


def launch_torchrun(job: Job, machines: Machines) -> Launch:
    """Starts this host's share of the job.

    The other machines reach this one at `machines.local_addr`, or by the name that the list of hosts has for it.

    Raises:
        MixfuseError: Neither the hosts, nor their number and where they meet, are named.
    """
    hosts = machines.hosts
    rendezvous = machines.rendezvous or (hosts[0] if hosts else None)
    nodes = machines.nodes or len(hosts)
    if rendezvous is None or not nodes:
        raise MixfuseError("torchrun needs the machines' meeting point: --hosts A,B,… or --nodes N --rdzv HOST:PORT")
    endpoint = rendezvous if ":" in rendezvous else f"{rendezvous}:{PORT}"
    address = machines.local_addr or _named_here(hosts)
    meet = [f"--local-addr={address}"] if address else []
    meet += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={job.name}"]
    return Launch(
        [*torchrun_command(job), f"--nnodes={nodes}", *meet, "--no-python", *job.command],
        note=f"# on each of {', '.join(hosts)}:" if hosts else f"# on each of {nodes} machines:",
    )


def _named_here(hosts: Sequence[str]) -> str | None:
    """The one of these hosts that is this machine, by name or address; None if that is not clear."""
    import psutil

    addresses = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}

    def is_here(host: str) -> bool:
        if host in (socket.gethostname(), socket.getfqdn()):
            return True
        try:
            return bool({str(found[4][0]) for found in socket.getaddrinfo(host, None)} & addresses)
        except OSError:  # no such name
            return False

    here = [host for host in hosts if is_here(host)]
    return here[0] if len(here) == 1 else None
