"""Cancel a sweep's jobs: `python -m sweeps.cancel DIR [--removed]`. Finished stages stay; rerun the sweep to resume."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launchers.slurm import cluster
from launchers.slurm import job_records as ledger
from launchers.slurm.status import look
from launchers.slurm.submit import abandon
from src.errors import report_errors
from src.store.lease import Lease
from src.store.sweep_folder import SweepFolder


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sweeps.cancel", description=__doc__)
    parser.add_argument("dir", type=Path, help="a sweep's folder, such as outputs/sweeps/demo")
    parser.add_argument("--removed", action="store_true", help="only jobs of points the sweep no longer has")
    arguments = parser.parse_args()
    with report_errors():
        folder = SweepFolder.open(arguments.dir.resolve())
        with Lease(folder.store.sweeps / ".submitting"):
            abandon(ledger.submissions(folder), cluster.queue())
        picture = look(arguments.dir, patience=0.0)
        if picture.silent:
            raise cluster.SlurmUnavailable(picture.silent)
        # The aggregation job stays: it records the final state of every point.
        jobs = (
            list(picture.removed)
            if arguments.removed
            else [j.id for j in picture.jobs if j.id not in picture.aggregation]
        )
        cluster.cancel(jobs)
        print(
            f"{arguments.dir.name}: {len(jobs)} jobs cancelled" if jobs else f"{arguments.dir.name}: no jobs to cancel"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
