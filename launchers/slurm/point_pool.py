"""The function that a SLURM job with several points runs: the worker pool of the local launcher, inside of the job."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from submitit import JobEnvironment

from launchers.job_order import Schedule
from launchers.progress_table import LiveTable
from launchers.slurm import cluster
from launchers.slurm.job import (
    EXIT_REQUEUE,
    LINE_SECONDS,
    NEAR_TIME_LIMIT,
    STARTUP_JITTER,
    log,
    set_up_process,
    status_at_start,
)
from launchers.slurm.job_records import Task, read_submission
from launchers.worker import WorkerSlot
from launchers.worker_group import GroupSlot
from launchers.worker_pool import WorkerPool, group_slots
from src.errors import SweepFailed, describe_failure
from src.hardware import visible_gpus
from src.planning.plan import plan_of_results
from src.planning.stage import Stage
from src.preemption import Interrupted
from src.store.retention import release_models
from src.store.store import Store
from src.store.sweep_folder import SweepFolder
from src.tracking.sync_process import sync_sweep

FINAL = ("done", "failed")  # states of a point that a requeue of its job does not change


class PointStatuses:
    """The status files of the points of a job: waiting, then running, then done, failed (why) or stopped."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        """Say of every point that has not ended that it waits for its turn."""
        self.tasks = tasks
        self._run = {task.index: status_at_start(task) for task in tasks}
        self.left = [task for task in tasks if task.status().get("state") not in FINAL]
        for task in self.left:
            self._write(task, "waiting")

    def _write(self, task: Task, state: str, **values: Any) -> None:
        task.write_status({**self._run[task.index], "state": state, **values})

    def started(self, identity: str) -> None:
        """Record that a worker has begun a stage."""
        for task in self._with(identity):
            if task.status().get("state") == "waiting":
                self._run[task.index]["started"] = time.time()
                self._write(task, "running")

    def end(self, task: Task, error: str | None) -> None:
        """Record that the point has a result, or will have none (why)."""
        self.left.remove(task)
        self._write(task, "done") if error is None else self._write(task, "failed", error=error)

    def stop(self, reason: str, near_time_limit: bool) -> None:
        """Record that the job stops before the points that are left are done."""
        for task in self.left:
            self._write(task, "stopped", reason=reason, near_time_limit=near_time_limit)

    def fail(self, error: str) -> None:
        """Record that the job itself has failed, and with it the points that are left."""
        for task in list(self.left):
            with contextlib.suppress(OSError):  # a full disk must not hide the error
                self.end(task, error)

    def _with(self, identity: str) -> Iterator[Task]:
        return (task for task in self.left if any(identity == own for _, own in task.stages))


def run_points(
    results: Sequence[Stage], folder: Path, element: int, upload: str, num_workers: int, gpus_per_point: int
) -> None:
    """Compute the points of one element of the submission in `folder`, as many at once as the job has GPUs for.

    results: the `evaluate` stages of its tasks. num_workers: points at once. Points that ended in an earlier run of the
    job are left as they are; the others resume from their checkpoints. A point that fails ends alone. Raises
    SweepFailed at the end when some have failed, so that the state in SLURM is FAILED. On USR2 (near the time limit)
    and TERM the running stages save checkpoints and the job exits with EXIT_REQUEUE.
    """
    submission = read_submission(folder)
    tasks, store = submission.tasks_of(element), submission.sweep.store
    set_up_process()
    statuses = PointStatuses(tasks)
    try:
        by_identity = {result.identity: result for result in results}
        plan = plan_of_results((by_identity[_result_of(task)] for task in statuses.left), store)
        schedule = Schedule(plan)
        slots = _slots(num_workers, gpus_per_point, schedule, store)
        targets = {identity for task in tasks for _, identity in task.stages}
        log_file, jitter = folder / f"tracking-{element}.log", STARTUP_JITTER * len(submission.jobs)
        with sync_sweep(submission.sweep, log_file, stages=targets, startup_jitter=jitter) as sync:
            if upload == "during":
                sync.start()
            name = f"{submission.sweep.name} job {JobEnvironment().job_id}"
            _compute(schedule, slots, statuses, submission.sweep, name, folder / f"shared-{element}.log")
    except Interrupted as error:
        log.warning("%s; to be requeued", error)
        statuses.stop(str(error), error.reason == NEAR_TIME_LIMIT)
        sys.exit(EXIT_REQUEUE)
    except Exception as error:
        statuses.fail(describe_failure(error))
        raise
    failed = [task.label for task in tasks if task.status().get("state") == "failed"]
    if failed:
        raise SweepFailed(f"{len(failed)} of {len(tasks)} points of this job failed: {', '.join(failed)}")


def _result_of(task: Task) -> str:
    return task.stages[-1][1]


def _compute(
    schedule: Schedule, slots: list[GroupSlot], statuses: PointStatuses, sweep: SweepFolder, name: str, shared_log: Path
) -> None:
    """Compute what the schedule has in worker processes, and keep the statuses up to date.

    shared_log: the log of stages that are no point's own, and are missing all the same. Raises Interrupted.
    """
    tasks_of = defaultdict(list)
    for task in statuses.left:
        for _, identity in task.stages:
            tasks_of[identity].append(task)
    plan = schedule.plan

    def log_file(number: int, stage: Stage) -> Path:
        return tasks_of[stage.identity][0].own_log if stage.identity in tasks_of else shared_log

    def finished(stages: list[tuple[Stage, str | None]]) -> None:
        if results := {stage.identity for stage, error in stages if stage.kind == "evaluate" and error is None}:
            release_models(sweep, results)
        for stage, error in stages:
            for task in list(statuses.left):
                if _result_of(task) in schedule.failures:
                    is_own = any(identity == stage.identity for _, identity in task.stages)
                    statuses.end(task, error if is_own else schedule.failures[_result_of(task)])
                elif _result_of(task) == stage.identity:
                    statuses.end(task, None)
        table.update(stages)

    release_models(sweep, plan.done)
    for task in list(statuses.left):
        if _result_of(task) in plan.done:  # a kill came between its publication and its status
            statuses.end(task, None)
    pool = WorkerPool(schedule, slots, log_file)
    table = LiveTable(name, schedule, sweep.store, pool.groups, LINE_SECONDS)
    with pool, table:
        pool.run(lambda stage: statuses.started(stage.identity), finished)


def _slots(num_workers: int, gpus_per_point: int, schedule: Schedule, store: Store) -> list[GroupSlot]:
    """Return what each group of worker processes of this job may use, and until when."""
    # A job that has its node to itself may see more GPUs than it asked for.
    gpus, seconds_left = visible_gpus()[: num_workers * gpus_per_point], cluster.seconds_left(JobEnvironment().job_id)
    # The signal was asked for before anybody had measured a save; a requeued job has the same one again.
    end = None if seconds_left is None else (time.monotonic() + seconds_left, NEAR_TIME_LIMIT)
    return group_slots(
        None if gpus else num_workers,
        gpus_per_point,
        gpus,
        max(1, schedule.plan.num_points_to_compute),
        lambda num_processes, devices: WorkerSlot(num_processes, devices, store.output_dir, in_job=True, end=end),
    )
