"""The diagnosis as sections of report.html and as lines on the terminal."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from sweeps.analysis.diagnosis.finding import SEVERITIES
from sweeps.analysis.selection import GROUP
from sweeps.report.plot_style import NAMES

MAX_LINES = 5  # findings on the terminal; the others are counted


def diagnosis_sections(diagnosis: pd.DataFrame) -> list[dict[str, Any]]:
    """Return title, rows and whether it is folded of each part: what selected points have, what others, and notes.

    diagnosis: of diagnose.
    """
    severity, selected = diagnosis.severity, diagnosis.selected.astype(bool)
    parts = (
        ("Selected points and the sweep", selected & (severity != "note"), False),
        ("Severe, of points that were not selected", ~selected & (severity == "severe"), False),
        ("Warnings of points that were not selected", ~selected & (severity == "warning"), True),
        ("Notes", severity == "note", True),
    )
    sections = []
    for title, mask, folded in parts:
        rows = [row | {"point": _point(diagnosis, row)} for row in diagnosis[mask].to_dict("records")]
        if rows or not folded:
            sections.append({"title": f"{title} ({len(rows)})" if folded else title, "rows": rows, "folded": folded})
    return sections


def diagnosis_lines(diagnosis: pd.DataFrame) -> list[str]:
    """Return the number of findings, and those about selected points and the sweep that are no notes."""
    if diagnosis.empty:
        return []
    selected = diagnosis.selected.astype(bool)
    line = f"diagnosis: {_counts(diagnosis[selected])} of the selected points and the sweep"
    if others := int((~selected).sum()):
        line += f"; {_counts(diagnosis[~selected])} of {'other points' if others > 1 else 'another point'}"
    lines = [line]
    worst = diagnosis[selected & (diagnosis.severity != "note")].to_dict("records")
    for row in worst[:MAX_LINES]:
        where = f" of {point}" if (point := _point(diagnosis, row)) else ""
        lines.append(f"  {row['severity']}: {row['rule']}{where}: {row['finding']}")
        lines += [f"    {row['command']}"] if row["command"] else []
    if len(worst) > MAX_LINES:
        lines.append(f"  and {len(worst) - MAX_LINES} more: report.html")
    return lines


def _counts(findings: pd.DataFrame) -> str:
    names = {"severe": "severe findings", "warning": "warnings", "note": "notes"}
    return ", ".join(f"{int((findings.severity == name).sum())} {names[name]}" for name in SEVERITIES)


def _point(diagnosis: pd.DataFrame, row: Mapping[Hashable, Any]) -> str:
    """Return what a finding is about, in words; of setup, init and variant those that differ in the table."""
    parts = [str(row[name]) for name in GROUP if diagnosis[name].nunique() > 1 and row[name]]
    parts += [] if pd.isna(row["method"]) else [NAMES[row["method"]]]
    parts += [f"{name} {row[name]:g}" for name in ("beta", "lr") if not pd.isna(row[name])]
    return ", ".join(parts)
