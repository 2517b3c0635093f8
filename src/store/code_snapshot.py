"""A copy of the code that jobs run, so that later edits of the checkout do not reach them."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path

from src.errors import ConfigError
from src.store.code_revision import REVISION_FILE, ROOT, git, revision
from src.store.files import write_json
from src.store.sweep_folder import SweepFolder

PACKAGES = ("conf", "src", "sweeps", "launchers", "hydra_plugins")
MAX_BYTES = 200 * 2**20  # code is a few hundred kilobytes; more than this is data


def snapshot(folder: Path, output_dir: Path) -> Path:
    """Copy the code into a subfolder of `folder` named by its content, unless it is there; return the subfolder.

    Copies the files that git tracks or does not ignore (without git, this project's packages), except results below
    `output_dir`. Raises ConfigError when they are too large to be code.
    """
    files = _code_files(_result_folders(output_dir.resolve()))
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
            content = (draft / path).read_bytes()
            digest.update(f"{path}\0{len(content)}\0".encode() + content)
        write_json(draft / REVISION_FILE, revision())
        final = folder / digest.hexdigest()[:12]
        try:
            os.rename(draft, final)
        except OSError:
            if not final.exists():  # if it does, the same copy was made earlier
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def _result_folders(output_dir: Path) -> set[Path]:
    """Return the folders of results: output_dir itself where it is inside the checkout, else its known subfolders."""
    if ROOT in output_dir.parents:
        return {output_dir}
    sweeps = {sweep.path for sweep in SweepFolder.all_in(output_dir)}
    return {*(output_dir / name for name in ("store", "runs", "tracking", "wandb", "tensorboard")), *sweeps}


def _code_files(exclude: set[Path]) -> list[Path]:
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed is not None:
        paths = {ROOT / name for name in listed.split("\0") if name}
    else:
        paths = {p for package in PACKAGES for p in (ROOT / package).rglob("*") if "__pycache__" not in p.parts}
    return sorted(p for p in paths if p.is_file() and exclude.isdisjoint(p.resolve().parents))
