"""Tables as files: Markdown, CSV and LaTeX (booktabs)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from src.store.files import atomic_write
from sweeps.report.escapes import csv_text, latex_cell, markdown_cell


def write_tables(folder: Path, tables: dict[str, pd.DataFrame]) -> None:
    """Write NAME.csv, .md and .tex (booktabs): numbers in full precision in CSV, with four digits in the others.

    A table without columns is left out, also where an earlier one is: no benchmark was run, or no judge.
    """
    write_formats(folder, {name: _formats(table) for name, table in tables.items()})


def write_formats(folder: Path, tables: Mapping[str, Mapping[str, str | bytes]]) -> None:
    """Write the formats of each table, suffix -> content, as NAME.SUFFIX; remove the files of one without any."""
    folder.mkdir(exist_ok=True)
    for name, formats in tables.items():
        for suffix, content in formats.items():
            atomic_write(folder / f"{name}.{suffix}", content)
        if not formats:
            for path in folder.glob(f"{name}.*"):
                path.unlink()


def _formats(table: pd.DataFrame) -> dict[str, str | bytes]:
    if table.columns.empty:
        return {}
    text = table.astype(object).map(_cell)
    tex = text.map(latex_cell).rename(columns=latex_cell)
    return {
        "csv": csv_text(table),
        "md": markdown_text(list(text.columns), text.map(markdown_cell).to_numpy().tolist()),
        "tex": tex.to_latex(index=False, column_format="l" * len(text.columns)),
    }


def markdown_text(columns: list[str], rows: list[list[str]]) -> str:
    """Return a table of Markdown cells."""
    return "".join(f"| {' | '.join(row)} |\n" for row in [columns, ["---"] * len(columns), *rows])


def _cell(value: Any) -> str:
    """Return a number with four digits, a missing value as a dash."""
    return "-" if pd.isna(value) else f"{value:.4g}" if isinstance(value, float) else str(value)
