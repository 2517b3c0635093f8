"""After a job's processes ended badly, still inside the job: queue it again when that can help.

`python -m launchers.slurm.requeue FOLDER TASK CODE`, run by the batch script. An exception is a failure and stays one. A
kill says nothing about the work, and a stop before the time limit was asked for: such a job goes on from its last
checkpoint, for as long as it advances.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from launchers.slurm import cluster
from launchers.slurm import job_records as ledger
from launchers.slurm.job import AGAIN
from src.errors import ConfigError, StageError
from src.store.files import write_json
from src.store.store import StageName, Store

STALLS = {True: 2, False: 5}  # runs in a row without progress: stopped before the time limit, killed from outside


def main(arguments: list[str]) -> int:
    folder, index, code = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    submission = ledger.read(folder)
    said = submission.said(index)
    job = os.environ["SLURM_JOB_ID"]
    # A batch script is not told why its step ended. Cancelled, preempted or out of time: SLURM has decided already.
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    name = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else job
    stopped = said.get("state") == "stopped" and bool(said.get("limit"))
    if said.get("state") == "failed":
        return 0
    with contextlib.suppress(cluster.SlurmUnavailable):  # then it is asked to queue the job again all the same
        if cluster.state_of(name) != "RUNNING":
            return 0
    if code != AGAIN and code <= 128:
        _fail(submission, index, said, f"exit code {code}; see {submission.log(index)}")
        return 0
    store = submission.sweep.store
    mark = progress_mark(store, submission.tasks[index].stages)
    stalls = 0 if mark > (said.get("mark") or [0, 0]) else said.get("stalls", 0) + 1
    if stopped:
        how = "was stopped before its time limit"
    else:
        how = "was told to end" if code == AGAIN else f"was killed (exit code {code})"
    if stalls >= STALLS[stopped]:
        where = f"after {mark[0]} of {len(submission.tasks[index].stages)} stages, at checkpoint {mark[1]}"
        advice = "raise hydra.launcher.timeout_min or lower trainer.save_steps" if stopped else "see its log"
        _fail(submission, index, said, f"{how} {stalls} times in a row without progress ({where}): {advice}")
        return 0
    write_json(
        submission.task_file(index), {**said, "state": "requeued", "reason": how, "mark": mark, "stalls": stalls}
    )
    try:
        cluster.requeue(name)
    except (StageError, ConfigError) as error:
        _fail(submission, index, said, f"{how} and cannot be queued again ({error})")
    return 0


def progress_mark(store: Store, stages: list[list[str]]) -> list[int]:
    """What is safe on disk: [finished stages, step of the newest checkpoint of the one after]."""
    names = [StageName(*stage) for stage in stages]
    done = next((n for n, stage in enumerate(names) if not store.is_done(stage)), len(names))
    if done == len(names):
        return [done, 0]
    return [done, max((int(p.name[5:]) for p in (store.work(names[done]) / "checkpoints").glob("*/step-*")), default=0)]


def _fail(submission: ledger.Submission, index: int, said: dict[str, Any], error: str) -> None:
    print(f"failed: {error}", file=sys.stderr)
    write_json(submission.task_file(index), {**said, "state": "failed", "error": error})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
