"""Slurm: an sbatch file that starts torchrun on each node, and requeues the job when it was stopped."""

import os
import re
import shlex
from typing import Any

from mixfuse.contracts.errors import PREEMPTED, MixfuseError
from mixfuse.train.launching.launchers.job import Job, Launch, Machines, torchrun_command


def launch_slurm(job: Job, machines: Machines) -> Launch:
    """Writes `NAME.sbatch` beside the run's folder and submits it."""
    path = job.out.with_name(job.out.name + ".sbatch")
    return Launch(["sbatch", str(path)], files={path: sbatch_text(job, machines)})


def sbatch_text(job: Job, machines: Machines) -> str:
    """The text of the sbatch file.

    Slurm sends SIGTERM to the job's processes `grace` seconds before its time is up (`--signal`), or when a partition
    or QOS with a GraceTime preempts it. They save and end with exit code 75. The script then requeues the job, which
    waits for its turn and resumes from the checkpoint. Any other exit code is final.
    """
    options = _options(job, machines)
    directives = "\n".join(
        f"#SBATCH --{key}" + (f"={_quoted(str(value))}" if value is not None else "") for key, value in options.items()
    )
    meet = (
        '--nnodes="$SLURM_NNODES" --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" '
        '--rdzv-endpoint="$head:$port"'
    )
    memory = " --mem=0" if "mem" in options else ""  # of srun: all of the job's
    return f"""#!/usr/bin/env bash
{directives}
# Written by `mixfuse launch --slurm`; see docs/launching.md.
set -u
cd {shlex.quote(os.getcwd())}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
# srun does not take these over from sbatch: without them a task, with all of its processes, has one core.
cpus=${{SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}}
# A task that fails ends the others. Each publishes the name by which Slurm knows its machine.
srun --kill-on-bad-exit=1 --cpus-per-task="$cpus"{memory} \\
  bash -c 'exec "$0" "$1" "$2" --local-addr="$SLURMD_NODENAME" "${{@:3}}"' {shlex.join(torchrun_command(job))} \\
  {meet} \\
  --no-python {shlex.join(job.command)}
code=$?
if [ "$code" -eq {PREEMPTED} ]; then # stopped by SIGTERM, and saved
  echo "requeue: job $SLURM_JOB_ID resumes from its last checkpoint"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _options(job: Job, machines: Machines) -> dict[str, Any]:
    """The options of sbatch: ours, then the user's own.

    A job gets its nodes whole. Eight ranks and their data need a node's memory and cores, and others' jobs on it would
    slow all ranks down.

    Raises:
        MixfuseError: The job is not alone on its nodes, and nothing says how many cores it needs.
    """
    gpus = job.processes if machines.gpus is None else machines.gpus
    options: dict[str, Any] = {
        "job-name": job.name,
        "nodes": machines.nodes or 1,
        "ntasks-per-node": 1,
        **({"gpus-per-node": gpus} if gpus else {}),
        "exclusive": None,
        "mem": 0,  # all of the node's
        # Without a number of threads, all of the node's cores, which `exclusive` gives.
        **({"cpus-per-task": job.processes * job.threads} if job.threads else {}),
        "signal": f"TERM@{machines.grace}",
        "requeue": None,
        "open-mode": "append",  # a requeued job continues its log
        "output": str(job.out).replace("%", "%%") + "-%j.log",
    }
    for option in machines.sbatch:
        key, separator, value = option.removeprefix("--").partition("=")
        if not separator and key.removeprefix("no-") in options and key not in options:
            del options[key.removeprefix("no-")]
        else:
            options[key] = value if separator else None
            if key in ("mem-per-cpu", "mem-per-gpu"):  # Slurm takes one of the three
                options.pop("mem", None)
    if "exclusive" not in options and "cpus-per-task" not in options:
        raise MixfuseError(
            "a job that is not alone on its nodes must say how many cores it needs: set threads in the recipe (of each "
            "process), or --sbatch cpus-per-task=N (of all processes of a node)"
        )
    return options


def _quoted(value: str) -> str:
    """A value as sbatch reads it in a directive: in double quotes, a backslash before each quote and backslash.

    Raises:
        MixfuseError: It holds the end of a line, which no directive can.
    """
    if re.fullmatch(r"[\w@%+=:,./-]*", value):
        return value
    if "\n" in value or "\r" in value:
        raise MixfuseError(f"{value!r}: an sbatch file cannot hold a line break; choose another `out`")
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
