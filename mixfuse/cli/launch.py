"""`mixfuse launch`: a train command in several processes."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser of `mixfuse launch`."""
    launch = commands.add_parser(
        "launch", help="a train or doctor command in several processes, on one machine or many"
    )
    how = launch.add_mutually_exclusive_group(required=True)
    how.add_argument("--local", nargs="?", const="", metavar="N", help="N processes here (default: the recipe's)")
    how.add_argument("--torchrun", action="store_true", help="the same command on each host")
    how.add_argument("--deepspeed", type=Path, metavar="HOSTFILE", help="DeepSpeed's launcher")
    how.add_argument("--slurm", action="store_true", help="an sbatch file, and sbatch")
    launch.add_argument("--processes", type=int, metavar="N", help="on each machine (default: the recipe's)")
    launch.add_argument("--nodes", type=int, metavar="N", help="machines, for torchrun and Slurm")
    launch.add_argument("--hosts", default="", metavar="A,B,…", help="torchrun: the machines; they meet at the first")
    launch.add_argument("--rdzv", metavar="HOST[:PORT]", help="where the machines meet, if not at the first")
    launch.add_argument("--gpus-per-node", type=int, metavar="G", help="Slurm: GPUs to ask for (default: processes)")
    launch.add_argument("--grace", type=int, default=300, help="Slurm: seconds to save in (default 300)")
    launch.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="Slurm: a further option")
    launch.add_argument("--dry-run", action="store_true", help="print what would run")
    launch.add_argument("arguments", nargs=argparse.REMAINDER, metavar="train … | experts profile … | doctor …")
    launch.set_defaults(command=_launch)


def _launch(arguments: argparse.Namespace) -> int:
    from mixfuse.train.launching.launch import launch

    command, processes = arguments.arguments, arguments.processes
    if arguments.local and arguments.local.isdecimal():
        processes = int(arguments.local)
    elif arguments.local:  # `--local train …`: what follows is no number, so it belongs to the command
        command = [arguments.local, *command]
    modes = {"deepspeed": arguments.deepspeed, "torchrun": arguments.torchrun, "slurm": arguments.slurm}
    return launch(
        command,
        mode=next((name for name, chosen in modes.items() if chosen), "local"),
        processes=processes,
        hostfile=arguments.deepspeed,
        hosts=[host for host in arguments.hosts.split(",") if host],
        nodes=arguments.nodes,
        rendezvous=arguments.rdzv,
        gpus=arguments.gpus_per_node,
        grace=arguments.grace,
        options=arguments.sbatch,
        dry_run=arguments.dry_run,
    )
