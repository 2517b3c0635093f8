"""The records of submitted jobs: one folder per submission, `sweeps/NAME/jobs/ID/`.

    submission.json   the request (kind, tasks and their stages), written before sbatch; then the job ids
    task-N.json       the status of task N, written by its job: where it runs, why it failed
    task-N.log        the log of task N, where one job computes several
    *_log.out, *.err  the output of the jobs

A job's name ends in the ID, so that jobs of a submitter that died before recording their ids can be found.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from src.errors import ConfigError, DamagedFile, warn
from src.store.files import read_json, read_versioned_json, write_json
from src.store.store import Store
from src.store.sweep_folder import SweepFolder

SUBMISSION_FILE = "submission.json"
SCHEMA = 2  # of submission.json and the task files beside it


@dataclass
class Task:
    """What one job was submitted for, or one of several points that a job computes."""

    folder: Path  # of its submission
    index: int  # in its submission
    label: str
    stages: list[list[str]]  # [kind, identity] of the stages it is submitted for, in order
    element: int | None = None  # of the job array, where each job computes several points; None: that of the task
    job: str | None = None  # SLURM's id, 123 or 123_4

    @property
    def shares_job(self) -> bool:
        """Whether the job may go on when this task has ended."""
        return self.element is not None

    @property
    def log(self) -> Path:
        """The file with the log of the task, or the stderr of the first process of its job."""
        own = self.own_log
        return own if self.shares_job and own.exists() else self.folder / f"{self.job}_0_log.err"

    @property
    def own_log(self) -> Path:
        """The log of the task alone, in a job that computes several."""
        return self.folder / f"task-{self.index}.log"

    def status(self) -> dict[str, Any]:
        """Return the last status that the job wrote; empty before it has started."""
        try:
            return read_json(self.folder / f"task-{self.index}.json")
        except (FileNotFoundError, DamagedFile):
            return {}

    def write_status(self, status: dict[str, Any]) -> None:
        write_json(self.folder / f"task-{self.index}.json", status)


@dataclass
class Submission:
    """One call of sbatch."""

    folder: Path
    kind: str  # a key of hydra.launcher.kinds
    tasks: list[Task]
    results: list[str] = field(default_factory=list)  # of an aggregation: identities of the results it aggregates
    waits_for: list[str] = field(default_factory=list)  # the jobs it depends on, but for those it follows one by one
    finalize: str = ""  # of an aggregation: "MODULE:FUNCTION" it calls with the sweep's folder and the failures
    code: str = ""
    signal_delay_s: int = 0  # seconds before the time limit at which its jobs are told to stop
    written: float = field(default_factory=time.time)
    state: str = "preparing"  # preparing, submitted, abandoned

    @property
    def sweep(self) -> SweepFolder:
        return SweepFolder.of_job(self.folder)

    @property
    def jobs(self) -> list[str]:
        return list(dict.fromkeys(task.job for task in self.tasks if task.job is not None))

    def tasks_of(self, element: int) -> list[Task]:
        """Return the tasks that this element of the job array computes."""
        return [task for task in self.tasks if (task.element if task.shares_job else task.index) == element]

    def write(self) -> None:
        jobs = self.folder.parent
        jobs.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(PermissionError):  # it belongs to somebody else
            jobs.chmod(0o700)  # whoever could write here would run code as the submitter: jobs unpickle their arguments
        self.folder.mkdir(exist_ok=True)
        values = {"schema": SCHEMA, **asdict(self)}
        del values["folder"]
        for task in values["tasks"]:
            del task["folder"], task["index"]
        write_json(self.folder / SUBMISSION_FILE, values)


def new_submission(
    sweep: SweepFolder,
    kind: str,
    tasks: Iterable[tuple[str, list[list[str]]] | tuple[str, list[list[str]], int | None]],
    **fields: Any,
) -> Submission:
    """Return a submission of the sweep, not written yet. tasks: label, stages and perhaps array element of each."""
    folder = sweep.jobs / uuid.uuid4().hex[:10]
    return Submission(folder, kind, [Task(folder, index, *task) for index, task in enumerate(tasks)], **fields)


def read_submission(folder: Path) -> Submission:
    """Read the submission in a folder. Raises FileNotFoundError, DamagedFile, and ConfigError for another version's."""
    values = read_versioned_json(folder / SUBMISSION_FILE, SCHEMA)
    try:
        del values["schema"]
        tasks = [Task(folder, index, **task) for index, task in enumerate(values.pop("tasks"))]
        return Submission(folder, tasks=tasks, **values)
    except (KeyError, TypeError) as error:
        raise DamagedFile(f"{folder / SUBMISSION_FILE}: damaged, it is no record of submitted jobs ({error})") from None


def submissions(*sweeps: SweepFolder) -> list[Submission]:
    """Return the submissions of the sweeps, oldest first; warn of records that are damaged or of another version."""
    records: list[Submission] = []
    for path in (path for sweep in sweeps for path in sweep.jobs.glob(f"*/{SUBMISSION_FILE}")):
        try:
            records.append(read_submission(path.parent))
        except FileNotFoundError:
            continue  # sbatch has just rejected it
        except ConfigError as error:
            warn(f"{error}; its jobs are not known here")
    return sorted(records, key=lambda submission: submission.written)


def all_submissions(store: Store) -> list[Submission]:
    """Return the submissions of every sweep of the store, oldest first."""
    return submissions(*map(SweepFolder, store.sweeps.glob("*")))
