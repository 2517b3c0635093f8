"""Methods against one another: are pairwise and pointwise ones apart, which two differ, what is on the Pareto front."""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

DRAWS = 10_000  # of a bootstrap: the ends of a 95 % interval stand on 250 of them each
BLOCK = 500  # drawn at once: so many times the prompts in memory


def mean_difference_and_p(high: Sequence[float], low: Sequence[float]) -> tuple[float, float]:
    """Mean of `high` minus mean of `low`, and how often a split of all values into groups of these sizes gives at least
    as much: the exact one-sided permutation test of arXiv 2502.01237, section 4 (70 splits of eight methods)."""
    from scipy.stats import permutation_test

    def difference(a: NDArray[np.float64], b: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return a.mean(axis) - b.mean(axis)

    result = permutation_test(
        (np.asarray(high, float), np.asarray(low, float)),
        difference,
        permutation_type="independent",
        alternative="greater",
        n_resamples=np.inf,
        vectorized=True,
    )
    return float(result.statistic), float(result.pvalue)


def pairwise_against_pointwise(best: pd.DataFrame) -> pd.DataFrame:
    """One row per setup, init and variant in which there are two methods of each kind at least: mean quality_reporting
    of the pairwise ones minus that of the pointwise ones, and p of the permutation test. best: of best_points."""
    rows = []
    for key, group in best.groupby(["setup", "init", "variant"], sort=False, dropna=False):
        kinds = {kind: group.quality_reporting[group.kind == kind].tolist() for kind in ("pairwise", "pointwise")}
        if min(map(len, kinds.values())) > 1:
            difference, p = mean_difference_and_p(kinds["pairwise"], kinds["pointwise"])
            splits = math.comb(len(group), len(kinds["pairwise"]))
            rows.append([*key, *map(len, kinds.values()), difference, p, splits])
    return pd.DataFrame(
        rows, columns=["setup", "init", "variant", "pairwise", "pointwise", "difference", "p", "splits"]
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for asking so many questions at once (Holm 1979): reject what is below the level you want."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    result = np.empty(len(order))
    result[order] = np.minimum(1.0, np.maximum.accumulate(adjusted))
    return result.tolist()


def bootstrap_means(values: NDArray[np.float64], seed: int = 0, draws: int = DRAWS) -> NDArray[np.float64]:
    """(rows, prompts) -> (draws, rows): means over prompts drawn with replacement, the same ones for every row, which
    keeps rows paired: a column minus another is the bootstrap of their difference."""
    generator, prompts = np.random.default_rng(seed), values.shape[1]
    means = []
    for begin in range(0, draws, BLOCK):
        count = min(BLOCK, draws - begin)
        drawn = generator.integers(prompts, size=(count, prompts))
        drawn += prompts * np.arange(count)[:, None]  # a bin for each prompt of each draw
        times = np.bincount(drawn.ravel(), minlength=count * prompts).reshape(count, prompts)
        means.append(times @ values.T / prompts)
    return np.concatenate(means)


def interval(means: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of (draws,) bootstrap means."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_p(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Of the two-sided paired t-test over prompts; 1 where nothing differs."""
    from scipy.stats import ttest_rel

    difference = a - b
    return float(ttest_rel(a, b).pvalue) if difference.std() > 0 else float(not difference.any())


def paired_differences(names: Sequence[str], values: NDArray[np.float64]) -> pd.DataFrame:
    """Every row against every other on the same prompts: mean difference, bootstrap interval, p of the paired t-test,
    and that p adjusted by Holm over all pairs. values: (rows, prompts)."""
    means, rows = bootstrap_means(values), []
    for i, j in combinations(range(len(names)), 2):
        low, high = interval(means[:, i] - means[:, j])
        difference, p = (values[i] - values[j]).mean(), paired_p(values[i], values[j])
        rows.append({"method": names[i], "other": names[j], "difference": difference, "low": low, "high": high, "p": p})
    table = pd.DataFrame(rows, columns=["method", "other", "difference", "low", "high", "p"])
    return table.assign(p_holm=holm(table.p.tolist()))


def on_pareto_front(quality: Sequence[float], kl: Sequence[float]) -> list[bool]:
    """Of each point: does no other have at least its quality for at most its KL, and more of one? Not-a-number is never
    on the front."""
    q, k = np.asarray(quality, float), np.asarray(kl, float)
    beaten = (q[None] >= q[:, None]) & (k[None] <= k[:, None]) & ((q[None] > q[:, None]) | (k[None] < k[:, None]))
    return (~beaten.any(1) & np.isfinite(q) & np.isfinite(k)).tolist()
