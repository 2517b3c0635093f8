"""What the reporting prompts say of the points that were chosen: intervals, differences, what tuning beta gained."""

from __future__ import annotations

from typing import Any

import pandas as pd

from src.methods import METHODS
from sweeps.analysis.per_prompt import PromptQuality
from sweeps.analysis.selection import GROUP, STUDY, per_beta
from sweeps.analysis.significance import bootstrap_means, interval, on_pareto_front, paired_differences, paired_p

TOP = 3


def with_intervals(best: pd.DataFrame, seeds: pd.DataFrame, prompts: PromptQuality) -> pd.DataFrame:
    """best_points with quality_reporting_low and _high, a 95 % bootstrap interval over prompts, and top_reporting: the
    mean quality_reporting of the three points of the study that are best on the selection split (missing below three),
    which one lucky point moves less. seeds: of over_seeds."""
    best = best.assign(quality_reporting_low=float("nan"), quality_reporting_high=float("nan"))
    for _, group in best.groupby(GROUP, sort=False, dropna=False):
        means = bootstrap_means(prompts.reporting(list(group.identities)))
        for column, index in enumerate(group.index):
            best.loc[index, ["quality_reporting_low", "quality_reporting_high"]] = interval(means[:, column])
    rows = seeds.sort_values("quality_selection", ascending=False, kind="stable")
    tops = {
        key: group.quality_reporting[:TOP].mean() if len(group) >= TOP else float("nan")
        for key, group in rows.groupby(STUDY, sort=False, dropna=False)
    }
    return best.assign(top_reporting=[tops[tuple(row)] for row in best[STUDY].itertuples(index=False)])


def differences(best: pd.DataFrame, prompts: PromptQuality) -> pd.DataFrame:
    """Every chosen point of a setup, init and variant against every other, on the reporting prompts."""
    tables = []
    for _, group in best.groupby(GROUP, sort=False, dropna=False):
        table = paired_differences(list(group.method), prompts.reporting(list(group.identities)))
        tables.append(table.assign(**{name: group[name].iloc[0] for name in GROUP}))
    columns = [*GROUP, "method", "other", "difference", "low", "high", "p", "p_holm"]
    return pd.concat(tables)[columns] if tables else pd.DataFrame(columns=columns)


def gains(seeds: pd.DataFrame, best: pd.DataFrame, prompts: PromptQuality) -> pd.DataFrame:
    """What tuning beta gained over leaving it alone: a chosen point against the one of beta = 1, and of the beta that
    TRL takes by itself, each with its own best lr, on the reporting prompts. No row for a beta that was not swept.
    seeds: of over_seeds."""
    tuned, rows = per_beta(seeds), []
    for row in best.to_dict("records"):
        own = tuned[(tuned[STUDY] == pd.Series({name: row[name] for name in STUDY})).all(axis=1)]
        for against, beta in (("beta = 1", 1.0), ("TRL's default", METHODS[row["method"]].trl_beta)):
            for other in own[own.beta == beta].to_dict("records"):
                values = prompts.reporting([row["identities"], other["identities"]])
                means = bootstrap_means(values)
                low, high = interval(means[:, 0] - means[:, 1])
                found: dict[str, Any] = {name: row[name] for name in STUDY}
                found |= {"against": against, "beta": beta, "lr": other["lr"]}
                found |= {"difference": (values[0] - values[1]).mean(), "low": low, "high": high}
                rows.append(found | {"p": paired_p(values[0], values[1])})
    return pd.DataFrame(rows, columns=[*STUDY, "against", "beta", "lr", "difference", "low", "high", "p"])


def fronts(seeds: pd.DataFrame) -> pd.DataFrame:
    """One row per study and beta, at its best lr: is it on the Pareto front (quality_reporting, kl_sequence) of its own
    method, and of all methods of its kind (pairwise, pointwise)? seeds: of over_seeds."""
    rows = per_beta(seeds)
    for name, keys in (("front_of_method", STUDY), ("front_of_kind", [*GROUP, "kind"])):
        rows[name] = False
        for _, group in rows.groupby(keys, sort=False, dropna=False):
            rows.loc[group.index, name] = on_pareto_front(group.quality_reporting.tolist(), group.kl_sequence.tolist())
    shown = ["quality_reporting", "quality_reporting_se", "kl_sequence", "kl_sequence_se"]
    return rows[[*STUDY, "kind", "beta", "lr", *shown, "front_of_method", "front_of_kind"]]
