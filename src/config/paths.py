"""Paths that config keys name, and what a file system says of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src.errors import ConfigError


@contextmanager
def naming(key: str, path: str) -> Iterator[None]:
    """Turn an error of the file system in the body into a ConfigError that names the config key."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: ~NAME of a user who does not exist
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        file = str(getattr(error, "filename", None) or path)
        raise ConfigError(f"{key}={path}: {reason if file == path else f'{file}: {reason}'}") from None


def is_file(key: str, path: str) -> bool:
    """Return whether a path is a file. Raises ConfigError when that cannot be seen."""
    with naming(key, path):
        return Path(path).is_file()


def is_dir(key: str, path: str, subfolder: str = "") -> bool:
    """Return whether a path, or a subfolder of it, is a folder. Raises ConfigError when that cannot be seen."""
    with naming(key, path):
        return Path(path, subfolder).is_dir()
