"""The paper's tables beside one's own results, for its setups."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from sweeps.analysis.results import Results
from sweeps.report.plot_style import NAMES
from sweeps.report.tables import quality_column, with_error

FILE = Path(__file__).with_name("published.yaml")
# What a row of the paper is the best of, besides beta and lr, or says itself.
TUNED = {"init.sft_weight", "init.align_weight", "trainer.align.epochs", "dataset.name"}
SFT_WEIGHTS = {"sft": 0.0, "base": 1.0}  # of an init whose weight a sweep does not set (conf/init)


def published_tables(results: Results, best: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the tables of this sweep's setups and datasets: setup, source, columns, and rows of cells.

    `ours`: what the last cell of a row is: of the points that a row of the paper stands for, the best one by the
    selection split, on the reporting split. best: of with_intervals.
    """
    rows, tables = [(row, _settings(results, row)) for row in best.to_dict("records")], []
    for table in yaml.safe_load(FILE.read_text(encoding="utf-8")):
        of_table = [
            (row, settings)
            for row, settings in rows
            if row["setup"] == table["setup"] and settings.get("dataset.name", table["dataset"]) == table["dataset"]
        ]
        if of_table:
            cells = [(_name(row), *row["values"], _own(row, of_table)) for row in table["rows"]]
            ours = quality_column(pd.DataFrame([row for row, _ in of_table]))
            tables.append({**table, "rows": cells, "ours": ours})
    return tables


def _settings(results: Results, row: dict[Hashable, Any]) -> dict[str, Any]:
    """Return the settings that the row's point has in common with others of its sweep, and its own."""
    study = {name: row[name] for name in ("setup", "method", "init")}
    shared: dict[str, Any] = {}
    for sweep in results.sweeps:
        shared |= next((s["settings"] for s in sweep["studies"] if study.items() <= s.items()), {})
    return shared | results.settings.get(row["identities"][0], {})


def _own(published: dict[str, Any], rows: list[tuple[dict[Hashable, Any], dict[str, Any]]]) -> str:
    init, has_sft_term = published.get("init", "sft"), published.get("sft_term", False)
    candidates = [
        row
        for row, settings in rows
        if (row["method"], row["init"]) == (published["method"], init)
        and (settings.get("init.sft_weight", SFT_WEIGHTS[init]) > 0) == has_sft_term
        and {setting.partition("=")[0] for setting in row["variant"].split()} <= TUNED
    ]
    if not candidates:
        return "-"
    row = max(candidates, key=lambda row: row["quality_selection"])
    return with_error(row["quality_reporting"], row["quality_reporting_se"], 3)


def _name(published: dict[str, Any]) -> str:
    start = "" if published.get("init", "sft") == "sft" else " from the base model"
    term = ", with the SFT term" if published.get("sft_term") else ""
    return {"sft": "SFT", **NAMES}[published["method"]] + start + term
