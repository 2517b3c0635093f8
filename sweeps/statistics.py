"""Choosing on one split and reporting on the other."""

from __future__ import annotations

import pandas as pd


def best_points(points: pd.DataFrame) -> pd.DataFrame:
    """One row per (setup, method, init): the best lr per beta, then the best beta, by quality_selection.

    points: rows of points.csv. Points that are not done, or whose quality is not a number, are never chosen.
    Ties go to the larger beta, which stays nearer to the start; then to the smaller lr.
    """
    done = points[(points.state == "done") & points.quality_selection.notna()]
    ordered = done.sort_values(["quality_selection", "beta", "lr"], ascending=[False, False, True], kind="stable")
    per_beta = ordered.groupby(["setup", "method", "init", "beta"], sort=False).head(1)
    best = per_beta.groupby(["setup", "method", "init"], sort=False).head(1)
    return best.sort_values(["setup", "init", "quality_reporting"], ascending=[True, False, False]).reset_index(
        drop=True
    )


def per_beta(points: pd.DataFrame) -> pd.DataFrame:
    """One row per (setup, method, init, beta): its best lr by quality_selection; what the figures show."""
    done = points[(points.state == "done") & points.quality_selection.notna()]
    ordered = done.sort_values(["quality_selection", "lr"], ascending=[False, True], kind="stable")
    rows = ordered.groupby(["setup", "method", "init", "beta"], sort=False).head(1)
    return rows.sort_values(["setup", "method", "init", "beta"]).reset_index(drop=True)
