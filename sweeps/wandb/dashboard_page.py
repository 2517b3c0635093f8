"""A dashboard drawn from the store: what W&B shows of it, for whoever has no account or no network."""

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
SIZE = (5.6, 3.6)  # of a panel, inches
STEPS = 200  # of a curve: so many are told apart


def page(dashboard: Dashboard, results: Results, folder: SweepFolder) -> str:
    """HTML of its own. folder: of the sweep."""
    points = results.points[results.points.state == "done"]
    draw = Panels(dashboard, points, results, folder)
    sections = [
        {"title": section.title, "said": section.said, "panels": [draw.html(panel) for panel in section.panels]}
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
    def __init__(self, dashboard: Dashboard, points: pd.DataFrame, results: Results, folder: SweepFolder) -> None:
        self.dashboard, self.points, self.results, self.folder = dashboard, points, results, folder

    def html(self, panel: Panel) -> dict[str, Any]:
        """kind (figure, table, image) and what its template needs."""
        if isinstance(panel, Table):
            file = self.folder.path / f"{panel.key}.csv"
            table = pd.read_csv(file, dtype=str, keep_default_na=False) if file.exists() else pd.DataFrame()
            return {"kind": "table", "title": panel.title, "wide": True, **table.to_dict("split")}
        if isinstance(panel, Images):
            files = [self.folder.path / f"{key}.png" for key in panel.keys]
            data = [base64.b64encode(file.read_bytes()).decode() for file in files if file.exists()]
            return {"kind": "images", "title": panel.title, "wide": True, "images": data}
        drawings: dict[type, Callable[[Any], Drawing]] = {
            Scatter: self._scatter,
            Curves: self._curves,
            Parallel: self._parallel,
        }
        wide = isinstance(panel, Parallel)
        return {"kind": "figure", "title": panel.title, "wide": wide, "svg": drawings[type(panel)](panel).inline()}

    def _scatter(self, panel: Scatter) -> Drawing:
        fig = Figure(figsize=SIZE, layout="constrained")
        drawing, ax = Drawing(_stem(panel.title), panel.title, fig), fig.subplots()
        for row in self.points.to_dict("records"):
            color, marker = self._style(row["method"])
            x, y = row[COLUMN[panel.x]], row[COLUMN[panel.y]]
            drawing.plot_mark(ax, x, y, tooltip(row, "quality"), color=color, marker=marker, markersize=5, alpha=0.85)
        for method in dict.fromkeys(self.points.method):
            color, marker = self._style(method)
            ax.plot([], [], color=color, marker=marker, linestyle="none", label=NAMES[method])
        if panel.log_x:
            ax.set_xscale("log")
        ax.set(xlabel=_name(panel.x), ylabel=metric_label(self.points))
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        style_axes(ax)
        return drawing

    def _curves(self, panel: Curves) -> Drawing:
        fig = Figure(figsize=SIZE, layout="constrained")
        drawing, ax = Drawing(_stem(panel.title), panel.title, fig), fig.subplots()
        by = ["method"] if panel.group == METHOD else ["method", "beta"]
        seen: list[float] = []
        for key, rows in self.points.groupby(by, sort=False):
            curves = [curve for i in rows.identity if (curve := self._curve(i, panel.y)) is not None]
            if not curves:
                continue
            frame, method = pd.concat(curves, axis=1), str(key[0])
            mean = frame.mean(axis=1)
            seen += mean.tolist()
            label = NAMES[method] if len(key) == 1 else f"{NAMES[method]}, beta {key[1]:g}"
            color = self.dashboard.colors[method]
            ax.fill_between(frame.index, frame.min(axis=1), frame.max(axis=1), color=color, alpha=0.1, linewidth=0)
            tip = f"{label}: {len(curves)} runs, last {mean.iloc[-1]:.4g}"
            width = 1.5 if len(key) == 1 else 0.9
            ax.plot(frame.index, mean, color=color, linewidth=width, gid=drawing.add_tooltip(tip))
        first, last = np.quantile(seen, (0.25, 0.75)) if seen else (0, 1)
        reach = 1.5 * (last - first)  # what is beyond is an outlier, as in a box plot
        ax.set_ylim(max(min(seen, default=0), first - reach), min(max(seen, default=1), last + reach))
        ax.set(xlabel="step", ylabel=panel.y.removeprefix("train/").replace("_", " "))
        for method in dict.fromkeys(self.points.method):
            ax.plot([], [], color=self.dashboard.colors[method], label=NAMES[method])
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        style_axes(ax)
        return drawing

    def _style(self, method: str) -> tuple[str, str]:
        return self.dashboard.colors[method], STYLES[method][1]

    def _parallel(self, panel: Parallel) -> Drawing:
        fig = Figure(figsize=(2 * SIZE[0], SIZE[1]), layout="constrained")
        drawing, ax = Drawing(_stem(panel.title), panel.title, fig), fig.subplots()
        scales = [_scale(self.points[COLUMN[key]], log) for key, _, log in panel.columns]
        for row in self.points.to_dict("records"):
            heights = [place(row[COLUMN[key]]) for (key, _, _), (place, _) in zip(panel.columns, scales, strict=True)]
            gid = drawing.add_tooltip(tooltip(row, "quality"))
            ax.plot(
                range(len(heights)),
                heights,
                color=self.dashboard.colors[row["method"]],
                alpha=0.6,
                linewidth=1.1,
                gid=gid,
            )
        for x, (_, ticks) in enumerate(scales):
            ax.axvline(x, color="#808080", linewidth=0.8)
            for label, height in ticks:
                ends = (-4, "right") if x == 0 else (4, "left")
                where = {"xytext": (ends[0], 0), "textcoords": "offset points", "ha": ends[1], "va": "center"}
                ax.annotate(label, (x, height), fontsize=8, **where)  # type: ignore[arg-type]
        ax.set_xticks(range(len(panel.columns)), [name for _, name, _ in panel.columns])
        ax.set_yticks([])
        ax.set_xlim(-0.25, len(panel.columns) - 0.75)
        ax.spines[:].set_visible(False)
        return drawing

    def _curve(self, identity: str, key: str) -> pd.Series | None:
        file = self.results.artifacts(identity, "align")
        lines = _metrics(file / METRICS_FILE) if file is not None else None
        name = key.removeprefix("train/")
        if lines is None or name not in lines:
            return None
        part = max(1, -(-len(lines) // STEPS))
        curve = lines[["step", name]].groupby(np.arange(len(lines)) // part).mean().set_index("step")[name]
        return curve.rename(identity)


@cache
def _metrics(file: Path) -> pd.DataFrame | None:
    return pd.DataFrame(map(json.loads, file.open())) if file.exists() else None


def _scale(values: pd.Series, log: bool) -> tuple[Callable[[Any], float], list[tuple[str, float]]]:
    """Height between 0 and 1 of a value on its axis, and the axis' labels at theirs."""
    if not is_numeric_dtype(values):
        names = list(dict.fromkeys(values))[::-1]
        at = {name: (i + 0.5) / len(names) for i, name in enumerate(names)}
        return at.__getitem__, [(NAMES.get(name, name), height) for name, height in at.items()]
    shape: Callable[[Any], Any] = np.log10 if log and (values > 0).all() else lambda x: x
    low, high = float(shape(values.min())), float(shape(values.max()))

    def place(value: float) -> float:
        return 0.5 if high <= low else float((shape(value) - low) / (high - low))

    space = np.linspace if shape(10) == 10 else np.geomspace
    shown = sorted(set(values.dropna())) if values.nunique() <= 6 else space(values.min(), values.max(), 5)
    return place, [(f"{value:.3g}", place(value)) for value in shown]


def _name(key: str) -> str:
    return {KL: "KL, nats a sequence", METHOD: "method"}.get(key, key.partition(":")[2])


def _stem(title: str) -> str:
    return digest([title])[:12]
