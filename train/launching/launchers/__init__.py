"""The launchers, one module each.

A launcher is a function from a `Job` and its `Machines` to a `Launch`: the command that runs here, and the files it
needs. To add one (Kubernetes, say): a module with such a function, its entry in `LAUNCHERS`, and its flag in the
`launch` command of `mixfuse/cli`. A test compares the flags with this table, because `mixfuse --help` imports nothing
from here.
"""

from collections.abc import Callable, Mapping

from mixfuse.train.launching.launchers import deepspeed, local, slurm, torchrun
from mixfuse.train.launching.launchers.job import Job, Launch, Machines

LAUNCHERS: Mapping[str, Callable[[Job, Machines], Launch]] = {
    "local": local.launch_local,
    "torchrun": torchrun.launch_torchrun,
    "deepspeed": deepspeed.launch_deepspeed,
    "slurm": slurm.launch_slurm,
}
