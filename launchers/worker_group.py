"""Worker processes that compute one stage together, as torchrun would start them; often a single one."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from launchers.worker import Outcome, Stop, Work, Worker, WorkerSlot
from src.planning.stage import Stage

_DEATH_SECONDS = 2.0  # for processes to be reaped, of which the failure of another one is a consequence
END_SECONDS = 10.0  # for a worker to end before it is killed


@dataclass(frozen=True)
class GroupSlot:
    """The resources of one group: how many processes, and those that each of them may use."""

    size: int
    worker: WorkerSlot  # of the first process


class WorkerGroup:
    """The processes of one group, and the stage they are computing."""

    def __init__(self, slot: GroupSlot) -> None:
        self.slot = slot
        self.stage: Stage | None = None
        self.workers = self._start()

    def _start(self) -> list[Worker]:
        # The port of processes that have died may still be taken.
        port = _free_port() if self.slot.size > 1 else 0
        slots = [replace(self.slot.worker, rank=rank, size=self.slot.size, port=port) for rank in range(self.slot.size)]
        return [Worker(slot) for slot in slots]

    @property
    def handles(self) -> list[Any]:
        """What becomes ready when a process has ended its part of the stage, or itself."""
        return [handle for worker in self.workers if worker.outcome is None for handle in worker.handles]

    def submit(self, stage: Stage, log_file: Path) -> None:
        """Compute a stage; the log of another process than the first has its rank in its name."""
        self.stage = stage
        for rank, worker in enumerate(self.workers):
            file = log_file.with_suffix(f".rank{rank}{log_file.suffix}") if rank else log_file
            worker.send(Work(stage, file))

    def request_stop(self, reason: str) -> None:
        """Ask the stage to save a checkpoint and end."""
        for worker in self.workers:
            worker.send(Stop(reason))

    def collect(self, ready: list[Any]) -> Outcome | None:
        """Return how the stage has ended; None while it runs. ready: handles, of any group."""
        for worker in self.workers:
            if worker.outcome is None and any(handle in ready for handle in worker.handles):
                worker.receive()
        outcome = self._joint_outcome()
        if outcome is not None:
            self.stage = None
        return outcome

    def _joint_outcome(self) -> Outcome | None:
        outcomes = [worker.outcome for worker in self.workers if worker.outcome is not None]
        bad = [outcome for outcome in outcomes if outcome.state in ("failed", "died")]
        if bad:
            # When one process is killed, an exchange with it fails in others, which may be seen first.
            return next((outcome for outcome in (*bad, *self._deaths()) if outcome.state == "died"), bad[0])
        leader = self.workers[0].outcome
        # The first process has published a checkpoint when it stops; others may wait for it between two stages.
        if leader is not None and leader.state == "stopped":
            return leader
        return leader if len(outcomes) == len(self.workers) else None

    def _deaths(self) -> list[Outcome]:
        """Return the deaths of processes that are noticed in the next moments."""
        if self.slot.size == 1:
            return []
        waiting = [worker for worker in self.workers if worker.outcome is None or worker.outcome.state == "failed"]
        dead = wait([worker.process.sentinel for worker in waiting], timeout=_DEATH_SECONDS)
        for worker in waiting:
            if worker.process.sentinel in dead:
                worker.receive()
        return [w.outcome for w in waiting if w.outcome is not None and w.outcome.state == "died"]

    def is_usable(self, last: Outcome) -> bool:
        """Return whether the processes can take another stage after this outcome.

        When one of several has failed, the others wait for it in an exchange that will not end.
        """
        is_whole = self.slot.size == 1 or last.state == "done"
        return is_whole and all(worker.process.is_alive() for worker in self.workers)

    def restart(self) -> None:
        """Replace all processes."""
        for worker in self.workers:
            worker.process.kill()
            worker.end()
            worker.join(END_SECONDS)
        self.workers = self._start()

    def end(self) -> None:
        for worker in self.workers:
            worker.end()

    def join(self, timeout: float) -> None:
        for worker in self.workers:
            worker.join(timeout)


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])
