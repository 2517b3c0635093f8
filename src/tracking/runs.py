"""Which runs trackers show: one per point, and one per stage that points share.

They are listed by sweep.json or, for a single run, by a file of the same form below OUTPUT_DIR/tracking.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config.schema import Tracking
from src.errors import ConfigError, DamagedFile, one_line, warn
from src.planning.plan import Plan
from src.store.files import read_json, write_json
from src.store.store import METRICS_FILE, RUN_CONFIG_FILE, SHARED_ROLES, STAGE_FILE, StageName, Store, kind_of
from src.store.sweep_folder import SweepFolder, with_reporting
from src.tracking.sink import RunMetadata

_LISTED = ("setup", "label", "identity", "stages")  # of each point of a list
SINGLE_RUNS = Path("tracking", "runs")  # in an output_dir: RESULT.json of each run that no sweep started

# Entries of a point that do not describe the run, or that other points decide.
_NOT_CONFIG = ("beta_grid", "lr_grid", "best_from", "dry_run", "output_dir", "keep_checkpoints", "sweep", "tracking")


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers show it, and the stages in the store that its content is read from."""

    id: str  # identity of the shared stage, or of the point's result (in a search by rungs: of its last rung)
    job_type: str  # role of the shared stage, or `align`
    name: str
    group: str | None
    stages: dict[str, str]  # kind -> identity, in the order they are computed
    upstream_runs: dict[str, str] = field(default_factory=dict)  # role -> id
    earlier_results: tuple[str, ...] = ()  # of the rungs before, oldest first

    @property
    def result(self) -> StageName:
        """The stage that is computed last."""
        return StageName(*list(self.stages.items())[-1])

    def done_stages(self, store: Store) -> dict[str, str] | None:
        """Return kind -> identity of the newest complete stages: its own, or those of the last rung it finished."""
        if store.is_done(self.result):
            return self.stages
        for result in reversed(self.earlier_results):
            if store.is_done(StageName("evaluate", result)):
                upstream = read_json(store.dir(StageName("evaluate", result)) / STAGE_FILE)["upstream"]
                return {"align": upstream["align"], "generate": upstream["samples"], "evaluate": result}
        return None

    def metrics_files(self, store: Store) -> Iterator[Path]:
        """Yield where the training metrics may be, the most complete first: published, of an attempt, of a rung."""
        kind = next(iter(self.stages))
        stage = StageName(kind, self.stages[kind])
        yield store.dir(stage) / METRICS_FILE
        attempts = store.work(stage).glob(f"attempt-*/{METRICS_FILE}")
        yield from sorted(attempts, key=lambda path: path.stat().st_mtime_ns, reverse=True)
        if done := self.done_stages(store):
            yield store.dir(StageName(kind, done[kind])) / METRICS_FILE

    def metadata(self, folder: Path) -> RunMetadata:
        """Describe the run by run_config.json and stage.json in `folder`, of a finished stage or a running attempt."""
        point = read_json(folder / RUN_CONFIG_FILE)
        setup, init, method = (point[name]["name"] for name in ("setup", "init", "method"))
        if self.job_type in SHARED_ROLES:
            tags: tuple[str, ...] = (setup, init)
            config = {"setup": setup, **read_json(folder / STAGE_FILE)["inputs"]}
        else:
            tags = (setup, method, init)
            config = {key: value for key, value in point.items() if key not in _NOT_CONFIG}
            # Training curves of several learning rates and seeds are grouped by their series.
            series = f"{method} beta={point['beta']:g}"
            config |= {"setup": setup, "series": series, "upstream_runs": self.upstream_runs}
        return RunMetadata(self.id, self.job_type, self.name, self.group or point["sweep"]["name"], tags, config)


class RunList:
    """Lists the runs of a sweep's folder, or of OUTPUT_DIR/tracking/runs/RESULT.json, which a single run writes.

    Raises ConfigError for a folder without a sweep.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.sweep = SweepFolder.open(self.path) if os.path.isdir(self.path) else None
        self.output_dir = self.path.parents[1 if self.sweep else 2]
        self.store = Store(self.output_dir)

    @property
    def tracking(self) -> Tracking:
        """The trackers that the runs were started with."""
        recorded = self._read()["tracking"]
        try:
            tracking = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Tracking), recorded))
        except (OmegaConfBaseException, ValueError) as error:
            raise DamagedFile(f"{self._file}: damaged, its tracking is not valid ({one_line(error)})") from None
        assert isinstance(tracking, Tracking)
        return tracking

    @property
    def is_finished(self) -> bool:
        """Whether nothing is computed any more."""
        if self.sweep:
            return self.sweep.read()["finished"] is not None
        return all(self.store.is_done(run.result) for run in self.runs())

    def runs(self) -> list[TrackedRun]:
        """Return the runs as listed now, upstream runs before those that use them.

        A search by rungs replaces the stages of a run by those of its next rung.
        """
        record = self._read()
        group = record["name"]
        runs: dict[str, TrackedRun] = {}
        for point in record["points"]:
            upstream = {role: point["stages"][role] for role in SHARED_ROLES if role in point["stages"]}
            for role, identity in upstream.items():
                stages = {kind_of(role): identity}
                runs.setdefault(identity, TrackedRun(identity, role, f"{point['setup']} {role}", group, stages))
            run = point.get("full_result", point["identity"])
            # The label of a rung before the last ends with `to 50 %`; the run continues in the next rung.
            name = point["label"] if run == point["identity"] else point["label"].rpartition(" to ")[0]
            point = with_reporting(point, lambda result: self.store.is_done(StageName("evaluate", result)))
            stages = {kind: identity for kind, identity in point["stages"].items() if kind not in SHARED_ROLES}
            earlier = tuple(point.get("earlier", ()))
            runs.setdefault(run, TrackedRun(run, "align", name, group, stages, upstream, earlier))
        return list(runs.values())

    @property
    def _file(self) -> Path:
        return self.sweep.record if self.sweep else self.path

    def _read(self) -> dict[str, Any]:
        if self.sweep:
            return self.sweep.read()
        record = read_json(self.path)
        points = record.get("points")
        is_whole = isinstance(record.get("tracking"), dict) and "name" in record and isinstance(points, list)
        if not is_whole or not all(isinstance(p, dict) and {*_LISTED} <= p.keys() for p in points or ()):
            raise DamagedFile(f"{self.path}: damaged, it lists no run")
        return record


def write_run_list(plan: Plan, store: Store) -> Path:
    """Write the list of a single run, in the form of sweep.json."""
    (point,), (result,), (stages,) = plan.points, plan.results, plan.stages_by_role
    path = store.output_dir / SINGLE_RUNS / f"{result}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"setup": point.setup.name, "label": point.label, "identity": result, "stages": stages}
    write_json(path, {"name": point.sweep.name, "tracking": asdict(point.tracking), "points": [row]})
    return path


def run_lists_below(path: Path) -> list[RunList]:
    """Return the list of a sweep's folder, or all of an output_dir. Raises ConfigError when it is neither."""
    if SweepFolder(path).exists() or os.path.isfile(path):
        return [RunList(path)]
    if not os.path.isdir(Store(path).root):
        raise ConfigError(f"{path}: neither a sweep's folder, such as outputs/sweeps/demo, nor an output_dir")
    return list(
        _readable([*(folder.path for folder in SweepFolder.all_in(path)), *(path / SINGLE_RUNS).glob("*.json")])
    )


def _readable(paths: list[Path]) -> Iterator[RunList]:
    """Yield the lists that can be read; warn of the others."""
    for path in sorted(paths):
        try:
            runs = RunList(path)
            runs.runs()
        except ConfigError as error:
            warn(f"{error}; its runs are left out")
        else:
            yield runs
