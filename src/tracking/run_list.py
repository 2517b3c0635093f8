"""The runs of a sweep, or of a single run, and the trackers they were started with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from src.config.schema import Tracking
from src.errors import ConfigError
from src.planning.plan import Plan
from src.store.files import read_json, write_json
from src.store.store import Store
from src.store.sweep_folder import SweepFolder
from src.tracking.runs import TrackedRun, runs_of_points


class RunList:
    """Lists the runs of a sweep's folder, or of OUTPUT_DIR/tracking/runs/RESULT.json, which a single run writes.

    Raises ConfigError for a folder without a sweep.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.sweep = SweepFolder.open(self.path) if self.path.is_dir() else None
        self.output_dir = self.path.parents[1 if self.sweep else 2]
        self.store = Store(self.output_dir)

    def read(self) -> dict[str, Any]:
        return self.sweep.read() if self.sweep else read_json(self.path)

    @property
    def tracking(self) -> Tracking:
        tracking = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Tracking), self.read()["tracking"]))
        assert isinstance(tracking, Tracking)
        return tracking

    def runs(self) -> list[TrackedRun]:
        """Return the runs as listed now: a search by rungs replaces the stages of a run by those of its next rung."""
        record = self.read()
        return runs_of_points(record["points"], record["name"])

    @property
    def is_finished(self) -> bool:
        """Whether nothing is computed any more."""
        if self.sweep:
            return self.sweep.read()["finished"] is not None
        return all(self.store.is_done(run.result) for run in self.runs())


def write_run_list(plan: Plan, store: Store) -> Path:
    """Write the list of a single run, in the form of sweep.json."""
    (point,), (result,), (stages,) = plan.points, plan.results, plan.stages_by_role
    path = _single_runs(store) / f"{result}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"setup": point.setup.name, "label": point.label, "identity": result, "stages": stages}
    write_json(path, {"name": point.sweep.name, "tracking": asdict(point.tracking), "points": [row]})
    return path


def run_lists_below(path: Path) -> list[RunList]:
    """Return the list of a sweep's folder, or all of an output_dir. Raises ConfigError when it is neither."""
    store = Store(path)
    if SweepFolder(path).exists() or path.is_file():
        return [RunList(path)]
    if not store.root.is_dir():
        raise ConfigError(f"{path}: neither a sweep's folder, such as outputs/sweeps/demo, nor an output_dir")
    paths = [folder.path for folder in SweepFolder.all_in(path)] + sorted(_single_runs(store).glob("*.json"))
    return [RunList(path) for path in paths]


def _single_runs(store: Store) -> Path:
    return store.output_dir / "tracking" / "runs"
