"""Where runs to mirror are listed: a sweep's folder, or the record of a single run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from src.config.schema import Tracking
from src.errors import ConfigError
from src.planning.plan import Plan
from src.store.files import read_json, write_json
from src.store.store import Store
from src.store.sweep_folder import SweepFolder
from src.tracking.runs import TrackedRun, runs_of_points


class Source(Protocol):
    """Lists runs, and says where they were started to be tracked."""

    @property
    def path(self) -> Path:
        """The folder or file that lists the runs."""

    @property
    def store(self) -> Store:
        """The store that has the stages of the runs."""

    @property
    def tracking(self) -> Tracking:
        """The trackers that the runs were started with."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing is computed any more."""

    def runs(self) -> list[TrackedRun]:
        """Return the runs as they are listed now; a running search replaces the stages of a run by its next rung's."""


@dataclass(frozen=True)
class SweepSource:
    folder: SweepFolder

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def store(self) -> Store:
        return self.folder.store

    @property
    def tracking(self) -> Tracking:
        return _tracking(self.folder.read())

    @property
    def is_finished(self) -> bool:
        return self.folder.read()["finished"] is not None

    def runs(self) -> list[TrackedRun]:
        sweep = self.folder.read()
        return runs_of_points(sweep["points"], sweep["name"])


@dataclass(frozen=True)
class RunRecord:
    """OUTPUT_DIR/tracking/runs/RESULT.json: the stages of a single run and its trackers, in the form of sweep.json."""

    path: Path

    @staticmethod
    def write(plan: Plan, store: Store) -> RunRecord:
        """Note the only point of a plan."""
        (point,), (result,) = plan.points, plan.results
        stages = {stage.role: identity for identity, stage in plan.stages.items()}
        record = RunRecord(_records(store) / f"{result}.json")
        record.path.parent.mkdir(parents=True, exist_ok=True)
        row = {"label": point.label, "identity": result, "stages": stages}
        write_json(record.path, {"name": point.sweep.name, "tracking": asdict(point.tracking), "points": [row]})
        return record

    @property
    def store(self) -> Store:
        return Store(self.path.parents[2])

    @property
    def tracking(self) -> Tracking:
        return _tracking(read_json(self.path))

    @property
    def is_finished(self) -> bool:
        return all(self.store.is_done(run.result) for run in self.runs())

    def runs(self) -> list[TrackedRun]:
        record = read_json(self.path)
        return runs_of_points(record["points"], record["name"])


def open_source(path: Path) -> Source:
    """Return the sweep or run record at `path`. Raises ConfigError when there is none."""
    return RunRecord(path) if path.is_file() else SweepSource(SweepFolder.open(path))


def sources_below(path: Path) -> list[Source]:
    """Return the sources of a sweep's folder, or all of an output_dir. Raises ConfigError when it is neither."""
    if SweepFolder(path).exists() or path.is_file():
        return [open_source(path)]
    store = Store(path)
    if not store.root.is_dir():
        raise ConfigError(f"{path}: neither a sweep's folder, such as outputs/sweeps/demo, nor an output_dir")
    sweeps = [SweepSource(folder) for folder in SweepFolder.all_in(path)]
    return [*sweeps, *(RunRecord(file) for file in sorted(_records(store).glob("*.json")))]


def _records(store: Store) -> Path:
    return store.output_dir / "tracking" / "runs"


def _tracking(record: dict[str, Any]) -> Tracking:
    tracking = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Tracking), record["tracking"]))
    assert isinstance(tracking, Tracking)
    return tracking
