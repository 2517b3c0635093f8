"""Saves a dashboard in W&B as a workspace view and a report."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from src.tracking.wandb_login import WandbTarget
from sweeps.wandb.dashboard_definition import Curves, Dashboard, Images, Panel, Parallel, Scatter, Table

WIDTH, HEIGHT = 12, 9  # of a panel in a report, whose rows are 24 wide


def save(dashboard: Dashboard, best: pd.DataFrame, target: WandbTarget, known: dict[str, Any]) -> dict[str, str]:
    """Save a dashboard; return the ids of its view and report, and their addresses as `workspace` and `report`.

    known: the return value of an earlier call, whose view and report are then updated; or empty.
    """
    workspace, report = _workspace(dashboard, target), _report(dashboard, best, target)
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


def _workspace(dashboard: Dashboard, target: WandbTarget) -> Any:
    from wandb_workspaces import workspaces as ws

    colors = {run: ws.RunSettings(color=dashboard.colors[method]) for run, method in dashboard.runs.items()}
    return ws.Workspace(
        entity=str(target.entity),
        project=target.project,
        name=f"{dashboard.name} (alignment-sweep)",
        auto_generate_panels=False,
        sections=[
            ws.Section(name=section.title, is_open=True, panels=[_panel(panel) for panel in section.panels])
            for section in dashboard.sections
        ],
        settings=ws.WorkspaceSettings(x_axis="train/step", max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=_filter(dashboard), run_settings=colors, pinned_columns=["run:displayName", *_columns(dashboard)]
        ),
    )


def _report(dashboard: Dashboard, best: pd.DataFrame, target: WandbTarget) -> Any:
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.MarkdownBlock(dashboard.intro), wr.MarkdownBlock(_markdown(best))]
    for section in dashboard.sections:
        colors = {run: wr.RunSettings(color=dashboard.colors[method]) for run, method in dashboard.runs.items()}
        runs = wr.Runset(
            entity=str(target.entity),
            project=target.project,
            name=dashboard.name,
            filters=_filter(dashboard),
            run_settings=colors,
            pinned_columns=["run:displayName", *_columns(dashboard)],
        )
        panels = []
        for number, panel in enumerate(section.panels):
            built = _panel(panel)
            built.layout = wr.Layout(x=WIDTH * (number % 2), y=HEIGHT * (number // 2), w=WIDTH, h=HEIGHT)
            panels.append(built)
        blocks += [wr.H1(section.title), wr.P(section.text), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(
        entity=str(target.entity),
        project=target.project,
        title=f"Sweep {dashboard.title}"[:128],
        description="Made by `python -m sweeps.dashboard`",
        blocks=blocks,
        width="fluid",
    )


def _panel(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if isinstance(panel, Scatter):
        return wr.ScatterPlot(title=panel.title, x=_key(panel.x), y=_key(panel.y), log_x=panel.log_x or None)
    if isinstance(panel, Curves):
        return wr.LinePlot(
            title=panel.title,
            x="train/step",
            y=[panel.y],
            groupby=_key(panel.group),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            ignore_outliers=True,
        )
    if isinstance(panel, Parallel):
        columns = [
            wr.ParallelCoordinatesPlotColumn(metric=_key(key), display_name=name, log=log or None)
            for key, name, log in panel.columns
        ]
        return wr.ParallelCoordinatesPlot(title=panel.title, columns=columns)
    if isinstance(panel, Table):
        return wr.WeavePanelSummaryTable(table_name=panel.key)
    assert isinstance(panel, Images)
    return wr.MediaBrowser(title=panel.title, media_keys=list(panel.keys), num_columns=1)


def _key(key: str) -> Any:
    import wandb_workspaces.reports.v2 as wr

    kind, _, name = key.partition(":")
    return wr.Config(name) if kind == "config" else wr.SummaryMetric(name)


def _columns(dashboard: Dashboard) -> list[str]:
    """Return the columns as W&B's runs table names them: `config:method.value.name`."""
    return [re.sub(r"^(config:[^.]+)", r"\1.value", key) for key in dashboard.columns]


def _filter(dashboard: Dashboard) -> str:
    return f"Metric('Group') == {dashboard.name!r}"


def _markdown(best: pd.DataFrame) -> str:
    rows = [list(best.columns), ["---"] * len(best.columns), *best.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
