"""The folder of a sweep: the paths of its files, and the store of its results. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from src.errors import ConfigError, DamagedFile
from src.methods import METHODS
from src.store.code_snapshot import ROOT
from src.store.files import read_versioned_json, write_json
from src.store.store import Store

SCHEMA = 2  # of sweep.json

# What readers of sweep.json rely on, and its type.
_RECORD: dict[str, Any] = dict.fromkeys(("name", "command", "select", "keep_checkpoints", "store"), str)
_RECORD |= {"tracking": dict, "studies": list, "points": list, "search": dict | None, "finished": str | None}
_SEARCH = {"rungs": list, "rung": int, "keep_fraction": float}
_POINT: dict[str, Any] = dict.fromkeys(("setup", "method", "init", "variant", "label", "identity"), str)
_POINT |= {"beta": float | int, "lr": float | int, "seed": int, "stages": dict}
_POINT_OF_RUNGS = {"rung": int, "earlier": list, "full_result": str}


class SweepFolder:
    """`<output_dir>/sweeps/<name>`: sweep.json (points, their stages and states), results, logs, jobs and code."""

    RECORD = "sweep.json"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = path / self.RECORD
        self.points_csv = path / "points.csv"
        self.best_yaml = path / "best.yaml"
        self.report = path / "report.html"
        self.tables = path / "tables"
        self.figures = path / "figures"
        self.hub = path / "hub"
        self.logs = path / "logs"
        self.jobs = path / "jobs"
        self.code = path / "code"
        self.name = path.absolute().name

    @staticmethod
    def open(path: str | os.PathLike[str]) -> SweepFolder:
        """Raise ConfigError when the folder has no sweep, or one of another version."""
        folder = SweepFolder(Path(path))
        if not folder.exists():
            raise ConfigError(f"{path}: no sweep.json in it; give a sweep's folder, such as outputs/sweeps/demo")
        folder.read()
        return folder

    @staticmethod
    def all_in(output_dir: Path) -> Iterator[SweepFolder]:
        """Yield every sweep of an output_dir."""
        for record in sorted(output_dir.glob("sweeps/*/sweep.json")):
            yield SweepFolder(record.parent)

    @staticmethod
    def of_job(job: Path) -> SweepFolder:
        """Return the sweep that a folder in `jobs` belongs to."""
        return SweepFolder(job.parents[1])

    @property
    def output_dir(self) -> Path:
        return self.path.absolute().parents[1]

    @property
    def store(self) -> Store:
        return Store(self.output_dir)

    def results_root(self, record: Mapping[str, Any]) -> Path:
        """Return the folder of the results of its sweep.json: the store beside this folder, else the recorded one.

        The folder may have been moved, with its store or without.
        """
        return self.store.root if self.store.root.is_dir() else Path(record["store"])

    def exists(self) -> bool:
        return os.path.isfile(self.record)  # False also for a name that no file can have

    def read(self) -> dict[str, Any]:
        """Read sweep.json. Raises FileNotFoundError without one, and ConfigError for another version's."""
        try:
            record = read_versioned_json(self.record, SCHEMA)
            self._check(record)
        except DamagedFile as error:
            raise DamagedFile(
                f"{error}; move {self.path} away and run the sweep again: finished stages are kept"
            ) from None
        return record

    def _check(self, record: dict[str, Any]) -> None:
        """Raise DamagedFile when an entry that is read somewhere is missing or of another type."""
        self._check_entries(record, _RECORD, "it")
        if search := record["search"]:
            self._check_entries(search, _SEARCH, "search")
        for number, point in enumerate(record["points"]):
            where = f"points[{number}]"
            self._check_entries(point, _POINT | (_POINT_OF_RUNGS if search else {}), where)
            self._check_entries(point["stages"], dict.fromkeys(("align", "generate", "evaluate"), str), where)
            if point["method"] not in METHODS:
                raise DamagedFile(f"{self.record}: {where} has an unknown method, {point['method']}")

    def _check_entries(self, entries: Any, types: Mapping[str, Any], where: str) -> None:
        missing = object()
        for key, kind in types.items():
            if not isinstance(entries, dict) or not isinstance(entries.get(key, missing), kind):
                raise DamagedFile(f"{self.record}: damaged, {where} has no valid {key}")

    def write(self, record: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.record, {"schema": SCHEMA, **record})

    def results(self) -> list[Path]:
        """Return the files that describe the points and their results; not jobs, code or logs."""
        files = (self.record, self.points_csv, self.best_yaml, self.report, self.tables, self.figures)
        return [path for path in files if path.exists()]


def with_reporting(point: dict[str, Any], is_whole: Callable[[str], bool]) -> dict[str, Any]:
    """Return a point of sweep.json with the result in which all its prompts are judged, where there is one.

    With judge.reporting=selected that is another result, `reporting`, of points that were selected; is_whole: whether a
    result is there and not damaged.
    """
    reporting = point.get("reporting")
    if not isinstance(reporting, str) or not is_whole(reporting):
        return point
    earlier, stages = [*point.get("earlier", ()), point["identity"]], point["stages"] | {"evaluate": reporting}
    return point | {"identity": reporting, "earlier": earlier, "stages": stages}


def result_folders(output_dir: Path) -> set[Path]:
    """Return the folders of results: output_dir itself where it is inside the checkout, else its known subfolders."""
    output_dir = output_dir.resolve()
    if ROOT in output_dir.parents:
        return {output_dir}
    sweeps = {sweep.path for sweep in SweepFolder.all_in(output_dir)}
    return {*(output_dir / name for name in ("store", "runs", "tracking", "wandb", "tensorboard")), *sweeps}
