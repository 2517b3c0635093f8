"""Saves a dashboard in W&B as a workspace view and a report."""

from __future__ import annotations

import re
from typing import Any

import wandb_workspaces.reports.v2 as wr
from wandb_workspaces import workspaces as ws

from src.tracking.wandb_login import WandbTarget

WIDTH, HEIGHT = 12, 9  # of a panel in a report, whose rows are 24 wide


def save(dashboard: dict[str, Any], best: str, target: WandbTarget, known: dict[str, Any]) -> dict[str, str]:
    """Save a dashboard; return the ids of its view and report, and their addresses as `workspace` and `report`.

    dashboard: of sweeps.dashboard.define. best: the table of the best points, in Markdown. known: the return value of
    an earlier call, whose view and report are then updated; or empty.
    """
    project = {"entity": str(target.entity), "project": target.project}
    workspace, report = _workspace(dashboard, project), _report(dashboard, best, project)
    if known:
        workspace._internal_name, workspace._internal_id = known["view"], known["view_id"]
        report.id = known["report_id"]
    workspace.save()
    report.save()
    return {
        "view": workspace._internal_name,
        "view_id": workspace._internal_id,
        "workspace": workspace.url,
        "report_id": report.id,
        "report": report.url,
    }


def _workspace(dashboard: dict[str, Any], project: dict[str, str]) -> Any:
    return ws.Workspace(
        **project,
        name=f"{dashboard['name']} (alignment-sweep)",
        auto_generate_panels=False,
        sections=[
            ws.Section(name=section["title"], is_open=True, panels=[_panel(panel) for panel in section["panels"]])
            for section in dashboard["sections"]
        ],
        settings=ws.WorkspaceSettings(x_axis="train/step", max_runs=100),
        runset_settings=ws.RunsetSettings(**_runs(dashboard, ws.RunSettings)),
    )


def _report(dashboard: dict[str, Any], best: str, project: dict[str, str]) -> Any:
    blocks: list[Any] = [wr.MarkdownBlock(dashboard["intro"]), wr.MarkdownBlock(best)]
    for section in dashboard["sections"]:
        panels = [_panel(panel) for panel in section["panels"]]
        for number, panel in enumerate(panels):
            panel.layout = wr.Layout(x=WIDTH * (number % 2), y=HEIGHT * (number // 2), w=WIDTH, h=HEIGHT)
        runs = wr.Runset(**project, name=dashboard["name"], **_runs(dashboard, wr.RunSettings))
        blocks += [wr.H1(section["title"]), wr.P(section["text"]), wr.PanelGrid(runsets=[runs], panels=panels)]
    title = f"Sweep {dashboard['title']}"[:128]
    return wr.Report(
        **project, title=title, description="Made by `python -m sweeps.dashboard`", blocks=blocks, width="fluid"
    )


def _runs(dashboard: dict[str, Any], settings: type) -> dict[str, Any]:
    """Return which runs are shown, in the color of their method, and the columns of their table."""
    # W&B's table names a column of the config `config:method.value.name`.
    columns = [re.sub(r"^(config:[^.]+)", r"\1.value", key) for key in dashboard["columns"]]
    return {
        "filters": f"Metric('Group') == {dashboard['name']!r}",
        "run_settings": {run: settings(color=dashboard["colors"][method]) for run, method in dashboard["runs"].items()},
        "pinned_columns": ["run:displayName", *columns],
    }


def _panel(panel: dict[str, Any]) -> Any:
    title = panel["title"]
    match panel["kind"]:
        case "scatter":
            return wr.ScatterPlot(title=title, x=_key(panel["x"]), y=_key(panel["y"]), log_x=panel["log_x"] or None)
        case "curves":
            groups = {"groupby": _key(panel["group"]), "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
            return wr.LinePlot(title=title, x="train/step", y=[panel["y"]], ignore_outliers=True, **groups)
        case "parallel":
            columns = [
                wr.ParallelCoordinatesPlotColumn(metric=_key(key), display_name=name, log=log or None)
                for key, name, log in panel["columns"]
            ]
            return wr.ParallelCoordinatesPlot(title=title, columns=columns)
        case "table":
            return wr.WeavePanelSummaryTable(table_name=panel["key"])
        case _:
            return wr.MediaBrowser(title=title, media_keys=panel["keys"], num_columns=1)


def _key(key: str) -> Any:
    kind, _, name = key.partition(":")
    return wr.Config(name) if kind == "config" else wr.SummaryMetric(name)
