"""Metrics of a run: metrics.jsonl always. W&B gets them from there, by a process beside the run that cannot hurt it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from src.store.attempt import Attempt

METRICS_FILE = "metrics.jsonl"


class Tracker:
    """`log(step, values)` appends a line to metrics.jsonl."""

    def __init__(self, attempt: Attempt) -> None:
        self._file = (attempt.out / METRICS_FILE if attempt.is_main_process else Path(os.devnull)).open("a")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
