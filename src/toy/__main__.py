"""The toy experiment (paper, v3, appendix F): `python -m src.toy [key=value ...]`; conf/toy.yaml explains the keys.

The full grid takes minutes on 2 cores, less with `seeds=50 lr_seeds=20`. Networks that were trained before are reused.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from src.errors import report_errors
from src.progress import RunProgress
from src.store.files import atomic_write
from src.toy.settings import Toy, check
from src.toy.study import Z95, run


@hydra.main(version_base="1.3", config_path="../../conf", config_name="toy")
def toy(cfg: DictConfig) -> None:
    """Train the grid, write its tables and its figure, and print the tables."""
    with report_errors():
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
    lines = [
        "| bias | h | objective | kind | lr | dead | accuracy | accuracy, living | ICC1, living |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table.to_dict("records"):
        values = [_value(row, name) for name in ("accuracy", "accuracy_alive", "icc1")]
        cells = [f"{row['bias']:g}", row["width"], row["objective"], row["kind"], f"{row['lr']:g}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['dead']} of {row['seeds']}", *values])) + " |")
    return "\n".join(lines) + "\n"


def kinds_as_markdown(kinds: pd.DataFrame) -> str:
    """Return the means per kind of objective, and their differences paired by seed."""
    lines = [
        "| bias | h | accuracy, pairwise | pointwise | difference | ICC1, pairwise | pointwise | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in kinds.to_dict("records"):
        values = [
            _value(row, f"{n}_{k}") for n in ("accuracy", "icc1") for k in ("pairwise", "pointwise", "difference")
        ]
        lines.append("| " + " | ".join([f"{row['bias']:g}", str(row["width"]), *values]) + " |")
    return "\n".join(lines) + "\n"


def _value(row: dict[Hashable, Any], name: str) -> str:
    return f"{row[name]:.4f} ± {Z95 * row[f'{name}_se']:.4f}"


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach report_errors, and a user gets one line, not a traceback
    ConfigStore.instance().store(name="toy_schema", node=Toy)
    with report_errors():
        toy()


if __name__ == "__main__":
    main()
