"""The paper's tables beside one's own results, for its setups, and its results as points of figures."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from src.config.schema import CONF_DIR
from sweeps.analysis.results import Results
from sweeps.analysis.selection import GROUP
from sweeps.report.paper_rows import TUNED, PaperRow, paper_row, settings_of
from sweeps.report.plot_style import NAMES
from sweeps.report.tables import quality_column, with_error

FILE = Path(__file__).with_name("published.yaml")


def published_tables(results: Results, best: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the tables of this sweep's setups and datasets: setup, source, columns, and rows of cells.

    `ours`: what the last cell of a row is: of the points that a row of the paper stands for, the best one by the
    selection split, on the reporting split. best: of with_intervals.
    """
    rows, tables = [(row, settings_of(results, row)) for row in best.to_dict("records")], []
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


def _own(published: dict[str, Any], rows: list[tuple[dict[Hashable, Any], dict[str, Any]]]) -> str:
    wanted = PaperRow(published.get("init", "sft"), published.get("sft_term", False), published["method"])
    candidates = [row for row, settings in rows if paper_row(row, settings) == wanted and _is_of_the_paper(row)]
    if not candidates:
        return "-"
    row = max(candidates, key=lambda row: row["quality_selection"])
    return with_error(row["quality_reporting"], row["quality_reporting_se"], 3)


def published_points(results: Results, best: pd.DataFrame) -> pd.DataFrame:
    """Return what the paper has of the selected methods in the quality of the figures, at the betas of its Table 7.

    Columns: setup, init, variant, method, beta, quality, quality_se (missing where not published) and source. None of
    another judge, baseline, dataset, init or loss. The paper has no KL of its points. best: of select_points.
    """
    tables = [table for table in yaml.safe_load(FILE.read_text(encoding="utf-8")) if "judge" in table]
    points = []
    for row in best[best.metric == "win_rate"].to_dict("records"):
        settings = settings_of(results, row)
        for table in tables:
            if _is_comparable(row, settings, table):
                values = {of["method"]: of["values"][table["quality"]] for of in table["rows"]}
                group = {name: row[name] for name in (*GROUP, "method")}
                points += [group | point for point in _points(row["method"], table, values.get(row["method"]))]
    return pd.DataFrame(points, columns=[*GROUP, "method", "beta", "quality", "quality_se", "source"])


def _is_comparable(row: dict[Hashable, Any], settings: dict[str, Any], table: dict[str, Any]) -> bool:
    """Return whether the win rate of a point is the quantity that the table has."""
    is_of_table = row["setup"] == table["setup"] and settings.get("dataset.name") == table["dataset"]
    judge, baseline = settings.get("judge.name"), settings.get("judge.baseline")
    has_baseline = baseline == "chosen" if judge == "tldr" else baseline not in (None, "sft", "chosen")
    is_of_table &= paper_row(row, settings).is_two_stage
    is_of_table &= _is_of_the_paper(row, ignore=("judge.", "evaluation.name"))
    return is_of_table and judge == table["judge"] and has_baseline


def _points(method: str, table: dict[str, Any], cell: str | None) -> Iterator[dict[str, Any]]:
    """Yield the published result at the best beta, and where the gain of tuning is published that at beta = 1."""
    setup = yaml.safe_load((CONF_DIR / "setup" / f"{table['setup']}.yaml").read_text(encoding="utf-8"))
    if cell is None or method not in setup["setup"]["best"]:
        return
    numbers = [float(number) / 100 for number in re.findall(r"[\d.]+", cell)]
    is_share = "/" in cell  # win / tie / lose
    quality, error = (numbers[0] + numbers[1] / 2, math.nan) if is_share else (numbers[0], numbers[1])
    beta = setup["setup"]["best"][method]["beta"]
    yield {"beta": beta, "quality": quality, "quality_se": error, "source": table["source"]}
    if (gain := table.get("gains", {}).get(method)) is not None:
        source = f"{table['source']}, less its gain over beta = 1"
        yield {"beta": 1.0, "quality": quality - gain / 100, "quality_se": math.nan, "source": source}


def _is_of_the_paper(row: dict[Hashable, Any], ignore: tuple[str, ...] = ()) -> bool:
    """Return whether a point varies in nothing but what a row of the paper is the best of, or says itself.

    ignore: starts of settings that may vary as well.
    """
    keys = {setting.partition("=")[0] for setting in row["variant"].split()}
    return {key for key in keys if not key.startswith(ignore)} <= {*TUNED, "dataset.name"}


def _name(published: dict[str, Any]) -> str:
    start = "" if published.get("init", "sft") == "sft" else " from the base model"
    term = ", with the SFT term" if published.get("sft_term") else ""
    return {"sft": "SFT", **NAMES}[published["method"]] + start + term
