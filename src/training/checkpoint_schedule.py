"""When the next checkpoint is due. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable


class CheckpointSchedule:
    """Asks for checkpoints so often that a killed job loses at most `minutes` of training; 0: after every step.

    A checkpoint counts once it is published: at the first end of a step after its files are written. So the next one
    begins before the time is over, by what a save and two steps have taken last. The first one begins after half of
    the time, as nobody knows how long a save takes; and two never begin within less than half of it, although more is
    lost then where a save and two steps take longer than that.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = 60 * minutes, clock
        self._saved = self._asked = clock()
        self.save_seconds: float | None = None  # from the end of a step until its state is on disk; None: not known

    def is_due(self) -> bool:
        """Return whether to save after the running step. Must be called once in every step."""
        now = self._clock()
        step_seconds, self._asked = now - self._asked, now
        age, half = now - self._saved, self._limit / 2
        time_to_publish = half if self.save_seconds is None else self.save_seconds + 2 * step_seconds
        return age >= half and age + time_to_publish >= self._limit

    def is_due_at_end(self) -> bool:
        """Return whether to save after the last step, when the rows that are scored then might be interrupted."""
        return self._clock() - self._saved >= self._limit / 2

    def saving(self) -> None:
        """Note that a checkpoint of the state of this moment is being saved."""
        self._saved = self._clock()
