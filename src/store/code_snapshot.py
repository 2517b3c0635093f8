"""Which code runs, and the copy of it that jobs run, so that later edits of the checkout do not reach them."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import uuid
from collections.abc import Set
from pathlib import Path
from typing import Any

from src.errors import ConfigError
from src.store.files import publish_folder, read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
REVISION_FILE = "revision.json"  # in a snapshot: the revision of the checkout it is a copy of
PACKAGES = ("conf", "src", "sweeps", "launchers", "hydra_plugins")
MAX_BYTES = 200 * 2**20  # code is a few hundred kilobytes; more than this is data


@functools.cache
def revision() -> dict[str, Any]:
    """Return the `commit` of this checkout, or of the one a snapshot was taken from, and whether it is `dirty`.

    Both are None where there is no git.
    """
    if (ROOT / REVISION_FILE).exists():
        return dict(read_json(ROOT / REVISION_FILE))
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return {"commit": commit and commit.strip(), "dirty": None if changes is None else bool(changes)}


def snapshot(folder: Path, exclude: Set[Path]) -> Path:
    """Copy the code into a subfolder of `folder` named by its content, unless it is there; return the subfolder.

    Copies the files that git tracks or does not ignore (without git, this project's packages), except those below the
    excluded folders. Raises ConfigError when they are too large to be code.
    """
    files = _code_files(exclude)
    if (total := sum(f.stat().st_size for f in files)) > MAX_BYTES:
        largest = max(files, key=lambda f: f.stat().st_size)
        raise ConfigError(
            f"code snapshot is {total / 2**20:.0f} MiB (largest: {largest.relative_to(ROOT)}); "
            "add data files to .gitignore"
        )
    draft, digest = folder / f".draft-{uuid.uuid4().hex[:8]}", hashlib.sha256()
    try:
        for file in files:
            path = file.relative_to(ROOT)
            (draft / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, draft / path)
            _add_to_digest(digest, path, (draft / path).read_bytes())
        write_json(draft / REVISION_FILE, revision())
        final = folder / digest.hexdigest()[:12]
        publish_folder(draft, final)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def code_digest() -> str:
    """Return a digest of the code that runs now: of this project's packages alone, whatever else is in the checkout."""
    digest = hashlib.sha256()
    for file in sorted(path for path in _package_files() if path.is_file() and path.suffix != ".pyc"):
        _add_to_digest(digest, file.relative_to(ROOT), file.read_bytes())
    return digest.hexdigest()


def _add_to_digest(digest: Any, path: Path, content: bytes) -> None:
    digest.update(f"{path.as_posix()}\0{len(content)}\0".encode() + content)


def _package_files() -> set[Path]:
    return {p for package in PACKAGES for p in (ROOT / package).rglob("*") if "__pycache__" not in p.parts}


def _code_files(exclude: Set[Path]) -> list[Path]:
    listed = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    paths = _package_files() if listed is None else {ROOT / name for name in listed.split("\0") if name}
    return sorted(p for p in paths if p.is_file() and exclude.isdisjoint(p.resolve().parents))


def _git(*arguments: str) -> str | None:
    """Return what a git command prints for this checkout; None when there is no git, or it fails."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    # A checkout unpacked inside another repository is not that repository.
    return done.stdout if done.returncode == 0 and (ROOT / ".git").exists() else None
