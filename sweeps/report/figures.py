"""The figures of a sweep: quality over beta, quality over KL with its Pareto fronts, lr x beta, training curves."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from src.methods import METHODS
from src.planning.identity import digest
from src.store.store import METRICS_FILE
from sweeps.analysis.selection import GROUP, best_lr_per_beta
from sweeps.analysis.significance import on_pareto_front
from sweeps.report.graphics import Drawing
from sweeps.report.plot_style import KINDS, NAMES, STYLES, Z95, metric_label, style_axes, tooltip
from sweeps.report.side_by_side import side_by_side

MAX_TICKS = 12  # on either axis of a heat map; with more values only some are labeled
MAX_NUMBERS = 60  # cells of a heat map that show their value; more would not fit
MAX_STEM = 150  # characters of a file name
CURVE_BINS = 200  # points of a training curve
SMOOTHING = 10  # a training curve is the running mean over 1 / SMOOTHING of its points


def draw(averages: pd.DataFrame, best: pd.DataFrame) -> Iterator[Drawing]:
    """Yield every figure of every setup, init and variant. averages: of average_seeds; best: of with_intervals."""
    best_lrs = best_lr_per_beta(averages)
    for setup, rows in best.groupby("setup", sort=False):
        if len(rows[GROUP].drop_duplicates()) > 1:
            yield side_by_side(str(setup), rows)
    for key, rows in best_lrs.groupby(GROUP, sort=False, dropna=False):
        setup, init, variant = map(str, key)
        parts = [setup, *([] if init == "sft" else [init]), *([variant] if variant else [])]
        stem, name = "_".join(re.sub(r"[^\w.=-]+", "_", part) for part in parts), ", ".join(parts)
        if len(stem) > MAX_STEM:  # several may start with the same characters
            stem = f"{stem[:MAX_STEM]}_{digest(parts)[:8]}"
        selected = best[(best[GROUP] == list(key)).all(axis=1)]
        yield quality_over_beta(stem, name, rows, selected)
        yield quality_over_kl(stem, name, rows, selected)
        grid = averages[(averages[GROUP] == list(key)).all(axis=1)]
        if grid.groupby("method").lr.nunique().max() > 1:
            yield heat_map(stem, name, grid, selected)
        if curves := _training_curves(selected):
            yield training(stem, name, curves)


def quality_over_beta(stem: str, name: str, rows: pd.DataFrame, best: pd.DataFrame) -> Drawing:
    """Draw one panel per method, since each has its own range of beta; all panels share the quality axis."""
    title = f"{name}: {metric_label(rows)} over beta, each at its best lr (ring: selected on the selection split)"
    fig, panels = _panels(rows, 2.7)
    drawing = Drawing(f"{stem}_quality_over_beta", title, fig)
    for method, ax in panels.items():
        line = rows[rows.method == method]
        _plot_line(drawing, ax, line, best, method, "beta")
        _set_log_x_axis(ax, line.beta)
        ax.set_title(NAMES[method])
        ax.set_xlabel("beta")
    _label_rows(panels, _quality_label(rows))
    return drawing


def quality_over_kl(stem: str, name: str, rows: pd.DataFrame, best: pd.DataFrame) -> Drawing:
    """Draw pairwise and pointwise methods in one panel each, with the Pareto front of the kind."""
    title = f"{name}: {metric_label(rows)} over KL, one point per beta (dashed: Pareto front; ring: selected)"
    kinds = [kind for kind in KINDS if kind in set(rows.kind)]
    fig = Figure(figsize=(max(7.5, 5.2 * len(kinds)), 4.4), layout="constrained")
    drawing = Drawing(f"{stem}_quality_over_kl", title, fig)
    grid = fig.subplots(1, len(kinds), sharey=True, sharex=True, squeeze=False)
    for ax, kind in zip(grid[0], kinds, strict=True):
        of_kind = rows[rows.kind == kind].sort_values("kl_sequence")
        front = of_kind[on_pareto_front(of_kind.quality_reporting.tolist(), of_kind.kl_sequence.tolist())]
        front = front[front.kl_sequence > 0]
        ax.plot(
            front.kl_sequence, front.quality_reporting, "--", color="#808080", linewidth=1.6, drawstyle="steps-post"
        )
        for method, line in of_kind.sort_values("beta").groupby("method", sort=False):
            _plot_line(drawing, ax, line, best, str(method), "kl_sequence")
        _set_log_x_axis(ax, rows.kl_sequence)
        ax.set_title(kind)
        ax.set_xlabel("KL(policy || initial policy), nats per sequence")
        ax.legend(frameon=False, loc="lower right")
    grid[0][0].set_ylabel(_quality_label(rows))
    return drawing


def heat_map(stem: str, name: str, rows: pd.DataFrame, best: pd.DataFrame) -> Drawing:
    """Draw the selection metric over (beta, lr), one panel per method."""
    title = f"{name}: {metric_label(rows)} on the selection split (frame: selected)"
    fig, panels = _panels(rows, 2.9, share=False)
    drawing = Drawing(f"{stem}_lr_and_beta", title, fig)
    values = rows.quality_selection
    norm = Normalize(values.min(), values.max())
    has_tooltips = len(rows) <= 10 * MAX_NUMBERS  # one SVG element per cell; an image for larger grids
    for method, ax in panels.items():
        selected = best[best.method == method]
        frames = set(zip(selected.beta, selected.lr, strict=True))
        _plot_heat_map(drawing, ax, rows[rows.method == method], frames, norm, has_tooltips)
        ax.set_title(NAMES[method])
    _label_rows(panels, "lr")
    return drawing


def _plot_heat_map(
    drawing: Drawing, ax: Axes, rows: pd.DataFrame, frames: set[tuple[float, float]], norm: Normalize, tooltips: bool
) -> None:
    """Plot the cells of one method; frames: (beta, lr) of the selected points."""
    betas, lrs, cmap = sorted(rows.beta.unique()), sorted(rows.lr.unique()), matplotlib.colormaps["cividis"]
    if not tooltips:
        table = rows.pivot(index="lr", columns="beta", values="quality_selection")
        ax.imshow(table, cmap=cmap, norm=norm, aspect="auto", origin="lower", interpolation="nearest")
    for row in rows.to_dict("records"):
        x, y, value = betas.index(row["beta"]), lrs.index(row["lr"]), row["quality_selection"]
        is_selected = (row["beta"], row["lr"]) in frames
        if tooltips or is_selected:
            cell = Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=cmap(norm(value)))
            cell.set_gid(drawing.add_tooltip(tooltip(row, "quality_selection")))
            if is_selected:
                cell.set(edgecolor="#D55E00", linewidth=2.5, zorder=3)
            ax.add_patch(cell)
        if len(betas) * len(lrs) <= MAX_NUMBERS:
            # Not exactly white and black, which a page in dark mode replaces.
            color = "#fefefe" if norm(value) < 0.5 else "#010101"
            ax.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color, zorder=4)
    ax.set(xlim=(-0.5, len(betas) - 0.5), ylim=(-0.5, len(lrs) - 0.5), xlabel="beta")
    for axis, ticks, rotation in ((ax.xaxis, betas, 45), (ax.yaxis, lrs, 0)):
        labeled = range(0, len(ticks), math.ceil(len(ticks) / MAX_TICKS))
        axis.set_ticks(labeled, [f"{ticks[i]:.3g}" for i in labeled], rotation=rotation, fontsize=8)
    ax.spines[:].set_visible(False)


def training(stem: str, name: str, curves: dict[str, pd.DataFrame]) -> Drawing:
    """Draw loss and reward accuracy of the selected points over training."""
    title = f"{name}: training of the selected points (running means over a tenth of the steps)"
    fig = Figure(figsize=(10.4, 3.9), layout="constrained")
    drawing = Drawing(f"{stem}_training", title, fig)
    loss_label = "relative loss (first step 1, minimum 0)"
    accuracy_label = "reward accuracy on training pairs"
    columns = (("loss", loss_label), ("rewards/accuracies", accuracy_label))
    for ax, (column, label) in zip(fig.subplots(1, 2), columns, strict=True):
        for method, curve in curves.items():
            color, marker = STYLES[method]
            values = curve[column]
            if column == "loss":
                # The losses of the methods have different scales, and some are negative.
                drop = values.iloc[0] - values.min()
                values = (values - values.min()) / drop if drop > 0 else 0 * values + 1
            is_pairwise = METHODS[method].kind == "pairwise"
            every = max(1, len(curve) // 6)
            text = f"{NAMES[method]}: {column}, last {curve[column].iloc[-1]:.4g}"
            ax.plot(
                curve.step,
                values,
                "-" if is_pairwise else "--",
                color=color,
                marker=marker,
                markerfacecolor=color if is_pairwise else "#ffffff",
                markevery=every,
                markersize=4,
                linewidth=1.3,
                label=NAMES[method],
                gid=drawing.add_tooltip(text),
            )
        ax.set(xlabel="step", ylabel=label)
        style_axes(ax)
    fig.axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="dashed, hollow: pointwise")
    return drawing


def _training_curves(best: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return method -> smoothed alignment metrics of its selected point, of the first seed."""
    curves: dict[str, pd.DataFrame] = {}
    for row in best.to_dict("records"):
        path = Path(row["checkpoint"]) / METRICS_FILE
        lines = [json.loads(line) for line in path.open()] if path.exists() else []
        frame = pd.DataFrame(lines, columns=["step", "loss", "rewards/accuracies"]).dropna()
        if len(frame) > 1:
            frame = frame.groupby(np.arange(len(frame)) * CURVE_BINS // max(len(frame), CURVE_BINS)).mean()
            curves[row["method"]] = frame.rolling(len(frame) // SMOOTHING + 1, min_periods=1, center=True).mean()
    return curves


def _quality_label(rows: pd.DataFrame) -> str:
    return f"{metric_label(rows)} (95 % interval)"


def _panels(rows: pd.DataFrame, height: float, share: bool = True) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with one axes per method: pairwise methods in the first row, pointwise ones in the second."""
    methods = [[m for m in METHODS if m in set(rows.method) and METHODS[m].kind == kind] for kind in KINDS]
    methods = [of_kind for of_kind in methods if of_kind]
    columns = max(map(len, methods))
    fig = Figure(figsize=(max(6, 2.7 * columns), height * len(methods) + 0.6), layout="constrained")
    grid = fig.subplots(len(methods), columns, sharey=share, squeeze=False)
    panels: dict[str, Axes] = {}
    for axes, of_kind in zip(grid, methods, strict=True):
        panels |= dict(zip(of_kind, axes, strict=False))
        for ax in axes[len(of_kind) :]:
            ax.set_visible(False)
    return fig, panels


def _label_rows(panels: dict[str, Axes], label: str) -> None:
    """Label the y axis of the first panel of each kind."""
    labeled = set()
    for method, ax in panels.items():
        if (kind := METHODS[method].kind) not in labeled:
            ax.set_ylabel(f"{kind}\n{label}")
            labeled.add(kind)


def _set_log_x_axis(ax: Axes, values: pd.Series[float]) -> None:
    """Set a log scale for values, with a few plain numbers as labels: 1, 2, 5 of each decade in a short range."""
    values = values[values > 0]
    subs = (1.0, 2.0, 5.0) if values.max() < 30 * values.min() else (1.0,)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=subs, numticks=4))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())


def _plot_line(drawing: Drawing, ax: Axes, line: pd.DataFrame, best: pd.DataFrame, method: str, x: str) -> None:
    """Plot quality_reporting of one method over the column `x`, with error bars and a ring at the selected point."""
    color, marker = STYLES[method]
    style_axes(ax)
    # The KL estimate of a policy that barely moved can be negative, which a log axis cannot show.
    line = line[line[x] > 0]
    ax.errorbar(
        line[x],
        line.quality_reporting,
        yerr=Z95 * line.quality_reporting_se,
        xerr=(Z95 * line.kl_sequence_se).clip(upper=0.9 * line[x]) if x == "kl_sequence" else None,
        color=color,
        linewidth=1.5,
        elinewidth=1,
        capsize=2,
    )
    for row in line.to_dict("records"):
        text = tooltip(row, "quality_reporting")
        drawing.plot_mark(ax, row[x], row["quality_reporting"], text, color=color, marker=marker, markersize=6)
    ax.plot([], [], color=color, marker=marker, label=NAMES[method])
    selected = best[(best.method == method) & (best[x] > 0)]
    ax.plot(selected[x], selected.quality_reporting, "o", markersize=13, markerfacecolor="none", markeredgecolor=color)
