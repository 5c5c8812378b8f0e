"""Slurm: an sbatch file that starts torchrun on each node, and requeues the job when it was stopped."""

import os
import shlex
from typing import Any

from mixfuse.contracts.errors import PREEMPTED
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
    options = _options(job, machines).items()
    directives = "\n".join(f"#SBATCH --{key}" + (f"={value}" if value is not None else "") for key, value in options)
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
# A task that fails ends the others.
srun --kill-on-bad-exit=1 {shlex.join(torchrun_command(job))} {meet} \\
  --no-python {shlex.join(job.command)}
code=$?
if [ "$code" -eq {PREEMPTED} ]; then # stopped by SIGTERM, and saved
  echo "requeue: job $SLURM_JOB_ID resumes from its last checkpoint"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _options(job: Job, machines: Machines) -> dict[str, Any]:
    """The options of sbatch: ours, then the user's own."""
    gpus = job.processes if machines.gpus is None else machines.gpus
    options: dict[str, Any] = {
        "job-name": job.name,
        "nodes": machines.nodes or 1,
        "ntasks-per-node": 1,
        **({"gpus-per-node": gpus} if gpus else {}),
        "signal": f"TERM@{machines.grace}",
        "requeue": None,
        "open-mode": "append",  # a requeued job continues its log
        "output": f"{job.out}-%j.log",
    }
    for option in machines.sbatch:
        key, separator, value = option.partition("=")
        options[key.removeprefix("--")] = value if separator else None
    return options
