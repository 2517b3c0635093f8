"""A dashboard drawn from the store as an HTML page, which needs neither an account nor a network."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas.api.types import is_numeric_dtype

from src.planning.identity import digest
from src.store.store import METRICS_FILE
from src.store.sweep_folder import SweepFolder
from sweeps.analysis.results import Results
from sweeps.report.graphics import Drawing
from sweeps.report.plot_style import NAMES, STYLES, metric_label, style_axes, tooltip
from sweeps.report.report import TEMPLATES
from sweeps.wandb.dashboard_definition import (
    BETA,
    KL,
    LR,
    METHOD,
    QUALITY,
    Curves,
    Dashboard,
    Images,
    Panel,
    Parallel,
    Scatter,
    Table,
)

COLUMN = {METHOD: "method", BETA: "beta", LR: "lr", QUALITY: "quality", KL: "kl_sequence"}
PANEL_SIZE = (5.6, 3.6)  # inches
CURVE_BINS = 200  # points of a curve


def page(dashboard: Dashboard, results: Results, folder: SweepFolder) -> str:
    """Return a self-contained HTML page."""
    points = results.points[results.points.state == "done"]
    panels = Panels(dashboard, points, results, folder)
    sections = [
        {"title": section.title, "text": section.text, "panels": [panels.render(panel) for panel in section.panels]}
        for section in dashboard.sections
    ]
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, TEMPLATES]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("dashboard_page.html.jinja").render(dashboard=dashboard, sections=sections)


class Panels:
    """Draws the panels of one sweep."""

    def __init__(self, dashboard: Dashboard, points: pd.DataFrame, results: Results, folder: SweepFolder) -> None:
        self.dashboard, self.points, self.results, self.folder = dashboard, points, results, folder

    def render(self, panel: Panel) -> dict[str, Any]:
        """Return the kind of a panel (figure, table, images) and the variables of its template."""
        values: dict[str, Any] = {"title": panel.title, "wide": not isinstance(panel, Scatter | Curves)}
        if isinstance(panel, Table):
            file = self.folder.path / f"{panel.key}.csv"
            table = pd.read_csv(file, dtype=str, keep_default_na=False) if file.exists() else pd.DataFrame()
            return {"kind": "table", **values, **table.to_dict("split")}
        if isinstance(panel, Images):
            files = [self.folder.path / f"{key}.png" for key in panel.keys]
            images = [base64.b64encode(file.read_bytes()).decode() for file in files if file.exists()]
            return {"kind": "images", **values, "images": images}
        fig = Figure(figsize=(PANEL_SIZE[0] * (2 if values["wide"] else 1), PANEL_SIZE[1]), layout="constrained")
        drawing, ax = Drawing(digest([panel.title])[:12], panel.title, fig), fig.subplots()
        if isinstance(panel, Scatter):
            self._draw_scatter(panel, drawing, ax)
        elif isinstance(panel, Curves):
            self._draw_curves(panel, drawing, ax)
        else:
            self._draw_parallel(panel, drawing, ax)
        return {"kind": "figure", **values, "svg": drawing.inline()}

    def _draw_scatter(self, panel: Scatter, drawing: Drawing, ax: Axes) -> None:
        for row in self.points.to_dict("records"):
            style = self._style(row["method"])
            x, y = row[COLUMN[panel.x]], row[COLUMN[panel.y]]
            drawing.plot_mark(ax, x, y, tooltip(row, "quality"), markersize=5, alpha=0.85, **style)
        if panel.log_x:
            ax.set_xscale("log")
        x_name = "KL, nats per sequence" if panel.x == KL else panel.x.partition(":")[2]
        ax.set(xlabel=x_name, ylabel=metric_label(self.points))
        self._add_legend(ax, linestyle="none")

    def _draw_curves(self, panel: Curves, drawing: Drawing, ax: Axes) -> None:
        columns = ["method"] if panel.group == METHOD else ["method", "beta"]
        means: list[float] = []
        for key, rows in self.points.groupby(columns, sort=False):
            curves = [curve for i in rows.identity if (curve := self._curve(i, panel.y)) is not None]
            if not curves:
                continue
            frame, method = pd.concat(curves, axis=1), str(key[0])
            mean = frame.mean(axis=1)
            means += mean.tolist()
            label = NAMES[method] if len(key) == 1 else f"{NAMES[method]}, beta {key[1]:g}"
            gid = drawing.add_tooltip(f"{label}: {len(curves)} runs, last {mean.iloc[-1]:.4g}")
            color = self.dashboard.colors[method]
            ax.fill_between(frame.index, frame.min(axis=1), frame.max(axis=1), color=color, alpha=0.1, linewidth=0)
            ax.plot(frame.index, mean, color=color, linewidth=1.5 if len(key) == 1 else 0.9, gid=gid)
        if means:
            first, last = np.quantile(means, (0.25, 0.75))
            whisker = 1.5 * (last - first)  # values beyond are outliers, as in a box plot
            ax.set_ylim(max(min(means), first - whisker), min(max(means), last + whisker))
        ax.set(xlabel="step", ylabel=panel.y.removeprefix("train/").replace("_", " "))
        self._add_legend(ax, marker="")

    def _draw_parallel(self, panel: Parallel, drawing: Drawing, ax: Axes) -> None:
        scales = [_scale(self.points[COLUMN[key]], log) for key, _, log in panel.columns]
        for row in self.points.to_dict("records"):
            heights = [scale(row[COLUMN[key]]) for (key, _, _), (scale, _) in zip(panel.columns, scales, strict=True)]
            gid = drawing.add_tooltip(tooltip(row, "quality"))
            color = self.dashboard.colors[row["method"]]
            ax.plot(range(len(heights)), heights, color=color, alpha=0.6, linewidth=1.1, gid=gid)
        for x, (_, ticks) in enumerate(scales):
            ax.axvline(x, color="#808080", linewidth=0.8)
            offset, align = (-4, "right") if x == 0 else (4, "left")
            for label, height in ticks:
                ax.annotate(
                    label, (x, height), (offset, 0), textcoords="offset points", ha=align, va="center", fontsize=8
                )
        ax.set_xticks(range(len(panel.columns)), [name for _, name, _ in panel.columns])
        ax.set_yticks([])
        ax.set_xlim(-0.25, len(panel.columns) - 0.75)
        ax.spines[:].set_visible(False)

    def _style(self, method: str) -> dict[str, Any]:
        return {"color": self.dashboard.colors[method], "marker": STYLES[method][1]}

    def _add_legend(self, ax: Axes, **style: Any) -> None:
        for method in dict.fromkeys(self.points.method):
            ax.plot([], [], label=NAMES[method], **self._style(method) | style)
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        style_axes(ax)

    def _curve(self, identity: str, key: str) -> pd.Series | None:
        """Return a training metric of a point over its steps, averaged into at most CURVE_BINS bins."""
        folder = self.results.artifacts(identity, "align")
        rows = _metrics(folder / METRICS_FILE) if folder is not None else None
        name = key.removeprefix("train/")
        if rows is None or name not in rows:
            return None
        bin_size = max(1, -(-len(rows) // CURVE_BINS))
        curve = rows[["step", name]].groupby(np.arange(len(rows)) // bin_size).mean().set_index("step")[name]
        return curve.rename(identity)


@cache
def _metrics(file: Path) -> pd.DataFrame | None:
    return pd.DataFrame(map(json.loads, file.open())) if file.exists() else None


def _scale(values: pd.Series, log: bool) -> tuple[Callable[[Any], float], list[tuple[str, float]]]:
    """Return a function from values to heights between 0 and 1 on an axis, and the labels of its ticks with heights."""
    if not is_numeric_dtype(values):
        names = list(dict.fromkeys(values))[::-1]
        heights = {name: (i + 0.5) / len(names) for i, name in enumerate(names)}
        return heights.__getitem__, [(NAMES.get(name, name), height) for name, height in heights.items()]
    is_log = log and bool((values > 0).all())
    transform: Callable[[Any], Any] = np.log10 if is_log else float
    low, high = transform(values.min()), transform(values.max())

    def height(value: float) -> float:
        return 0.5 if high <= low else float((transform(value) - low) / (high - low))

    space = np.geomspace if is_log else np.linspace
    ticks = sorted(set(values.dropna())) if values.nunique() <= 6 else space(values.min(), values.max(), 5)
    return height, [(f"{value:.3g}", height(value)) for value in ticks]
