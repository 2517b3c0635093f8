"""Measurements of the selected points on the reporting prompts: intervals, verdicts, differences, gains of tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from src.methods import METHODS
from sweeps.analysis.results import PromptQuality, Results
from sweeps.analysis.selection import GROUP, STUDY, average_seeds, best_lr_per_beta, select_points
from sweeps.analysis.significance import (
    COMPARISON,
    bootstrap_means,
    compare,
    interval,
    on_pareto_front,
    paired_differences,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERDICTS = ("win", "tie", "lose")
NUM_TOP = 3  # points whose mean quality stands beside the selected one's


def reported(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that were measured on the reporting split: with judge.reporting=selected not all are."""
    return rows[rows.quality_reporting.notna()].copy()


def selected_points(results: Results, rule: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the points averaged over seeds, and those of them that are selected, with their intervals.

    rule: of sweep.select.
    """
    averages = average_seeds(results.points[results.points.candidate])
    return averages, with_intervals(select_points(averages, rule, results.prompts), averages, results.prompts)


def with_intervals(best: pd.DataFrame, averages: pd.DataFrame, prompts: PromptQuality) -> pd.DataFrame:
    """Add quality_reporting_low and _high (95 % bootstrap interval over prompts) and top3_reporting to selected points.

    top3_reporting is the mean quality_reporting of the three points of the study that are best on the selection split
    (missing with fewer points, or where one was not judged on it): one lucky point changes it less. averages: of
    average_seeds.
    """
    best = best.assign(quality_reporting_low=float("nan"), quality_reporting_high=float("nan"))
    for _, group in reported(best).groupby(GROUP, sort=False, dropna=False):
        means = bootstrap_means(prompts.reporting(list(group.identities)))
        for column, index in enumerate(group.index):
            best.loc[index, ["quality_reporting_low", "quality_reporting_high"]] = interval(means[:, column])
    rows = averages.sort_values("quality_selection", ascending=False, kind="stable")
    top_means = {
        key: group.quality_reporting[:NUM_TOP].mean(skipna=False) if len(group) >= NUM_TOP else float("nan")
        for key, group in rows.groupby(STUDY, sort=False, dropna=False)
    }
    return best.assign(top3_reporting=[top_means[tuple(row)] for row in best[STUDY].itertuples(index=False)])


def verdicts(best: pd.DataFrame, prompts: PromptQuality) -> pd.DataFrame:
    """Return `win`, `tie` and `lose`: percent of the `prompts` on which each selected point is above, at, below 0.5.

    One row per selected point whose metric is the win rate; averaged over its seeds. A judge with graded verdicts
    gives a win for anything above 0.5, so that win + tie / 2 is the win rate only of verdicts that are 0, 0.5 or 1.
    """
    rows = []
    for row in reported(best[best.metric == "win_rate"]).to_dict("records"):
        seeds = [prompts.reporting([[identity]])[0] for identity in row["identities"]]
        measured = win_tie_lose(seeds) | {"quality_reporting": row["quality_reporting"]}
        rows.append({name: row[name] for name in (*STUDY, "beta", "lr", "seeds")} | measured)
    return pd.DataFrame(rows, columns=[*STUDY, "beta", "lr", "seeds", *VERDICTS, "prompts", "quality_reporting"])


def win_tie_lose(seeds: list[NDArray[np.float64]]) -> dict[str, float]:
    """Return the percent of prompts above, at and below 0.5, averaged over seeds, and the number of `prompts`."""
    shares = [[np.mean(values > 0.5), np.mean(values == 0.5), np.mean(values < 0.5)] for values in seeds]
    return dict(zip(VERDICTS, 100 * np.mean(shares, axis=0), strict=True)) | {"prompts": len(seeds[0])}


def differences(best: pd.DataFrame, prompts: PromptQuality) -> pd.DataFrame:
    """Compare the selected points of each setup, init and variant pairwise on the reporting prompts."""
    tables = []
    for _, group in reported(best).groupby(GROUP, sort=False, dropna=False):
        table = paired_differences(list(group.method), prompts.reporting(list(group.identities)))
        tables.append(table.assign(**{name: group[name].iloc[0] for name in GROUP}))
    columns = [*GROUP, "method", "other", *COMPARISON, "p_holm"]
    return pd.concat(tables)[columns] if tables else pd.DataFrame(columns=columns)


def gains(averages: pd.DataFrame, best: pd.DataFrame, prompts: PromptQuality) -> pd.DataFrame:
    """Compute the gain of the tuned beta over beta = 1 and over TRL's default on the reporting split.

    Each beta is taken at its own best lr. A beta that was not swept has no row. averages: of average_seeds.
    """
    best_lrs, rows = reported(best_lr_per_beta(averages)), []
    for row in reported(best).to_dict("records"):
        study = {name: row[name] for name in STUDY}
        untuned = best_lrs[(best_lrs[STUDY] == pd.Series(study)).all(axis=1)]
        for against, beta in (("beta = 1", 1.0), ("TRL's default", METHODS[row["method"]].trl_beta)):
            for other in untuned[untuned.beta == beta].to_dict("records"):
                values = prompts.reporting([row["identities"], other["identities"]])
                gain = compare(values, bootstrap_means(values), 0, 1)
                rows.append({**study, "against": against, "beta": beta, "lr": other["lr"], **gain})
    return pd.DataFrame(rows, columns=[*STUDY, "against", "beta", "lr", *COMPARISON])


def pareto_fronts(averages: pd.DataFrame) -> pd.DataFrame:
    """Return one row per study and beta, at its best lr, with whether it is on two Pareto fronts.

    A front maximizes quality_reporting and minimizes kl_sequence, among the points of the method (`front_of_method`)
    and among all methods of its kind, pairwise or pointwise (`front_of_kind`). averages: of average_seeds.
    """
    rows = reported(best_lr_per_beta(averages))
    for name, keys in (("front_of_method", STUDY), ("front_of_kind", [*GROUP, "kind"])):
        rows[name] = False
        for _, group in rows.groupby(keys, sort=False, dropna=False):
            rows.loc[group.index, name] = on_pareto_front(group.quality_reporting.tolist(), group.kl_sequence.tolist())
    measured = ["quality_reporting", "quality_reporting_se", "kl_sequence", "kl_sequence_se"]
    return rows[[*STUDY, "kind", "beta", "lr", *measured, "front_of_method", "front_of_kind"]]
