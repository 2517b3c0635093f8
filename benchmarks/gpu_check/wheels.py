"""Packages that the given python lacks, from a folder of wheels, without a network and beside its own packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def install(folder: Path, site: Path) -> None:
    """Install the wheels of `folder` into `site`, and let this process and those it starts import from there.

    Raises SystemExit with pip's last line when there are none or one does not fit this python.
    """
    files = sorted(folder.glob("*.whl"))
    if not files:
        raise SystemExit(f"--wheels {folder}: no .whl file in it")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-compile", "--upgrade", "--target", str(site), *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"--wheels {folder}: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}")
    path = str(site.resolve())
    sys.path.insert(0, path)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
