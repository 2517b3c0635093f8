"""The epilogue of the batch script: requeue the job after a bad exit, if a requeue can help.

`python -m launchers.slurm.requeue FOLDER TASK CODE`. An exception is a failure and stays one. A job that was killed, or
stopped before its time limit, is requeued and resumes from its last checkpoint, as long as it makes progress.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from pathlib import Path

from submitit import JobEnvironment

from launchers.slurm import cluster
from launchers.slurm.job import EXIT_REQUEUE
from launchers.slurm.job_records import Task, read_submission
from src.errors import ConfigError, StageError
from src.store.store import CHECKPOINTS, StageName, Store

# Consecutive runs without progress after which a job has failed.
MAX_STALLED_RUNS = 5
MAX_STALLED_RUNS_AT_TIME_LIMIT = 2  # a third run would not get further in the same time


def main(arguments: list[str]) -> int:
    submission, code = read_submission(Path(arguments[0])), int(arguments[2])
    tasks = submission.tasks_of(int(arguments[1]))
    left = [task for task in tasks if not _has_ended(task)]
    if not left:
        return 0
    job = JobEnvironment().job_id
    # The batch script does not know why its step ended. After a cancellation, a preemption or the time limit the job
    # is not RUNNING any more, and SLURM has decided what becomes of it. If SLURM does not answer, requeue all the same.
    with contextlib.suppress(cluster.SlurmUnavailable):
        queued = cluster.queue().get(job)
        if queued is None or queued.state != "RUNNING":
            return 0
    if error := _requeue(tasks, left, submission.sweep.store, job, code):
        print(f"failed: {error}", file=sys.stderr)
        for task in left:
            task.write_status({**task.status(), "state": "failed", "error": error})
    return 0


def _has_ended(task: Task) -> bool:
    """Return whether another run of the job would do nothing for the task."""
    state = task.status().get("state")
    # A single task that is done has a job that failed afterwards: others may wait for its good end.
    return state == "failed" or (task.shares_job and state == "done")


def _requeue(tasks: list[Task], left: list[Task], store: Store, job: str, code: int) -> str | None:
    """Requeue the job for the tasks that are left, and return None, or return why they have failed."""
    if code != EXIT_REQUEUE and code <= 128:
        return f"exit code {code}; log: {left[0].log}"
    status, max_stalled_runs, advice = left[0].status(), MAX_STALLED_RUNS, "see its log"
    if status.get("state") == "stopped" and status.get("near_time_limit"):
        cause, max_stalled_runs = "stopped before its time limit", MAX_STALLED_RUNS_AT_TIME_LIMIT
        advice = "raise hydra.launcher.timeout_min"
    else:
        cause = "stopped by a signal" if code == EXIT_REQUEUE else f"killed (exit code {code})"
    marker = _job_marker(store, tasks)
    has_progressed = marker > (status.get("progress_marker") or [0, 0])
    stalled_runs = 0 if has_progressed else status.get("stalled_runs", 0) + 1
    if stalled_runs >= max_stalled_runs:
        num_stages = sum(len(task.stages) for task in tasks)
        where = f"{marker[0]} of {num_stages} stages done, newest checkpoint at step {marker[1]}"
        return f"{cause} {stalled_runs} times without progress ({where}): {advice}"
    progress = {"progress_marker": marker, "stalled_runs": stalled_runs}
    for task in left:
        task.write_status({**task.status(), "state": "requeued", "reason": cause, **progress})
    try:
        cluster.requeue(job)
    except (StageError, ConfigError) as error:
        return f"{cause}, and the requeue failed ({error})"
    return None


def _job_marker(store: Store, tasks: list[Task]) -> list[int]:
    """Return the sums of the progress markers of a job's tasks. What a failed one left undone counts as finished."""
    markers = [
        [len(task.stages), 0] if task.shares_job and _has_ended(task) else progress_marker(store, task.stages)
        for task in tasks
    ]
    return [sum(marker[0] for marker in markers), sum(marker[1] for marker in markers)]


def progress_marker(store: Store, stages: list[list[str]]) -> list[int]:
    """Return [number of finished stages, step of the newest checkpoint]; it grows with progress."""
    names = [StageName(*stage) for stage in stages]
    num_done = sum(1 for _ in itertools.takewhile(store.is_done, names))
    if num_done == len(names):
        return [num_done, 0]
    # Also of finished stages: a model whose weights were removed is trained again for the stage that needs it.
    formats = (folder for name in names[: num_done + 1] for folder in (store.work(name) / "checkpoints").glob("*"))
    steps = (step for folder in formats for step in CHECKPOINTS.entries(folder))
    return [num_done, max(steps, default=0)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
