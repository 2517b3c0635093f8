"""The figures of a sweep: quality over beta and over KL, lr x beta, and those of the selected points."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from src.planning.content import digest
from sweeps.analysis.reporting_split import reported
from sweeps.analysis.selection import GROUP, best_lr_per_beta
from sweeps.analysis.significance import Z95, on_pareto_front
from sweeps.report import selected_figures
from sweeps.report.graphics import Drawing
from sweeps.report.plot_style import (
    KINDS,
    METHODS_OF_KIND,
    NAMES,
    STYLES,
    metric_label,
    style_axes,
    tooltip,
)
from sweeps.report.tables import change_with_error

MAX_TICKS = 12  # on either axis of a heat map; with more values only some are labeled
MAX_NUMBERS = 60  # cells of a heat map that show their value; more would not fit
MIN_CHANGE = 0.01  # of capability, at either end of its colors: a smaller one is no more than noise
CHANGE_COLORS = "RdBu"  # red: lost, white: as the SFT model, blue: gained; told apart by color-blind readers
MAX_STEM = 150  # bytes of a file name
FAINT = 0.4  # opacity of published results


def draw(
    averages: pd.DataFrame, best: pd.DataFrame, verdicts: pd.DataFrame, published: pd.DataFrame
) -> Iterator[Drawing]:
    """Yield every figure of every setup, init and variant.

    averages: of average_seeds; best: of with_intervals; verdicts: of judges.with_outcomes; published: of
    published_points.
    """
    best_lrs, stems = best_lr_per_beta(averages), set[str]()
    for setup, rows in reported(best).groupby("setup", sort=False):
        if len(rows[GROUP].drop_duplicates()) > 1:
            yield selected_figures.side_by_side(_stem([str(setup)], stems), str(setup), rows)
    stems.clear()
    for key, rows in best_lrs.groupby(GROUP, sort=False, dropna=False):
        setup, init, variant = map(str, key)
        parts = [setup, *([] if init == "sft" else [init]), *([variant] if variant else [])]
        stem, name = _stem(parts, stems), ", ".join(parts)
        selected, of_group, of_paper = (
            table[(table[GROUP] == list(key)).all(axis=1)] for table in (best, verdicts, published)
        )
        if len(shown := reported(rows)):
            yield quality_over_beta(stem, name, shown, reported(selected), of_paper)
            yield quality_over_kl(stem, name, shown, reported(selected), of_paper)
        for number, (judge, by_one) in enumerate(of_group.groupby("judge", sort=False)):
            whose = f"{name} by {judge}" if of_group.judge.nunique() > 1 else name
            yield selected_figures.win_tie_lose(f"{stem}_win_tie_lose{f'_{judge}' if number else ''}", whose, by_one)
        grid = averages[(averages[GROUP] == list(key)).all(axis=1)]
        if grid.groupby("method").lr.nunique().max() > 1:
            yield heat_map(stem, name, grid, selected)
        if grid.capability_change.notna().any():
            yield capability_over_kl(stem, name, grid, selected)
        if curves := selected_figures.training_curves(selected):
            yield selected_figures.training(stem, name, curves)


def _stem(parts: list[str], taken: set[str]) -> str:
    """Return the start of a group's file names; with a digest where it is cut or several groups would share it."""
    whole = "_".join(re.sub(r"[^\w.=-]+", "_", part) for part in parts)
    stem = whole.encode()[:MAX_STEM].decode(errors="ignore")
    if stem != whole or stem in taken:
        stem = f"{stem}_{digest(parts)[:8]}"
    taken.add(stem)
    return stem


def quality_over_beta(stem: str, name: str, rows: pd.DataFrame, best: pd.DataFrame, published: pd.DataFrame) -> Drawing:
    """Draw one panel per method, since each has its own range of beta; all panels share the quality axis."""
    title = f"{name}: {metric_label(rows)} over beta, each at its best lr (ring: selected on the selection split"
    title += f"; faint: published, {published.source.iloc[0]})" if len(published) else ")"
    drawing, panels = _panels(f"{stem}_quality_over_beta", title, rows, _quality_label(rows), 2.7)
    for method, ax in panels.items():
        line, of_paper = rows[rows.method == method], published[published.method == method]
        _plot_line(drawing, ax, line, best, method, "beta")
        _plot_published_points(drawing, ax, of_paper)
        _set_log_x_axis(ax, pd.concat([line.beta, of_paper.beta.astype(float)]))
    return drawing


def _plot_published_points(drawing: Drawing, ax: Axes, published: pd.DataFrame) -> None:
    for row in published.to_dict("records"):
        color, marker = STYLES[row["method"]]
        text = f"{NAMES[row['method']]}, beta {row['beta']:g}\n{row['quality']:.3f} ({row['source']})"
        style: dict[str, Any] = {"color": color, "alpha": FAINT}
        ax.errorbar(row["beta"], row["quality"], Z95 * row["quality_se"], capsize=2, linewidth=1, **style)
        drawing.plot_mark(
            ax, row["beta"], row["quality"], text, marker=marker, markersize=9, markerfacecolor="none", **style
        )


def quality_over_kl(stem: str, name: str, rows: pd.DataFrame, best: pd.DataFrame, published: pd.DataFrame) -> Drawing:
    """Draw pairwise and pointwise methods in one panel each, with the Pareto front of the kind.

    Published results, whose KL is not published, are lines at their quality.
    """
    title = f"{name}: {metric_label(rows)} over KL, one point per beta (dashed: Pareto front; ring: selected"
    title += (
        f"; faint lines: published, {published.source.iloc[0]}, best beta; no KL published)" if len(published) else ")"
    )
    kinds = [kind for kind in KINDS if kind in set(rows.kind)]
    drawing = Drawing(f"{stem}_quality_over_kl", title, max(7.5, 5.2 * len(kinds)), 4.4)
    grid = drawing.figure.subplots(1, len(kinds), sharey=True, sharex=True, squeeze=False)
    for ax, kind in zip(grid[0], kinds, strict=True):
        of_kind = rows[rows.kind == kind].sort_values("kl_sequence")
        front = of_kind[on_pareto_front(of_kind.quality_reporting.tolist(), of_kind.kl_sequence.tolist())]
        front = front[front.kl_sequence > 0]
        style: dict[str, Any] = {"color": "#808080", "linewidth": 1.6, "drawstyle": "steps-post"}
        ax.plot(front.kl_sequence, front.quality_reporting, "--", **style)
        for method, line in of_kind.sort_values("beta").groupby("method", sort=False):
            _plot_line(drawing, ax, line, best, str(method), "kl_sequence")
            for row in published[published.method == method].head(1).to_dict("records"):
                gid = drawing.add_tooltip(f"{NAMES[row['method']]}\n{row['quality']:.3f} ({row['source']})")
                ax.axhline(row["quality"], color=STYLES[row["method"]][0], alpha=FAINT, linewidth=1.5, gid=gid)
        _set_log_x_axis(ax, rows.kl_sequence)
        ax.set(title=kind, xlabel="KL(policy || initial policy), nats per sequence")
        ax.legend(frameon=False, loc="lower right")
    grid[0][0].set_ylabel(_quality_label(rows))
    return drawing


def capability_over_kl(stem: str, name: str, rows: pd.DataFrame, best: pd.DataFrame) -> Drawing:
    """Draw all points over KL in the panels of quality_over_kl, colored by their change of capability."""
    title = f"{name}: {metric_label(rows)} over KL, colored by the change of capability (ring: selected)"
    rows = rows[(rows.kl_sequence > 0) & rows.capability_change.notna()]
    kinds = [kind for kind in KINDS if kind in set(rows.kind)] or list(KINDS[:1])
    drawing = Drawing(f"{stem}_capability_over_kl", title, max(8.4, 5.2 * len(kinds) + 1), 4.4)
    axes = drawing.figure.subplots(1, len(kinds), sharey=True, sharex=True, squeeze=False)[0]
    bound = max([MIN_CHANGE, *rows.capability_change.abs()])
    colors = ScalarMappable(Normalize(-bound, bound), CHANGE_COLORS)
    selected = set(zip(best.method, best.beta, best.lr, strict=True))
    for ax, kind in zip(axes, kinds, strict=True):
        style_axes(ax)
        of_kind = rows[rows.kind == kind]
        for row in of_kind.to_dict("records"):
            is_selected = (row["method"], row["beta"], row["lr"]) in selected
            text = f"{tooltip(row, 'quality_reporting')}\ncapability {change_with_error(row)}"
            style = {"color": colors.to_rgba(row["capability_change"]), "marker": STYLES[row["method"]][1]}
            style |= {"markeredgecolor": "#D55E00" if is_selected else "#808080", "markeredgewidth": 1 + is_selected}
            drawing.plot_mark(ax, row["kl_sequence"], row["quality_reporting"], text, markersize=8, **style)
        for method in dict.fromkeys(of_kind.method):
            ax.plot([], [], color="#808080", marker=STYLES[method][1], linestyle="none", label=NAMES[method])
        _set_log_x_axis(ax, rows.kl_sequence)
        ax.set(title=kind, xlabel="KL(policy || initial policy), nats per sequence")
        if len(of_kind):
            ax.legend(frameon=False, loc="lower right")
    if len(rows):
        axes[0].set_ylabel(metric_label(rows))
    drawing.figure.colorbar(colors, ax=list(axes), label="change of capability from the SFT model")
    return drawing


def heat_map(stem: str, name: str, rows: pd.DataFrame, best: pd.DataFrame) -> Drawing:
    """Draw the selection metric over (beta, lr), one panel per method."""
    title = f"{name}: {metric_label(rows)} on the selection split (frame: selected)"
    drawing, panels = _panels(f"{stem}_lr_and_beta", title, rows, "lr", 2.9, share=False)
    norm = Normalize(rows.quality_selection.min(), rows.quality_selection.max())
    for method, ax in panels.items():
        _plot_cells(drawing, ax, rows[rows.method == method], best[best.method == method], norm)
    return drawing


def _plot_cells(drawing: Drawing, ax: Axes, rows: pd.DataFrame, best: pd.DataFrame, norm: Normalize) -> None:
    """Plot the cells of one method."""
    betas, lrs, cmap = sorted(rows.beta.unique()), sorted(rows.lr.unique()), matplotlib.colormaps["cividis"]
    selected = set(zip(best.beta, best.lr, strict=True))
    for row in rows.to_dict("records"):
        x, y, value = betas.index(row["beta"]), lrs.index(row["lr"]), row["quality_selection"]
        cell = Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=cmap(norm(value)))
        cell.set_gid(drawing.add_tooltip(tooltip(row, "quality_selection")))
        if (row["beta"], row["lr"]) in selected:
            cell.set(edgecolor="#D55E00", linewidth=2.5, zorder=3)
        ax.add_patch(cell)
        if len(betas) * len(lrs) <= MAX_NUMBERS:
            # Not exactly white and black, which a page in dark mode replaces.
            color = "#fefefe" if norm(value) < 0.5 else "#010101"
            ax.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color, zorder=4)
    ax.set(xlim=(-0.5, len(betas) - 0.5), ylim=(-0.5, len(lrs) - 0.5))
    for axis, ticks, rotation in ((ax.xaxis, betas, 45), (ax.yaxis, lrs, 0)):
        labeled = range(0, len(ticks), math.ceil(len(ticks) / MAX_TICKS))
        axis.set_ticks(labeled, [f"{ticks[i]:.3g}" for i in labeled], rotation=rotation, fontsize=8)
    ax.spines[:].set_visible(False)


def _quality_label(rows: pd.DataFrame) -> str:
    return f"{metric_label(rows)} (95 % interval)"


def _panels(
    name: str, title: str, rows: pd.DataFrame, label: str, height: float, share: bool = True
) -> tuple[Drawing, dict[str, Axes]]:
    """Return a drawing with one axes per method: pairwise methods in the first row, pointwise ones in the second.

    label: of the y axes, which the panels share or not. height: of a row, inches.
    """
    kinds = {kind: [m for m in methods if m in set(rows.method)] for kind, methods in METHODS_OF_KIND.items()}
    kinds = {kind: methods for kind, methods in kinds.items() if methods}
    columns = max(map(len, kinds.values()))
    drawing = Drawing(name, title, max(6, 2.7 * columns), height * len(kinds) + 0.6)
    mosaic = [methods + ["."] * (columns - len(methods)) for methods in kinds.values()]  # "." is an empty place
    panels: dict[str, Axes] = drawing.figure.subplot_mosaic(mosaic, sharey=share)
    for method, ax in panels.items():
        ax.set(title=NAMES[method], xlabel="beta")
    for kind, (first, *_) in kinds.items():
        panels[first].set_ylabel(f"{kind}\n{label}")
    return drawing, panels


def _set_log_x_axis(ax: Axes, values: pd.Series[float]) -> None:
    """Set a log scale for values, with a few plain numbers as labels: 1, 2, 5 of each decade in a short range."""
    values = values[(values > 0) & (values < math.inf)]
    if values.empty:
        ax.text(0.5, 0.5, "no value above 0", ha="center", va="center", transform=ax.transAxes)
        ax.set(xticks=[], yticks=[])
        return
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
    y_error = Z95 * line.quality_reporting_se
    x_error = (Z95 * line.kl_sequence_se).clip(upper=0.9 * line[x]) if x == "kl_sequence" else None
    style: dict[str, Any] = {"color": color, "linewidth": 1.5, "elinewidth": 1, "capsize": 2}
    ax.errorbar(line[x], line.quality_reporting, y_error, x_error, **style)
    for row in line.to_dict("records"):
        text = tooltip(row, "quality_reporting")
        drawing.plot_mark(ax, row[x], row["quality_reporting"], text, color=color, marker=marker, markersize=6)
    ax.plot([], [], color=color, marker=marker, label=NAMES[method])
    selected = best[(best.method == method) & (best[x] > 0)]
    ax.plot(selected[x], selected.quality_reporting, "o", markersize=13, markerfacecolor="none", markeredgecolor=color)
