"""Checkpoints of a training stage: published by one rename, verified by checksum before the next attempt loads one."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import uuid
from pathlib import Path

from src.distributed import get_distributed
from src.errors import DamagedFile
from src.store.attempt import Attempt
from src.store.files import (
    file_digest,
    fsync_tree,
    is_full,
    read_checksummed_json,
    remove,
    with_checksum,
    write_json,
)
from src.store.store import CHECKPOINTS, METRICS_FILE
from src.training.engine import TrainingEngine

log = logging.getLogger(__name__)

_STATE_FILE = "trainer.json"
KEEP = 2  # the newest and the one before it, in case the newest is damaged


def save(engine: TrainingEngine, attempt: Attempt, step: int, keep: int = KEEP) -> None:
    """Save model, optimizer, RNG state and metrics as checkpoint `FORMAT/step-N`, published by one rename.

    Every rank writes its part, and returns once all parts are on disk. Deletes all but the last `keep` checkpoints.
    Raises LeaseLost.
    """
    if attempt.lease is not None:
        attempt.lease.check()
    ranks, parent = get_distributed(), attempt.checkpoints / engine.checkpoint_format
    final = CHECKPOINTS.path(parent, step)
    draft = ranks.broadcast_object(
        parent / f".draft-{uuid.uuid4().hex[:8]}" if ranks.is_main_process and not final.exists() else None
    )
    if draft is None:
        return
    try:
        draft.mkdir(parents=True, exist_ok=True)
        engine.save(draft)
        ranks.barrier()
        if ranks.is_main_process:
            shutil.copy(attempt.out / METRICS_FILE, draft)
            digests = {str(path.relative_to(draft)): file_digest(path) for path in draft.rglob("*") if path.is_file()}
            state = {"step": step, "seconds": attempt.seconds, "tokens": attempt.tokens, "files": digests}
            write_json(draft / _STATE_FILE, with_checksum(state))
            fsync_tree(draft)
            os.rename(draft, final)
    except Exception as error:
        # Must precede the removal of the draft, which frees space. torch reports a full disk as a wrong file position.
        if is_full(attempt.checkpoints):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(draft)) from error
        raise
    finally:
        if ranks.is_main_process:
            shutil.rmtree(draft, ignore_errors=True)
    if ranks.is_main_process:
        # Newer checkpoints belong to an interrupted longer run (a later rung); keep them.
        for old in [path for number, path in CHECKPOINTS.entries(parent).items() if number <= step][:-keep]:
            remove(old)
    ranks.barrier()


def resume(engine: TrainingEngine, attempt: Attempt, end: int) -> int:
    """Load the newest undamaged checkpoint of step `end` or before, on every rank; return the step to start at."""
    ranks = get_distributed()
    checkpoint = ranks.broadcast_object(
        _newest_undamaged(attempt.checkpoints / engine.checkpoint_format, end) if ranks.is_main_process else None
    )
    if checkpoint is None:
        others = sorted({path.parent.name for path in attempt.checkpoints.glob("*/step-*")})
        if others and ranks.is_main_process:
            log.warning(
                "ignoring existing checkpoints in format %s: this engine reads %s; starting from step 0",
                others,
                engine.checkpoint_format,
            )
        return 0
    engine.load(checkpoint)
    if ranks.is_main_process:
        shutil.copy(checkpoint / METRICS_FILE, attempt.out)
    state = read_checksummed_json(checkpoint / _STATE_FILE)
    attempt.prior_seconds, attempt.tokens = state["seconds"], state["tokens"]
    log.info("resuming from step %d", state["step"])
    return state["step"]


def _newest_undamaged(folder: Path, end: int) -> Path | None:
    """Return the newest undamaged checkpoint of step `end` or before; delete damaged and unfinished ones."""
    for draft in folder.glob(".draft-*"):
        shutil.rmtree(draft, ignore_errors=True)
    for step, checkpoint in reversed(CHECKPOINTS.entries(folder).items()):
        if step > end:
            continue
        damage = _damage(checkpoint, step)
        if damage is None:
            return checkpoint
        log.warning("checkpoint %s is corrupted (%s); falling back to the previous one", checkpoint, damage)
        remove(checkpoint)
    return None


def _damage(checkpoint: Path, step: int) -> str | None:
    """Return what is wrong with a checkpoint, if anything. To be called before a load, which may stop half-way."""
    try:
        state = read_checksummed_json(checkpoint / _STATE_FILE)
        if state["step"] != step:
            return f"it is that of step {state['step']}"
        for name, digest in state["files"].items():
            if file_digest(checkpoint / name) != digest:
                return f"checksum mismatch in {name}"
    except (FileNotFoundError, IsADirectoryError, DamagedFile) as error:
        return f"incomplete: {error}"  # other OSErrors are of the file system: not damage
    return None
