"""Requests to stop the running stage: at its next step it saves a checkpoint and raises Interrupted."""

from __future__ import annotations

_reason: str | None = None


class Interrupted(Exception):
    """The stage stopped on request; the next attempt resumes from its last checkpoint."""


def request(reason: str | None) -> None:
    """Ask the stage that runs in this process to stop; None withdraws the request. Safe in a signal handler."""
    global _reason
    _reason = reason


def stop_reason() -> str | None:
    """Return why the running stage should stop; None when it should not."""
    return _reason
