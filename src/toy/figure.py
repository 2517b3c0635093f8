"""The toy experiment as a figure: accuracy, ICC1 and dead networks over the width."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from src.toy.study import Z95

_STYLES = {  # Okabe-Ito, as in a sweep's figures
    "dpo": ("DPO = SimPO = ORPO", "#0072B2", "o"),
    "ipo": ("IPO", "#D55E00", "s"),
    "asft": ("ASFT", "#0072B2", "o"),
    "apo_zero": ("APO-Zero", "#D55E00", "s"),
    "nca": ("NCA", "#009E73", "^"),
    "cal_dpo": ("Cal-DPO", "#CC79A7", "D"),
}


def draw(table: pd.DataFrame, folder: Path) -> None:
    """Write toy.png and toy.svg of the first table that study.run returns."""
    biases = list(table.bias.unique())
    rows = [
        ("accuracy", "test accuracy,\nall networks"),
        ("accuracy_alive", "test accuracy,\nliving networks"),
        ("icc1", "ICC1,\nliving networks"),
        ("dead", "dead networks,\nfraction"),
    ]
    fig = Figure(figsize=(5.2 * len(biases) + 1.6, 2.3 * len(rows) + 0.6), layout="constrained")
    grid = fig.subplots(len(rows), len(biases), sharex=True, sharey="row", squeeze=False)
    widths = sorted(table.width.unique())
    for axes, (name, label) in zip(grid, rows, strict=True):
        for ax, bias in zip(axes, biases, strict=True):
            for number, (objective, group) in enumerate(table[table.bias == bias].groupby("objective", sort=False)):
                title, color, marker = _STYLES[str(objective)]
                group = group.sort_values("width")
                # Side by side, or six intervals would overlap.
                x = [widths.index(w) + 0.08 * (number - 2.5) for w in group.width]
                y = group.dead / group.seeds if name == "dead" else group[name]
                error = None if name == "dead" else Z95 * group[f"{name}_se"]
                style = "-" if group.kind.iloc[0] == "pairwise" else "--"
                ax.errorbar(
                    x, y, yerr=error, label=title, color=color, marker=marker, linestyle=style,
                    markersize=4, linewidth=1.2, capsize=2,
                )  # fmt: skip
            ax.set_xticks(range(len(widths)), [str(w) for w in widths])
            ax.grid(alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel(label)
    for ax, bias in zip(grid[0], biases, strict=True):
        ax.set_title("unbiased" if bias == 0 else f"bias {bias:g} of half the prompts")
    for ax in grid[-1]:
        ax.set_xlabel("hidden units")
    grid[0][-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="dashed: pointwise")
    fig.suptitle(f"Toy experiment: {table.seeds.iloc[0]} seeds, 95 %")
    for form in ("png", "svg"):
        fig.savefig(folder / f"toy.{form}", dpi=150, metadata={"Date": None} if form == "svg" else None)
