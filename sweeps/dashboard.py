"""A W&B workspace view and report of a sweep: `python -m sweeps.dashboard DIR`.

What they show is also written beside the sweep's report: dashboard.json as data, dashboard.html as a page. With
`--local` that is all; otherwise both are saved in W&B, and a second call updates what the first has made.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from src.errors import ConfigError, StageError, report_errors
from src.store.files import atomic_write, read_json, write_json
from src.store.store import Store
from src.store.sweep_folder import SweepFolder
from src.tracking import METRICS_FILE
from src.tracking.following import logged_in, tracking_of
from src.tracking.marks import file_of
from src.tracking.session import Place
from sweeps.analysis.results import Results, collect

DEFINITION, PAGE = "dashboard.json", "dashboard.html"


def write(folder: Path) -> Any:
    """Write the definition and the page of a sweep's dashboard. Returns the dashboard. Raises ConfigError when no point
    of it is done."""
    from sweeps.wandb.dashboard_definition import define
    from sweeps.wandb.dashboard_page import page

    results = collect([SweepFolder(folder)])
    if not (results.points.state == "done").any():
        raise ConfigError(f"{folder}: no point is done yet, so there is nothing to show")
    figures = [path.stem for path in sorted(folder.glob("figures/*.png"))]
    dashboard = define(results.sweeps[0], results.points, _metrics(results), figures)
    atomic_write(folder / DEFINITION, json.dumps(dashboard.as_json(), indent=1) + "\n")
    atomic_write(folder / PAGE, page(dashboard, results, folder))
    return dashboard


def _metrics(results: Results) -> list[str]:
    """Keys that training of any point logs."""
    found: dict[str, None] = {}
    for result in results.points.identity[results.points.state == "done"]:
        file = results.artifacts(result, "align")
        if file is not None and (file / METRICS_FILE).exists():
            with (file / METRICS_FILE).open() as lines:
                found |= dict.fromkeys(f"train/{name}" for name in json.loads(next(lines, "{}")))
    return list(found)


def save(folder: Path, dashboard: Any, project: str | None, entity: str | None) -> dict[str, str]:
    """Save it in W&B. Raises ConfigError when nobody is logged in, StageError when W&B does not take it."""
    import wandb

    from sweeps.wandb import workspace

    if not logged_in():
        raise ConfigError(
            "not logged in to W&B: `wandb login`, or export WANDB_API_KEY; --local writes the files alone"
        )
    own, file = tracking_of(folder), folder / "tables" / "best.csv"
    best = pd.read_csv(file, dtype=str, keep_default_na=False) if file.exists() else pd.DataFrame()
    mark = file_of(Store(folder.absolute().parent.parent), f"dashboard-{dashboard.name}")
    try:
        place = Place(project or own.project, entity or own.entity or wandb.Api().default_entity, "online")
        known = read_json(mark) if mark.exists() else {}
        where = [place.project, place.entity]
        saved = workspace.save(dashboard, best, place, known if known.get("where") == where else {})
    except (wandb.Error, ValueError) as error:
        raise StageError(f"W&B did not take the dashboard: {error}") from error
    mark.parent.mkdir(parents=True, exist_ok=True)
    write_json(mark, {**saved, "where": where})
    return saved


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sweeps.dashboard", description=__doc__)
    parser.add_argument("dir", type=Path, help="a sweep's folder, such as outputs/sweeps/demo")
    parser.add_argument("--local", action="store_true", help="only write dashboard.json and dashboard.html")
    parser.add_argument("--project", help="W&B project; the sweep's own when not given")
    parser.add_argument("--entity", help="W&B entity; the sweep's own, or your default, when not given")
    arguments = parser.parse_args()
    with report_errors():
        SweepFolder.open(arguments.dir)
        dashboard = write(arguments.dir)
        print(f"definition: {arguments.dir / DEFINITION}\npage: {arguments.dir / PAGE}")
        if not arguments.local:
            saved = save(arguments.dir, dashboard, arguments.project, arguments.entity)
            print(f"workspace: {saved['workspace']}\nreport: {saved['report']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
