"""Pack a sweep into one file that others can check and cite: `python -m sweeps.pack DIR [--out study.zip]`.

It has the configs, samples, judgements, metrics, tables, figures and report, and says with which code, data and models
they were made; no model weights and no secrets. `python -m sweeps.reproduce study.zip` computes its results again.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from src.errors import StageError, report_errors
from src.store.sweep_folder import SweepFolder
from sweeps.arguments import ArgumentParser
from sweeps.study.archive import write_archive
from sweeps.study.comparison import check_tables
from sweeps.study.contents import StudyContents


def main() -> int:
    parser = ArgumentParser(prog="python -m sweeps.pack", description=__doc__)
    parser.add_argument("dir", help="a sweep's folder, such as outputs/sweeps/demo")
    parser.add_argument("--out", type=Path, help="the file to write; default: study.zip in the sweep's folder")
    arguments = parser.parse_args()
    with report_errors():
        folder = SweepFolder.open(arguments.dir)
        path = arguments.out or folder.path / "study.zip"
        try:
            StudyContents(folder)  # names a damaged file, rather than the cells that are empty without it
            check_tables(folder)
            study = write_archive(folder, path)
        except OSError as error:
            raise StageError(f"{error.filename or path}: {error.strerror}; --out FILE names another file") from None
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        points = f"{study['points']['done']} of {study['points']['all']} points"
        print(f"{path}: {points}, {path.stat().st_size / 1e6:.1f} MB, SHA-256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
