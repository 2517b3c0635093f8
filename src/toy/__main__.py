"""The toy experiment (paper, v3, appendix F): `python -m src.toy [key=value ...]`; conf/toy.yaml explains the keys.

The full grid takes minutes on 2 cores, less with `seeds=50 lr_seeds=20`. Networks that were trained before are reused.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from src.errors import report_errors
from src.progress import RunProgress
from src.store.files import atomic_write
from src.toy.study import Z95, Toy, check, run


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

    from src.toy.figure import draw  # matplotlib is slow to import

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


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach report_errors, and a user gets one line, not a traceback
    ConfigStore.instance().store(name="toy_schema", node=Toy)
    with report_errors():
        toy()


if __name__ == "__main__":
    main()
