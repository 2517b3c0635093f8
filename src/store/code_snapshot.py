"""Which code runs: the commit of this checkout, and a copy of it that later edits do not reach."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any

from src.errors import ConfigError
from src.store.sweep_folder import SweepFolder

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("conf", "src", "sweeps", "launchers", "hydra_plugins")
LIMIT = 200 * 2**20  # bytes of a snapshot; code is a few hundred kilobytes


COPIED = "revision.json"  # in a snapshot: what it is a copy of


@functools.cache
def revision() -> dict[str, Any]:
    """`commit` of the checkout and whether it is `dirty`; both None where there is no git."""
    if (ROOT / COPIED).exists():
        return dict(json.loads((ROOT / COPIED).read_text()))
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain")
    return {
        "commit": commit.strip() if commit else None,
        "dirty": None if commit is None or status is None else bool(status.strip()),
    }


def snapshot(folder: Path, output_dir: Path) -> Path:
    """A whole copy of the code below `folder`, named by its content: equal code is copied once.

    Copied is what git tracks or could track (not what it ignores), or where there is no git this project's packages;
    nothing that was written below `output_dir`. Raises ConfigError when that is too much to be code.
    """
    files = _files(_written(output_dir.resolve()))
    if (total := sum(f.stat().st_size for f in files)) > LIMIT:
        largest = max(files, key=lambda f: f.stat().st_size)
        raise ConfigError(
            f"the code to submit is {total / 2**20:.0f} MiB, {largest.relative_to(ROOT)} the largest file: "
            "add what is not code to .gitignore"
        )
    contents = [(file.relative_to(ROOT), file.read_bytes()) for file in files]
    name = hashlib.sha256()
    for path, content in contents:
        name.update(f"{path}\0{len(content)}\0".encode() + content)
    final = folder / name.hexdigest()[:12]
    if final.exists():
        return final
    draft = folder / f".draft-{uuid.uuid4().hex[:8]}"
    try:
        for path, content in contents:
            copy = draft / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)
            if os.access(ROOT / path, os.X_OK):
                copy.chmod(0o755)
        (draft / COPIED).write_text(json.dumps(revision()) + "\n")
        try:
            os.rename(draft, final)
        except OSError:
            if not final.exists():  # else somebody has just copied the same
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def _written(output_dir: Path) -> set[Path]:
    """Folders of results: all of output_dir where it is a subfolder of the checkout, else what is known there."""
    if ROOT in output_dir.parents:
        return {output_dir}
    sweeps = {sweep.path for sweep in SweepFolder.all_in(output_dir)}
    return {output_dir / "store", output_dir / "runs", output_dir / "wandb", *sweeps}


def _files(exclude: set[Path]) -> list[Path]:
    listed = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed is not None:
        paths = {ROOT / name for name in listed.split("\0") if name}
    else:
        paths = {p for package in PACKAGES for p in (ROOT / package).rglob("*") if "__pycache__" not in p.parts}
    return sorted(p for p in paths if p.is_file() and exclude.isdisjoint(p.resolve().parents))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    # A checkout unpacked inside another repository is not that repository.
    return done.stdout if done.returncode == 0 and (ROOT / ".git").exists() else None
