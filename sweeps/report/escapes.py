"""Texts of users as cells of CSV, Markdown and LaTeX tables and as labels of figures."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

# What spreadsheets take for a formula, or skip before looking for one. A negative number is none.
_FORMULA = re.compile(r"[=+@\t\r]|-(?![\d.]*(?: ± [\d.]+)?$)")
_MARKDOWN = str.maketrans({"\\": r"\\", "|": r"\|", "`": r"\`", "<": "&lt;", "&": "&amp;"})
_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
    }
)


def csv_text(table: pd.DataFrame) -> bytes:
    """Return a table as CSV; texts that a spreadsheet would run as formulas begin with an apostrophe."""
    return table.map(_csv_cell).to_csv(index=False).encode()


def _csv_cell(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    text = cell.replace("\r", "\n")  # a carriage return alone is not quoted, but ends a line for some readers
    return f"'{text}" if _FORMULA.match(cell) else text


def markdown_cell(text: str) -> str:
    return printable(text).translate(_MARKDOWN)


def latex_cell(text: str) -> str:
    escaped = printable(text).translate(_LATEX)
    return "{}" + escaped if escaped.startswith(("[", "*")) else escaped  # else an argument of the \\ before it


def printable(text: str) -> str:
    """Return the text on one line, with a replacement for characters that have no picture."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
