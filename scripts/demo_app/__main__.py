"""`python -m demo_app`, as scripts/demo calls it."""

import argparse
import shutil
import subprocess
import sys

from demo_app.report import show, write_report
from demo_app.steps import FULL, QUICK, Demo, console


def main() -> int:
    """Runs the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/demo")
    parser.add_argument("--quick", action="store_true", help="every step on the tiny random base, in minutes")
    parser.add_argument("--fresh", action="store_true", help="start over")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else FULL
    if arguments.fresh:
        shutil.rmtree(sizes.out, ignore_errors=True)
    sizes.out.mkdir(parents=True, exist_ok=True)
    try:
        found = Demo(sizes).run()
    except subprocess.CalledProcessError as error:
        console.print(f"[red]scripts/demo: the step failed: {' '.join(error.cmd)}[/]; run again to resume")
        return 1
    except KeyboardInterrupt:
        console.print("scripts/demo: interrupted; run again to resume")
        return 130
    write_report(sizes.out, found, quick=arguments.quick)
    show(sizes.out, found, quick=arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
