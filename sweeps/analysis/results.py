"""The results of sweeps: their points as points.csv has them, where the artifacts are, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from src.errors import ConfigError
from src.methods import METHODS
from src.store.store import read_result
from src.store.sweep_folder import SweepFolder
from sweeps.analysis.per_prompt import PromptQuality
from sweeps.search import successive_halving
from sweeps.search.variants import disambiguating_settings

COLUMNS = [
    *("setup", "method", "kind", "init", "variant", "beta", "lr", "seed", "stop_fraction"),
    *("candidate", "state", "metric"),
    *("quality", "quality_se", "quality_selection", "quality_selection_se"),
    *("quality_reporting", "quality_reporting_se"),
    *("kl_sequence", "kl_sequence_se", "kl_token", "kl_token_se", "reward_accuracy", "reward_margin"),
    *("response_tokens", "seconds", "identity", "checkpoint", "error"),
]
NUMBERS = COLUMNS[COLUMNS.index("quality") : COLUMNS.index("identity")]


@dataclass
class Results:
    """The points of one or several sweeps with their results and costs."""

    sweeps: list[dict[str, Any]]  # sweep.json of each
    stores: list[Path]
    points: pd.DataFrame = field(default_factory=pd.DataFrame)  # COLUMNS, one row a point, done or not
    # Every stage that a result was computed from: identity -> stage, seconds, tokens, processes.
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    judges: list[dict[str, Any]] = field(default_factory=list)  # of each judged result: the judge's name and usage
    # result -> name of a benchmark -> its score by the benchmark's own rules
    scores: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    # result -> its store, and role -> identity of the stages of its point
    _stages_of: dict[str, tuple[Path, dict[str, str]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " + ".join(sweep["name"] for sweep in self.sweeps)

    @property
    def searches(self) -> list[str]:
        """One line about each sweep that was not a full grid."""
        return [line for sweep in self.sweeps if (line := successive_halving.summary(sweep))]

    @property
    def prompts(self) -> PromptQuality:
        return PromptQuality(*self.stores)

    def artifacts(self, result: str, role: str) -> Path | None:
        """Return the directory of a stage of the point with this result; None when the point has no such stage."""
        store, stages = self._stages_of[result]
        return store / ("generate" if role == "baseline" else role) / stages[role] if role in stages else None

    def uses(self) -> dict[str, int]:
        """Return for each stage the number of finished points that use it."""
        count: dict[str, int] = dict.fromkeys(self.stages, 0)
        for result in self.points.identity[self.points.state == "done"]:
            for identity in set(self._stages_of[result][1].values()):
                if identity in count:
                    count[identity] += 1
        return count

    def add_point(self, store: Path, sweep: dict[str, Any], point: dict[str, Any], settings: str) -> dict[str, Any]:
        """Add the costs of a point of sweep.json and return its row; settings: to be added to its variant."""
        self._stages_of[point["identity"]] = store, point["stages"]
        row: dict[str, Any] = {key: point.get(key) for key in COLUMNS}
        if settings:
            row["variant"] = " ".join(sorted([*(row["variant"] or "").split(), *settings.split()]))
        row["kind"] = METHODS[point["method"]].kind
        row["candidate"] = successive_halving.is_candidate(sweep, point)
        row["checkpoint"] = str(store / "align" / point["stages"]["align"])
        with suppress(FileNotFoundError):
            result = read_result(store / "evaluate" / point["identity"])
            row |= {"state": "done", "error": None} | _measurements(result, point["stages"])
            self._add_cost(result)
            self.scores[point["identity"]] = (result.get("judge") or {}).get("scores", {})
        self._add_earlier_rungs(store, point.get("earlier", []), was_promoted=row["state"] == "done")
        return row

    def _add_cost(self, result: dict[str, Any], exclude: tuple[str, ...] = ()) -> None:
        """Add the stages of a result.json, without those of some kinds, and its judge."""
        self.stages.update((stage["identity"], stage) for stage in result["stages"] if stage["stage"] not in exclude)
        if result.get("judge"):
            self.judges.append(result["judge"])

    def _add_earlier_rungs(self, store: Path, results: Sequence[str], was_promoted: bool) -> None:
        """Add the costs of a point's earlier rungs. Training counts once: a resumed run reports its total seconds."""
        for identity in results:
            is_last = identity == results[-1] and not was_promoted
            with suppress(FileNotFoundError):
                result = read_result(store / "evaluate" / identity)
                self._add_cost(result, exclude=() if is_last else ("align",))


def collect(folders: Sequence[SweepFolder]) -> Results:
    """Read sweep.json of every folder and the results of its points; a point of several sweeps is one row.

    Raises ConfigError for files of another version, and for points of several sweeps that have equal settings but
    different results.
    """
    sweeps = [folder.read() for folder in folders]
    stores = [_store_of(folder, sweep) for folder, sweep in zip(folders, sweeps, strict=True)]
    additions = disambiguating_settings([sweep["studies"] for sweep in sweeps])
    results = Results(sweeps, list(dict.fromkeys(stores)))
    rows: dict[str, dict[str, Any]] = {}
    for sweep, store, settings in zip(sweeps, stores, additions, strict=True):
        for point in sweep["points"]:
            if rows.get(point["identity"], {}).get("state") != "done":
                study = point["setup"], point["method"], point["init"]
                rows[point["identity"]] = results.add_point(store, sweep, point, settings.get(study, ""))
    frame = pd.DataFrame(list(rows.values()), columns=COLUMNS)
    if len(sweeps) > 1:
        _check_conflicts(frame[frame.candidate])
    results.points = frame.astype(dict.fromkeys(NUMBERS, float))  # also where nothing is done and all are missing
    return results


def _check_conflicts(points: pd.DataFrame) -> None:
    """Raise ConfigError for different points with equal settings, which would be averaged like seeds."""
    conflicts = points[points.duplicated(["setup", "method", "init", "variant", "beta", "lr", "seed"])]
    for row in conflicts.head(1).to_dict("records"):
        point = f"{row['method']} beta={row['beta']:g} lr={row['lr']:g} seed={row['seed']} of setup={row['setup']}"
        raise ConfigError(
            f"the sweeps contain conflicting results for {point} with identical settings (data or a model edited in "
            "place, or results of an older version); aggregate them one by one"
        )


def _store_of(folder: SweepFolder, sweep: dict[str, Any]) -> Path:
    """Return the store of a sweep: the one next to its folder, which may have moved, else the recorded one."""
    store = folder.store.root
    return store if store.is_dir() else Path(sweep["store"])


def _measurements(result: dict[str, Any], stages: dict[str, str]) -> dict[str, Any]:
    """Return the columns of points.csv that come from a result.json."""
    selection, reporting, kl = result["splits"]["selection"], result["splits"]["reporting"], result["kl"]
    unshared = {stages[kind] for kind in ("align", "generate")}  # stages that no other point uses
    return {
        "metric": result["quality"]["metric"],
        "quality": result["quality"]["value"],
        "quality_se": result["quality"]["se"],
        "quality_selection": selection["value"],
        "quality_selection_se": selection["se"],
        "quality_reporting": reporting["value"],
        "quality_reporting_se": reporting["se"],
        "kl_sequence": kl["per_sequence"]["value"],
        "kl_sequence_se": kl["per_sequence"]["se"],
        "kl_token": kl["per_token"]["value"],
        "kl_token_se": kl["per_token"]["se"],
        "reward_accuracy": result["reward_accuracy"]["value"],
        "reward_margin": result["reward_margin"]["value"],
        "response_tokens": result["response_tokens"]["value"],
        "seconds": round(sum(s["seconds"] for s in result["stages"] if s["identity"] in unshared), 3),
    }
