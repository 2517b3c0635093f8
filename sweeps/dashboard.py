"""Create a W&B workspace view and report of a sweep: `python -m sweeps.dashboard DIR`.

Their definition is also written beside the sweep's report, as dashboard.json. With `--local` that is all; otherwise
both are saved in W&B, and a second call updates them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from src.config.packages import require_package
from src.errors import ConfigError, StageError, report_errors
from src.store.files import atomic_write, read_json, write_json
from src.store.store import METRICS_FILE
from src.store.sweep_folder import SweepFolder
from src.tracking.run_list import RunList
from src.tracking.wandb_login import WandbTarget, logged_in
from sweeps.analysis.results import Results, collect

DEFINITION = "dashboard.json"


def write(folder: SweepFolder) -> Any:
    """Write the definition of a sweep's dashboard, and return it.

    Raises ConfigError when no point of the sweep is done.
    """
    from sweeps.wandb.dashboard_definition import define

    results = collect([folder])
    if not (results.points.state == "done").any():
        raise ConfigError(f"{folder.path}: no point is done yet, so there is nothing to show")
    figures = [path.stem for path in sorted(folder.figures.glob("*.png"))]
    dashboard = define(results.sweeps[0], results.points, _metrics(results), figures)
    atomic_write(folder.path / DEFINITION, json.dumps(dashboard.as_json(), indent=1) + "\n")
    return dashboard


def _metrics(results: Results) -> list[str]:
    """Return the keys of all training metrics that a point of the sweep logs."""
    names: dict[str, None] = {}
    for result in results.points.identity[results.points.state == "done"]:
        folder = results.artifacts(result, "align")
        if folder is not None and (folder / METRICS_FILE).exists():
            with (folder / METRICS_FILE).open() as lines:
                names |= dict.fromkeys(f"train/{name}" for name in json.loads(next(lines, "{}")))
    return list(names)


def save(folder: SweepFolder, dashboard: Any, project: str | None, entity: str | None) -> dict[str, str]:
    """Save the dashboard in W&B; a second call updates the view and report that the first one created.

    Raises ConfigError when nobody is logged in, StageError when W&B does not take it.
    """
    require_package("wandb_workspaces", "python -m sweeps.dashboard without --local")
    import wandb

    from sweeps.wandb import workspace

    if not logged_in():
        raise ConfigError("not logged in to W&B: `wandb login`, or export WANDB_API_KEY; --local only writes the file")
    config, table = RunList(folder.path).tracking.wandb, folder.tables / "best.csv"
    best = pd.read_csv(table, dtype=str, keep_default_na=False) if table.exists() else pd.DataFrame()
    state = folder.output_dir / "tracking" / "wandb" / f"dashboard-{dashboard.name}.json"
    try:
        target = WandbTarget(project or config.project, entity or config.entity or wandb.Api().default_entity, "online")
        known = read_json(state) if state.exists() else {}
        known = known if known.get("target") == str(target) else {}
        saved = workspace.save(dashboard, best, target, known)
    except (wandb.Error, ValueError) as error:
        raise StageError(f"W&B did not take the dashboard: {error}") from error
    state.parent.mkdir(parents=True, exist_ok=True)
    write_json(state, {**saved, "target": str(target)})
    return saved


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sweeps.dashboard", description=__doc__)
    parser.add_argument("dir", type=Path, help="a sweep's folder, such as outputs/sweeps/demo")
    parser.add_argument("--local", action="store_true", help="only write dashboard.json")
    parser.add_argument("--project", help="W&B project; the sweep's own when not given")
    parser.add_argument("--entity", help="W&B entity; the sweep's own, or your default, when not given")
    arguments = parser.parse_args()
    with report_errors():
        folder = SweepFolder.open(arguments.dir)
        dashboard = write(folder)
        print(f"definition: {arguments.dir / DEFINITION}")
        if not arguments.local:
            saved = save(folder, dashboard, arguments.project, arguments.entity)
            print(f"workspace: {saved['workspace']}\nreport: {saved['report']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
