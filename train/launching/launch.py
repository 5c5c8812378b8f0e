"""How a run is started where there is more than one process: the commands, written out and then executed as written.

One mixfuse command (`train …`, `experts profile …` or `doctor …`) runs in every process, under a launcher:

- local: torchrun on this machine;
- torchrun: the same command on each host, which meet at one of them (c10d rendezvous);
- deepspeed: DeepSpeed's launcher with a host file;
- Slurm: an sbatch file that starts torchrun on each node, and puts the job back in the queue when it was stopped.

`train/processes/graceful_torchrun.py` says why it is not the bare torchrun.
"""

import os
import re
import shlex
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from mixfuse.contracts.errors import PREEMPTED, MixfuseError
from mixfuse.contracts.files import write_text
from mixfuse.contracts.strict_yaml import load

Command = list[str]
STAGES = ("sft", "judge")
PORT = 29500  # where processes meet unless another is named; torch's and DeepSpeed's own


class Job(NamedTuple):
    """What runs in every process.

    Attributes:
        arguments: Those of the `mixfuse` command, such as `train STAGE RECIPE [key=value …]`.
        processes: On each machine.
        name: A short name.
        out: The run's folder, beside which Slurm's files stand; a name here for what leaves no run.
    """

    arguments: list[str]
    processes: int
    name: str
    out: Path

    @property
    def command(self) -> Command:
        """As each process runs it: by this Python, so that no PATH can choose another."""
        return [sys.executable, "-m", "mixfuse", *self.arguments]


def job(arguments: Sequence[str], processes: int | None) -> Job:
    """Reads what is to be launched; `train` is checked as `mixfuse train` would check it before starting anything.

    Args:
        arguments: A mixfuse command.
        processes: On each machine; by default the recipe's `processes`, or 1.

    Raises:
        MixfuseError: The command is none of these, or the recipe of `train` is bad.
    """
    match list(arguments):
        case ["train", stage, recipe_path, *overrides] if stage in STAGES:
            from mixfuse.train.run import RECIPES

            recipe = load(Path(recipe_path), RECIPES[stage], overrides)
            count = processes or recipe.processes
            return Job(list(arguments), count, f"mixfuse-{stage}", recipe.out)
        case ["experts", "profile", *_]:
            return Job(list(arguments), processes or 1, "mixfuse-experts", Path("mixfuse-experts"))
        case ["doctor", *_]:
            return Job(list(arguments), processes or 1, "mixfuse-doctor", Path("mixfuse-doctor"))
    raise MixfuseError(
        "launch runs `train sft RECIPE …`, `train judge RECIPE …`, `experts profile RECIPE …` or `doctor …` in several "
        "processes, not "
        f"{shlex.join(arguments)!r}"
    )


def local(job: Job) -> Command:
    """One machine's processes, at a free port."""
    return [*_torchrun(job), "--standalone", "--no-python", *job.command]


def torchrun(job: Job, *, nodes: int, rendezvous: str) -> Command:
    """The command that each of `nodes` hosts runs; they meet at `rendezvous`, HOST:PORT of one of them."""
    meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={rendezvous}", f"--rdzv-id={job.name}"]
    return [*_torchrun(job), f"--nnodes={nodes}", *meet, "--no-python", *job.command]


def deepspeed(job: Job, hostfile: Path, *, rendezvous: str | None) -> Command:
    """DeepSpeed's launcher, by pdsh and ssh where the host file names more than this machine.

    Args:
        job: What runs.
        hostfile: Its lines name hosts and how many processes each has.
        rendezvous: HOST:PORT of the first host; by default its name, and torch's usual port.

    Raises:
        MixfuseError: The host file is missing, or a line is not `HOST slots=N`.
    """
    hosts = read_hostfile(hostfile)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={hostfile}"]
    first = next(iter(hosts))
    alone = len(hosts) == 1 and first in ("localhost", "127.0.0.1", socket.gethostname())
    if alone:  # it would still ask ssh whether that host is there
        command.append("--no_ssh_check")
    host, _, port = (rendezvous or ("127.0.0.1" if alone else first)).partition(":")
    command += [f"--master_addr={host}", f"--master_port={port or PORT}"]
    return [*command, "--no_python", "--no_local_rank", *job.command]


def read_hostfile(path: Path) -> dict[str, int]:
    """Reads DeepSpeed's host file: processes by host.

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
        found = re.fullmatch(r"(\S+)\s+slots=(\d+)", line)
        if not found:
            raise MixfuseError(f"{path}:{number}: expected `HOST slots=N`, found {line!r}")
        if found[1] in hosts:
            raise MixfuseError(f"{path}:{number}: {found[1]} stands there twice")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise MixfuseError(f"{path}: names no host; write a line `HOST slots=N` for each")
    return hosts


def sbatch_file(job: Job, *, nodes: int, gpus: int, grace: int, options: Sequence[str]) -> str:
    """The text of an sbatch file.

    Slurm sends SIGTERM to the job's processes `grace` seconds before its time is up (`--signal`), or when it is
    preempted by a partition or QOS with a GraceTime. They save, and end with exit code 75; the file then puts the job
    back in the queue, where it waits for its turn and goes on from the checkpoint. Any other ending is final.

    Args:
        job: What runs.
        nodes: How many.
        gpus: On each node; 0 asks for none.
        grace: Seconds.
        options: Further sbatch options, `key=value` or `key`, e.g. partition=gpu or exclusive.
    """
    wanted: dict[str, Any] = {
        "job-name": job.name,
        "nodes": nodes,
        "ntasks-per-node": 1,
        **({"gpus-per-node": gpus} if gpus else {}),
        "signal": f"TERM@{grace}",
        "requeue": None,
        "open-mode": "append",  # a job that comes back goes on with its log
        "output": f"{job.out}-%j.log",
    }
    for option in options:
        key, separator, value = option.partition("=")
        wanted[key.removeprefix("--")] = value if separator else None
    directives = "\n".join(
        f"#SBATCH --{key}" + (f"={value}" if value is not None else "") for key, value in wanted.items()
    )
    meet = (
        '--nnodes="$SLURM_NNODES" --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" '
        '--rdzv-endpoint="$head:$port"'
    )
    return f"""#!/usr/bin/env bash
{directives}
# Written by `mixfuse launch --slurm`; see docs/launching.md.
set -u
cd {shlex.quote(os.getcwd())}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
# A task that fails takes the others down with it.
srun --kill-on-bad-exit=1 {shlex.join(_torchrun(job))} {meet} \\
  --no-python {shlex.join(job.command)}
code=$?
if [ "$code" -eq {PREEMPTED} ]; then # stopped by SIGTERM, and saved
  echo "requeue: job $SLURM_JOB_ID goes on from its last checkpoint"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def sbatch_path(job: Job) -> Path:
    """Where the sbatch file stands."""
    return job.out.with_name(job.out.name + ".sbatch")


def execute(command: Command) -> None:
    """Becomes the command: signals and exit code are its own.

    Raises:
        MixfuseError: There is no such program here.
    """
    try:
        os.execvp(command[0], command)  # noqa: S606 - no shell is wanted
    except FileNotFoundError:
        raise MixfuseError(f"{command[0]}: no such program on this machine") from None


def supervise(command: Command) -> int:
    """Runs DeepSpeed's launcher until it ends; SIGTERM goes to the training processes, which save.

    By itself its `runner.py` would end and leave them behind, and its `launch.py` would kill them after 30 seconds.

    Returns:
        The launcher's exit code: that of the first process that failed.

    Raises:
        KeyboardInterrupt: After Ctrl-C, when everything has ended.
    """
    import psutil

    child = psutil.Popen(command, start_new_session=True)

    def hand_on(number: int, frame: FrameType | None) -> None:
        family = [*child.children(recursive=True), child]
        for process in [member for member in family if _is_rank(member)] or family:
            process.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, hand_on)
    try:
        code = int(child.wait())
    except KeyboardInterrupt:
        for process in [*child.children(recursive=True), child]:
            process.send_signal(signal.SIGINT)
        child.wait()
        raise
    return code if code >= 0 else 128 - code  # as a shell says it


def _is_rank(process: Any) -> bool:
    import psutil

    try:
        return "RANK" in process.environ()
    except psutil.Error:  # it has just ended
        return False


def _torchrun(job: Job) -> Command:
    return [sys.executable, "-m", "mixfuse.train.processes.graceful_torchrun", f"--nproc-per-node={job.processes}"]


def launch(
    arguments: Sequence[str],
    *,
    mode: str,
    processes: int | None = None,
    hostfile: Path | None = None,
    hosts: Sequence[str] = (),
    nodes: int | None = None,
    rendezvous: str | None = None,
    gpus: int | None = None,
    grace: int = 300,
    options: Sequence[str] = (),
    dry_run: bool = False,
) -> int:
    """Runs `mixfuse launch`.

    Args:
        arguments: The mixfuse command.
        mode: "local", "torchrun", "deepspeed" or "slurm".
        processes: On each machine.
        hostfile: DeepSpeed's.
        hosts: Of torchrun; they meet at the first.
        nodes: How many machines.
        rendezvous: HOST or HOST:PORT where torchrun's machines meet, or HOST:PORT of DeepSpeed's first.
        gpus: On each node of Slurm; by default one a process.
        grace: Seconds between Slurm's SIGTERM and the end.
        options: Of sbatch.
        dry_run: Print what would run, and run nothing.

    Raises:
        MixfuseError: Something needed is missing or wrong.
    """
    work = job(arguments, processes)
    if mode == "slurm":
        count = nodes or 1
        text = sbatch_file(
            work, nodes=count, gpus=work.processes if gpus is None else gpus, grace=grace, options=options
        )
        command = ["sbatch", str(sbatch_path(work))]
        if dry_run:
            print(text)
        else:
            write_text(sbatch_path(work), text)
    elif mode == "deepspeed":
        if hostfile is None:
            raise MixfuseError("name a host file: --deepspeed HOSTFILE, with a line `HOST slots=N` for each machine")
        command = deepspeed(work, hostfile, rendezvous=rendezvous)
    elif mode == "torchrun":
        where = rendezvous or (hosts[0] if hosts else None)
        count = nodes or len(hosts)
        if where is None or not count:
            raise MixfuseError("torchrun needs to know who meets where: --hosts A,B,… or --nodes N --rdzv HOST:PORT")
        command = torchrun(work, nodes=count, rendezvous=where if ":" in where else f"{where}:{PORT}")
        if dry_run:
            print(f"# on each of {', '.join(hosts)}:" if hosts else f"# on each of {count} machines:")
    else:
        command = local(work)
    if dry_run:
        print(shlex.join(command))
        return 0
    if mode == "deepspeed":
        return supervise(command)
    execute(command)
    return 0
