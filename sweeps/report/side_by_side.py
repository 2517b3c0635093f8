"""Figure that compares inits and variants: the SFT term, the fraction of demonstrations, or any other setting."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from src.methods import METHODS
from sweeps.report.graphics import Drawing
from sweeps.report.plot_style import NAMES, STYLES, metric_label, style_axes, tooltip


def side_by_side(setup: str, best: pd.DataFrame) -> Drawing:
    """Plot the selected points of each init and variant, ordered by the numbers in their names.

    Points are connected when the variants differ in a single setting. best: of with_intervals, one setup.
    """
    groups = sorted({(row["init"], row["variant"]) for row in best.to_dict("records")}, key=_numeric_key)
    settings = {variant.rpartition("=")[0] for _, variant in groups}
    one_setting = len(settings) == 1 and len({init for init, _ in groups}) == 1 and " " not in "".join(settings)
    labels = [v.rpartition("=")[2] if one_setting else ", ".join([i, *map(_short, v.split())]) for i, v in groups]
    name = settings.pop() if one_setting else "init and variant"
    title = f"{setup}: {metric_label(best)} of the selected points by {name} (95 % intervals)"
    width = max(7.5, 1.1 * len(groups) + 3)
    fig = Figure(figsize=(width, 4.4 if one_setting else 4.4 + 0.06 * max(map(len, labels))), layout="constrained")
    drawing, ax = Drawing(f"{setup}_side_by_side", title, fig), fig.subplots()
    methods = [m for m in METHODS if m in set(best.method)]
    for number, method in enumerate(methods):
        color, marker = STYLES[method]
        # Both kinds use the same colors and markers, so in this shared panel pointwise markers are hollow.
        style: dict[str, Any] = {"color": color, "marker": marker}
        style |= {} if METHODS[method].kind == "pairwise" else {"markerfacecolor": "#ffffff"}
        rows = best[best.method == method]
        # Methods are shifted horizontally, because overlapping intervals could not be told apart.
        positions = [groups.index(key) for key in zip(rows.init, rows.variant, strict=True)]
        x = np.array(positions) + 0.5 * ((number + 0.5) / len(methods) - 0.5)
        order = np.argsort(x)
        quality, low, high = (rows[f"quality_reporting{end}"].to_numpy()[order] for end in ("", "_low", "_high"))
        linestyle = ("-" if METHODS[method].kind == "pairwise" else "--") if one_setting else "none"
        ax.errorbar(
            x[order],
            quality,
            yerr=[quality - low, high - quality],
            color=color,
            linestyle=linestyle,
            linewidth=1.2,
            capsize=2,
        )
        for position, row in zip(x, rows.to_dict("records"), strict=True):
            text = f"{', '.join(filter(None, (row['init'], row['variant'])))}\n{tooltip(row, 'quality_reporting')}"
            drawing.plot_mark(ax, position, row["quality_reporting"], text, **style, markersize=6)
        ax.plot([], [], **style, linestyle=linestyle, label=NAMES[method])
    ax.set_xticks(
        range(len(groups)),
        labels,
        rotation=0 if one_setting else 30,
        ha="center" if one_setting else "right",
        fontsize=8,
    )
    ax.set(xlabel=name, ylabel=metric_label(best))
    style_axes(ax)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="hollow: pointwise")
    return drawing


def _short(setting: str) -> str:
    """Return `align_weight=1.0` for `init.align_weight=1.0`; the table has the full key."""
    key, _, value = setting.partition("=")
    return f"{key.rpartition('.')[2]}={value}"


def _numeric_key(group: tuple[str, str]) -> list[tuple[bool, float, str]]:
    """Return a sort key by which 0.3 precedes 1 and 1 precedes 10 wherever the number stands."""
    parts = re.split(r"(?<==)([\d.e+-]+)(?= |$)", " ".join(group))
    return [(i % 2 == 0, float(part) if i % 2 else 0.0, "" if i % 2 else part) for i, part in enumerate(parts)]
