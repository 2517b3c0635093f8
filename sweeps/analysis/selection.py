"""Choosing on one split and reporting on the other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from sweeps.analysis.per_prompt import PromptQuality

# What a beta and lr are chosen for: points that differ in anything else are studies of their own.
STUDY = ["setup", "method", "init", "variant"]
GROUP = ["setup", "init", "variant"]  # methods of one are compared with each other
MEANS = ["quality", "quality_selection", "quality_reporting", "kl_sequence", "kl_token"]


def over_seeds(points: pd.DataFrame) -> pd.DataFrame:
    """One row per study, beta and lr, averaged over seeds; `seeds` says over how many, `identities` over which.

    points: rows of points.csv. Points that are not done, or whose quality is not a number, do not count. The
    standard error of an average is the larger of the spread over seeds / sqrt(n) and what the prompts alone leave.
    """
    done = points[(points.state == "done") & points.quality_selection.notna()]
    keys = [*STUDY, "beta", "lr"]
    groups = done.groupby(keys, sort=False, dropna=False)
    first = ~done.duplicated(keys)
    count = groups.identity.transform("size")
    rows = done.assign(seeds=count)
    several = count > 1
    for name in MEANS:
        spread = groups[name].transform("std") / count**0.5
        prompts = (done[f"{name}_se"] ** 2).groupby([done[key] for key in keys], dropna=False).transform("mean")
        rows.loc[several, name] = groups[name].transform("mean")[several]
        rows.loc[several, f"{name}_se"] = np.fmax(spread, (prompts / count) ** 0.5)[several]
    for name in ("reward_accuracy", "reward_margin", "response_tokens"):
        rows[name] = groups[name].transform("mean")
    rows["seconds"] = groups.seconds.transform("sum")
    return rows[first].assign(identities=groups.identity.agg(list).to_numpy())


def per_beta(seeds: pd.DataFrame) -> pd.DataFrame:
    """One row per study and beta: its best lr by quality_selection, the smaller of equals. What the figures show.
    seeds: of over_seeds."""
    ordered = seeds.sort_values(["quality_selection", "lr"], ascending=[False, True], kind="stable")
    rows = ordered.groupby([*STUDY, "beta"], sort=False, dropna=False).head(1)
    return rows.sort_values([*STUDY, "beta"]).reset_index(drop=True)


def best_points(seeds: pd.DataFrame) -> pd.DataFrame:
    """One row per study: the best beta of per_beta by quality_selection; of equals the larger, which stays nearer to
    the start. seeds: of over_seeds."""
    ordered = per_beta(seeds).sort_values(["quality_selection", "beta"], ascending=[False, False], kind="stable")
    return _in_order(ordered.groupby(STUDY, sort=False, dropna=False).head(1))


def chosen_points(seeds: pd.DataFrame, rule: str, prompts: PromptQuality) -> pd.DataFrame:
    """One row per study, `shortlist` saying how many points it has. rule `best`: that of best_points.
    `lowest_kl_in_shortlist`: the one of the lowest KL among those. seeds: of over_seeds."""
    chosen = []
    for row in best_points(seeds).to_dict("records"):
        study = seeds[(seeds[STUDY] == pd.Series({name: row[name] for name in STUDY})).all(axis=1)]
        near = shortlist(study, row["identities"], prompts)
        own = near.sort_values("kl_sequence", kind="stable").iloc[0].to_dict() if rule != "best" else row
        chosen.append(own | {"shortlist": len(near)})
    return _in_order(pd.DataFrame(chosen, columns=[*seeds.columns, "shortlist"]))


def _in_order(best: pd.DataFrame) -> pd.DataFrame:
    order = ["setup", "init", "quality_reporting"]
    return best.sort_values(order, ascending=[True, False, False], kind="stable").reset_index(drop=True)


def shortlist(study: pd.DataFrame, best: list[str], prompts: PromptQuality, level: float = 0.95) -> pd.DataFrame:
    """Rows of a study (of over_seeds) that the selection prompts cannot tell from its best one, whose identities are
    `best`: the paired difference to it is below what a two-sided t-test finds at this level. The best one is one."""
    from scipy.stats import t

    values = prompts.selection([best, *study.identities])
    difference = values[0] - values[1:]
    n = difference.shape[1]
    if n < 2:
        return study
    reach = t.ppf((1 + level) / 2, n - 1) / math.sqrt(n)
    return study[difference.mean(1) <= reach * difference.std(1, ddof=1) + 1e-12]
