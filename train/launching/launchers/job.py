"""What is launched, and where: the job, the machines, and what a launcher makes of the two."""

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.processes.worker import PORTS
from mixfuse.train.recipe import RECIPES, load_recipe

Command = list[str]
PORT = 29500  # the rendezvous port unless another is named; torch's and DeepSpeed's own default


@dataclass(frozen=True)
class Job:
    """What runs in every process.

    Attributes:
        arguments: Those of the `mixfuse` command, such as `train STAGE RECIPE [key=value …]`.
        processes: Processes on each machine.
        name: A short name.
        out: The run's folder. A launcher puts its files beside it. A command without a run has a name in the current
            folder.
        threads: CPU threads of each process; None: as many as there are cores for it.
        ports: The first of the two ports that the run opens on rank 0's machine (`train/processes/worker.py`), or None.
    """

    arguments: list[str]
    processes: int
    name: str
    out: Path
    threads: int | None = None
    ports: int | None = None

    @property
    def command(self) -> Command:
        """The command line of each process. It names this Python, so that no PATH can choose another.

        The ports are in it, because not every launcher hands this process's environment on to other machines.
        """
        ports = ["env", f"{PORTS}={self.ports}"] if self.ports else []
        return [*ports, sys.executable, "-m", "mixfuse", *self.arguments]


@dataclass(frozen=True)
class Machines:
    """Where a job runs. Each launcher reads what it needs.

    Attributes:
        nodes: Number of machines.
        hosts: Names of the machines, for torchrun; they meet at the first.
        rendezvous: HOST or HOST:PORT where the machines meet, instead of the first host.
        local_addr: The name or address by which the other machines reach this one, for torchrun. By itself torch
            publishes the host's full name, which often is none that other machines know (torch #150532).
        hostfile: DeepSpeed's host file.
        gpus: GPUs to request on each Slurm node; by default one a process.
        grace: Seconds between Slurm's SIGTERM and the end of the job.
        sbatch: Further options of sbatch: `key=value` or `key`, e.g. partition=gpu; `no-key` leaves out one of ours.
    """

    nodes: int | None = None
    hosts: Sequence[str] = ()
    rendezvous: str | None = None
    local_addr: str | None = None
    hostfile: Path | None = None
    gpus: int | None = None
    grace: int = 300
    sbatch: Sequence[str] = ()


def execute(command: Command) -> int:
    """Replaces this process by the command, so that signals and the exit code are the command's own.

    Raises:
        MixfuseError: The program is not on this machine.
    """
    try:
        os.execvp(command[0], command)  # noqa: S606 - no shell is wanted
    except FileNotFoundError:
        raise MixfuseError(f"{command[0]}: no such program on this machine") from None


@dataclass(frozen=True)
class Launch:
    """What a launcher does for a job: the command that runs here, and what it needs.

    Attributes:
        command: The command line. A dry run prints it.
        files: Files to write before it runs. A dry run prints their text instead.
        note: A line for a dry run, such as the hosts that the command runs on.
        start: Runs the command and returns its exit code.
    """

    command: Command
    files: Mapping[Path, str] = field(default_factory=dict)
    note: str = ""
    start: Callable[[Command], int] = execute


def read_job(arguments: Sequence[str], processes: int | None, ports: int | None = None) -> Job:
    """Reads the command to launch; the recipe of `train` is checked before anything starts.

    Args:
        arguments: A mixfuse command.
        processes: Processes on each machine; by default the recipe's `processes`, or 1.
        ports: The first of the two ports that the run opens on rank 0's machine.

    Raises:
        MixfuseError: The command cannot be launched, or the recipe of `train` is bad.
    """
    match list(arguments):
        case ["train", stage, recipe_path, *overrides] if stage in RECIPES:
            recipe = load_recipe(Path(recipe_path), stage, overrides)
            count = processes or recipe.processes
            return Job(list(arguments), count, f"mixfuse-{stage}", recipe.out, recipe.threads, ports)
        case ["experts", "profile", *_]:
            return Job(list(arguments), processes or 1, "mixfuse-experts", Path("mixfuse-experts"), None, ports)
        case ["doctor", *_]:
            return Job(list(arguments), processes or 1, "mixfuse-doctor", Path("mixfuse-doctor"), None, ports)
    raise MixfuseError(
        "launch runs `train sft RECIPE …`, `train judge RECIPE …`, `experts profile RECIPE …` or `doctor …` in several "
        f"processes, not {shlex.join(arguments)!r}"
    )


def torchrun_command(job: Job) -> Command:
    """The start of a torchrun command line (`train/processes/graceful_torchrun.py`)."""
    return [sys.executable, "-m", "mixfuse.train.processes.graceful_torchrun", f"--nproc-per-node={job.processes}"]
