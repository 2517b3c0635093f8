"""Metrics of a run: metrics.jsonl always, Weights & Biases when asked for, which never stops a run."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.config import Point
from src.identity import run_of

if TYPE_CHECKING:
    from src.store import Attempt

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
SECONDS_TO_WAIT = 10  # for a W&B server, once a process


class Tracker:
    """`log(step, values)` appends a line to metrics.jsonl and hands the same to W&B when that is on."""

    def __init__(self, point: Point, kind: str, attempt: Attempt) -> None:
        self._file = (attempt.out / METRICS_FILE if attempt.leads else Path(os.devnull)).open("a")
        self._run = _start_wandb(point, kind, attempt) if point.tracking.wandb and attempt.leads else None

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


# Set when the server did not answer: the other stages of this process need not wait for it again.
_unreachable = False


def _start_wandb(point: Point, kind: str, attempt: Attempt) -> Any:
    """A run named like the stage; None, with a warning, when W&B cannot start even offline."""
    global _unreachable
    # A job has no one to answer a prompt, and its stdout belongs to the project.
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        mode: Any = point.tracking.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in(wandb) else "offline")
        config = {k: v for k, v in asdict(point).items() if k not in ("beta_grid", "lr_grid", "dry_run", "best_from")}
        del config["setup"]["best"]
        options: dict[str, Any] = {
            "project": point.tracking.project,
            "entity": point.tracking.entity,
            "id": run_of(attempt.identity),  # parts of one run are one there
            "resume": "allow",
            "name": attempt.label,
            "group": point.sweep.name,
            "job_type": kind,
            "tags": [point.setup.name, point.method.name, point.init.name],
            "dir": str(attempt.output_dir),
            "config": config,
        }
        try:
            run = wandb.init(
                mode="offline" if _unreachable else mode,
                settings=wandb.Settings(init_timeout=SECONDS_TO_WAIT),
                **options,
            )
        except Exception as error:
            if mode == "offline" or _unreachable:
                raise
            _unreachable = True
            log.warning(
                "W&B cannot be reached (%s): logging offline; `wandb sync %s/wandb/offline-run-*` uploads it later",
                str(error).splitlines()[0],
                attempt.output_dir,
            )
            wandb.teardown()  # or the failed run would still claim its id
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
