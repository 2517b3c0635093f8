"""Runs a stage: reuses its artifacts, waits for another process that computes them, or computes them here."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from src import preemption
from src.distributed import get_distributed
from src.errors import USER_FACING_ERRORS, DamagedFile, StageError, describe_failure
from src.planning.content import reading
from src.planning.stage import Stage
from src.store.attempt import Attempt, Report
from src.store.files import is_full
from src.store.lease import Lease, LeaseLost
from src.store.store import STAGE_FILE, Store

log = logging.getLogger(__name__)


class _Waited:
    """The seconds that this process has waited for others to compute stages, since it last began one itself."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


_waited = _Waited()


def compute_or_wait(stage: Stage, store: Store, report: Report = lambda *_: None, with_weights: bool = False) -> Path:
    """Return the directory of the stage's artifacts: reused, computed by another process, or computed here.

    What it reads from upstream is checked against what was published, and computed again where it is damaged or
    missing. with_weights: also where `keep_checkpoints` has removed the model. Several processes may call this for one
    stage at once; one computes. All ranks of a run call it and compute the stage together. Raises whatever the stage
    raises on any rank, on all of them; nothing is published then.
    """
    ranks = get_distributed()
    with ranks.failing_together():
        if ranks.is_main_process:
            # A model that was removed since is made again when a stage reads it, not because it was planned before:
            # its points may be done, by a former run of this job or another process of the sweep.
            _complete(stage, store, report, with_weights)
            ranks.broadcast_object(None)
        else:
            # Take part in every attempt that rank 0 starts, of this stage or a damaged one upstream, until it is done.
            while (message := ranks.broadcast_object()) is not None:
                started, out = message
                with _explaining_errors(started, store):
                    _run(started, store, store.join_attempt(started, out))
    return store.dir(stage)


def _complete(stage: Stage, store: Store, report: Report, with_weights: bool = True) -> None:
    """Compute the stage or wait for it, until all its artifacts are there and undamaged.

    with_weights: also a model that `keep_checkpoints` has removed.
    """
    with _explaining_errors(stage, store):
        while not _is_complete(stage, store, with_weights):
            try:
                _compute(stage, store, report, with_weights)
            except LeaseLost as error:
                if get_distributed().size > 1:
                    raise  # the other ranks are in the middle of a stage that will not end
                log.warning("%s: %s", stage.label, error)  # another process computes it: wait for that


@contextlib.contextmanager
def _explaining_errors(stage: Stage, store: Store) -> Iterator[None]:
    """Raise what is no fault of the request, and what a file system cannot do, as a StageError that says what to do."""
    try:
        yield
    except DamagedFile as error:
        raise StageError(str(error)) from None
    except USER_FACING_ERRORS:
        raise
    except Exception as error:
        if _disk_full(error, store.output_dir):
            raise StageError(
                f"disk full while computing {stage.label} under {store.root}: free some space and run again"
            ) from error
        if isinstance(error, OSError) and error.filename is not None:
            raise StageError(f"{describe_failure(error)}; mend that and run the same command again") from error
        raise


def _is_complete(stage: Stage, store: Store, with_weights: bool) -> bool:
    is_there = store.has_weights(stage) if with_weights else store.is_done(stage)
    return is_there and store.damage(stage) is None


def _compute(stage: Stage, store: Store, report: Report, with_weights: bool) -> None:
    """Compute and publish under the stage's lease, unless another process is about to."""

    def waiting(holder: str) -> bool:
        if reason := preemption.stop_reason():
            raise preemption.Interrupted(f"{stage.label} stopped while waiting for {holder}", reason)
        progress = store.progress(stage) or {}
        report(f"{stage.label} (waiting for {holder})", progress.get("step", 0), progress.get("total", 0))
        return _is_complete(stage, store, with_weights)

    asked = time.monotonic()
    with Lease(store.work(stage), waiting) as lease:
        _waited.seconds += time.monotonic() - asked
        if lease.held and not _is_complete(stage, store, with_weights):
            if damage := store.damage(stage):
                store.set_aside(stage, damage)
            attempt = store.begin(stage, lease, report)  # from here on it is known that a model upstream is in use
            _complete_upstream(stage, store, report)
            store.forget_other_upstream(stage)
            attempt.started = time.monotonic()
            with reading((stage.inputs, stage.resources.pairs)):
                attempt.held_processes, attempt.waited_seconds = get_distributed().size, _waited.take()
                if stage.is_shared:
                    get_distributed().broadcast_object((stage, attempt.out))
                    attempt.processes = get_distributed().size
                _run(stage, store, attempt)
            store.publish(stage, attempt)
            log.info("%s: done in %.1f s", stage.label, attempt.seconds)
        if lease.held:  # re-check: another rung of the same run may take over this work directory
            store.clean_up_work_dir(stage)


def _complete_upstream(stage: Stage, store: Store, report: Report) -> None:
    """Complete what the stage reads: the artifacts of its upstream, and of stages further up what describes them."""
    for role, up in stage.upstream.items():
        # Samples need the model itself, which keep_checkpoints may have removed.
        is_there = store.has_weights(up) if role == "checkpoint" else store.is_done(up)
        if not is_there or store.damage(up) is not None:
            _complete(up, store, report)
        for further_up in up.upstream.values():
            if store.damage(further_up, names=(STAGE_FILE,)) is not None:
                _complete(further_up, store, report)


def _run(stage: Stage, store: Store, attempt: Attempt) -> None:
    upstream = {role: store.dir(up) for role, up in stage.upstream.items()}
    importlib.import_module(f"src.stages.{stage.kind}").run(stage.inputs, stage.resources, upstream, attempt)


def _disk_full(error: Exception, root: Path) -> bool:
    """Return whether the disk is full: libraries report it in their own ways, some only as a failed write."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left" in str(error) or is_full(root)
