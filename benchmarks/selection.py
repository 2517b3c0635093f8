"""Sweeps of pure noise: how often does the interval of the gain of tuning cover 0, as it should in 95 of 100?

`python -m benchmarks.selection` simulates 500 of them (about a minute) and draws docs/images/selection.png.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sweeps.analysis.per_prompt import PromptQuality
from sweeps.analysis.reporting_split import gains
from sweeps.analysis.results import COLUMNS, NUMBERS
from sweeps.analysis.selection import best_points, over_seeds

if TYPE_CHECKING:
    from numpy.typing import NDArray

SWEEPS = 500
POINTS = 48  # of a sweep; the gain is over one of them, whose beta is 1
PROMPTS = 512
FIGURE = Path("docs/images/selection.png")


class Made(PromptQuality):
    """(points, prompts) values in memory instead of results on a disk."""

    def __init__(self, values: NDArray[np.float64], selects: NDArray[np.bool_], reports: NDArray[np.bool_]) -> None:
        self.values, self.which = values, {True: np.flatnonzero(selects), False: np.flatnonzero(reports)}

    def _read(self, identity: str, selects: bool) -> tuple[list[int], list[float]]:
        own = self.which[selects]
        return own.tolist(), self.values[int(identity), own].tolist()


def noise(generator: np.random.Generator) -> NDArray[np.float64]:
    """(points, prompts) of wins: prompts are easy or hard for all points alike, and no point is better than another."""
    return (generator.random((POINTS, PROMPTS)) < generator.beta(2, 2, PROMPTS)).astype(float)


def gain(prompts: Made) -> tuple[float, float, float]:
    """Of the best point over that of beta = 1, and its interval, as the aggregator says it."""
    selection, reporting = (prompts.values[:, prompts.which[key]].mean(1) for key in (True, False))
    frame = pd.DataFrame({name: [None] * POINTS for name in COLUMNS}).astype(dict.fromkeys(NUMBERS, float))
    frame = frame.assign(
        setup="noise",
        method="dpo",
        init="sft",
        variant="",
        state="done",
        kind="pairwise",
        beta=[1.0, *np.geomspace(1e-3, 0.9, POINTS - 1)],
        lr=1e-6,
        seed=0,
        identity=[str(n) for n in range(POINTS)],
        quality_selection=selection,
        quality_reporting=reporting,
    )
    rows = over_seeds(frame)
    row = gains(rows, best_points(rows), prompts).iloc[0]
    return row.difference, row.low, row.high


def simulate(sweeps: int = SWEEPS, seed: int = 0) -> dict[str, NDArray[np.float64]]:
    """(sweeps, 3) gain, low, high of each: chosen on one half of the prompts and reported on the other; and naively,
    chosen and reported on all of them."""
    generator = np.random.default_rng(seed)
    found: dict[str, list[tuple[float, float, float]]] = {"split": [], "naive": []}
    everything = np.ones(PROMPTS, bool)
    for _ in range(sweeps):
        values, half = noise(generator), generator.permutation(PROMPTS) < PROMPTS // 2
        found["split"].append(gain(Made(values, half, ~half)))
        found["naive"].append(gain(Made(values, everything, everything)))
    return {name: np.array(rows) for name, rows in found.items()}


def coverage(rows: NDArray[np.float64]) -> float:
    """Share of the intervals that cover 0."""
    return float(((rows[:, 1] <= 0) & (rows[:, 2] >= 0)).mean())


def draw(found: dict[str, NDArray[np.float64]], path: Path) -> None:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, 3.6), layout="constrained")
    titles = {
        "split": "chosen on one half of the prompts, reported on the other",
        "naive": "best of the grid, reported on the prompts that chose it",
    }
    for ax, (name, rows) in zip(fig.subplots(1, 2, sharey=True), found.items(), strict=True):
        shown = rows[:100][np.argsort(rows[:100, 0])]
        covers = (shown[:, 1] <= 0) & (shown[:, 2] >= 0)
        for colour, own in (("#0072B2", covers), ("#D55E00", ~covers)):
            x = np.flatnonzero(own)
            ax.vlines(x, shown[own, 1], shown[own, 2], color=colour, linewidth=1.2)
            ax.plot(x, shown[own, 0], ".", color=colour, markersize=4)
        ax.axhline(0, color="#555", linewidth=1)
        ax.set_title(f"{titles[name]}:\n{100 * coverage(rows):.0f} % of {len(rows)} intervals cover 0", fontsize=10)
        ax.set_xlabel("100 of the sweeps, by gain")
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xticks([])
    fig.axes[0].set_ylabel("gain of tuning, 95 % interval")
    fig.savefig(path, dpi=150)


def main() -> int:
    found = simulate()
    for name, rows in found.items():
        print(f"{name}: mean gain {rows[:, 0].mean():+.4f}, {100 * coverage(rows):.1f} % of {len(rows)} cover 0")
    draw(found, FIGURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
