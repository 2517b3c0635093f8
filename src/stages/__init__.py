"""One file a stage: `run(point, fields, upstream, attempt)` writes the stage's artefacts into `attempt.out`."""

from __future__ import annotations

import errno
import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from src.distributed import world
from src.failure import StageError
from src.lease import Lease, LeaseLost
from src.store import Attempt, Report, is_full

if TYPE_CHECKING:
    from src.plan import Stage
    from src.store import Store

log = logging.getLogger(__name__)

TOGETHER = ("sft", "align")  # kinds that all processes of a run compute together; the leader computes the others


def _silent(label: str, step: int, total: int) -> None:
    pass


def ensure(stage: Stage, store: Store, report: Report = _silent) -> Path:
    """The artefacts of `stage`: found, waited for while another process computes them, or computed here.

    What the stage needs must be there already (a plan's stages are in that order). Several processes may call
    this for one stage at once; one computes. The processes of one run (src.distributed) all call it and compute
    together what trains. Raises whatever the stage raises; nothing is published then.
    """
    if not world().leads:
        return _follow(stage, store)
    while not store.has_weights(stage):
        try:
            _compute(stage, store, report)
        except LeaseLost as lost:
            if world().size > 1:
                raise  # the others are in the middle of a step that will not end
            log.warning("%s: %s", stage.label, lost)  # it is being computed elsewhere: wait for that
        except Exception as error:
            if _disk_full(error, store.output_dir):
                raise StageError(
                    f"disk full while computing {stage.label} under {store.root}: free some space and run again"
                ) from error
            raise
    world().tell(None)
    return store.artefacts(stage)


def _compute(stage: Stage, store: Store, report: Report) -> None:
    """Compute and publish under the stage's lease, unless somebody else is about to."""

    def waiting(holder: str) -> bool:
        progress = store.progress(stage) or {}
        report(f"{stage.label} (waiting for {holder})", progress.get("step", 0), progress.get("total", 0))
        return store.has_weights(stage)

    with Lease(store.work(stage), waiting) as lease:
        if lease.held and not store.has_weights(stage):
            attempt = store.begin(stage, lease, report)
            if stage.kind in TOGETHER:
                world().tell(attempt.out)
                attempt.processes = world().size
            _run(stage, store, attempt)
            store.publish(stage, attempt)
            log.info("%s: done in %.1f s", stage.label, attempt.seconds)
        if lease.held:  # still: another part of the run may have the place next
            store.clear_work(stage)


def _follow(stage: Stage, store: Store) -> Path:
    """What a process that does not lead does for a stage: train along when the leader does, else wait."""
    while (out := world().tell()) is not None:
        _run(stage, store, store.follow(stage, out))
    return store.artefacts(stage)


def _run(stage: Stage, store: Store, attempt: Attempt) -> None:
    upstream = {role: store.artefacts(up) for role, up in stage.upstream.items()}
    importlib.import_module(f"src.stages.{stage.kind}").run(stage.point, stage.fields, upstream, attempt)


def _disk_full(error: Exception, root: Path) -> bool:
    """Libraries report it in ways of their own, some as nothing but a failed write."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left" in str(error) or is_full(root)
