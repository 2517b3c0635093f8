"""The records of submitted jobs: one folder per submission, `sweeps/NAME/jobs/ID/`.

    submission.json   the request (kind, tasks and their stages), written before sbatch; then the job ids
    task-N.json       the status of task N, written by its job: where it runs, why it failed
    *_log.out, *.err  the output of the jobs

A job's name ends in the ID, so that jobs of a submitter that died before recording their ids can be found.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from src.errors import ConfigError
from src.store.files import read_json, write_json
from src.store.store import Store
from src.store.sweep_folder import SweepFolder

SUBMISSION_FILE = "submission.json"
SCHEMA = 2  # of submission.json and the task files beside it


@dataclass
class TaskRecord:
    """One job, or one task of a job array."""

    label: str
    stages: list[list[str]]  # [kind, identity] of the stages it is submitted for, in order
    job: str | None = None  # SLURM's id, 123 or 123_4


@dataclass
class Submission:
    """One call of sbatch."""

    folder: Path
    kind: str  # sft, reference, baseline, align, aggregate
    tasks: list[TaskRecord]
    results: list[str] = field(default_factory=list)  # of an aggregation: identities of the results it aggregates
    waits_for: list[str] = field(default_factory=list)  # of an aggregation: the jobs it depends on
    finalize: str = ""  # of an aggregation: "MODULE:FUNCTION" it calls with the sweep's folder and the failures
    code: str = ""
    written: float = field(default_factory=time.time)
    state: str = "preparing"  # preparing, submitted, abandoned

    @property
    def sweep(self) -> SweepFolder:
        return SweepFolder.of_job(self.folder)

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def jobs(self) -> list[str]:
        return [task.job for task in self.tasks if task.job is not None]

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        values = {"schema": SCHEMA, **asdict(self)}
        del values["folder"]
        write_json(self.folder / SUBMISSION_FILE, values)

    def status(self, index: int) -> dict[str, Any]:
        """Return the last status that a task's job wrote; empty before the job has started."""
        try:
            return read_json(self._status_file(index))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def write_status(self, index: int, status: dict[str, Any]) -> None:
        write_json(self._status_file(index), status)

    def _status_file(self, index: int) -> Path:
        return self.folder / f"task-{index}.json"

    def log(self, index: int) -> Path:
        """Return the file with the stderr of a task's first process."""
        return self.folder / f"{self.tasks[index].job}_0_log.err"


def new_submission(sweep: SweepFolder, kind: str, tasks: list[TaskRecord], **fields: Any) -> Submission:
    """Return a submission of the sweep, not written yet."""
    return Submission(sweep.jobs / uuid.uuid4().hex[:10], kind, tasks, **fields)


def read_submission(folder: Path) -> Submission:
    """Read the submission in a folder. Raises ConfigError for another version's."""
    values = read_json(folder / SUBMISSION_FILE)
    if (schema := values.pop("schema", 1)) != SCHEMA:
        raise ConfigError(
            f"{folder / SUBMISSION_FILE} was written by another version (schema {schema}, this one reads {SCHEMA}): "
            "use another output_dir, or the version that wrote it"
        )
    tasks = [TaskRecord(**task) for task in values.pop("tasks")]
    return Submission(folder=folder, tasks=tasks, **values)


def submissions(sweep: SweepFolder) -> list[Submission]:
    """Return the submissions of a sweep, oldest first."""
    folders = (path.parent for path in sweep.jobs.glob(f"*/{SUBMISSION_FILE}"))
    return sorted(map(read_submission, folders), key=lambda submission: submission.written)


def all_submissions(store: Store) -> list[Submission]:
    """Return the submissions of every sweep of the store, oldest first."""
    sweeps = (SweepFolder(path) for path in store.sweeps.glob("*"))
    return sorted((s for sweep in sweeps for s in submissions(sweep)), key=lambda submission: submission.written)


def orphaned_jobs(
    sweep_submissions: Iterable[Submission], stages: Container[str], live: Container[str]
) -> dict[str, str]:
    """Return the live jobs of a sweep that compute none of its stages (any more): job -> label.

    stages: identities of the sweep's stages. live: ids of pending and running jobs.
    """
    return {
        task.job: task.label
        for submission in sweep_submissions
        for task in submission.tasks
        if task.job is not None and task.job in live and task.stages and not any(i in stages for _, i in task.stages)
    }
