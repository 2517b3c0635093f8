"""Cancel a sweep's jobs: `python -m sweeps.cancel DIR`. Finished stages stay; rerun the sweep to resume."""

from __future__ import annotations

import sys
from pathlib import Path

from launchers.slurm import cluster
from launchers.slurm.job_records import submissions
from launchers.slurm.status import read_status
from launchers.slurm.submit import cancel_unrecorded
from src.errors import report_errors
from src.store.lease import Lease
from src.store.sweep_folder import SweepFolder
from sweeps.arguments import ArgumentParser


def main() -> int:
    parser = ArgumentParser(prog="python -m sweeps.cancel", description=__doc__)
    parser.add_argument("dir", type=Path, help="a sweep's folder, such as outputs/sweeps/demo")
    arguments = parser.parse_args()
    with report_errors():
        folder = SweepFolder.open(arguments.dir)
        with Lease(folder.store.sweeps / ".submitting"):
            cancel_unrecorded(submissions(folder), cluster.queue())
        status = read_status(folder, sacct_timeout=0.0)
        if status.slurm_error:
            raise cluster.SlurmUnavailable(status.slurm_error)
        # The aggregation stays: it writes the final state of every point.
        jobs = [job.id for job in status.jobs if job.id not in status.aggregation]
        cluster.cancel(jobs)
        print(f"{folder.name}: {len(jobs)} jobs cancelled" if jobs else f"{folder.name}: no jobs to cancel")
    return 0


if __name__ == "__main__":
    sys.exit(main())
