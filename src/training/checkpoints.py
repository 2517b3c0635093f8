"""Checkpoints of a training stage: written whole beside the attempt, found again by the next one."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from src.distributed import get_distributed
from src.store.files import fsync_tree, is_full, read_json, write_json

if TYPE_CHECKING:
    from src.training.engine import TrainingEngine

log = logging.getLogger(__name__)

_STATE = "trainer.json"
KEEP = 2  # the last one, and one before it


def save(
    folder: Path, step: int, state: dict[str, Any], engine: TrainingEngine, metrics: Path, keep: int = KEEP
) -> None:
    """Model, optimizer, RNG and metrics so far under `folder/LAYOUT/step-N`, renamed into place whole. Every process
    of the run writes its part; none goes on before all of it is on disk. The last `keep` stay."""
    here, place = get_distributed(), folder / engine.checkpoint_format
    final = place / f"step-{step:08d}"
    draft = here.broadcast_object(
        place / f".draft-{uuid.uuid4().hex[:8]}" if here.is_main_process and not final.exists() else None
    )
    if draft is None:
        return
    try:
        draft.mkdir(parents=True, exist_ok=True)
        engine.save(draft)
        here.barrier()
        if here.is_main_process:
            shutil.copy(metrics, draft / metrics.name)
            digests = {str(path.relative_to(draft)): _digest(path) for path in draft.rglob("*") if path.is_file()}
            write_json(draft / _STATE, {"step": step, **state, "files": digests})
            fsync_tree(draft)
            os.rename(draft, final)
    except Exception as error:
        # Asked before the draft goes and makes room: torch reports a full disk as a wrong position in its file.
        if is_full(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(draft)) from error
        raise
    finally:
        if here.is_main_process:
            shutil.rmtree(draft, ignore_errors=True)
    if here.is_main_process:
        # Newer checkpoints belong to an interrupted longer run (a later rung); keep them.
        for old in sorted(path for path in place.glob("step-*") if path.name <= final.name)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    here.barrier()


def resume(folder: Path, engine: TrainingEngine, metrics: Path, end: int) -> dict[str, Any] | None:
    """Load the newest checkpoint of step `end` or before into the prepared objects, in every process; its state, or
    None when there is none."""
    here = get_distributed()
    checkpoint = here.broadcast_object(
        _newest(folder / engine.checkpoint_format, end) if here.is_main_process else None
    )
    if checkpoint is None:
        others = sorted({path.parent.name for path in folder.glob("*/step-*")}) if here.is_main_process else []
        if others:
            log.warning(
                "ignoring existing checkpoints in format %s: this engine reads %s; starting from step 0",
                others,
                engine.checkpoint_format,
            )
        return None
    engine.load(checkpoint)
    if here.is_main_process:
        shutil.copy(checkpoint / metrics.name, metrics)
    state = read_json(checkpoint / _STATE)
    log.info("resuming from step %d", state["step"])
    return state


def _newest(folder: Path, end: int) -> Path | None:
    """The newest whole checkpoint of step `end` or before; what is not whole is removed."""
    for draft in folder.glob(".draft-*"):
        shutil.rmtree(draft, ignore_errors=True)
    for checkpoint in sorted(folder.glob("step-*"), reverse=True):
        if int(checkpoint.name[5:]) > end:
            continue
        if damage := _damage(checkpoint):
            log.warning("checkpoint %s is corrupted (%s); falling back to the previous one", checkpoint, damage)
            shutil.rmtree(checkpoint, ignore_errors=True)
            continue
        return checkpoint
    return None


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with it. Looked for before anything is loaded: half a load would spoil the model."""
    try:
        for name, digest in read_json(checkpoint / _STATE)["files"].items():
            if _digest(checkpoint / name) != digest:
                return f"checksum mismatch in {name}"
    except (FileNotFoundError, ValueError, KeyError) as error:  # a server that does not answer is no damage
        return f"incomplete: {error}"
    return None


def _digest(path: Path) -> str:
    """Against damage, not forgery: fast enough for the optimizer state of an 8B model."""
    state = xxhash.xxh3_128()
    with path.open("rb") as handle:
        while block := handle.read(2**24):
            state.update(block)
    return state.hexdigest()
