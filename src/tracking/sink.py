"""The interface of a tracker. Runs are synced to it; W&B and TensorBoard implement it."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

STEP = "train/step"  # the x axis of training metrics


def tracked_name(name: str) -> str:
    """Return what trackers call a metric of metrics.jsonl: `train/loss`, and of held-out rows `eval/loss`."""
    return name.replace("eval_", "eval/", 1) if name.startswith("eval_") else f"train/{name}"


class RunLocked(Exception):
    """Another process has this run open; it is left to that process for now."""


@dataclass(frozen=True)
class RunMetadata:
    """What a tracker lists a run by; the names are those of wandb.init."""

    id: str
    job_type: str
    name: str
    group: str | None
    tags: tuple[str, ...]
    config: dict[str, Any]


class RunWriter:
    """One open run of a tracker. A sink overrides the methods whose content its tracker can show."""

    last_step = -1  # the last step whose metrics the tracker has
    result: str | None = None  # identity of the last result whose summary and samples it has

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Add the training metrics of one step; steps must increase."""

    def add_result(self, result: str, summary: dict[str, Any]) -> None:
        """Write the final values of a run. result: identity of what they belong to."""

    def add_config(self, config: dict[str, Any]) -> None:
        """Add entries to the config of the run."""

    def add_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        pass

    def add_media(self, name: str, file: Path) -> None:
        """Show a figure (.png) or a page (.html)."""

    def add_files(self, files: Sequence[Path], root: Path) -> None:
        """Keep small files with the run, under their paths relative to `root`."""

    def add_artifact(self, name: str, paths: Sequence[Path]) -> None:
        """Keep files and folders together as one versioned artifact."""

    def finish(self, complete: bool) -> None:
        """Close the run once the tracker has everything; raises when it does not take it. complete: nothing follows."""


@dataclass
class Sink:
    """A tracker that runs are synced to."""

    name: str  # of its folder below OUTPUT_DIR/tracking
    title: str  # in messages
    target: str  # server and project: what another target has is written again; empty: it is not
    resumable: bool  # whether a run can be opened while it is computed, and again later
    # Creates the run, or resumes it. Raises RunLocked, or when the tracker does not answer.
    open: Callable[[RunMetadata], RunWriter]


def lock_run(file: Path) -> IO[str]:
    """Return a lock that is held until it is closed or this process ends. Raises RunLocked when another holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = file.open("w", encoding="utf-8")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise RunLocked(file.name) from None
    except OSError:  # a file system without locks
        pass
    return handle
