"""Coverage of the interval of the gain of tuning in sweeps of pure noise: it should contain 0 in 95 of 100 sweeps.

`python -m benchmarks.selection` simulates 500 of them (about a minute) and draws docs/images/selection.png.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sweeps.analysis.reporting_split import gains
from sweeps.analysis.results import COLUMNS, NUMBERS, PromptQuality
from sweeps.analysis.selection import average_seeds, best_points

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_SWEEPS = 500
NUM_POINTS = 48  # of a sweep; the gain is over one of them, whose beta is 1
NUM_PROMPTS = 512
FIGURE = Path("docs/images/selection.png")


class SyntheticQuality(PromptQuality):
    """(points, prompts) values in memory instead of results on disk."""

    def __init__(self, values: NDArray[np.float64], selection: NDArray[np.bool_], reporting: NDArray[np.bool_]) -> None:
        self.values = values
        self.splits = {True: np.flatnonzero(selection), False: np.flatnonzero(reporting)}

    def _read(self, identity: str, selection: bool) -> tuple[list[int], list[float]]:
        prompts = self.splits[selection]
        return prompts.tolist(), self.values[int(identity), prompts].tolist()


def noise(generator: np.random.Generator) -> NDArray[np.float64]:
    """Return (points, prompts) wins: prompts differ in difficulty, but no point is better than another."""
    return (generator.random((NUM_POINTS, NUM_PROMPTS)) < generator.beta(2, 2, NUM_PROMPTS)).astype(float)


def gain(prompts: SyntheticQuality) -> tuple[float, float, float]:
    """Return the gain of the best point over beta = 1 and its interval, as the aggregator computes them."""
    selection, reporting = (prompts.values[:, prompts.splits[key]].mean(1) for key in (True, False))
    frame = pd.DataFrame({name: [None] * NUM_POINTS for name in COLUMNS}).astype(dict.fromkeys(NUMBERS, float))
    frame = frame.assign(
        setup="noise",
        method="dpo",
        init="sft",
        variant="",
        state="done",
        kind="pairwise",
        beta=[1.0, *np.geomspace(1e-3, 0.9, NUM_POINTS - 1)],
        lr=1e-6,
        seed=0,
        identity=[str(n) for n in range(NUM_POINTS)],
        quality_selection=selection,
        quality_reporting=reporting,
    )
    rows = average_seeds(frame)
    row = gains(rows, best_points(rows), prompts).iloc[0]
    return row.difference, row.low, row.high


def simulate(num_sweeps: int = NUM_SWEEPS, seed: int = 0) -> dict[str, NDArray[np.float64]]:
    """Return (sweeps, 3) gain, low, high by procedure.

    `split`: selected on one half of the prompts and reported on the other; `naive`: selected and reported on all.
    """
    generator = np.random.default_rng(seed)
    rows: dict[str, list[tuple[float, float, float]]] = {"split": [], "naive": []}
    all_prompts = np.ones(NUM_PROMPTS, bool)
    for _ in range(num_sweeps):
        values, half = noise(generator), generator.permutation(NUM_PROMPTS) < NUM_PROMPTS // 2
        rows["split"].append(gain(SyntheticQuality(values, half, ~half)))
        rows["naive"].append(gain(SyntheticQuality(values, all_prompts, all_prompts)))
    return {name: np.array(intervals) for name, intervals in rows.items()}


def coverage(rows: NDArray[np.float64]) -> float:
    """Return the fraction of the intervals that contain 0."""
    return float(((rows[:, 1] <= 0) & (rows[:, 2] >= 0)).mean())


def draw(results: dict[str, NDArray[np.float64]], path: Path) -> None:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, 3.6), layout="constrained")
    titles = {
        "split": "selected on one half of the prompts, reported on the other",
        "naive": "selected and reported on the same prompts",
    }
    for ax, (name, rows) in zip(fig.subplots(1, 2, sharey=True), results.items(), strict=True):
        intervals = rows[:100][np.argsort(rows[:100, 0])]
        covers = (intervals[:, 1] <= 0) & (intervals[:, 2] >= 0)
        for color, mask in (("#0072B2", covers), ("#D55E00", ~covers)):
            x = np.flatnonzero(mask)
            ax.vlines(x, intervals[mask, 1], intervals[mask, 2], color=color, linewidth=1.2)
            ax.plot(x, intervals[mask, 0], ".", color=color, markersize=4)
        ax.axhline(0, color="#555", linewidth=1)
        ax.set_title(f"{titles[name]}:\n{100 * coverage(rows):.0f} % of {len(rows)} intervals contain 0", fontsize=10)
        ax.set_xlabel("100 of the sweeps, sorted by gain")
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xticks([])
    fig.axes[0].set_ylabel("gain of tuning, 95 % interval")
    fig.savefig(path, dpi=150)


def main() -> int:
    results = simulate()
    for name, rows in results.items():
        print(f"{name}: mean gain {rows[:, 0].mean():+.4f}, {100 * coverage(rows):.1f} % of {len(rows)} contain 0")
    draw(results, FIGURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
