"""`mixfuse report …`: what was measured, as files for people."""

import argparse
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parsers."""
    report = options.add_group(commands, "report", "write what was measured as a file for people")
    bundle = options.add_command(
        report,
        "bundle",
        _bundle,
        "write a trace, a run or an evaluation as one HTML file",
        "The file loads nothing and runs nothing: it can be kept, printed and sent on.",
    )
    bundle.add_argument(
        "folder", type=Path, nargs="?", metavar="FOLDER", help="the folder of a training run, or of a report"
    )
    bundle.add_argument("--with", dest="baseline", type=Path, metavar="FOLDER", help="a run to compare the run with")
    bundle.add_argument("--trace", metavar="ID", help="a trace, instead of a folder")
    bundle.add_argument("--out", type=options.out_file, required=True, metavar="FILE", help="the HTML file to write")
    options.add_database(bundle)


def _bundle(arguments: argparse.Namespace) -> None:
    from mixfuse.app.bundle import bundle_folder, bundle_trace
    from mixfuse.contracts.errors import MixfuseError

    if (arguments.folder is None) == (arguments.trace is None):
        raise MixfuseError("name what goes into the file: the FOLDER of a run or report, or --trace ID")
    if arguments.trace is not None:
        if arguments.baseline is not None:
            raise MixfuseError("--with compares runs; leave it out with --trace")
        bundle_trace(arguments.trace, arguments.db, arguments.out)
    else:
        bundle_folder(arguments.folder, arguments.baseline, arguments.out)
    print(arguments.out)
