"""Computes the stages of a schedule on this machine, in warm worker processes: locally, and inside of SLURM jobs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

from launchers.job_order import Schedule
from launchers.worker import WorkerSlot
from launchers.worker_group import END_SECONDS, GroupSlot, WorkerGroup
from src import preemption
from src.hardware import cores
from src.planning.stage import Stage

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.5


def group_slots(
    num_groups: int | None, size: int, gpus: list[str], most: int, worker: Callable[[int, str | None], WorkerSlot]
) -> list[GroupSlot]:
    """Return what each group of `size` processes may use.

    num_groups: None for one for each `size` GPUs, or CPU cores where there are no GPUs. most: the largest number of
    groups that can be busy at once. worker: called with the number of all processes, and the GPUs of a group.
    """
    sets = [",".join(gpus[first : first + size]) for first in range(0, len(gpus) - size + 1, size)]
    count = min(num_groups or len(sets) or max(1, cores() // size), most)
    return [GroupSlot(size, worker(count * size, sets[i % len(sets)] if sets else None)) for i in range(count)]


class WorkerPool:
    """Groups of worker processes, from the start of a `with` block to its end."""

    def __init__(self, schedule: Schedule, slots: list[GroupSlot], log_file: Callable[[int, Stage], Path]) -> None:
        """log_file: returns the log of a stage that the group with this number computes."""
        self.schedule, self.slots, self.log_file = schedule, slots, log_file
        self.groups: list[WorkerGroup] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        for group in self.groups:
            group.end()
        deadline = time.monotonic() + END_SECONDS
        for group in self.groups:
            group.join(max(0.0, deadline - time.monotonic()))

    def run(
        self,
        started: Callable[[Stage], None] = lambda stage: None,
        finished: Callable[[list[tuple[Stage, str | None]]], None] = lambda stages: None,
    ) -> None:
        """Compute everything that the schedule has.

        started: called with each stage that a group begins. finished: called about twice a second with the stages that
        are done (None) or have failed (why) since. Raises Interrupted once all stages have stopped, after this process
        was asked to stop.
        """
        if not self.schedule.finished():
            self.groups.extend(map(WorkerGroup, self.slots))
        asked: set[str] = set()  # identities of stages that were asked to stop
        while not self.schedule.finished():
            if reason := preemption.stop_reason():
                self._stop(reason, asked)
            else:
                self._submit(started)
            finished(self._collect())

    def _submit(self, started: Callable[[Stage], None]) -> None:
        for number, group in enumerate(self.groups):
            if group.stage is None and (stage := self.schedule.next()) is not None:
                group.submit(stage, self.log_file(number, stage))
                started(stage)

    def _stop(self, reason: str, asked: set[str]) -> None:
        """Ask what runs to stop, once. Raises Interrupted when nothing runs any more."""
        busy = [(group, group.stage.identity) for group in self.groups if group.stage is not None]
        if not busy:
            raise preemption.Interrupted("stopped at checkpoints", reason)
        for group, identity in busy:
            if identity not in asked:
                asked.add(identity)
                group.request_stop(reason)

    def _collect(self) -> list[tuple[Stage, str | None]]:
        """Wait for results and return the stages that are done (None) or failed (why); none after half a second.

        A group of which a process died is replaced. Its stage is retried: a kill is no fault of the stage, which
        resumes from its checkpoint in fresh processes.
        """
        busy = [group for group in self.groups if group.stage is not None]
        ready = wait([handle for group in busy for handle in group.handles], timeout=_POLL_SECONDS)
        finished: list[tuple[Stage, str | None]] = []
        for group in busy:
            stage, outcome = group.stage, group.collect(ready)
            if stage is None or outcome is None:
                continue
            match outcome.state:
                case "done":
                    self.schedule.done(stage)
                    finished.append((stage, None))
                case "stopped":  # by itself perhaps, as it knows best how long a save takes: then the others stop too
                    self.schedule.postpone(stage)
                    preemption.request(preemption.stop_reason() or outcome.text)
                case "died" if self.schedule.requeue(stage):
                    log.warning("%s: %s; retrying", stage.label, outcome.text)
                case _:
                    self.schedule.fail(stage, outcome.text)
                    finished.append((stage, outcome.text))
            if not group.is_usable(outcome) and not self.schedule.finished() and preemption.stop_reason() is None:
                group.restart()
        return finished
