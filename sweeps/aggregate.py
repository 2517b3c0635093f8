"""Results of a sweep -> points.csv, best.yaml, tables, figures, report.html: `python -m sweeps.aggregate DIR`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from src.checks import CHOICES
from src.methods import METHODS
from src.store import DONE, RESULT_FILE, Store, read_json, write_text
from src.train import answering
from sweeps.record import check_sweep, read_sweep
from sweeps.statistics import chosen_points

COLUMNS = [
    *("setup", "method", "kind", "init", "variant", "beta", "lr", "seed", "state", "metric"),
    *("quality", "quality_se", "quality_selection", "quality_selection_se"),
    *("quality_reporting", "quality_reporting_se"),
    *("kl_sequence", "kl_sequence_se", "kl_token", "kl_token_se", "reward_accuracy", "reward_margin"),
    *("response_tokens", "seconds", "identity", "checkpoint", "error"),
]
NUMBERS = COLUMNS[COLUMNS.index("quality") : COLUMNS.index("identity")]


def collect(folder: Path) -> pd.DataFrame:
    """points.csv as a frame: one row a point of sweep.json, done or not, in the sweep's order."""
    sweep, store, rows = read_sweep(folder), store_of(folder), []
    for point in sweep["points"]:
        row: dict[str, Any] = {key: point.get(key) for key in COLUMNS}
        row["kind"] = METHODS[point["method"]].kind
        row["checkpoint"] = str(store / "align" / point["stages"]["align"])
        stage = store / "evaluate" / point["identity"]
        if (stage / DONE).exists():
            row |= {"state": "done", "error": None} | _numbers(read_json(stage / RESULT_FILE), point["stages"])
        rows.append(row)
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return frame.astype(dict.fromkeys(NUMBERS, float))  # also where nothing is done and all are missing


def store_of(folder: Path) -> Path:
    """Where the results of a sweep's points lie. The folder may have moved together with its store: beside it first."""
    beside = folder.absolute().parent.parent / "store"
    return beside if beside.is_dir() else Path(read_sweep(folder)["store"])


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


def aggregate(folder: Path, quiet: bool = False, select: str | None = None) -> pd.DataFrame:
    """Write everything a sweep's folder holds besides sweep.json and say what was best. Returns the best rows.

    select: how a point of each method is chosen, `sweep.select` of the sweep when not given.
    """
    from sweeps import figures, held_out
    from sweeps.comparison import pairwise_against_pointwise
    from sweeps.prompts import PromptQuality
    from sweeps.report import print_best, write_report, write_tables

    points, prompts = collect(folder), PromptQuality(store_of(folder))
    rule = select or read_sweep(folder).get("select", "best")
    best = held_out.with_intervals(chosen_points(points, rule, prompts), points, prompts)
    points.to_csv(folder / "points.csv", index=False)
    write_text(folder / "best.yaml", best_yaml(best))
    groups = pairwise_against_pointwise(best)
    write_tables(
        folder,
        best,
        {
            "pairwise_pointwise": groups,
            "differences": held_out.differences(best, prompts),
            "gains": held_out.gains(points, best, prompts),
            "pareto": held_out.fronts(points),
        },
    )
    write_report(folder, points, best, groups, figures.write(folder, points, best), rule)
    if not quiet:
        print_best(folder, points, best, groups)
    return best


def chosen_anywhere(store: Store) -> set[str]:
    """Results that a sweep of this store has found best."""
    best: set[str] = set()
    for path in store.sweeps.glob("*/best.yaml"):
        for methods in (yaml.safe_load(path.read_text()) or {}).values():
            best.update(identity for entry in methods.values() for identity in entry.get("identities") or [])
    return best


def best_yaml(best: pd.DataFrame) -> str:
    """setup -> method -> {lr, beta, ...}; `best_from=FILE` makes a run take its beta and lr from it."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    names = (
        "lr",
        "beta",
        "init",
        "variant",
        "metric",
        "quality_reporting",
        "quality_reporting_se",
        "quality_reporting_low",
        "quality_reporting_high",
        "shortlist",
        "top_reporting",
        "seeds",
        "identities",
        "checkpoint",
    )
    # One entry a method: of several inits and variants the one best on the selection split.
    for row in best.sort_values("quality_selection", ascending=False, kind="stable").to_dict("records"):
        table.setdefault(row["setup"], {}).setdefault(row["method"], {name: _plain(row[name]) for name in names})
    header = "# Best hyper-parameters: chosen on the selection split, quality on the reporting split.\n"
    header += "# python -m src.train method=NAME best_from=THIS_FILE\n"
    return header + yaml.safe_dump(table, sort_keys=False)


def _plain(value: Any) -> Any:
    """YAML knows neither numpy's numbers nor a missing one."""
    value = value.item() if hasattr(value, "item") else value
    return None if value is None or value != value else value


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sweeps.aggregate", description=__doc__)
    parser.add_argument("dir", type=Path, help="a sweep's folder, such as outputs/sweeps/demo")
    parser.add_argument("--select", choices=CHOICES["sweep.select"], help="how one point of each method is chosen")
    arguments = parser.parse_args()
    with answering():
        check_sweep(arguments.dir)
        aggregate(arguments.dir, select=arguments.select)
    return 0


if __name__ == "__main__":
    sys.exit(main())
