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
from src.tracking import METRICS_FILE
from sweeps.analysis.selection import GROUP, per_beta
from sweeps.analysis.significance import on_pareto_front
from sweeps.report.graphics import Drawing
from sweeps.report.plot_style import KINDS, NAMES, REACH, STYLES, plain, quality_of, tip_of
from sweeps.report.side_by_side import side_by_side

TICKS = 12  # of either side of a heat map: above that not every value is written beside it
CELLS = 60  # of a heat map: above that numbers would not fit
LONGEST = 150  # characters of a file's stem
BINS = 200  # of a training curve: so many of its steps are told apart
SMOOTH = 10  # a training curve is the mean over this share of its steps around each


def draw(seeds: pd.DataFrame, best: pd.DataFrame) -> Iterator[Drawing]:
    """Every figure of every setup, init and variant. seeds: of over_seeds; best: of held_out.with_intervals."""
    rows = per_beta(seeds)
    for setup, own in best.groupby("setup", sort=False):
        if len(own[GROUP].drop_duplicates()) > 1:
            yield side_by_side(str(setup), own)
    for key, own in rows.groupby(GROUP, sort=False, dropna=False):
        setup, init, variant = map(str, key)
        parts = [setup, *([] if init == "sft" else [init]), *([variant] if variant else [])]
        stem, name = "_".join(re.sub(r"[^\w.=-]+", "_", part) for part in parts), ", ".join(parts)
        if len(stem) > LONGEST:  # of several with the same beginning
            stem = f"{stem[:LONGEST]}_{digest(parts)[:8]}"
        chosen = best[(best[GROUP] == list(key)).all(axis=1)]
        yield over_beta(stem, name, own, chosen)
        yield over_kl(stem, name, own, chosen)
        study = seeds[(seeds[GROUP] == list(key)).all(axis=1)]
        if study.groupby("method").lr.nunique().max() > 1:
            yield over_both(stem, name, study, chosen)
        if curves := _curves(chosen):
            yield training(stem, name, curves)


def over_beta(stem: str, name: str, rows: pd.DataFrame, best: pd.DataFrame) -> Drawing:
    """A panel a method, since each has a beta range of its own; pairwise above pointwise, one quality axis."""
    title = f"{name}: quality over beta, best lr of each; ring: chosen on the selection prompts"
    fig, panels = _panels(rows, 2.7)
    drawing = Drawing(f"{stem}_quality_over_beta", title, fig)
    for method, ax in panels.items():
        _line(drawing, ax, rows[rows.method == method], best, method, "beta")
        ax.set_title(NAMES[method])
        ax.set_xlabel("beta")
    _label_rows(panels, f"{quality_of(rows)}, 95 %")
    return drawing


def over_kl(stem: str, name: str, rows: pd.DataFrame, best: pd.DataFrame) -> Drawing:
    """Pairwise beside pointwise, one point a beta; the Pareto front of each kind."""
    title = f"{name}: quality over KL, one point a beta; dashed: Pareto front of the kind; ring: chosen"
    kinds = [kind for kind in KINDS if kind in set(rows.kind)]
    fig = Figure(figsize=(max(7.5, 5.2 * len(kinds)), 4.4), layout="constrained")
    drawing = Drawing(f"{stem}_quality_over_kl", title, fig)
    grid = fig.subplots(1, len(kinds), sharey=True, sharex=True, squeeze=False)
    for ax, kind in zip(grid[0], kinds, strict=True):
        own = rows[rows.kind == kind].sort_values("kl_sequence")
        front = own[on_pareto_front(own.quality_reporting.tolist(), own.kl_sequence.tolist())]
        front = front[front.kl_sequence > 0]
        ax.plot(
            front.kl_sequence, front.quality_reporting, "--", color="#808080", linewidth=1.6, drawstyle="steps-post"
        )
        for method, line in own.sort_values("beta").groupby("method", sort=False):
            _line(drawing, ax, line, best, str(method), "kl_sequence")
        ax.set_title(kind)
        ax.set_xlabel("KL to the initial checkpoint, nats a sequence")
        ax.legend(frameon=False, loc="lower right")
    grid[0][0].set_ylabel(f"{quality_of(rows)}, 95 %")
    return drawing


def over_both(stem: str, name: str, rows: pd.DataFrame, best: pd.DataFrame) -> Drawing:
    """What choosing saw: quality on the selection prompts at every beta and lr."""
    title = f"{name}: {quality_of(rows)} on the selection prompts; frame: chosen"
    fig, panels = _panels(rows, 2.9, share=False)
    drawing = Drawing(f"{stem}_lr_and_beta", title, fig)
    values = rows.quality_selection
    scale, colours = Normalize(values.min(), values.max()), matplotlib.colormaps["cividis"]
    told = len(rows) <= 10 * CELLS
    for method, ax in panels.items():
        own, taken = rows[rows.method == method], best[best.method == method]
        frames = set(zip(taken.beta, taken.lr, strict=True))
        betas, lrs = sorted(own.beta.unique()), sorted(own.lr.unique())
        if not told:
            table = own.pivot(index="lr", columns="beta", values="quality_selection")
            ax.imshow(table, cmap=colours, norm=scale, aspect="auto", origin="lower", interpolation="nearest")
        for row in own.to_dict("records"):
            x, y, value = betas.index(row["beta"]), lrs.index(row["lr"]), row["quality_selection"]
            chosen = (row["beta"], row["lr"]) in frames
            if told or chosen:
                cell = Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colours(scale(value)))
                cell.set_gid(drawing.tip(tip_of(row, "quality_selection")))
                if chosen:
                    cell.set(edgecolor="#D55E00", linewidth=2.5, zorder=3)
                ax.add_patch(cell)
            if len(betas) * len(lrs) <= CELLS:
                # White and near-black are written as colours that a page in the dark leaves as they are.
                colour = "#fefefe" if scale(value) < 0.5 else "#010101"
                ax.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour, zorder=4)
        ax.set(xlim=(-0.5, len(betas) - 0.5), ylim=(-0.5, len(lrs) - 0.5), title=NAMES[method], xlabel="beta")
        for axis, named, turned in ((ax.xaxis, betas, 45), (ax.yaxis, lrs, 0)):
            shown = range(0, len(named), math.ceil(len(named) / TICKS))
            axis.set_ticks(shown, [f"{named[i]:g}" for i in shown], rotation=turned, fontsize=8)
        ax.spines[:].set_visible(False)
    _label_rows(panels, "lr")
    return drawing


def training(stem: str, name: str, curves: dict[str, pd.DataFrame]) -> Drawing:
    """Of the chosen points: how much of its fall the loss has behind it, and how often the method's score was right."""
    title = f"{name}: training of the chosen points, running means over a tenth of it"
    fig = Figure(figsize=(10.4, 3.9), layout="constrained")
    drawing = Drawing(f"{stem}_training", title, fig)
    for ax, column, label in zip(
        fig.subplots(1, 2),
        ("loss", "rewards/accuracies"),
        ("loss: fall from its start (0) to its least (1)", "reward accuracy on training pairs"),
        strict=True,
    ):
        for method, curve in curves.items():
            colour, marker = STYLES[method]
            values = curve[column]
            if column == "loss":
                # Losses of eight methods have no common unit, and some are negative.
                reach = values.iloc[0] - values.min()
                values = (values.iloc[0] - values) / reach if reach > 0 else 0 * values
            style = "-" if METHODS[method].kind == "pairwise" else "--"
            every = max(1, len(curve) // 6)
            ax.plot(
                curve.step, values, style, color=colour, marker=marker, markevery=every, markersize=4, linewidth=1.3
            )
            ax.lines[-1].set_label(NAMES[method])
            ax.lines[-1].set_gid(
                drawing.tip(f"{NAMES[method]}: {label.partition(':')[0]}, last {curve[column].iloc[-1]:.4g}")
            )
        ax.set(xlabel="step", ylabel=label)
        plain(ax)
    fig.axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="dashed: pointwise")
    return drawing


def _curves(best: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Metrics of alignment of each chosen point (of its first seed), smoothed, by method."""
    curves: dict[str, pd.DataFrame] = {}
    for row in best.to_dict("records"):
        path = Path(row["checkpoint"]) / METRICS_FILE
        lines = [json.loads(line) for line in path.open()] if path.exists() else []
        frame = pd.DataFrame(lines, columns=["step", "loss", "rewards/accuracies"]).dropna()
        if len(frame) > 1:
            frame = frame.groupby(np.arange(len(frame)) * BINS // max(len(frame), BINS)).mean()
            curves[row["method"]] = frame.rolling(len(frame) // SMOOTH + 1, min_periods=1, center=True).mean()
    return curves


def _panels(rows: pd.DataFrame, height: float, share: bool = True) -> tuple[Figure, dict[str, Axes]]:
    """An axes a method: pairwise methods above, pointwise below."""
    methods = [[m for m in METHODS if m in set(rows.method) and METHODS[m].kind == kind] for kind in KINDS]
    methods = [own for own in methods if own]
    columns = max(map(len, methods))
    fig = Figure(figsize=(max(6, 2.7 * columns), height * len(methods) + 0.6), layout="constrained")
    grid = fig.subplots(len(methods), columns, sharey=share, squeeze=False)
    panels: dict[str, Axes] = {}
    for axes, own in zip(grid, methods, strict=True):
        panels |= dict(zip(own, axes, strict=False))
        for ax in axes[len(own) :]:
            ax.set_visible(False)
    return fig, panels


def _label_rows(panels: dict[str, Axes], label: str) -> None:
    seen = set()
    for method, ax in panels.items():
        if (kind := METHODS[method].kind) not in seen:
            ax.set_ylabel(f"{kind}\n{label}")
            seen.add(kind)


def _line(drawing: Drawing, ax: Axes, line: pd.DataFrame, best: pd.DataFrame, method: str, x: str) -> None:
    colour, marker = STYLES[method]
    ax.set_xscale("log")
    plain(ax)
    ax.xaxis.set_major_locator(LogLocator(numticks=4))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    # A KL estimate of a barely moved policy can be below zero, which a log axis cannot show.
    line = line[line[x] > 0]
    over_kl = x == "kl_sequence"
    ax.errorbar(
        line[x],
        line.quality_reporting,
        yerr=REACH * line.quality_reporting_se,
        xerr=(REACH * line.kl_sequence_se).clip(upper=0.9 * line[x]) if over_kl else None,
        color=colour,
        linewidth=1.5,
        elinewidth=1,
        capsize=2,
    )
    for row in line.to_dict("records"):
        tip = tip_of(row, "quality_reporting")
        drawing.mark(ax, row[x], row["quality_reporting"], tip, color=colour, marker=marker, markersize=6)
    ax.plot([], [], color=colour, marker=marker, label=NAMES[method])
    chosen = best[(best.method == method) & (best[x] > 0)]
    ax.plot(chosen[x], chosen.quality_reporting, "o", markersize=13, markerfacecolor="none", markeredgecolor=colour)
