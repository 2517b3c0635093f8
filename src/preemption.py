"""A running stage may be asked to stop: it saves what it can resume from at its next step and raises Interrupted."""

from __future__ import annotations

_reason: str | None = None


class Interrupted(Exception):
    """The stage stopped because it was asked to; run again, it goes on from its last checkpoint."""


def request(reason: str | None) -> None:
    """Ask whatever stage runs in this process to stop; None takes it back. Safe in a signal handler."""
    global _reason
    _reason = reason


def stop_reason() -> str | None:
    return _reason
