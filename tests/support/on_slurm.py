"""What tests on a SLURM cluster share: the sweeps they submit, and how they follow them."""

import subprocess
from pathlib import Path
from typing import Any

from launchers.slurm.job_records import Submission
from launchers.slurm.job_records import submissions as submissions_of
from src.store.sweep_folder import SweepFolder
from tests.support.commands import SMALL, run_in_process
from tests.support.slurm_cluster import Cluster
from tests.support.waiting import wait_until

MAX_ARRAY = 8
SLURM = [
    *("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=60"),
    "hydra.launcher.array_parallelism=2",
]
FOUR_POINTS = ["-m", "method=dpo,orpo", "beta=0.1,1", *SMALL, "sweep.name=four"]
# Long enough to be interrupted several times.
LONG = [*SMALL, "dataset.train_size=256", "trainer.align.epochs=16", "trainer.checkpoint_minutes=0.005"]
START_LATER = "hydra.launcher.additional_parameters.begin=now+1hour"  # jobs stay queued and use no CPU
TIMEOUT_S = 600.0


def sweep(output_dir: Path, name: str) -> SweepFolder:
    return SweepFolder(output_dir / "sweeps" / name)


def queue(cluster: Cluster) -> list[str]:
    """Return the ids of pending and running jobs."""
    return cluster.run("squeue", "-h", "-r", "-o", "%i").split()


def sacct_rows(cluster: Cluster, jobs: list[str]) -> dict[str, dict[str, str]]:
    """Return sacct's row of each job, waiting until it has all of them: accounting lags behind."""
    fields = "JobID,JobName,State,Submit,Start,End"
    rows: dict[str, dict[str, str]] = {}

    def complete() -> bool:
        lines = cluster.run("sacct", "-X", "-P", "-o", fields, "-j", ",".join(jobs)).splitlines()
        rows.clear()  # an array that was one row has several once its tasks start or are cancelled
        rows.update({p[0]: dict(zip(fields.split(","), p, strict=True)) for p in (x.split("|") for x in lines[1:])})
        return set(jobs) <= {r.partition("_[")[0] for r in rows} and all(r["End"] != "Unknown" for r in rows.values())

    wait_until(complete, TIMEOUT_S, "sacct to have every job")
    return rows


def run_tool(name: str, folder: SweepFolder, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m sweeps.NAME FOLDER`."""
    return run_in_process(folder.path, *options, module=f"sweeps.{name}")


def submitted(folder: SweepFolder) -> dict[str, Submission]:
    """Return the newest submission of each kind."""
    return {s.kind: s for s in submissions_of(folder) if s.state == "submitted"}


def job_of(folder: SweepFolder, kind: str) -> str:
    """Return the first job of the newest submission of a kind."""
    return submitted(folder)[kind].jobs[0]


def task_statuses(folder: SweepFolder) -> list[dict[str, Any]]:
    """Return what the jobs of a sweep wrote into their status files."""
    statuses = [task.status() for s in submissions_of(folder) for task in s.tasks]
    return [status for status in statuses if status]


def status_of(folder: SweepFolder, job: str) -> dict[str, Any]:
    """Return what one job wrote into its status file; empty before it has started."""
    return next((task.status() for s in submissions_of(folder) for task in s.tasks if task.job == job), {})


def is_finished(folder: SweepFolder) -> bool:
    return folder.read()["finished"] is not None


def wait_finished(folder: SweepFolder) -> None:
    wait_until(lambda: is_finished(folder), TIMEOUT_S, f"the sweep {folder.name} to finish")


def wait_queue_empty(cluster: Cluster, timeout: float = TIMEOUT_S) -> None:
    wait_until(lambda: not queue(cluster), timeout, "the queue to be empty")


def newest_step(output_dir: Path) -> int:
    """Return the step of the newest checkpoint of an alignment that is running; 0 without one."""
    paths = (output_dir / "store").glob("align/.work/*/checkpoints/*/step-*")
    return max((int(path.name.removeprefix("step-")) for path in paths), default=0)
