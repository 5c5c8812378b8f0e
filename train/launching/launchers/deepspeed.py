"""DeepSpeed's launcher with a host file, by pdsh and ssh if the file names other machines."""

import re
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.launching.launchers.job import PORT, Command, Job, Launch, Machines


def launch_deepspeed(job: Job, machines: Machines) -> Launch:
    """Starts the job on every machine of the host file.

    The machines meet at `machines.rendezvous` (HOST:PORT), by default at the first host and torch's usual port.

    Raises:
        MixfuseError: The host file is missing, or a line is not `HOST slots=N`.
    """
    if machines.hostfile is None:
        raise MixfuseError("name a host file: --deepspeed HOSTFILE, with a line `HOST slots=N` for each machine")
    hosts = read_hostfile(machines.hostfile)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={machines.hostfile}"]
    first = next(iter(hosts))
    only_here = len(hosts) == 1 and first in ("localhost", "127.0.0.1", socket.gethostname())
    if only_here:  # DeepSpeed would still ask ssh whether that host answers
        command.append("--no_ssh_check")
    host, _, port = (machines.rendezvous or ("127.0.0.1" if only_here else first)).partition(":")
    command += [f"--master_addr={host}", f"--master_port={port or PORT}"]
    return Launch([*command, "--no_python", "--no_local_rank", *job.command], start=supervise)


def read_hostfile(path: Path) -> dict[str, int]:
    """Reads DeepSpeed's host file: number of processes by host.

    Raises:
        MixfuseError: It is missing or empty, or a line is not `HOST slots=N`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise MixfuseError(f"{path}: cannot be read: {error.strerror}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        entry = re.fullmatch(r"(\S+)\s+slots=(\d+)", line)
        if not entry:
            raise MixfuseError(f"{path}:{number}: expected `HOST slots=N`, found {line!r}")
        if entry[1] in hosts:
            raise MixfuseError(f"{path}:{number}: {entry[1]} is named twice")
        hosts[entry[1]] = int(entry[2])
    if not hosts:
        raise MixfuseError(f"{path}: names no host; write a line `HOST slots=N` for each")
    return hosts


def supervise(command: Command) -> int:
    """Runs DeepSpeed's launcher until it ends; SIGTERM goes to the training processes, which save.

    By itself its `runner.py` would end and leave them behind, and its `launch.py` would kill them after 30 seconds.

    Returns:
        The launcher's exit code, which is that of the first process that failed.

    Raises:
        KeyboardInterrupt: After Ctrl-C, once everything has ended.
    """
    import psutil

    launcher = psutil.Popen(command, start_new_session=True)

    def forward_sigterm(number: int, frame: FrameType | None) -> None:
        processes = [*launcher.children(recursive=True), launcher]
        for process in [process for process in processes if _is_rank(process)] or processes:
            process.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, forward_sigterm)
    try:
        code = int(launcher.wait())
    except KeyboardInterrupt:
        for process in [*launcher.children(recursive=True), launcher]:
            process.send_signal(signal.SIGINT)
        launcher.wait()
        raise
    return code if code >= 0 else 128 - code  # a shell's code for a process that a signal ended


def _is_rank(process: Any) -> bool:
    import psutil

    try:
        return "RANK" in process.environ()
    except psutil.Error:  # the process has just ended
        return False
