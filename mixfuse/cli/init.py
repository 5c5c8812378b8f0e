"""`mixfuse init`: a project to start from."""

import argparse

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser."""
    init = options.add_command(
        commands,
        "init",
        _init,
        "write a project to start from: recipes, serve and fusion configs, a README",
        "Existing files are never overwritten.",
    )
    init.add_argument("dir", type=options.out_folder, metavar="DIR", help="the folder to write to")
    init.add_argument(
        "--for",
        dest="model",
        required=True,
        choices=("tiny", "mixtral-8x7b", "mixtral-8x22b"),
        help="the base model; tiny runs on a CPU",
    )


def _init(arguments: argparse.Namespace) -> None:
    from mixfuse.app.new_project import write_project

    files = write_project(arguments.dir, arguments.model)
    print(f"{arguments.dir}: {len(files)} files; the next commands are in {arguments.dir / 'README.md'}")
