"""Results of sweeps -> points.csv, best.yaml, tables, figures, report.html: `python -m sweeps.aggregate DIR ...`.

A sweep is named by its folder, or where its store is not at hand by its group in W&B: `wandb://ENTITY/PROJECT/GROUP`,
which is fetched into outputs/wandb/ENTITY/PROJECT first."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from src.config.fields import choices_of
from src.config.schema import Sweep
from src.errors import report_errors
from src.store.files import atomic_write
from src.store.store import Store
from src.tracking.following import Following
from sweeps.analysis.results import collect
from sweeps.analysis.selection import chosen_points, over_seeds
from sweeps.search.record import check_sweep
from sweeps.wandb.from_wandb import SCHEME, fetch


def aggregate(
    folders: Sequence[Path], out: Path | None = None, quiet: bool = False, select: str | None = None
) -> pd.DataFrame:
    """Write what sweeps have found into `out` (the folder of the only one) and say what was best. Returns the chosen
    points.

    select: how a point of each method is chosen, `sweep.select` of the first sweep when not given.
    """
    from sweeps.analysis import reporting_split as held_out
    from sweeps.analysis.significance import pairwise_against_pointwise
    from sweeps.report import figures
    from sweeps.report.report import Found, write_report
    from sweeps.report.tables import benchmark_table, best_table, print_best, write_tables

    out = out or folders[0]
    results = collect(folders)
    points, prompts = results.points, results.prompts
    seeds = over_seeds(points[points.candidate])
    rule = select or results.sweeps[0].get("select", "best")
    best = held_out.with_intervals(chosen_points(seeds, rule, prompts), seeds, prompts)
    groups = pairwise_against_pointwise(best)
    differences, gains = held_out.differences(best, prompts), held_out.gains(seeds, best, prompts)
    table = best_table(best, differences)

    (out / "figures").mkdir(parents=True, exist_ok=True)
    points.to_csv(out / "points.csv", index=False)
    atomic_write(out / "best.yaml", best_yaml(best))
    tables = {
        "best": table,
        "pairwise_pointwise": groups,
        "differences": differences,
        "gains": gains,
        "pareto": held_out.fronts(seeds),
    }
    if len(benchmark := benchmark_table(best, results.scores)):
        tables["benchmark"] = benchmark
    write_tables(out, tables)
    graphics = [drawing.save(out / "figures") for drawing in figures.draw(seeds, best)]
    write_report(out, Found(results, rule, best, groups, differences, gains), graphics)
    if not quiet:
        print_best(results.name, out, points, table, groups, results.searches)
    return best


def tell(folder: Path) -> None:
    """W&B's run of a sweep gets what was just written, where the sweep is told to W&B as it goes."""
    with Following(Store(folder.absolute().parent.parent), folder / "logs" / "wandb.log", folder, patience=60) as wandb:
        wandb.sweep(folder, only_online=True)


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
    parser.add_argument("dir", nargs="+", help="a sweep's folder, such as outputs/sweeps/demo, or wandb://E/P/GROUP")
    parser.add_argument("--select", choices=choices_of(Sweep, "select"), help="how one point of each method is chosen")
    parser.add_argument("--out", type=Path, help="where to write; of several sweeps A and B: A+B beside A")
    arguments = parser.parse_args()
    with report_errors():
        given = [fetch(name) if name.startswith(SCHEME) else Path(name) for name in arguments.dir]
        folders = list({folder.resolve(): folder for folder in given}.values())
        for folder in folders:
            check_sweep(folder)
        out = arguments.out or folders[0].with_name("+".join(folder.name for folder in folders))
        aggregate(folders, out, select=arguments.select)
        if out == folders[0] and not arguments.dir[0].startswith(SCHEME):
            tell(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
