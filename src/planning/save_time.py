"""How long it takes to save the state of a training, which a job must begin before its time limit. No torch."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

from src.errors import DamagedFile
from src.planning.identity import VERSIONS
from src.planning.model_shape import model_shape
from src.planning.stage import Stage
from src.store.files import read_checksummed_json
from src.store.store import CHECKPOINT_FILE, CHECKPOINTS, Store

_BYTES = 12  # per parameter: weights and two moments of Adam in float32
_BYTES_PER_SECOND = 0.5e9  # that a job writes to a shared disk: a cautious guess, until a save has been measured
_RECENT_STAGES = 50  # newest finished stages of a kind whose saves count
_MARGIN = 1.5  # of the time of a save, as a disk that other jobs use may be slower than it was
_STEP_SECONDS = 30.0  # for the step that runs when a job is told to stop, and for its end


def seconds_to_stop(save_seconds: float) -> float:
    """Return how long before its end a job must be told to stop, so that a save of `save_seconds` is done in time."""
    return _MARGIN * save_seconds + _STEP_SECONDS


class SaveTimes:
    """What saves in a store have taken."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._finished: dict[str, list[tuple[dict[str, Any], float]]] = {}

    def seconds(self, stage: Stage) -> float:
        """Return the seconds that a save of this training takes; 0 for a stage that saves no such state.

        As measured by earlier attempts at the stage, else by finished stages with the same model, else estimated from
        the number of parameters.
        """
        if stage.kind not in ("sft", "align"):
            return 0.0
        return self._of_attempts(stage) or self._of_finished(stage) or _estimate(stage)

    def _of_attempts(self, stage: Stage) -> float:
        longest = 0.0
        for folder in (self._store.work(stage) / "checkpoints").glob("*"):
            for checkpoint in CHECKPOINTS.entries(folder).values():
                with suppress(OSError, DamagedFile):  # the attempt that resumes from it reports it
                    longest = max(longest, read_checksummed_json(checkpoint / CHECKPOINT_FILE)["save_seconds"] or 0.0)
        return longest

    def _of_finished(self, stage: Stage) -> float:
        if stage.kind not in self._finished:
            finished = self._store.finished(stage.kind, VERSIONS[stage.kind], _RECENT_STAGES)
            self._finished[stage.kind] = [(s["inputs"], done.get("save_seconds") or 0.0) for s, done in finished]
        inputs = stage.description["inputs"]
        same = (s for other, s in self._finished[stage.kind] if all(other[k] == inputs[k] for k in ("model", "lora")))
        return max(same, default=0.0)


def _estimate(stage: Stage) -> float:
    """Return an upper bound from the size of the model; 0 for adapters, and where the size is not known."""
    model = stage.point.model
    shape = None if model.lora.rank is not None else model_shape(model.path, model.revision)
    return 0.0 if shape is None else math.ceil(_BYTES * shape.num_parameters / _BYTES_PER_SECOND)
