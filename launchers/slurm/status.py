"""What becomes of a sweep's points: read from the store, from what jobs said, and from squeue and sacct."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.slurm import cluster
from launchers.slurm import job_records as ledger
from launchers.slurm.cluster import Queued
from launchers.slurm.graph import SHARED
from launchers.slurm.job_records import Submission
from src.errors import ConfigError, PointFailure
from src.store.files import read_json
from src.store.lease import in_use
from src.store.store import RESULT_FILE, StageName, Store
from src.store.sweep_folder import SweepFolder

STATES = ("failed", "cancelled", "running", "queued", "to do", "done")  # as one wants to read them
PATIENCE_SECONDS = 6.0  # with accounting, which lags behind

# What SLURM's words for an end mean to a user.
_ENDS = {
    "TIMEOUT": "its time limit came before it could save itself: raise hydra.launcher.signal_delay_s or timeout_min",
    "OUT_OF_MEMORY": "out of memory: raise hydra.launcher.mem_gb or lower trainer.max_tokens_per_micro_batch",
    "NODE_FAIL": "its node failed",
    "PREEMPTED": "preempted and not queued again",
    "BOOT_FAIL": "its node did not start",
    "DEADLINE": "its deadline passed",
}
_NOT_YET = ("", "PENDING", "RUNNING", "COMPLETED")  # not what accounting says in the end of a job without a result
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")


@dataclass
class State:
    """Of a point, or of a stage that points share."""

    label: str
    identity: str
    state: str
    detail: str = ""
    log: Path | None = None
    job: str | None = None
    step: int = 0
    total: int = 0
    seconds_left: float | None = None


@dataclass
class _Owned:
    submission: Submission
    index: int

    @property
    def job(self) -> str | None:
        return self.submission.tasks[self.index].job

    @property
    def said(self) -> dict[str, Any]:
        return self.submission.said(self.index)

    @property
    def log(self) -> Path:
        return self.submission.log(self.index)


@dataclass
class Picture:
    """A sweep at one moment."""

    points: list[State]
    shared: list[State]  # stages several points rest on, unless done
    jobs: list[Queued]  # of this sweep's own submissions, not ended
    aggregation: list[str]  # those of them that conclude the sweep
    removed: dict[str, str]  # job -> label: own jobs whose points the sweep no longer has
    unconcluded: str | None  # why the aggregation, which has ended, did not write the results
    silent: str | None = None  # why SLURM could not be asked

    def count(self, state: str) -> int:
        return sum(point.state == state for point in self.points)

    @property
    def ended(self) -> bool:
        """Nothing runs or waits any more, the conclusion included."""
        return not self.jobs and not any(p.state in ("running", "queued") for p in self.points)


def look(folder: Path, patience: float = PATIENCE_SECONDS) -> Picture:
    """Ask the store and SLURM. patience: seconds to wait for accounting to catch up with jobs that have just ended."""
    folder = folder.resolve()
    sweep = SweepFolder(folder).read()
    store = SweepFolder(folder).store
    known = [s for s in ledger.all_submissions(store) if s.state == "submitted"]
    silent = None
    queue: dict[str, Queued] = {}
    if known:
        try:
            queue = cluster.queue()
        except (
            cluster.SlurmUnavailable,
            ConfigError,
        ) as error:  # not a submit host, or a controller that is down: the store still answers
            silent = str(error)
    view = _View(store, sweep, known, queue, silent)
    end = time.monotonic() + patience
    while silent is None and (unknown := view.unaccounted()):
        view.accounted |= cluster.accounted(unknown)
        if time.monotonic() >= end or not view.unaccounted():
            break
        time.sleep(0.5)
    return view.picture(folder)


def lost_points(folder: Path) -> dict[str, PointFailure]:
    """Of a sweep whose jobs have ended: the points without a result, each with what became of it."""
    return {
        point.identity: PointFailure(
            "cancelled" if point.state == "cancelled" else "failed", point.detail or point.state
        )
        for point in look(folder, patience=5 * PATIENCE_SECONDS).points
        if point.state != "done"
    }


class _View:
    def __init__(
        self, store: Store, sweep: dict[str, Any], known: list[Submission], queue: dict[str, Queued], silent: str | None
    ) -> None:
        self.store, self.sweep, self.known, self.queue, self.silent = store, sweep, known, queue, silent
        self.accounted: dict[str, str] = {}
        self.owner: dict[str, _Owned] = {}  # stage -> the last task that was to compute it
        for submission in known:
            for index, task in enumerate(submission.tasks):
                self.owner |= {identity: _Owned(submission, index) for _, identity in task.stages}

    def unaccounted(self) -> list[str]:
        """Jobs that ended without a result or a word of their own, of which accounting has not said why."""
        jobs: dict[str, None] = {}
        for stages in [*(own for _, own in self._shared_stages()), *(_stages(p) for p in self.sweep["points"])]:
            owned = self.owner.get(stages[-1][1])
            if owned is None or owned.job is None or owned.job in self.queue or owned.said.get("state") == "failed":
                continue
            state = self.accounted.get(owned.job, "")
            if state in _NOT_YET and not self._done(stages[-1]):
                jobs[owned.job] = None
        return list(jobs)

    def _done(self, stage: tuple[str, str]) -> bool:
        return self.store.is_done(_name(stage))

    def picture(self, folder: Path) -> Picture:
        points = [self._state(point["label"], _stages(point), point) for point in self.sweep["points"]]
        mine = {identity for point in self.sweep["points"] for identity in point["stages"].values()}
        own = [s for s in self.known if s.sweep.path == folder]
        jobs = [job for s in own for job in s.jobs if job in self.queue]
        return Picture(
            points,
            [self._state(label, stages, {}) for label, stages in self._shared_stages()],
            [self.queue[job] for job in jobs],
            [job for s in own if s.kind == "aggregate" for job in s.jobs if job in self.queue],
            ledger.strays(own, mine, self.queue),
            self._unconcluded([s for s in own if s.kind == "aggregate"]),
            self.silent,
        )

    def _unconcluded(self, aggregations: list[Submission]) -> str | None:
        if self.sweep["finished"] or not aggregations or aggregations[-1].jobs[0] in self.queue or self.silent:
            return None
        last = aggregations[-1]
        why = last.said(0).get("error") or _last_line(last.log(0)) or "it did not start"
        return (
            f"the aggregation failed ({why}; log: {last.log(0)}); the same command again, or sweeps.aggregate, does it"
        )

    def _shared_stages(self) -> Iterable[tuple[str, list[tuple[str, str]]]]:
        """(label, the stage below those it rests on) of every shared stage that is not done, each once."""
        seen = set()
        for point in self.sweep["points"]:
            below: list[tuple[str, str]] = []
            for role, identity in point["stages"].items():
                if role in SHARED and identity not in seen and not self._done((role, identity)):
                    seen.add(identity)
                    yield f"{point['setup']} {role}", [*below, (role, identity)]
                if role == "sft":
                    below.append((role, identity))

    def _state(self, label: str, stages: list[tuple[str, str]], recorded: dict[str, Any]) -> State:
        """Of what the last of the stages is there for."""
        identity = stages[-1][1]
        if self._done(stages[-1]):
            return State(label, identity, "done", self._result(stages[-1]))
        owned = self.owner.get(identity)
        if owned is None or owned.job is None:
            return self._elsewhere(State(label, identity, "to do"), stages, recorded)
        state = State(label, identity, "failed", log=owned.log, job=owned.job)
        job = self.queue.get(owned.job)
        if job is not None and job.state in _WAITING:
            state.state, state.detail = "queued", self._waits_for(job, stages, owned)
        elif job is not None:
            state.state = "running"
            self._progress(state, stages)
        elif self.silent is not None and owned.said.get("state") != "failed":
            state.state, state.detail = "queued", "SLURM does not answer"
        else:
            self._ended(state, owned, stages)
        return state

    def _result(self, stage: tuple[str, str]) -> str:
        try:
            result = read_json(self.store.dir(_name(stage)) / RESULT_FILE)
        except FileNotFoundError:  # a shared stage's
            return ""
        quality, kl = result["quality"], result["kl"]["per_sequence"]
        return ", ".join(
            f"{name} {entry['value']:.{digits}f}"
            for name, entry, digits in ((quality["metric"], quality, 3), ("KL", kl, 2))
            if entry["value"] is not None
        )

    def _elsewhere(self, state: State, stages: list[tuple[str, str]], recorded: dict[str, Any]) -> State:
        """No job of ours: a local process may be at it, or an earlier run has failed."""
        own = [stage for stage in stages if stage[0] not in SHARED] or stages
        if any(not self._done(stage) and in_use(self.store.work(_name(stage))) for stage in own):
            state.state = "running"
            self._progress(state, stages)
        elif recorded.get("state") in ("failed", "cancelled"):
            state.state, state.detail = recorded["state"], recorded["error"] or ""
        return state

    def _waits_for(self, job: Queued, stages: list[tuple[str, str]], owned: _Owned) -> str:
        if job.reason == "Dependency":
            names = [stage[0] for stage in stages[:-1] if stage[0] in SHARED and not self._done(stage)]
            return f"after {' and '.join(names)}" if names else "Dependency"
        again = owned.said.get("starts", 0)
        return (job.reason if job.reason != "None" else "") + (f" (queued again after {again} starts)" if again else "")

    def _progress(self, state: State, stages: list[tuple[str, str]]) -> None:
        stage = next((s for s in stages if not self._done(s)), stages[-1])  # it may be done by now
        state.detail = stage[0]
        progress = self.store.progress(_name(stage))
        if progress and progress["total"]:
            state.step, state.total = progress["step"], progress["total"]
            steps = progress["step"] - (progress.get("first") or 0)
            if steps > 0:
                each = (progress["now"] - progress["started"]) / steps
                state.seconds_left = max(0.0, each * (progress["total"] - progress["step"]))

    def _ended(self, state: State, owned: _Owned, stages: list[tuple[str, str]]) -> None:
        said, word = owned.said, self.accounted.get(owned.job or "", "")
        if said.get("state") == "failed":
            state.detail = said["error"]
        elif cause := self._upstream_failure(state.identity, stages):
            state.state, state.detail, state.log = "cancelled", *cause
        elif word == "CANCELLED":
            state.state, state.detail = "cancelled", "its job was cancelled"
        else:
            line = _last_line(owned.log)
            why = _ENDS.get(word) or ("SLURM does not say why" if word in _NOT_YET else f"SLURM says {word}")
            state.detail = f"its job ended without a result: {why}" + (f"; {line}" if line else "")

    def _upstream_failure(self, identity: str, stages: list[tuple[str, str]]) -> tuple[str, Path | None] | None:
        """What the first stage below that will not come says of itself."""
        for role, up in stages:
            owned = self.owner.get(up)
            if up == identity or role not in SHARED or owned is None or self._done((role, up)):
                continue
            label = owned.submission.tasks[owned.index].label
            state = self._state(label, [*(s for s in stages if s[0] == "sft" != role), (role, up)], {})
            if state.state in ("failed", "cancelled"):
                return f"{label} {state.state}: {state.detail}", state.log
        return None


def _stages(point: dict[str, Any]) -> list[tuple[str, str]]:
    """(role, identity) of a recorded point's stages, `evaluate` last."""
    return list(point["stages"].items())


def _name(stage: tuple[str, str]) -> StageName:
    """(role, identity) -> where it lies."""
    role, identity = stage
    return StageName("generate" if role == "baseline" else role, identity)


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").split("\n")[-20:]
    except OSError:
        return ""
    return next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "")
