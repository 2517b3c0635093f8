"""The status of a sweep on SLURM: its points, its jobs, and whether its aggregation succeeded."""

from __future__ import annotations

import time
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

from launchers.slurm import cluster
from launchers.slurm.cluster import QueuedJob
from launchers.slurm.job_records import Submission, all_submissions
from launchers.slurm.point_status import PointStatus, StatusReader, last_line
from src.errors import ConfigError, PointFailure
from src.store.sweep_folder import SweepFolder
from src.store.usage import Usage, usage_by_kind

SACCT_TIMEOUT_S = 6.0  # accounting lags behind


@dataclass
class SweepStatus:
    """A sweep at one moment."""

    points: list[PointStatus]
    shared_stages: list[PointStatus]  # that are not done
    jobs: list[QueuedJob]  # pending and running jobs of the sweep's submissions
    aggregation: list[str]  # ids of those that aggregate the sweep
    aggregation_error: str | None  # why the aggregation ended without writing the results
    slurm_error: str | None = None  # why SLURM could not be asked
    usage: dict[str, Usage] = field(default_factory=dict)  # kind of stage -> what its finished ones took

    @property
    def has_active_points(self) -> bool:
        return any(point.state in ("running", "queued") for point in self.points)

    @property
    def ended(self) -> bool:
        """No job is running or pending, including the aggregation."""
        return not self.jobs and not self.has_active_points


def read_status(folder: SweepFolder, sacct_timeout: float = SACCT_TIMEOUT_S) -> SweepStatus:
    """Read the status of a sweep from its store and SLURM.

    sacct_timeout: seconds to wait until accounting knows how jobs that have just left the queue ended.
    """
    folder = SweepFolder(folder.path.resolve())
    record, submissions = folder.read(), [s for s in all_submissions(folder.store) if s.state == "submitted"]
    queue: dict[str, QueuedJob] = {}
    slurm_error = None
    if submissions:
        try:
            queue = cluster.queue()
        except (cluster.SlurmUnavailable, ConfigError) as error:  # the controller is down, or this is no submit host
            slurm_error = str(error)
    reader = StatusReader(folder.store, record["points"], submissions, queue, slurm_error)
    deadline = time.monotonic() + sacct_timeout
    while unexplained := reader.unexplained_jobs():
        reader.sacct_states |= cluster.sacct_states(unexplained)
        if time.monotonic() >= deadline or not reader.unexplained_jobs():
            break
        time.sleep(0.5)
    sweep_submissions = [s for s in submissions if s.sweep.path == folder.path]
    aggregations = [s for s in sweep_submissions if s.kind == "aggregate"]
    return SweepStatus(
        reader.points(),
        reader.shared_stages(),
        [queue[job] for s in sweep_submissions for job in s.jobs if job in queue],
        [job for s in aggregations for job in s.jobs if job in queue],
        None if slurm_error else _aggregation_error(record, aggregations, queue),
        slurm_error,
        usage_by_kind(folder.store, (stage for point in record["points"] for stage in point["stages"].items())),
    )


def failed_points(folder: SweepFolder) -> dict[str, PointFailure]:
    """Return the points without a result of a sweep whose jobs have ended: identity of the result -> why."""
    points = read_status(folder, sacct_timeout=5 * SACCT_TIMEOUT_S).points
    failures: dict[str, PointFailure] = {}
    for point in points:
        if point.state != "done":
            state = "cancelled" if point.state == "cancelled" else "failed"
            failures[point.identity] = PointFailure(state, point.detail or point.state)
    return failures


def _aggregation_error(record: dict[str, Any], aggregations: list[Submission], queue: Container[str]) -> str | None:
    """Return why the last aggregation left an unfinished sweep.json; None when it is finished, queued or running."""
    if record["finished"] or not aggregations or aggregations[-1].jobs[0] in queue:
        return None
    sweep, (task,) = aggregations[-1].sweep, aggregations[-1].tasks
    reason = task.status().get("error") or last_line(task.log) or "it did not start"
    return (
        f"the aggregation failed ({reason}; log: {task.log}); rerun the same command, or run "
        f"python -m sweeps.aggregate {sweep.path}"
    )
