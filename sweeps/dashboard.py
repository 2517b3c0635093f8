"""Create a W&B workspace view and report of a sweep: `python -m sweeps.dashboard DIR`.

Their definition is also written beside the sweep's report, as dashboard.json. With `--local` that is all; otherwise
both are saved in W&B, and a second call updates them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from string import Template
from typing import Any

import yaml

from src.config.packages import require_package
from src.errors import ConfigError, StageError, report_errors
from src.methods import METHODS
from src.store.files import read_json, write_json
from src.store.sweep_folder import SweepFolder
from src.tracking.runs import RunList
from src.tracking.wandb_login import WandbTarget, logged_in
from sweeps.analysis.results import Results, collect
from sweeps.arguments import ArgumentParser
from sweeps.report.plot_style import COLORS, NAMES, metric_label

TEMPLATE = Path(__file__).parent / "wandb" / "dashboard.yaml"
DEFINITION = "dashboard.json"
SCHEMA = 1  # of dashboard.json
# In W&B methods differ by color alone, so no two of the first twelve share one.
PALETTE = (*COLORS, "#882255", "#999933", "#332288", "#44AA99", "#AA4499", "#7F7F7F")


def write(folder: SweepFolder) -> dict[str, Any]:
    """Write the definition of a sweep's dashboard, and return it.

    Raises ConfigError when no point of the sweep is done.
    """
    results = collect([folder])
    if not (results.points.state == "done").any():
        raise ConfigError(f"{folder.path}: no point is done yet, so there is nothing to show")
    dashboard = define(results, [f"figures/{path.stem}" for path in sorted(folder.figures.glob("*.png"))])
    write_json(folder.path / DEFINITION, dashboard)
    return dashboard


def define(results: Results, figures: list[str]) -> dict[str, Any]:
    """Return the dashboard of a sweep with a finished point. figures: keys of what the aggregation run logged."""
    sweep, points = results.sweeps[0], results.points
    done = points[points.state == "done"]
    template = yaml.safe_load(Template(TEMPLATE.read_text(encoding="utf-8")).substitute(metric=metric_label(done)))
    if figures:
        panel = {"kind": "images", "title": "Figures of the report", "keys": figures}
        template["sections"].append({"title": "Figures", "text": "The figures of report.html.", "panels": [panel]})
    methods, setups = dict.fromkeys(points.method), ", ".join(dict.fromkeys(points.setup))
    return {
        "schema": SCHEMA,
        "name": sweep["name"],  # group of the runs
        "title": f"{sweep['name']}: {', '.join(NAMES[method] for method in methods)}",
        "intro": f"{len(done)} of {len(points)} points done; {setups}. `{sweep['command']}`",
        "colors": {method: PALETTE[list(METHODS).index(method) % len(PALETTE)] for method in methods},
        "runs": dict(zip(points.identity, points.method, strict=True)),
        **template,
    }


def save(folder: SweepFolder, dashboard: dict[str, Any], project: str | None, entity: str | None) -> dict[str, str]:
    """Save the dashboard in W&B; a second call updates the view and report that the first one created.

    Raises ConfigError when nobody is logged in, StageError when W&B does not take it.
    """
    require_package("wandb_workspaces", "python -m sweeps.dashboard without --local")
    import wandb

    from sweeps.wandb import workspace

    if not logged_in():
        raise ConfigError("not logged in to W&B: `wandb login`, or export WANDB_API_KEY; --local only writes the file")
    config, table = RunList(folder.path).tracking.wandb, folder.tables / "best.md"
    state = folder.output_dir / "tracking" / "wandb" / f"dashboard-{dashboard['name']}.json"
    try:
        target = WandbTarget(project or config.project, entity or config.entity or wandb.Api().default_entity, "online")
        known = read_json(state) if state.exists() else {}
        known = known if known.get("target") == str(target) else {}
        saved = workspace.save(dashboard, table.read_text(encoding="utf-8") if table.exists() else "", target, known)
    except (wandb.Error, ValueError) as error:
        raise StageError(f"W&B did not take the dashboard: {error}") from error
    state.parent.mkdir(parents=True, exist_ok=True)
    write_json(state, {**saved, "target": str(target)})
    return saved


def main() -> int:
    parser = ArgumentParser(prog="python -m sweeps.dashboard", description=__doc__)
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
