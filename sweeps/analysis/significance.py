"""Statistical comparisons of methods: permutation test, paired tests, bootstrap intervals, Pareto front."""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sweeps.analysis.selection import GROUP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

COMPARISON = ["difference", "low", "high", "p"]  # of two points: the columns of `compare`
Z95 = 1.96  # standard errors from the mean to either end of its 95 % interval
NUM_RESAMPLES = 10_000  # of a bootstrap: 250 of them lie beyond either end of a 95 % interval
MAX_SPLITS = 100_000  # of methods into two groups, all of which are enumerated; 16 methods have at most 12,870
BLOCK = 500  # resamples drawn at once, which bounds memory


def mean_difference_and_p(high: Sequence[float], low: Sequence[float]) -> tuple[float, float]:
    """Return mean(high) - mean(low) and the p-value of the one-sided permutation test.

    p is the fraction of splits of all values into groups of these sizes whose difference is at least as large
    (arXiv 2502.01237, section 4: 70 splits of eight methods): of all splits, or of MAX_SPLITS random ones where there
    are more.
    """
    from scipy.stats import permutation_test

    result = permutation_test(
        (high, low),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        permutation_type="independent",
        alternative="greater",
        n_resamples=MAX_SPLITS,
        vectorized=True,
        rng=0,
    )
    return float(result.statistic), float(result.pvalue)


def pairwise_against_pointwise(best: pd.DataFrame) -> pd.DataFrame:
    """Compare the kinds of methods: mean quality_reporting of pairwise minus pointwise ones, and its permutation test.

    Return one row per setup, init and variant with at least two methods of each kind. best: of select_points.
    """
    rows = []
    for key, group in best.groupby(GROUP, sort=False, dropna=False):
        kinds = {kind: group.quality_reporting[group.kind == kind].tolist() for kind in ("pairwise", "pointwise")}
        if min(map(len, kinds.values())) > 1:
            difference, p = mean_difference_and_p(kinds["pairwise"], kinds["pointwise"])
            splits = min(MAX_SPLITS, math.comb(len(group), len(kinds["pairwise"])))
            rows.append([*key, *map(len, kinds.values()), difference, p, splits])
    return pd.DataFrame(rows, columns=[*GROUP, "pairwise", "pointwise", "difference", "p", "splits"])


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple comparisons (Holm 1979): reject those below the chosen level."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    result = np.empty(len(order))
    result[order] = np.minimum(1.0, np.maximum.accumulate(adjusted))
    return result.tolist()


def bootstrap_means(
    values: NDArray[np.float64], seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> NDArray[np.float64]:
    """Return (num_resamples, rows): means over prompts drawn with replacement. values: (rows, prompts).

    All rows share the drawn prompts, so the difference of two columns is the paired bootstrap of their difference.
    """
    generator, prompts = np.random.default_rng(seed), values.shape[1]
    means = []
    for start in range(0, num_resamples, BLOCK):
        count = min(BLOCK, num_resamples - start)
        drawn = generator.integers(prompts, size=(count, prompts))
        drawn += prompts * np.arange(count)[:, None]  # a bin for each prompt of each resample
        weights = np.bincount(drawn.ravel(), minlength=count * prompts).reshape(count, prompts)
        means.append(weights @ values.T / prompts)
    return np.concatenate(means)


def interval(means: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % percentile interval of (num_resamples,) bootstrap means."""
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return low, high


def paired_p(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return p of the two-sided paired t-test over prompts; 1 when all differences are 0."""
    from scipy.stats import ttest_rel

    difference = a - b
    return float(ttest_rel(a, b).pvalue) if difference.std() > 0 else float(not difference.any())


def compare(values: NDArray[np.float64], means: NDArray[np.float64], i: int, j: int) -> dict[str, float]:
    """Compare rows i and j on the same prompts: mean difference, bootstrap interval, p of the paired t-test.

    values: (rows, prompts). means: of bootstrap_means(values).
    """
    low, high = interval(means[:, i] - means[:, j])
    difference = (values[i] - values[j]).mean()
    return {"difference": difference, "low": low, "high": high, "p": paired_p(values[i], values[j])}


def paired_differences(names: Sequence[str], values: NDArray[np.float64]) -> pd.DataFrame:
    """Compare every two rows; `p_holm` is p adjusted by Holm over all pairs. values: (rows, prompts)."""
    means, pairs = bootstrap_means(values), combinations(range(len(names)), 2)
    rows = [{"method": names[i], "other": names[j], **compare(values, means, i, j)} for i, j in pairs]
    table = pd.DataFrame(rows, columns=["method", "other", *COMPARISON])
    return table.assign(p_holm=holm(table.p.tolist()))


def on_pareto_front(quality: Sequence[float], kl: Sequence[float]) -> list[bool]:
    """Return for each point whether it is Pareto-optimal: no other has quality >= and KL <=, with one of them strict.

    A point with NaN is never on the front.
    """
    q, k = np.asarray(quality, float), np.asarray(kl, float)
    dominated = (q[None] >= q[:, None]) & (k[None] <= k[:, None]) & ((q[None] > q[:, None]) | (k[None] < k[:, None]))
    return (~dominated.any(1) & np.isfinite(q) & np.isfinite(k)).tolist()
