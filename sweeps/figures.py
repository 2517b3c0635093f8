"""The figures of a sweep: quality over beta and quality over KL, pairwise and pointwise side by side."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from src.methods import METHODS
from sweeps.statistics import per_beta

# One colour and marker a method in every figure (Okabe-Ito: told apart by colour-blind readers too).
LOOKS = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D")]
STYLES = {
    method: LOOKS[[m for m in METHODS if METHODS[m].kind == spec.kind].index(method)]
    for method, spec in METHODS.items()
}
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
KINDS = ("pairwise", "pointwise")


def write(folder: Path, points: pd.DataFrame, best: pd.DataFrame) -> list[Path]:
    """figures/<setup>[_<init>][_<variant>]_<figure>.png and .svg; returns the SVGs."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it announces its font cache
    target = folder / "figures"
    target.mkdir(exist_ok=True)
    written = []
    keys = ["setup", "init", "variant"]
    for (setup, init, variant), rows in per_beta(points).groupby(keys, sort=False):
        chosen = best[(best.setup == setup) & (best.init == init) & (best.variant == variant)]
        stem = "_".join([str(setup)] + ([] if init == "sft" else [str(init)]) + re.findall(r"[\w.=-]+", str(variant)))
        for x, draw in (("beta", over_beta), ("KL", over_kl)):
            fig = draw(rows, chosen)
            fig.suptitle(f"{stem}: quality over {x}, best lr per beta; ring: chosen on the selection split")
            path = target / f"{stem}_quality_over_{x.lower()}.svg"
            # Fixed salt and no date: the same results give the same bytes.
            with rc_context({"svg.hashsalt": "alignment-sweep"}):
                fig.savefig(path, metadata={"Date": None})
            fig.savefig(path.with_suffix(".png"), dpi=150)
            written.append(path)
    return written


def over_beta(rows: pd.DataFrame, best: pd.DataFrame) -> Figure:
    """A panel a method, since each has a beta range of its own; pairwise above pointwise, one quality axis."""
    methods = {kind: [m for m in METHODS if m in set(rows.method) and METHODS[m].kind == kind] for kind in KINDS}
    kinds = [kind for kind in KINDS if methods[kind]]
    columns = max(len(methods[kind]) for kind in kinds)
    fig = Figure(figsize=(max(6, 2.6 * columns), 2.7 * len(kinds) + 0.6), layout="constrained")
    grid = fig.subplots(len(kinds), columns, sharey=True, squeeze=False)
    for axes, kind in zip(grid, kinds, strict=True):
        axes[0].set_ylabel(f"{kind}\n{_quality(rows)}")
        for ax, method in zip(axes, [*methods[kind], *[None] * columns], strict=False):
            if method is None:
                ax.set_visible(False)
                continue
            _line(ax, rows[rows.method == method], best, method, "beta", None)
            ax.set_title(NAMES[method])
            ax.set_xlabel("beta")
    return fig


def over_kl(rows: pd.DataFrame, best: pd.DataFrame) -> Figure:
    """Pairwise beside pointwise, one point a beta."""
    kinds = [kind for kind in KINDS if kind in set(rows.kind)]
    fig = Figure(figsize=(5.2 * len(kinds), 4.2), layout="constrained")
    grid = fig.subplots(1, len(kinds), sharey=True, sharex=True, squeeze=False)
    for ax, kind in zip(grid[0], kinds, strict=True):
        for method, line in rows[rows.kind == kind].sort_values("beta").groupby("method", sort=False):
            _line(ax, line, best, str(method), "kl_sequence", "kl_sequence_se")
        ax.set_title(kind)
        ax.set_xlabel("KL to the initial checkpoint, nats per sequence")
        ax.legend(frameon=False)
    grid[0][0].set_ylabel(_quality(rows))
    return fig


def _quality(rows: pd.DataFrame) -> str:
    return f"{rows.metric.iloc[0].replace('_', ' ')} ± 1 SE"


def _line(ax: Axes, line: pd.DataFrame, best: pd.DataFrame, method: str, x: str, x_error: str | None) -> None:
    colour, marker = STYLES[method]
    ax.set_xscale("log")
    ax.grid(alpha=0.3)
    ax.xaxis.set_major_locator(LogLocator(numticks=4))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.spines[["top", "right"]].set_visible(False)
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
        label=NAMES[method],
    )
    chosen = best[(best.method == method) & (best[x] > 0)]
    ax.plot(chosen[x], chosen.quality_reporting, "o", markersize=13, markerfacecolor="none", markeredgecolor=colour)
