"""Hyper-parameter selection: best lr per beta, then best beta, on the selection split only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from src.store import selectable

if TYPE_CHECKING:
    from sweeps.analysis.results import PromptQuality

STUDY = list(selectable.STUDY)  # a list, as pandas wants columns
GROUP = ["setup", "init", "variant"]  # methods are compared with each other within a group
MEANS = [
    *("quality", "quality_selection", "quality_reporting"),
    *("kl_sequence", "kl_token", "kl_sequence_rb", "kl_token_rb"),
    *("capability", "capability_change"),
]


def rows_of_study(table: pd.DataFrame, point: Mapping[Any, Any]) -> pd.DataFrame:
    """Return the rows of a table with the columns STUDY that are of the same study as a point."""
    return table[(table[STUDY] == pd.Series({name: point[name] for name in STUDY})).all(axis=1)]


def average_seeds(points: pd.DataFrame) -> pd.DataFrame:
    """Return one row per study, beta and lr, averaged over seeds.

    Adds the columns `seeds` (how many) and `identities` (of their results). Points that are not done, or whose quality
    is NaN, are left out. The standard error of an average is the larger of std over seeds / sqrt(n) and the error
    that the prompts alone cause.

    points: rows of points.csv.
    """
    done = points[(points.state == "done") & points.quality_selection.notna()]
    keys = [*STUDY, "beta", "lr"]
    groups = done.groupby(keys, sort=False, dropna=False)
    count = groups.identity.transform("size")
    rows = done.assign(seeds=count, seconds=groups.seconds.transform("sum"))
    averaged = [*MEANS, "reward_accuracy", "reward_margin", "response_tokens"]
    rows[averaged] = groups[averaged].transform("mean")
    # Seeds of which one was not judged on the reporting prompts have no mean there.
    rows["quality_reporting"] = rows.quality_reporting.where(groups.quality_reporting.transform("count") == count)
    for name in MEANS:
        seed_error = groups[name].transform("std") / count**0.5  # NaN with one seed
        variance = (done[f"{name}_se"] ** 2).groupby([done[key] for key in keys], dropna=False).transform("mean")
        rows[f"{name}_se"] = np.fmax(seed_error, (variance / count) ** 0.5)
    return rows.drop_duplicates(keys).assign(identities=groups.identity.agg(list).to_numpy())


def best_lr_per_beta(averages: pd.DataFrame) -> pd.DataFrame:
    """Return one row per study and beta: its best lr by quality_selection, the smaller of equals.

    averages: of average_seeds.
    """
    ordered = averages.sort_values(["quality_selection", "lr"], ascending=[False, True], kind="stable")
    rows = ordered.groupby([*STUDY, "beta"], sort=False, dropna=False).head(1)
    return rows.sort_values([*STUDY, "beta"]).reset_index(drop=True)


def best_points(averages: pd.DataFrame) -> pd.DataFrame:
    """Return one row per study: the best beta by quality_selection, each at its best lr.

    Of equals the larger beta wins: it regularizes more strongly towards the initial policy. averages: of average_seeds.
    """
    rows = best_lr_per_beta(averages)
    ordered = rows.sort_values(["quality_selection", "beta"], ascending=[False, False], kind="stable")
    return _sorted(ordered.groupby(STUDY, sort=False, dropna=False).head(1))


def select_points(averages: pd.DataFrame, rule: str, prompts: PromptQuality) -> pd.DataFrame:
    """Return the selected point of each study, with the column `shortlist`: how many points its shortlist has.

    rule: `best` selects as best_points does, `lowest_kl_in_shortlist` the lowest KL of the shortlist.
    averages: of average_seeds.
    """
    selected = []
    for best in best_points(averages).to_dict("records"):
        similar = shortlist(rows_of_study(averages, best), best["identities"], prompts)
        row = similar.sort_values("kl_sequence", kind="stable").iloc[0].to_dict() if rule != "best" else best
        selected.append(row | {"shortlist": len(similar)})
    return _sorted(pd.DataFrame(selected, columns=[*averages.columns, "shortlist"]))


def _sorted(best: pd.DataFrame) -> pd.DataFrame:
    order = ["setup", "init", "quality_reporting"]
    return best.sort_values(order, ascending=[True, False, False], kind="stable").reset_index(drop=True)


def shortlist(study: pd.DataFrame, best: list[str], prompts: PromptQuality) -> pd.DataFrame:
    """Return the rows of a study that are not significantly different from its best one, which is among them.

    The test is a two-sided paired t-test at 5 % over the selection prompts. best: identities of the best row's results.
    """
    from scipy.stats import t

    values = prompts.selection([best, *study.identities])
    difference = values[0] - values[1:]
    n = difference.shape[1]
    if n < 2:
        return study
    critical = t.ppf(0.975, n - 1) / math.sqrt(n)
    return study[difference.mean(1) <= critical * difference.std(1, ddof=1) + 1e-12]
