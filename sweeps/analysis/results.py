"""The results of sweeps: their points as points.csv has them, quality per prompt, artifacts, and costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pandas as pd

from src.errors import ConfigError, DamagedFile, warn
from src.methods import METHODS
from src.store.files import read_bytes
from src.store.integrity import find_damage
from src.store.store import (
    QUALITY_FILE,
    RESULT_FILE,
    RESULT_FILES,
    RESULT_SCHEMA,
    kind_of,
    read_result,
)
from src.store.sweep_folder import SweepFolder, with_reporting
from sweeps.analysis.conflicts import check_conflicts
from sweeps.search import successive_halving
from sweeps.search.variants import disambiguating_settings, variant_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLUMNS = [
    *("setup", "method", "kind", "init", "variant", "beta", "lr", "seed", "stop_fraction"),
    *("candidate", "state", "metric"),
    *("quality", "quality_se", "quality_selection", "quality_selection_se"),
    *("quality_reporting", "quality_reporting_se"),
    *("kl_sequence", "kl_sequence_se", "kl_token", "kl_token_se"),  # mean log-ratio
    *("kl_sequence_rb", "kl_sequence_rb_se", "kl_token_rb", "kl_token_rb_se"),
    *("reward_accuracy", "reward_margin", "sft_validation_loss", "sft_validation_loss_se"),
    *("capability", "capability_se", "capability_change", "capability_change_se"),  # means over the tasks
    *("response_tokens", "seconds", "identity", "checkpoint", "error"),
]
OF_JUDGE = ": "  # between the name of a further judge and that of its score of a benchmark
NUMBERS = COLUMNS[COLUMNS.index("quality") : COLUMNS.index("identity")]


class PromptQuality:
    """Quality of each prompt in the results of some stores; files are read on demand."""

    def __init__(self, *stores: Path) -> None:
        self.stores = stores

    def selection(self, groups: Sequence[Sequence[str]]) -> NDArray[np.float64]:
        """Return (groups, prompts): quality on the selection prompts that all results have, averaged over each group.

        groups: identities of results, one group per row (the seeds of a point). All rows have the same prompt order.
        """
        return self._quality(groups, selection=True)

    def reporting(self, groups: Sequence[Sequence[str]]) -> NDArray[np.float64]:
        """Return the same for the reporting prompts."""
        return self._quality(groups, selection=False)

    def _quality(self, groups: Sequence[Sequence[str]], selection: bool) -> NDArray[np.float64]:
        tables = [[self._read(identity, selection) for identity in group] for group in groups]
        if not tables:
            return np.empty((0, 0))
        first = tables[0][0][0]
        if all(prompts == first for table in tables for prompts, _ in table):  # the usual case: no prompt was dropped
            return np.array([np.mean([values for _, values in table], axis=0) for table in tables])
        by_prompt = [[dict(zip(prompts, values, strict=True)) for prompts, values in table] for table in tables]
        common = sorted(set.intersection(*(set(values) for table in by_prompt for values in table)))
        return np.array([np.mean([[values[i] for i in common] for values in table], axis=0) for table in by_prompt])

    def _read(self, identity: str, selection: bool) -> tuple[list[int], list[float]]:
        """Return the prompts of one split and the quality of each."""
        for store in self.stores:
            folder = store / "evaluate" / identity
            if (folder / QUALITY_FILE).exists():
                quality = read_quality(folder)
                mask = quality["selection"] if selection else [not selects for selects in quality["selection"]]
                return list(compress(quality["prompts"], mask)), list(compress(quality["values"], mask))
        raise DamagedFile(f"{folder / QUALITY_FILE}: missing; run the sweep again")


def read_quality(folder: Path) -> dict[str, list[Any]]:
    """Read quality.json of an evaluate stage: `prompts`, `values` and `selection`, of equal lengths.

    Raises DamagedFile, also when it is missing.
    """
    path = folder / QUALITY_FILE
    try:
        quality = orjson.loads(read_bytes(path))  # fast: a sweep may have ten thousand of these files
        prompts, values, selection = (quality[name] for name in ("prompts", "values", "selection"))
        is_whole = len(prompts) == len(values) == len(selection) and quality["schema"] == RESULT_SCHEMA
        is_whole &= {*map(type, prompts)} <= {int} and {*map(type, selection)} <= {bool}
        is_whole &= {*map(type, values)} <= {int, float}
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read ({error.strerror})") from error
    except (KeyError, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise DamagedFile(f"{path}: damaged or of another version, the quality of each prompt is missing")
    return quality


@dataclass
class Results:
    """The points of one or several sweeps with their results and costs."""

    sweeps: list[dict[str, Any]]  # sweep.json of each
    stores: list[Path]
    points: pd.DataFrame = field(default_factory=pd.DataFrame)  # COLUMNS, one row a point, done or not
    # Every stage that a result was computed from: identity -> stage, seconds, tokens, processes.
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    usages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # of all judges, by name
    # What was seen where judges were asked twice: name, setup, init and variant of the point, and counts.
    repeated: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    # result -> the settings that its variant is made of; none of a sweep before version 0.3
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # result -> benchmark's score -> value
    # result -> table of a mixture, or part of a benchmark -> its measurements
    sources: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    finished: dict[str, float] = field(default_factory=dict)  # result -> share of the responses that end
    damaged: dict[str, str] = field(default_factory=dict)  # results of points that cannot be read -> why
    temporary: Path | None = None  # the folder of unpacked studies, which is deleted once the results are written
    _judging: set[str] = field(default_factory=set)  # stages of further judges whose usage is among `usages`
    # result -> its store, and role -> identity of the stages of its point
    _stages_of: dict[str, tuple[Path, dict[str, str]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " + ".join(sweep["name"] for sweep in self.sweeps)

    @property
    def failed(self) -> list[dict[Hashable, Any]]:
        """The rows of the points without a result, and why."""
        return self.points[self.points.state != "done"].fillna({"error": "not run"}).to_dict("records")

    @property
    def searches(self) -> list[str]:
        """One line about each sweep that was not a full grid."""
        return [line for sweep in self.sweeps if (line := successive_halving.summary(sweep))]

    @property
    def num_unreported(self) -> int:
        """The number of finished points whose reporting prompts have not been judged."""
        return int((self.points.quality_selection.notna() & self.points.quality_reporting.isna()).sum())

    def without_temporary(self, points: pd.DataFrame) -> pd.DataFrame:
        """Return rows of points without the checkpoints in the folder that will not be there: a study has none."""
        if self.temporary is None:
            return points
        is_temporary = [Path(path).is_relative_to(self.temporary) for path in points.checkpoint]
        return points.assign(checkpoint=points.checkpoint.mask(pd.Series(is_temporary, points.index, dtype=bool)))

    @property
    def prompts(self) -> PromptQuality:
        return PromptQuality(*self.stores)

    def artifacts(self, result: str, role: str) -> Path | None:
        """Return the directory of a stage of the point with this result; None when the point has no such stage."""
        store, stages = self._stages_of[result]
        return store / kind_of(role) / stages[role] if role in stages else None

    def identity_of(self, result: str, role: str) -> str | None:
        """Return the identity of a stage of the point with this result; None when the point has no such stage."""
        return self._stages_of[result][1].get(role)

    def stages_of(self, result: str) -> dict[str, str]:
        """Return role -> identity of the stages of the point with this result."""
        return self._stages_of[result][1]

    def uses(self) -> Counter[str]:
        """Count for each stage the finished points that use it."""
        done = self.points.identity[self.points.state == "done"]
        return Counter(identity for result in done for identity in set(self._stages_of[result][1].values()))

    def add_point(
        self, store: Path, sweep: dict[str, Any], point: dict[str, Any], settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Add the costs of a point of sweep.json and return its row; settings: to be added to its variant."""
        point = with_reporting(point, lambda result: _is_whole(store / "evaluate" / result))
        self._stages_of[point["identity"]] = store, point["stages"]
        row: dict[str, Any] = {key: point.get(key) for key in COLUMNS}
        if "settings" in point:
            self.settings[point["identity"]] = point["settings"] | settings
            row["variant"] = variant_text(self.settings[point["identity"]])
        elif settings:
            row["variant"] = " ".join(sorted([*(row["variant"] or "").split(), variant_text(settings)]))
        row["kind"] = METHODS[point["method"]].kind
        row["candidate"] = successive_halving.is_candidate(sweep, point)
        row["checkpoint"] = str(store / "align" / point["stages"]["align"])
        results = {}  # of the point, in the rungs that it has finished
        for identity in (*point.get("earlier", []), point["identity"]):
            folder = store / "evaluate" / identity
            try:
                if (folder / RESULT_FILE).exists():
                    if damage := find_damage(folder, identity, names=RESULT_FILES):
                        raise DamagedFile(damage)
                    results[identity] = read_result(folder)
                    read_quality(folder)
            except ConfigError as error:
                results.pop(identity, None)
                if identity == point["identity"]:
                    self.damaged[identity] = str(error)
                else:
                    warn(f"{error}; its cost is not counted")
        group = row["setup"], row["init"], row["variant"]
        for number, result in enumerate(results.values(), 1):
            # Training counts once: a resumed run reports its total seconds.
            exclude = () if number == len(results) else ("align",)
            self.stages.update((s["identity"], s) for s in result["stages"] if s["stage"] not in exclude)
            usages = [(result["judge"]["name"], result["judge"])] if result.get("judge") else []
            # One stage of a further judge may be upstream of several results.
            others = {one["stage"]: (name, one["usage"]) for name, one in result.get("judges", {}).items()}
            usages += [usage for stage, usage in others.items() if stage not in self._judging]
            self._judging.update(others)
            self.usages += usages
            self.repeated += [(name, group, usage["repeated"]) for name, usage in usages if "repeated" in usage]
        if (reason := self.damaged.get(point["identity"])) is not None:
            row |= {"state": "failed", "error": reason}
        elif point["identity"] not in results and row["state"] == "done":
            row["state"] = "to do"
            label = f"{point['method']} beta={point['beta']:g} lr={point['lr']:g}"
            warn(f"{label}: its result was deleted; the tables are without it, run the sweep again to remake it")
        if (final := results.get(point["identity"])) is not None:
            row |= {"state": "done", "error": None} | _measurements(final, point["stages"])
            scores = (final.get("judge") or {}).get("scores", {})
            for name, other in final.get("judges", {}).items():
                scores = scores | {
                    f"{name}{OF_JUDGE}{score}": value for score, value in other["usage"]["scores"].items()
                }
            self.scores[point["identity"]] = scores
            self.sources[point["identity"]] = final.get("sources", {})
            self.finished[point["identity"]] = final.get("finished", np.nan)
        # A name typed in another encoding has surrogates, which pandas and files in UTF-8 cannot have.
        return {k: v.encode(errors="replace").decode() if isinstance(v, str) else v for k, v in row.items()}


def collect(folders: Sequence[SweepFolder]) -> Results:
    """Read sweep.json of every folder and the results of its points; a point of several sweeps is one row.

    Raises ConfigError for files of another version, and for points of several sweeps that have equal settings but
    different results.
    """
    sweeps = [folder.read() for folder in folders]
    stores = [folder.results_root(sweep) for folder, sweep in zip(folders, sweeps, strict=True)]
    additions = disambiguating_settings([sweep["studies"] for sweep in sweeps])
    results = Results(sweeps, list(dict.fromkeys(stores)))
    rows: dict[str, dict[str, Any]] = {}
    for sweep, store, settings in zip(sweeps, stores, additions, strict=True):
        for point in sweep["points"]:
            if rows.get(point["identity"], {}).get("state") != "done":
                study = point["setup"], point["method"], point["init"]
                rows[point["identity"]] = results.add_point(store, sweep, point, settings.get(study, {}))
    frame = pd.DataFrame(list(rows.values()), columns=COLUMNS)
    if len(sweeps) > 1:
        check_conflicts(frame[frame.candidate], results.stages_of)
    results.points = frame.astype(dict.fromkeys(NUMBERS, float))  # also where nothing is done and all are missing
    return results


def _is_whole(folder: Path) -> bool:
    return (folder / RESULT_FILE).exists() and find_damage(folder, folder.name, names=RESULT_FILES) is None


def _metric_name(quality: dict[str, Any]) -> str:
    """Return the metric, with how many samples of each prompt it is the mean of where there are several."""
    count = quality.get("samples_per_prompt", 1)
    return quality["metric"] if count == 1 else f"{quality['metric']} (avg@{count})"


def _measurements(result: dict[str, Any], stages: dict[str, str]) -> dict[str, Any]:
    """Return the columns of points.csv that come from a result.json."""
    unknown = {"value": None, "se": None}  # results of version 0.2 have none of these
    with_errors = {
        "quality": result["quality"],
        "quality_selection": result["splits"]["selection"],
        "quality_reporting": result["splits"]["reporting"],
        "kl_sequence": result["kl"]["per_sequence"],
        "kl_token": result["kl"]["per_token"],
        "kl_sequence_rb": result["kl"].get("per_sequence_rb", unknown),
        "kl_token_rb": result["kl"].get("per_token_rb", unknown),
        "sft_validation_loss": result.get("sft_validation_loss", unknown),
        "capability": result.get("capability", unknown),
        "capability_change": result.get("capability", {}).get("change", unknown),
    }
    unshared = {stages[kind] for kind in ("align", "generate")}  # stages that no other point uses
    return {
        "metric": _metric_name(result["quality"]),
        **{name: measured["value"] for name, measured in with_errors.items()},
        **{f"{name}_se": measured["se"] for name, measured in with_errors.items()},
        **{name: result[name]["value"] for name in ("reward_accuracy", "reward_margin", "response_tokens")},
        "seconds": round(sum(s["seconds"] for s in result["stages"] if s["identity"] in unshared), 3),
    }
