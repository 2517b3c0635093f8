"""Figure that compares inits and variants: the SFT term, the fraction of demonstrations, or any other setting."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd

from src.methods import METHODS
from sweeps.report.graphics import Drawing
from sweeps.report.plot_style import NAMES, metric_label, shared_panel_style, style_axes, tooltip


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
    height = 4.4 if one_setting else 4.4 + 0.06 * max(map(len, labels))
    drawing = Drawing(f"{setup}_side_by_side", title, max(7.5, 1.1 * len(groups) + 3), height)
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
