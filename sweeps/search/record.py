"""sweep.json: the points of a sweep, the stages they consist of, and what became of them."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers.slurm.job_records import submissions
from src.errors import ConfigError, PointFailure, SweepFailed
from src.planning.plan import Plan
from src.store.code_snapshot import revision
from src.store.files import read_json, write_json
from src.store.retention import apply_retention, best_results_in_store
from src.store.store import Store
from sweeps.search.successive_halving import Standing, stopped
from sweeps.search.variants import studies

FILE = "sweep.json"
SCHEMA = 1
TRACKING = ("name", "wandb", "project", "entity", "mode")  # where W&B finds it
RESULTS = (FILE, "points.csv", "best.yaml", "report.html", "tables", "figures")


@dataclass
class SweepRecord:
    store: Store
    plan: Plan
    name: str
    command: str
    standing: Standing | None = None  # of a search by rungs
    lost: dict[str, PointFailure] = field(default_factory=dict)  # in rungs before
    code: dict[str, Any] = field(default_factory=revision)

    @property
    def folder(self) -> Path:
        return self.store.sweep_dir(self.name)

    def start(self) -> None:
        """Write the points down before anything runs. A record that names points this sweep has not is kept aside."""
        own = (self.plan.results,) if self.standing is None else self.standing.results
        self._make_room({identity for results in own for identity in results})
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write("running", {})

    def submitted(self) -> None:
        """Jobs do the rest: note which."""
        self._write("submitted", {})

    def conclude(self, lost: dict[str, PointFailure]) -> None:
        """All has ended: write down what became of every point, choose the best, remove what need not be kept. Between
        rungs there is nothing to choose.

        lost: identity of a point's evaluate stage -> why it was not reached. Raises SweepFailed when there are any.
        """
        lost = self.lost | lost
        if self.standing is not None and not self.standing.over:
            self._write("failed" if lost else "done", lost)
            rung = self.standing.rung + 1
            print(f"{self.name}: rung {rung} has ended; the same command goes on with rung {rung + 1}", flush=True)
            if lost:
                raise SweepFailed(
                    f"{len(lost)} of {len(self.plan.points)} points failed; the same command again runs those first, "
                    "with hydra.launcher.retry_failed=false it goes on without them"
                )
            return
        self._write("aggregating", lost)

        from sweeps.aggregate import aggregate  # pandas: only when there is something to aggregate

        best = aggregate([self.folder])
        chosen = best_results_in_store(self.store) | {i for seeds in best.identities for i in seeds}
        apply_retention(self.store, self.plan, self.plan.points[0].keep_checkpoints, chosen)
        self._write("failed" if lost else "done", lost)  # only now: whoever waits for it finds everything
        if lost:
            raise SweepFailed(
                f"{len(lost)} of {len(self.plan.points)} points failed; the same command again runs those alone"
            )

    def _make_room(self, coming: set[str]) -> None:
        if not (self.folder / FILE).exists():
            return
        other = sum(point["identity"] not in coming for point in read_sweep(self.folder)["points"])
        if other:
            number = next(
                n for n in itertools.count(1) if not self.folder.with_name(f"{self.folder.name}.{n}").exists()
            )
            aside = self.folder.with_name(f"{self.folder.name}.{number}")
            aside.mkdir()
            for name in RESULTS:  # not its jobs, which may be running, nor their code and logs
                if (self.folder / name).exists():
                    (self.folder / name).rename(aside / name)
            print(
                f"{self.folder} named {other} points that are not in this sweep: its results are kept as {aside.name}"
            )

    def _write(self, whole: str, lost: dict[str, PointFailure]) -> None:
        plan, lost = self.plan, self.lost | lost
        jobs = {
            identity: task.job
            for submission in submissions(self.store.sweeps.glob("*"))
            for task in submission.tasks
            for _, identity in task.stages
        }
        points = []
        for number, (point, own, result) in enumerate(zip(plan.points, plan.point_stages, plan.results, strict=True)):
            done, waiting = self.store.is_done(plan.stages[result]), whole == "submitted" and result in jobs
            state = "done" if done else "queued" if waiting else "to do"
            points.append(
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
                    "state": lost[result].state if result in lost else state,
                    "error": lost[result].reason if result in lost else None,
                    "job": jobs.get(result),
                    "identity": result,
                    "stages": {plan.stages[i].role: i for i in own},
                    **({} if self.standing is None else self.standing.of_point(number)),
                }
            )
        write_json(
            self.folder / FILE,
            {
                "schema": SCHEMA,
                "name": self.name,
                "command": self.command,
                "code": self.code,
                "select": plan.points[0].sweep.select,
                "store": str(self.store.root),
                "tracking": {name: getattr(plan.points[0].tracking, name) for name in TRACKING},
                "written": _now(),
                "finished": _now() if whole in ("done", "failed") else None,
                "state": whole,
                "search": None if self.standing is None else self.standing.described,
                "studies": studies(plan.points if self.standing is None else [stopped(p, 1.0) for p in plan.points]),
                "points": points,
            },
        )


def check_sweep(folder: Path) -> None:
    """Raises ConfigError when a folder is no sweep's."""
    if not (folder / FILE).is_file():
        raise ConfigError(f"{folder}: no {FILE} there; give a sweep's folder, such as outputs/sweeps/demo")


def read_sweep(folder: Path) -> dict[str, Any]:
    """sweep.json of a sweep's folder. Raises FileNotFoundError when it is none."""
    return read_json(folder / FILE)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
