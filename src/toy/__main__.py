"""The toy experiment (paper, v3, appendix F): `python -m src.toy [key=value ...]`; conf/toy.yaml explains the keys.

The full grid takes minutes on 2 cores, less with `seeds=50 lr_seeds=20`. Networks that were trained before are reused.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from src.config.command_line import check_command_line
from src.errors import report_errors
from src.progress import RunProgress
from src.store.files import atomic_write
from src.toy.study import Z95, Toy, check, run

_STYLES = {  # Okabe-Ito, as in a sweep's figures
    "dpo": ("DPO = SimPO = ORPO", "#0072B2", "o"),
    "ipo": ("IPO", "#D55E00", "s"),
    "asft": ("ASFT", "#0072B2", "o"),
    "apo_zero": ("APO-Zero", "#D55E00", "s"),
    "nca": ("NCA", "#009E73", "^"),
    "cal_dpo": ("Cal-DPO", "#CC79A7", "D"),
}


@hydra.main(version_base="1.3", config_path="../../conf", config_name="toy")
def toy(cfg: DictConfig) -> None:
    """Train the grid, write its tables and its figure, and print the tables."""
    settings = OmegaConf.to_object(cfg)
    assert isinstance(settings, Toy)
    check(settings)
    with RunProgress() as report:
        table, kinds = run(settings, report)
    folder = Path(settings.output_dir) / "toy"
    table.to_csv(folder / "toy.csv", index=False)
    kinds.to_csv(folder / "kinds.csv", index=False)
    text = f"{as_markdown(table)}\n{kinds_as_markdown(kinds)}"
    atomic_write(folder / "toy.md", text)
    draw(table, folder)
    print(text)
    print(f"table: {folder / 'toy.md'}, {folder / 'toy.csv'}; figure: {folder / 'toy.png'}")


def as_markdown(table: pd.DataFrame) -> str:
    """Return the means with 95 % intervals, and the number of dead networks, one line per setting."""
    header = ["bias", "h", "objective", "kind", "lr", "dead", "accuracy", "accuracy, living", "ICC1, living"]
    rows = []
    for row in table.to_dict("records"):
        cells = [f"{row['bias']:g}", row["width"], row["objective"], row["kind"], f"{row['lr']:g}"]
        means = [_interval(row, name) for name in ("accuracy", "accuracy_alive", "icc1")]
        rows.append([*cells, f"{row['dead']} of {row['seeds']}", *means])
    return _markdown(header, rows)


def kinds_as_markdown(kinds: pd.DataFrame) -> str:
    """Return the means per kind of objective, and their differences paired by seed."""
    columns = ("pairwise", "pointwise", "difference")
    header = ["bias", "h", "accuracy, pairwise", *columns[1:], "ICC1, pairwise", *columns[1:]]
    means = [f"{name}_{column}" for name in ("accuracy", "icc1") for column in columns]
    return _markdown(
        header,
        [
            [f"{row['bias']:g}", row["width"], *(_interval(row, name) for name in means)]
            for row in kinds.to_dict("records")
        ],
    )


def _interval(row: dict[Any, Any], name: str) -> str:
    return f"{row[name]:.4f} ± {Z95 * row[f'{name}_se']:.4f}"


def _markdown(header: list[str], rows: list[list[Any]]) -> str:
    first, *lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, *rows)]
    return "\n".join([first, "|" + "---|" * len(header), *lines]) + "\n"


def draw(table: pd.DataFrame, folder: Path) -> None:
    """Write toy.png and toy.svg of the first table of `run`: accuracy, ICC1 and dead networks over the width."""
    from matplotlib.figure import Figure  # slow to import

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
                linestyle = "-" if group.kind.iloc[0] == "pairwise" else "--"
                style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": linestyle, "markersize": 4}
                ax.errorbar(x, y, yerr=error, label=title, linewidth=1.2, capsize=2, **style)
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


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach report_errors, and a user gets one line, not a traceback
    ConfigStore.instance().store(name="toy_schema", node=Toy)
    with report_errors():
        check_command_line(sys.argv[1:])
        toy()


if __name__ == "__main__":
    main()
