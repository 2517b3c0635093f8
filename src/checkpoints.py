"""Checkpoints of a training stage: written whole beside the attempt, found again by the next one."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import xxhash

from src.distributed import world
from src.store import is_full, read_json, sync, write_json

log = logging.getLogger(__name__)

_STATE = "trainer.json"
KEEP = 2  # the last one, and one before it


def save(folder: Path, step: int, state: dict[str, Any], accelerator: Any, metrics: Path) -> None:
    """Model, optimiser, RNG and metrics so far under `folder/step-N`, renamed into place whole."""
    final = folder / f"step-{step:08d}"
    if final.exists():
        return
    draft = folder / f".draft-{uuid.uuid4().hex[:8]}"
    try:
        accelerator.save_state(str(draft))
        shutil.copy(metrics, draft / metrics.name)
        digests = {path.name: _digest(path) for path in draft.iterdir()}
        write_json(draft / _STATE, {"step": step, **state, "files": digests})
        sync(draft)
        os.rename(draft, final)
    except Exception as error:
        # Asked before the draft goes and makes room: torch reports a full disk as a wrong position in its file.
        if is_full(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(draft)) from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def resume(folder: Path, accelerator: Any, metrics: Path) -> dict[str, Any] | None:
    """Load the newest checkpoint into the prepared objects, in every process; its state, or None when there is none."""
    here = world()
    checkpoint = here.tell(_newest(folder) if here.leads else None)
    if checkpoint is None:
        return None
    accelerator.load_state(str(checkpoint))
    if here.leads:
        shutil.copy(checkpoint / metrics.name, metrics)
    state = read_json(checkpoint / _STATE)
    log.info("resuming from step %d", state["step"])
    return state


def _newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; what is not whole is removed."""
    for draft in folder.glob(".draft-*"):
        shutil.rmtree(draft, ignore_errors=True)
    for checkpoint in sorted(folder.glob("step-*"), reverse=True):
        if damage := _damage(checkpoint):
            log.warning("%s: %s; going on from the one before", checkpoint, damage)
            shutil.rmtree(checkpoint, ignore_errors=True)
            continue
        return checkpoint
    return None


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with it. Looked for before anything is loaded: half a load would spoil the model."""
    try:
        for name, digest in read_json(checkpoint / _STATE)["files"].items():
            if _digest(checkpoint / name) != digest:
                return f"{name} is not what was written"
    except (FileNotFoundError, ValueError, KeyError) as error:  # a server that does not answer is no damage
        return f"is not whole ({error})"
    return None


def _digest(path: Path) -> str:
    """Against damage, not forgery: fast enough for the optimiser state of an 8B model."""
    state = xxhash.xxh3_128()
    with path.open("rb") as handle:
        while block := handle.read(2**24):
            state.update(block)
    return state.hexdigest()
