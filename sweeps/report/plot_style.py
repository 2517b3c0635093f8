"""Plot style: color, marker and display name of each method; tooltip text."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from src.methods import METHODS
from sweeps.analysis.significance import Z95

KINDS = ("pairwise", "pointwise")
METHODS_OF_KIND = {kind: [method for method in METHODS if METHODS[method].kind == kind] for kind in KINDS}
NAMES = {method: spec.name for method, spec in METHODS.items()}
# A method has the same color and marker in every figure; the Okabe-Ito palette is safe for color-blind readers. With
# one more marker than colors, no combination repeats within a kind before the 43rd method.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = {
    method: (COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)])
    for methods in METHODS_OF_KIND.values()
    for index, method in enumerate(methods)
}


def shared_panel_style(method: str) -> dict[str, Any]:
    """Return the style of a line in a panel with both kinds, which share colors: pointwise is dashed and hollow."""
    color, marker = STYLES[method]
    is_pairwise = METHODS[method].kind == "pairwise"
    hollow = {} if is_pairwise else {"markerfacecolor": "#ffffff"}
    return {"color": color, "marker": marker, "linestyle": "-" if is_pairwise else "--", **hollow}


def metric_label(rows: pd.DataFrame) -> str:
    """Return the metric of the rows as an axis label, such as `win rate`."""
    return str(rows.metric.iloc[0]).replace("_", " ")


def style_axes(ax: Axes) -> None:
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def tooltip(row: dict[Hashable, Any], quality: str) -> str:
    """Return the hyper-parameters of a point, its quality (the column of that name) and KL. row: of average_seeds."""
    error = row[f"{quality}_se"]
    margin = "" if pd.isna(error) else f" ± {Z95 * error:.3f}"
    point = f"{NAMES[row['method']]}, beta {row['beta']:g}, lr {row['lr']:g}"
    return f"{point}\n{row[quality]:.3f}{margin}, KL {row['kl_sequence']:.2f}"
