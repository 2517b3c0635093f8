"""Checkpoints of a training stage: published by one rename, verified by checksum before the next attempt loads one.

Every rank copies its part of the state to memory at the end of a step and writes it in a thread while training goes on;
under DeepSpeed training waits. Rank 0 publishes a checkpoint at the end of the first step by which all have written.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from src import preemption
from src.distributed import get_distributed
from src.errors import DamagedFile, StageError, describe_failure
from src.planning.save_time import seconds_to_stop
from src.store.attempt import Attempt
from src.store.files import file_digest, fsync_file, is_full, read_checksummed_json, remove, with_checksum, write_json
from src.store.store import CHECKPOINT_FILE, CHECKPOINTS, METRICS_FILE
from src.training.checkpoint_schedule import CheckpointSchedule
from src.training.engine import TrainingEngine
from src.training.training_state import StagedState, WrittenPart

log = logging.getLogger(__name__)

KEEP = 2  # the newest and the one before it, in case the newest is damaged


class Votes(NamedTuple):
    """What the ranks agree on at the end of every step; each number is the sum over the ranks."""

    stop: int  # ranks that were asked to stop
    due: int  # 1 when a checkpoint is due by the clock of rank 0
    written: int  # ranks that have written their part of the pending checkpoint, or have failed to


class Checkpointer:
    """Saves and loads the checkpoints of one attempt. Every rank has one, and calls each method at the same step."""

    def __init__(
        self, engine: TrainingEngine, attempt: Attempt, minutes: float, is_followed_by_work: bool = False
    ) -> None:
        """minutes: of training that a kill may cost. is_followed_by_work: whether the last step is not the stage's."""
        self._engine, self._attempt, self._schedule = engine, attempt, CheckpointSchedule(minutes)
        self._folder = attempt.checkpoints / engine.checkpoint_format
        self._is_followed_by_work = is_followed_by_work
        self._pending: _PendingSave | None = None
        self._removal = _Removal([])

    def votes(self, is_last: bool = False) -> Votes:
        """Return this rank's part of the votes, to be summed in the all-reduce that every step does anyway."""
        is_due = self._schedule.is_due_at_end() if is_last else self._schedule.is_due()
        is_due = is_due and get_distributed().is_main_process
        is_written = self._pending is not None and self._pending.is_written
        return Votes(preemption.stop_reason() is not None, is_due, is_written)

    def end_step(self, step: int, end: int, votes: Votes) -> None:
        """Publish the pending checkpoint if it is written, and save one of `step` steps if that is due.

        votes: of all ranks. Raises LeaseLost, OSError when a part cannot be written, and Interrupted, with a checkpoint
        published, when a rank was asked to stop.
        """
        if step == end:
            self.wait()
        elif votes.written == get_distributed().size:
            self.publish()
        if step == end and not self._is_followed_by_work:
            return
        if votes.due or votes.stop:
            self.save(step)
        if step == end or votes.stop:
            self.wait()
        if votes.stop:
            reason = preemption.stop_reason() or "another process of the job stops"
            raise preemption.Interrupted(f"{self._attempt.label} stopped at {step}/{end}", reason)

    def save(self, step: int, keep: int = KEEP) -> None:
        """Begin to save the state after `step` steps as `FORMAT/step-N`; return at once unless DeepSpeed writes it.

        Waits for the save before. All but the last `keep` checkpoints are deleted once this one is published. Raises
        LeaseLost.
        """
        self.wait()
        attempt, ranks, final = self._attempt, get_distributed(), CHECKPOINTS.path(self._folder, step)
        if attempt.lease is not None:
            attempt.lease.check()
        self._schedule.saving()
        name = f".draft-{uuid.uuid4().hex[:8]}" if ranks.is_main_process and not final.exists() else None
        name = ranks.broadcast_object(name)
        if name is None:
            return
        draft, started = self._folder / name, time.monotonic()
        with _removed_on_error(draft):
            draft.mkdir(parents=True, exist_ok=True)
            if ranks.is_main_process:
                shutil.copy(attempt.out / METRICS_FILE, draft)
            staged = self._engine.stage_state(draft)
        state = {"step": step, "seconds": attempt.seconds, "tokens": attempt.tokens}
        self._pending = _PendingSave(staged, draft, final, state, keep, started)
        if self._engine.saves_in_background:
            self._pending.start()
        else:
            self._pending.run()
            self.wait()

    def wait(self) -> None:
        """Publish the pending checkpoint, and return once older ones are deleted. Raises what `publish` raises."""
        self.publish()
        self._removal.join()

    def publish(self) -> None:
        """Publish the pending checkpoint once it is written by all ranks. Raises OSError and LeaseLost."""
        if (pending := self._pending) is None:
            return
        pending.join()
        self._pending, ranks = None, get_distributed()
        parts: list[_Outcome] = ranks.gather_objects(pending.outcome)
        with _removed_on_error(pending.draft):
            if failed := next((part.error for part in parts if part.error is not None), None):
                raise failed from pending.outcome.error
            self._note_save_seconds(max(part.seconds for part in parts))
            if ranks.is_main_process:
                self._publish(pending, [part.written for part in parts])
        ranks.barrier()

    def _publish(self, pending: _PendingSave, parts: list[WrittenPart]) -> None:
        draft, final = pending.draft, pending.final
        digests = {METRICS_FILE: file_digest(draft / METRICS_FILE), **pending.staged.finish(parts)}
        fsync_file(draft / METRICS_FILE)
        for part in parts:
            digests |= part.digests
        state = {**pending.state, "save_seconds": self._attempt.save_seconds, "files": digests}
        write_json(draft / CHECKPOINT_FILE, with_checksum(state))
        assert self._attempt.lease is not None
        self._attempt.lease.check()
        os.rename(draft, final)
        # Newer checkpoints belong to an interrupted longer run (a later rung); keep them.
        step = pending.state["step"]
        replaced = [path for n, path in CHECKPOINTS.entries(self._folder).items() if n <= step][: -pending.keep]
        self._removal = _Removal(replaced)

    def _note_save_seconds(self, seconds: float) -> None:
        self._schedule.save_seconds = self._attempt.save_seconds = seconds
        preemption.reserve(seconds_to_stop(seconds))

    def close(self) -> None:
        """Give up a pending checkpoint. Its thread ends by itself, and the next attempt removes what it leaves."""
        preemption.reserve(0.0)
        if self._pending is not None and get_distributed().is_main_process:
            shutil.rmtree(self._pending.draft, ignore_errors=True)
        self._removal.join()

    def resume(self, end: int) -> int:
        """Load the newest undamaged checkpoint of step `end` or before; return the step to start at."""
        attempt, checkpoint = self._attempt, _newest_undamaged(self._folder, end)
        if checkpoint is None:
            self._warn_of_other_formats()
            return 0
        self._engine.load_state(checkpoint)
        if get_distributed().is_main_process:
            shutil.copy(checkpoint / METRICS_FILE, attempt.out)
        state = read_checksummed_json(checkpoint / CHECKPOINT_FILE)
        attempt.prior_seconds, attempt.tokens = state["seconds"], state["tokens"]
        self._note_save_seconds(state["save_seconds"])
        log.info("resuming from step %d", state["step"])
        return state["step"]

    def _warn_of_other_formats(self) -> None:
        others = sorted({path.parent.name for path in self._attempt.checkpoints.glob("*/step-*")} - {self._folder.name})
        if others and get_distributed().is_main_process:
            log.warning(
                "ignoring existing checkpoints in format %s: this engine reads %s; starting from step 0",
                others,
                self._folder.name,
            )


class _Removal(threading.Thread):
    """Deletes old checkpoints while training goes on: large files can take a file system seconds. Starts at once."""

    def __init__(self, checkpoints: list[Path]) -> None:
        super().__init__(name="checkpoint removal", daemon=True)
        self._checkpoints = checkpoints
        self.start()

    def run(self) -> None:
        for checkpoint in self._checkpoints:
            remove(checkpoint)


class _Outcome(NamedTuple):
    """What has become of one rank's part of a checkpoint."""

    written: WrittenPart
    error: OSError | StageError | None
    seconds: float  # from the end of the step until this part was on disk


class _PendingSave(threading.Thread):
    """Writes this rank's part of a checkpoint."""

    def __init__(
        self, staged: StagedState, draft: Path, final: Path, state: dict[str, Any], keep: int, started: float
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)  # no interpreter waits for it: a draft can be thrown away
        self.staged, self.draft, self.final, self.state, self.keep = staged, draft, final, state, keep
        self._started_at = started
        self.outcome: _Outcome

    def run(self) -> None:
        written, failure = WrittenPart({}), None
        try:
            written = self.staged.write()
        except Exception as error:
            failure = _write_error(error, self.draft)
        self.outcome = _Outcome(written, failure, time.monotonic() - self._started_at)

    @property
    def is_written(self) -> bool:
        return hasattr(self, "outcome")

    def join(self, timeout: float | None = None) -> None:
        if not self.is_written:
            super().join(timeout)


@contextlib.contextmanager
def _removed_on_error(draft: Path) -> Iterator[None]:
    """Remove a draft when the body fails, and raise the error of a full disk as such."""
    try:
        yield
    except Exception as error:
        failure = _write_error(error, draft)  # before the removal, which frees space
        if get_distributed().is_main_process:
            shutil.rmtree(draft, ignore_errors=True)
        if failure is error or not isinstance(failure, OSError):
            raise
        raise failure from error


def _write_error(error: Exception, draft: Path) -> OSError | StageError:
    """Return the error to report when a part was not written; torch reports a full disk as a wrong file position."""
    if is_full(draft):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(draft))
    if isinstance(error, OSError | StageError):
        return error
    return StageError(f"a checkpoint cannot be written below {draft.parent}: {describe_failure(error)}")


def _newest_undamaged(folder: Path, end: int) -> Path | None:
    """Return the newest undamaged checkpoint of step `end` or before; delete damaged and unfinished ones."""
    ranks = get_distributed()
    steps = None
    if ranks.is_main_process:
        for draft in folder.glob(".draft-*"):
            remove(draft)
        steps = [step for step in reversed(CHECKPOINTS.entries(folder)) if step <= end]
    for step in ranks.broadcast_object(steps):
        checkpoint = CHECKPOINTS.path(folder, step)
        damage = _damage(checkpoint, step)
        if damage is None:
            return checkpoint
        if ranks.is_main_process:
            log.warning("checkpoint %s is corrupted (%s); falling back to the previous one", checkpoint, damage)
            remove(checkpoint)
    return None


def _damage(checkpoint: Path, step: int) -> str | None:
    """Return what is wrong with a checkpoint, if anything, before anything is loaded. Every rank reads its share."""
    ranks = get_distributed()
    damage = _damage_of_share(checkpoint, step, ranks.rank, ranks.size)
    return next((reason for reason in ranks.gather_objects(damage) if reason is not None), None)


def _damage_of_share(checkpoint: Path, step: int, rank: int, size: int) -> str | None:
    try:
        state = read_checksummed_json(checkpoint / CHECKPOINT_FILE)
        if state["step"] != step:
            return f"it is that of step {state['step']}"
        for name in sorted(state["files"])[rank::size]:
            if file_digest(checkpoint / name) != state["files"][name]:
                return f"checksum mismatch in {name}"
    except (FileNotFoundError, IsADirectoryError, DamagedFile) as error:
        return f"incomplete: {error}"  # other OSErrors are of the file system: not damage
    return None
