"""Whole numbers in environment variables that torchrun, SLURM or a user's shell sets."""

from __future__ import annotations

import os

from src.errors import ConfigError


def read_integer(name: str, default: int, minimum: int = 0) -> int:
    """Return the value of an environment variable, `default` when it is not set. Raises ConfigError naming it."""
    text = os.environ.get(name)
    if text is None:
        return default
    if not text.strip().isdecimal() or len(text) > 9 or int(text) < minimum:
        raise ConfigError(f"{name}={text[:50]}: this environment variable must be a number >= {minimum}; unset it")
    return int(text)
