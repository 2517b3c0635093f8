"""How methods look in every figure and are called in every table, and what marks say."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from src.methods import METHODS

KINDS = ("pairwise", "pointwise")
NAMES = {method: spec.name for method, spec in METHODS.items()}
# One colour and marker a method in every figure (Okabe-Ito: told apart by colour-blind readers too). One more marker
# than colours: no pair of them comes twice within a kind before the 43rd method.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = {
    method: (COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)])
    for kind in KINDS
    for place, method in enumerate(m for m in METHODS if METHODS[m].kind == kind)
}
REACH = 1.96  # standard errors to either end of a 95 % interval


def quality_of(rows: pd.DataFrame) -> str:
    return str(rows.metric.iloc[0]).replace("_", " ")


def plain(ax: Axes) -> None:
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def tip_of(row: dict[Hashable, Any], quality: str) -> str:
    """What a mark says: which point it is, its quality (the column of that name) and KL. row: of over_seeds."""
    error = row[f"{quality}_se"]
    known = "" if pd.isna(error) else f" ± {REACH * error:.3f}"
    where = f"{NAMES[row['method']]}, beta {row['beta']:g}, lr {row['lr']:g}"
    return f"{where}\n{row[quality]:.3f}{known}, KL {row['kl_sequence']:.2f}"
