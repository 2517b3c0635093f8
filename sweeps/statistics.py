"""Choosing on one split and reporting on the other."""

from __future__ import annotations

import math

import pandas as pd

# What a beta and lr are chosen for: points that differ in anything else are studies of their own.
STUDY = ["setup", "method", "init", "variant"]
MEANS = ["quality", "quality_selection", "quality_reporting", "kl_sequence", "kl_token"]


def over_seeds(points: pd.DataFrame) -> pd.DataFrame:
    """One row per study, beta and lr, averaged over seeds; `seeds` says over how many, `identities` over which.

    points: rows of points.csv. Points that are not done, or whose quality is not a number, do not count. The
    standard error of an average is the larger of the spread over seeds / sqrt(n) and what the prompts alone leave.
    """
    done = points[(points.state == "done") & points.quality_selection.notna()]
    rows = []
    for _, group in done.groupby([*STUDY, "beta", "lr"], sort=False, dropna=False):
        row = group.iloc[0].to_dict() | {"seeds": len(group), "identities": list(group.identity)}
        if len(group) > 1:
            for name in MEANS:
                spread = group[name].std(ddof=1) / math.sqrt(len(group))
                row[name] = group[name].mean()
                row[f"{name}_se"] = max(spread, math.sqrt((group[f"{name}_se"] ** 2).mean() / len(group)))
            for name in ("reward_accuracy", "reward_margin", "response_tokens"):
                row[name] = group[name].mean()
            row["seconds"] = group.seconds.sum()
        rows.append(row)
    return pd.DataFrame(rows, columns=[*points.columns, "seeds", "identities"])


def per_beta(points: pd.DataFrame) -> pd.DataFrame:
    """One row per study and beta: its best lr by quality_selection, the smaller of equals. What the figures show."""
    ordered = over_seeds(points).sort_values(["quality_selection", "lr"], ascending=[False, True], kind="stable")
    rows = ordered.groupby([*STUDY, "beta"], sort=False, dropna=False).head(1)
    return rows.sort_values([*STUDY, "beta"]).reset_index(drop=True)


def best_points(points: pd.DataFrame) -> pd.DataFrame:
    """One row per study: the best beta of per_beta by quality_selection; of equals the larger, which stays nearer to
    the start."""
    ordered = per_beta(points).sort_values(["quality_selection", "beta"], ascending=[False, False], kind="stable")
    best = ordered.groupby(STUDY, sort=False, dropna=False).head(1)
    order = ["setup", "init", "quality_reporting"]
    return best.sort_values(order, ascending=[True, False, False], kind="stable").reset_index(drop=True)
