"""Show the status of a sweep: `python -m sweeps.status DIR [--watch] [--all]`. Exit code 1 when a point failed."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from launchers.slurm.status import read_status
from launchers.slurm.status_table import render, watch
from src.errors import report_errors
from src.store.sweep_folder import SweepFolder
from sweeps.arguments import ArgumentParser


def main() -> int:
    parser = ArgumentParser(prog="python -m sweeps.status", description=__doc__)
    parser.add_argument("dir", type=Path, help="a sweep's folder, such as outputs/sweeps/demo")
    parser.add_argument("--watch", action="store_true", help="update until all jobs have ended")
    parser.add_argument("--all", action="store_true", help="show every point")
    arguments = parser.parse_args()
    with report_errors():
        folder = SweepFolder.open(arguments.dir)
        # No line breaks at 80 columns in a file or a pipe.
        console = Console(markup=False, emoji=False, width=None if sys.stdout.isatty() else 240)
        if arguments.watch:
            status = watch(folder, console)
        else:
            status = read_status(folder)
            console.print(render(status, folder, arguments.all))
    has_failed = any(point.state in ("failed", "cancelled") for point in status.points)
    return 1 if has_failed or status.aggregation_error else 0


if __name__ == "__main__":
    sys.exit(main())
