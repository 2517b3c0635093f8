"""sweep.json: the points of a sweep, the stages they consist of, and what became of them."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.plan import Plan
from src.store import Store, read_json, write_json

FILE = "sweep.json"
SCHEMA = 1


@dataclass
class SweepRecord:
    store: Store
    plan: Plan
    name: str
    command: str

    @property
    def folder(self) -> Path:
        return self.store.sweep_dir(self.name)

    def start(self) -> None:
        """Write the points down before anything runs. A folder that names points this sweep has not is kept aside."""
        self._make_room(set(self.plan.results))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write({}, finished=None)

    def finish(self, failures: dict[str, str]) -> None:
        """failures: identity of a point's evaluate stage -> why it was not reached."""
        self._write(failures, finished=_now())

    def _make_room(self, coming: set[str]) -> None:
        if not (self.folder / FILE).exists():
            return
        other = sum(point["identity"] not in coming for point in read_sweep(self.folder)["points"])
        if other:
            number = next(
                n for n in itertools.count(1) if not self.folder.with_name(f"{self.folder.name}.{n}").exists()
            )
            aside = self.folder.rename(self.folder.with_name(f"{self.folder.name}.{number}"))
            print(f"{self.folder} named {other} points that are not in this sweep: kept as {aside.name}")

    def _write(self, failures: dict[str, str], finished: str | None) -> None:
        plan = self.plan
        points = []
        for point, own, result in zip(plan.points, plan.point_stages, plan.results, strict=True):
            state = "failed" if result in failures else "done" if self.store.is_done(plan.stages[result]) else "to do"
            points.append(
                {
                    "setup": point.setup.name,
                    "method": point.method.name,
                    "init": point.init.name,
                    "variant": point.sweep.variant,
                    "beta": point.beta,
                    "lr": point.lr,
                    "seed": point.seed,
                    "state": state,
                    "error": failures.get(result),
                    "identity": result,
                    "stages": {plan.stages[i].role: i for i in own},
                }
            )
        write_json(
            self.folder / FILE,
            {
                "schema": SCHEMA,
                "name": self.name,
                "command": self.command,
                "store": str(self.store.root),
                "written": _now(),
                "finished": finished,
                "points": points,
            },
        )


def read_sweep(folder: Path) -> dict[str, Any]:
    """sweep.json of a sweep's folder. Raises FileNotFoundError when it is none."""
    return read_json(folder / FILE)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
