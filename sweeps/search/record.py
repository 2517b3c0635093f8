"""Write sweep.json: the points of a sweep, the stages they consist of, and their states."""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from launchers.slurm.job_records import all_submissions
from src.config.judge_rules import judged_in_part
from src.config.schema import Point
from src.errors import PointFailure
from src.planning.plan import Plan
from src.planning.stage import stages_of, with_all_judged
from src.store.code_snapshot import revision
from src.store.store import StageName, Store
from src.store.sweep_folder import SweepFolder
from sweeps.search.running import RunningSweep
from sweeps.search.successive_halving import RungState
from sweeps.search.variants import studies, varying_settings


@dataclass
class SweepRecord:
    """sweep.json while a plan is launched; `sweeps.aggregate.finalize` completes it."""

    folder: SweepFolder
    plan: Plan
    command: str
    rungs: RungState
    failures: dict[str, PointFailure]  # of earlier rungs: result identity -> failure
    code: dict[str, Any] = field(default_factory=revision)

    def start(self, running: RunningSweep) -> None:
        """Write the points before anything runs. Results of a sweep with other points are archived first.

        Raises ConfigError while that sweep still runs.
        """
        results = set[str]().union(*self.rungs.results)
        running.claim(results)
        self._archive_previous(results)
        self.write("running")

    def _archive_previous(self, results: set[str]) -> None:
        if not self.folder.exists():
            return
        record = self.folder.read()
        other = sum(point["identity"] not in results for point in record["points"])
        if other:
            path = self.folder.path
            candidates = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
            archive = next(candidate for candidate in candidates if not candidate.exists())
            archive.mkdir()
            if record["finished"] is None:  # it was killed, or its jobs were cancelled
                store = self.folder.store
                is_done = all(store.is_done(StageName("evaluate", p["identity"])) for p in record["points"])
                write_states(self.folder, record, "done" if is_done else "failed", recorded_failures(record, store))
            for result in self.folder.results():  # not its jobs, their code and logs
                result.rename(archive / result.name)
            print(
                f"{path} contained {other} points that are not part of this sweep; the old results were moved to "
                f"{archive.name}"
            )

    def write(self, state: str) -> None:
        """Write the points, with the ids of the jobs that were submitted for them. state: of the sweep."""
        first = self.plan.points[0]
        record = {
            "name": self.folder.name,
            "command": self.command,
            "code": self.code,
            "select": first.sweep.select,
            "keep_checkpoints": first.keep_checkpoints,
            "store": str(self.folder.store.root),
            "tracking": asdict(first.tracking),
            "search": self.rungs.description,
            "studies": studies(self.rungs.points),
            "points": self._points(),
        }
        write_states(self.folder, record, state, self.failures)

    def _points(self) -> list[dict[str, Any]]:
        settings = varying_settings(self.rungs.points)  # which the variant is made of
        return [
            {
                "setup": point.setup.name,
                "method": point.method.name,
                "init": point.init.name,
                "variant": point.sweep.variant,
                "settings": settings[index],
                "beta": point.beta,
                "lr": point.lr,
                "seed": point.seed,
                "stop_fraction": point.trainer.align.stop_fraction,
                "label": point.label,
                "identity": stages["evaluate"],
                "stages": stages,
                **self._reporting(point),
                **self.rungs.describe_point(index),
            }
            for index, (point, stages) in enumerate(zip(self.plan.points, self.plan.stages_by_role, strict=True))
        ]

    def _reporting(self, point: Point) -> dict[str, str]:
        """Return the identity of the point's result with all prompts judged, where it is judged so once selected."""
        return {"reporting": stages_of(with_all_judged(point))[-1].identity} if judged_in_part(point) else {}


def recorded_failures(record: dict[str, Any], store: Store) -> dict[str, PointFailure]:
    """Return why points of a sweep.json failed, without those that are done by now."""
    points = [point for point in record["points"] if point.get("error") is not None]
    return {
        point["identity"]: PointFailure(point["state"], point["error"])
        for point in points
        if not store.is_done(StageName("evaluate", point["identity"]))
    }


def write_states(folder: SweepFolder, record: dict[str, Any], state: str, failures: dict[str, PointFailure]) -> None:
    """Write sweep.json with the state of the sweep (running, submitted, aggregating, done, failed) and of every point.

    failures: identity of a point's result -> why it is missing or cannot be used.
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
        failure = failures.get(result) or failures.get(point.get("reporting", ""))
        if failure is not None:
            point_state, reason = failure.state, failure.reason
        elif store.is_done(StageName("evaluate", result)):
            point_state, reason = "done", None
        else:
            point_state, reason = "queued" if state == "submitted" and result in jobs else "to do", None
        point |= {"state": point_state, "error": reason, "job": jobs.get(result)}
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    folder.write({**record, "state": state, "written": now, "finished": now if state in ("done", "failed") else None})
