"""A SLURM job of several points without SLURM: `python -m tests.support.pool_job FOLDER WORKERS GPUS_PER_POINT`.

FOLDER is that of a submission, with the `evaluate` stages of its points in RESULTS_FILE.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from launchers.slurm.job_records import Submission, new_submission
from src.planning.plan import Plan
from src.store.sweep_folder import SweepFolder
from sweeps.search.record import SweepRecord
from sweeps.search.search import Search
from tests.support.commands import environment, start_command

RESULTS_FILE = "results.pkl"


def write_submission(folder: SweepFolder, plan: Plan) -> Submission:
    """Write the records of a sweep and of one job that computes all its points."""
    SweepRecord(folder, plan, "a test", Search(plan, folder.store).state, {}).write("submitted")
    tasks = []
    for point, stage_ids in zip(plan.points, plan.point_stages, strict=True):
        own = [plan.stages[i] for i in stage_ids if plan.stages[i].role in ("align", "generate", "evaluate")]
        tasks.append((point.label, [[stage.kind, stage.identity] for stage in own], 0))
    submission = new_submission(folder, "align", tasks)
    for task in submission.tasks:
        task.job = "1_0"
    submission.write()
    results = [plan.stages[result] for result in plan.results]
    (submission.folder / RESULTS_FILE).write_bytes(pickle.dumps(results))
    return submission


def start_job(
    submission: Submission, workers: int = 2, gpus_per_point: int = 1, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start the job in a group of processes of its own, as slurmstepd does. env: `environment()`."""
    command = [sys.executable, "-m", "tests.support.pool_job", *map(str, (submission.folder, workers, gpus_per_point))]
    return start_command(command, {**(env or environment()), "SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"})


def main() -> None:
    from launchers.slurm import point_pool

    folder, workers, gpus_per_point = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    results = pickle.loads((folder / RESULTS_FILE).read_bytes())
    paths = SimpleNamespace(result_pickle=folder / "result.pkl")
    job = lambda: SimpleNamespace(job_id="1_0", paths=paths)  # noqa: E731
    seconds_left = os.environ.get("SECONDS_LEFT")
    with (
        patch.object(point_pool, "JobEnvironment", job),
        patch("launchers.slurm.job.JobEnvironment", job),
        patch.object(point_pool.cluster, "seconds_left", lambda job: float(seconds_left) if seconds_left else None),
    ):
        point_pool.run_points(results, folder, 0, "after", workers, gpus_per_point)


if __name__ == "__main__":
    main()
