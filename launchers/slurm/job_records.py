"""What was submitted: one folder a submission, `sweeps/NAME/jobs/ID/`, written before sbatch and completed after it.

    submission.json   what was asked for: kind, tasks and the stages each computes; job ids once SLURM has taken it
    task-N.json       what the job itself last said of task N: where it runs, why it failed
    *_log.out, *.err  its output

The ids also stand in the names of jobs, so that a submission whose driver died on the way is found again.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from src.store.files import read_json, write_json
from src.store.store import Store
from src.store.sweep_folder import SweepFolder

FILE = "submission.json"


@dataclass
class Task:
    """One job, or one task of an array."""

    label: str
    stages: list[list[str]]  # [kind, identity] of what it computes, in order
    job: str | None = None  # SLURM's id, 123 or 123_4


@dataclass
class Submission:
    """One sbatch."""

    folder: Path
    kind: str  # sft, reference, baseline, align, aggregate
    tasks: list[Task]
    results: list[str] = field(default_factory=list)  # of an aggregation: the points it concludes
    waits_for: list[str] = field(default_factory=list)  # of an aggregation: the jobs that end before it
    finalize: str = ""  # of an aggregation: "MODULE:FUNCTION" it calls with the sweep's folder and the failures
    upload: str = ""  # of an aggregation: hydra.launcher.upload
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
        values = asdict(self)
        del values["folder"]
        write_json(self.folder / FILE, values)

    def task_file(self, index: int) -> Path:
        return self.folder / f"task-{index}.json"

    def said(self, index: int) -> dict[str, Any]:
        """What the task's job last said; empty before it started."""
        try:
            return read_json(self.task_file(index))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def log(self, index: int) -> Path:
        """Where the task's errors go (of its first process)."""
        return self.folder / f"{self.tasks[index].job}_0_log.err"


def new(sweep: SweepFolder, kind: str, tasks: list[Task], **more: Any) -> Submission:
    """Return a submission of the sweep, not written yet."""
    return Submission(sweep.jobs / uuid.uuid4().hex[:10], kind, tasks, **more)


def read(folder: Path) -> Submission:
    values = read_json(folder / FILE)
    tasks = [Task(**task) for task in values.pop("tasks")]
    return Submission(folder=folder, tasks=tasks, **values)


def strays(own: Iterable[Submission], wanted: Container[str], live: Container[str]) -> dict[str, str]:
    """job -> label of a sweep's live jobs that compute nothing it still wants (stage identities)."""
    return {
        task.job: task.label
        for submission in own
        for task in submission.tasks
        if task.job is not None and task.job in live and task.stages and not any(i in wanted for _, i in task.stages)
    }


def submissions(sweep: SweepFolder) -> list[Submission]:
    """Return the submissions of a sweep, oldest first."""
    return sorted((read(path.parent) for path in sweep.jobs.glob(f"*/{FILE}")), key=lambda s: s.written)


def all_submissions(store: Store) -> list[Submission]:
    """Return the submissions of every sweep of the store, oldest first."""
    sweeps = (SweepFolder(path) for path in store.sweeps.glob("*"))
    return sorted((s for sweep in sweeps for s in submissions(sweep)), key=lambda s: s.written)
