"""Requests to stop the running stage: at its next step it saves a checkpoint and raises Interrupted."""

from __future__ import annotations

import time

_reason: str | None = None
_end: tuple[float, str] | None = None  # by time.monotonic(), and the reason to stop before it
_reserve = _largest_reserve = 0.0


class Interrupted(Exception):
    """The stage stopped on request; the next attempt resumes from its last checkpoint."""

    def __init__(self, what: str, reason: str) -> None:
        """Keep the reason of the request: stop_reason() may no longer give it once the stage has ended.

        what: the stage that has stopped, and where.
        """
        super().__init__(what, reason)  # both, so that the error can be pickled
        self.what, self.reason = what, reason

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


def request(reason: str | None) -> None:
    """Ask the stage that runs in this process to stop; None withdraws the request. Safe in a signal handler."""
    global _reason
    _reason = reason


def set_time_limit(seconds: float | None, reason: str = "") -> None:
    """Say in how many seconds this process will be ended, None: never. reason: that of the stop before it."""
    global _end, _largest_reserve
    _end = None if seconds is None else (time.monotonic() + seconds, reason)
    _largest_reserve = (seconds or 0.0) / 2  # whatever a save takes, half of the time is for work


def reserve(seconds: float) -> None:
    """Ask for a stop so many seconds before the time limit, if there is one."""
    global _reserve
    _reserve = seconds


def stop_reason() -> str | None:
    """Return why the running stage should stop; None when it should not."""
    if _reason is None and _end is not None and time.monotonic() >= _end[0] - min(_reserve, _largest_reserve):
        return _end[1]
    return _reason
