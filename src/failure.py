"""Failures a user can act on, and the one line a user is told of any other."""

from __future__ import annotations

from dataclasses import dataclass

from src.config import USER_ERRORS, one_line


class StageError(RuntimeError):
    """A stage could not be computed for a reason the user can act on: one line."""


class SweepFailed(RuntimeError):
    """Some points failed; the others are done and aggregated."""


@dataclass(frozen=True)
class Lost:
    """What became of a point that has no result."""

    state: str  # failed, cancelled
    reason: str


EXPECTED = (*USER_ERRORS, StageError, SweepFailed)


def one_line_failure(error: BaseException) -> str:
    """Errors a user can act on as they are; any other with its type, since the message alone may say nothing."""
    if isinstance(error, EXPECTED):
        return one_line(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
