"""One file a stage: `run(point, fields, upstream, attempt)` writes the stage's artefacts into `attempt.out`."""

from __future__ import annotations

import errno
import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from src.failure import StageError
from src.lease import Lease, LeaseLost
from src.store import Report

if TYPE_CHECKING:
    from src.plan import Stage
    from src.store import Store

log = logging.getLogger(__name__)


def _silent(label: str, step: int, total: int) -> None:
    pass


def ensure(stage: Stage, store: Store, report: Report = _silent) -> Path:
    """The artefacts of `stage`: found, waited for while another process computes them, or computed here.

    What the stage needs must be there already (a plan's stages are in that order). Several processes may call
    this for one stage at once; one computes. Raises whatever the stage raises; nothing is published then.
    """
    while not store.is_done(stage):
        try:
            _compute(stage, store, report)
        except LeaseLost as lost:
            log.warning("%s: %s", stage.label, lost)  # it is being computed elsewhere: wait for that
    return store.artefacts(stage)


def _compute(stage: Stage, store: Store, report: Report) -> None:
    """Compute and publish under the stage's lease, unless somebody else is about to."""

    def waiting(holder: str) -> bool:
        progress = store.progress(stage) or {}
        report(f"{stage.label} (waiting for {holder})", progress.get("step", 0), progress.get("total", 0))
        return store.is_done(stage)

    with Lease(store.work(stage), waiting) as lease:
        mine = lease.held
        if mine and not store.is_done(stage):
            upstream = {role: store.artefacts(up) for role, up in stage.upstream.items()}
            attempt = store.begin(stage, lease, report)
            run = importlib.import_module(f"src.stages.{stage.kind}").run
            try:
                run(stage.point, stage.fields, upstream, attempt)
                store.publish(stage, attempt)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    hint = f"disk full while computing {stage.label} under {store.root}"
                    raise StageError(f"{hint}: free some space and run again") from error
                raise
            log.info("%s: done in %.1f s", stage.label, attempt.seconds)
    if mine:
        store.clear_work(stage)
