"""The epilogue of the batch script: requeue the job after a bad exit, if a requeue can help.

`python -m launchers.slurm.requeue FOLDER TASK CODE`. An exception is a failure and stays one. A job that was killed, or
stopped before its time limit, is requeued and resumes from its last checkpoint, as long as it makes progress.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from launchers.slurm import cluster
from launchers.slurm.job import EXIT_REQUEUE
from launchers.slurm.job_records import Submission, read_submission
from src.errors import ConfigError, StageError
from src.store.store import StageName, Store

# Consecutive runs without progress after which a job has failed.
MAX_STALLED_RUNS = 5
MAX_STALLED_RUNS_AT_TIME_LIMIT = 2  # a third run would not get further in the same time


def main(arguments: list[str]) -> int:
    submission, index, code = read_submission(Path(arguments[0])), int(arguments[1]), int(arguments[2])
    status = submission.status(index)
    if status.get("state") == "failed":
        return 0
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    # The batch script does not know why its step ended. After a cancellation, a preemption or the time limit the job
    # is not RUNNING any more, and SLURM has decided what becomes of it. If SLURM does not answer, requeue all the same.
    with contextlib.suppress(cluster.SlurmUnavailable):
        if cluster.state_of(job) != "RUNNING":
            return 0
    if code != EXIT_REQUEUE and code <= 128:
        _fail(submission, index, status, f"exit code {code}; log: {submission.log(index)}")
        return 0

    at_time_limit = status.get("state") == "stopped" and bool(status.get("near_time_limit"))
    if at_time_limit:
        cause, advice = "stopped before its time limit", "raise hydra.launcher.timeout_min or lower trainer.save_steps"
    else:
        cause = "stopped by a signal" if code == EXIT_REQUEUE else f"killed (exit code {code})"
        advice = "see its log"
    stages = submission.tasks[index].stages
    marker = progress_marker(submission.sweep.store, stages)
    has_progressed = marker > (status.get("progress_marker") or [0, 0])
    stalled_runs = 0 if has_progressed else status.get("stalled_runs", 0) + 1
    if stalled_runs >= (MAX_STALLED_RUNS_AT_TIME_LIMIT if at_time_limit else MAX_STALLED_RUNS):
        where = f"{marker[0]} of {len(stages)} stages done, newest checkpoint at step {marker[1]}"
        _fail(submission, index, status, f"{cause} {stalled_runs} times without progress ({where}): {advice}")
        return 0
    progress = {"progress_marker": marker, "stalled_runs": stalled_runs}
    submission.write_status(index, {**status, "state": "requeued", "reason": cause, **progress})
    try:
        cluster.requeue(job)
    except (StageError, ConfigError) as error:
        _fail(submission, index, status, f"{cause}, and the requeue failed ({error})")
    return 0


def progress_marker(store: Store, stages: list[list[str]]) -> list[int]:
    """Return [number of finished stages, step of the newest checkpoint of the next stage]; it grows with progress."""
    names = [StageName(*stage) for stage in stages]
    num_done = next((n for n, stage in enumerate(names) if not store.is_done(stage)), len(names))
    if num_done == len(names):
        return [num_done, 0]
    checkpoints = (store.work(names[num_done]) / "checkpoints").glob("*/step-*")
    return [num_done, max((int(path.name.removeprefix("step-")) for path in checkpoints), default=0)]


def _fail(submission: Submission, index: int, status: dict[str, Any], error: str) -> None:
    print(f"failed: {error}", file=sys.stderr)
    submission.write_status(index, {**status, "state": "failed", "error": error})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
