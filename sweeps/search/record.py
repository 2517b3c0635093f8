"""sweep.json: the points of a sweep, the stages they consist of, and what became of them."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers.slurm.job_records import all_submissions
from src.errors import ConfigError, PointFailure
from src.planning.plan import Plan
from src.store.code_snapshot import revision
from src.store.store import StageName, Store
from src.store.sweep_folder import SweepFolder
from sweeps.search.successive_halving import Standing, stopped
from sweeps.search.variants import studies

FILE = "sweep.json"
TRACKING = ("name", "wandb", "project", "entity", "mode")  # where W&B finds it


@dataclass
class SweepRecord:
    """sweep.json while a plan is launched; `sweeps.finalize` completes it."""

    store: Store
    plan: Plan
    name: str
    command: str
    standing: Standing | None = None  # of a search by rungs
    lost: dict[str, PointFailure] = field(default_factory=dict)  # failures of earlier rungs, by result
    code: dict[str, Any] = field(default_factory=revision)

    @property
    def folder(self) -> SweepFolder:
        return SweepFolder(self.store.sweep_dir(self.name))

    def start(self) -> None:
        """Write the points before anything runs. An existing record of other points is archived first."""
        own = (self.plan.results,) if self.standing is None else self.standing.results
        self._make_room({identity for results in own for identity in results})
        self._write("running")

    def submitted(self) -> None:
        """Write the ids of the submitted jobs."""
        self._write("submitted")

    def _make_room(self, coming: set[str]) -> None:
        if not self.folder.exists():
            return
        other = sum(point["identity"] not in coming for point in self.folder.read()["points"])
        if other:
            path = self.folder.path
            number = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.{n}").exists())
            aside = path.with_name(f"{path.name}.{number}")
            aside.mkdir()
            for result in self.folder.results():
                result.rename(aside / result.name)
            print(
                f"{path} contained {other} points that are not part of this sweep; the old results were moved to "
                f"{aside.name}"
            )

    def _write(self, state: str) -> None:
        plan, sweep = self.plan, self.plan.points[0]
        points = [
            {
                "setup": point.setup.name,
                "method": point.method.name,
                "init": point.init.name,
                "variant": point.sweep.variant,
                "beta": point.beta,
                "lr": point.lr,
                "seed": point.seed,
                "stop": point.trainer.align.stop_fraction,
                "label": point.label,
                "identity": stages["evaluate"],
                "stages": stages,
                **({} if self.standing is None else self.standing.of_point(number)),
            }
            for number, (point, stages) in enumerate(zip(plan.points, plan.stages_by_role, strict=True))
        ]
        record = {
            "name": self.name,
            "command": self.command,
            "code": self.code,
            "select": sweep.sweep.select,
            "keep_checkpoints": sweep.keep_checkpoints,
            "store": str(self.store.root),
            "tracking": {name: getattr(sweep.tracking, name) for name in TRACKING},
            "search": None if self.standing is None else self.standing.described,
            "studies": studies(plan.points if self.standing is None else [stopped(p, 1.0) for p in plan.points]),
            "points": points,
        }
        write_states(self.folder, record, state, self.lost)


def write_states(folder: SweepFolder, record: dict[str, Any], state: str, failures: dict[str, PointFailure]) -> None:
    """Write sweep.json with the state of the sweep (running, submitted, aggregating, done, failed) and of every point.

    failures: identity of a point's result -> why it is missing.
    """
    store = folder.store
    jobs = {
        identity: task.job
        for submission in all_submissions(store)
        for task in submission.tasks
        for _, identity in task.stages
    }
    for point in record["points"]:
        result = point["identity"]
        failure = failures.get(result)
        if store.is_done(StageName("evaluate", result)):
            point_state = "done"
        elif failure is not None:
            point_state = failure.state
        else:
            point_state = "queued" if state == "submitted" and result in jobs else "to do"
        reason = failure.reason if failure is not None and point_state == failure.state else None
        point |= {"state": point_state, "error": reason, "job": jobs.get(result)}
    finished = _now() if state in ("done", "failed") else None
    folder.write({**record, "state": state, "written": _now(), "finished": finished})


def check_sweep(folder: Path) -> None:
    """Raises ConfigError when a folder is no sweep's."""
    if not (folder / FILE).is_file():
        raise ConfigError(f"{folder}: no {FILE} there; give a sweep's folder, such as outputs/sweeps/demo")


def read_sweep(folder: Path) -> dict[str, Any]:
    """sweep.json of a sweep's folder. Raises FileNotFoundError when it is none."""
    return SweepFolder(folder).read()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
