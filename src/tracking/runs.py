"""Which runs trackers show: one per point, and one per stage that points share (sft, reference, baseline)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.store.files import read_json
from src.store.store import METRICS_FILE, RUN_CONFIG_FILE, STAGE_FILE, StageName, Store
from src.tracking.sink import RunMetadata

SHARED_ROLES = ("sft", "reference", "baseline")

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
        config, stage = read_json(folder / RUN_CONFIG_FILE), read_json(folder / STAGE_FILE)
        setup, init = config["setup"]["name"], config["init"]["name"]
        group = self.group or config["sweep"]["name"]
        if self.job_type in SHARED_ROLES:
            config = {"setup": setup, **stage["inputs"]}
            return RunMetadata(self.id, self.job_type, self.name, group, (setup, init), config)
        shown = {key: value for key, value in config.items() if key not in _NOT_CONFIG}
        method, beta = config["method"]["name"], config["beta"]
        # Training curves of several learning rates and seeds are grouped by their series.
        shown |= {"setup": setup, "series": f"{method} beta={beta:g}", "upstream_runs": self.upstream_runs}
        tags = (setup, method, init)
        return RunMetadata(self.id, self.job_type, self.name, group, tags, shown, self.upstream_runs)


def runs_of_points(points: Iterable[dict[str, Any]], group: str | None) -> list[TrackedRun]:
    """Return the runs of points as sweep.json lists them, upstream runs before those that use them."""
    runs: dict[str, TrackedRun] = {}
    for point in points:
        upstream = {role: point["stages"][role] for role in SHARED_ROLES if role in point["stages"]}
        for role, identity in upstream.items():
            kind = "generate" if role == "baseline" else role
            runs.setdefault(identity, TrackedRun(identity, role, f"{point['setup']} {role}", group, {kind: identity}))
        run = point.get("full_result", point["identity"])
        # The label of a rung before the last ends with `to 50 %`; the run continues in the next rung.
        name = point["label"] if run == point["identity"] else point["label"].rpartition(" to ")[0]
        stages = {kind: identity for kind, identity in point["stages"].items() if kind not in SHARED_ROLES}
        earlier = tuple(point.get("earlier", ()))
        runs.setdefault(run, TrackedRun(run, "align", name, group, stages, upstream, earlier))
    return list(runs.values())
