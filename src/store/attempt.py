"""One attempt at computing a stage. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from src import preemption
from src.store.files import with_checksum, write_json
from src.store.lease import Lease

T = TypeVar("T")

PROGRESS_FILE = "progress.json"  # beside the lease of a stage: its last reported progress

# (stage label, step, total): called as a stage advances.
Report = Callable[[str, int, int], None]


@dataclass
class Attempt:
    """One attempt at computing a stage: output directory, checkpoint directory and progress callback."""

    out: Path  # private until published
    checkpoints: Path  # outlives the attempt; the next attempt resumes from it
    lease: Lease | None  # of rank 0; other ranks have none and write nothing
    report: Report
    label: str
    identity: str
    output_dir: Path
    started: float = field(default_factory=time.monotonic)  # durations must not jump with the clock
    prior_seconds: float = 0.0  # of earlier attempts, as recorded in the checkpoint
    tokens: int = 0
    validation_tokens: int = 0  # of these, those of held-out rows, which do not grow with the rows that are trained on
    save_seconds: float | None = None  # of the last checkpoint: from the end of a step until its state was on disk
    processes: int = 1  # ranks that compute the stage together, with one accelerator each where there are any
    held_processes: int = 1  # ranks of the run, which hold their accelerators meanwhile
    loading_seconds: float = 0.0  # of `seconds`: from the start of this attempt to its first step, and `loading` later
    alone_seconds: float = 0.0  # of `seconds`: in which rank 0 computed and the other processes waited
    waited_seconds: float = 0.0  # before the attempt: for other processes that computed what this one needs
    packages: tuple[str, ...] = ()  # that the stage uses besides torch and the like
    _last_report: float = 0.0
    _first_step: int | None = None

    def step(self, step: int, total: int, interruptible: bool = True) -> None:
        """Report progress. The first call, with the step to start at, says that models and data have been loaded.

        Raises LeaseLost when another process has taken the stage over, and Interrupted when this process was asked to
        stop (unless not `interruptible`: the caller saves a checkpoint first and raises by itself).
        """
        if self._first_step is None:
            self._first_step, self.loading_seconds = step, time.monotonic() - self.started
        self._report(self.label, step, total, self._first_step, self.started, interruptible)

    def track(self, rows: Sequence[T], description: str) -> Iterator[T]:
        """Iterate over rows, reporting progress once it takes longer than two seconds. Raises like `step`."""
        started = time.monotonic()
        for number, row in enumerate(rows):
            if time.monotonic() - started > 2:
                self._report(f"{self.label}: {description}", number, len(rows), 0, started)
            yield row
        if time.monotonic() - started > 2:
            self._report(f"{self.label}: {description}", len(rows), len(rows), 0, started)

    def part(self, description: str, total: int) -> Callable[[int], None]:
        """Return what reports how many of `total` rows of a part of the stage are done. It raises like `step`."""
        started = time.monotonic()
        return lambda done: self._report(f"{self.label}: {description}", done, total, 0, started)

    def _report(
        self, label: str, step: int, total: int, first: int, started: float, interruptible: bool = True
    ) -> None:
        if self.lease is None:
            return
        self.lease.check()
        if interruptible and step < total and (reason := preemption.stop_reason()):
            raise preemption.Interrupted(f"{label} stopped at {step}/{total}", reason)
        if time.monotonic() - self._last_report >= 0.5 or step >= total:
            self._last_report = time.monotonic()
            # first: the step this attempt resumed at; seconds: since then, as clocks of other machines differ
            progress = {"label": label, "step": step, "total": total, "first": first}
            progress["seconds"] = time.monotonic() - started
            write_json(self.lease.folder / PROGRESS_FILE, with_checksum(progress))
            self.report(label, step, total)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the artifacts: rank 0 of those that compute the stage together."""
        return self.lease is not None

    @property
    def seconds(self) -> float:
        return self.prior_seconds + time.monotonic() - self.started

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Load in the body what only later steps need, or start a server."""
        started, counts_already = time.monotonic(), self._first_step is None
        yield
        if not counts_already:
            self.loading_seconds += time.monotonic() - started

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Compute in the body what the other processes wait for."""
        started = time.monotonic()
        yield
        self.alone_seconds += time.monotonic() - started

    def duration(self) -> dict[str, float]:
        """Return what DONE and result.json say of the stage's time (`src.store.usage`)."""
        names = "seconds", "loading_seconds", "alone_seconds", "waited_seconds"
        processes = {"processes": self.processes, "held_processes": self.held_processes}
        return {**{name: round(getattr(self, name), 3) for name in names}, **processes}
