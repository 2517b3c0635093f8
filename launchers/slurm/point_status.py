"""The status of single points and shared stages of a sweep: from the store, their jobs' records, squeue and sacct."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.progress_table import metrics_text
from launchers.slurm.cluster import QueuedJob
from launchers.slurm.job_records import Submission, Task
from src.errors import ConfigError
from src.store.lease import in_use
from src.store.store import OF_SFT_MODEL, SHARED_ROLES, StageName, Store, kind_of

STATES = ("failed", "cancelled", "running", "queued", "to do", "done")  # in the order of the table

# The final states of sacct that have a known cause and remedy.
_END_REASONS = {
    "TIMEOUT": "hit the time limit before it could checkpoint: the same command asks for a signal twice as early",
    "OUT_OF_MEMORY": "out of memory: raise hydra.launcher.mem_gb or lower trainer.max_tokens_per_micro_batch",
    "NODE_FAIL": "its node failed",
    "PREEMPTED": "preempted and not requeued",
    "BOOT_FAIL": "its node did not boot",
    "DEADLINE": "its deadline passed",
}
_NOT_FINAL = ("", "PENDING", "RUNNING", "COMPLETED")  # states of sacct that explain no job without a result (yet)
_PENDING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")

Stages = list[tuple[str, str]]  # (role, identity), upstream first


@dataclass
class PointStatus:
    """The status of a point, or of a stage that points share."""

    label: str
    identity: str  # of the point's result, or of the stage
    state: str
    detail: str = ""
    log: Path | None = None
    job: str | None = None
    step: int = 0
    total: int = 0
    seconds_left: float | None = None
    is_unexplained: bool = False  # its job ended with neither a result nor an error of its own, and sacct lacks its end


class StatusReader:
    """Derives the statuses of a sweep's points from one snapshot of the queue."""

    def __init__(
        self,
        store: Store,
        sweep_points: list[dict[str, Any]],
        submissions: list[Submission],
        queue: dict[str, QueuedJob],
        slurm_error: str | None,
    ) -> None:
        """sweep_points: of sweep.json. slurm_error: why the queue is unknown."""
        self.store, self.sweep_points, self.queue, self.slurm_error = store, sweep_points, queue, slurm_error
        self.sacct_states: dict[str, str] = {}
        tasks = [task for submission in submissions for task in submission.tasks if task.job is not None]
        self._tasks = {identity: task for task in tasks for _, identity in task.stages}  # the last one of each stage
        self._shared: dict[str, tuple[str, Stages]] = {}  # identity -> label, and the stage after those it needs
        for point in sweep_points:
            stages = list(point["stages"].items())
            for role, identity in stages:
                if role in SHARED_ROLES:
                    # Each may need those before it, but some need the SFT model alone.
                    before = ("sft",) if role in OF_SFT_MODEL else SHARED_ROLES[: SHARED_ROLES.index(role)]
                    upstream = [stage for stage in stages if stage[0] in before]
                    self._shared.setdefault(identity, (f"{point['setup']} {role}", [*upstream, (role, identity)]))

    def points(self) -> list[PointStatus]:
        return [self._status(point["label"], list(point["stages"].items()), point) for point in self.sweep_points]

    def shared_stages(self) -> list[PointStatus]:
        """Return the statuses of the shared stages that are not done."""
        return [self._status(*shared, {}) for shared in self._shared.values() if not self._is_done(shared[1][-1])]

    def unexplained_jobs(self) -> list[str]:
        """Return the jobs of points and shared stages that ended for a reason that sacct does not know (yet)."""
        return [row.job for row in (*self.shared_stages(), *self.points()) if row.job and row.is_unexplained]

    def _is_done(self, stage: tuple[str, str]) -> bool:
        return self.store.is_done(_stage_name(stage))

    def _status(self, label: str, stages: Stages, recorded: dict[str, Any]) -> PointStatus:
        """Return the status of the point (or shared stage) whose final stage is stages[-1].

        recorded: the point in sweep.json.
        """
        identity = stages[-1][1]
        if self._is_done(stages[-1]):
            try:
                result = stages[-1][0] == "evaluate"
                metrics = metrics_text(self.store.dir(_stage_name(stages[-1]))) if result else ""
            except (ConfigError, FileNotFoundError) as error:
                return PointStatus(label, identity, "failed", f"{error}; the same sweep again remakes it")
            return PointStatus(label, identity, "done", metrics)
        task = self._current_task(stages)
        if task is None:
            return self._without_job(PointStatus(label, identity, "to do"), stages, recorded)
        status = PointStatus(label, identity, "failed", log=task.log, job=task.job)
        queued = self.queue.get(task.job or "")
        if task.shares_job and task.status().get("state") == "failed":
            status.detail = str(task.status().get("error"))  # its job goes on with other points
        elif queued is not None and queued.state in _PENDING:
            status.state, status.detail = "queued", self._pending_reason(queued, stages, task)
        elif queued is not None and task.shares_job and task.status().get("state") != "running":
            status.state, status.detail = "queued", "its job computes other points first"
        elif queued is not None:
            status.state = "running"
            self._add_progress(status, stages)
        elif self.slurm_error is not None and task.status().get("state") != "failed":
            status.state, status.detail = "queued", "SLURM does not answer"
        else:
            self._add_cause(status, task, stages)
        return status

    def _current_task(self, stages: Stages) -> Task | None:
        """Return the task that computes the last of the stages, or before that what it follows: its alignment."""
        last = self._tasks.get(stages[-1][1])
        if last is None or stages[-1][0] in SHARED_ROLES:
            return last
        todo = (stage for stage in stages if stage[0] not in SHARED_ROLES and not self._is_done(stage))
        return self._tasks.get(next(todo, stages[-1])[1], last)  # all may be done by now

    def _without_job(self, status: PointStatus, stages: Stages, recorded: dict[str, Any]) -> PointStatus:
        """Complete the status of a point without a job: a local process may be computing it, or it failed earlier."""
        targets = [stage for stage in stages if stage[0] not in SHARED_ROLES] or stages
        if any(not self._is_done(stage) and in_use(self.store.work(_stage_name(stage))) for stage in targets):
            status.state = "running"
            self._add_progress(status, stages)
        elif recorded.get("state") in ("failed", "cancelled"):
            status.state, status.detail = recorded["state"], recorded.get("error") or ""
        return status

    def _pending_reason(self, queued: QueuedJob, stages: Stages, task: Task) -> str:
        if queued.reason == "Dependency":
            only_aligns = [kind for kind, _ in task.stages] == ["align"]
            waits_for = [role for role in SHARED_ROLES if not (only_aligns and role in OF_SFT_MODEL)]
            roles = [stage[0] for stage in stages[:-1] if stage[0] in waits_for and not self._is_done(stage)]
            return f"after {' and '.join(roles)}" if roles else "Dependency"
        reason = queued.reason if queued.reason != "None" else ""
        num_starts = task.status().get("starts", 0)
        return reason + (f" (requeued after {num_starts} starts)" if num_starts else "")

    def _add_progress(self, status: PointStatus, stages: Stages) -> None:
        stage = next((s for s in stages if not self._is_done(s)), stages[-1])  # all may be done by now
        status.detail = stage[0]
        progress = self.store.progress(_stage_name(stage))
        if progress and progress["total"]:
            status.step, status.total = progress["step"], progress["total"]
            num_steps = progress["step"] - progress["first"]  # of this attempt
            if num_steps > 0:
                seconds_per_step = progress["seconds"] / num_steps
                status.seconds_left = max(0.0, seconds_per_step * (progress["total"] - progress["step"]))

    def _add_cause(self, status: PointStatus, task: Task, stages: Stages) -> None:
        """Set why a job ended without a result: its own error, a failed upstream stage, or the state in sacct."""
        sacct_state = self.sacct_states.get(task.job or "", "")
        if task.status().get("state") == "failed":
            status.detail = str(task.status().get("error"))
        elif cause := self._upstream_failure(status.identity, stages):
            status.state, status.log = "cancelled", cause.log
            status.detail = f"{cause.label} {cause.state}: {cause.detail}"
        elif sacct_state == "CANCELLED":
            status.state, status.detail = "cancelled", "job was cancelled"
        else:
            status.is_unexplained = sacct_state in _NOT_FINAL
            reason = "no reason" if status.is_unexplained else sacct_state
            reason, line = _END_REASONS.get(sacct_state, f"{reason} in sacct"), last_line(task.log)
            status.detail = f"job ended without a result ({reason})" + (f"; {line}" if line else "")

    def _upstream_failure(self, identity: str, stages: Stages) -> PointStatus | None:
        """Return the first upstream stage that failed or was cancelled."""
        for stage in stages:
            task = self._tasks.get(stage[1])
            if task is not None and stage[1] != identity and stage[1] in self._shared and not self._is_done(stage):
                status = self._status(task.label, self._shared[stage[1]][1], {})
                if status.state in ("failed", "cancelled"):
                    return status
        return None


def _stage_name(stage: tuple[str, str]) -> StageName:
    """Return where the stage of this (role, identity) is stored."""
    role, identity = stage
    return StageName(kind_of(role), identity)


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty; "" without one."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")[-20:]
    except OSError:
        return ""
    return next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "")
