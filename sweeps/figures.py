"""The figures of a sweep: quality over beta and quality over KL, pairwise and pointwise side by side."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from src.methods import METHODS
from sweeps.statistics import per_beta

# One colour and marker a method in every figure (Okabe-Ito: told apart by colour-blind readers too).
STYLES = dict(
    zip(
        METHODS,
        [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D")] * 2,
        strict=True,
    )
)
NAMES = {
    "dpo": "DPO",
    "ipo": "IPO",
    "simpo": "SimPO",
    "orpo": "ORPO",
    "asft": "ASFT",
    "apo_zero": "APO-Zero",
    "nca": "NCA",
    "cal_dpo": "Cal-DPO",
}
AXES = {
    "quality_over_beta": ("beta", None, "beta"),
    "quality_over_kl": ("kl_sequence", "kl_sequence_se", "KL to the initial checkpoint, nats per sequence"),
}


def write(folder: Path, points: pd.DataFrame, best: pd.DataFrame) -> list[Path]:
    """figures/<setup>[_<init>]_<figure>.png and .svg; returns the SVGs."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it announces its font cache
    target = folder / "figures"
    target.mkdir(exist_ok=True)
    written = []
    for (setup, init), rows in per_beta(points).groupby(["setup", "init"], sort=False):
        chosen = best[(best.setup == setup) & (best.init == init)]
        stem = setup if init == "sft" else f"{setup}_{init}"
        for figure, (x, x_error, label) in AXES.items():
            fig = Figure(figsize=(10, 4.2), layout="constrained")
            axes = fig.subplots(1, 2, sharey=True, sharex=figure != "quality_over_beta")
            for ax, kind in zip(axes, ("pairwise", "pointwise"), strict=True):
                _panel(ax, rows[rows.kind == kind], chosen, x, x_error)
                ax.set_title(kind)
                ax.set_xlabel(label)
            axes[0].set_ylabel(f"{rows.metric.iloc[0].replace('_', ' ')} (reporting split, ± 1 SE)")
            over = "beta" if x == "beta" else "KL"
            fig.suptitle(f"{stem}: quality over {over}, best lr per beta; ring: chosen on the selection split")
            path = target / f"{stem}_{figure}.svg"
            # Fixed salt and no date: the same results give the same bytes.
            with rc_context({"svg.hashsalt": "alignment-sweep"}):
                fig.savefig(path, metadata={"Date": None})
            fig.savefig(path.with_suffix(".png"), dpi=150)
            written.append(path)
    return written


def _panel(ax: Axes, rows: pd.DataFrame, best: pd.DataFrame, x: str, x_error: str | None) -> None:
    ax.set_xscale("log")
    ax.grid(alpha=0.3)
    ax.xaxis.set_major_locator(LogLocator(numticks=12))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.spines[["top", "right"]].set_visible(False)
    for method, line in rows.groupby("method", sort=False):
        colour, marker = STYLES[str(method)]
        # A KL estimate of a barely moved policy can be below zero, which a log axis cannot show.
        line = line[line[x] > 0]
        ax.errorbar(
            line[x],
            line.quality_reporting,
            yerr=line.quality_reporting_se,
            xerr=None if x_error is None else line[x_error].clip(upper=0.9 * line[x]),
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.5,
            capsize=2,
            label=NAMES[str(method)],
        )
        chosen = best[(best.method == method) & (best[x] > 0)]
        ax.plot(chosen[x], chosen.quality_reporting, "o", markersize=13, markerfacecolor="none", markeredgecolor=colour)
    if len(rows):
        ax.legend(frameon=False, loc="lower center" if x == "beta" else "best")
