"""A figure of what is compared across inits and variants: the SFT term, a share of the demonstrations, any setting."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from src.methods import METHODS
from sweeps.report.graphics import Drawing
from sweeps.report.plot_style import NAMES, STYLES, plain, quality_of, tip_of


def side_by_side(setup: str, best: pd.DataFrame) -> Drawing:
    """The chosen points of each init and variant, in order of the numbers in those; lines where one setting is all that
    differs. best: of held_out.with_intervals, one setup."""
    groups = sorted({(row["init"], row["variant"]) for row in best.to_dict("records")}, key=_in_numbers)
    settings = {variant.rpartition("=")[0] for _, variant in groups}
    one = len(settings) == 1 and len({init for init, _ in groups}) == 1 and " " not in "".join(settings)
    labels = [v.rpartition("=")[2] if one else ", ".join([i, *map(_short, v.split())]) for i, v in groups]
    name = settings.pop() if one else "init and variant"
    title = f"{setup}: {quality_of(best)} of the chosen points over {name}, 95 %"
    width = max(7.5, 1.1 * len(groups) + 3)
    fig = Figure(figsize=(width, 4.4 if one else 4.4 + 0.06 * max(map(len, labels))), layout="constrained")
    drawing, ax = Drawing(f"{setup}_side_by_side", title, fig), fig.subplots()
    methods = [m for m in METHODS if m in set(best.method)]
    for number, method in enumerate(methods):
        colour, marker = STYLES[method]
        # Colours and markers are those of one kind; in one panel the other kind is hollow.
        look: dict[str, Any] = {"color": colour, "marker": marker}
        look |= {} if METHODS[method].kind == "pairwise" else {"markerfacecolor": "#ffffff"}
        own = best[best.method == method]
        # Beside each other: intervals of eight methods in one place could not be read.
        places = [groups.index(key) for key in zip(own.init, own.variant, strict=True)]
        x = np.array(places) + 0.5 * ((number + 0.5) / len(methods) - 0.5)
        order = np.argsort(x)
        quality, low, high = (own[f"quality_reporting{end}"].to_numpy()[order] for end in ("", "_low", "_high"))
        style = ("-" if METHODS[method].kind == "pairwise" else "--") if one else "none"
        ax.errorbar(
            x[order],
            quality,
            yerr=[quality - low, high - quality],
            color=colour,
            linestyle=style,
            linewidth=1.2,
            capsize=2,
        )
        for place, row in zip(x, own.to_dict("records"), strict=True):
            tip = f"{', '.join(filter(None, (row['init'], row['variant'])))}\n{tip_of(row, 'quality_reporting')}"
            drawing.mark(ax, place, row["quality_reporting"], tip, **look, markersize=6)
        ax.plot([], [], **look, linestyle=style, label=NAMES[method])
    ax.set_xticks(range(len(groups)), labels, rotation=0 if one else 30, ha="center" if one else "right", fontsize=8)
    ax.set(xlabel=name, ylabel=quality_of(best))
    plain(ax)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="hollow: pointwise")
    return drawing


def _short(setting: str) -> str:
    """`align_weight=1.0` of `init.align_weight=1.0`: the table has it in full."""
    key, _, value = setting.partition("=")
    return f"{key.rpartition('.')[2]}={value}"


def _in_numbers(group: tuple[str, str]) -> list[tuple[bool, float, str]]:
    """Sorts 0.3 before 1 before 10, in whatever words."""
    parts = re.split(r"(?<==)([\d.e+-]+)(?= |$)", " ".join(group))
    return [(i % 2 == 0, float(part) if i % 2 else 0.0, "" if i % 2 else part) for i, part in enumerate(parts)]
