"""Runs a stage: reuses its artifacts, waits for another process that computes them, or computes them here."""

from __future__ import annotations

import errno
import importlib
import logging
from pathlib import Path

from src.distributed import get_distributed
from src.errors import StageError
from src.planning.stage import Stage
from src.store.attempt import Attempt, Report
from src.store.files import is_full
from src.store.lease import Lease, LeaseLost
from src.store.store import Store

log = logging.getLogger(__name__)

DISTRIBUTED_STAGES = ("sft", "align")  # kinds that all ranks of a run compute together; rank 0 computes the others


def compute_or_wait(stage: Stage, store: Store, report: Report = lambda *_: None) -> Path:
    """Return the directory of the stage's artifacts: reused, computed by another process, or computed here.

    The stage's upstream must be done (a plan's stages are in that order). Several processes may call this for one
    stage at once; one computes. All ranks of a run call it and compute training stages together. Raises whatever the
    stage raises; nothing is published then.
    """
    if not get_distributed().is_main_process:
        # Take part in every attempt that rank 0 starts, until the stage is done.
        while (out := get_distributed().broadcast_object()) is not None:
            _run(stage, store, store.join_attempt(stage, out))
        return store.artifacts(stage)
    while not store.has_weights(stage):
        try:
            _compute(stage, store, report)
        except LeaseLost as error:
            if get_distributed().size > 1:
                raise  # the other ranks are in the middle of a step that will not end
            log.warning("%s: %s", stage.label, error)  # another process computes it: wait for that
        except Exception as error:
            if _disk_full(error, store.output_dir):
                raise StageError(
                    f"disk full while computing {stage.label} under {store.root}: free some space and run again"
                ) from error
            raise
    get_distributed().broadcast_object(None)
    return store.artifacts(stage)


def _compute(stage: Stage, store: Store, report: Report) -> None:
    """Compute and publish under the stage's lease, unless another process is about to."""

    def waiting(holder: str) -> bool:
        progress = store.progress(stage) or {}
        report(f"{stage.label} (waiting for {holder})", progress.get("step", 0), progress.get("total", 0))
        return store.has_weights(stage)

    with Lease(store.work(stage), waiting) as lease:
        if lease.held and not store.has_weights(stage):
            attempt = store.begin(stage, lease, report)
            if stage.kind in DISTRIBUTED_STAGES:
                get_distributed().broadcast_object(attempt.out)
                attempt.processes = get_distributed().size
            _run(stage, store, attempt)
            store.publish(stage, attempt)
            log.info("%s: done in %.1f s", stage.label, attempt.seconds)
        if lease.held:  # re-check: another rung of the same run may take over this work directory
            store.clean_up_work_dir(stage)


def _run(stage: Stage, store: Store, attempt: Attempt) -> None:
    upstream = {role: store.artifacts(up) for role, up in stage.upstream.items()}
    importlib.import_module(f"src.stages.{stage.kind}").run(stage.inputs, stage.resources, upstream, attempt)


def _disk_full(error: Exception, root: Path) -> bool:
    """Return whether the disk is full: libraries report it in their own ways, some only as a failed write."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left" in str(error) or is_full(root)
