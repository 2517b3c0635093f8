"""The figures of the selected points: verdicts, training curves, inits and variants side by side."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle

from src.errors import DamagedFile, warn
from src.methods import METHODS
from src.store.files import read_jsonl
from src.store.store import METRICS_FILE
from sweeps.analysis.reporting_split import VERDICTS
from sweeps.report.graphics import Drawing, shorten
from sweeps.report.plot_style import NAMES, metric_label, shared_panel_style, style_axes, tooltip

VERDICT_COLORS = dict(zip(VERDICTS, ("#0072B2", "#767676", "#B34700"), strict=True))
MIN_LABELED = 4.0  # percent: in a shorter part of a bar there is no room for its number
MAX_LABEL = 40  # characters of the label of a tick
CURVE_BINS = 200  # points of a training curve
SMOOTHING = 10  # a training curve is the running mean over 1 / SMOOTHING of its points


def win_tie_lose(stem: str, name: str, verdicts: pd.DataFrame) -> Drawing:
    """Draw one stacked bar per method, most wins first. verdicts: of one group and judge."""
    title = f"{name}: the selected points against the baseline, on {verdicts.prompts.iloc[0]} reporting prompts"
    drawing = Drawing(stem, title, 7.5, 1.5 + 0.34 * len(verdicts))
    ax = drawing.figure.subplots()
    rows = verdicts.sort_values("win", kind="stable").to_dict("records")
    for y, row in enumerate(rows):
        left = 0.0
        for verdict, color in VERDICT_COLORS.items():
            text = f"{NAMES[row['method']]}, beta {row['beta']:g}, lr {row['lr']:g}\n{verdict} {row[verdict]:.1f} %"
            bar = Rectangle((left, y - 0.38), row[verdict], 0.76, facecolor=color)
            bar.set_gid(drawing.add_tooltip(text))
            ax.add_patch(bar)
            if row[verdict] >= MIN_LABELED:
                # Not exactly white, which a page in dark mode replaces.
                middle = left + row[verdict] / 2
                ax.text(middle, y, f"{row[verdict]:.1f}", ha="center", va="center", fontsize=8, color="#fefefe")
            left += row[verdict]
    ax.set(xlim=(0, 100), ylim=(-0.6, len(rows) - 0.4), xlabel="percent of the prompts")
    ax.set_yticks(range(len(rows)), [NAMES[row["method"]] for row in rows])
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    handles = [Rectangle((0, 0), 1, 1, facecolor=color, label=verdict) for verdict, color in VERDICT_COLORS.items()]
    ax.legend(handles=handles, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawing


def training(stem: str, name: str, curves: dict[str, pd.DataFrame]) -> Drawing:
    """Draw loss and reward accuracy of the selected points over training."""
    title = f"{name}: training of the selected points (running means over a tenth of the steps)"
    drawing = Drawing(f"{stem}_training", title, 10.4, 3.9)
    labels = {
        "loss": "relative loss (first step 1, minimum 0)",
        "rewards/accuracies": "reward accuracy on training pairs",
    }
    for ax, (column, label) in zip(drawing.figure.subplots(1, 2), labels.items(), strict=True):
        for method, curve in curves.items():
            values = curve[column]
            text = f"{NAMES[method]}: {column}, last {values.iloc[-1]:.4g}"
            if column == "loss":
                # The losses of the methods have different scales, and some are negative.
                drop = values.iloc[0] - values.min()
                values = (values - values.min()) / drop if drop > 0 else 0 * values + 1
            style = shared_panel_style(method) | {"markevery": max(1, len(curve) // 6), "markersize": 4}
            gid = drawing.add_tooltip(text)
            ax.plot(curve.step, values, linewidth=1.3, label=NAMES[method], gid=gid, **style)
        ax.set(xlabel="step", ylabel=label)
        style_axes(ax)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="dashed, hollow: pointwise")
    return drawing


def side_by_side(stem: str, setup: str, best: pd.DataFrame) -> Drawing:
    """Plot the selected points of each init and variant, ordered by the numbers in their names.

    Points are connected when the variants differ in a single setting. best: of with_intervals, one setup.
    """
    groups = sorted(
        {(row["init"], row["variant"]) for row in best.to_dict("records")}, key=lambda g: numeric_key(" ".join(g))
    )
    settings = {variant.rpartition("=")[0] for _, variant in groups}
    one_setting = len(settings) == 1 and len({init for init, _ in groups}) == 1 and " " not in "".join(settings)
    labels = [v.rpartition("=")[2] if one_setting else ", ".join([i, *map(_short, v.split())]) for i, v in groups]
    labels = [shorten(label, MAX_LABEL) for label in labels]
    name = settings.pop() if one_setting else "init and variant"
    title = f"{setup}: {metric_label(best)} of the selected points by {name} (95 % intervals)"
    height = 4.4 if one_setting else 4.4 + 0.06 * max(map(len, labels))
    drawing = Drawing(f"{stem}_side_by_side", title, max(7.5, 1.1 * len(groups) + 3), height)
    ax = drawing.figure.subplots()
    methods = [m for m in METHODS if m in set(best.method)]
    for number, method in enumerate(methods):
        style = shared_panel_style(method)
        linestyle = style.pop("linestyle")
        line = {"color": style["color"], "linestyle": linestyle if one_setting else "none"}
        rows = best[best.method == method]
        # Methods are shifted horizontally, because overlapping intervals could not be told apart.
        positions = [groups.index(key) for key in zip(rows.init, rows.variant, strict=True)]
        x = np.array(positions) + 0.5 * ((number + 0.5) / len(methods) - 0.5)
        order = np.argsort(x)
        quality, low, high = (rows[f"quality_reporting{end}"].to_numpy()[order] for end in ("", "_low", "_high"))
        ax.errorbar(x[order], quality, [quality - low, high - quality], linewidth=1.2, capsize=2, **line)
        for position, row in zip(x, rows.to_dict("records"), strict=True):
            text = f"{', '.join(filter(None, (row['init'], row['variant'])))}\n{tooltip(row, 'quality_reporting')}"
            drawing.plot_mark(ax, position, row["quality_reporting"], text, **style, markersize=6)
        ax.plot([], [], **(style | line), label=NAMES[method])
    rotated: dict[str, Any] = {} if one_setting else {"rotation": 30, "ha": "right"}
    ax.set_xticks(range(len(groups)), labels, fontsize=8, **rotated)
    ax.set(xlabel=shorten(name, MAX_LABEL), ylabel=metric_label(best))
    style_axes(ax)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="hollow: pointwise")
    return drawing


def training_curves(best: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return method -> smoothed alignment metrics of its selected point, of the first seed."""
    curves: dict[str, pd.DataFrame] = {}
    for row in best.to_dict("records"):
        path, columns = Path(row["checkpoint"]) / METRICS_FILE, ["step", "loss", "rewards/accuracies"]
        try:
            frame = pd.DataFrame(read_jsonl(path, columns), columns=columns).dropna().astype(float)
        except FileNotFoundError:
            continue
        except (DamagedFile, TypeError, ValueError) as error:
            warn(f"{error if isinstance(error, DamagedFile) else f'{path}: damaged ({error})'}; its curve is left out")
            continue
        if len(frame) > 1:
            frame = frame.groupby(np.arange(len(frame)) * CURVE_BINS // max(len(frame), CURVE_BINS)).mean()
            curves[row["method"]] = frame.rolling(len(frame) // SMOOTHING + 1, min_periods=1, center=True).mean()
    return curves


def numeric_key(text: str) -> list[tuple[bool, float, str]]:
    """Return a sort key by which `x=0.3` precedes `x=1` and that `x=10`, wherever the number stands."""
    parts = re.split(r"(?<==)([\d.e+-]+)(?=,? |$)", text)
    return [(i % 2 == 0, float(part) if i % 2 else 0.0, "" if i % 2 else part) for i, part in enumerate(parts)]


def _short(setting: str) -> str:
    """Return `align_weight=1.0` for `init.align_weight=1.0`; the table has the full key."""
    key, _, value = setting.partition("=")
    return f"{key.rpartition('.')[2]}={value}"
