"""The folder of a sweep: the paths of its files, and the store of its results. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import ConfigError
from src.store.files import read_versioned_json, write_json
from src.store.store import Store

_RECORD = "sweep.json"
SCHEMA = 2  # of sweep.json


@dataclass(frozen=True)
class SweepFolder:
    """`<output_dir>/sweeps/<name>`: sweep.json (points, their stages and states), results, logs, jobs and code."""

    path: Path

    @staticmethod
    def open(path: str | os.PathLike[str]) -> SweepFolder:
        """Raise ConfigError when the folder has no sweep, or one of another version."""
        folder = SweepFolder(Path(path))
        if not folder.exists():
            raise ConfigError(f"{path}: no {_RECORD} in it; give a sweep's folder, such as outputs/sweeps/demo")
        folder.read()
        return folder

    @staticmethod
    def all_in(output_dir: Path) -> Iterator[SweepFolder]:
        """Yield every sweep of an output_dir."""
        for record in sorted(output_dir.glob(f"sweeps/*/{_RECORD}")):
            yield SweepFolder(record.parent)

    @staticmethod
    def of_job(job: Path) -> SweepFolder:
        """Return the sweep that a folder in `jobs` belongs to."""
        return SweepFolder(job.parents[1])

    @property
    def name(self) -> str:
        return self.path.absolute().name

    @property
    def output_dir(self) -> Path:
        return self.path.absolute().parents[1]

    @property
    def store(self) -> Store:
        return Store(self.output_dir)

    @property
    def record(self) -> Path:
        return self.path / _RECORD

    @property
    def points_csv(self) -> Path:
        return self.path / "points.csv"

    @property
    def best_yaml(self) -> Path:
        return self.path / "best.yaml"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def tables(self) -> Path:
        return self.path / "tables"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def jobs(self) -> Path:
        return self.path / "jobs"

    @property
    def code(self) -> Path:
        return self.path / "code"

    def exists(self) -> bool:
        return (self.path / _RECORD).is_file()

    def read(self) -> dict[str, Any]:
        """Read sweep.json. Raises FileNotFoundError without one, and ConfigError for another version's."""
        return read_versioned_json(self.path / _RECORD, SCHEMA)

    def write(self, record: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / _RECORD, {"schema": SCHEMA, **record})

    def results(self) -> list[Path]:
        """Return the files that describe the points and their results; not jobs, code or logs."""
        files = (self.path / _RECORD, self.points_csv, self.best_yaml, self.report, self.tables, self.figures)
        return [path for path in files if path.exists()]
