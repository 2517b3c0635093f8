"""Checkpoints of a training stage: written whole beside the attempt, found again by the next one."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from src.store import read_json, write_json

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
        write_json(draft / _STATE, {"step": step, **state})
        os.rename(draft, final)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def resume(folder: Path, accelerator: Any, metrics: Path) -> dict[str, Any] | None:
    """Load the newest checkpoint into the prepared objects; its state, or None when there is none."""
    for draft in folder.glob(".draft-*"):
        shutil.rmtree(draft, ignore_errors=True)
    for checkpoint in sorted(folder.glob("step-*"), reverse=True):
        state = read_json(checkpoint / _STATE)
        accelerator.load_state(str(checkpoint))
        shutil.copy(checkpoint / metrics.name, metrics)
        log.info("resuming from step %d", state["step"])
        return state
    return None
