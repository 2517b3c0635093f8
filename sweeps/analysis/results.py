"""What sweeps have found: their points as points.csv has them, where the artifacts lie, what it all took."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from src.errors import ConfigError
from src.methods import METHODS
from src.store.store import RESULT_FILE
from sweeps.analysis.per_prompt import PromptQuality
from sweeps.search import successive_halving as halving
from sweeps.search.record import read_sweep
from sweeps.search.variants import telling_apart

COLUMNS = [
    *("setup", "method", "kind", "init", "variant", "beta", "lr", "seed", "stop"),
    *("candidate", "state", "metric"),
    *("quality", "quality_se", "quality_selection", "quality_selection_se"),
    *("quality_reporting", "quality_reporting_se"),
    *("kl_sequence", "kl_sequence_se", "kl_token", "kl_token_se", "reward_accuracy", "reward_margin"),
    *("response_tokens", "seconds", "identity", "checkpoint", "error"),
]
NUMBERS = COLUMNS[COLUMNS.index("quality") : COLUMNS.index("identity")]


@dataclass
class Results:
    sweeps: list[dict[str, Any]]  # sweep.json of each
    stores: list[Path]
    points: pd.DataFrame  # COLUMNS, one row a point, done or not, in the sweeps' order
    stages: dict[str, dict[str, Any]]  # identity -> stage, seconds, tokens, processes: all that results rest on
    judges: list[dict[str, Any]]  # of each result that a judge had a part in: its name and what it took
    scores: dict[str, dict[str, dict[str, float]]]  # result -> name -> what a benchmark says of it by its own rules
    _where: dict[str, tuple[Path, dict[str, str]]]  # result -> its store, role -> identity of the point's stages

    @property
    def name(self) -> str:
        return " + ".join(sweep["name"] for sweep in self.sweeps)

    @property
    def searches(self) -> list[str]:
        """What is said of each sweep that was no full grid."""
        return [line for sweep in self.sweeps if (line := halving.line(sweep))]

    @property
    def prompts(self) -> PromptQuality:
        return PromptQuality(*self.stores)

    def add_cost(self, result: dict[str, Any], but: tuple[str, ...] = ()) -> None:
        """Of a result.json: its stages, without those of some kinds, and its judge."""
        self.stages.update((stage["identity"], stage) for stage in result["stages"] if stage["stage"] not in but)
        if result.get("judge"):
            self.judges.append(result["judge"])

    def add_earlier(self, store: Path, results: Sequence[str], went_on: bool) -> None:
        """What a point's earlier rungs took. Training is counted in the last that is done: its seconds add up there."""
        for identity in results:
            counted = identity == results[-1] and not went_on
            with suppress(FileNotFoundError):
                result = json.loads((store / "evaluate" / identity / RESULT_FILE).read_bytes())
                self.add_cost(result, but=() if counted else ("align",))

    def artifacts(self, result: str, role: str) -> Path | None:
        """Where that stage of the point with this result lies; None when the point has no such stage."""
        store, own = self._where[result]
        return store / ("generate" if role == "baseline" else role) / own[role] if role in own else None

    def uses(self) -> dict[str, int]:
        """How many finished points rest on each stage."""
        count: dict[str, int] = dict.fromkeys(self.stages, 0)
        for result in self.points.identity[self.points.state == "done"]:
            for identity in set(self._where[result][1].values()):
                if identity in count:
                    count[identity] += 1
        return count


def collect(folders: Sequence[Path]) -> Results:
    """Read sweep.json of every folder and the results of its points; a point that several sweeps name is one."""
    sweeps = [read_sweep(folder) for folder in folders]
    stores = [_store_of(folder, sweep) for folder, sweep in zip(folders, sweeps, strict=True)]
    apart = telling_apart([sweep.get("studies", []) for sweep in sweeps])
    found = Results(sweeps, list(dict.fromkeys(stores)), pd.DataFrame(), {}, [], {}, {})
    rows: dict[str, dict[str, Any]] = {}
    for sweep, store, more in zip(sweeps, stores, apart, strict=True):
        for point in sweep["points"]:
            if rows.get(point["identity"], {}).get("state") == "done":
                continue
            found._where[point["identity"]] = store, point["stages"]
            row: dict[str, Any] = {key: point.get(key) for key in COLUMNS}
            if said := more.get(_study(point), ""):
                row["variant"] = " ".join(sorted([*(row["variant"] or "").split(), *said.split()]))
            row["kind"] = METHODS[point["method"]].kind
            row |= {"stop": point.get("stop", 1.0), "candidate": halving.is_candidate(sweep, point)}
            row["checkpoint"] = str(store / "align" / point["stages"]["align"])
            try:
                result = json.loads((store / "evaluate" / point["identity"] / RESULT_FILE).read_bytes())
            except FileNotFoundError:
                pass
            else:
                row |= {"state": "done", "error": None} | _numbers(result, point["stages"])
                found.add_cost(result)
                found.scores[point["identity"]] = (result.get("judge") or {}).get("scores", {})
            found.add_earlier(store, point.get("earlier", []), went_on=row["state"] == "done")
            rows[point["identity"]] = row
    frame = pd.DataFrame(list(rows.values()), columns=COLUMNS)
    if len(sweeps) > 1:
        _check_apart(frame[frame.candidate])
    found.points = frame.astype(dict.fromkeys(NUMBERS, float))  # also where nothing is done and all are missing
    return found


def _check_apart(points: pd.DataFrame) -> None:
    """Raises ConfigError when sweeps have different points that their settings do not tell apart: averaging them like
    seeds would be wrong."""
    double = points[points.duplicated(["setup", "method", "init", "variant", "beta", "lr", "seed"])]
    for row in double.head(1).to_dict("records"):
        where = f"{row['method']} beta={row['beta']:g} lr={row['lr']:g} seed={row['seed']} of setup={row['setup']}"
        raise ConfigError(
            f"these sweeps have different points {where} that no setting tells apart (data or a model edited in place, "
            "or results of an earlier version); aggregate them one by one"
        )


def _study(point: dict[str, Any]) -> tuple[str, str, str]:
    return point["setup"], point["method"], point["init"]


def _store_of(folder: Path, sweep: dict[str, Any]) -> Path:
    """Where the results of a sweep's points lie. The folder may have moved together with its store: beside it first."""
    beside = folder.absolute().parent.parent / "store"
    return beside if beside.is_dir() else Path(sweep["store"])


def _numbers(result: dict[str, Any], stages: dict[str, str]) -> dict[str, Any]:
    selection, reporting, kl = result["splits"]["selection"], result["splits"]["reporting"], result["kl"]
    own = {stages[kind] for kind in ("align", "generate")}
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
        # What this point alone cost; shared stages are nobody's in particular.
        "seconds": round(sum(s["seconds"] for s in result["stages"] if s["identity"] in own), 3),
    }
