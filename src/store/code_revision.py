"""Which code runs: the commit of this checkout, or that of the checkout a code snapshot was taken from."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import Any

from src.store.files import read_json

ROOT = Path(__file__).resolve().parents[2]
REVISION_FILE = "revision.json"  # in a code snapshot: the revision of the checkout it is a copy of


@functools.cache
def revision() -> dict[str, Any]:
    """Return the `commit` of the checkout and whether it is `dirty`; both None where there is no git."""
    if (ROOT / REVISION_FILE).exists():
        return dict(read_json(ROOT / REVISION_FILE))
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"commit": commit and commit.strip(), "dirty": None if changes is None else bool(changes)}


def git(*arguments: str) -> str | None:
    """Return what a git command prints for this checkout; None when there is no git, or it fails."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    # A checkout unpacked inside another repository is not that repository.
    return done.stdout if done.returncode == 0 and (ROOT / ".git").exists() else None
