"""`mixfuse launch`: a command in several processes, on one machine or many.

One mixfuse command (`train …`, `experts profile …` or `doctor …`) runs in every process. The launchers are in
`launchers/`, one module each; a dry run prints exactly what would run.
"""

import shlex
from collections.abc import Sequence

from mixfuse.contracts.files import write_text
from mixfuse.train.launching.launchers import LAUNCHERS
from mixfuse.train.launching.launchers.job import Machines, read_job


def launch(
    arguments: Sequence[str],
    machines: Machines,
    *,
    launcher: str,
    processes: int | None = None,
    ports: int | None = None,
    dry_run: bool = False,
) -> int:
    """Runs `mixfuse launch`.

    Args:
        arguments: The mixfuse command.
        machines: Where it runs.
        launcher: A key of `LAUNCHERS`.
        processes: Processes on each machine; by default the recipe's.
        ports: The first of the two ports that the run opens on rank 0's machine; by default any.
        dry_run: Print what would run, and run nothing.

    Returns:
        The exit code.

    Raises:
        MixfuseError: Something the launcher needs is missing or wrong.
    """
    job = read_job(arguments, processes, ports)
    prepared = LAUNCHERS[launcher](job, machines)
    if dry_run:
        for text in (*prepared.files.values(), prepared.note):
            if text:
                print(text)
        print(shlex.join(prepared.command))
        return 0
    for path, text in prepared.files.items():
        write_text(path, text)
    return prepared.start(prepared.command)
