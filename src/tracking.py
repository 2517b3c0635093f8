"""Metrics of a run: metrics.jsonl always, Weights & Biases when asked for, which never stops a run."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from src.config import Point

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class Tracker:
    """`log(step, values)` appends a line to metrics.jsonl and hands the same to W&B when that is on."""

    def __init__(self, point: Point, stage: str, run_id: str, out: Path, wandb_dir: Path) -> None:
        self.path = out / METRICS_FILE
        self._file = self.path.open("a")
        self._run = _start_wandb(point, stage, run_id, wandb_dir) if point.tracking.wandb else None

    def log(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._run is not None:
            try:
                self._run.log({"train/step": step, **{f"train/{k}": v for k, v in values.items()}})
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        self._file.close()
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._give_up(error)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _give_up(self, error: Exception) -> None:
        log.warning("W&B stopped (%s); training goes on, everything is in %s", error, METRICS_FILE)
        self._run = None


def _start_wandb(point: Point, stage: str, run_id: str, folder: Path) -> Any:
    """A run named like the point; None, with a warning, when W&B cannot start even offline."""
    # A job has no one to answer a prompt, and its stdout belongs to the project.
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        mode: Any = point.tracking.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in(wandb) else "offline")
        folder.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {
            "project": point.tracking.project,
            "entity": point.tracking.entity,
            "id": run_id,
            "resume": "allow",
            "name": point.label,
            "group": point.sweep.name,
            "job_type": stage,
            "tags": [point.setup.name, point.method.name, point.init.name],
            "dir": str(folder),
            "config": {
                "setup": point.setup.name,
                "method": point.method.name,
                "beta": point.beta,
                "lr": point.lr,
                "seed": point.seed,
            },
        }
        try:
            run = wandb.init(mode=mode, settings=wandb.Settings(init_timeout=30), **options)
        except Exception as error:
            if mode == "offline":
                raise
            log.warning("W&B cannot be reached (%s): logging offline below %s", str(error).splitlines()[0], folder)
            run = wandb.init(mode="offline", **options)
        # Our own step axis: after a resume, lines that were logged already must not be refused or doubled.
        run.define_metric("train/step")
        run.define_metric("train/*", step_metric="train/step")
        return run
    except Exception as error:
        log.warning("W&B could not start (%s); training goes on, everything is in %s", error, METRICS_FILE)
        return None


def _logged_in(wandb: Any) -> bool:
    try:
        return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
    except Exception:
        return False
