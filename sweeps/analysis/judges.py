"""Judges of the same samples: which way each leans, where they agree, and how they rank the selected points."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from src.errors import DamagedFile, warn
from src.estimates.power import LEVEL
from src.store.files import read_versioned_json
from src.store.store import RESULT_SCHEMA, VERDICTS_FILE
from sweeps.analysis.reporting_split import win_tie_lose
from sweeps.analysis.selection import GROUP, STUDY
from sweeps.analysis.significance import bootstrap_means, interval, paired_differences

if TYPE_CHECKING:
    from collections.abc import Hashable

    from numpy.typing import NDArray

    from sweeps.analysis.results import Results

SAMPLE = ["identity", "index", "sample", "turn"]  # columns that name a sample of a point
COLUMNS = ["judge", "further", "metric", *SAMPLE, "value", "reporting", "first", "questions", "length"]
MEASURES = {"first": "questions", "longer": "decided"}  # a share -> the column of how many there are


def read_verdicts(results: Results) -> pd.DataFrame:
    """Return every verdict on the samples of the finished points: COLUMNS and GROUP, method, beta and lr of the point.

    first: how many of its `questions` about two answers preferred the one shown first, a tie counting half.
    """
    tables = []
    done = results.points[(results.points.state == "done") & results.points.candidate.astype(bool)]
    for row in done.to_dict("records"):
        folder = results.artifacts(row["identity"], "evaluate")
        assert folder is not None
        try:
            file = read_versioned_json(folder / VERDICTS_FILE, RESULT_SCHEMA)
        except FileNotFoundError:  # without a judge, or of an older version
            continue
        except DamagedFile as error:
            warn(f"{error}; the tables of judges are without it")
            continue
        selection = set(file["selection"])
        for judge, entry in file["judges"].items():
            table = pd.DataFrame({name: entry[name] for name in ("index", "sample", "turn", "value", "length")})
            first = [sum(several) for several in entry["first"]], [len(several) for several in entry["first"]]
            table = table.assign(judge=judge, metric=entry["metric"], first=first[0], questions=first[1])
            table["further"] = entry.get("further", False)
            point = {name: row[name] for name in (*GROUP, "method", "beta", "lr", "identity")}
            tables.append(table.assign(reporting=~table["index"].isin(selection), **point))
    columns = [*COLUMNS, *GROUP, "method", "beta", "lr"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def leanings(verdicts: pd.DataFrame, results: Results) -> pd.DataFrame:
    """Return a row for every judge of a setup, init and variant: how often the first and the longer answer win, noise.

    With 95 % intervals over prompts. `longer` is of comparisons that are decided and whose answers differ in length;
    `equal` of the verdicts of the `repeated` prompts that were asked twice.
    """
    rows = []
    for (*group, judge), table in verdicts.groupby([*GROUP, "judge"], sort=False, dropna=False):
        metric = table.metric.iloc[0]
        row: dict[str, Any] = dict(zip(GROUP, group, strict=True))
        row |= {"judge": judge, "further": bool(table.further.all())}
        row |= {"metric": metric, "verdicts": len(table)}
        decided = table[(table.value != 0.5) & (table.length != 0)] if metric == "win_rate" else table[:0]
        wins = ((decided.value > 0.5) == (decided.length > 0)).astype(float)
        longer = decided.assign(longer=wins, decided=1)
        for (name, count), rows_of in zip(MEASURES.items(), (table, longer), strict=True):
            row |= {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan, count: int(rows_of[count].sum())}
            if row[count]:
                sums = rows_of.groupby("index")[[name, count]].sum().to_numpy(float)
                means = bootstrap_means(sums.T)
                low, high = interval(means[:, 0] / np.maximum(means[:, 1], 1e-12))
                row |= {name: sums[:, 0].sum() / sums[:, 1].sum(), f"{name}_low": low, f"{name}_high": high}
        rows.append(row | _noise(str(judge), tuple(group), results))
    return pd.DataFrame(rows)


def _noise(judge: str, group: tuple[Any, ...], results: Results) -> dict[str, Any]:
    """Return the share of equal verdicts where the judge was asked twice, over a group's points, and how many."""
    usages = [counts for name, of_group, counts in results.repeated if (name, of_group) == (judge, group)]
    verdicts = sum(usage["verdicts"] for usage in usages)
    equal = sum(usage["equal"]["value"] * usage["verdicts"] for usage in usages) / verdicts if verdicts else np.nan
    return {"equal": equal, "repeated": verdicts}


def agreement(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Compare every two judges of the points of a setup, init and variant.

    equal: the share of samples on which both say win, tie or loss (right or wrong). kappa: Cohen's, with its 95 %
    bootstrap interval over prompts; missing for ratings. rank_correlation: Spearman's, of the points by their means
    over the reporting prompts; missing for fewer than three points.
    """
    from scipy.stats import spearmanr

    rows = []
    for key, group in verdicts.groupby(GROUP, sort=False, dropna=False):
        for one, other in combinations(group.judge.unique(), 2):
            both = group[group.judge == one].merge(group[group.judge == other], on=SAMPLE, suffixes=("", "_other"))
            row = dict(zip(GROUP, key, strict=True)) | {"judge": one, "other": other, "samples": len(both)}
            measured = dict.fromkeys(("equal", "kappa", "kappa_low", "kappa_high", "rank_correlation"), np.nan)
            if len(both) and "rating" not in (both.metric.iloc[0], both.metric_other.iloc[0]):
                tables = confusion(
                    both["index"].to_numpy(), *(np.sign(both[c] - 0.5) for c in ("value", "value_other"))
                )
                measured["equal"] = float(tables.sum(0).trace() / len(both))
                measured["kappa"] = float(cohen_kappa(tables.sum(0)))
                means = bootstrap_means(tables.reshape(len(tables), -1).T.astype(float))
                measured["kappa_low"], measured["kappa_high"] = interval(cohen_kappa(means.reshape(-1, 3, 3)))
            points = both[both.reporting].groupby("identity")[["value", "value_other"]].mean()
            if len(points) > 2 and (points.nunique() > 1).all():
                measured["rank_correlation"] = float(spearmanr(points.value, points.value_other).statistic)
            rows.append(row | measured | {"points": len(points)})
    return pd.DataFrame(rows)


def confusion(prompts: NDArray[np.int64], one: Any, other: Any) -> NDArray[np.int64]:
    """Return (prompts, 3, 3): how often two judges say loss, tie or win, given as -1, 0, 1."""
    _, position = np.unique(prompts, return_inverse=True)
    tables = np.zeros((position.max() + 1, 3, 3), dtype=np.int64)
    np.add.at(tables, (position, np.asarray(one, int) + 1, np.asarray(other, int) + 1), 1)
    return tables


def cohen_kappa(tables: NDArray[Any]) -> NDArray[np.float64]:
    """Return Cohen's kappa of (..., 3, 3) tables; 1 where both judges always say the same one thing."""
    shares = tables / tables.sum((-2, -1), keepdims=True)
    observed = np.trace(shares, axis1=-2, axis2=-1)
    expected = (shares.sum(-1) * shares.sum(-2)).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected < 1, (observed - expected) / (1 - expected), 1.0)


def rankings(verdicts: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """Return for each selected point and judge its `quality` and `rank` on the reporting prompts.

    `beta_of_judge` and `lr_of_judge`: the method's best point on the selection prompts by this judge, the selected one
    where it is as good.
    """
    rows = []
    for key, group in best.groupby(GROUP, sort=False, dropna=False):
        of_group = verdicts[(verdicts[GROUP] == list(key)).all(axis=1)]
        for judge, table in of_group.groupby("judge", sort=False):
            quality = table[table.reporting].groupby("identity").value.mean()
            means = [quality.reindex(identities).mean(skipna=False) for identities in group.identities]
            ranks = pd.Series(means, dtype=float).rank(ascending=False, method="min").tolist()
            of_points = table[~table.reporting].groupby(["method", "beta", "lr"]).value.mean()
            for point, mean, rank in zip(group.to_dict("records"), means, ranks, strict=True):
                entry = {name: point[name] for name in (*GROUP, "method", "beta", "lr")}
                beta, lr = _best_of(of_points, point)
                entry |= {
                    "judge": judge,
                    "further": bool(table.further.iloc[0]),
                    "metric": table.metric.iloc[0],
                    "quality": mean,
                    "rank": rank,
                }
                rows.append(entry | {"beta_of_judge": beta, "lr_of_judge": lr})
    return pd.DataFrame(rows)


def _best_of(means: pd.Series[float], point: dict[Hashable, Any]) -> tuple[float, float]:
    """Return beta and lr of the method's highest mean, those of the selected point where it is as high.

    means: of points, by method, beta and lr. NaN without any.
    """
    if point["method"] not in means:
        return np.nan, np.nan
    of_method, selected = means[point["method"]], (point["beta"], point["lr"])
    is_best = selected in of_method and np.isclose(of_method[selected], of_method.max(), rtol=0, atol=1e-12)
    beta, lr = selected if is_best else of_method.idxmax()
    return float(beta), float(lr)


def with_outcomes(of_selecting: pd.DataFrame, verdicts: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """Return the wins, ties and losses of the selected points by every pairwise judge, with the column `judge`.

    of_selecting: of reporting_split.verdicts, by the judge that selects; other judges have rows below it.
    """
    of_further = verdicts.further.astype(bool)
    selecting = verdicts[~of_further].drop_duplicates(GROUP).set_index(GROUP).judge.to_dict()
    judges = [selecting.get(key, "") for key in of_selecting[GROUP].itertuples(index=False, name=None)]
    # Of several samples the mean of a prompt is no verdict.
    single = of_further & verdicts.reporting.astype(bool) & (verdicts.metric == "win_rate")
    pairwise = verdicts[single] if (verdicts["sample"] == 0).all() else verdicts[:0]
    rows = []
    for judge, table in pairwise.groupby("judge", sort=False):
        by_prompt = table.groupby(["identity", "index"]).value.mean()
        for point in best.to_dict("records"):
            seeds = [by_prompt[identity].to_numpy() for identity in point["identities"] if identity in by_prompt]
            if seeds and len(seeds) == len(point["identities"]):
                row = {name: point[name] for name in (*STUDY, "beta", "lr", "seeds")} | win_tie_lose(seeds)
                rows.append(row | {"quality_reporting": np.mean([np.mean(values) for values in seeds]), "judge": judge})
    tables = [of_selecting.assign(judge=judges), pd.DataFrame(rows)]
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)


def disagreements(verdicts: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """Return the pairs of methods that two judges order oppositely, each beyond noise: p by Holm below LEVEL.

    Of the selected points, on the reporting prompts; `difference` is of the judge's metric, method minus other.
    """
    rows = []
    for key, group in best.groupby(GROUP, sort=False, dropna=False):
        of_group = verdicts[(verdicts[GROUP] == list(key)).all(axis=1) & verdicts.reporting.astype(bool)]
        tables = {judge: _differences(table, group) for judge, table in of_group.groupby("judge", sort=False)}
        for (one, first), (other, second) in combinations(tables.items(), 2):
            both = first.merge(second, on=["method", "other"], suffixes=("", "_other"))
            opposite = both[
                (both.p_holm < LEVEL) & (both.p_holm_other < LEVEL) & (both.difference * both.difference_other < 0)
            ]
            for row in opposite.to_dict("records"):
                rows.append(_disagreement(key, row, str(one), str(other)))
    return pd.DataFrame(rows)


def _differences(table: pd.DataFrame, group: pd.DataFrame) -> pd.DataFrame:
    """Compare the selected points of a group pairwise by the verdicts of one judge, on the prompts they share."""
    by_prompt = table.groupby(["identity", "index"]).value.mean().unstack("index")
    known = [
        (m, ids) for m, ids in zip(group.method, group.identities, strict=True) if set(ids) <= set(by_prompt.index)
    ]
    values = pd.DataFrame([by_prompt.loc[ids].mean() for _, ids in known]).dropna(axis=1)
    return paired_differences([method for method, _ in known], values.to_numpy())


def _disagreement(key: tuple[Hashable, ...], row: dict[Hashable, Any], one: str, other: str) -> dict[str, Any]:
    of_group = dict(zip(map(str, GROUP), key, strict=True))
    of_one = {"judge": one, "difference": row["difference"], "p_holm": row["p_holm"]}
    of_other = {f"{name}_other": row[f"{name}_other"] for name in ("difference", "p_holm")}
    return {**of_group, "method": row["method"], "against": row["other"], **of_one, "judge_other": other, **of_other}
