"""The runs that W&B shows of some points: one of each point, and one of each stage that points share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from src.config.schema import Point
from src.planning.stage import Stage, stages_of
from src.store.files import read_json
from src.store.store import STAGE_FILE, StageName, Store

TRACKED_FILE = "tracked.json"

# Where results do not depend on it, or it is another point's.
_NOT_CONFIG = ("beta_grid", "lr_grid", "best_from", "dry_run", "output_dir", "keep", "sweep", "tracking")


@dataclass(frozen=True)
class TrackedRun:
    id: str  # of the stage that is shared, or of the point's result when it goes to its end
    job_type: str
    name: str
    group: str | None
    tags: tuple[str, ...]
    config: dict[str, Any]
    stages: dict[str, str]  # kind -> identity of what is shown, the last to be computed last
    uses: dict[str, str] = field(default_factory=dict)  # job_type -> id of the runs it rests on


def runs_of(points: Sequence[Point]) -> list[TrackedRun]:
    """Of the points' own stages each once, what others rest on first."""
    found: dict[str, TrackedRun] = {}
    for point in points:
        stages = stages_of(point)
        uses = {}
        for stage in stages:
            if stage.role in ("sft", "reference", "baseline"):
                uses[stage.role] = stage.identity
                found.setdefault(stage.identity, _shared(stage))
        own = {stage.kind: stage.identity for stage in stages if stage.role not in uses}
        found.setdefault(own["evaluate"], _of_point(point, own, uses))
    return list(found.values())


def _shared(stage: Stage) -> TrackedRun:
    point = stage.point
    return TrackedRun(
        id=stage.identity,
        job_type=stage.role,
        name=stage.label,
        group=point.sweep.name,
        tags=(point.setup.name, point.init.name),
        config={"setup": point.setup.name, **stage.description["inputs"]},
        stages={stage.kind: stage.identity},
    )


def _of_point(point: Point, own: dict[str, str], uses: dict[str, str]) -> TrackedRun:
    whole = replace(point, trainer=replace(point.trainer, align=replace(point.trainer.align, stop_fraction=1.0)))
    return TrackedRun(
        id=own["evaluate"] if whole == point else stages_of(whole)[-1].identity,
        job_type="align",
        name=whole.label,
        group=point.sweep.name,
        tags=(point.setup.name, point.method.name, point.init.name),
        config=config_of(whole),
        stages=own,
        uses=uses,
    )


def config_of(point: Point) -> dict[str, Any]:
    """The resolved point as W&B shows it."""
    config = {name: value for name, value in asdict(point).items() if name not in _NOT_CONFIG}
    config["setup"] = point.setup.name
    config["series"] = f"{point.method.name} beta={point.beta:g}"  # what curves of training are grouped by
    return config


def from_row(row: dict[str, Any]) -> TrackedRun:
    """Of a TrackedRun as JSON has it."""
    return TrackedRun(**{**row, "tags": tuple(row["tags"])})


def of_sweep(folder: Path, store: Store) -> list[TrackedRun]:
    """Of the finished points of the sweep in this folder, those of earlier rungs included."""
    sweep = read_json(folder / "sweep.json")
    own = [identity for point in sweep["points"] for identity in (*point.get("earlier", []), point["identity"])]
    return in_store(store, own, sweep["name"])


def in_store(store: Store, results: Iterable[str], group: str | None) -> list[TrackedRun]:
    """Of finished points, by their results, and of what they rest on."""
    found: dict[str, TrackedRun] = {}
    for result in results:
        folder = store.dir(StageName("evaluate", result))
        try:
            own = from_row(read_json(folder / TRACKED_FILE))
        except FileNotFoundError:
            continue
        own = replace(own, group=group or own.group)
        for role, identity in own.uses.items():
            stage = StageName("generate" if role == "baseline" else role, identity)
            if identity not in found and store.is_done(stage):
                fields = read_json(store.dir(stage) / STAGE_FILE)["inputs"]
                found[identity] = replace(
                    own,
                    id=identity,
                    job_type=role,
                    name=role,
                    tags=own.tags[::2],
                    config=fields,
                    stages={stage.kind: identity},
                    uses={},
                )
        found[own.id] = own
    return list(found.values())
