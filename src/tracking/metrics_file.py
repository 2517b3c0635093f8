"""metrics.jsonl: the metrics of a stage, one JSON object per optimizer step. Trackers are fed from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from src.store.store import METRICS_FILE

if TYPE_CHECKING:
    from src.store.attempt import Attempt


class MetricsFile:
    """Appends a line per step to the attempt's metrics.jsonl; on ranks other than 0 it writes nothing."""

    def __init__(self, attempt: Attempt) -> None:
        path = attempt.out / METRICS_FILE if attempt.is_main_process else Path(os.devnull)
        self._file = path.open("a")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
