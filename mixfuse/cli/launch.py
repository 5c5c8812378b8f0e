"""`mixfuse launch`: a command in several processes, on one machine or many."""

import argparse
from pathlib import Path

from mixfuse.cli import options

LAUNCHERS = ("local", "torchrun", "deepspeed", "slurm")
"""Flags of `mixfuse launch`, as `mixfuse.train.launching.launchers` names them; a test compares the two."""


def register(commands: options.Commands) -> None:
    """Adds the parser."""
    launch = options.add_command(
        commands,
        "launch",
        _launch,
        "run a train, experts or doctor command in several processes, on one machine or many",
    )
    launcher = launch.add_mutually_exclusive_group(required=True)
    launcher.add_argument(
        "--local", nargs="?", const="", metavar="N", help="start N processes here (default: the recipe's `processes`)"
    )
    launcher.add_argument("--torchrun", action="store_true", help="start torchrun; run the same command on each host")
    launcher.add_argument("--deepspeed", type=Path, metavar="HOSTFILE", help="start DeepSpeed's launcher")
    launcher.add_argument("--slurm", action="store_true", help="write an sbatch file and submit it")
    launch.add_argument(
        "--processes",
        type=options.whole(1),
        metavar="N",
        help="processes per machine (default: the recipe's `processes`)",
    )
    launch.add_argument("--nodes", type=options.whole(1), metavar="N", help="torchrun and Slurm: number of machines")
    launch.add_argument(
        "--hosts", default="", metavar="A,B,…", help="torchrun: the machines; the first is where they meet"
    )
    launch.add_argument(
        "--rdzv", metavar="HOST[:PORT]", help="where the machines meet (rendezvous), if not at the first"
    )
    launch.add_argument(
        "--local-addr",
        metavar="ADDRESS",
        help="torchrun: how the other machines reach this one, if not by its name in --hosts",
    )
    launch.add_argument(
        "--ports",
        type=options.whole(1, 65534),
        metavar="P",
        help="rank 0 opens P for the store and P+1 for the heartbeat (default: any; or set MIXFUSE_PORTS)",
    )
    launch.add_argument(
        "--gpus-per-node",
        type=options.whole(0),
        metavar="G",
        help="Slurm: GPUs to request per node (default: --processes)",
    )
    launch.add_argument(
        "--grace",
        type=options.whole(0),
        default=300,
        help="Slurm: seconds to save a checkpoint before the end (default: 300)",
    )
    launch.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="Slurm: add an option to the sbatch file; no-KEY leaves one out",
    )
    launch.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    launch.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="train … | experts profile … | doctor …",
        help="the mixfuse command to run",
    )


def _launch(arguments: argparse.Namespace) -> int:
    from mixfuse.train.launching.launch import launch
    from mixfuse.train.launching.launchers.job import Machines

    command, processes = arguments.arguments, arguments.processes
    if arguments.local and arguments.local.isdecimal():
        processes = int(arguments.local)
    elif arguments.local:  # `--local train …`: the value is no number, so it belongs to the command
        command = [arguments.local, *command]
    launcher = next(name for name in LAUNCHERS if getattr(arguments, name) not in (None, False))
    machines = Machines(
        nodes=arguments.nodes,
        hosts=[host for host in arguments.hosts.split(",") if host],
        rendezvous=arguments.rdzv,
        local_addr=arguments.local_addr,
        hostfile=arguments.deepspeed,
        gpus=arguments.gpus_per_node,
        grace=arguments.grace,
        sbatch=arguments.sbatch,
    )
    return launch(
        command,
        machines,
        launcher=launcher,
        processes=processes,
        ports=arguments.ports,
        dry_run=arguments.dry_run,
    )
